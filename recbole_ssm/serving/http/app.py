"""The application: routes, and errors in one form."""

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

import recbole_ssm
from recbole_ssm.errors import UserError
from recbole_ssm.serving.http import schemas
from recbole_ssm.serving.http.gate import Gate, Limits, failure
from recbole_ssm.serving.http.metrics import Metrics
from recbole_ssm.serving.http.refused import Refused
from recbole_ssm.serving.http.service import Answer, Ask, Choice, Service, Turn
from recbole_ssm.serving.http.store import MemoryStore, Store
from recbole_ssm.serving.http.titles import Titles
from recbole_ssm.serving.recommender import Recommender
from recbole_ssm.serving.session import Sessions

KINDS = {400: "malformed", 401: "unauthorized", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}


def create_app(
    recommender: Recommender,
    store: Store | None = None,
    rule: str = "window",
    titles: Titles | None = None,
    limits: Limits = Limits(),  # noqa: B008 - it is frozen
    token: str | None = None,
) -> FastAPI:
    """The server's application.

    Args:
        recommender: the model.
        store: of sessions; in memory where absent.
        rule: of sessions, see :class:`~recbole_ssm.serving.session.Sessions`.
        titles: what items are called.
        limits: of requests.
        token: that requests are to bear, if any.

    Raises:
        UserError: for a rule that the model does not follow.
    """
    store = MemoryStore() if store is None else store
    titles = Titles(recommender.vocabulary) if titles is None else titles
    metrics = Metrics()
    if isinstance(store, MemoryStore):
        metrics.watch(store)
    service = Service(recommender, store, Sessions(recommender, rule), metrics, limits.batch, limits.waiting)

    @asynccontextmanager
    async def serving(_: FastAPI) -> AsyncIterator[None]:
        await service.warm_up()
        task = asyncio.create_task(service.run())
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.close()

    app = FastAPI(
        title="recbole-ssm",
        version=recbole_ssm.__version__,
        summary="Recommendations for histories, and live sessions that carry their state.",
        lifespan=serving,
        docs_url=None,  # its page comes from another host
        redoc_url=None,
        # The gate holds the token to be right; here it is written down.
        dependencies=[Depends(HTTPBearer(auto_error=False))] if token else [],
    )
    app.add_middleware(Gate, limits=limits, token=token, metrics=metrics)
    _handle_errors(app)
    _add_pages(app, metrics)

    def recommended(answer: Answer) -> list[schemas.Recommended] | None:
        return None if answer.items is None else named(answer.items)

    def named(items: list[tuple[str, float]]) -> list[schemas.Recommended]:
        return [schemas.Recommended(item=item, score=score, title=titles.of(item)) for item, score in items]

    def of_session(answer: Answer) -> schemas.SessionAnswer:
        return schemas.SessionAnswer(events=answer.events, recommendations=recommended(answer), unknown=answer.unknown)

    def route(method: str, path: str, *statuses: int, **how: Any) -> Any:
        return app.api_route(
            path, methods=[method], responses=schemas.failures(*statuses), response_model_exclude_none=True, **how
        )

    @route("POST", "/recommend")
    async def recommend(request: schemas.RecommendRequest) -> schemas.RecommendAnswer:
        """What comes next after a history."""
        candidates = None if request.candidates is None else tuple(str(item) for item in request.candidates)
        choice = Choice(request.k, request.exclude_seen, candidates)
        answer = await service.recommend(Ask(request.tokens, request.times, choice, request.at))
        return schemas.RecommendAnswer(recommendations=recommended(answer) or [], unknown=answer.unknown)

    @route("POST", "/sessions/{session}/events", 409)
    async def add_events(session: schemas.SessionId, request: schemas.EventsRequest) -> schemas.SessionAnswer:
        """Events of a session, which begins with its first; all of them are taken, or none."""
        choice = None if request.k is None else Choice(request.k, request.exclude_seen)
        turn = Turn(session, request.tokens, request.times, choice, request.after, begins=True, at=request.at)
        return of_session(await service.turn(turn))

    @route("GET", "/sessions/{session}/recommendations", 404, 409)
    async def session_recommendations(
        session: schemas.SessionId, k: schemas.KQuery = 10, exclude_seen: schemas.SeenQuery = True,
        at: schemas.AtQuery = None,
    ) -> schemas.SessionAnswer:  # fmt: skip
        """What comes next in a session."""
        return of_session(await service.turn(Turn(session, choice=Choice(k, exclude_seen), at=at)))

    @route("DELETE", "/sessions/{session}", 404, status_code=204, response_class=Response)
    async def forget_session(session: schemas.SessionId) -> None:
        """Forget a session."""
        await service.turn(Turn(session, forgets=True))

    @route("GET", "/similar", 404)
    async def similar(item: Annotated[str, Query(max_length=1000)], k: schemas.KQuery = 10) -> schemas.SimilarAnswer:
        """Items like another one."""
        return schemas.SimilarAnswer(similar=named(await service.similar(item, k)))

    @route("GET", "/items")
    def items(
        query: Annotated[str, Query(max_length=200, description="Words of the title.")] = "",
        limit: Annotated[int, Query(ge=1, le=schemas.MOST)] = 20,
    ) -> schemas.ItemsAnswer:
        """Items that the model knows, by their titles."""
        found = titles.search(query, limit)
        return schemas.ItemsAnswer(items=[schemas.Named(item=item, title=titles.of(item)) for item in found])

    @route("GET", "/health")
    async def health() -> schemas.Health:
        """Whether requests can be answered."""
        await store.check()
        return schemas.Health(
            status="ok",
            model=recommender.config["model"],
            items=recommender.vocabulary.item_num - 1,
            digest=recommender.digest,
        )

    return app


def _add_pages(app: FastAPI, metrics: Metrics) -> None:
    page = files(__package__).joinpath("page.html").read_text("utf-8")
    # The page's own script and style, and no others.
    allowed = {
        f"{tag}-src": " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    policy = {"default-src": "'none'", "connect-src": "'self'", "base-uri": "'none'", "form-action": "'none'",
              "frame-ancestors": "'none'", **allowed}  # fmt: skip
    headers = {
        "Content-Security-Policy": "; ".join(f"{key} {value}" for key, value in policy.items()),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    @app.get("/", include_in_schema=False)
    async def demo() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", response_class=Response, responses=text | schemas.failures())
    def counts() -> Response:
        """Counts for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(UserError)
    async def refused(_: Request, error: UserError) -> Response:
        if isinstance(error, Refused):
            return failure(error.status, error.kind, str(error))
        return failure(422, "invalid", str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        no_json = first["type"] == "model_attributes_type"
        what = "send an object of JSON, with the header Content-Type: application/json" if no_json else first["msg"]
        return failure(422, "invalid", f"{where[:200]}: {what[:500]}.")

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        headers = {**(error.headers or {})} | ({"Connection": "close"} if error.status_code == 413 else {})
        kind = KINDS.get(error.status_code, "refused")
        return failure(error.status_code, kind, str(error.detail), headers)

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> Response:
        return failure(500, "internal", "the server failed: its log says more.")
