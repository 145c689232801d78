"""Data: time and memory to read, filter and build rows, each in a process of its own."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.data import data_preparation as recbole_data_preparation
from recbole.data.dataset import SequentialDataset

from benchmarks.measure import resident
from benchmarks.speed.contenders import Contender, Steps, config_of, hush, recorded, spread
from recbole_ssm.data import data_preparation
from recbole_ssm.data.utils import dataset_class
from recbole_ssm.quick_start import build_model
from recbole_ssm.trainer import get_trainer

ROOT = Path(__file__).parents[2]
WAYS = {"RecBole": "SASRec", "recbole_ssm": "Mamba4Rec"}
STAGES = ("read_and_filter_s", "rows_s", "split_s")
MOST_ROUNDS = 3
GENERATED = "generated"
GENERATED_ITEMS = 50_000
MEAN_LENGTH = 100
LINES_AT_A_TIME = 1_000_000
FIVE_CORE = {"user_inter_num_interval": "[5,inf)", "item_inter_num_interval": "[5,inf)"}


def measure(arguments: argparse.Namespace, earlier: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """RecBole's way beside ours, then ours on a large generated set."""
    count = min(MOST_ROUNDS, arguments.rounds)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(count):
        for way, results in runs.items():
            results.append(_in_new_process(arguments, way))
            stages = ", ".join(f"{stage} {results[-1][stage]:.3g}" for stage in STAGES)
            print(f"data, {way}: {stages}, peak {results[-1]['peak_bytes'] / 2**20:.0f} MiB", flush=True)
    totals = {way: [sum(run[stage] for stage in STAGES) for run in results] for way, results in runs.items()}
    rows = [
        {
            "way": way,
            **{stage: spread([run[stage] for run in results]) for stage in STAGES},
            "total_s": spread(totals[way]),
            "ratio": spread([r / own for r, own in zip(totals["RecBole"], totals[way], strict=True)]),
            "before_bytes": max(run["before_bytes"] for run in results),
            "peak_bytes": max(run["peak_bytes"] for run in results),
            "targets": results[0]["targets"],
        }
        for way, results in runs.items()
    ]
    config = config_of(arguments, "Mamba4Rec", {})
    yield {
        "settings": recorded(config, arguments.dataset),
        "protocol": {
            "timing": f"median of {count} rounds, each way once a round in a process of its own; ratios are medians "
            "over rounds; the file was read before, so it lies in the system's cache",
            "stages": "read and filter: the dataset's constructor; rows: data_augmentation; split: the rest of "
            "data_preparation, leave-one-out and the loaders",
            "RecBole": "its own SequentialDataset and loaders, of the three columns that our Config loads",
            "memory": "most of the process that was resident at once; before: after all imports and the configuration",
        },
        "rows": rows,
        "generated": _generated(arguments) if arguments.interactions else None,
    }


