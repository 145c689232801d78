"""The command: what it refuses, how it listens and ends, and what many clients at once see."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import psutil
import pytest

from recbole_ssm.cli import run_serve
from recbole_ssm.quick_start import train_and_test
from recbole_ssm.serving import Recommender
from recbole_ssm.serving.http.app import create_app
from recbole_ssm.serving.http.gate import Limits
from recbole_ssm.serving.http.served import Served

from ...conftest import listening as listening_addresses
from ...conftest import random_rows, small_config, write_dataset
from .conftest import free_port, in_folder, listening, until

TOKEN = "a-long-enough-token"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    with in_folder(folder):
        write_dataset("tiny", random_rows())
        return str(folder / train_and_test(small_config("Mamba4Rec", epochs=1)).checkpoint)


def run(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["run_serve", *arguments])
    return run_serve.main(), capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--host", "203.0.113.1"], {"RECBOLE_SSM_TOKEN": TOKEN}, "203.0.113.1, port 8000, cannot be listened at"),
        (["--workers", "2"], {}, "several processes share their sessions by Redis"),
        (["--workers", "0"], {}, "workers is 0"),
        (["--timeout", "0"], {}, "--timeout is 0.0: choose a number above 0"),
        (["--timeout", "nan"], {}, "--timeout is nan"),
        (["--timeout", "inf"], {}, "--timeout is inf"),
        (
            ["--session_days", "3"],
            {},
            "--session_days is of sessions in Redis, and these are kept in memory: leave it out",
        ),
        (
            ["--max_sessions", "9", "--redis", "redis://localhost"],
            {},
            "--max_sessions is of sessions in memory, and",
        ),
        (["--max_session_mb", "9"], {"RECBOLE_SSM_REDIS": "redis://:secret@localhost"}, "these are kept in Redis"),
        (["--title", "x"], {}, "--title is a column of --items"),
        (["--redis", "redis://:secret@localhost"], {}, "set RECBOLE_SSM_REDIS"),
        (["--token_file", "nothing"], {}, "--token_file nothing cannot be read"),
        ([], {"RECBOLE_SSM_TOKEN": "secret"}, "is to have 16 or more"),
        (["--items", "nothing.item"], {}, "nothing.item cannot be read"),
        (["--redis", "http://localhost"], {}, "should read like redis://"),
        (["--port", "99999"], {}, "choose a number from 0 to 65535"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(arguments, environment, said, checkpoint, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    status, printed = run(monkeypatch, capsys, "--checkpoint", checkpoint, *arguments)
    assert (status, printed.count("\n")) == (2, 1)
    assert said in printed
    assert "secret" not in printed


def test_options_of_sessions_go_to_where_these_are_kept(monkeypatch, capsys):
    found = []
    monkeypatch.setattr("recbole_ssm.serving.http.served.serve", lambda served, *_: found.append(served))
    words = ["--checkpoint", "model.pth"]
    for more in (
        [],
        ["--max_sessions", "9", "--max_session_mb", "2"],
        ["--redis", "redis://x", "--session_days", "0.5"],
    ):
        assert run(monkeypatch, capsys, *words, *more) == (0, "")
    plain, memory, redis = found
    assert plain == Served("model.pth")
    assert memory == Served("model.pth", most_sessions=9, most_session_bytes=2 << 20)
    assert redis == Served("model.pth", redis="redis://x", session_seconds=12 * 3600)


def test_a_port_in_use_and_a_file_that_is_none(checkpoint, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, printed = run(monkeypatch, capsys, "--checkpoint", checkpoint, "--port", str(taken.getsockname()[1]))
    assert status == 2
    assert "choose another --port" in printed
    status, printed = run(monkeypatch, capsys, "--checkpoint", "nothing.pth")
    assert (status, printed.count("\n")) == (2, 1)


class Server:
    """The command in a process of its own."""

    def __init__(self, checkpoint: str, *arguments: str):
        command = [sys.executable, "-m", "recbole_ssm.cli.run_serve", "--checkpoint", checkpoint]
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "RECBOLE_SSM_TOKEN": TOKEN}, start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self._reader.start()
        self.address = until(self._address)[0]
        until(self.healthy)

    def _address(self) -> list[str]:
        assert self.process.poll() is None, self.lines
        return re.findall(r"^(http://\S+) serves", "".join(self.lines), re.MULTILINE)

    def healthy(self) -> bool:
        assert self.process.poll() is None, self.lines
        try:
            return httpx.get(self.address + "/health").status_code == 200
        except httpx.TransportError:
            return False

    def end(self, how: int = signal.SIGTERM) -> int:
        if how == signal.SIGKILL:
            os.killpg(self.process.pid, how)  # of its workers, too
        else:
            self.process.send_signal(how)
        status = self.process.wait(60)
        self._reader.join(10)
        return status


def test_the_command_serves_on_loopback_and_ends_when_all_is_answered(checkpoint):
    server = Server(checkpoint, "--port", "0")
    try:
        found = Recommender.load(checkpoint, "cpu").recommend([["i1", "i2"]], 5)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        body = {"items": ["i1", "i2"], "k": 5}
        answer = httpx.post(server.address + "/recommend", json=body, headers=headers).json()
        assert [one["item"] for one in answer["recommendations"]] == found.items[0]
        assert not any(listening_addresses(psutil.Process(server.process.pid)).values())
        # A request whose body is on its way when the end is asked for.
        host, port = server.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 30) as slow:
            head = f"POST /recommend HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 17\r\n"
            slow.sendall(head.encode() + b'Content-Type: application/json\r\n\r\n{"items": ')
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert server.process.poll() is None
            slow.sendall(b'["i1"]}')
            assert slow.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert server.end() == 0
    finally:
        server.process.kill()
    log = "".join(server.lines)
    assert "POST /recommend 200" in log
    assert TOKEN not in log
    assert "i1" not in log.replace(checkpoint, "")


def test_a_body_that_does_not_arrive(served):
    with listening(create_app(served, limits=Limits(seconds=0.4))) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 30) as slow:
            slow.sendall(
                b"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
            )
            assert slow.recv(1 << 16).startswith(b"HTTP/1.1 408")


async def clients(address: str, sessions: range, events: range) -> None:
    """Events of many sessions at once, one after the other within each.

    A client that hears nothing of an event, for the server was ended, sends it again.
    """
    headers, at_once = {"Authorization": f"Bearer {TOKEN}"}, asyncio.Semaphore(50)  # httpx' own queue is a slow one
    async with httpx.AsyncClient(base_url=address, timeout=60, headers=headers) as client:

        async def one(session: int) -> None:
            for n in events:
                body = {"items": [f"i{(session + 7 * n) % 30}"], "after": n, "k": 3}
                while True:
                    try:
                        async with at_once:
                            answer = await client.post(f"/sessions/{session}/events", json=body)
                    except httpx.TransportError:
                        await asyncio.sleep(0.2)
                        continue
                    if answer.status_code == 409 and f"has {n + 1} events" in answer.text:
                        break  # it was taken, and the answer was lost
                    assert answer.status_code == 200, answer.text
                    assert answer.json()["events"] == n + 1
                    break

        await asyncio.gather(*(one(session) for session in sessions))


@pytest.mark.slow
def test_a_thousand_sessions_over_restarts_of_two_workers(checkpoint, redis_server):
    """None lost, none crossed, though the server is ended once and killed once while they go on."""
    arguments = ("--workers", "2", "--redis", redis_server.url, "--port", str(free_port()))
    server = Server(checkpoint, *arguments)
    address = server.address
    load = threading.Thread(target=lambda: asyncio.run(clients(address, range(1000), range(6))))
    load.start()
    try:
        for how in (signal.SIGTERM, signal.SIGKILL):
            time.sleep(4)
            assert load.is_alive()
            server.end(how)
            server = Server(checkpoint, *arguments)
        load.join(300)
        assert not load.is_alive()
        model, headers = Recommender.load(checkpoint, "cpu"), {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=address, headers=headers) as client:
            for session in range(1000):
                history = [f"i{(session + 7 * n) % 30}" for n in range(6)]
                answer = client.get(f"/sessions/{session}/recommendations?k=5").json()
                assert answer["events"] == 6
                if session % 25 == 0:
                    expected = model.recommend([history], 5).items[0]
                    assert [one["item"] for one in answer["recommendations"]] == expected
            counted = client.get("/metrics").text  # of both processes
        asked = re.search(r'route="/sessions/{session}/recommendations",status="200"} (\S+)', counted)
        assert asked is not None
        assert float(asked[1]) == 1000
    finally:
        server.end()
