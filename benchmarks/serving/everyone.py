"""Recommendations for all users of a set like ml-1m: ``recommend_all`` against RecBole's ``full_sort_topk``."""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.data import data_preparation as recbole_data_preparation
from recbole.data.dataset import SequentialDataset

from benchmarks.serving.contenders import SETTINGS, SIZE, in_turns
from benchmarks.speed.contenders import hush
from recbole_ssm import Config, Recommender
from recbole_ssm.data.full_ranking import scores_of_rows
from recbole_ssm.data.identity import identity
from recbole_ssm.registry import model_class
from recbole_ssm.serving.batch import recommend_all
from recbole_ssm.serving.vocabulary import Vocabulary

ITEMS, K = 3416, 20
MODELS = ("Mamba4Rec", "SASRec")
BATCHES = (16, 64, 256, 1024, 4096)  # users of a call of RecBole's
TRIED_WITH = 1024  # users, to find the batch of the highest rate
OF_THE_DOCS = 2  # users of a call in the example of RecBole's documentation
ROUNDS = 3
FIELDS = ["user_id:token", "item_id:token", "timestamp:float"]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """A row a model and way."""
    hush()
    with tempfile.TemporaryDirectory() as folder:
        return _measure(arguments, Path(folder))


def _measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    interactions = _write(folder, arguments.all_users)
    begin = time.perf_counter()
    config = _config("SASRec", folder)
    test_data = recbole_data_preparation(config, SequentialDataset(config))[2]
    to_read = time.perf_counter() - begin
    print(f"everyone: RecBole has read {interactions} interactions in {to_read:.3g} s", flush=True)
    users = np.arange(1, test_data.dataset.user_num)
    cases: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    tried: dict[str, dict[int, float]] = {}
    for name in MODELS:
        recommender = _untrained(name, folder, test_data)
        output = folder / f"{name}.parquet"

        def all_of_them(recommender: Recommender = recommender, output: Path = output) -> None:
            recommend_all(recommender, folder / "histories.inter", output, K, exclude_seen=False)

        def by_recbole(at_a_time: int, count: int, model: Any = recommender.model) -> np.ndarray:
            chosen = users[:count]
            batches = np.split(chosen, np.arange(at_a_time, len(chosen), at_a_time))
            return np.concatenate([_full_sort_topk(batch, model, test_data)[0].numpy() for batch in batches])

        all_of_them()
        _check(name, _scores(output, test_data.dataset), by_recbole(256, len(users)))
        tried[name] = _rates(by_recbole, len(users))
        best = max(tried[name], key=lambda size: tried[name][size])
        few = min(len(users), 64 * OF_THE_DOCS)
        for way, at_a_time, count, call in (
            ("recommend_all, file to file", "", len(users), all_of_them),
            ("full_sort_topk", best, len(users), lambda call=by_recbole, size=best: call(size, len(users))),
            ("full_sort_topk", OF_THE_DOCS, few, lambda call=by_recbole, few=few: call(OF_THE_DOCS, few)),
        ):
            case = f"{name}, {way} {at_a_time}"
            rows[case] = {"model": name, "way": way, "users of a call": at_a_time, "users": count}
            cases[case] = call
    found = in_turns(cases, min(arguments.rounds, ROUNDS), arguments.seconds, warm=1)
    rates = {case: rows[case]["users"] / median(seconds) for case, seconds in found.items()}
    for case, row in rows.items():
        print(f"everyone, {case}: {rates[case]:,.0f} users/s", flush=True)
        ours = rates[f"{row['model']}, recommend_all, file to file "]
        reading = 0.0 if row["way"].startswith("recommend_all") else to_read
        row["users a second"] = f"{rates[case]:,.0f}"
        row["s to read the data before"] = f"{reading:.3g}"
        whole = len(users) / (len(users) / rates[case] + reading)
        row["users a second, reading included"] = f"{whole:,.0f}"
        row["recommend_all: times as fast"] = f"{ours / rates[case]:.3g}"
        row["reading included"] = f"{ours / whole:.3g}"
    return {
        "title": "Recommendations for all users",
        "settings": f"{len(users):,} users, {ITEMS:,} items, {interactions:,} interactions of generated histories of "
        f"ml-1m's lengths (median 96), MAX_ITEM_LIST_LENGTH 200, hidden_size 64, {K} items a user, float32, untrained",
        "rows": list(rows.values()),
        "seconds": found,
        "tried": tried,
        "protocol": {
            "recommend_all": "from a file .inter to a file of Parquet: reading the histories, scores, top items, "
            "tokens, writing; seen items are not left out, as RecBole leaves none out",
            "full_sort_topk": "RecBole's own code on its own SequentialDataset and test loader: full_sort_scores and "
            f"torch.topk, device cpu, ids alone; all users in batches of the best of {', '.join(map(str, BATCHES))}, "
            f"found in the run, and {OF_THE_DOCS} users of a call as in RecBole's documentation",
            "models": "the same object for both ways: RecBole's SASRec of 2 layers on padded rows, and our Mamba4Rec, "
            "which packs the rows that it is given; the same histories, and scores that are compared before",
            "reading": "RecBole's dataset and loaders, made once; it is not in the users a second beside it",
            "timing": "medians of rounds in which all take turns",
        },
    }


