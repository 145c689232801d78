"""Files of interactions as editors, exports and people write them."""

import codecs
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from recbole_ssm import Config
from recbole_ssm.data import create_dataset, data_preparation
from recbole_ssm.data.sequence_dataset import SequenceDataset
from recbole_ssm.quick_start import config_of, evaluate, train_and_test

from . import checkpoints
from .checkpoints import MODELS, QUIET, TEXT, damaged
from .watch import Outcome, attempt

NAME = "odd"

TOKENS = [
    '"', '""', '"a"', 'a"b', '"a', 'a"', "'", '"""', "NA", "N/A", "NULL", "null", "nan", "NaN", "None", "none",
    "inf", "", " ", "  x  ", "#", "#x", "0", "01", "1", "1.0", "1e5", "True", "False", "-", "[PAD]", "é", "日本", "😀",
    "\u200b", "\u00a0", "\u2028", "\x85", "\x0b", "\x0c", "\x1c", "\x1f", "\\", "\\t", "\\n", "a,b", "a;b", "a::b",
    "a|b", "a:b", "u1 u2", "x" * 5000, "\ufeff", "\ufeffu1", "a\u0301", "\u202e", "%s", "{}", "user_id:token",
    "$(touch trap)", "__import__('pathlib').Path('trap').touch()", "-1", "1_0", "\uff19", "<NA>", "#N/A", "\x7f",
    "\x01", "\x1b[2J", "u\rv",
]  # fmt: skip
TIMES = [
    "", " ", "nan", "NaN", "NA", "null", "inf", "-inf", "Infinity", "1e400", "1e39", "1e38", "-1", "-0", "0",
    "0x10", "1_0", "True", "false", "1,5", "1.5", "1.", ".5", "+3", " 5 ", "5 ", "1e3", "1E3", "1e-400",
    "9223372036854775807", "9223372036854775808", "18446744073709551616", "1" + "0" * 30, "-9223372036854775809",
    "9007199254740993", "\uff11", "\u0663", "2024-01-01", "12:30", "abc", '"5"', "5\x00", "--1", "1e", "e5", "1d3",
    "1f", "00012", "1" * 400, "0." + "1" * 400,
]  # fmt: skip
HEADS = [
    "user_id", ":token", "user_id:", "user_id:int", "user_id:token:x", "user_id :token", "user_id: token",
    "USER_ID:token", "user_id:float", "item_id:float", "timestamp:token", "timestamp:float_seq",
    "user_id:token_seq", "item_id:token", "item_id:token_seq", "weight:float", "label:float", "label:token",
    "rating:float", "item_length:float", "item_id_list:token_seq", "neg_item_id:token", "position_id:token",
    "tags:token_seq", "numbers:float_seq", "x:token", "x:float", "length:float", "interaction:float",
    "columns:token", "device:token", '"user_id":token', "0:token", "", "time_gaps:float", "user_id_list:token",
    "timestamp_list:float", "\ufeffuser_id:token", "a b:float", "é:token", "nan:float",
]  # fmt: skip
SPLIT_SETTINGS = [
    "user_inter_num_interval", "item_inter_num_interval", "val_interval", "eval_args", "load_col", "topk", "metrics",
    "train_neg_sample_args", "rm_dup_inter", "loss_type",
]  # fmt: skip
LISTS = [
    "",
    " ",
    "a",
    "a b",
    "a  b",
    " a",
    "a ",
    "NA",
    '"a b"',
    "1 2 3",
    "1.5",
    "nan",
    "inf 1",
    "1,2",
    "a\u00a0b",
    "1 x",
]
SEPARATORS = ["\t", ",", ";", "|", "::", " ", "\\t", ".", "^", "\x01", "é", "", "\n", "\\|", "a", '"', None, 3]
ENCODINGS = [
    "utf-8",
    "utf-8-sig",
    "utf-16",
    "utf-16-le",
    "latin-1",
    "cp1252",
    "utf-32",
    "gbk",
    "ascii",
    "hex",
    "x",
    None,
]

LEFT_OUT = re.compile(r"^(\d+) (?:rows of .* they are left out|of \d+ interactions .* are left out)", re.DOTALL)
SINGLE = re.compile(r"^(\d+) of \d+ users .* have a single interaction")


