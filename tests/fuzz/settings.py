"""Settings as people mistake them: one to three of a model's at a time, through ``Config``, training and evaluation.

How it knows, without a look at the schema:

* A value outside of what :mod:`tests.fuzz.values` says by hand must be refused, and so must settings that contradict
  each other (:func:`contradiction`, by hand too).
* A refusal is one sentence that names a setting which was given.
* What is accepted arrives in the configuration as it was given, and somebody reads it (reading is recorded), or a
  warning names it; :data:`UNREAD` has the few that nobody needs to read on one CPU.
* Two epochs of a small model on random histories must have finite losses, change the weights, and give measures in
  their ranges. A future that is random cannot be foretold, so no ranking of it may be near perfect.

What is well meant but too large for that (:func:`too_large`) stops behind ``Config`` and counts as ``large``.
"""

import ast
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import yaml
from hypothesis import strategies as st

from recbole_ssm import Config
from recbole_ssm.data import create_dataset
from recbole_ssm.quick_start import fit, prepare
from tests.conftest import random_rows, write_dataset

from .values import EVAL_ARGS, ITEMS, METRICS, NEGATIVES, ODD, SETTINGS
from .watch import Outcome, attempt

NAME = "given"
QUIET = {"state": "ERROR", "show_progress": False, "data_path": "dataset", "epochs": 2}
TINY = {"hidden_size": 8, "dropout_prob": 0.1, "ssm_backend": "reference", "num_layers": 1}
MODELS: dict[str, dict[str, Any]] = {
    "STARRec": {**TINY, "d_state": 4, "n_heads": 2, "n_experts": 3, "headdim": 8},
    "Mamba4Rec": {**TINY, "d_state": 4, "headdim": 8},
    "SSD4Rec": {**TINY, "d_state": 2, "headdim": 8},
    "RecBLR": TINY,
    "TiM4Rec": {**TINY, "d_state": 2, "headdim": 8},
    "SS4Rec": {**TINY, "d_state": 2, "d_time_state": 2},
    "BSARec": {**TINY, "n_heads": 2},
    "eSASRec": {**TINY, "n_heads": 2, "inner_size": 8},
    "SASRec": {"hidden_size": 8, "inner_size": 8, "n_layers": 1, "n_heads": 2},
    "GRU4Rec": {"hidden_size": 8, "embedding_size": 8},
    "NARM": {"hidden_size": 8, "embedding_size": 8},
    "BPR": {"embedding_size": 8},
}
SHARED = ["lr_scheduler_type", "warmup_ratio", "lr_restarts", "ema_decay", "train_mode", "time_order",
          "cuda_graphs", "exclude_history", "temperature", "label_smoothing", "allow_repeats", "gbce_t",
          "use_time_gaps", "use_clock", "request_time", "ssm_backend", "loss_type"]  # fmt: skip
_TRANSFORMER = ["n_layers", "n_heads", "inner_size", "hidden_dropout_prob", "attn_dropout_prob", "hidden_act",
                "layer_norm_eps", "initializer_range", "hidden_size"]  # fmt: skip
_MAMBA = ["hidden_size", "num_layers", "dropout_prob", "d_state", "d_conv", "expand"]
_BLOCKS = [*_MAMBA, "ssm_block", "headdim", "filter_share"]
OWN: dict[str, list[str]] = {
    "STARRec": [
        *_BLOCKS, "feed_forward", "use_position_embedding", "use_ssm", "use_pma", "n_heads", "use_similarity",
        "similarity_threshold", "pma_residual", "attention_window", "input_dependent_fusion", "use_moe", "moe_level",
        "n_experts", "experts_per_token", "diversity_weight", "balance_weight",
    ],
    "Mamba4Rec": _BLOCKS,
    "RecBLR": ["hidden_size", "num_layers", "dropout_prob", "d_conv", "expand"],
    "BSARec": ["hidden_size", "num_layers", "n_heads", "alpha", "c", "dropout_prob", "attn_dropout_prob"],
    "eSASRec": ["hidden_size", "num_layers", "n_heads", "inner_size", "dropout_prob", "sampling_correction"],
    "SSD4Rec": [*_MAMBA, "norm_embedding", "var_len", "mask_ratio", "headdim", "bidirectional", "beta",
                "backward_stream"],
    "TiM4Rec": [*_MAMBA, "headdim", "time_aware", "time_dropout_prob"],
    "SS4Rec": [*_MAMBA, "time_aware", "d_time_state", "time_unit"],
    "SASRec": _TRANSFORMER,
    "GRU4Rec": ["embedding_size", "hidden_size", "num_layers", "dropout_prob"],
    "NARM": ["embedding_size", "hidden_size"],
    "BPR": ["embedding_size"],
}  # fmt: skip
COMMON = [key for key in SETTINGS if key not in {*SHARED, *(key for keys in OWN.values() for key in keys)}]