def _full_sort_topk(users: np.ndarray, model: Any, test_data: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """RecBole's, whose ``full_sort_scores`` is replaced by ours where its module is used."""
    return torch.topk(scores_of_rows(users, model, test_data, torch.device("cpu")), K)


def _rates(call: Callable[[int, int], Any], users: int) -> dict[int, float]:
    """Users a second of each batch's size that they fill."""
    rates = {}
    for size in BATCHES:
        count = min(users, max(size, TRIED_WITH))
        if size <= max(users, BATCHES[0]):
            begin = time.perf_counter()
            call(size, count)
            rates[size] = count / (time.perf_counter() - begin)
    return rates


def _config(model: str, folder: Path) -> Config:
    given = {**SETTINGS, **SIZE, "data_path": str(folder), "load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
    return Config(model, "generated", config_dict=given | ({"train_mode": "prefix"} if model == "SASRec" else {}))


def _untrained(name: str, folder: Path, test_data: Any) -> Recommender:
    """A model on RecBole's dataset, with weights large enough that scores differ."""
    config = _config(name, folder)
    config.identity = {"file": "", **identity(test_data.dataset)}
    torch.manual_seed(0)
    model = model_class(config)(config, test_data.dataset)
    torch.nn.init.normal_(model.item_embedding.weight, std=0.4)
    return Recommender(model, config, Vocabulary(config))


def _write(folder: Path, users: int) -> int:
    """RecBole's file of all interactions, and ``histories.inter`` without each user's last: what RecBole's test rows
    hold.
    """
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(np.log(96), 1.04, users).clip(20, 2314).astype(np.int64)  # ml-1m's, about
    ends = np.cumsum(lengths)
    place = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    item = generator.permutation(ends[-1]) % ITEMS
    table = pd.DataFrame(dict(zip(FIELDS, (np.repeat(np.arange(users), lengths), item, place), strict=True)))
    (folder / "generated").mkdir()
    table.to_csv(folder / "generated" / "generated.inter", sep="\t", index=False)
    table.drop(ends - 1).to_csv(folder / "histories.inter", sep="\t", index=False)
    return len(table)


def _scores(output: Path, dataset: Any) -> np.ndarray:
    """Scores of a file of recommendations, ``[user_num - 1, k]``."""
    table = pd.read_parquet(output)
    scores = np.full((dataset.user_num - 1, K), np.nan)
    scores[dataset.token2id("user_id", table["user"].to_numpy(object)) - 1, table["rank"] - 1] = table["score"]
    return scores


def _check(model: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    """No figure where the two ways give different answers."""
    if not np.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max()):
        raise RuntimeError(f"recommend_all and full_sort_topk of {model} differ by up to {np.abs(ours - theirs).max()}")
