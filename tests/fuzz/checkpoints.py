"""Checkpoints as a disk or a stranger may change them."""

import copy
import io
import random
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from recbole_ssm import Config
from recbole_ssm.checkpoint import _COMMENT, _COMMENT_LENGTH, _COMMENT_SIZE, FIRST_FORMAT, FORMAT, digest
from recbole_ssm.quick_start import config_of, evaluate, train_and_test
from recbole_ssm.registry import list_models
from tests.conftest import Trap, random_rows, write_dataset

from .watch import BAD, TRAP, Outcome, attempt

QUIET = {"state": "ERROR", "show_progress": False, "data_path": "dataset", "epochs": 1}
MODELS: dict[str, dict[str, Any]] = {
    "Mamba4Rec": {"hidden_size": 8, "d_state": 2, "ssm_backend": "reference"},
    "SASRec": {"hidden_size": 8, "inner_size": 8, "n_layers": 1, "n_heads": 2, "train_neg_sample_args": None},
    "BPR": {"embedding_size": 8},
    "ItemKNN": {"k": 3},  # which keeps matrices
}

CODE = [
    f"__import__('pathlib').Path('{TRAP}').touch()",
    f"!!python/object/apply:os.mkdir [{TRAP}]",
    f"eval(\"open('{TRAP}', 'w')\")",
    f"{{}}.__class__.__base__.__subclasses__() and open('{TRAP}', 'w')",
    f"$(touch {TRAP})",
    f"; touch {TRAP}",
    f"CrossNet if open('{TRAP}', 'w') else CIN",
    f'f\'{{open("{TRAP}", "w")}}\'',
]
WORDS = [
    "", "~", "None", "nan", "inf", "[", "[0,", "[5,20]", "(inf,0]", "../..", "/", "elsewhere/x.pth", "a/b", "\x00",
    "\n", "INFO forged\nline", "\x1b[2J", "cpu", "cuda", "meta", "full", "uni100", "pop5", "LS", "RS", "adam",
    "[PAD]", "1e400", "user_id", "item_id", "timestamp", "u1\nu1", "\ud800", "{'x': 1}", "[1, 2", "utf-16", "rot13",
    "hex",
]  # fmt: skip
ABSURD = [10**9, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400]

# Settings of RecBole that a checkpoint need not have, but may.
MORE_SETTINGS = [
    "teacher", "warm_up", "pre_model_path", "dataset_save_path", "dataloaders_save_path", "save_dataset",
    "log_wandb", "benchmark_filename", "alias_of_item_id", "preload_weight", "additional_feat_suffix", "load_col",
    "unload_col", "normalize_field", "normalize_all", "discretization", "threshold", "transform", "val_interval",
    "rm_dup_inter", "numerical_features", "train_neg_sample_args", "eval_args", "metrics", "topk", "valid_metric",
    "encoding", "user_inter_num_interval", "item_inter_num_interval", "filter_inter_by_user_or_item", "device",
    "gpu_id", "use_gpu", "local_rank", "nproc", "world_size", "ip", "port", "MODEL_TYPE", "MODEL_INPUT_TYPE",
    "eval_type", "eval_neg_sample_args", "single_spec", "train_batch_size", "eval_batch_size", "learner",
    "clip_grad_norm", "weight_decay", "seed", "shuffle", "enable_amp", "enable_scaler", "tuned", "identity",
    "final_config_dict", "config_file", "field_separator", "train_mode", "seq_separator", "time_order",
    "use_time_gaps", "LIST_SUFFIX", "ITEM_LIST_LENGTH_FIELD", "NEG_PREFIX", "loss_type", "USER_ID_FIELD",
    "ITEM_ID_FIELD", "TIME_FIELD", "LABEL_FIELD", "RATING_FIELD", "POSITION_FIELD", "seq_len", "worker",
]  # fmt: skip

