"""Files that cannot be read end in one sentence that says what is wrong and what to do."""

import pickle
from pathlib import Path

import pytest
from recbole.data.dataset import Dataset, SequentialDataset

from recbole_ssm import Config
from recbole_ssm.data import create_dataset
from recbole_ssm.data.atomic_files import AtomicFiles, hardened
from recbole_ssm.errors import UserError

from ..conftest import HEADER, build, random_rows, small_config, write_dataset

BAD_FILES = {
    "nothing at all": ([], None, "tiny.inter is empty: its first line should read like user_id:token"),
    "header alone": ([], HEADER, "tiny.inter has a header but no rows"),
    "no types": (["u\ti\t1"], "user_id\titem_id\ttimestamp", "bad header: column 'user_id' should be name:type"),
    "unknown type": (["u\ti\t1"], "user_id:token\titem_id:text\ttimestamp:float", "bad header: column 'item_id:text'"),
    "commas": (["u,i,1"], HEADER.replace("\t", ","), "bad header: column 'user_id:token,item_id"),
    "no time": (["u\ti"], "user_id:token\titem_id:token", r"no column timestamp \(it has user_id, item_id\)"),
    "no item": (["u\t1"], "user_id:token\ttimestamp:float", "no column item_id"),
    "times that are names": (["u\ti\t1"], HEADER.replace("float", "token"), "has timestamp:token: make it float"),
    "words for times": (["u\ti\tnoon"], HEADER, "cannot be read: .*timestamp:float"),
}


@pytest.mark.parametrize(("lines", "header", "message"), BAD_FILES.values(), ids=BAD_FILES)
@pytest.mark.parametrize("model", ["Mamba4Rec", "SASRec"])
def test_bad_file(lines, header, message, model):
    write_dataset("tiny", lines, header)
    with pytest.raises(UserError, match=message):
        create_dataset(small_config(model) if model == "Mamba4Rec" else recbole_config(model))


def recbole_config(model, **settings):
    return Config(model, "tiny", config_dict={"state": "ERROR", "data_path": "dataset", **settings})


def test_filters_that_leave_nothing():
    write_dataset("tiny", random_rows())
    with pytest.raises(UserError, match=r"filters leave no interaction of tiny: loosen .* \(\[1000,inf\)\)"):
        create_dataset(small_config("Mamba4Rec", item_inter_num_interval="[1000,inf)"))


def test_unknown_dataset():
    with pytest.raises(UserError, match=r"dataset nowhere not found: there is no folder dataset/nowhere,.*--data_path"):
        create_dataset(small_config("Mamba4Rec", "nowhere"))


def test_failed_download_leaves_nothing(monkeypatch):
    def unreachable(url):
        raise OSError("no route to host")

    monkeypatch.setattr("recbole_ssm.data.atomic_files.decide_download", unreachable)
    with pytest.raises(UserError, match=r"lastfm not found.*download from .* failed \(no route to host\)"):
        create_dataset(small_config("Mamba4Rec", "lastfm"))
    assert not Path("dataset").exists()


def test_broken_download_leaves_nothing(monkeypatch):
    monkeypatch.setattr("recbole_ssm.data.atomic_files.decide_download", lambda url: True)

    def broken(url, folder):
        Path(folder).mkdir()
        Path(folder, "half.zip").write_bytes(b"half")
        raise RuntimeError("Stopped downloading due to interruption.")

    monkeypatch.setattr("recbole_ssm.data.atomic_files.download_url", broken)
    with pytest.raises(UserError, match=r"lastfm not found.*Stopped downloading"):
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
    write_dataset("tiny", random_rows())
    Path("dataset/tiny/tiny.item").write_text(
        "item_id:token\tprice:float\tbrand:token\n" + "".join(f"i{k}\t{k or ''}\t{'b' * (k % 2)}\n" for k in range(30))
    )
    dataset = create_dataset(recbole_config("FM", load_col=None))
    dataset.build()
    features = dataset.get_item_feature()
    assert features["price"].isfinite().all()
    assert features["price"][dataset.token2id("item_id", "i0")].item() == pytest.approx(15)
    assert (features["brand"] >= 0).all()


def test_hardened_classes_pickle():
    for base in (Dataset, SequentialDataset):
        cls = hardened(base)
        assert pickle.loads(pickle.dumps(cls)) is cls is not base
        assert hardened(cls) is cls


def test_a_folder_without_the_file_says_what_it_holds():
    write_dataset("tiny", random_rows()).rename("dataset/tiny/data.inter")
    with pytest.raises(UserError, match=r"dataset/tiny holds no tiny\.inter \(it holds data\.inter\)"):
        create_dataset(small_config("Mamba4Rec"))


def test_another_encoding():
    path = write_dataset("tiny", [])
    path.write_bytes(path.read_bytes() + "u\tcaf\u00e9\t1\nu\ttea\t2\n".encode("latin-1"))
    with pytest.raises(UserError, match="not in UTF-8"):
        create_dataset(small_config("Mamba4Rec"))
    dataset = create_dataset(small_config("Mamba4Rec", encoding="latin-1"))
    assert "caf\u00e9" in dataset.field2token_id["item_id"]


def test_a_split_made_beforehand():
    """RecBole's rows in files of their own; the models pack them."""
    header = "user_id:token\titem_id_list:token_seq\titem_id:token"
    for part, target in (("train", "d"), ("valid", "e"), ("test", "f")):
        path = write_dataset("tiny", [f"u\ta b c\t{target}", f"v\tb\t{target}"], header)
        path.rename(f"dataset/tiny/tiny.{part}.inter")
    settings = {
        "benchmark_filename": ["train", "valid", "test"], "alias_of_item_id": ["item_id_list"], "train_mode": "prefix",
        "load_col": {"inter": ["user_id", "item_id_list", "item_id"]},
    }  # fmt: skip
    _, model, (train_data, _, test_data) = build("STARRec", **settings)
    (batch,) = list(train_data)
    assert sorted(batch["item_length"].tolist()) == [1, 3]
    loss = model.calculate_loss(batch)
    assert sum(loss).isfinite()
    assert model.eval().full_sort_predict(next(iter(test_data))[0]).shape == (2, 7)
    with pytest.raises(UserError, match="not benchmark_filename; set train_mode: prefix"):
        build("STARRec", **{**settings, "train_mode": "sequence"})
    batch["item_length"][0] = 0
    with pytest.raises(UserError, match="a row has an empty history"):
        model.calculate_loss(batch)
