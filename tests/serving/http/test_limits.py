"""What one client can ask for, and what the others notice of it."""

import asyncio
import threading
import time

import pytest

from recbole_ssm.serving.http.app import create_app
from recbole_ssm.serving.http.gate import Limits

from .conftest import running


@pytest.mark.parametrize("how", ["length", "chunks"])
def test_large_bodies_are_not_read(served, how):
    taken = 0

    async def chunks():
        nonlocal taken
        for _ in range(160):
            taken += 1
            yield b" " * 65536

    async def large():
        async with running(create_app(served)) as client:
            body = b" " * (10 << 20) if how == "length" else chunks()
            return await client.post("/recommend", content=body, headers={"Content-Type": "application/json"})

    answer = asyncio.run(large())
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "too_large")
    assert taken < 160


def test_too_many_and_too_slow(served, monkeypatch):
    """Requests beyond what may wait, and those that take too long, are told so; the next ones are answered."""
    go, top = threading.Event(), type(served).top

    def slow(self, *given, **named):
        go.wait(10)
        return top(self, *given, **named)

    async def crowd():
        body = {"items": ["i1"]}
        async with running(create_app(served, limits=Limits(batch=1, waiting=2, seconds=0.5))) as client:
            monkeypatch.setattr(type(served), "top", slow)
            first = asyncio.create_task(client.post("/recommend", json=body))
            await asyncio.sleep(0.1)
            answers = await asyncio.gather(*(client.post("/recommend", json=body) for _ in range(6)))
            late = await first
            go.set()
            while (await client.post("/recommend", json=body)).status_code != 200:
                await asyncio.sleep(0.02)
            return late, answers

    late, answers = asyncio.run(asyncio.wait_for(crowd(), 20))
    kinds = [answer.json()["error"]["type"] for answer in [late, *answers]]
    assert kinds.count("overloaded") == 4
    assert kinds.count("timeout") == 3
    assert {answer.status_code for answer in [late, *answers]} == {503}
    assert late.headers["retry-after"] == "1"


@pytest.mark.parametrize(("waiting", "status"), [(5, 503), (1000, 200)])
def test_many_who_ask_for_similar_items_are_refused_or_keep_nobody_waiting(served, waiting, status, monkeypatch):
    similar_items = served.similar_items
    monkeypatch.setattr(served, "similar_items", lambda *asked: time.sleep(0.02) or similar_items(*asked))

    async def many():
        async with running(create_app(served, limits=Limits(waiting=waiting))) as client:
            asked = [asyncio.create_task(client.get("/similar?item=i4")) for _ in range(100)]
            await asyncio.sleep(0.1)
            recommended = await client.post("/recommend", json={"items": ["i3", "i1"]})
            assert recommended.status_code == 200
            return not all(one.done() for one in asked), await asyncio.gather(*asked)

    before_the_last, answers = asyncio.run(many())
    assert {answer.status_code for answer in answers} == {200, status}
    assert answers[-1].status_code == status
    if status == 503:
        assert answers[-1].json()["error"]["type"] == "overloaded"
    else:
        assert before_the_last


def test_a_request_without_a_body_is_not_told_that_this_did_not_arrive(served, monkeypatch):
    go, similar_items = threading.Event(), served.similar_items
    monkeypatch.setattr(served, "similar_items", lambda *asked: go.wait(10) and similar_items(*asked))

    async def slow():
        async with running(create_app(served, limits=Limits(seconds=0.2))) as client:
            answer = await client.get("/similar?item=i4")
            go.set()
            return answer

    answer = asyncio.run(slow())
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "timeout")