FITTING: dict[str, list[Any]] = {
    "model": [*list_models(), "", "os", "Mamba4rec", None, ["Mamba4Rec"]],
    "dataset": ["", "..", "a/b", "nowhere", None, ["tiny"], "tiny\n"],
    "eval_args": [
        {"split": {"RS": [8, 1, 1]}, "order": "RO", "mode": "full", "group_by": "user"},
        {"split": {"LS": "test_only"}, "order": "TO", "mode": {"valid": "uni5", "test": "pop5"}},
        {"split": {"LS": 3}, "mode": "uni1000000"}, {"split": {"RS": [0, 0, 0]}}, {"split": None}, {"mode": "labeled"},
        {}, {"group_by": None}, {"order": "XX"},
    ],
    "train_neg_sample_args": [
        {"distribution": "uniform", "sample_num": 1}, {"distribution": "popularity", "sample_num": 3, "alpha": 0.5},
        {"distribution": "uniform", "sample_num": -1}, {"distribution": "x", "sample_num": 1, "dynamic": True}, {},
    ],
    "user_inter_num_interval": ["[5,inf)", "5", "[5,", "[3,1]", "(,)", "[5,inf);(1,2)", 5, "[x,y]", "[7,inf)"],
    "item_inter_num_interval": ["[5,inf)", "5", "[5,", "[3,1]", "[3,inf)", 5],
    "val_interval": [
        {"timestamp": "[0,1000000300]"}, {"timestamp": "(5"}, {"user_id": "['u1']"}, {"x": "[0,1]"}, "[0,1]",
    ],
    "load_col": [
        {"inter": ["user_id"]}, {"inter": "*"}, {}, None, {"inter": None}, {"item": ["item_id"]}, ["inter"], "inter",
    ],
    "metrics": [
        ["NDCG", "ItemCoverage"], ["AUC"], ["GAUC", "LogLoss"], [], "NDCG", ["x"], ["GiniIndex", "ShannonEntropy"],
    ],
    "topk": [[1, 1000], [0], [-1], [], "10", [2.5], [10, 5]],
    "valid_metric": ["MRR@10", "ndcg@1", "NDCG", "@", "NDCG@x", 3],
    "loss_type": ["CE", "BPR", "gBCE", "SampledSoftmax", "x"],
    "learner": ["adam", "adamw", "sgd", "adagrad", "rmsprop", "sparse_adam", "lbfgs"],
    "teacher": CODE, "warm_up": ["elsewhere/x.pth"], "pre_model_path": ["elsewhere/x.pth"],
    "dataset_save_path": ["elsewhere/x.pth"], "dataloaders_save_path": ["elsewhere/x.pth"],
    "transform": ["mask_itemseq", "crop_itemseq", "x"], "train_mode": ["sequence", "prefix"],
    "benchmark_filename": [["train", "valid", "test"], ["a/../..", "b", "c"], [], "train"],
    "preload_weight": [{"item_id": "timestamp"}, {"x": "y"}], "additional_feat_suffix": [["x"], "x", [None]],
    "normalize_field": [["timestamp"], ["x"]], "normalize_all": [True], "alias_of_item_id": [["x"], "x"],
    "numerical_features": [["timestamp"], ["x"]],
    "discretization": [{"timestamp": {"method": "ED", "bucket": 3}}, {"x": 1}],
    "threshold": [{"timestamp": 3}, {"x": 1}, {}], "clip_grad_norm": [{"max_norm": 5}, {"x": 1}, 5],
    "save_dataset": [True], "log_wandb": [True], "hidden_size": [8, 0, -1, 7, 8.5], "train_batch_size": [1, 0, -1, 3.5],
    "eval_batch_size": [1, 0, -1], "MAX_ITEM_LIST_LENGTH": [1, 0, -1, 3], "exclude_history": [True],
    "field_separator": [",", "", "ab", "[", "\\t"], "encoding": ["latin-1", "utf-16", "hex", "x", 3],
}  # fmt: skip


@dataclass
class Case:
    """A checkpoint.

    Attributes:
        kind: how it was changed.
        model: the model that the file was of.
        data: its bytes.
        then: ``evaluate``, ``resume`` or ``both``.
    """

    kind: str
    model: str
    data: bytes
    then: str = "both"

    def __repr__(self):
        return f"{self.kind} of {self.model}, {len(self.data)} bytes"


