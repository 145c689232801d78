"""What ``run_serve`` is measured against: one request, one forward pass over the user's whole history.

``python -m benchmarks.serving.plain_server CHECKPOINT [--threads]`` listens at a free port of loopback. It keeps
histories, no states, and answers nothing together. Requests are computed on the event loop, one after the other, or by
``--threads`` in FastAPI's pool of threads.
"""

import argparse
import socket
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from recbole.data.interaction import Interaction

from recbole_ssm.serving.recommender import Recommender


class Events(BaseModel):
    """As of ``run_serve``'s route."""

    items: list[str]
    k: int | None = None


def create_app(recommender: Recommender, threads: bool = False) -> FastAPI:
    """The application; its route takes and answers what that of ``run_serve`` does, for items that are known."""
    model, items = recommender.model, recommender.vocabulary.items.tolist()
    ids = {token: number for number, token in enumerate(items)}
    histories: dict[str, list[int]] = {}
    app = FastAPI()

    @torch.inference_mode()
    def answer(session: str, k: int | None) -> dict[str, Any]:
        history = histories[session]
        if k is None:
            return {"events": len(history), "unknown": []}
        read = torch.tensor([history[-recommender.max_length :]])
        row = Interaction({model.ITEM_SEQ: read, model.ITEM_SEQ_LEN: torch.tensor([read.shape[1]])})
        scores = model.full_sort_predict(row)[0]
        scores[[0, *history]] = -torch.inf
        best, which = scores.topk(k)
        named = zip(which.tolist(), best.tolist(), strict=True)
        recommendations = [{"item": items[number], "score": score} for number, score in named]
        return {"events": len(history), "recommendations": recommendations, "unknown": []}

    def add(session: str, request: Events) -> dict[str, Any]:
        histories.setdefault(session, []).extend(ids[item] for item in request.items)
        return answer(session, request.k)

    async def add_on_the_loop(session: str, request: Events) -> dict[str, Any]:
        return add(session, request)

    app.post("/sessions/{session}/events")(add if threads else add_on_the_loop)
    return app


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--threads", action="store_true")
    arguments = parser.parse_args()
    app = create_app(Recommender.load(arguments.checkpoint, "cpu"), arguments.threads)
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(f"http://127.0.0.1:{listener.getsockname()[1]} serves {arguments.checkpoint}", flush=True)
    uvicorn.Server(uvicorn.Config(app)).run([listener])


if __name__ == "__main__":
    main()