# Accepted without being read in a run of one process on a CPU, and why.
UNREAD = {
    "use_gpu": "decides the device, while the configuration is made", "gpu_id": "as use_gpu",
    "tuned": "decides which files are read, while the configuration is made",
    "repeatable": "sequential models have no other way", "dataset_save_path": "empty", "wandb_project": "of log_wandb",
    "save_dataloaders": "can be False alone", "dataloaders_save_path": "can be empty alone",
    "valid_metric_bigger": "must be what the metric says",
    "cuda_graphs": "of GPUs", "enable_scaler": "of GPUs",
    "seq_separator": "of columns of lists, which these data have not", "seq_len": "as seq_separator",
    "RATING_FIELD": "of ratings, which these data have not",
}  # fmt: skip

# Names of columns and files that other data may have, as a file of settings for several sets names them: those that
# these data have not may be told of instead of refused.
DATA = ("load_col", "unload_col", "unused_col", "seq_len", "alias_of_entity_id", "alias_of_relation_id")


@dataclass
class Case:
    """Settings of a run.

    Attributes:
        kind: how they are given: ``dict``, ``file`` or ``command line``.
        model: the model.
        settings: what is given, but for what makes the model small.
        data: the same for people to read.
    """

    kind: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> bytes:
        return repr((self.kind, self.model, self.settings)).encode(errors="backslashreplace")


class Bases:
    """Random histories, in the working directory."""

    def __init__(self) -> None:
        write_dataset(NAME, random_rows(users=12, items=ITEMS, longest=8))


@st.composite
def cases(draw: Any, bases: Bases, absurd: bool = False) -> Case:
    """One to three settings of a model, some of them misspelt."""
    # A generator of its own: hypothesis would try most cases again with a part of them changed.
    random = Random(draw(st.binary(min_size=16, max_size=16)))
    model = random.choice(list(MODELS))
    settings = {}
    for _ in range(random.choice([1, 1, 2, 2, 3])):
        # Another model's settings are drawn as well, more seldom.
        pools = [OWN[model] or COMMON, SHARED, COMMON, COMMON, ["eval_args", "train_neg_sample_args"], list(SETTINGS)]
        key = random.choice(random.choice(pools))
        value = _value(random, key)
        settings[_misspelt(random, key) if random.random() < 0.08 else key] = value
    return Case(random.choice(["dict", "command line", "file"]), model, settings)


def _value(random: Random, key: str) -> Any:
    if random.random() < 0.25:
        return random.choice(ODD)
    nested = {"eval_args": EVAL_ARGS, "train_neg_sample_args": NEGATIVES}.get(key)
    if nested is None or random.random() < 0.1:
        return random.choice(SETTINGS[key][1])
    value = {}
    for part in random.sample(list(nested), random.choice([1, 1, 2, 3])):
        found = random.choice(nested[part] if random.random() < 0.9 else ODD)
        value[_misspelt(random, part) if random.random() < 0.06 else part] = found
    return value


def _misspelt(random: Random, key: str) -> str:
    place = random.randrange(len(key))
    changes = [key[:place] + key[place + 1 :], key + "s", key.swapcase(), key.replace("_", "-"), key + " ", key[::-1]]
    return random.choice([word for word in changes if word not in SETTINGS])


def meant(value: Any) -> Any:
    """What a value stands for: words that are written as Python's values are those (docs/configuration.md)."""
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return None if value == "~" else ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def written(value: Any) -> Any:
    """What a value stands for in a YAML file: words are words, but for numbers that RecBole reads as those."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value) else value


def given(case: Case) -> tuple[dict[str, Any], list[str], list[str]]:
    """A case's settings as a dict, words of a command line, and names of files; the first is what they stand for."""
    settings = {key: value.item() if isinstance(value, np.generic) else value for key, value in case.settings.items()}
    if case.kind == "dict":
        return case.settings, [], []
    if case.kind == "command line":
        return settings, [f"--{key}={value}" for key, value in settings.items()], []
    lines = yaml.dump(settings, allow_unicode=True)  # also of what a safe loader refuses
    Path("odd.yaml").write_text(lines, encoding="utf-8", errors="replace")
    return settings, [], ["odd.yaml"]