class Bases:
    """Checkpoints of tiny models, made once in the working directory, and what they evaluate to."""

    def __init__(self) -> None:
        write_dataset("tiny", random_rows(users=8, items=12, longest=8))
        Path("elsewhere").mkdir(exist_ok=True)
        Path("elsewhere/x.pth").write_bytes(_pickled(Trap()))
        self.data: dict[str, bytes] = {}
        self.states: dict[str, dict] = {}
        self.results: dict[str, Any] = {}
        for model, settings in MODELS.items():
            run = train_and_test(Config(model, "tiny", config_dict={**QUIET, **settings}))
            assert run.checkpoint is not None
            self.data[model] = Path(run.checkpoint).read_bytes()
            self.states[model] = torch.load(run.checkpoint, weights_only=True)
            self.results[model] = evaluate(run.checkpoint).result["test_result"]


def _pickled(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def seal(archive: bytes) -> bytes:
    """A zip archive with the digest that save_checkpoint would have written."""
    body = archive[: -_COMMENT_LENGTH.size] + _COMMENT_LENGTH.pack(_COMMENT_SIZE)
    return body + _COMMENT + digest(io.BytesIO(body)).encode()


def unseal(data: bytes) -> bytes:
    return data[: -_COMMENT_SIZE - _COMMENT_LENGTH.size] + _COMMENT_LENGTH.pack(0)


# --- bytes ---


@st.composite
def damaged(draw: Any, data: bytes) -> bytes:
    """Bytes as a disk, a transfer or an editor damages them."""
    place = partial(draw, st.integers(0, max(0, len(data) - 1)))
    way = draw(
        st.sampled_from(["flip", "flip", "flips", "cut", "head", "lose", "twice", "zero", "noise", "more", "lines"])
    )
    changed = bytearray(data)
    if not data:
        return b"x"
    if way in ("flip", "flips"):
        for _ in range(1 if way == "flip" else draw(st.integers(2, 40))):
            changed[place()] ^= 1 << draw(st.integers(0, 7))
    elif way == "cut":
        del changed[place() :]
    elif way == "head":
        del changed[: place()]
    elif way == "more":
        changed += draw(st.binary(min_size=1, max_size=200))
    elif way == "lines":
        changed = bytearray(data.replace(b"\n", b"\r\n"))
    else:
        start, size = place(), draw(st.integers(1, 4096))
        part = bytes(changed[start : start + size])
        noise = random.Random(draw(st.integers(0, 1 << 30))).randbytes(len(part))
        changed[start : start + size] = {"lose": b"", "twice": 2 * part, "zero": bytes(len(part)), "noise": noise}[way]
    return bytes(changed)


@st.composite
def rearchived(draw: Any, archive: bytes, mutate: str) -> bytes:
    """A zip archive whose entries were changed, as whoever knows the format can."""
    with zipfile.ZipFile(io.BytesIO(archive)) as source:
        entries = [[entry.filename, source.read(entry)] for entry in source.infolist()]
    pickle_at = next(i for i, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
    at = pickle_at if mutate == "pickle" else draw(st.integers(0, len(entries) - 1))
    compression = zipfile.ZIP_STORED
    if mutate in ("pickle", "content"):
        entries[at][1] = draw(damaged(entries[at][1]))
    else:
        way = draw(st.sampled_from(["drop", "rename", "twice", "swap", "compress", "empty", "grow", "more"]))
        other = draw(st.integers(0, len(entries) - 1))
        if way == "drop":
            del entries[at]
        elif way == "rename":
            names = [
                "x",
                "../../x",
                "/etc/x",
                "archive/data/999",
                "",
                "data.pkl",
                "archive/constants.pkl",
                "archive/code/x.py",
            ]
            entries[at][0] = draw(st.sampled_from(names))
        elif way == "twice":
            entries.append(list(entries[at]))
        elif way == "swap":
            entries[at][1], entries[other][1] = entries[other][1], entries[at][1]
        elif way == "compress":
            compression = zipfile.ZIP_DEFLATED
        elif way == "empty":
            entries[at][1] = b""
        elif way == "grow":
            entries[at][1] += bytes(draw(st.integers(1, 100_000)))
        else:
            entries.append(
                [draw(st.sampled_from(["archive/x", "archive/.data/serialization_id", "archive/version"])), b"9999\n"]
            )
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", compression) as target:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in entries:
            target.writestr(name or "archive/", content)
    return file.getvalue()


# --- contents ---


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def scalars(absurd: bool) -> st.SearchStrategy:
    strategies = [
        st.none(), st.booleans(), st.integers(-3, 70), st.floats(), TEXT, st.sampled_from(WORDS + CODE),
        st.complex_numbers(), st.binary(max_size=4),
    ]  # fmt: skip
    # Few, for each of them may take all the time and memory that a case is given.
    rare = st.integers(0, 40).flatmap(lambda n: st.sampled_from(ABSURD) if n == 0 and absurd else st.integers(-2, 9))
    return st.one_of(*strategies, rare)


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool,
          torch.complex64, torch.float8_e5m2]  # fmt: skip


BENDS = [
    "dtype", "shape", "cut", "more", "nan", "inf", "huge", "noise", "sparse", "csr", "stride", "view", "parameter",
    "meta", "quantized", "transposed", "expanded", "scalar", "list", "numpy", "conj", "neg", "same",
]  # fmt: skip


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    """Tensors of odd shapes, types, layouts and numbers."""
    shape = draw(st.lists(st.integers(0, 9), max_size=4))
    tensor = torch.zeros(shape, dtype=draw(st.sampled_from(DTYPES)))
    return draw(bent(tensor))


@st.composite
def bent(draw: Any, tensor: torch.Tensor) -> Any:
    """A tensor changed in one respect."""
    way = draw(st.sampled_from(BENDS))
    try:
        flat = tensor.detach().clone().contiguous().flatten()
        spare = torch.zeros(2 * flat.numel() + 64, dtype=flat.dtype)
        changes: dict[str, Any] = {
            "dtype": lambda: tensor.to(draw(st.sampled_from(DTYPES))),
            "shape": lambda: flat.reshape(draw(st.sampled_from([[-1], [1, -1], [-1, 1], [1, *tensor.shape]]))),
            "cut": lambda: flat[: draw(st.integers(0, 3))],
            "more": lambda: torch.cat([tensor, tensor]),
            "nan": lambda: flat.index_fill(0, torch.tensor([0]), torch.nan).reshape(tensor.shape),
            "inf": lambda: torch.full_like(tensor, -torch.inf),
            "huge": lambda: torch.full_like(tensor, 3e38),
            "noise": lambda: torch.randn(
                tensor.shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))
            ),
            "sparse": tensor.to_sparse,
            "csr": tensor.to_sparse_csr,
            # Within a storage that is large enough, but not where the shape says.
            "stride": lambda: spare.as_strided(tensor.shape, [0] * tensor.dim(), spare.numel() - 1),
            "view": lambda: spare[1 : 1 + flat.numel()].reshape(tensor.shape),
            "parameter": lambda: torch.nn.Parameter(tensor),
            "meta": lambda: tensor.to("meta"),
            "quantized": lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
            "transposed": lambda: tensor.mT.contiguous().mT,
            "expanded": lambda: flat[:1].expand(1 << draw(st.integers(0, 40))),
            "scalar": lambda: flat[0].item(),
            "list": tensor.tolist,
            "numpy": lambda: {"__numpy__": tensor},
            "conj": lambda: torch.zeros(tensor.shape, dtype=torch.complex64).conj(),
            "neg": lambda: torch.zeros(tensor.shape, dtype=torch.complex64).conj().imag,
            "same": lambda: tensor,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that quantized tensors are deprecated
            return changes[way]()
    except (RuntimeError, IndexError, TypeError, NotImplementedError):  # what no such tensor can be made to
        return None


