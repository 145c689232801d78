"""What a value of each setting must be to mean anything, and values to try.

Written by hand from what the settings are for, and from the papers' and torch's own domains, without a look at the
schema that is tested by it: a probability of dropping everything is none, a size is a whole number from 1, numbers are
finite, a switch is no word, a column is one that the data have. Sizes are bounded by memory: a square matrix of 2^17
features, or as many items as 32-bit integers count.
"""

import codecs
import math
from collections.abc import Callable
from typing import Any

import numpy as np

MOST = 2**31 - 1
COLUMNS = ("user_id", "item_id", "timestamp")  # of the data that all cases read
ITEMS = 24

Test = Callable[[Any], bool]


def whole(low: int, high: int = MOST) -> Test:
    return lambda value: type(value) is int and low <= value <= high


def number(low: float, high: float = math.inf, above: bool = False, below: bool = False) -> Test:
    """A finite number from ``low`` (or ``above`` it) to ``high`` (or ``below`` it)."""

    def holds(value: Any) -> bool:
        if type(value) not in (int, float) or abs(value) > 1.7e308 or value != value:
            return False
        return (value > low if above else value >= low) and (value < high if below else value <= high)

    return holds


def switch(value: Any) -> bool:
    return type(value) is bool


def word(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != "" and value.isprintable()


def one_of(*words: str | None) -> Test:
    return lambda value: (value is None or isinstance(value, str)) and value in words


def folded(*words: str) -> Test:
    return lambda value: isinstance(value, str) and value.lower() in words


def empty(value: Any) -> bool:
    return value is None


def either(*tests: Test) -> Test:
    return lambda value: any(test(value) for test in tests)


def listed(each: Test, shortest: int = 0) -> Test:
    return lambda value: isinstance(value, list | tuple) and len(value) >= shortest and all(map(each, value))


def keyed(key: Test, each: Test) -> Test:
    return lambda value: isinstance(value, dict) and all(key(name) and each(item) for name, item in value.items())


def parts(required: tuple[str, ...] = (), **tests: Test) -> Test:
    """A dict of some of the keys of ``tests``, the ``required`` among them."""

    def holds(value: Any) -> bool:
        if not isinstance(value, dict) or not set(required) <= value.keys() <= tests.keys():
            return False
        return all(tests[key](item) for key, item in value.items())

    return holds


def _mode(value: Any) -> bool:
    if value in ("full", "labeled"):
        return True
    return isinstance(value, str) and value[:3] in ("uni", "pop") and value[3:].isdecimal() and int(value[3:]) > 0


def _split(value: Any) -> bool:
    if not isinstance(value, dict) or len(value) != 1:
        return False
    if "LS" in value:
        return value["LS"] in ("valid_and_test", "valid_only", "test_only")
    shares = value.get("RS")
    return listed(number(0))(shares) and len(shares) == 3 and shares[0] > 0


def _codec(value: Any) -> bool:
    try:
        return isinstance(value, str) and codecs.lookup(value)._is_text_encoding
    except (LookupError, ValueError):
        return False


def _interval(value: Any) -> bool:
    return value in ("[0,inf)", "[1,inf)", "[3,8]", "(2,9)", "[2,4];[5,inf)", "[-inf,inf]")  # of those that are tried


column = one_of(*COLUMNS)
columns = listed(column)
eval_args = parts(
    split=_split, group_by=one_of("user", "none", "None", None), order=one_of("TO", "RO"),
    mode=either(_mode, lambda value: value != {} and keyed(one_of("valid", "test"), _mode)(value)),
)  # fmt: skip
negatives = either(
    empty,
    one_of("None"),
    parts(
        distribution=one_of("uniform", "popularity", "none", "None", None), sample_num=either(whole(1), one_of("none")),
        alpha=either(number(-math.inf), one_of("none")), dynamic=switch, candidate_num=whole(0),
    ),
)  # fmt: skip
clipping = either(
    empty,
    parts(
        ("max_norm",), max_norm=number(0, above=True), error_if_nonfinite=switch,
        norm_type=either(number(0, above=True), lambda value: isinstance(value, float) and value == math.inf),
    ),
)  # fmt: skip

METRICS = ("recall", "mrr", "ndcg", "hit", "precision", "map", "itemcoverage", "averagepopularity", "giniindex",
           "shannonentropy", "tailpercentage", "gauc", "auc", "logloss", "mae", "rmse")  # fmt: skip

# Of most settings: what becomes of a slip, a shell, a YAML file or a careless program.
ODD: list[Any] = [
    "", " ", "no", "yes", "on", "none", "None", "nan", "inf", "null", "~", "true", "0", "-1", "1.5", "[", "[1,",
    "é日本", "a b", "\x00", "x\ny", "1e3", "0x10", "__import__('os')", math.nan, math.inf, -math.inf, -1, 0, 1, 2, 7,
    0.5, 1.5, -0.5, 1e308, 1e-320, 2**31, 2**63, 10**30, 10**400, True, False, None, [], [1], [0], [True], [None],
    [0.5, "x"], ["x"], {}, {"x": 1}, {"": None}, (), np.float64(0.25), np.int64(3), np.bool_(True), 1 + 2j, b"x",
]  # fmt: skip

_SWITCH = (switch, [True, False, "no", "off", 1, "False"])
# Of eight features a larger share below 1 may drop all in both epochs, so that nothing is learned.
_SHARE = (number(0, 1, below=True), [0, 0.1, 0.5, 0.8, 1, 1.0, 2, -0.1, "0.3"])
_SIZE = (whole(1, 2**17), [1, 2, 8, 16, 24, 0, -1, 8.0, 2**16, 2**40, "8"])
_FEW = (whole(1, 10_000), [1, 2, 3, 0, -1, 1.0, 1000, 10**6])
_COLUMN_NAME = (word, ["user_id", "item_id", "timestamp", "x", "my column", "item_id_list", ""])
_COLUMNS = (either(empty, column, columns), [["item_id"], ["x"], "x", ["timestamp"], [], None])
_BY_SUFFIX = (
    either(empty, keyed(one_of("inter"), columns)),
    [None, {}, {"inter": ["timestamp"]}, {"inter": []}, {"inter": ["x"]}, {"item": ["item_id"]}, {"inter": None}],
)
_INTERVAL = (either(empty, _interval), ["[0,inf)", "[1,inf)", "[3,8]", "(2,9)", "[2,4];[5,inf)", "[9,3]", "[5,", "5",
                                        "[1000,inf)", "(inf,0]", None, 5, "[nan,3]", "[-inf,inf]"])  # fmt: skip

# The settings: what their values must be, and some of those, at their bounds and outside.
SETTINGS: dict[str, tuple[Test, list[Any]]] = {
    "gpu_id": (
        either(whole(-1), listed(whole(0)),  # -1 hides them all, as CUDA has it
               lambda value: isinstance(value, str) and all(part.isdecimal() for part in value.split(",") if value)),
        ["0", "", "0,1", 0, (0, 1), -1, "x", "0;1"],
    ),
    "use_gpu": _SWITCH, "reproducibility": _SWITCH, "save_dataset": _SWITCH, "tuned": _SWITCH, "shuffle": _SWITCH,
    "require_pow": _SWITCH, "enable_amp": _SWITCH, "enable_scaler": _SWITCH, "repeatable": _SWITCH,
    "filter_inter_by_user_or_item": _SWITCH, "show_progress": (switch, [False, "no", 0]),
    "log_wandb": (switch, [False, "no"]),
    "save_dataloaders": (lambda value: value is False, [True, False, "no"]),
    "dataloaders_save_path": (empty, [None, "x.pth", ""]),
    "worker": (whole(0, 10_000), [0, 1, 2, -1, 0.5, 10**9]),
    "seed": (whole(0, 2**32 - 1), [0, 1, 2**32 - 1, 2**32, -1, 3.5]),
    "state": (folded("debug", "info", "warning", "error", "critical"), ["ERROR", "warning", "Critical", "loud", 10]),
    "checkpoint_dir": (word, ["saved", "a/b", "with space", "", 3]),
    "data_path": (word, ["dataset", "nowhere", "", 3]),
    "dataset_save_path": (either(empty, word), [None, "nowhere.pth", ""]),
    "wandb_project": (word, ["recbole", ""]),
    "epochs": (whole(1), [1, 2, 0, -1, 1.5, 10**6, "2"]),
    "train_batch_size": (whole(1), [1, 7, 64, 10**6, 0, -5, 0.5, 10**12]),
    "eval_batch_size": (whole(1), [1, 7, 64, 10**6, 0, -5, 0.5]),
    "learner": (folded("adam", "adamw", "sgd", "adagrad", "rmsprop"),
                ["adam", "AdamW", "sgd", "adagrad", "rmsprop", "bogus", "sparse_adam", "lbfgs", "adam "]),
    "learning_rate": (number(0, 1e6, above=True), [1e-3, 0.1, 1, 1e-8, 0, -0.1, 100, "1e-3"]),
    "weight_decay": (number(0, 1e6), [0, 1e-4, 0.1, 1, -1e-4]),
    "eval_step": (whole(0), [0, 1, 2, -1]), "stopping_step": (whole(0), [0, 1, 10, -1]),
    "loss_decimal_place": (whole(0, 20), [0, 4, 20, -1, 400]),
    "metric_decimal_place": (whole(0, 20), [0, 4, 20, -1, 400]),
    "valid_metric_bigger": _SWITCH,
    "clip_grad_norm": (clipping, [None, {"max_norm": 5}, {"max_norm": 0.1, "norm_type": 1}, {"max_norm": 0},
                                  {"norm": 5},
                 {"max_norm": -1}, {"max_norm": 5,
                  "norm_type": math.inf}, {"max_norm": math.nan},
                                  {"max_norm": 5, "norm_type": 0}, {"max_norm": 5, "error_if_nonfinite": "no"}, 5]),
    "transform": (one_of(None), [None, "mask_itemseq", "crop_itemseq", "inverse_itemseq", "user_defined", "x"]),
    "metrics": (either(folded(*METRICS), listed(folded(*METRICS), 1)),
                ["NDCG", ["NDCG"], ["ndcg", "Recall"], ["MRR", "GAUC"], ["AUC"], ["AUC", "NDCG"], [], ["bogus"],
                 ["LogLoss"],
                 ["ItemCoverage", "GiniIndex", "MRR", "NDCG"], ["MRR", "NDCG",
                  "ShannonEntropy", "TailPercentage"],
                 ["MAP", "AveragePopularity", "NDCG", "MRR"], ["Recall@10"]]),
    "topk": (either(whole(1, ITEMS), listed(whole(1, ITEMS), 1)),
             [10, [10], [1, 10], [5, 10, 20], 24, 25, [10, 0], [], [10, 10**6], [10, 2.5], -1, [10, 10], "10"]),
    "valid_metric": (word, ["NDCG@10", "MRR@10", "recall@10", "NDCG", "NDCG@5", "NDCG@", "@10", "AUC", "GAUC",
                              "NDCG@x"]),
    "field_separator": (one_of("\t", "\\t"), ["\t", ",", "", "\\t", "::", "ab", "["]),
    "seq_separator": (lambda value: isinstance(value, str) and value != "", [" ", ",", "", "|", "["]),
    "encoding": (either(empty, _codec), ["utf-8", "ascii", "latin-1", "utf-16", "hex", "bogus", None]),
    "USER_ID_FIELD": (column, list(_COLUMN_NAME[1])), "ITEM_ID_FIELD": (column, list(_COLUMN_NAME[1])),
    "TIME_FIELD": _COLUMN_NAME, "RATING_FIELD": _COLUMN_NAME, "LABEL_FIELD": _COLUMN_NAME,
    "ITEM_LIST_LENGTH_FIELD": _COLUMN_NAME, "POSITION_FIELD": _COLUMN_NAME,
    "LIST_SUFFIX": (word, ["_l", "_items", "", "é"]), "NEG_PREFIX": (word, ["neg_", "n_", "", "é"]),
    "seq_len": (either(empty, keyed(column, whole(1))), [None, {}, {"x": 3}, {"item_id": 3}, {"item_id": 0}]),
    "threshold": (either(empty, keyed(column, number(-math.inf))),
                  [None, {}, {"timestamp": 1_000_000_300}, {"x": 1}, {"timestamp": "a"}, {"timestamp": math.nan}]),
    "numerical_features": (columns, [[], None, ["timestamp"], ["x"]]),
    "load_col": (either(empty, keyed(one_of("inter"), either(listed(column, 2), one_of("*")))),
                 [None, {"inter": ["user_id", "item_id", "timestamp"]}, {"inter": ["user_id", "item_id"]},
                  {"inter": "*"},
                 {"inter": ["user_id"]}, {"inter": ["user_id", "item_id",
                  "timestamp", "x"]}, {}, {"inter": []},
                  {"inter": None}, {"itner": ["user_id", "item_id", "timestamp"]}]),
    "unload_col": _BY_SUFFIX, "unused_col": _BY_SUFFIX,
    "additional_feat_suffix": (either(empty, listed(one_of())), [None, [], ["x"], "x"]),
    "rm_dup_inter": (one_of("first", "last", None), ["first", "last", None, "middle"]),
    "val_interval": (either(empty, keyed(column, either(_interval, word, listed(word)))),
                     [None, {}, {"timestamp": "[0,inf)"}, {"timestamp": "(5"}, {"x": "[0,1]"},
                      {"user_id": ["u1", "u2"]},
                 {"timestamp": "[0,5]"}, {"timestamp": 5}]),
    "user_inter_num_interval": _INTERVAL, "item_inter_num_interval": _INTERVAL,
    "alias_of_user_id": _COLUMNS, "alias_of_item_id": _COLUMNS, "alias_of_entity_id": _COLUMNS,
    "alias_of_relation_id": _COLUMNS,
    "preload_weight": (either(empty, keyed(column, column)), [None, {}, {"item_id": "timestamp"}, {"x": "y"}]),
    "normalize_field": (either(empty, columns), [None, [], ["timestamp"], ["x"], ["user_id"]]),
    "normalize_all": (either(empty, switch), [None, True, False, "no"]),
    "discretization": (
        either(empty, keyed(column, parts(("method",), method=one_of("ED", "EF", "LD"), bucket=whole(1)))),
        [None, {}, {"timestamp": {"method": "ED", "bucket": 3}}, {"x": {"method": "ED"}},
         {"timestamp": {"method": "X"}},         {"timestamp": 1}, {"timestamp": {"method": "ED", "bucket": 0}}],
    ),
    "benchmark_filename": (empty, [None, ["train", "valid", "test"], ["train"], [], ["a", "b", "c"]]),
    "MAX_ITEM_LIST_LENGTH": (whole(1, 2**24), [1, 2, 5, 40, 0, -1, 5.0, 2**30]),
    # Of models.
    "lr_scheduler_type": (one_of("constant", "linear", "cosine"), ["constant", "linear", "cosine", "step", True]),
    "warmup_ratio": _SHARE, "lr_restarts": (whole(0, 10_000), [0, 1, 3, -1, 1.5, "2"]), "ema_decay": _SHARE,
    "train_mode": (one_of("sequence", "prefix"), ["sequence", "prefix", "row", True]),
    "time_order": (one_of("exact", "float32"), ["exact", "float32", "file"]),
    "cuda_graphs": (either(one_of("auto", "on", "off"), switch), ["auto", "on", "off", True, False, "yes", 1]),
    "exclude_history": _SWITCH,
    "temperature": (either(empty, number(0, 1e9, above=True)), [None, 0.1, 1, 0, -1, "0.1"]),
    "label_smoothing": _SHARE, "allow_repeats": _SWITCH, "gbce_t": (number(0, 1), [0, 0.75, 1, 1.01, -0.1]),
    "use_clock": _SWITCH, "request_time": (one_of("unknown", "known"), ["unknown", "known", True, "now"]),
    "ssm_backend": (one_of("auto", "reference", "cpu", "triton", "mamba_ssm"), ["auto", "reference", "gpu", "numpy"]),
    "loss_type": (one_of("CE", "BCE", "BPR", "gBCE", "SampledSoftmax"),
                  ["CE", "BCE", "BPR", "gBCE", "SampledSoftmax", "ce", "softmax", ""]),
    "hidden_size": _SIZE, "embedding_size": _SIZE, "inner_size": _SIZE, "num_layers": _FEW, "n_layers": _FEW,
    "n_heads": (whole(1, 2**17), [1, 2, 4, 8, 3, 0, -2, 2.0]),
    "hidden_dropout_prob": _SHARE, "attn_dropout_prob": _SHARE, "dropout_prob": _SHARE, "mask_ratio": _SHARE,
    "hidden_act": (one_of("gelu", "relu", "swish", "tanh", "sigmoid"), ["gelu", "swish", "tanh", "selu", None]),
    "layer_norm_eps": (number(0, 1, above=True), [1e-12, 1e-5, 0, -1e-5, 1, 1e30]),
    "initializer_range": (number(0, 1e3, above=True), [0.02, 1, 0, -1, 1e30]),
    "d_state": (whole(1, 2**17), [1, 2, 16, 0, -1, 2.5, 4096]), "d_conv": (whole(1, 8), [1, 4, 8, 9, 0, 100]),
    "expand": (whole(1, 1000), [1, 2, 3, 0, 0.5, 64]), "headdim": (whole(1, 2**17), [1, 8, 16, 3, 0]),
    "ssm_block": (one_of("mamba", "mamba2", "mamba3"), ["mamba", "mamba2", "mamba3", "mamba4", 2]),
    "filter_share": (_SHARE[0], [0, 0.7, 0.3, 1, -0.1, "much"]),
    "alpha": (number(0, 1), [0, 0.5, 1, 2, -1]), "c": (whole(0, 2**16), [0, 1, 5, 1000, -1, 2.5]),
    "sampling_correction": _SWITCH,
    "norm_embedding": _SWITCH, "var_len": _SWITCH, "bidirectional": _SWITCH, "beta": (number(0, 1e6), [0, 0.1, 1, -1]),
    "backward_stream": (one_of("final", "aligned"), ["final", "aligned", "both"]),
    "time_aware": _SWITCH, "time_dropout_prob": _SHARE, "d_time_state": (whole(1, 2**12), [1, 2, 16, 0, -1, 2.5]),
    "time_unit": (number(0, 1e15, above=True), [1, 86400, 0.5, 0, -1, "1"]),
    "use_time_gaps": _SWITCH, "use_position_embedding": _SWITCH, "use_ssm": _SWITCH, "use_pma": _SWITCH,
    "use_similarity": _SWITCH, "feed_forward": _SWITCH, "pma_residual": _SWITCH,
    "input_dependent_fusion": _SWITCH, "use_moe": _SWITCH,
    "similarity_threshold": (either(number(-1, 1), listed(number(-1, 1), 1)),
                             [0.0, -1, 1, [0.1, 0.2], [0.1], 2, [], [0.1, math.nan], [[0.1, 0.2]]]),
    "attention_window": (either(empty, whole(1)), [None, 1, 3, 10**6, 0, -1]),
    "moe_level": (one_of("sequence", "position"), ["sequence", "position", "token"]),
    "n_experts": (whole(1, 2**17), [1, 3, 8, 0, -1]),
    "experts_per_token": (either(empty, whole(1, 2**17)), [None, 1, 2, 3, 9, 0, -1]),
    "diversity_weight": (number(0, 1e6), [0, 0.01, 1, -1]), "balance_weight": (number(0, 1e6), [0, 0.01, 1, -1]),
}  # fmt: skip

# Parts of the two settings that are dicts; one or two of them make a value.
EVAL_ARGS: dict[str, list[Any]] = {
    "split": [{"LS": "valid_and_test"}, {"LS": "test_only"}, {"LS": "valid_only"}, {"RS": [8, 1, 1]},
              {"RS": [0.6, 0.2, 0.2]},              {"RS": [0.8, 0.2]}, {"RS": [0, 1, 1]}, {"RS": [1, 0, 0]},
                  {"RS": [0.8, -0.1, 0.3]}, {"LS": 3}, {}, None,
              {"RS": [8, 1, 1], "LS": "test_only"}, {"rs": [8, 1, 1]}, {"RS": [math.nan, 1, 1]}],
    "group_by": ["user", "none", None, "item", True],
    "order": ["TO", "RO", "to", None],
    "mode": ["full", "uni1", "uni12", "pop15", "uni0", "uni", "uni-1", "uni5", "unix", "labeled", "all", 100,
             "pop10000000",             {"valid": "uni15", "test": "full"}, {"valid": "full"}, {"train": "full"}, {},
                  {"valid": "uni0"}, None],
}  # fmt: skip
NEGATIVES: dict[str, list[Any]] = {
    "distribution": ["uniform", "popularity", "none", "None", None, "gaussian", "Uniform"],
    "sample_num": [1, 2, 5, 0, -1, 1.5, "none", 10**9, "1"],
    "alpha": [1.0, 0.5, 0, -1, math.nan, math.inf, "x"],
    "dynamic": [False, True, "no", 1],
    "candidate_num": [0, 2, -1, 1.5],
}  # fmt: skip
SETTINGS["eval_args"] = (eval_args, ["uni100", {}, None])
SETTINGS["train_neg_sample_args"] = (negatives, [None, {}, "uniform", "None"])
