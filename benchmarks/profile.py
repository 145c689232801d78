"""``python -m benchmarks profile``: where the time of a training epoch goes, beside the least that it could take."""

import argparse
import importlib.util
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from recbole.utils import init_seed
from torch.profiler import ProfilerActivity, profile

from benchmarks import floors
from benchmarks.environment import environment, slug
from benchmarks.floors import Cost, Rates, measure_rates
from benchmarks.parts import FirstBatches, Share, attribute, ranges
from benchmarks.report import profile_table, write_section
from recbole_ssm import Config
from recbole_ssm.quick_start import build_model, load_data
from recbole_ssm.registry import MODELS
from recbole_ssm.trainer import get_trainer

HERE = Path(__file__).parent
WARM_UP_STEPS = 3
ROUNDS = 4  # so that steps with and without the profiler meet the same noise
# The order in which they are told; idle is a GPU's.
PARTS = (
    "loading", "embedding", "scan", "convolution", "attention", "experts", "layers", "loss", "optimizer", "other",
    "idle",
)  # fmt: skip

PROTOCOL = {
    "steps": f"the trainer's own, after warm-up: {ROUNDS} rounds, each on an epoch's first batches, first without the "
    "profiler and then with it; a step's time is that without",
    "parts on a CPU": "each event's own time, scaled by the steps' time without the profiler over that with it; other "
    "is what is left of the step: gradients summed up, the trainer, Python between the parts",
    "parts on a GPU": "time of the kernels, not scaled; idle is the step's time less that of all kernels; host is the "
    "time of the process that launches them, its waiting included",
    "backward": "belongs to the part that the differentiated op ran in",
    "attention, experts": "whole layers, projections and LayerNorm included; scan and convolution are the ops alone",
    "epoch": "a step's time by the loader's number of batches",
    "evaluation": "trainer.evaluate on the validation set, after one evaluation for warm-up",
    "floor": "the larger of arithmetic, at the rate of the fastest of several large matrix products, and bytes, at "
    "that of the fastest of several copies; both are measured in the same run",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["STARRec", "Mamba4Rec"], help="which models")
    parser.add_argument("--dataset", default="ml-1m", help="dataset")
    parser.add_argument("--data_path", type=Path, help="folder with the dataset's folder; RecBole's default: dataset")
    parser.add_argument("--steps", type=int, default=20, help=f"training steps, in {ROUNDS} rounds")
    parser.add_argument("--settings", nargs="+", default=[], metavar="key=value", help="further settings of the models")
    parser.add_argument("--output", type=Path, help="result file; benchmarks/results/profile-<device>.json")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "benchmarks.md", help="page for the table")
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Measure, and write the result file, its table and its picture."""
    if importlib.util.find_spec("matplotlib") is None:  # told before anything is measured
        raise SystemExit("the picture needs matplotlib: pip install 'recbole-ssm[bench]'")
    from benchmarks.plots import stacked_bars

    settings = dict(word.split("=", 1) for word in arguments.settings)
    if arguments.data_path is not None:
        settings["data_path"] = str(arguments.data_path)
    found: dict[str, Any] = {
        "environment": environment(),
        "protocol": PROTOCOL,
        "floors": floors.FLOORS,
        "models": [profile_model(name, arguments.dataset, arguments.steps, settings) for name in arguments.models],
    }
    output = arguments.output or HERE / "results" / f"profile-{slug()}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + "\n")
    picture = arguments.page.parent / "images" / f"profile-{slug()}.svg"
    title = (
        f"One epoch on {arguments.dataset} and one evaluation, and their floors, on {found['environment']['device']}"
    )
    stacked_bars(picture, title, bars(found["models"]), "seconds")
    table = profile_table(found, f"images/{picture.name}")
    write_section(arguments.page, f"profile {slug()}", table)
    print(f"{table}\n\nwritten: {output}, {arguments.page} and {picture}")


def profile_model(name: str, dataset: str, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything about one model: its settings, the parts of a step, and an evaluation."""
    # A replayed step has no parts that a profiler could tell apart.
    plain = {"show_progress": False, "tuned": False, "cuda_graphs": "off"}
    config = Config(name, dataset, config_dict={**plain, **settings})
    init_seed(config["seed"], config["reproducibility"])
    _, (train_data, valid_data, _) = load_data(config)
    model = build_model(config, train_data)
    trainer = get_trainer(config["MODEL_TYPE"], name)(config, model)
    device = config["device"].type
    dtype = trainer.amp_dtype if config["enable_amp"] else torch.float32
    rates = measure_rates(device, dtype)
    taken = measure_steps(trainer, train_data, steps, dtype.itemsize)
    taken.costs["optimizer"] += floors.optimizer(model, config["learner"]) * taken.steps
    told = ("MAX_ITEM_LIST_LENGTH", "num_layers", "hidden_size", "train_mode", "train_batch_size", "loss_type", "seed")
    return {
        "model": name,
        "settings": {
            "dataset": dataset,
            "split": ", ".join(f"{way} {share}" for way, share in config["eval_args"]["split"].items()),
            **{key: config[key] for key in told},
            "dtype": str(dtype).removeprefix("torch."),
            "given": settings,
        },
        "operations_per_s": rates.operations_per_s,
        "copy_bytes_per_s": rates.bytes_per_s,
        "steps": taken.steps,
        "batches": len(train_data),
        "ms_per_step": taken.plain / taken.steps * 1e3,
        "profiled_ms_per_step": taken.profiled / taken.steps * 1e3,
        "seconds_per_epoch": taken.plain / taken.steps * len(train_data),
        "parts": rows(taken, len(train_data), rates, device),
        "evaluation": _evaluation(trainer, train_data, valid_data, dtype.itemsize, rates),
    }


