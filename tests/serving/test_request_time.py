"""Models that read the time at which they are asked: the same answers whichever way they are asked."""

import asyncio

import numpy as np
import pandas as pd
import pytest

from recbole_ssm import UserError
from recbole_ssm.serving import Recommender
from recbole_ssm.serving.batch import recommend_all
from recbole_ssm.serving.http.app import create_app
from recbole_ssm.serving.session import Sessions

from ..conftest import build, write_dataset
from .conftest import recommender
from .http.conftest import running

KNOWN = {"use_time_gaps": True, "use_clock": True, "request_time": "known", "MAX_ITEM_LIST_LENGTH": 6}
MISSING = "reads the time at which it is asked"


@pytest.fixture(scope="module")
def table():
    """Interactions at real times, in the order of these."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, 12, 20)
    steps = generator.choice([0, 60, 4000, 90_000], lengths.sum())
    return pd.DataFrame({
        "user_id": np.repeat([f"u{user}" for user in range(20)], lengths),
        "item_id": [f"i{item}" for item in generator.integers(30, size=lengths.sum())],
        "timestamp": 1_500_000_000 + np.cumsum(steps),
    })  # fmt: skip


def served_on(table: pd.DataFrame, name: str = "Mamba4Rec", **settings) -> Recommender:
    write_dataset("tiny", ["\t".join(map(str, row)) for row in table.itertuples(index=False)])
    return recommender(name, **{**KNOWN, **settings})


def history_of(table: pd.DataFrame, user: str) -> tuple[list[str], list[float]]:
    rows = table[table["user_id"] == user]
    return rows["item_id"].tolist(), rows["timestamp"].astype(float).tolist()


def test_recommendations_are_those_of_the_evaluation(table):
    served = served_on(table)
    _, _, (_, _, test_data) = build("Mamba4Rec", **KNOWN)
    dataset = test_data._dataset
    rows = dataset[np.arange(len(dataset))]
    expected = served.model.full_sort_predict(rows)[:, 1:].detach()
    assert len(rows) == 20
    for user, scores in zip(dataset.id2token("user_id", rows["user_id"]), expected, strict=True):
        items, times = history_of(table, user)
        asked = {"sequences": [items[:-1]], "items": served.vocabulary.items[1:], "times": [times[:-1]]}
        found = served.score(**asked, at=times[-1])[0]
        np.testing.assert_allclose(found, scores, rtol=1e-4, atol=1e-4)
        assert np.abs(served.score(**asked, at=[times[-1] + 12 * 3600])[0] - found).max() > 0.01
        with pytest.raises(UserError, match=MISSING):
            served.score(**asked)
        with pytest.raises(UserError, match="whose last item is of a later time"):
            served.score(**asked, at=[times[0] - 1])
        for at in (np.datetime64("2026-01-01"), "now", float("nan"), [[1], [1, 2]]):
            with pytest.raises(UserError, match="at is no finite number: give numbers, in the unit"):
                served.score(**asked, at=at)


@pytest.mark.parametrize("name", ["Mamba4Rec", "STARRec"])
@pytest.mark.parametrize("rule", ["window", "endless"])
def test_sessions_take_an_event_in_when_the_next_is_known(table, name, rule):
    served = served_on(table, name)
    length = 6 if rule == "endless" else 9  # beyond, an endless state is no pass over the latest items
    items, times = table["item_id"].tolist()[:length], table["timestamp"].astype(float).tolist()[:length]
    session, sessions = served.session(rule), Sessions(served, rule)
    assert session.recommend(3, time=0.0).items == [[]]
    for n, (item, time) in enumerate(zip(items, times, strict=True), 1):
        session.append(item, time)
        session.restore(session.to_bytes())
        if n not in (1, 2, 6, 7, length):
            continue
        for at in (time, time + 5000):
            for state in (session.state, *sessions.start(served.read([items[:n]], [times[:n]])[0])):
                ids, scores = sessions.top([state, sessions.new()], 10**9, False, at=[at, None])
                expected = served.score([items[:n]], served.vocabulary.items[ids[0]], [times[:n]], at)[0]
                np.testing.assert_allclose(scores[0], expected, rtol=1e-4, atol=1e-4)
    assert bool(session.state.carried) == (rule == "endless" or length <= 6)
    for time, message in ((None, MISSING), (times[-1] - 1, "before that of the session's last event")):
        with pytest.raises(UserError, match=message):
            session.recommend(3, time=time)


def test_http(table):
    served, (items, times) = served_on(table), history_of(table, "u0")
    at, later = times[-1] + 60, times[-1] + 40_000
    body = {"items": items, "times": times, "k": 3}
    expected = {time: served.recommend([items], 3, times=[times], at=time).items[0] for time in (at, later)}

    async def ask():
        async with running(create_app(served)) as client:
            return [
                await client.request(method, path, json=given)
                for method, path, given in (
                    ("POST", "/recommend", body),
                    ("POST", "/recommend", {**body, "at": times[0] - 1}),
                    ("POST", "/recommend", {**body, "at": at}),
                    ("POST", "/sessions/a/events", body),
                    ("POST", "/sessions/a/events", {**body, "after": 0, "at": at}),
                    ("GET", "/sessions/a/recommendations?k=3", None),
                    ("GET", f"/sessions/a/recommendations?k=3&at={later}", None),
                )
            ]

    missing, early, good, untaken, taken, none, answer = asyncio.run(ask())
    for refused, words in (
        (missing, MISSING),
        (early, "whose last item is of a later time"),
        (untaken, MISSING),
        (none, MISSING),
    ):
        assert refused.status_code == 422
        assert words in refused.json()["error"]["message"]
    for found, time in ((good, at), (taken, at), (answer, later)):
        assert [one["item"] for one in found.json()["recommendations"]] == expected[time]


def test_all_users_of_a_file(table):
    served, at = served_on(table), float(table["timestamp"].max() + 500)
    table.to_csv("in.csv", index=False)
    with pytest.raises(UserError, match=r"request_time: known\): give it by --at"):
        recommend_all(served, "in.csv", "out.parquet", 4)
    with pytest.raises(UserError, match="at is no finite number"):
        recommend_all(served, "in.csv", "out.parquet", 4, at="now")
    recommend_all(served, "in.csv", "out.parquet", 4, at=at)
    found = pd.read_parquet("out.parquet")
    for user, own in found.groupby("user"):
        items, times = history_of(table, user)
        assert own["item"].tolist() == served.recommend([items], 4, times=[times], at=at).items[0]
    assert found["user"].nunique() == 20
