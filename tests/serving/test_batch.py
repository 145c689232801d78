"""Files of users to files of recommendations, against `recommend` on the whole table; runs that end too early."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recbole_ssm import Recommender, UserError
from recbole_ssm.cli import run_recommend
from recbole_ssm.quick_start import train_and_test

from ..conftest import random_rows, small_config, write_dataset
from ..test_places import command
from .conftest import recommender

pa = pytest.importorskip("pyarrow")
batch = pytest.importorskip("recbole_ssm.serving.batch")
parquet = pytest.importorskip("pyarrow.parquet")

NAMES = ["user_id", "item_id", "timestamp"]
SASREC = {"train_mode": "sequence", "valid_metric": "NDCG@10"}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Several spills and parts of a few hundred users."""
    for name, value in (("ROWS_OF_A_SPILL", 700), ("BYTES_OF_A_PART", 4000), ("ANSWERS_AT_A_TIME", 256)):
        monkeypatch.setattr(batch, name, value)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        patch.setattr(sys, "argv", ["test"])
        write_dataset("tiny", random_rows())
        settings = {"epochs": 1, "eval_step": 1, "valid_metric": "NDCG@10", "topk": [10], "MAX_ITEM_LIST_LENGTH": 8}
        return Path(train_and_test(small_config("Mamba4Rec", **settings)).checkpoint).resolve()


def interactions(users: int = 300, seed: int = 0) -> pd.DataFrame:
    """Rows in any order: names that look like numbers, quotes and commas, times that tie, and items of no model."""
    generator = np.random.default_rng(seed)
    count = 8 * users
    kinds = np.array(["{}", "0{}", "u {}", '"{}', "ü,{}"])
    number = generator.integers(0, users, count)
    user = [str(kind).format(n) for kind, n in zip(kinds[number % len(kinds)], number, strict=True)]
    items = [f"i{i}" for i in generator.integers(0, 33, count)]  # the model knows 30 of them
    table = pd.DataFrame(
        {"user_id": user, "rating": 3.5, "item_id": items, "timestamp": generator.integers(0, 9, count)}
    )
    return pd.concat([table, pd.DataFrame([["nobody", 1.0, "unheard of", 3]], columns=table.columns)])


def written(table: pd.DataFrame, kind: str) -> Path:
    if kind == "folder":
        Path("input").mkdir()
        half = len(table) // 2
        table[:half].to_parquet("input/a.parquet", row_group_size=100)
        table[half:].astype({"user_id": "category"}).to_parquet("input/b.parquet")
        return Path("input")
    path = Path(f"input.{kind}")
    if kind == "inter":
        types = ["token", "float", "token", "float"]
        header = "\t".join(f"{name}:{ftype}" for name, ftype in zip(table.columns, types, strict=True))
        lines = ["\t".join(map(str, row)) for row in table.itertuples(index=False)]
        path.write_text("\n".join([header, *lines[:5], "", *lines[5:]]), encoding="utf-8-sig")
    elif kind == "csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path, row_group_size=1000)
    return path


def by_user(table: pd.DataFrame) -> pd.DataFrame:
    return table.sort_values(["user", "rank"], kind="stable").reset_index(drop=True)


