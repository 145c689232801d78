"""What the server answers: what the model does, in one form, whatever is asked."""

import asyncio
import json
import logging

import numpy as np
import pytest

from recbole_ssm.serving.http.app import create_app
from recbole_ssm.serving.http.gate import Limits
from recbole_ssm.serving.http.store import MemoryStore
from recbole_ssm.serving.http.titles import Titles
from recbole_ssm.serving.session import Sessions

from .conftest import ask, running

HISTORY = ["i3", "i1", "i7", "i2"]


def items(answer, key="recommendations"):
    return [one["item"] for one in answer.json()[key]]


def scores(answer, key="recommendations"):
    return [one["score"] for one in answer.json()[key]]


def same(answer, found, key="recommendations"):
    """Whether an answer holds the items and scores of :class:`Recommendations` of one history."""
    assert answer.status_code == 200, answer.text
    assert items(answer, key) == found.items[0]
    # A sum's rounding is that of its terms, not of a score that is nearly 0.
    largest = max(map(abs, found.scores[0]), default=0.0)
    np.testing.assert_allclose(scores(answer, key), found.scores[0], rtol=1e-5, atol=1e-6 * largest)


def test_recommendations_are_the_recommenders(served):
    some = ["i4", "i9", "i3", "i8"]
    asked = [
        ({"items": HISTORY}, {}),
        ({"items": HISTORY, "k": 3, "exclude_seen": False}, {"k": 3, "exclude_seen": False}),
        ({"items": HISTORY, "k": 1000}, {"k": 1000}),
        ({"items": HISTORY, "candidates": some}, {"candidates": some}),
        ({"items": HISTORY, "candidates": []}, {"candidates": []}),
    ]
    for answer, (_, how) in zip(ask(served, [("POST", "/recommend", body) for body, _ in asked]), asked, strict=True):
        same(answer, served.recommend([HISTORY], **how))


def test_unknown_items_are_listed_and_left_out(served, caplog):
    body = {"items": ["i3", "new", 17, "i1"], "candidates": ["i5", "other"]}
    (answer,) = ask(served, [("POST", "/recommend", body)])
    assert answer.json()["unknown"] == ["new", "17", "other"]
    assert items(answer) == ["i5"]
    assert "new" not in caplog.text
    (nothing,) = ask(served, [("POST", "/recommend", {"items": ["new"]})])
    assert items(nothing) == []


@pytest.mark.parametrize("rule", ["window", "endless"])
def test_sessions_are_sessions(served, rule):
    session = served.session(rule)
    events = [f"i{(7 * i) % 29}" for i in range(30)]  # past the maximum
    asked = [("POST", "/sessions/a/events", {"items": events[:3]})]
    asked += [
        ("POST", "/sessions/a/events", {"items": [event], "k": 5, "after": n}) for n, event in enumerate(events[3:], 3)
    ]
    asked += [("GET", "/sessions/a/recommendations?k=7&exclude_seen=false", None)]
    first, *between, last = ask(served, asked, rule=rule)
    assert first.json() == {"events": 3, "unknown": []}
    for event in events[:3]:
        session.append(event)
    for event, answer in zip(events[3:], between, strict=True):
        session.append(event)
        same(answer, session.recommend(5))
    assert last.json()["events"] == 30
    same(last, session.recommend(7, exclude_seen=False))


def test_a_session_ends_and_one_that_is_not_there_is_not_found(served):
    path, body = "/sessions/a/recommendations", {"items": ["nothing"], "k": 3}
    answers = ask(
        served,
        [("GET", path, None), ("DELETE", "/sessions/a", None), ("POST", "/sessions/a/events", body),
         ("GET", path, None), ("DELETE", "/sessions/a", None), ("GET", path, None)],
    )  # fmt: skip
    assert [answer.status_code for answer in answers] == [404, 404, 200, 200, 204, 404]
    assert answers[0].json()["error"]["type"] == "unknown_session"
    assert answers[2].json() == {"events": 0, "recommendations": [], "unknown": ["nothing"]}


def test_events_sent_again_are_not_counted_twice(served):
    body = {"items": ["i1", "i2"], "after": 0}
    first, again, wrong = ask(
        served, [("POST", "/sessions/a/events", body)] * 2 + [("GET", "/sessions/a/recommendations", None)]
    )
    assert first.json()["events"] == wrong.json()["events"] == 2
    assert again.status_code == 409
    assert again.json() == {"error": {"type": "other_events", "message": "the session has 2 events, not 0."}}