def check(case: Case, bases: Bases) -> Outcome:
    """Make a configuration of a case's settings, and train and evaluate by it."""
    settings, words, files = given(case)
    before, sys.argv = sys.argv, ["run_recbole", *words]
    small = {key: value for key, value in {**QUIET, **MODELS[case.model]}.items() if key not in settings}
    read = written if files else meant
    wanted = {key: read(str(value) if words else value) for key, value in settings.items()}
    found: dict[str, Any] = {}

    def run() -> Any:
        small.update({} if words or files else case.settings)
        config = Config(case.model, NAME, files, small)
        found["config"] = config
        wrong = senseless(case.model, wanted, config)
        if too_large(config):
            create_dataset(config)  # which refuses columns that are not there
            return wrong
        config["worker"], config["epochs"] = 0, 2  # no matter how many were asked for
        config["log_wandb"] = False
        config.final_config_dict = Recorder(config.final_config_dict)
        trainer, loaders = prepare(config)
        weights = [weight.detach().clone() for weight in trainer.model.parameters()]
        result = fit(trainer, loaders, saved=False).result
        return wrong or untrained(trainer, weights) or implausible(config, result, loaders)

    try:
        outcome = attempt(run)
    finally:
        sys.argv = before
        torch.use_deterministic_algorithms(False)
    if outcome.word == "refused":
        named = outcome.detail.replace("-", "_").replace("learning rate", "learning_rate")
        if "\n" in outcome.detail or not any(key.replace("-", "_") in named for key in (*settings, *files)):
            outcome.word = "unclear"
        return outcome
    if outcome.word != "equal":
        return outcome
    told = [key for key in settings if any(key in line for line in outcome.told)]
    if outcome.result and not any(outcome.result.startswith(f"{key} is") for key in told if key in DATA):
        return Outcome("senseless", outcome.result, outcome.told)
    read = getattr(found["config"].final_config_dict, "read", None)
    if read is None:
        return Outcome("large", "", outcome.told)
    for key in settings:
        asks_for_nothing = wanted[key] is None or wanted[key] is False or wanted[key] in ([], {})
        if key not in {*read, *UNREAD, *told} and not asks_for_nothing:
            return Outcome("ignored", f"nobody reads {key}", outcome.told)
    outcome.result = None
    return outcome


