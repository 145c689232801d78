"""The small set that all of RecBole's models run on, and each one's settings for it."""

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import recbole
from recbole.utils import get_model

from benchmarks.models.causality import reason_against
from recbole_ssm import Config
from recbole_ssm.data import create_dataset, data_preparation
from recbole_ssm.registry import MODELS, list_models

DATASET = "zoo"
USERS, LONGEST, WIDTH = 60, 15, 64  # users of ml-100k, their earliest interactions, and numbers of an embedding

OFTEN = 10  # triples that an entity of the graph is in at least

COMMON: dict[str, Any] = {
    "epochs": 1,
    "train_batch_size": 256,
    "eval_batch_size": 512,
    "use_gpu": False,
    "show_progress": False,
    "state": "ERROR",
    "metric_decimal_place": 6,
    "data_path": "dataset",
    "MAX_ITEM_LIST_LENGTH": 10,
}
INTER = {"inter": ["user_id", "item_id", "rating", "timestamp"]}
FEATURES = {
    "user": ["user_id", "age", "gender", "occupation"],
    "item": ["item_id", "release_year", "class"],
}
KNOWLEDGE = {"kg": ["head_id", "relation_id", "tail_id"], "link": ["item_id", "entity_id"]}

_WITH_ITEMS = {"load_col": {**INTER, "item": FEATURES["item"]}}
_WITH_FEATURES = {"load_col": {**INTER, **FEATURES}}
# Embeddings of entities and relations from elsewhere, in files beside the others.
_WITH_EMBEDDINGS = {
    "load_col": {**INTER, **KNOWLEDGE, "ent": ["ent_id", "ent_emb"], "rel": ["rel_id", "rel_emb"]},
    "additional_feat_suffix": ["ent", "rel"],
    "alias_of_entity_id": ["ent_id"],
    "alias_of_relation_id": ["rel_id"],
    "preload_weight": {"ent_id": "ent_emb", "rel_id": "rel_emb"},
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
}

# What a model needs to be told on any data, or on this one, with RecBole 1.2.0 as well.
OF_MODELS: dict[str, dict[str, Any]] = {
    "GRU4RecF": _WITH_ITEMS,
    "SASRecF": _WITH_ITEMS,
    "FDSA": _WITH_ITEMS,
    "S3Rec": _WITH_ITEMS,
    "DIN": _WITH_FEATURES,
    "DIEN": _WITH_FEATURES,
    "GRU4RecKG": _WITH_EMBEDDINGS,
    "KSR": _WITH_EMBEDDINGS,
    "DGCF": {"train_batch_size": 64},  # more users drawn a step than there are, with fewer steps
    "NCL": {"num_clusters": 8},  # of users, and of items
    "RepeatNet": {"train_neg_sample_args": None},
}

# Models that are trained in stages, each from the file that the one before has written.
STAGES: dict[str, list[dict[str, Any]]] = {
    "S3Rec": [
        {"train_stage": "pretrain", "pretrain_epochs": 1, "save_step": 1},
        {"train_stage": "finetune", "pre_model_path": "S3Rec-zoo-*.pth"},
    ],
    "RaCT": [
        {"train_stage": "actor_pretrain", "pretrain_epochs": 1, "save_step": 1},
        {"train_stage": "critic_pretrain", "pretrain_epochs": 1, "save_step": 1, "pre_model_path": "RaCT-zoo-*.pth"},
        {"train_stage": "finetune", "pre_model_path": "RaCT-zoo-*.pth"},
    ],
    "KD_DAGFM": [{"phase": "teacher_training"}, {"phase": "distillation", "warm_up": "KD_DAGFM-*.pth"}],
}


def families() -> dict[str, str]:
    """The family of each of RecBole's models, by name."""
    found = {}
    for family in ("sequential", "general", "context_aware", "knowledge_aware"):
        package = importlib.import_module(f"recbole.model.{family}_recommender")
        for name in list_models():
            if name not in MODELS and hasattr(package, name):
                found[name] = family.replace("_", "-")
    return found


def stages(model: str, family: str) -> list[dict[str, Any]]:
    """The settings of each stage of a model's training."""
    settings: dict[str, Any] = {**COMMON, "load_col": INTER}
    if family == "context-aware":
        settings |= {"load_col": {**INTER, **FEATURES}, "threshold": {"rating": 4}}
    if family == "knowledge-aware":
        settings["load_col"] = {**INTER, **KNOWLEDGE}
    if family == "sequential" and not hasattr(get_model(model), "input_type"):
        settings["train_neg_sample_args"] = None  # for their loss over all items
    settings |= OF_MODELS.get(model, {})
    return [{**settings, **stage} for stage in STAGES.get(model, [{}])]


def sequence_mode(model: str, folder: Path) -> str:
    """Whether a sequential model trains on whole histories, of the set in ``folder``; where not, why."""
    settings = {**stages(model, "sequential")[0], "data_path": str(folder / "dataset")}
    config = Config.from_settings({**settings, "model": model, "dataset": DATASET})
    train_data, *_ = data_preparation(config, create_dataset(config))
    reason = reason_against(config, train_data._dataset)
    return "yes" if reason is None else f"no: {reason}"


def write_dataset(folder: Path) -> None:
    """Write the set as ``<folder>/dataset/zoo``: ml-100k as RecBole ships it, cut, with a clock that has no ties.

    Ties and times that float32 cannot hold are sorted differently by different versions of NumPy, which is no matter
    of a model's. Embeddings of entities and relations, which RecBole does not ship, are random numbers.
    """
    source = Path(recbole.__file__).parent / "dataset_example" / "ml-100k"
    target = folder / "dataset" / DATASET
    target.mkdir(parents=True)

    def read(suffix: str) -> tuple[str, list[list[str]]]:
        head, *lines = (source / f"ml-100k.{suffix}").read_text().splitlines()
        return head, [line.split("\t") for line in lines]

    def write(suffix: str, head: str, rows: list[list[str]]) -> None:
        lines = [head, *("\t".join(row) for row in rows)]
        (target / f"{DATASET}.{suffix}").write_text("\n".join(lines) + "\n")

    head, rows = read("inter")
    rows = sorted((row for row in rows if int(row[0]) <= USERS), key=lambda row: (int(row[0]), int(row[3])))
    count: dict[str, int] = {}
    kept = []
    for user, item, rating, _ in rows:
        count[user] = count.get(user, 0) + 1
        if count[user] <= LONGEST:
            kept.append([user, item, rating, str(count[user])])
    write("inter", head, kept)
    items = {row[1] for row in kept}
    for suffix, ids in (("user", set(count)), ("item", items), ("link", items)):
        head, rows = read(suffix)
        write(suffix, head, [row for row in rows if row[0] in ids])
    entities = {row[1] for row in rows if row[0] in items}
    head, triples = read("kg")
    triples = [row for row in triples if row[0] in entities or row[2] in entities]
    ends = Counter(end for head, _, tail in triples for end in (head, tail))
    triples = [row for row in triples if min(ends[row[0]], ends[row[2]]) >= OFTEN]
    write("kg", head, triples)
    generator = np.random.default_rng(0)
    for suffix, names in (("ent", sorted(entities)), ("rel", sorted({row[1] for row in triples}))):
        vectors = generator.normal(size=(len(names), WIDTH))
        rows = [
            [name, " ".join(f"{value:.4f}" for value in vector)] for name, vector in zip(names, vectors, strict=True)
        ]
        write(suffix, f"{suffix}_id:token\t{suffix}_emb:float_seq", rows)