@dataclass
class Case:
    """A file of interactions.

    Attributes:
        kind: how it was made.
        data: its bytes.
        model: which model reads it.
        settings: beside those of the model.
        then: what follows once it is loaded: ``load`` (nothing), ``train``, or ``evaluate`` or ``resume`` with a
            checkpoint that was trained on another file.
    """

    kind: str
    data: bytes
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    then: str = "load"


class Bases:
    """Checkpoints of tiny models, made once in the working directory where they are not given."""

    def __init__(self, made: checkpoints.Bases | None = None) -> None:
        self.checkpoints = made or checkpoints.Bases()
        self.data = self.checkpoints.data


def _table(users: int, items: int, longest: int, seed: int) -> list[list[str]]:
    generator = np.random.default_rng(seed)
    rows = [
        [f"u{user}", f"i{generator.integers(items)}", str(1_000_000_000 + 100 * time)]
        for user in range(users)
        for time in range(generator.integers(min(3, longest), longest, endpoint=True))
    ]
    generator.shuffle(rows)
    return rows


KINDS = ["tokens", "tokens", "times", "cells", "ends", "header", "columns", "size", "bytes", "settings", "splits"]


@st.composite
def cases(draw: Any, bases: Bases, absurd: bool = False) -> Case:
    """Files of all kinds."""
    kind = draw(st.sampled_from(KINDS))
    model = draw(st.sampled_from(["Mamba4Rec", "Mamba4Rec", *(name for name in MODELS if name != "ItemKNN")]))
    then = draw(st.sampled_from(["load", "load", "load", "train", "evaluate", "resume"]))
    rows = _table(8, 12, 8, draw(st.integers(0, 3)))
    header = ["user_id:token", "item_id:token", "timestamp:float"]
    settings: dict[str, Any] = {}
    separator, newline, encoding = "\t", "\n", "utf-8"

    def somewhere() -> list[str]:
        return rows[draw(st.integers(0, len(rows) - 1))]

    if kind == "size":
        users, items = draw(st.sampled_from([1, 2, 8])), draw(st.sampled_from([1, 2, 12]))
        rows = _table(users, items, draw(st.sampled_from([1, 2, 3, 8, 120])), 0)
        rows = rows[: draw(st.sampled_from([0, 1, 2, len(rows)]))]
        if draw(st.booleans()):
            rows = [[user, item, "5"] for user, item, _ in rows]
        settings = draw(
            st.sampled_from([{}, {"exclude_history": True}, {"MAX_ITEM_LIST_LENGTH": 3}, {"loss_type": "BPR"}])
        )
        settings = settings if model == "Mamba4Rec" else {}
    elif kind == "tokens":
        for _ in range(draw(st.integers(1, 4))):
            somewhere()[draw(st.integers(0, 1))] = draw(st.one_of(st.sampled_from(TOKENS), TEXT))
    elif kind == "times":
        for _ in range(draw(st.integers(1, 3))):
            somewhere()[2] = draw(st.sampled_from(TIMES))
        if draw(st.integers(0, 5)) == 0:
            odd = draw(st.sampled_from(TIMES))
            rows = [[user, item, odd] for user, item, _ in rows]
    elif kind == "cells":
        for _ in range(draw(st.integers(1, 2))):
            row = somewhere()
            way = draw(st.sampled_from(["less", "more", "none", "blank", "spaces", "twice", "all less", "all more"]))
            every = rows if way.startswith("all") else [row]
            for one in every:
                if way in ("less", "all less"):
                    del one[-1:]
                elif way in ("more", "all more"):
                    one.append(draw(st.sampled_from(["", "x", "5"])) if one is row else "")
                elif way == "twice":
                    rows.append(list(one))
                else:
                    one[:] = {"none": [], "blank": ["", "", ""], "spaces": [" "]}[way]
    elif kind == "header":
        way = draw(st.sampled_from(["change", "change", "add", "drop", "order", "twice", "gone", "empty"]))
        at = draw(st.integers(0, 2))
        if way == "change":
            header[at] = draw(st.sampled_from(HEADS))
        elif way == "add":
            header.insert(at, draw(st.sampled_from(HEADS)))
            if draw(st.booleans()):
                rows = [
                    [*row[:at], draw(st.sampled_from(LISTS)) if n < 3 else "1", *row[at:]] for n, row in enumerate(rows)
                ]
        elif way == "drop":
            del header[at]
        elif way == "order":
            order = draw(st.permutations(range(3)))
            header = [header[i] for i in order]
            rows = [[row[i] for i in order] for row in rows] if draw(st.booleans()) else rows
        elif way == "twice":
            header.append(header[at])
        else:
            header = [] if way == "gone" else [""]
        settings = {} if draw(st.booleans()) else {"load_col": None}
    elif kind == "columns":
        for number in range(draw(st.integers(1, 3))):
            name = draw(
                st.sampled_from([f"c{number}:{t}" for t in ("token", "float", "token_seq", "float_seq")] + HEADS[15:30])
            )
            header.append(name)
            values = draw(st.lists(st.sampled_from(LISTS + TIMES[:8] + TOKENS[:12]), min_size=1, max_size=3))
            plain = draw(st.booleans())
            rows = [[*row, "1" if plain and n > 2 else values[n % len(values)]] for n, row in enumerate(rows)]
        names = [name.partition(":")[0] for name in header]
        settings = {"load_col": draw(st.sampled_from([None, {"inter": names}, {"inter": names[:4]}]))}
        more = [{}, {"normalize_all": True}, {"seq_len": {names[-1]: 1}}, {"numerical_features": [names[-1]]},
                {"unload_col": {"inter": [names[-1]]}}, {"alias_of_item_id": [names[-1]]}, {"seq_separator": ","},
                {"normalize_field": [names[-1]]}, {"val_interval": {names[-1]: "[0,5]"}}, {"threshold": {names[-1]: 1}},
                {"preload_weight": {names[-1]: names[-2]}}, {"use_time_gaps": True}]  # fmt: skip
        settings |= draw(st.sampled_from(more))
    elif kind == "settings":
        separator = draw(st.sampled_from(SEPARATORS))
        settings = {"field_separator": separator}
        separator = separator.replace("\\t", "\t") if isinstance(separator, str) and separator else "\t"
        if draw(st.booleans()):
            encoding = draw(st.sampled_from(ENCODINGS))
            settings = {**settings, "encoding": draw(st.sampled_from([encoding, encoding, "utf-8"]))}
        somewhere()[0] = draw(st.sampled_from(TOKENS))
    elif kind == "splits":
        fitting = checkpoints.FITTING
        key = draw(st.sampled_from(SPLIT_SETTINGS))
        settings = {key: draw(st.sampled_from([*fitting.get(key, []), None, 5, "x", "first", "last"]))}
    if kind == "ends":
        newline = draw(st.sampled_from(["\r\n", "\r", "\n\n", "\n\r\n", "\n\r", "\v", "\u2028", " \n", "\t\n", "\n"]))
    lines = [separator.join(header), *(separator.join(row) for row in rows)]
    text = newline.join(lines)
    if kind != "ends" or draw(st.booleans()):
        text += newline
    try:
        codecs.lookup(encoding or "")
        data = text.encode(encoding or "utf-8", "surrogatepass" if (encoding or "").startswith("utf") else "replace")
    except (LookupError, UnicodeError):
        data = text.encode("utf-8", "surrogatepass")
    if kind == "ends":
        start = draw(
            st.sampled_from([b"", codecs.BOM_UTF8, 2 * codecs.BOM_UTF8, codecs.BOM_UTF16_LE, b"\n", b" ", b"\r\n"])
        )
        data = (
            start + data + draw(st.sampled_from([b"", b"\n", b"\n\n\n", b"\x1a", b"\x00", b" ", b"\t", b"\xff", b"\r"]))
        )
        if draw(st.booleans()):
            place = draw(st.integers(0, len(data)))
            data = (
                data[:place]
                + draw(st.sampled_from([b"\x00", b"\xff", b"\xe9", b"\r", b'"', b"\xc3", b"\xef\xbb\xbf"]))
                + data[place:]
            )
    if kind == "bytes":
        data = draw(damaged(data))
    return Case(kind, data, model, settings, then)