def test_similar_items_and_titles(served):
    titles = Titles(served.vocabulary, {"i4": "The <b>Fourth</b>", "i5": "Fifth, the", "i6": "A fourth"})
    similar, fourth, everything, unknown = ask(
        served,
        [("GET", "/similar?item=i4&k=29", None), ("GET", "/items?query=FOUR+the", None), ("GET", "/items", None),
         ("GET", "/similar?item=nothing", None)],
        titles=titles,
    )  # fmt: skip
    found = served.similar_items("i4", 29)
    assert items(similar, "similar") == [item for item, _ in found]
    np.testing.assert_allclose(scores(similar, "similar"), [score for _, score in found], rtol=1e-5)
    assert {"i5": "Fifth, the", "i6": "A fourth"}.items() <= {
        one["item"]: one.get("title") for one in similar.json()["similar"]
    }.items()
    assert fourth.json() == {"items": [{"item": "i4", "title": "The <b>Fourth</b>"}]}
    assert len(everything.json()["items"]) == 20
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "unknown_item")


def test_what_arrives_together_is_scored_together(served, monkeypatch):
    calls = {"top": 0, "update": 0}

    def counted(owner, name):
        call = getattr(owner, name)

        def counting(self, *given, **named):
            calls[name] += 1
            return call(self, *given, **named)

        monkeypatch.setattr(owner, name, counting)

    counted(type(served), "top")
    counted(Sessions, "update")

    async def together():
        async with running(create_app(served)) as client:
            asks = [client.post("/recommend", json={"items": [f"i{n % 29}"], "k": 1 + n % 7}) for n in range(60)]
            asked = await asyncio.gather(*asks)
            first = dict(calls)
            turns = [client.post(f"/sessions/s{n}/events", json={"items": [f"i{n % 29}"], "k": 4}) for n in range(60)]
            return asked, first, await asyncio.gather(*turns)

    asked, first, turns = asyncio.run(together())
    assert 1 <= first["top"] <= 6
    assert 1 <= calls["update"] <= 6
    monkeypatch.undo()
    for n, answer in enumerate(asked):
        same(answer, served.recommend([[f"i{n % 29}"]], 1 + n % 7))
    for n, answer in enumerate(turns):
        same(answer, served.recommend([[f"i{n % 29}"]], 4))


def test_events_of_a_session_keep_their_order_and_sessions_are_never_crossed(served):
    events = {f"s{n}": [f"i{(n + 3 * place) % 29}" for place in range(6)] for n in range(40)}

    async def mixed():
        async with running(create_app(served, limits=Limits(batch=50))) as client:
            turns = [
                client.post(f"/sessions/{session}/events", json={"items": [events[session][place]]})
                for place in range(6)
                for session in events
            ]
            await asyncio.gather(*turns)
            return [await client.get(f"/sessions/{session}/recommendations") for session in events]

    for answer, history in zip(asyncio.run(mixed()), events.values(), strict=True):
        assert answer.json()["events"] == 6
        same(answer, served.recommend([history]))


def test_times(timed):
    history, times = ["i1", "i2", "i3"], [0, 5, 10**6]
    right = {"items": history, "times": times}
    answers = ask(
        timed,
        [("POST", "/recommend", right), ("POST", "/recommend", {"items": history}),
         ("POST", "/sessions/a/events", {**right, "k": 10}), ("POST", "/sessions/a/events", {"items": ["i4"]}),
         ("POST", "/sessions/a/events", {"items": ["i4", "i5"], "times": [2e6, 5]}),
         ("GET", "/sessions/a/recommendations", None), ("POST", "/recommend", {**right, "times": [5, 0, 9]})],
    )  # fmt: skip
    for which in (0, 2, 5):
        same(answers[which], timed.recommend([history], times=[times]))
    for which, said in ((1, "give times"), (3, "give it"), (4, "is before that of the session's last event"),
                        (6, "before that of the item before it")):  # fmt: skip
        assert answers[which].status_code == 422
        assert said in answers[which].json()["error"]["message"]


