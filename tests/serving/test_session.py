"""Sessions against the full forward pass; states as bytes."""

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

from recbole_ssm import UserError
from recbole_ssm.models.stepping import MOST_CARRIED
from recbole_ssm.serving import Recommender
from recbole_ssm.serving.session import Sessions

from .conftest import recommender

LENGTH = 40
STEPPING = {
    "Mamba4Rec": ("Mamba4Rec", {}),
    "Mamba4Rec, two layers": ("Mamba4Rec", {"num_layers": 2, "temperature": 0.5}),
    "Mamba4Rec, mamba2": ("Mamba4Rec", {"ssm_block": "mamba2"}),
    "Mamba4Rec, filter": ("Mamba4Rec", {"filter_share": 0.7, "num_layers": 2}),
    "RecBLR": ("RecBLR", {}),
    "eSASRec": ("eSASRec", {}),
    "SSD4Rec": ("SSD4Rec", {"bidirectional": False}),
    "TiM4Rec": ("TiM4Rec", {}),
    "TiM4Rec, without time": ("TiM4Rec", {"time_aware": False, "num_layers": 1}),
    "SS4Rec": ("SS4Rec", {"time_unit": 1000.0}),
    "SS4Rec, asked at a time": ("SS4Rec", {"time_unit": 1000.0, "request_time": "known"}),
    "STARRec": ("STARRec", {}),
    "STARRec, mamba3": ("STARRec", {"ssm_block": "mamba3", "num_layers": 2}),
    "STARRec, filter": ("STARRec", {"filter_share": 0.7, "num_layers": 2, "feed_forward": True}),
    "STARRec, two layers": ("STARRec", {"num_layers": 2, "use_time_gaps": True, "input_dependent_fusion": True}),
    "STARRec, window": ("STARRec", {"attention_window": 7, "use_similarity": False, "moe_level": "position"}),
    "STARRec, attention": (
        "STARRec",
        {"use_ssm": False, "filter_share": 0.5, "similarity_threshold": 0.3, "use_position_embedding": False},
    ),
    "STARRec, state space": ("STARRec", {"use_pma": False, "use_moe": False}),
}  # fmt: skip
RECOMPUTING = {
    "BSARec": ("BSARec", {}),
    "SSD4Rec, both ways": ("SSD4Rec", {}),
    "SASRec": ("SASRec", {"train_mode": "sequence", "valid_metric": "NDCG@10"}),
    "GRU4Rec": ("GRU4Rec", {"valid_metric": "NDCG@10"}),
}


def events(served: Recommender, count: int) -> tuple[list[str], list[float]]:
    generator = np.random.default_rng(3)
    items = generator.choice(served.vocabulary.items[1:], count).tolist()
    return items, np.cumsum(generator.integers(0, 5000, count)).astype(float).tolist()


def longer(name: str, settings: dict, served: Recommender, length: int) -> Recommender:
    """The same model, which reads ``length`` items by the rule ``endless``, in one pass."""
    window = min(settings.get("attention_window", LENGTH), LENGTH)
    wide = {"attention_window": window} if name == "STARRec" and settings.get("use_pma", True) else {}
    other = recommender(name, MAX_ITEM_LIST_LENGTH=length, **{**settings, **wide})
    weights = served.model.state_dict()
    if (key := "position_embedding.weight") in weights:
        weights[key] = torch.cat([weights[key], weights[key][-1:].expand(length - LENGTH, -1)])
    other.model.load_state_dict(weights)
    if name == "eSASRec":  # which has no such setting
        for layer in other.model.layers:
            layer.attention._context = partial(layer.attention._context, window=LENGTH)
        encode = other.model.encode
        other.model.encode = lambda items, cu_seqlens, read, last: encode(items, cu_seqlens, read)
    return other