@lru_cache(maxsize=None)
def junk(absurd: bool) -> st.SearchStrategy:
    def containers(inner: st.SearchStrategy) -> st.SearchStrategy:
        keys = st.one_of(st.sampled_from(["__numpy__", "__sparse__", "x", "user_id"]), st.integers(0, 3), st.none())
        return st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(keys, inner, max_size=3),
            st.lists(inner, max_size=2).map(tuple),
        )

    deep = st.integers(10, 400).map(lambda depth: _nested(depth))
    return st.one_of(st.recursive(scalars(absurd) | tensors(), containers, max_leaves=5), st.integers(0, 19).flatmap(
        lambda n: deep if n == 0 else scalars(absurd)))  # fmt: skip


def _nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"x": value}
    return value


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside a nest of dicts and lists."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


@st.composite
def rewritten(draw: Any, state: Any, absurd: bool) -> None:
    """Change what stands at one place of a nest."""
    found = list(places(state))
    if not found:
        return
    container, key = found[draw(st.integers(0, len(found) - 1))]
    way = draw(st.sampled_from(["junk", "junk", "bend", "drop", "rename", "copy", "wrap"]))
    value = container[key]
    if way == "bend" and isinstance(value, torch.Tensor):
        container[key] = draw(bent(value))
    elif way == "drop":
        del container[key]
    elif way == "rename" and isinstance(container, dict):
        container[draw(st.sampled_from([str(key) + "x", str(key).upper(), 7, None, (1, 2), b"x"]))] = container.pop(key)
    elif way == "copy":
        source, name = found[draw(st.integers(0, len(found) - 1))]
        container[key] = copy.deepcopy(source[name])
    elif way == "wrap":
        container[key] = draw(st.sampled_from([[value], {"x": value}, (value,), str(type(value))]))
    else:
        container[key] = draw(junk(absurd))


