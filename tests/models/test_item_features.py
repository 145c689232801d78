"""Columns of the .item file as part of what items are to a model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_ssm import Recommender, UserError, run_recbole
from recbole_ssm.registry import MODELS

from ..conftest import build, markov_rows, random_rows, small_settings, write_dataset
from .test_contract import rows

FEATURES = {"item_features": ["kind", "genres", "year"]}
ITEMS = 32  # two of which have no interactions


@pytest.fixture
def tiny():
    """``tiny`` with a token, tokens and a number of each item; some of them missing."""
    write_dataset("tiny", random_rows())
    lines = ["item_id:token\tkind:token\tgenres:token_seq\tyear:float\tcover:float_seq"]
    for item in range(ITEMS):
        genres = " ".join(f"g{genre}" for genre in {item % 3, item % 5, item % 7})
        year = "" if item == 3 else 1980 + item
        lines.append(f"i{item}\t{'' if item == 4 else f'k{item % 4}'}\t{'' if item == 5 else genres}\t{year}\t1 2")
    Path("dataset/tiny/tiny.item").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fusion", ["sum", "concat"])
def test_every_model_reads_features(tiny, name, fusion):
    """Each has a gradient, and what an item's columns say changes its score and what is made of a history."""
    settings = {**FEATURES, "feature_fusion": fusion, "score_features": True, "loss_type": "SampledSoftmax"}
    _, model, (train_data, _, _) = build(name, **settings)
    model.train()
    for batch in train_data:
        loss = model.calculate_loss(batch)
        (sum(loss) if isinstance(loss, tuple) else loss).backward()
    for parameter, tensor in model.item_features.named_parameters():
        assert tensor.grad.abs().max() > 0, f"{parameter} has no gradient"

    model.eval()
    with torch.no_grad():
        before = model.full_sort_predict(rows(model, [[3, 1, 4], [5, 9]]))
        for column in model.item_features.columns:
            column.values[4] = column.values[7]
        model.eval()
        after = model.full_sort_predict(rows(model, [[3, 1, 4], [5, 9]]))
    assert (before[0] != after[0])[1:].all()
    assert set((before[1] != after[1]).nonzero()[:, 0].tolist()) == {4}


def test_vectors_of_items(tiny):
    """The mean of tokens' embeddings, standardised numbers, nothing where nothing is known."""
    _, model, (train_data, _, _) = build("Mamba4Rec", **FEATURES)
    model.eval()
    dataset, features = train_data.dataset, model.item_features
    kind, genres, year = features.columns
    item = dataset.token2id("item_id", "i8")
    expected = model.item_embedding.weight[item] + kind.embedding.weight[dataset.token2id("kind", "k0")]
    expected = expected + sum(genres.embedding.weight[dataset.token2id("genres", f"g{g}")] for g in (2, 3, 1)) / 3
    years = np.array([1980.0 + i for i in range(ITEMS) if i != 3])
    scaled = (1988 - years.mean()) / np.sqrt(((years - years.mean()) ** 2).sum() / ITEMS)
    expected = expected + scaled * year.weight[0]
    torch.testing.assert_close(model.item_vectors(torch.tensor(item)), expected, rtol=1e-4, atol=1e-6)
    for column, name in ((kind, "i4"), (genres, "i5"), (year, "i3")):
        torch.testing.assert_close(column()[dataset.token2id("item_id", name)], torch.zeros(16), atol=1e-6, rtol=0)
    assert model.score_table() is model.item_embedding.weight


def test_an_item_without_interactions_is_what_its_columns_say(tiny):
    _, model, (train_data, _, _) = build("Mamba4Rec", score_features=True, **FEATURES)
    new = [train_data.dataset.token2id("item_id", f"i{item}") for item in (30, 31)]
    assert model.item_features.seen[new].eq(0).all()
    table = model.score_table()
    with torch.no_grad():
        model.item_embedding.weight[new] = 1e3
    torch.testing.assert_close(model.score_table()[new], table[new])


def test_items_that_training_never_saw_are_ranked_by_their_columns():
    """What follows item 0 is item 3, and a new item of its kind is ranked beside it."""
    write_dataset("twins", [row.replace("\t", "\ti", 1) for row in markov_rows(150, 20, 12, 0.0)])
    lines = ["item_id:token\tkind:token", *(f"i{item}\tk{item}" for item in range(20)), "new\tk3", "other\tk4"]
    Path("dataset/twins/twins.item").write_text("\n".join(lines) + "\n")
    settings = {
        "item_features": ["kind"], "score_features": True, "epochs": 30, "learning_rate": 0.02, "state": "ERROR",
        "data_path": "dataset", "show_progress": False, "eval_step": 30, **small_settings("Mamba4Rec"),
    }  # fmt: skip
    run_recbole("Mamba4Rec", "twins", config_dict=settings)
    recommender = Recommender.load(next(Path("saved").glob("*.pth")))
    items = recommender.vocabulary.items[1:].tolist()
    best = recommender.recommend([["i0"]], k=len(items), exclude_seen=False).items[0]
    assert best[0] == "i3"
    assert list(best).index("new") < 3 < list(best).index("other"), best


def test_a_checkpoint_has_what_its_columns_said(tiny):
    """It is served without the data, by sessions too, and the same."""
    settings = {**FEATURES, "score_features": True, "epochs": 1, "state": "ERROR", "show_progress": False}
    run_recbole("STARRec", "tiny", config_dict={**settings, "data_path": "dataset", **small_settings("STARRec")})
    checkpoint = next(Path("saved").glob("*.pth"))
    with_data = Recommender.load(checkpoint, with_data=True)
    for file in Path("dataset/tiny").iterdir():
        file.unlink()
    alone = Recommender.load(checkpoint)
    history = ["i1", "i2", "i9", "i4"]
    found, expected = alone.recommend([history], k=5), with_data.recommend([history], k=5)
    assert found.items == expected.items
    assert found.scores == expected.scores
    session = alone.session()
    for item in history:
        session.append(item)
    assert session.recommend(5).items == found.items
    assert alone.item_embeddings().shape == (ITEMS, 16)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"item_features": ["colour"]}, r"names 'colour', which is no column of .*tiny\.item: choose of .*cover"),
        ({"item_features": ["cover"]}, r"item_features names 'cover', a column of several numbers"),
        ({"item_features": "kind"}, r"item_features is 'kind': choose a list, .*such as \"\['a', 'b'\]\""),
        ({"score_features": True}, r"score_features is True without item_features"),
    ],
)
def test_columns_that_cannot_be_read_are_refused(tiny, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        build("Mamba4Rec", **settings)


@pytest.mark.parametrize(
    ("model", "columns", "sentence"),
    [
        ("SASRecF", ["colour"], r"selected_features names 'colour', which is no column of .*choose of .*cover"),
        ("GRU4RecF", ["kind", "cover"], r"selected_features names cover, of numbers: GRU4RecF wants columns of tokens"),
        ("FDSA", ["cover"], r"selected_features names cover, of numbers: FDSA wants"),
    ],
)
def test_columns_that_recboles_models_cannot_read_are_refused(tiny, model, columns, sentence):
    with pytest.raises(UserError, match=sentence):
        build(model, selected_features=columns)


def test_recboles_models_load_the_columns_that_they_read(tiny):
    assert build("SASRecF", selected_features=["kind"])[1].selected_features == ["kind"]


def test_columns_of_a_file_that_is_not_there_are_refused():
    with pytest.raises(UserError, match=r"item_features names 'colour', but there is no file .*tiny\.item with such a"):
        build("Mamba4Rec", item_features=["colour"])