@pytest.mark.parametrize(
    ("case", "count"),
    [
        ("Mamba4Rec, two layers", 60),
        ("RecBLR", 60),
        ("eSASRec", 60),
        ("SSD4Rec", 60),
        ("TiM4Rec", 60),
        ("SS4Rec", 60),
        ("SS4Rec, asked at a time", 60),
        ("STARRec, two layers", 60),
        ("STARRec, mamba3", 60),
        *(pytest.param(case, 300, marks=pytest.mark.slow) for case in STEPPING),
    ],
)
def test_events_one_by_one_are_the_full_forward(case, count):
    name, settings = STEPPING[case]
    served = recommender(name, MAX_ITEM_LIST_LENGTH=LENGTH, **settings)
    endless = longer(name, settings, served, count)
    items, times = events(served, count)
    sessions = {rule: served.session(rule) for rule in ("window", "endless")}
    asked = 700.0 if settings.get("request_time") == "known" else None  # after the last event
    assert not sessions["window"].recomputes
    for n, (item, time) in enumerate(zip(items, times, strict=True), 1):
        for session in sessions.values():
            session.append(item, time)
        if (3 < n < LENGTH - 1 and n % 7) or (n > LENGTH + 2 and n % 59 and n != count):
            continue
        for rule, reader in (("window", served), ("endless", endless)):
            at = None if asked is None else [time + asked]
            expected = reader.score([items[:n]], served.vocabulary.items[1:], [times[:n]], at)[0]
            (found,) = scores_of(sessions[rule], at)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert len(sessions["endless"].state) == count


def scores_of(session, at=None) -> list[np.ndarray]:
    """Scores of all items, in the order of their ids."""
    ids, scores = session._sessions.top([session.state], 10**9, exclude_seen=False, at=at)
    return [row[np.argsort(order)] for row, order in zip(scores, ids, strict=True)]


@pytest.mark.parametrize("case", RECOMPUTING)
def test_what_carries_no_state_reads_the_latest_events_anew(case):
    name, settings = RECOMPUTING[case]
    served = recommender(name, MAX_ITEM_LIST_LENGTH=LENGTH, **settings)
    session = served.session()
    assert session.recomputes
    items, _ = events(served, LENGTH + 5)
    for n, item in enumerate(items, 1):
        session.append(item)
        if n in (1, 2, LENGTH, len(items)):
            assert session.recommend(5, exclude_seen=False) == served.recommend([items[:n]], 5, exclude_seen=False)
    with pytest.raises(UserError, match="carries no state: choose the rule window"):
        served.session("endless")


@pytest.mark.parametrize(("name", "settings"), [("STARRec", {"use_position_embedding": False}), ("eSASRec", {})])
def test_attention_to_very_many_events_is_not_carried(name, settings):
    assert recommender(name, MAX_ITEM_LIST_LENGTH=MOST_CARRIED, **settings).session().recomputes is False
    long = {"MAX_ITEM_LIST_LENGTH": MOST_CARRIED + 1, **settings}
    assert recommender(name, **long).session().recomputes
    if name == "STARRec":  # what is carried is what attention reads
        assert recommender(name, attention_window=8, **long).session().recomputes is False
        assert recommender(name, use_pma=False, **long).session().recomputes is False


@pytest.mark.parametrize("rule", ["window", "endless"])
@pytest.mark.parametrize("name", ["Mamba4Rec", "STARRec", "SSD4Rec"])
def test_many_users_at_once_are_each_alone(name, rule):
    settings = {"bidirectional": False} if name == "SSD4Rec" else {}
    served = recommender(name, MAX_ITEM_LIST_LENGTH=6, **settings)
    sessions, users = Sessions(served, rule), 5
    items = np.random.default_rng(0).integers(0, served.vocabulary.item_num, (10, users))  # 0: unknown, changes nothing
    together, alone = [sessions.new() for _ in range(users)], [sessions.new() for _ in range(users)]
    for event in items[:, :]:
        together = sessions.update(together, event.tolist())
        alone = [sessions.update([state], [item])[0] for state, item in zip(alone, event.tolist(), strict=True)]
    ids, scores = sessions.top(together, 4)
    for row, state in enumerate(alone):
        own_ids, own_scores = sessions.top([state], 4)
        assert ids[row].tolist() == own_ids[0].tolist()
        np.testing.assert_allclose(scores[row], own_scores[0], rtol=1e-4)
        assert not set(own_ids[0]) & set(state.items.tolist())
    started = sessions.start(sessions.histories(together))
    np.testing.assert_allclose(sessions.top(started, 4)[1], scores, rtol=1e-4)