@st.composite
def remade(draw: Any, state: Any) -> None:
    """Change a tensor of weights, of an optimizer or of a random generator."""
    found = [(container, key) for container, key in places(state) if isinstance(container[key], torch.Tensor)]
    container, key = found[draw(st.integers(0, len(found) - 1))]
    container[key] = draw(bent(container[key]))


@st.composite
def resettled(draw: Any, config: dict[str, Any], absurd: bool) -> None:
    """Change settings: to what fits their names, or to junk."""
    for _ in range(draw(st.integers(1, 3))):
        key = draw(
            st.one_of(st.sampled_from(sorted(FITTING)), st.sampled_from(sorted(map(str, config)) + MORE_SETTINGS))
        )
        way = draw(st.sampled_from(["fit", "fit", "junk", "drop", "word"]))
        if way == "fit" and key in FITTING:
            config[key] = copy.deepcopy(draw(st.sampled_from(FITTING[key])))
            if key == "model":  # one of RecBole's evaluates it
                config["teacher"] = draw(st.sampled_from(CODE))
        elif way == "drop":
            config.pop(key, None)
        elif way == "word":
            config[key] = draw(st.sampled_from(WORDS + CODE))
        else:
            config[key] = draw(junk(absurd))


@st.composite
def renumbered(draw: Any, state: dict[str, Any], absurd: bool) -> None:
    """Change what a checkpoint says of its ids and its data."""
    vocabulary = state["vocabulary"]
    field = draw(st.sampled_from(sorted(vocabulary)))
    tokens = vocabulary[field].split("\n")
    way = draw(
        st.sampled_from(["shuffle", "twice", "drop", "more", "junk", "empty", "gone", "field", "list", "data", "pad"])
    )
    if way == "shuffle":
        tokens = draw(st.permutations(tokens))
    elif way == "twice":
        tokens += tokens[:2]
    elif way == "drop":
        del tokens[draw(st.integers(0, len(tokens) - 1))]
    elif way == "more":
        tokens.insert(draw(st.integers(0, len(tokens))), draw(TEXT))
    elif way == "pad":
        tokens[0] = draw(st.sampled_from(["[PAD]", "", "nan", "\x00"]))
    vocabulary[field] = "\n".join(tokens)
    if way == "junk":
        vocabulary[field] = draw(junk(absurd))
    elif way == "empty":
        vocabulary[field] = ""
    elif way == "gone":
        del vocabulary[field]
    elif way == "field":
        vocabulary[draw(st.sampled_from(["timestamp", "x", "", "item_id_list"]))] = vocabulary[field]
    elif way == "list":
        vocabulary[field] = tokens
    elif way == "data":
        state["data"] = draw(junk(absurd))


class _Apply:
    def __init__(self, function: Any, *args: Any):
        self.made = function, args

    def __reduce__(self):
        return self.made