def check(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    found, expected = by_user(found), by_user(expected.rename(columns={"user_id": "user", "item_id": "item"}))
    assert found.columns.tolist() == ["user", "item", "score", "rank"]
    for column in ("user", "item", "rank"):
        assert found[column].tolist() == expected[column].tolist()
    np.testing.assert_allclose(found["score"], expected["score"], rtol=1e-4, atol=1e-6)


CASES = [
    ("inter", "Mamba4Rec", {}, {}),
    ("csv", "STARRec", {"use_time_gaps": True}, {"candidates": [f"i{i}" for i in range(3, 20)]}),
    ("parquet", "SASRec", SASREC, {"exclude_seen": False}),
    ("folder", "Mamba4Rec", {}, {"k": 100}),
]


@pytest.mark.parametrize(("kind", "model", "settings", "options"), CASES, ids=[case[0] for case in CASES])
def test_everyone_gets_what_recommend_gives(kind, model, settings, options):
    served, table = recommender(model, MAX_ITEM_LIST_LENGTH=6, **settings), interactions()
    options = {"k": 5, **options}
    done = batch.recommend_all(served, written(table, kind), "out.parquet", batch_users=37, **options)
    found, expected = pd.read_parquet("out.parquet"), served.recommend(table, **options)
    check(found, expected)
    assert (done.users, done.answered, done.rows) == (
        table["user_id"].nunique(), expected["user_id"].nunique(), len(expected)
    )  # fmt: skip
    assert parquet.read_schema("out.parquet").equals(batch.SCHEMA)
    assert not Path("out.parquet.partial").exists()
    assert parquet.ParquetFile("out.parquet").metadata.num_rows == len(expected)


def test_a_users_rows_are_together_by_rank_and_parts_are_many():
    served = recommender("Mamba4Rec")
    batch.recommend_all(served, written(interactions(), "inter"), "out/", k=4)
    files = sorted(Path("out").iterdir())
    assert len(files) > 5
    table = pd.concat([pd.read_parquet(file) for file in files])
    check(table, served.recommend(interactions(), 4))
    assert table["rank"].tolist() == [1, 2, 3, 4] * (len(table) // 4)
    assert (table["user"] != table["user"].shift()).sum() == table["user"].nunique()


def test_without_times_the_order_is_that_of_the_rows():
    served, table = recommender("Mamba4Rec", MAX_ITEM_LIST_LENGTH=3), interactions().drop(columns="timestamp")
    batch.recommend_all(served, written(table, "csv"), "out.parquet", k=5)
    check(pd.read_parquet("out.parquet"), served.recommend(table, 5))


@pytest.mark.parametrize(("separator", "encoding"), [("\\t", "utf-8"), (";", "latin-1"), ("|", "utf-16"), ("\t", None)])
def test_an_atomic_file_is_read_as_in_training(separator, encoding):
    served, table = recommender("Mamba4Rec"), interactions(20)
    served.config.final_config_dict.update(field_separator=separator, encoding=encoding)
    path = written(table, "inter")
    text = path.read_text("utf-8-sig").replace("\t", separator.replace("\\t", "\t"))
    path.write_bytes(text.encode(encoding or "utf-8"))
    batch.recommend_all(served, path, "out.parquet", 5)
    check(pd.read_parquet("out.parquet"), served.recommend(table, 5))


@pytest.mark.parametrize(
    ("separator", "encoding", "message"),
    [
        (
            "::",
            "utf-8",
            r"a\.inter is separated by '::' \(field_separator\), of more than a byte: give the same rows as",
        ),
        ("§", "utf-8", "is separated by '§'"),
        ("", "utf-8", "field_separator is ''"),
        ("\t", "ascii", "a.inter cannot be read .*ascii"),
        ("\t", "hex", "a.inter cannot be read .*hex"),
    ],
)
def test_an_atomic_file_that_is_written_otherwise_is_one_sentence(separator, encoding, message):
    served = recommender("Mamba4Rec")
    served.config.final_config_dict.update(field_separator=separator, encoding=encoding)
    Path("a.inter").write_text(HEADER + "ü\ti1\t1\n", "utf-8")
    with pytest.raises(UserError, match=message):
        batch.recommend_all(served, "a.inter", "out.parquet")


def test_times_in_some_files_alone_are_refused():
    path = written(interactions(9), "folder")
    pd.read_parquet(path / "b.parquet").drop(columns="timestamp").to_parquet(path / "b.parquet")
    with pytest.raises(UserError, match="some files of input have a column 'timestamp', and some not: mend them"):
        batch.recommend_all(recommender("Mamba4Rec"), path, "out.parquet")


def test_what_is_left_out_is_told(caplog):
    table = interactions()
    unknown = int((~table["item_id"].isin([f"i{i}" for i in range(30)])).sum())
    with caplog.at_level(logging.WARNING):
        done = batch.recommend_all(recommender("Mamba4Rec"), written(table, "parquet"), "out.parquet")
    assert f"{unknown} of {len(table)} rows name items that are unknown to the model, such as 'i3" in caplog.text
    assert done.users - done.answered >= 1


KILLED = """
import os, signal, sys
from recbole_ssm.cli import run_recommend
from recbole_ssm.serving import batch
batch.ROWS_OF_A_SPILL, batch.BYTES_OF_A_PART, batch.ANSWERS_AT_A_TIME = 700, 4000, 256
whole, count = batch._Answers.of, [0]
def dying(self, users, histories):
    count[0] += 1
    for answer in whole(self, users, histories):
        yield answer
        if count[0] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
batch._Answers.of = dying
run_recommend.main()
"""


def test_a_killed_command_goes_on(checkpoint, monkeypatch, capsys):
    source = written(interactions(), "inter")
    words = ["--checkpoint", str(checkpoint), "--input", str(source), "-k", "5", "--device", "cpu", "--threads", "2"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *words, "--output", "out/"], capture_output=True, text=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = {file.name: file.stat().st_ino for file in Path("out.partial/parts").glob("*.parquet")}
    assert len(before) == 3
    monkeypatch.setattr(batch, "write_spill", lambda *given: pytest.fail("the input was read again"))
    assert command(monkeypatch, run_recommend.main, *words, "--output", "out/") == 0
    assert "recommendations for 300 of 301 users in out/" in capsys.readouterr().out
    after = {file.name: file.stat().st_ino for file in Path("out").iterdir()}
    assert len(after) > len(before)
    assert before.items() <= after.items()
    check(pd.read_parquet("out"), Recommender.load(checkpoint, "cpu").recommend(interactions(), 5))


HEADER = "user_id:token\titem_id:token\ttimestamp:float\n"
BAD = [
    ("none.csv", None, "none.csv not found"),
    ("a.txt", "user_id", "is of no kind that is known: give a file .inter, .csv or .parquet"),
    ("a.csv", "", "has no column 'user_id': it is empty"),
    ("a.csv", "user_id,item\nu,i", "has no column 'item_id': it has user_id, item"),
    ("a.csv", "user_id,item_id,user_id\nu,i,v", "has two columns 'user_id'"),
    ("a.csv", "user_id,item_id\n", "a.csv has no rows"),
    ("a.csv", "user_id,item_id\nu,i1\nu\n", "a.csv cannot be read .*Expected 2 columns, got 1"),
    ("a.csv", "user_id,item_id\nu,i1\n,i2\n", "a.csv has no user_id in row 2"),
    ("a.csv", "user_id,item_id,timestamp\nu,i1,soon\n", "a.csv cannot be read .*soon.*: write times as numbers"),
    ("a.csv", "user_id,item_id,timestamp\nu,i1,1\nu,i1,\n", "a.csv has no finite number as timestamp in row 2"),
    ("a.csv", b"user_id,item_id\nu\xff,i1\n", "a.csv cannot be read"),
    ("a.inter", "", "a.inter is empty"),
    ("a.inter", HEADER + "u\ti1\n", "a.inter cannot be read .*Expected 3 columns, got 2"),
    ("a.inter", HEADER + "u\ti1\tinf\n", "no finite number as timestamp in row 1"),
    ("a.parquet", "PAR1", "a.parquet cannot be read"),
    ("a.parquet", {"user_id": [1.5], "item_id": ["i1"]}, "has double in the column 'user_id'"),
    ("a.parquet", {"user_id": ["u"], "item_id": ["i1"], "timestamp": ["now"]}, "times are to be numbers"),
    ("a.parquet", {"user_id": ["u", None], "item_id": ["i1", "i1"]}, "has no user_id in row 2"),
    (".", None, "holds no file .inter, .csv or .parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_an_input_that_cannot_be_read_is_one_sentence(name, content, message):
    if isinstance(content, dict):
        pd.DataFrame(content).to_parquet(name)
    elif content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        batch.recommend_all(recommender("Mamba4Rec"), name, "out.parquet")
    assert str(caught.value).count("\n") == 0
    assert not list(Path().glob("out.parquet*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0: choose a whole number from 1"),
        ({"batch_users": 0}, "batch_users is 0"),
        ({"index": "annoy"}, "index is 'annoy': choose exact or faiss"),
        ({"candidates": ["nothing"]}, "none of the candidates is known to the model"),
        ({"output": "file/below.parquet"}, "cannot be written"),
        ({"output": "."}, "name a file, or a folder"),
        ({"output": "o.csv"}, "it is written as Parquet: name a file .parquet"),
        ({"output": "full/"}, "full holds other files than parts of recommendations"),
        ({"index": "faiss", "lists_searched": 0}, "the lists to search are 0"),
    ],
)
def test_an_option_that_makes_no_sense_is_one_sentence(options, message):
    Path("file").touch()
    Path("full").mkdir()
    Path("full/mine").touch()
    with pytest.raises(UserError, match=message):
        batch.recommend_all(recommender("Mamba4Rec"), written(interactions(9), "csv"), **{"output": "o", **options})


def test_an_index_is_held_to_the_exact_answer(checkpoint, monkeypatch, capsys):
    pytest.importorskip("faiss")
    write_dataset("tiny", random_rows(200, 2000, 30))
    served = recommender("Mamba4Rec", MAX_ITEM_LIST_LENGTH=6)
    source = Path("dataset/tiny/tiny.inter")
    batch.recommend_all(served, source, "exact.parquet", k=10)
    exact = by_user(pd.read_parquet("exact.parquet"))
    for lists, least, most in ((10**6, 1.0, 1.0), (3, 0.05, 0.95)):
        done = batch.recommend_all(served, source, "out.parquet", k=10, index="faiss", lists_searched=lists)
        found = by_user(pd.read_parquet("out.parquet"))
        assert found["user"].tolist() == exact["user"].tolist()
        assert found["rank"].tolist() == exact["rank"].tolist()
        assert (found.groupby("user")["score"].diff().dropna() <= 0).all()
        common = len(found.merge(exact, on=["user", "item"]))
        assert done.sampled == done.users == 200
        assert done.recall == pytest.approx(common / len(exact))
        assert least <= done.recall <= most
        seen = pd.read_csv(source, sep="\t").set_axis(["user", "item", "time"], axis=1)
        assert not len(found.merge(seen, on=["user", "item"]))
    words = ["--checkpoint", str(checkpoint), "--input", str(source), "--output", "cli.parquet", "--index=faiss"]
    assert command(monkeypatch, run_recommend.main, *words, "--lists=3") == 0
    assert "recall@10 of the index against the exact answer, for " in capsys.readouterr().out


def test_a_model_without_inner_products_has_no_index():
    with pytest.raises(UserError, match="SASRec may make others: leave --index out"):
        batch.recommend_all(
            recommender("SASRec", **SASREC), written(interactions(9), "csv"), "out.parquet", index="faiss"
        )


def test_a_folder_is_read_whole_whatever_kinds_are_in_it(caplog):
    table = interactions(60)
    one, *parts = np.array_split(np.arange(len(table)), 3)
    Path("mixed").mkdir()
    written(table.iloc[one], "csv").rename("mixed/a.csv")
    written(table.iloc[parts[0]], "parquet").rename("mixed/b.parquet")
    written(table.iloc[parts[1]], "inter").rename("mixed/c.inter")
    Path("mixed/_SUCCESS").touch()
    Path("mixed/notes.txt").touch()
    served = recommender("Mamba4Rec")
    batch.recommend_all(served, "mixed", "mixed.parquet")
    batch.recommend_all(served, written(table, "csv"), "whole.parquet")
    found, expected = (pd.read_parquet(f"{name}.parquet").sort_values(["user", "rank"]) for name in ("mixed", "whole"))
    assert found["item"].tolist() == expected["item"].tolist()
    assert "mixed holds more that is not read: notes.txt" in caplog.text
    assert "_SUCCESS" not in caplog.text


def test_candidates_are_read_as_ids_of_data_are():
    Path("candidates.txt").write_text("i\u2028 1\n\ni\x85\x0b2\n", encoding="utf-8")
    assert run_recommend._lines("candidates.txt") == ["i\u2028 1", "i\x85\x0b2"]


def test_the_commands_words(checkpoint, monkeypatch, capsys):
    source = written(interactions(60), "csv")
    Path("candidates.txt").write_text("i4\ni7\n\nnothing\n")
    words = ["--checkpoint", str(checkpoint), "--input", str(source), "--output", "out.parquet"]
    assert command(monkeypatch, run_recommend.main, *words, "--candidates=candidates.txt", "--include_seen") == 0
    assert set(pd.read_parquet("out.parquet")["item"]) == {"i4", "i7"}
    for more, status, told in [
        (["--candidates=none.txt"], 2, "none.txt cannot be read"),
        (["--threads=0"], 2, "threads are 0"),
        (["--lists=3"], 2, "--lists is of an index: add --index=faiss"),
        (["--at=3"], 2, "this model does not read the time at which it is asked"),
        (["--output=candidates.txt/below"], 1, "cannot be written"),
        (["--checkpoint=none.pth"], 2, "none.pth not found"),
    ]:
        assert command(monkeypatch, run_recommend.main, *words, *more) == status
        told_now = capsys.readouterr().err
        assert any(line.startswith("run_recommend: ") and told in line for line in told_now.splitlines())
        assert "Traceback" not in told_now


MEASURED = """
from benchmarks.measure import resident
from recbole_ssm.cli import run_recommend
from recbole_ssm.serving import batch
batch.ROWS_OF_A_SPILL, batch.BYTES_OF_A_PART = 1 << 15, 1 << 20
assert run_recommend.main() == 0
print("peak", resident("VmHWM"))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_users(checkpoint):
    peaks = []
    for users in (2_000, 60_000):
        source = written(interactions(users), "parquet")
        words = ["--checkpoint", str(checkpoint), "--input", str(source), "--output", "out.parquet", "-k", "20"]
        here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, *words], env=here, capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout.split()[-1]) / 1e6)
        assert parquet.ParquetFile("out.parquet").metadata.num_rows > 10 * users
    assert peaks[1] - peaks[0] < 60, peaks  # MB; the large output alone takes more than 100 as a table
