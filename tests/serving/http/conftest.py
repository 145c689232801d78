"""One small model for all, servers in this process, and a real Redis."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn

from recbole_ssm.serving.http.app import create_app

from ..conftest import recommender


@contextmanager
def in_folder(folder: Path):
    old = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(old)


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """A model that steps."""
    with in_folder(tmp_path_factory.mktemp("served")):
        return recommender("Mamba4Rec", MAX_ITEM_LIST_LENGTH=20)


@pytest.fixture(scope="session")
def timed(tmp_path_factory):
    """One that reads times."""
    with in_folder(tmp_path_factory.mktemp("timed")):
        return recommender("STARRec", MAX_ITEM_LIST_LENGTH=20, use_time_gaps=True)


@asynccontextmanager
async def running(app):
    """A client of an application in this event loop."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        yield client


def ask(served, requests, **settings):
    """Answers to ``(method, path, json)`` of one server, asked one after the other."""

    async def all_of_them():
        async with running(create_app(served, **settings)) as client:
            return [await client.request(method, path, json=body) for method, path, body in requests]

    return asyncio.run(all_of_them())


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def listening(app):
    """The address of an application behind a real uvicorn."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def until(happens, seconds: float = 60.0):
    """Wait for something; what it was, at last."""
    end = time.monotonic() + seconds
    while not (found := happens()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return found


class Redis:
    """A server that can be stopped and started again with what it kept."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self):
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--save", "", "--appendonly", "yes"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        until(self.answers)

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as one:
                one.sendall(b"PING\r\n")
                return one.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    pytest.importorskip("redis", reason="the extra redis is not installed")
    if shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server here: apt-get install redis-server")
    server = Redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()