OBJECTS = {
    "a trap": Trap,
    "evaluated text": lambda: _Apply(eval, CODE[0]),
    "a module": lambda: torch.nn.Linear(2, 2),
    "an array": lambda: np.arange(3.0),
    "an array of objects": lambda: np.array([Trap()], dtype=object),
    "a path": lambda: Path("x"),
    "a partial": lambda: partial(print, "x"),
    "a set": lambda: {1, 2},
    "a class": lambda: torch.nn.Linear,
    "a storage": lambda: torch.zeros(3).untyped_storage(),
    "a size": lambda: torch.Size([1, 2]),
    "a device": lambda: torch.device("cuda:7"),
    "bytes": lambda: bytearray(b"x"),
    "many zeros": lambda: _Apply(bytearray, 1 << 40),
    "a generator": lambda: _Apply(torch.Generator),
}  # fmt: skip


@st.composite
def with_objects(draw: Any, state: dict[str, Any]) -> None:
    found = list(places(state))
    container, key = found[draw(st.integers(0, len(found) - 1))]
    container[key] = OBJECTS[draw(st.sampled_from(sorted(OBJECTS)))]()


KINDS = [
    "bytes", "archive", "pickle", "content", "raw", "state", "state", "resume", "tensor", "tensor", "config",
    "config", "vocabulary", "object", "first format",
]  # fmt: skip


@st.composite
def cases(draw: Any, bases: Bases, absurd: bool = False) -> Case:
    """Changed checkpoints of all kinds.

    Args:
        draw: hypothesis's.
        bases: what is changed.
        absurd: whether numbers may be so large that a case needs all the time and memory it is given.
    """
    return replace(draw(_changed(bases, absurd)), then=draw(st.sampled_from(["evaluate", "resume", "both"])))


@st.composite
def _changed(draw: Any, bases: Bases, absurd: bool) -> Case:
    model = draw(st.sampled_from(["Mamba4Rec", *MODELS]))
    kind = draw(st.sampled_from(KINDS))
    data = bases.data[model]
    if kind == "bytes":
        return Case(kind, model, draw(damaged(data)))
    if kind == "raw":  # the archive's own records too, and the digest after it
        archive = draw(damaged(unseal(data)))
        return Case(kind, model, seal(archive))
    if kind in ("archive", "pickle", "content"):
        return Case(kind, model, seal(draw(rearchived(unseal(data), kind))))
    state = copy.deepcopy(bases.states[model])
    if kind == "config":
        draw(resettled(state["config"], absurd))
    elif kind == "vocabulary":
        draw(renumbered(state, absurd))
    elif kind == "tensor":
        draw(remade(state))
    elif kind == "object":
        draw(with_objects(state))
    else:
        part = state["resume"] if kind == "resume" else state
        for _ in range(draw(st.integers(1, 2))):
            draw(rewritten(part, absurd))
    if kind == "first format" and isinstance(state, dict):
        state["format"] = FIRST_FORMAT
        return Case(kind, model, _pickled(state))
    if isinstance(state, dict) and draw(st.integers(0, 30)):
        state.setdefault("format", FORMAT)
    return Case(kind, model, seal(_pickled(state)))


def check(case: Case, bases: Bases) -> Outcome:
    """Evaluate a changed checkpoint, resume it, or both."""
    file = Path("case.pth")
    outcomes = []
    if case.then != "resume":
        file.write_bytes(case.data)
        outcomes.append(attempt(lambda: evaluate(str(file)).result["test_result"]))
        if outcomes[0].word == "equal" and outcomes[0].result != bases.results[case.model]:
            outcomes[0].word = "different"
    if case.then != "evaluate":
        file.write_bytes(case.data)
        settings = {"epochs": 2}
        outcomes.append(
            attempt(lambda: train_and_test(config_of(str(file), settings), resume_file=str(file)).result["test_result"])
        )
    damaged_by_chance = case.kind == "bytes" and case.data != bases.data[case.model]
    for outcome in outcomes:
        if outcome.word in BAD:
            return outcome
        if damaged_by_chance and outcome.word != "refused":
            return Outcome("damage", "a damaged file was loaded")
        for name, value in (outcome.result or {}).items():
            if not np.isfinite(value):
                return Outcome("damage", f"{name} is {value}")
    # What is refused in one of the ways is told as that.
    return next((outcome for outcome in outcomes if outcome.word == "refused"), outcomes[0])
