"""What ``run_serve`` was asked for, as it can be handed to another process, and the server itself."""

import copy
import os
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI
from uvicorn.supervisors import Multiprocess

from recbole_ssm.errors import UserError
from recbole_ssm.serving.http.app import create_app
from recbole_ssm.serving.http.gate import Limits
from recbole_ssm.serving.http.metrics import FOLDER
from recbole_ssm.serving.http.store import MOST_BYTES, MOST_SESSIONS, SECONDS, MemoryStore, RedisStore
from recbole_ssm.serving.http.titles import read_titles, titles_beside
from recbole_ssm.serving.recommender import Recommender
from recbole_ssm.serving.session import Sessions


@dataclass(frozen=True)
class Served:
    """A server's settings.

    Attributes:
        checkpoint: the model's file.
        device: see :meth:`~recbole_ssm.serving.recommender.Recommender.load`.
        rule: of sessions.
        redis: address of the store; sessions are kept in memory where absent.
        session_seconds: until a session in Redis is forgotten.
        most_sessions: in memory.
        most_session_bytes: in memory.
        items: RecBole's ``.item`` file, with titles; that of the model's dataset where absent.
        title: its column.
        token: that requests are to bear.
        limits: of requests.
    """

    checkpoint: str
    device: str | None = None
    rule: str = "window"
    redis: str | None = field(default=None, repr=False)
    session_seconds: int = SECONDS
    most_sessions: int = MOST_SESSIONS
    most_session_bytes: int = MOST_BYTES
    items: str | None = None
    title: str | None = None
    token: str | None = field(default=None, repr=False)
    limits: Limits = Limits()  # noqa: RUF009 - it is frozen

    def app(self) -> FastAPI:
        """The application.

        Raises:
            UserError: for what cannot be read, or does not go together.
        """
        recommender = Recommender.load(self.checkpoint, self.device)
        store = (
            RedisStore(self.redis, Sessions(recommender, self.rule), self.session_seconds)
            if self.redis
            else MemoryStore(self.most_sessions, self.most_session_bytes)
        )
        vocabulary = recommender.vocabulary
        if self.items:
            titles = read_titles(self.items, recommender.config, vocabulary, self.title)
        else:
            titles = titles_beside(recommender.config, vocabulary)
        return create_app(recommender, store, self.rule, titles, self.limits, self.token)


def serve(served: Served, host: str = "127.0.0.1", port: int = 8000, workers: int = 1) -> None:
    """Serve until SIGTERM or SIGINT; requests that have begun are answered first.

    Args:
        served: what.
        host: address to listen at.
        port: 0 for a free one.
        workers: processes, which share their sessions by Redis.

    Raises:
        UserError: for settings that do not go together, and an address that cannot be listened at.
    """
    if workers < 1:
        raise UserError(f"workers is {workers}: at least one process is needed.")
    if workers > 1 and not served.redis:
        raise UserError(f"workers is {workers}: several processes share their sessions by Redis, so add --redis.")
    app = served.app()
    listener = _listen(host, port)
    where = f"[{host}]" if ":" in host else host
    print(f"http://{where}:{listener.getsockname()[1]} serves {served.checkpoint}; Ctrl+C ends it.", flush=True)
    logs = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    logs["loggers"]["recbole_ssm.http"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    config = uvicorn.Config(
        app if workers == 1 else served.app,
        factory=workers > 1,
        workers=workers,
        log_config=logs,
        access_log=False,  # it holds paths; the gate's lines do not
        timeout_keep_alive=30,
        timeout_worker_healthcheck=60,  # a worker answers after it has imported torch
        timeout_graceful_shutdown=int(served.limits.seconds) + 1,
        server_header=False,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again when all is answered
    if workers == 1:
        uvicorn.Server(config).run([listener])
        return
    del app
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(name, threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder
        Multiprocess(config, [listener]).run()


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port is {port}: choose a number from 0 to 65535.")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"{host}, port {port}, cannot be listened at ({error.strerror}): choose another --port."
        ) from error
    listener.set_inheritable(True)
    return listener
