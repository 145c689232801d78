"""What every request passes: the token, limits of size and time, counts, and a line of the log."""

import hmac
import logging
import time
from dataclasses import dataclass
from typing import Any

import anyio
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recbole_ssm.serving.http.metrics import Metrics

log = logging.getLogger("recbole_ssm.http")

# What can be read without the token: the page, which holds no data, and whether the server runs.
OPEN = {"/", "/health"}
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


@dataclass(frozen=True)
class Limits:
    """What one client can ask for.

    Attributes:
        body: bytes of a request.
        seconds: until a request is given up.
        batch: requests that are answered together.
        waiting: requests of each kind that may wait.
    """

    body: int = 1 << 20
    seconds: float = 30.0
    batch: int = 256
    waiting: int = 10_000


def failure(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as clients get it; one that passes says when to ask again."""
    headers = {"Retry-After": "1"} if status == 503 else headers
    message = message.encode(errors="replace").decode()  # half a surrogate pair, which JSON can name, is no text
    return JSONResponse({"error": {"type": kind, "message": message}}, status, headers)


class Gate:
    """Around the application.

    The log names the method, the route and the status of a request, not its path, query, body or headers: these hold
    who a session is of, what it looks at, and the token.

    Args:
        app: what is guarded.
        limits: of a request.
        token: that requests are to bear, if any.
        metrics: what is counted.
    """

    def __init__(self, app: ASGIApp, limits: Limits, token: str | None, metrics: Metrics):
        self._app, self._limits, self._metrics = app, limits, metrics
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status, size = time.perf_counter(), 0, 0
        whole = scope["method"] != "POST"  # no other route waits for a body
        headers = dict(scope["headers"])

        async def counted() -> Message:
            nonlocal size, whole
            message = await receive()
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self._limits.body:
                raise HTTPException(413, f"the body has more than {self._limits.body} bytes: send less at a time.")
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def refuse(*error: Any) -> None:
            await failure(*error)(scope, receive, noted)

        try:
            length = headers.get(b"content-length", b"0")
            if self._token and scope["path"] not in OPEN and not self._admitted(headers):
                message = "send the header Authorization: Bearer, with the server's token."
                await refuse(401, "unauthorized", message, {"WWW-Authenticate": "Bearer"})
            elif length.isdigit() and int(length) > self._limits.body:
                message = f"the body has {int(length)} bytes, and at most {self._limits.body} are read: send less."
                await refuse(413, "too_large", message, {"Connection": "close"})
            else:
                with anyio.move_on_after(self._limits.seconds) as limit:
                    await self._app(scope, counted, noted)
                if limit.cancelled_caught and not status:
                    if whole:
                        await refuse(503, "timeout", "the server took too long: ask again in a second.")
                    else:
                        message = f"the body did not arrive within {self._limits.seconds:g} s."
                        await refuse(408, "timeout", message, {"Connection": "close"})
        finally:
            seconds = time.perf_counter() - begin
            route = getattr(scope.get("route"), "path", "(none)")
            method = scope["method"] if scope["method"] in METHODS else "(other)"
            self._metrics.requests.labels(method, route, status or 500).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            log.info("%s %s %s in %.1f ms", method, route, status or 500, 1000 * seconds)

    def _admitted(self, headers: dict[bytes, bytes]) -> bool:
        assert self._token is not None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._token)