def rows_of(data: bytes, encoding: str, separator: str) -> list[dict[str, str]] | None:
    """The rows of a file, counted by what stands in it alone; None where it cannot be said to have any."""
    try:
        text = data.decode(encoding)
    except (UnicodeError, LookupError):
        return None
    lines = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
    names = [cell.partition(":")[0] for cell in lines[0].split(separator)]
    cells = [line.split(separator) for line in lines[1:] if line]
    if any(len(row) != len(names) for row in cells):
        return None
    return [dict(zip(names, row, strict=True)) for row in cells]


def check(case: Case, bases: Bases) -> Outcome:
    """Load a file, count its rows, and go on with what it is for."""
    for folder in ("dataset/odd", "odd-data"):
        shutil.rmtree(folder, ignore_errors=True)
    path = Path("dataset", NAME, f"{NAME}.inter")
    path.parent.mkdir(parents=True)
    path.write_bytes(case.data)

    def load() -> tuple:
        config = Config(case.model, NAME, config_dict={**QUIET, **MODELS[case.model], **case.settings})
        dataset = create_dataset(config)
        read = _read(dataset)
        return config, dataset, read, data_preparation(config, dataset)

    outcome = attempt(load, level="INFO")
    if outcome.word != "equal":
        return outcome
    wrong = _miscounted(case, *outcome.result, outcome.told)
    outcome.result = None
    if wrong:
        return Outcome("rows", wrong)
    if case.then != "load":
        more = attempt(lambda: _go_on(case, bases, path))
        more.result = None
        return more
    return outcome