@dataclass
class Taken:
    """What some steps have taken, all together.

    Attributes:
        steps: how many.
        plain: their seconds without the profiler.
        profiled: and with it.
        shares: what the profile says of each part.
        costs: what its ops cost beside the matrix products that the profile has seen.
    """

    steps: int
    plain: float
    profiled: float
    shares: dict[str, Share]
    costs: dict[str, Cost]


def measure_steps(trainer: Any, train_data: Any, steps: int, itemsize: int) -> Taken:
    """Train for about ``steps`` steps with the profiler, and as many without.

    Args:
        trainer: a :class:`recbole_ssm.trainer.SequenceTrainer`.
        train_data: the training loader.
        steps: rounded up to whole rounds; a round has no more than an epoch.
        itemsize: bytes a number that matrix products work on.
    """
    in_round = min(math.ceil(steps / ROUNDS), len(train_data))
    costs: dict[str, Cost] = defaultdict(Cost)
    _train(trainer, train_data, 0, min(WARM_UP_STEPS, len(train_data)))
    with ranges(trainer.model, costs), _profile(trainer.device.type):
        _train(trainer, train_data, 0, 1)
    costs.clear()
    plain = profiled = 0.0
    events = []
    for epoch in range(ROUNDS):
        plain += _train(trainer, train_data, epoch, in_round).seconds
        with ranges(trainer.model, costs), _profile(trainer.device.type) as profiler:
            batches = _train(trainer, train_data, epoch, in_round)
        profiled += batches.seconds
        costs["loading"] += Cost(0.0, 2.0 * batches.bytes)
        events += profiler.events()
    return Taken(ROUNDS * in_round, plain, profiled, attribute(events, itemsize), costs)


def _train(trainer: Any, train_data: Any, epoch: int, count: int) -> FirstBatches:
    """Take the first ``count`` steps of an epoch."""
    batches = FirstBatches(train_data, count)
    trainer._train_epoch(batches, epoch)
    return batches


def _profile(device: str) -> profile:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    return profile(activities=activities, record_shapes=True)


def rows(taken: Taken, batches: int, rates: Rates, device: str) -> list[dict[str, Any]]:
    """A row a part, in the order of :data:`PARTS`; their times sum to the step's.

    Args:
        taken: what the steps took.
        batches: of an epoch.
        rates: the machine's.
        device: ``cpu`` or ``cuda``.
    """
    if device == "cuda":
        seconds = {part: share.device for part, share in taken.shares.items()}
        seconds["idle"] = taken.plain - sum(seconds.values())
    else:
        scale = taken.plain / taken.profiled
        seconds = {part: share.host * scale for part, share in taken.shares.items() if part != "other"}
        seconds["other"] = taken.plain - sum(seconds.values())
    found = []
    for part in (part for part in PARTS if part in seconds):
        share, a_step = taken.shares.get(part, Share()), seconds[part] / taken.steps
        row: dict[str, Any] = {"part": part, "ms_per_step": a_step * 1e3, "seconds_per_epoch": a_step * batches}
        row["share"] = seconds[part] / taken.plain
        if device == "cuda":
            row["host_ms_per_step"] = share.host / taken.steps * 1e3
        if part in floors.FLOORS:
            cost = (taken.costs[part] + share.products) * (batches / taken.steps)
            row |= _floor(row["seconds_per_epoch"], cost, rates)
        found.append(row)
    return found


def _floor(seconds: float, cost: Cost, rates: Rates) -> dict[str, Any]:
    floor, decided_by = rates.floor(cost)
    return {"floor_seconds": floor, "floor_by": decided_by, "times_the_floor": seconds / floor if floor else None}


def _evaluation(trainer: Any, train_data: Any, valid_data: Any, itemsize: int, rates: Rates) -> dict[str, Any]:
    trainer.eval_collector.data_collect(train_data)
    costs: dict[str, Cost] = defaultdict(Cost)
    with ranges(trainer.model, costs), _profile(trainer.device.type) as profiler:
        trainer.evaluate(valid_data, load_best_model=False)
    trainer.evaluate(valid_data, load_best_model=False)
    seconds = trainer.timings.eval_seconds[-1]
    products = [share.products for share in attribute(profiler.events(), itemsize).values()]
    floor = _floor(seconds, sum([*costs.values(), *products], Cost()), rates)
    return {"rows": len(valid_data._dataset), "seconds": seconds, **floor}


def bars(models: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds of an epoch's parts and of an evaluation, and below them their floors, for each model."""
    groups: dict[str, dict[str, float]] = {}
    for found in models:
        parts = [*found["parts"], {**found["evaluation"], "part": "evaluation"}]
        groups[found["model"]] = {row["part"]: row.get("seconds_per_epoch", row.get("seconds")) for row in parts}
        groups["floor of " + found["model"]] = {
            row["part"]: row["floor_seconds"] for row in parts if "floor_seconds" in row
        }
    return groups