def test_a_session_without_events_recommends_nothing():
    session = recommender("Mamba4Rec").session()
    assert session.recommend(3).items == [[]]
    session.append("never seen")
    assert session.recommend(3).items == [[]]
    assert session._sessions.from_bytes(session.to_bytes()).items.tolist() == []


@pytest.mark.parametrize("case", ["STARRec, two layers", "SSD4Rec, both ways"])
def test_a_state_goes_on_in_another_process(case, tmp_path):
    name, settings = (STEPPING | RECOMPUTING)[case]
    served = recommender(name, MAX_ITEM_LIST_LENGTH=LENGTH, **settings)
    items, times = events(served, 12)
    session = served.session()
    for item, time in zip(items[:10], times, strict=False):
        session.append(item, time)
    (tmp_path / "state").write_bytes(session.to_bytes())
    code = f"""
from pathlib import Path
from tests.serving.conftest import recommender
session = recommender({name!r}, MAX_ITEM_LIST_LENGTH={LENGTH}, **{settings!r}).session()
session.restore(Path("state").read_bytes())
for item, time in zip({items[10:]!r}, {times[10:]!r}):
    session.append(item, time)
print("found", session.recommend(5).items)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    for item, time in zip(items[10:], times[10:], strict=True):
        session.append(item, time)
    assert f"found {session.recommend(5).items}" in done.stdout, done.stderr


def test_a_state_of_another_model_is_refused():
    served = recommender("STARRec")
    session = served.session()
    for item in events(served, 5)[0]:
        session.append(item)
    data = session.to_bytes()
    other = recommender("STARRec")
    with torch.no_grad():
        other.model.norm.bias[0] += 1e-3
    with pytest.raises(UserError, match="of another model"):
        other.session().restore(data)
    with pytest.raises(UserError, match="kept by the rule 'window', not 'endless'"):
        served.session("endless").restore(data)
    for changed in (b"", b"nothing", data[:-3], data + b"x", b"\xff" * 64, data[:8] + b"[" * 40 + data[48:]):
        with pytest.raises(UserError, match=r"no state of a session|damaged"):
            served.session().restore(changed)
    restored = served.session()
    restored.restore(data)
    assert restored.recommend(5) == session.recommend(5)


@pytest.mark.parametrize("what", ["items", "carried", "shape", "missing", "nan", "position", "time"])
def test_a_state_that_cannot_be_is_refused(what):
    served = recommender("STARRec")
    session = served.session()
    for item in events(served, 5)[0]:
        session.append(item)
    state, sessions = session.state, session._sessions
    carried = dict(state.carried)
    name = "0.ssm.ssm"
    items, time = state.items, None
    if what == "items":
        items = state.items + np.int32(1000)
    elif what == "carried":
        carried["other"] = carried[name].clone()
    elif what == "shape":
        carried[name] = carried[name][:, 1:]
    elif what == "missing":
        del carried[name]
    elif what == "nan":
        carried[name] = carried[name] * float("nan")
    elif what == "position":
        carried["position"] = carried["position"] + 1
    else:
        time = float("nan")
    with pytest.raises(UserError, match="the state is damaged"):
        sessions.from_bytes(sessions.to_bytes(type(state)(items, carried, None, time)))


def test_times_of_events():
    served = recommender("STARRec", use_time_gaps=True)
    session = served.session()
    with pytest.raises(UserError, match="reads the time of each event"):
        session.append("i1")
    session.append("i1", 10)
    with pytest.raises(UserError, match=r"time 9 is before that of the session's last event, 10"):
        session.append("i2", 9)
    with pytest.raises(UserError, match="give a finite number"):
        session.append("i2", float("nan"))
    assert len(session.state) == 1
    with pytest.raises(UserError, match="does not read the time at which it is asked"):
        session.recommend(time=12)
    session.append("i2", np.int64(11))
    session.restore(session.to_bytes())


def test_another_rule_is_refused():
    with pytest.raises(UserError, match="choose window or endless"):
        recommender("Mamba4Rec").session("forever")