def _read(dataset: Any) -> list[tuple[str, str]]:
    """Names of user and item of each row."""
    columns = [
        np.asarray(dataset.field2id_token[name])[np.asarray(dataset.inter_feat[name])]
        for name in (dataset.uid_field, dataset.iid_field)
    ]
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _miscounted(case: Case, config: Any, dataset: Any, read: list, loaders: tuple, told: list[str]) -> str:
    """What is not as the file says; empty where all is."""
    separator = str(config["field_separator"]).replace("\\t", "\t")
    rows = rows_of(case.data, config["encoding"] or "utf-8", separator)
    if rows is None:
        return f"a file that has no such rows was read as {len(read)}"
    left_out = sum(int(match[1]) for line in told if (match := LEFT_OUT.search(line)))
    if len(read) + left_out != len(rows):
        return f"{len(rows)} rows in the file, {len(read)} read, {left_out} told of: {told}"
    there = Counter((row[dataset.uid_field], row[dataset.iid_field]) for row in rows)
    if surplus := Counter(read) - there:
        return f"pairs that are not in the file: {list(surplus)[:3]}"
    if config["train_mode"] != "sequence" or not isinstance(dataset, SequenceDataset):
        return ""
    users = Counter(user for user, _ in read)
    singles = sum(count == 1 for count in users.values())
    told_singles = sum(int(match[1]) for line in told if (match := SINGLE.search(line)))
    targets = sum(len(loader._dataset) for loader in loaders)
    if singles != told_singles or targets + len(users) != len(read):
        return f"{len(read)} rows of {len(users)} users, {singles} of one row ({told_singles} told), {targets} targets"
    return "" if left_out else _misordered(rows, dataset, loaders[0]._dataset)


def _misordered(rows: list[dict[str, str]], dataset: Any, built: Any) -> str:
    """Which user's items are not in the order of time, ties in that of the file."""
    times = [row[dataset.time_field] for row in rows]
    number = int if all(re.fullmatch(r"-?\d{1,18}", time) for time in times) else float
    histories: dict[str, list[tuple[Any, str]]] = {}
    for row, time in zip(rows, times, strict=True):
        histories.setdefault(row[dataset.uid_field], []).append((number(time), row[dataset.iid_field]))
    wanted = [item for user in dataset.field2id_token[dataset.uid_field][1:] if user in histories
              for _, item in sorted(histories[user], key=lambda pair: pair[0])]  # fmt: skip
    found = dataset.field2id_token[dataset.iid_field][built.sorted_items.numpy()].tolist()
    return "" if found == wanted else "items are not in the order of time"


def _go_on(case: Case, bases: Bases, path: Path) -> Any:
    if case.then == "train":
        run = train_and_test(Config(case.model, NAME, config_dict={**QUIET, **MODELS[case.model], **case.settings}))
        assert run.checkpoint is not None
        evaluate(run.checkpoint)
        return train_and_test(config_of(run.checkpoint, {"epochs": 2}), resume_file=run.checkpoint).result
    folder = Path("odd-data/tiny")
    folder.mkdir(parents=True)
    shutil.copy(path, folder / "tiny.inter")
    file = "base.pth"
    Path(file).write_bytes(bases.data[case.model])
    settings = {"data_path": "odd-data", **{key: value for key, value in case.settings.items() if key != "eval_args"}}
    if case.then == "evaluate":
        return evaluate(file, settings).result
    return train_and_test(config_of(file, {**settings, "epochs": 2}), resume_file=file).result