class Recorder(dict):
    """A dict that knows which of its keys were read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def senseless(model: str, wanted: dict[str, Any], config: Config) -> str:
    """What is wrong with settings that were accepted; empty where nothing is."""
    for key, value in wanted.items():
        if key not in SETTINGS or key not in (*OWN[model], *SHARED, *COMMON):
            continue  # of no model or another one: it must be told of, or read
        if not SETTINGS[key][0](value):
            return f"{key} is {value!r}"
        if key in config and not _arrived(key, value, config[key]):
            return f"{key} is {value!r}, but {config[key]!r} in the configuration"
    return contradiction(config)


def _arrived(key: str, value: Any, there: Any) -> bool:
    if key == "eval_args":
        mode = value.get("mode", there["mode"])
        if isinstance(mode, str):
            mode = {"valid": mode, "test": mode}
        return {**there, **value, "mode": {**there["mode"], **mode}} == there
    if key == "train_neg_sample_args":
        if value in (None, "None") or value.get("distribution", "uniform") in (None, "None", "none"):
            return there["distribution"] == "none"
        return {**there, **value} == there
    if key == "data_path":
        return Path(value, NAME) == Path(there)
    if key == "gpu_id":
        return str(there) == (",".join(map(str, value)) if isinstance(value, tuple | list) else str(value))
    if key == "cuda_graphs" and isinstance(value, bool):
        return there == ("on" if value else "off")
    same = [value] if isinstance(value, int | str) and isinstance(there, list) else value
    return same == there and (type(same) is type(there) or not isinstance(there, bool))


def contradiction(config: Config) -> str:
    """Which settings of a configuration exclude each other; empty where none do."""
    loss, mode, negatives = config["loss_type"], config["train_mode"], config["train_neg_sample_args"]
    sequential = config["model"] != "BPR"
    draws = negatives["distribution"] != "none"
    modes = set(config["eval_args"]["mode"].values())
    metrics = [name.lower() for name in config["metrics"]]
    of_scores = {"auc", "logloss", "mae", "rmse"}
    results = {name if name in {*of_scores, "gauc"} else f"{name}@{k}" for name in metrics for k in config["topk"]}
    candidates = min([ITEMS, *(int(mode[3:]) for mode in modes if mode[:3] in ("uni", "pop"))])
    size = config["hidden_size"]
    block = config["use_ssm"] is not False and config["ssm_block"]
    if config["model"] in ("SSD4Rec", "TiM4Rec"):
        block = "mamba2"
    names = [config[f"{key}_FIELD"] for key in ("USER_ID", "ITEM_ID", "TIME", "ITEM_LIST_LENGTH", "LABEL")]
    names += [config["NEG_PREFIX"] + names[1], names[1] + config["LIST_SUFFIX"]]
    rules = {
        "a loss without its negatives": sequential and loss != "CE" and not draws,
        "negatives that nobody reads": (sequential and loss == "CE" and draws) or (not sequential and not draws),
        "smoothing without classes": bool(config["label_smoothing"]) and loss != "CE" and config["model"] in OURS,
        "repeats without classes": config["allow_repeats"] is False and bool(loss != "CE" or config["label_smoothing"])
        and config["model"] in OURS,
        "dynamic sampling": draws and negatives["dynamic"] != bool(negatives["candidate_num"]),
        "dynamic sampling of whole histories": mode == "sequence" and draws and negatives["dynamic"],
        "a power of nothing": negatives["distribution"] == "uniform" and negatives["alpha"] != 1,
        "an order without time": sequential and config["eval_args"]["order"] != "TO",
        "the history left out": sequential and not config["repeatable"],
        "what is new among samples": bool(config["exclude_history"]) and modes != {"full"},
        "a time that nobody reads": config["request_time"] == "known" and config["model"] in OURS
        and not config["use_time_gaps"] and not config["use_clock"],
        "scores of rankings": bool(of_scores & set(metrics)) and (bool(set(metrics) - of_scores) or "full" in modes),
        "rankings of labels": not of_scores & set(metrics) and "labeled" in modes,
        "a metric that nobody measures": config["valid_metric"].lower() not in results,
        "longer lists than there are candidates": not of_scores & set(metrics) and max(config["topk"]) > candidates
        and metrics != ["gauc"],
        "a split of groups": "LS" in config["eval_args"]["split"] and config["eval_args"]["group_by"] != "user",
        "two columns of one name": len(set(names)) < len(names),
        "heads": config["model"] in ("SASRec", "STARRec", "BSARec", "eSASRec") and config["use_pma"] is not False
        and size % config["n_heads"] > 0,
        "SSD's heads": block in ("mamba2", "mamba3") and config["expand"] * size % config["headdim"] > 0,
        "states to rotate": block == "mamba3" and config["d_state"] < 4,
        "no path": config["model"] == "STARRec" and not config["use_ssm"] and not config["use_pma"],
        "more experts than there are": config["model"] == "STARRec"
        and (config["experts_per_token"] or 0) > config["n_experts"],
        "a threshold a head": config["model"] == "STARRec" and isinstance(config["similarity_threshold"], list)
        and len(config["similarity_threshold"]) != config["n_heads"],
    }  # fmt: skip
    return "; ".join(what for what, is_so in rules.items() if is_so)


OURS = ("STARRec", "Mamba4Rec", "SSD4Rec", "RecBLR", "TiM4Rec", "SS4Rec", "BSARec", "eSASRec")
# Above which a case takes seconds, or more memory than a test should.
LARGEST = {"hidden_size": 64, "embedding_size": 64, "inner_size": 64, "num_layers": 3, "n_layers": 3, "d_state": 64,
           "expand": 8, "n_experts": 16, "MAX_ITEM_LIST_LENGTH": 256}  # fmt: skip


def too_large(config: Config) -> bool:
    """Whether a run would take more time or memory than a test has."""
    negatives = [config[f"{phase}_neg_sample_args"]["sample_num"] for phase in ("train", "valid", "test")]
    negatives.append(config["train_neg_sample_args"]["candidate_num"])
    return any(isinstance(number, int) and number > 300 for number in negatives) or any(
        isinstance(config[key], int) and config[key] > most for key, most in LARGEST.items()
    )


def untrained(trainer: Any, before: list[torch.Tensor]) -> str:
    """What is wrong with how a model was trained; empty where nothing is."""
    losses = [np.sum(loss) for loss in trainer.train_loss_dict.values()]
    if len(losses) != 2 or not np.isfinite(losses).all():
        return f"losses of two epochs are {losses}"
    after = list(trainer.model.parameters())
    if all(torch.equal(one, other) for one, other in zip(before, after, strict=True)):
        return "no weight changed"
    return "" if all(weight.isfinite().all() for weight in after) else "weights are no numbers"


def implausible(config: Config, result: dict[str, Any], loaders: Any) -> str:
    """What is wrong with a run's results; empty where nothing is."""
    for measured in (result["best_valid_result"], result["test_result"]):
        for name, value in (measured or {}).items():
            kind = name.split("@")[0]
            most = math.inf if kind in ("averagepopularity", "shannonentropy", "logloss", "mae", "rmse") else 1.0
            if kind not in METRICS or not 0 <= value <= most:
                return f"{name} is {value}"
            if kind in ("mrr", "ndcg", "map") and value > 0.99 and len(loaders[2]._dataset) >= 8:
                return f"{name} is {value} for a random future"
    split = config["eval_args"]["split"]
    if not result["test_result"] and (split["RS"][2] if "RS" in split else "test" in split["LS"]):
        return f"nothing was measured: {result}"
    return ""