@pytest.mark.parametrize("path", ["/sessions/s{}/events", "/recommend"])
def test_one_bad_time_is_not_the_others_concern(timed, path):
    async def together():
        async with running(create_app(timed)) as client:
            whole = [{"items": ["i1", "i2"], "times": [10, 5 if n == 2 else 20], "k": 3} for n in range(6)]
            turns = [client.post(path.format(n), json=body) for n, body in enumerate(whole)]
            return await asyncio.gather(*turns)

    answers = asyncio.run(together())
    assert [answer.status_code for answer in answers] == [200, 200, 422, 200, 200, 200]
    same(answers[5], timed.recommend([["i1", "i2"]], 3, times=[[10, 20]]))


BAD = [
    ("POST", "/recommend", b"{", 422),
    ("POST", "/recommend", b"", 422),
    ("POST", "/recommend", b"\xff\xfe", None),
    ("POST", "/recommend", b"[" * 100_000, None),
    ("POST", "/recommend", b'{"items": ["i1"], "k": ' + b"9" * 5000 + b"}", None),
    ("POST", "/recommend", b'{"items": ["i1"], "k": 0}', 422),
    ("POST", "/recommend", b'{"items": ["i1"], "k": 1000000000}', 422),
    ("POST", "/recommend", b'{"items": ["i1"], "k": true}', 422),
    ("POST", "/recommend", b'{"items": [true]}', 422),
    ("POST", "/recommend", b'{"items": "i1"}', 422),
    ("POST", "/recommend", b'{"items": []}', 422),
    ("POST", "/recommend", b'{"items": ["\\ud800"]}', None),
    ("POST", "/recommend", b'{"items": ["i1"], "\\ud800": 1}', 422),
    ("POST", "/recommend", b'{"items": ["\\u0000"]}', 200),
    ("POST", "/recommend", b'{"items": ["i1"], "times": [NaN]}', 422),
    ("POST", "/recommend", b'{"items": ["i1"], "times": [1e999]}', 422),
    ("POST", "/recommend", b'{"items": ["i1"], "times": [1, 2]}', 422),
    ("POST", "/recommend", b'{"items": ["i1"], "at": 5}', 422),
    ("POST", "/sessions/a/events", b'{"items": ["i1"], "at": 5}', 422),
    ("POST", "/sessions/a/events", b'{"items": ["i1"], "k": 3, "at": 5}', 422),
    ("POST", "/sessions/a/events", b'{"items": ["i1"], "after": -1}', 422),
    ("POST", "/sessions/a/events", json.dumps({"items": ["i1"] * 1001}).encode(), 422),
    ("POST", "/sessions/" + "a" * 129 + "/events", b'{"items": ["i1"]}', 422),
    ("POST", "/sessions/a%00b/events", b'{"items": ["i1"]}', 422),
    ("POST", "/sessions/a%0Ab/events", b'{"items": ["i1"]}', 422),
    ("POST", "/sessions/%FF/events", b'{"items": ["i1"]}', 422),
    ("GET", "/sessions/a/recommendations?k=0", None, 422),
    ("GET", "/similar?item=i1&k=1000000000", None, 422),
    ("GET", "/similar", None, 422),
    ("GET", "/similar?item=%00%FF", None, 404),
    ("GET", "/items?limit=-1", None, 422),
    ("GET", "/nothing", None, 404),
    ("PUT", "/recommend", b"{}", 405),
]


def test_a_body_that_is_not_called_json_is_told_so(served):
    async def answer():
        async with running(create_app(served)) as client:
            return await client.post("/recommend", content=b'{"items": ["i1"]}')

    found = asyncio.run(answer())
    assert found.status_code == 422
    assert "with the header Content-Type: application/json" in found.json()["error"]["message"]


def test_bad_input_is_one_sentence(served):
    async def all_of_them():
        async with running(create_app(served)) as client:
            json_type = {"Content-Type": "application/json"}
            return [
                await client.request(method, path, content=body, headers=json_type if body is not None else {})
                for method, path, body, _ in BAD
            ]

    for (method, path, body, status), answer in zip(BAD, asyncio.run(all_of_them()), strict=True):
        what = (method, path[:60], (body or b"")[:60], answer.text[:300])
        assert answer.status_code < 500, what
        assert status in (None, answer.status_code), what
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert error.keys() == {"type", "message"}, what
            assert all(isinstance(value, str) and value for value in error.values()), what
            assert len(error["message"]) < 800, what


