"""Every line of a file is a row of what is read, cell by cell as it stands, or the file is refused in one sentence."""

from pathlib import Path

import numpy as np
import pytest

from recbole_ssm import Config
from recbole_ssm.data import create_dataset, reading
from recbole_ssm.errors import UserError

from ..conftest import HEADER, small_config, write_dataset

MODELS = ["Mamba4Rec", "SASRec", "BPR"]
STRANGE_IDS = [
    '"', '"a"', 'b"', "''", "NA", "null", "nan", "None", "#N/A", "NULL", "N/A", "1e5", "100000", "01", "1", "1.0", " 1",
    "1 ", "True", "TRUE", "\\", "#", "a,b", "é", "\u2028", "[PAD", "inf", "-", "'",
]  # fmt: skip


def config_of(model, **settings):
    if model == "Mamba4Rec":
        return small_config(model, **settings)
    return Config(model, "tiny", config_dict={"state": "ERROR", "data_path": "dataset", **settings})


def interactions(dataset):
    """Names and times of all rows in the file's order."""
    feat = dataset.inter_feat
    names = [dataset.id2token(field, feat[field].to_numpy()) for field in ("user_id", "item_id")]
    return list(zip(*map(list, names), feat["timestamp"].tolist(), strict=True))


def write_bytes(content, name="tiny"):
    path = write_dataset(name, [])
    path.write_bytes(content)
    return path


LOAD_ALL = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}


@pytest.mark.parametrize("model", MODELS)
def test_ids_are_what_stands_between_separators(model):
    rows = [
        (user, item, float(k)) for k, (user, item) in enumerate(zip(STRANGE_IDS, reversed(STRANGE_IDS), strict=True))
    ]
    write_dataset("tiny", [f"{user}\t{item}\t{time:.0f}" for user, item, time in rows])
    dataset = create_dataset(config_of(model, **LOAD_ALL))
    assert interactions(dataset) == rows
    assert dataset.user_num == dataset.item_num == len(STRANGE_IDS) + 1


@pytest.mark.parametrize("model", MODELS)
def test_ids_that_look_like_numbers_stay_apart(model):
    """pandas makes numbers of a column of categories all of which look like some."""
    rows = [("1", "01", 1.0), ("01", "1", 2.0), ("1", "1.0", 3.0), ("1e0", "1", 4.0)]
    write_dataset("tiny", ["\t".join([user, item, str(time)]) for user, item, time in rows])
    assert interactions(create_dataset(config_of(model, **LOAD_ALL))) == rows


