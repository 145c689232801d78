"""Files that cannot be read end in one sentence that says what is wrong and what to do."""

import pickle
from pathlib import Path

import pytest
from recbole.data.dataset import SequentialDataset

from recbole_ssm.data import create_dataset
from recbole_ssm.data.atomic_files import AtomicFiles, hardened
from recbole_ssm.errors import UserError

from ..conftest import HEADER, random_rows, small_config, write_dataset

BAD_FILES = {
    "nothing at all": ([], None, "tiny.inter is empty: its first line should read like user_id:token"),
    "header alone": ([], HEADER, "tiny.inter has a header but no rows"),
    "no types": (["u\ti\t1"], "user_id\titem_id\ttimestamp", "bad header: column 'user_id' should be name:type"),
    "unknown type": (["u\ti\t1"], "user_id:token\titem_id:text\ttimestamp:float", "bad header: column 'item_id:text'"),
    "commas": (["u,i,1"], HEADER.replace("\t", ","), "bad header: column 'user_id:token,item_id"),
    "no time": (["u\ti"], "user_id:token\titem_id:token", r"no column timestamp \(it has user_id, item_id\)"),
    "no item": (["u\t1"], "user_id:token\ttimestamp:float", "no column item_id"),
    "words for times": (["u\ti\tnoon"], HEADER, "cannot be read: .*timestamp:float"),
}


@pytest.mark.parametrize(("lines", "header", "message"), BAD_FILES.values(), ids=BAD_FILES)
@pytest.mark.parametrize("model", ["Mamba4Rec", "SASRec"])
def test_bad_file(lines, header, message, model):
    write_dataset("tiny", lines, header)
    with pytest.raises(UserError, match=message):
        create_dataset(small_config(model) if model == "Mamba4Rec" else recbole_config(model))


def recbole_config(model):
    from recbole_ssm import Config

    return Config(model, "tiny", config_dict={"state": "ERROR", "data_path": "dataset"})


def test_filters_that_leave_nothing():
    write_dataset("tiny", random_rows())
    with pytest.raises(UserError, match=r"filters leave no interaction of tiny: loosen .* \(\[1000,inf\)\)"):
        create_dataset(small_config("Mamba4Rec", item_inter_num_interval="[1000,inf)"))


def test_unknown_dataset():
    with pytest.raises(
        UserError, match=r"dataset nowhere not found: there is no folder dataset/nowhere\..*--data_path"
    ):
        create_dataset(small_config("Mamba4Rec", "nowhere"))


def test_failed_download_leaves_nothing(monkeypatch):
    def unreachable(url):
        raise OSError("no route to host")

    monkeypatch.setattr("recbole_ssm.data.atomic_files.decide_download", unreachable)
    with pytest.raises(UserError, match=r"lastfm not found.*download from .* failed \(no route to host\)"):
        create_dataset(small_config("Mamba4Rec", "lastfm"))
    assert list(Path("dataset").iterdir()) == []


def test_download_is_unpacked_and_named(monkeypatch, tmp_path):
    import zipfile

    source = write_dataset("LastFM-raw", random_rows())
    archive = tmp_path / "LastFM.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(source, "LastFM.inter")
    monkeypatch.setattr(AtomicFiles, "_get_download_url", lambda *_, **__: archive.as_uri(), raising=False)
    dataset = create_dataset(small_config("Mamba4Rec", "lastfm"))
    assert dataset.item_num == 31
    assert [path.name for path in Path("dataset/lastfm").iterdir()] == ["lastfm.inter"]


def test_missing_side_features_are_filled():
    """Under pandas 3 RecBole fills a copy of them, and its conversion to tensors fails."""
    from recbole_ssm import Config

    write_dataset("tiny", random_rows())
    Path("dataset/tiny/tiny.item").write_text(
        "item_id:token\tprice:float\tbrand:token\n" + "".join(f"i{k}\t{k or ''}\t{'b' * (k % 2)}\n" for k in range(30))
    )
    config = Config("FM", "tiny", config_dict={"state": "ERROR", "data_path": "dataset", "load_col": None})
    dataset = create_dataset(config)
    dataset.build()
    features = dataset.get_item_feature()
    assert features["price"].isfinite().all()
    assert features["price"][dataset.token2id("item_id", "i0")].item() == pytest.approx(15)
    assert (features["brand"] >= 0).all()


def test_saved_dataset_is_loaded_again():
    write_dataset("tiny", random_rows())
    config = small_config("Mamba4Rec", save_dataset=True, checkpoint_dir="kept")
    first = create_dataset(config)
    write_dataset("tiny", random_rows(seed=1))
    assert create_dataset(config).inter_num == first.inter_num
    assert create_dataset(small_config("Mamba4Rec", checkpoint_dir="kept", time_order="float32")) is not first


def test_hardened_classes_pickle():
    cls = hardened(SequentialDataset)
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert hardened(cls) is cls