def _generated(arguments: argparse.Namespace) -> dict[str, Any]:
    """A set too large for copied prefixes: ours from the file to trained steps; RecBole's rows reckoned."""
    folder = Path("generated_data")
    users = max(2, arguments.interactions // MEAN_LENGTH)
    begin = time.perf_counter()
    path = write_interactions(folder, arguments.interactions, users, min(GENERATED_ITEMS, arguments.interactions // 10))
    print(f"data: {path.stat().st_size / 2**20:.0f} MiB written in {time.perf_counter() - begin:.0f} s", flush=True)
    large = argparse.Namespace(**vars(arguments))
    large.dataset, large.data_path = GENERATED, str(folder)
    large.settings = {**FIVE_CORE, **arguments.settings}
    found = _in_new_process(large, "recbole_ssm", arguments.train_steps)
    path.unlink()
    config = config_of(large, "Mamba4Rec", {})
    length = config["MAX_ITEM_LIST_LENGTH"]
    print(f"data, generated: {found}", flush=True)
    return {
        "settings": recorded(config, GENERATED)
        | {
            "model": "Mamba4Rec",
            "train_batch_size": config["train_batch_size"],
            "interactions": arguments.interactions,
            "users": users,
            "item_distribution": "Zipf, exponent 1",
        },
        **found,
        "recbole_estimate": {
            "row_bytes": found["rows"] * length * 8,
            "how": f"an estimate: {found['rows']} rows x {length} item ids of 8 bytes; neither the timestamps, which "
            "RecBole copies too, nor the copies that its split makes are in it",
        },
    }


def write_interactions(folder: Path, interactions: int, users: int, items: int, seed: int = 0) -> Path:
    """Write an atomic file in order of time.

    A user has 5 items and more by a geometric distribution; an item is drawn with a probability that falls as
    1 over its rank.
    """
    generator = np.random.default_rng(seed)
    share = generator.geometric(1 / max(1.0, interactions / users - 5), users) + 5.0
    length = np.floor(share * (interactions / share.sum())).astype(np.int64)
    length[: interactions - length.sum()] += 1
    user = np.repeat(np.arange(users, dtype=np.int32), length)
    generator.shuffle(user)
    chance = np.cumsum(1 / np.arange(1, items + 1))
    name = generator.permutation(items)
    path = folder / GENERATED / f"{GENERATED}.inter"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for begin in range(0, len(user), LINES_AT_A_TIME):
            some = user[begin : begin + LINES_AT_A_TIME].tolist()
            item = name[np.searchsorted(chance, generator.random(len(some)) * chance[-1])].tolist()
            lines = zip(some, item, range(1_600_000_000 + begin, 1_600_000_000 + begin + len(some)), strict=True)
            file.writelines(f"{u}\t{i}\t{t}\n" for u, i, t in lines)
    return path


def _in_new_process(arguments: argparse.Namespace, way: str, train_steps: int = 0) -> dict[str, Any]:
    """What :func:`child` finds in a fresh interpreter."""
    job = {key: getattr(arguments, key) for key in ("dataset", "data_path", "settings")}
    words = [sys.executable, "-c", "from benchmarks.speed.data import child; child()"]
    words.append(json.dumps({**job, "way": way, "train_steps": train_steps}))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def child() -> None:
    """Do the job that the command line gives as JSON, and print what it took as JSON."""
    hush()
    job = json.loads(sys.argv.pop())
    way, steps = job.pop("way"), job.pop("train_steps")
    config = config_of(argparse.Namespace(**job), WAYS[way], {})
    cls: Any = SequentialDataset if way == "RecBole" else dataset_class(config)

    found: dict[str, Any] = {}

    class Timed(cls):
        def data_augmentation(self):
            begin = time.perf_counter()
            super().data_augmentation()
            found.update(rows_s=time.perf_counter() - begin, rows=len(self.inter_feat))

    found["before_bytes"] = resident("VmRSS")
    begin = time.perf_counter()
    dataset = Timed(config)
    loaded = time.perf_counter()
    prepare = recbole_data_preparation if way == "RecBole" else data_preparation
    train_data, valid_data, _ = prepare(config, dataset)
    found |= {
        "read_and_filter_s": loaded - begin,
        "split_s": time.perf_counter() - loaded - found["rows_s"],  # RecBole makes the rows when it splits
        "targets": len(train_data._dataset),
        "peak_bytes": resident("VmHWM"),
    }
    if steps:
        model = build_model(config, train_data)
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
        training = Steps(Contender(way, config, train_data, valid_data, model, trainer))
        training.take()  # compile, tune, warm up
        training.steps = steps
        begin = time.perf_counter()
        training.take()
        taken = time.perf_counter() - begin
        found["training"] = {
            "steps": steps,
            "targets_per_s": training.num_targets / taken,
            "items": model.n_items - 1,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "peak_bytes": resident("VmHWM"),
            "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        }
    print(json.dumps(found))
