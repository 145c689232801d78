"""Where there is no negative to draw, a run says so; it used to draw for ever."""

from pathlib import Path

import numpy as np
import pytest

from recbole_ssm import Config
from recbole_ssm.data import create_dataset, data_preparation
from recbole_ssm.data.negatives import check_shares
from recbole_ssm.errors import UserError

from ..conftest import build, small_config, write_dataset

NEGATIVES = {"distribution": "uniform", "sample_num": 2, "alpha": 1.0, "dynamic": False, "candidate_num": 0}
POPULAR = {**NEGATIVES, "distribution": "popularity"}
UNIFORM_EVALUATION = {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni100"}


def one_item(users=3, length=5):
    write_dataset("tiny", [f"u{user}\ti\t{time}" for user in range(users) for time in range(length)])


def all_items(items=4, users=3):
    write_dataset("tiny", [f"u{user}\ti{item}\t{item}" for user in range(users) for item in range(items)])


def recbole_config(model, **settings):
    return Config(model, "tiny", config_dict={"state": "ERROR", "data_path": "dataset", **settings})


@pytest.mark.parametrize(
    ("mode", "arguments"),
    [
        ("sequence", NEGATIVES),
        ("sequence", POPULAR),
        ("prefix", NEGATIVES),
        ("prefix", POPULAR),
        ("prefix", {**NEGATIVES, "dynamic": True, "candidate_num": 2}),
    ],
    ids=str,
)
def test_one_item_has_no_negative(mode, arguments):
    one_item()
    with pytest.raises(UserError, match=r"all negatives of tiny would be one item.*train without negatives"):
        build("Mamba4Rec", loss_type="BPR", train_neg_sample_args=arguments, train_mode=mode)


def test_one_item_is_ranked_without_negatives():
    one_item()
    _, model, (train_data, _, _) = build("Mamba4Rec", loss_type="CE")
    assert model.calculate_loss(next(iter(train_data))).isfinite()


@pytest.mark.parametrize("mode", ["uni100", "pop100"])
@pytest.mark.parametrize("model", ["Mamba4Rec", "SASRec"])
def test_one_item_is_not_ranked_among_samples(model, mode):
    one_item()
    settings = {"loss_type": "CE", "train_neg_sample_args": None, "eval_args": {**UNIFORM_EVALUATION, "mode": mode}}
    config = small_config(model, **settings) if model == "Mamba4Rec" else recbole_config(model, **settings)
    with pytest.raises(UserError, match=r"all negatives of tiny would be one item.*mode: full in eval_args"):
        data_preparation(config, create_dataset(config))


def test_one_item_of_recboles_own_models():
    one_item()
    for model, settings in {"SASRec": {"loss_type": "BPR"}, "DIEN": {}}.items():
        config = recbole_config(model, **settings)
        with pytest.raises(UserError, match="all negatives of tiny would be one item"):
            data_preparation(config, create_dataset(config))


def test_users_who_have_had_all_items():
    all_items()
    config = recbole_config("BPR", eval_args={"split": {"RS": [0.5, 0.25, 0.25]}, "order": "RO"})
    with pytest.raises(UserError, match="Some users have interacted with all items"):
        data_preparation(config, create_dataset(config))


def test_users_who_have_had_all_items_that_are_drawn():
    """Drawn by popularity, items that nobody had are none that could be drawn."""
    all_items()
    Path("dataset/tiny/tiny.item").write_text("item_id:token\ni0\ni1\ni2\ni3\nunseen\n")
    settings = {"eval_args": {"split": {"RS": [0.5, 0.25, 0.25]}, "order": "RO", "mode": "pop100"}}
    config = recbole_config("BPR", load_col=None, train_neg_sample_args={**POPULAR, "sample_num": 1}, **settings)
    with pytest.raises(
        UserError, match=r"3 users of tiny, u0 the first, have had all 4 items that negatives are drawn"
    ):
        data_preparation(config, create_dataset(config))


def test_masks_of_histories_of_all_items():
    all_items(items=4)
    rows = [f"v{user}\ti{item}\t{item}" for user in range(3) for item in range(3)]
    config = recbole_config("BERT4Rec", MAX_ITEM_LIST_LENGTH=10)
    data_preparation(config, create_dataset(config))  # the last item is never in a history
    write_dataset("tiny", [*rows, *(f"u\ti{item % 4}\t{item}" for item in range(12))])
    config = recbole_config("BERT4Rec", MAX_ITEM_LIST_LENGTH=10)
    with pytest.raises(UserError, match=r"histories of tiny hold all its items, so that mask_itemseq"):
        data_preparation(config, create_dataset(config))


def test_shares():
    for weights in ([1.0], [], [1.0, 0.0], [1e30, 1.0], [np.inf, np.inf], [0.0, 0.0], [np.nan, 1.0]):
        with pytest.raises(UserError, match="all negatives of tiny would be one item"):
            check_shares(np.array(weights), "tiny")
    check_shares(np.array([1.0, 1000.0]), "tiny")


def test_a_popularity_that_is_no_number():
    write_dataset("tiny", [f"u{user}\ti{item % 5}\t{item}" for user in range(30) for item in range(9)])
    with pytest.raises(UserError, match=r"alpha of train_neg_sample_args is 1000\.0, and popularity to that power no"):
        build("Mamba4Rec", loss_type="BPR", train_neg_sample_args={**POPULAR, "alpha": 1000.0})
