"""Recommendations against scores of the model by a loop over users; what comes in, and what is refused."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from recbole_ssm import UserError
from recbole_ssm.ops.packing import Borders
from recbole_ssm.quick_start import load_data_and_model, train_and_test
from recbole_ssm.serving import Recommender, top_items
from recbole_ssm.serving.batch import set_threads

from ..conftest import random_rows, small_config, write_dataset
from .conftest import recommender

DATE = np.datetime64("2026-01-01")
TABLE = pd.DataFrame({"user_id": ["u"], "item_id": ["i1"]})
HISTORIES = [["i3", "i1", "i7"], ["i2"], [], ["i9", "i9", "i4", "i8", "i0"]]
MODELS = {
    "STARRec": ("STARRec", {}),
    "SSD4Rec": ("SSD4Rec", {}),
    "SASRec": ("SASRec", {"train_mode": "sequence", "valid_metric": "NDCG@10"}),
    "NARM": ("NARM", {}),
}


def by_hand(served, history, k, exclude_seen=True, allowed=None):
    """The best items of one history by its scores of all items."""
    tokens = served.vocabulary.items[1:]
    scores = served.score([history], tokens)[0]
    left = [i for i in np.argsort(-scores) if not (exclude_seen and tokens[i] in history)]
    return [tokens[i] for i in left if allowed is None or tokens[i] in allowed][:k]


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("case", MODELS)
def test_top_items_are_those_of_a_loop(case, exclude_seen, monkeypatch):
    name, settings = MODELS[case]
    served = recommender(name, MAX_ITEM_LIST_LENGTH=4, **settings)
    monkeypatch.setattr(top_items, "SCORES_AT_A_TIME", 40)  # one history at a time
    found = served.recommend(HISTORIES, 5, exclude_seen)
    assert found.items == [by_hand(served, history, 5, exclude_seen) if history else [] for history in HISTORIES]
    for history, items, scores in zip(HISTORIES, found.items, found.scores, strict=True):
        assert scores == sorted(scores, reverse=True)
        if history:
            np.testing.assert_allclose(scores, served.score([history], items)[0], rtol=1e-5)


@pytest.mark.parametrize("name", ["STARRec", "SSD4Rec", "BSARec"])
def test_threads_get_the_answers_of_one(name):
    served = recommender(name)
    rng = np.random.default_rng(0)
    asked = [[[f"i{item}" for item in rng.integers(30, size=rng.integers(1, 30))]] for _ in range(100)]
    alone = [served.recommend(histories, 5) for histories in asked]
    with ThreadPoolExecutor(2, initializer=set_threads, initargs=(1,)) as threads:
        together = list(threads.map(lambda histories: served.recommend(histories, 5), asked))
    assert [found.items for found in together] == [found.items for found in alone]
    for found, wanted in zip(together, alone, strict=True):
        np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-5)


@pytest.mark.parametrize("name", ["STARRec", "Mamba4Rec", "SSD4Rec", "BSARec"])
def test_lengths_that_are_known_are_not_read_from_a_device(name, monkeypatch):
    """In ``torch.inference_mode``, too, for which a GPU would be waited for by each op."""
    served = recommender(name)
    served.recommend(HISTORIES, 3)  # with what a model keeps for good
    read = Borders.read
    calls = []
    monkeypatch.setattr(Borders, "read", lambda cu_seqlens: calls.append(cu_seqlens) or read(cu_seqlens))
    served.recommend(HISTORIES, 3)
    session = served.session()
    for item in HISTORIES[0]:
        session.append(item)
    session.recommend(3)
    assert not calls


def test_a_model_without_repeats_never_recommends_what_a_history_holds():
    served = recommender("Mamba4Rec", allow_repeats=False)
    found = served.recommend(HISTORIES, 5, exclude_seen=False)
    assert found.items == served.recommend(HISTORIES, 5).items
    assert not any(set(items) & set(history) for items, history in zip(found.items, HISTORIES, strict=True))
    items = served.vocabulary.items[1:]
    for length in (50, 2):
        served = recommender("Mamba4Rec", allow_repeats=False, MAX_ITEM_LIST_LENGTH=length)
        unknown = [[not history or item in history[-length:] for item in items] for history in HISTORIES]
        assert np.isnan(served.score(HISTORIES, items)).tolist() == unknown


def test_scores_are_the_models_own():
    served = recommender("STARRec", MAX_ITEM_LIST_LENGTH=4)
    model, vocabulary = served.model, served.vocabulary
    for history in (HISTORIES[0], HISTORIES[3]):
        items = torch.from_numpy(vocabulary.ids(history[-4:]))[None]  # the latest 4
        with torch.no_grad():
            hidden = model(items, torch.tensor([items.shape[1]]))
            scores = (hidden @ model.item_embedding.weight.T)[0, 1:]
        np.testing.assert_allclose(served.score([history], vocabulary.items[1:])[0], scores, rtol=1e-5)


def test_candidates_and_filters():
    served = recommender("Mamba4Rec")
    history, candidates = ["i3", "i1"], ["i1", "i5", "i6", "i8", "nothing"]
    found = served.recommend([history], 10, candidates=candidates)
    assert found.items == [by_hand(served, history, 10, allowed=candidates)]
    assert len(found.items[0]) == 3
    chosen = served.recommend([history], 10, candidates=candidates, filter=lambda token: token != "i6")
    assert chosen.items == [[item for item in found.items[0] if item != "i6"]]
    assert served.recommend([history], 10, candidates=[]).items == [[]]


@pytest.mark.parametrize("kind", ["frame", "arrow"])
def test_tables(kind):
    pyarrow = pytest.importorskip("pyarrow")
    served = recommender("Mamba4Rec")
    rows = [("b", "i2", 5), ("a", "i7", 30), ("a", "i3", 10), ("a", "i1", 20), ("c", "unheard of", 1)]
    table = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    found = served.recommend(table if kind == "frame" else pyarrow.Table.from_pandas(table), 3)
    assert isinstance(found, pd.DataFrame if kind == "frame" else pyarrow.Table)
    found = found if kind == "frame" else found.to_pandas()
    expected = served.recommend([["i2"], ["i3", "i1", "i7"]], 3)
    assert found["user_id"].tolist() == ["b"] * 3 + ["a"] * 3
    assert found["item_id"].tolist() == [item for row in expected.items for item in row]
    assert found["rank"].tolist() == [1, 2, 3] * 2
    np.testing.assert_allclose(found["score"], [score for row in expected.scores for score in row])
    with pytest.raises(UserError, match="has no column 'item_id': it has user_id, timestamp"):
        served.recommend(table.drop(columns="item_id"))


def test_unknown_items_are_told_and_left_out(caplog):
    served = recommender("Mamba4Rec")
    with caplog.at_level(logging.WARNING):
        found = served.recommend([["i3", "new", "i1"], ["new"]], 4)
    assert found.items == [served.recommend([["i3", "i1"]], 4).items[0], []]
    assert "2 of 4 items are unknown to the model and left out, such as 'new'" in caplog.text


def test_similar_items(monkeypatch):
    served = recommender("Mamba4Rec")
    table = served.item_embeddings()
    assert table.shape == (served.vocabulary.item_num - 1, 16)
    one = table.loc["i4"]
    cosines = (table @ one) / (np.linalg.norm(table, axis=1) * np.linalg.norm(one))
    expected = cosines.drop("i4").sort_values(ascending=False)[:3]
    found = served.similar_items("i4", 3)
    assert [item for item, _ in found] == expected.index.tolist()
    np.testing.assert_allclose([score for _, score in found], expected, rtol=1e-5)
    monkeypatch.setattr(served.model, "item_table", lambda: pytest.fail("all embeddings were read again"))
    assert served.similar_items("i4", 3) == found


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda served: served.recommend([["i1"]], 0), "k is 0: choose a whole number from 1"),
        (lambda served: served.recommend([["i1"]], True), "k is True"),
        (lambda served: served.recommend(["i1", "i2"]), r"of a single one write \[history\]"),
        (lambda served: served.recommend({"i1": 2}), "a DataFrame or an Arrow table, not dict"),
        (lambda served: served.recommend([["i1"]], times=[[1, 2]]), "as many times as there are items"),
        (lambda served: served.recommend([["i1"]], times=[[float("nan")]]), "a time is no finite number"),
        (lambda served: served.recommend([["i1"]], times=[5]), "as many times as there are items"),
        (
            lambda served: served.recommend([["i1"]], times=[["now"]]),
            "a time is no finite number: give numbers, in",
        ),
        (lambda served: served.recommend([["i1"]], times=[[DATE]]), "a time is no finite number"),
        (lambda served: served.recommend([["i1"]], times=[[[1]]]), "a time is no finite number"),
        (
            lambda served: served.recommend([["i0"], ["i1", "new", "i2"]], times=[[9], [5, 0, 4]]),
            "the time 4 of an item is before that of the item before it, 5: give each history's items oldest first",
        ),
        (
            lambda served: served.recommend(TABLE.assign(timestamp=DATE)),
            "in the column 'timestamp' is no finite number",
        ),
        (
            lambda served: served.recommend(TABLE.assign(timestamp="now")),
            "in the column 'timestamp' is no finite number",
        ),
        (
            lambda served: served.recommend(TABLE.assign(timestamp=None)),
            "in the column 'timestamp' is no finite number",
        ),
        (lambda served: served.recommend([["i1"]], at=5), "does not read the time at which it is asked"),
        (lambda served: served.session().append("i1", DATE), "give a finite number"),
        (lambda served: served.recommend([["i1"]], candidates="i12"), "candidates is 'i12': give a list of items"),
        (lambda served: served.recommend([["i1"]], candidates=12), "candidates is 12: give a list of items"),
        (lambda served: served.recommend([["i1"]], filter=["i1"]), "give a function of an item's token"),
        (lambda served: served.score([["i1"]], "i1"), "items is 'i1': give a list of items"),
        (lambda served: served.score([["i1"]], ["nothing"]), "does not know the item 'nothing'"),
        (lambda served: served.similar_items("nothing"), "does not know the item 'nothing'"),
    ],
)
def test_what_cannot_be_answered_is_one_sentence(call, message):
    with pytest.raises(UserError, match=message):
        call(recommender("Mamba4Rec"))


@pytest.mark.parametrize("kind", ["int32", "uint64", "float32", "Int64"])
def test_times_are_numbers_of_any_kind(kind):
    served = recommender("STARRec", use_time_gaps=True)
    table = pd.DataFrame({"user_id": "u", "item_id": ["i2", "i1"], "timestamp": [1000, 10]})
    found = served.recommend(table.astype({"timestamp": kind}), 3)
    assert found["item_id"].tolist() == served.recommend([["i1", "i2"]], 3, times=[[10, 1000]]).items[0]
    assert served.recommend(table[:0].astype({"timestamp": object})).empty


def test_scores_stand_in_the_order_of_the_items_asked_for():
    served = recommender("Mamba4Rec")
    items = served.vocabulary.items[1:]
    found = served.score([["i1", "i2"]], items[::-1])[0]
    np.testing.assert_allclose(found, served.score([["i1", "i2"]], items)[0][::-1], rtol=1e-5)


def test_a_model_of_times_asks_for_them():
    served = recommender("STARRec", use_time_gaps=True)
    with pytest.raises(UserError, match="this model reads the time of each item"):
        served.recommend([["i1", "i2"]])
    near, far = (served.recommend([["i1", "i2"]], times=[[0, gap]]).scores for gap in (1, 10**6))
    assert near != far


@pytest.mark.parametrize("name", ["STARRec", "SASRec"])
def test_a_checkpoint_is_all_that_is_needed(name, monkeypatch):
    write_dataset("tiny", random_rows())
    quick = {"epochs": 1, "eval_step": 1, "valid_metric": "NDCG@10", "topk": [10]}
    run = train_and_test(small_config(name, **quick))
    checkpoint = run.checkpoint
    _, model, dataset, _, _, test_data = load_data_and_model(checkpoint)
    rows, *_ = next(iter(test_data))
    with torch.no_grad():
        expected = model.full_sort_predict(rows.to("cpu"))
    length = rows[model.ITEM_SEQ_LEN].tolist()
    histories = [
        dataset.id2token(dataset.iid_field, row[:n]).tolist()
        for row, n in zip(rows[model.ITEM_SEQ], length, strict=True)
    ]
    moved = Path("elsewhere.pth")
    Path(checkpoint).rename(moved)
    Path("dataset").rename("gone")
    read = []
    monkeypatch.setattr(torch, "load", lambda *args, _load=torch.load, **kw: read.append(args) or _load(*args, **kw))
    served = Recommender.load(moved, "cpu")
    assert len(read) == 1
    np.testing.assert_allclose(
        served.score(histories, served.vocabulary.items[1:]), expected[:, 1:], rtol=1e-4, atol=1e-5
    )
    assert served.digest == Recommender.load(moved).digest
    assert served.results["best_valid_result"] == run.result["best_valid_result"]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [("BPR", {}, "ranks for the users that it was trained on"), ("FDSA", {}, "is built of more than its items")],
)
def test_a_model_that_needs_more_is_refused(name, settings, message):
    write_dataset("tiny", random_rows())
    if name == "FDSA":
        Path("dataset/tiny/tiny.item").write_text(
            "item_id:token\tclass:token\n" + "".join(f"i{i}\tc{i % 3}\n" for i in range(30))
        )
        fields = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "class"]}
        settings = {"load_col": fields, "selected_features": ["class"]}
    checkpoint = train_and_test(small_config(name, epochs=1, **settings)).checkpoint
    with pytest.raises(UserError, match=message):
        Recommender.load(checkpoint)
    if name == "FDSA":
        served = Recommender.load(checkpoint, with_data=True)
        assert len(served.recommend([["i1", "i2"]], 3).items[0]) == 3