def test_the_token(served, caplog):
    token = "a-long-enough-token"

    async def all_of_them():
        async with running(create_app(served, token=token)) as client:
            given = [{}, {"Authorization": f"Bearer {token}x"}, {"Authorization": "Bearer "}, {"Authorization": token},
                     {"Authorization": f"Bearer {token}"}, {"Authorization": f"bearer {token}"}]  # fmt: skip
            asked = [await client.post("/recommend", json={"items": ["i1"]}, headers=headers) for headers in given]
            paths = [
                "/",
                "/health",
                "/metrics",
                "/items",
                "/similar?item=i1",
                "/openapi.json",
                "/sessions/a/recommendations",
            ]
            return asked, [await client.get(path) for path in paths]

    with caplog.at_level(logging.DEBUG):
        asked, others = asyncio.run(all_of_them())
    assert [answer.status_code for answer in asked] == [401, 401, 401, 401, 200, 200]
    assert asked[0].headers["www-authenticate"] == "Bearer"
    assert [answer.status_code for answer in others] == [200, 200, 401, 401, 401, 401, 401]
    assert token not in caplog.text


def test_the_log_holds_no_history_and_no_session(served, caplog):
    with caplog.at_level(logging.INFO, "recbole_ssm.http"):
        ask(
            served,
            [
                ("POST", "/sessions/somebody/events", {"items": ["i13", "i17"], "k": 3}),
                ("GET", "/similar?item=i13", None),
            ],
        )
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("recbole_ssm")]
    assert [line.rpartition(" in ")[0] for line in lines] == ["POST /sessions/{session}/events 200", "GET /similar 200"]
    assert not any(word in caplog.text for word in ("somebody", "i13", "i17"))


def test_least_recently_used_sessions_go_first(served):
    def events(name):
        return ("POST", f"/sessions/{name}/events", {"items": ["i1"]})

    def look(name):
        return ("GET", f"/sessions/{name}/recommendations", None)

    asked = [
        events("a"),
        events("b"),
        look("a"),
        events("c"),
        look("a"),
        look("b"),
        look("c"),
        ("GET", "/metrics", None),
    ]
    *answers, counts = ask(served, asked, store=MemoryStore(most=2))
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 200, 404, 200]
    assert "recbole_ssm_evicted_sessions_total 1.0" in counts.text
    assert "recbole_ssm_sessions 2.0" in counts.text
    size = served.session()
    size.append("i1")
    *answers, _ = ask(served, asked, store=MemoryStore(most_bytes=2 * size.state.nbytes))
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 200, 404, 200]


def test_a_failure_of_the_server_is_one_requests_own(served, monkeypatch):
    top = type(served).top

    def breaking(self, histories, *given, **named):
        if served.vocabulary.id("i13") in histories.items:
            raise RuntimeError("broken")
        return top(self, histories, *given, **named)

    monkeypatch.setattr(type(served), "top", breaking)

    async def together():
        async with running(create_app(served)) as client:
            asks = [client.post("/recommend", json={"items": [f"i{n}"]}) for n in range(10, 20)]
            return await asyncio.gather(*asks)

    answers = asyncio.run(together())
    assert [answer.status_code for answer in answers] == [200] * 3 + [500] + [200] * 6
    assert answers[3].json()["error"]["type"] == "internal"


def test_counts(served):
    asked = [("POST", "/sessions/a/events", {"items": ["i1", "i2", "nothing"], "k": 2}), ("GET", "/nothing", None)]
    *_, health, counts = ask(served, [*asked, ("GET", "/health", None), ("GET", "/metrics", None)])
    assert health.json() == {"status": "ok", "model": "Mamba4Rec", "items": 30, "digest": served.digest}
    for line in (
        'recbole_ssm_requests_total{method="POST",route="/sessions/{session}/events",status="200"} 1.0',
        'recbole_ssm_requests_total{method="GET",route="(none)",status="404"} 1.0',
        "recbole_ssm_events_total 2.0",
        'recbole_ssm_batch_requests_count{kind="session"} 1.0',
        'recbole_ssm_request_seconds_count{route="/health"} 1.0',
    ):
        assert line in counts.text.splitlines()
