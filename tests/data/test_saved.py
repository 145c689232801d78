"""Saved datasets: arrays and words, right for the settings and files of now, or made anew."""

import pickle
from pathlib import Path

import pytest
import torch

from recbole_ssm import Config, UserError
from recbole_ssm.data import create_dataset, data_preparation
from recbole_ssm.data.saved import save_dataset

from ..conftest import Trap, random_rows, small_config, write_dataset


def test_saved_dataset_is_loaded_again(caplog):
    path = write_dataset("tiny", random_rows())
    config = small_config("STARRec", save_dataset=True, checkpoint_dir="kept", use_time_gaps=True)
    first = create_dataset(config)
    path.rename("away")  # so that there is nothing else to read
    again = create_dataset(config)
    assert again.field2token_id == first.field2token_id
    for one, two in zip(first.build(), again.build(), strict=True):
        for field, values in one.inter_feat.interaction.items():
            assert torch.equal(values, two.inter_feat[field]), field
    assert torch.equal(first.sorted_columns, again.sorted_columns)
    write_dataset("tiny", random_rows(seed=1))
    assert create_dataset(config).inter_num == len(random_rows(seed=1))
    assert "the files in dataset/tiny changed since" in caplog.text
    create_dataset(small_config("STARRec", checkpoint_dir="kept", time_order="float32", use_time_gaps=True))
    assert "time_order changed since" in caplog.text


def test_a_saved_dataset_follows_new_eval_args():
    write_dataset("tiny", random_rows())
    create_dataset(small_config("Mamba4Rec", save_dataset=True, checkpoint_dir="kept"))
    split = {"split": {"RS": [0.5, 0.25, 0.25]}, "order": "TO", "mode": "full"}
    config = small_config("Mamba4Rec", checkpoint_dir="kept", eval_args=split)
    saved, fresh = create_dataset(config).build(), create_dataset(small_config("Mamba4Rec", eval_args=split)).build()
    assert [len(part) for part in saved] == [len(part) for part in fresh]


def test_a_saved_dataset_follows_settings_that_recbole_forgets(caplog):
    write_dataset("tiny", random_rows())
    common = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "checkpoint_dir": "kept"}
    create_dataset(small_config("FM", save_dataset=True, **common))
    create_dataset(small_config("FM", **common))
    assert "changed since" not in caplog.text
    buckets = {"numerical_features": ["timestamp"], "discretization": {"timestamp": {"method": "ED", "bucket": 3}}}
    found = create_dataset(small_config("FM", **common, **buckets))
    assert "numerical_features, discretization changed since" in caplog.text
    fresh = create_dataset(small_config("FM", **{**common, "checkpoint_dir": "other"}, **buckets))
    assert found.num("timestamp") == fresh.num("timestamp")


def test_a_saved_dataset_runs_no_code(caplog):
    """Neither one that lies where RecBole looks, nor one that is named."""
    write_dataset("tiny", random_rows())
    Path("kept").mkdir()
    for name in ("tiny-SequenceDataset.pth", "tiny-for-Mamba4Rec-dataloader.pth"):
        Path("kept", name).write_bytes(pickle.dumps(Trap()))
    config = small_config("Mamba4Rec", checkpoint_dir="kept")
    data_preparation(config, create_dataset(config))
    assert "The dataset is made anew" in caplog.text
    with pytest.raises(UserError, match="damaged or no checkpoint"):
        create_dataset(small_config("Mamba4Rec", dataset_save_path="kept/tiny-SequenceDataset.pth"))
    assert not Path("trap").exists()


@pytest.mark.parametrize("model", ["SASRec", "FM", "CFKG"])
def test_recboles_own_datasets_are_saved_and_loaded(model):
    """Features, lists of tokens and knowledge graphs too."""
    path = write_dataset("tiny", random_rows())
    items = [f"i{number}" for number in range(30)]
    path.with_suffix(".item").write_text(
        "item_id:token\tprice:float\tgenres:token_seq\n"
        + "".join(f"{item}\t{place}\t{'a b c'[: 1 + 2 * (place % 3)]}\n" for place, item in enumerate(items))
    )
    path.with_suffix(".kg").write_text(
        "head_id:token\trelation_id:token\ttail_id:token\n" + "".join(f"e{item}\tmade_by\tm\n" for item in items)
    )
    path.with_suffix(".link").write_text("item_id:token\tentity_id:token\n" + "".join(f"{i}\te{i}\n" for i in items))
    load = {"FM": None, "SASRec": {"inter": ["user_id", "item_id", "timestamp"]}}
    settings = {"load_col": load[model]} if model in load else {}
    settings |= {"data_path": "dataset", "state": "ERROR", "checkpoint_dir": "kept", "save_dataset": True}
    config = Config(model, "tiny", config_dict=settings)
    first = create_dataset(config)
    for file in list(path.parent.iterdir()):
        file.unlink()
    again = create_dataset(config)
    assert str(again) == str(first)
    parts = []
    for dataset in (first, again):
        torch.manual_seed(0)  # of random splits
        parts.append(dataset.build())
    for one, two in zip(*parts, strict=True):
        for field, values in one.inter_feat.interaction.items():
            assert torch.equal(values, two.inter_feat[field]), field
    if model == "FM":
        for field, values in first.get_item_feature().interaction.items():
            assert torch.equal(values, again.get_item_feature()[field]), field


def test_a_dataset_that_keeps_something_else_is_not_saved():
    write_dataset("tiny", random_rows())
    dataset = create_dataset(small_config("Mamba4Rec"))
    dataset.hook = Trap()
    with pytest.raises(UserError, match="keeps a Trap: leave save_dataset out"):
        save_dataset(dataset, "kept.pth")