TEXTS = {
    "byte order mark": "\ufeffuser_id:token\titem_id:token\ttimestamp:float\na\tx\t1\nb\ty\t2\n",
    "windows' lines": "user_id:token\titem_id:token\ttimestamp:float\r\na\tx\t1\r\nb\ty\t2\r\n",
    "no last newline": "user_id:token\titem_id:token\ttimestamp:float\na\tx\t1\nb\ty\t2",
    "blank lines": "user_id:token\titem_id:token\ttimestamp:float\n\na\tx\t1\n\r\n\nb\ty\t2\n\n\n",
    "spaces around numbers": "user_id:token\titem_id:token\ttimestamp:float\na\tx\t 1\nb\ty\t2 \n",
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_two_rows_are_two_rows(text, model):
    write_bytes(text.encode())
    assert interactions(create_dataset(config_of(model, **LOAD_ALL))) == [("a", "x", 1.0), ("b", "y", 2.0)]


REFUSED = {
    "too few cells": ("a\tx\t1\nb\ty\n", r"tiny\.inter has 2 cells in line 3, not 3"),
    "too many cells": ("a\tx\t1\nb\ty\t2\t3\n", r"tiny\.inter has 4 cells in line 3, not 3"),
    "one short, one long": ("a\tx\nb\ty\t2\t3\n", r"has 2 cells in line 2, not 3"),
    "long from the first row": ("0\ta\tx\t1\n1\tb\ty\t2\n", r"has 4 cells in line 2, not 3"),
    "NUL": ("a\tx\t1\nb\0c\ty\t2\n", r"holds a NUL byte in line 3: take it out"),
    "carriage return": ("a\tx\t1\r\nb\ry\t2\n", r"holds a carriage return that ends no line in line 3"),
    "old Mac's lines": ("a\tx\t1\rb\ty\t2\r", r"holds a carriage return that ends no line in line 2"),
    "infinite time": (
        "a\tx\t1\nb\ty\tinf\n",
        r"line 3 has inf in column timestamp:float, which is no number that float",
    ),
    "endless time": ("a\tx\t-1e400\n", r"line 2 has -inf in column timestamp:float, which is no number that float32"),
    "date": ("a\tx\t2023-11-15 06:10:32\n", r"column timestamp:float, which is no number; write dates as seconds"),
    "boolean time": ("a\tx\tTrue\nb\ty\tFalse\n", r"line 2 has True in column timestamp:float, which is no number;"),
    "word after a blank line": ("a\tx\t1\n\nb\ty\tnoon\n", r"line 4 has noon in column timestamp:float"),
    "Python's numbers": ("a\tx\t1\nb\ty\t1_000\n", r"line 3 has 1_000 in column timestamp:float"),
    "words that might be missing": ("a\tx\t1\nb\ty\tnan \n", r"line 3 has nan  in column timestamp:float"),
    "blank": ("\n\n", r"has a header but no rows"),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("rows", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_rightly_is_refused(rows, message, model):
    write_bytes((HEADER + "\n" + rows).encode())
    with pytest.raises(UserError, match=message):
        create_dataset(config_of(model, **LOAD_ALL))


def test_two_columns_of_one_name():
    write_dataset("tiny", ["a\tx\ty\t1"], "user_id:token\titem_id:token\titem_id:token\ttimestamp:float")
    with pytest.raises(UserError, match="has two columns item_id"):
        create_dataset(small_config("Mamba4Rec"))


def test_a_line_in_another_encoding_is_named():
    write_bytes((HEADER + "\na\tx\t1\nb\tcafé\t2\n").encode("latin-1"))
    with pytest.raises(UserError, match=r"is not in UTF-8 \(line 3: "):
        create_dataset(small_config("Mamba4Rec"))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-8-sig"])
def test_other_encodings(encoding):
    write_bytes((HEADER + '\na\tcafé\t1\nb\t"y\t2\n').encode(encoding))
    dataset = create_dataset(small_config("Mamba4Rec", encoding=encoding))
    assert interactions(dataset) == [("a", "café", 1.0), ("b", '"y', 2.0)]


def test_an_unknown_encoding():
    write_dataset("tiny", ["a\tx\t1"])
    for encoding in ("klingon", "hex"):
        with pytest.raises(UserError, match=f"encoding is '{encoding}', which is none of Python's for text"):
            create_dataset(small_config("Mamba4Rec", encoding=encoding))


@pytest.mark.parametrize("separator", ["\\t", "||", "§", ", ", " ", '"', "|"])
def test_separators_are_taken_literally(separator):
    between = "\t" if separator == "\\t" else separator
    write_bytes(f"{HEADER}\na\tx\\.\t1\nb\t'y'\t2\n".replace("\t", between).encode())
    dataset = create_dataset(small_config("Mamba4Rec", field_separator=separator))
    assert interactions(dataset) == [("a", "x\\.", 1.0), ("b", "'y'", 2.0)]


def test_a_separator_that_is_none():
    write_dataset("tiny", ["a\tx\t1"])
    for separator in ("", "\n"):
        with pytest.raises(UserError, match=r"field_separator is .*: (set it to|choose) what stands between"):
            create_dataset(small_config("Mamba4Rec", field_separator=separator))


def test_a_missing_column_is_missed_in_the_file_and_not_in_what_is_loaded():
    write_dataset("tiny", ["a\tx\t1\t5"], "user_id:token\titem_id:token\twhen:float\trating:float")
    with pytest.raises(UserError, match=r"no column timestamp \(it has user_id, item_id, when, rating\)"):
        create_dataset(small_config("Mamba4Rec"))
    write_dataset("tiny", ["a\tx\t1"])
    with pytest.raises(UserError, match=r"timestamp of .*tiny\.inter is left out by load_col"):
        create_dataset(small_config("Mamba4Rec", load_col={"inter": ["user_id", "item_id"]}))


def test_missing_numbers_are_missing_and_missing_names_too(caplog):
    rows = ["a\tx\t1\t2", "a\ty\t2\tNA", "a\tz\t3\t", "a\tv\t4\tnan", "\tx\t5\t1", "b\t\t6\t1"]
    write_dataset("tiny", rows, HEADER + "\tprice:float")
    dataset = create_dataset(config_of("Mamba4Rec", load_col=None, state="WARNING"))
    assert dataset.inter_feat["price"].tolist() == [2.0] * 4  # the mean of one
    assert "2 rows of dataset/tiny/tiny.inter have no user_id or item_id (the first is line 6)" in caplog.text
    assert len(dataset.inter_feat) + 2 == len(rows)


def test_rows_in_many_pieces_are_all_read(monkeypatch):
    """The check of rows goes piece by piece; pandas' reader has pieces of its own."""
    monkeypatch.setattr(reading, "BYTES_AT_A_TIME", 100)
    rows = [f"  u{k % 7}\t i{k % 11}\t{k}" for k in range(20_000)]
    path = write_dataset("tiny", ["", *rows[:9000], "", *rows[9000:]])
    dataset = create_dataset(small_config("Mamba4Rec"))
    assert interactions(dataset) == [(f"  u{k % 7}", f" i{k % 11}", float(k)) for k in range(20_000)]
    with open(path, "a") as file:
        file.write("u\ti\n")
    with pytest.raises(UserError, match="has 2 cells in line 20004, not 3"):
        create_dataset(small_config("Mamba4Rec"))


def test_numbers_are_read_exactly():
    numbers = ["0.1", "1e-7", "123456789.123456789", "3.4e38", "-0.0", "16777217", "9007199254740993"]
    Path("x.inter").write_text("number:float\n" + "".join(f"{number}\n" for number in numbers))
    file = reading.AtomicFile(Path("x.inter"), "\t")
    exact = file.read({"number": reading.NUMBERS})["number"]
    assert exact.tolist() == [float(number) for number in numbers]
    Path("x.inter").write_text("number:float\n9007199254740993\n")
    assert file.read({"number": reading.EXACT_NUMBERS})["number"].tolist() == [9007199254740993]


@pytest.mark.parametrize("ending", ["item", "user"])
def test_features_are_read_alike(ending, caplog):
    write_dataset("tiny", [f"u{k}\t{name}\t{k}" for k, name in enumerate(['"', "NA", "01", "1"] * 2)])
    rows = ['"\tred', "NA\tNA", '01\t"blue', "1\tTrue", "1\tsecond", "\tnameless"]
    fields = {"item": "item_id", "user": "user_id"}
    text = "".join(line + "\n" for line in [f"{fields[ending]}:token\tcolour:token", *rows])
    if ending == "user":
        write_dataset("tiny", [f"{name}\ti{k}\t{k}" for k, name in enumerate(['"', "NA", "01", "1"] * 2)])
    Path(f"dataset/tiny/tiny.{ending}").write_text(text)
    dataset = create_dataset(config_of("FM", load_col=None, state="WARNING"))
    feat = getattr(dataset, f"{ending}_feat")
    colours = dict(
        zip(
            dataset.id2token(fields[ending], feat[fields[ending]].to_numpy()),
            dataset.id2token("colour", feat["colour"].to_numpy().astype(int)),
            strict=True,
        )
    )
    assert colours == {"[PAD]": "[PAD]", '"': "red", "NA": "NA", "01": '"blue', "1": "True"}
    assert f"1 rows of dataset/tiny/tiny.{ending} have no {fields[ending]} (the first is line 7)" in caplog.text
    assert f"1 rows of dataset/tiny/tiny.{ending} have the {fields[ending]} of a row above (the first is line 6)" in (
        caplog.text
    )
    assert len(feat) - 1 + 2 == len(rows)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_random_cells_come_back(size):
    generator = np.random.default_rng(size)
    alphabet = list("ab\" '\\#,;|:{}0123456789.-+eE\u00e9\u200b\U0001f600\x85\x0b\x1c")
    names = ["".join(generator.choice(alphabet, generator.integers(1, 8))) for _ in range(2 * size)]
    rows = list(zip(names[:size], names[size:], map(float, range(size)), strict=True))
    write_bytes((HEADER + "\n" + "".join(f"{a}\t{b}\t{t:.0f}\n" for a, b, t in rows)).encode())
    assert interactions(create_dataset(small_config("Mamba4Rec"))) == rows
