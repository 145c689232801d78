"""The models beside their authors' code, and SASRec beside RecTools': equal outputs first, then speed."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu import grid
from benchmarks.gpu.jobs import Lane, Row
from benchmarks.gpu.subjects import PRECISIONS, arguments_of, built
from benchmarks.peers.client import RECTOOLS, Peer
from benchmarks.speed.authors import (
    MAMBA4REC_NAMES,
    SSD4REC_NAMES,
    copy_weights,
    deviation,
    released_mamba4rec,
    released_ssd4rec,
)
from benchmarks.speed.batches import Trained, best_batch, choose_steps, of_round
from benchmarks.speed.contenders import Contender, Steps, ratios, wall_rounds

LIMIT_S = 70.0
AGREES = 1e-3
PROTOCOL = {
    "off": "largest deviation of all items' scores for a batch of users, their model with our weights, relative to "
    f"the largest score; a ratio is told up to {AGREES:g}",
    "targets_per_s": "median of rounds in which all take their turn, by the clock on the wall, loading included; "
    "ratios are medians over rounds",
    "rows": "SSD4Rec: both one target a row, 1,024 a step. Mamba4Rec: theirs 2,048 padded rows a step, ours the same "
    "rows packed, and whole histories",
    "RecTools": "SASRecModel, softmax over all items, whole histories, in a process of its own at the fastest of a few "
    "batches; its loss counts each history's latest 200 targets",
}


def stages(about: Row) -> Iterator[tuple[list[Lane], int]]:
    """A process a peer."""
    cases = [{"peer": name} for name in ("SSD4Rec", "Mamba4Rec") if name in about["checkouts"]]
    cases += [{"peer": "RecTools"}] * (importlib.util.find_spec("rectools") is not None)
    yield [Lane(f"{__name__}:measure_peer", (case,), about, 80.0) for case in cases], 1


def measure_peer(about: Row, peer: str) -> Row:
    """One peer's rate beside ours."""
    return {"SSD4Rec": _ssd4rec, "Mamba4Rec": _mamba4rec, "RecTools": _rectools}[peer](about)


def _ssd4rec(about: Row) -> Row:
    batch: dict[str, Any] = {"train_batch_size": 64} if about["quick"] else {}
    theirs = released_ssd4rec(arguments_of(about), Path(about["checkouts"]["SSD4Rec"]), **batch)
    ours = {f"ours, {p}": built(about, "SSD4Rec", p, **batch) for p in PRECISIONS[: 1 if about["quick"] else 2]}
    copy_weights(ours["ours, float32"].model, theirs.model, SSD4REC_NAMES)
    return _compared(about, theirs, ours)


def _mamba4rec(about: Row) -> Row:
    batch: dict[str, Any] = {"train_batch_size": 64} if about["quick"] else {}
    theirs = released_mamba4rec(arguments_of(about), Path(about["checkouts"]["Mamba4Rec"]), **batch)
    ours = {"ours, the same rows": built(about, "Mamba4Rec", train_mode="prefix", **batch)}
    copy_weights(ours["ours, the same rows"].model, theirs.model, MAMBA4REC_NAMES)
    if not about["quick"]:
        ours |= {f"ours, whole histories, {p}": built(about, "Mamba4Rec", p) for p in PRECISIONS}
    return _compared(about, theirs, ours)


def _compared(about: Row, theirs: Contender, ours: dict[str, Contender]) -> Row:
    """How far theirs is from the first of ours, and the rates of all."""
    off = deviation(next(iter(ours.values())), theirs)
    steps = {name: Steps(contender) for name, contender in {"theirs": theirs, **ours}.items()}
    for name, step in steps.items():
        step.steps = 2 if about["quick"] else 12
        step.take()  # compile, tune, capture
        step.steps = 1 if about["quick"] else 4
        taken = wall_rounds({name: step.take}, 1)[name][0] / step.steps
        step.steps = 1 if about["quick"] else max(2, min(50, round(0.7 / taken)))
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(2 if about["quick"] else 5):
        for name, times in wall_rounds({name: step.take for name, step in steps.items()}, 1).items():
            rates[name].append(steps[name].num_targets / times[0])
    ratio = {name: found["median"] for name, found in ratios(rates, "theirs").items()}
    return {
        "off": off,
        "targets_per_s": {name: median(found) for name, found in rates.items()},
        "times_as_fast": ratio if off <= AGREES else None,
    }


def _rectools(about: Row) -> Row:
    """RecTools' SASRec, as large as ours and as RecBole's, whole histories, at its own best batch."""
    ours = built(about, "SASRec")
    cuda = about["device"] == "cuda"
    step = Steps(ours)
    step.steps = 2 if about["quick"] else 50
    step.take()
    step.take()
    with Peer(RECTOOLS, sys.executable, ours.config, ours.train_data, cuda) as peer:
        best_batch(peer, [16] if about["quick"] else [32, 128, 512], cuda)
        choose_steps(peer, 1.0)
        contenders: dict[str, Trained] = {"theirs": peer, "ours, float32": step}
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(1 if about["quick"] else 5):
            for name, each in contenders.items():
                rates[name].append(of_round(each))
    return {
        "off": None,
        "targets_per_s": {name: median(found) for name, found in rates.items()},
        "times_as_fast": {name: found["median"] for name, found in ratios(rates, "theirs").items() if name != "theirs"},
    }


def table(rows: list[Row]) -> list[str]:
    """A line a contender."""
    cells = []
    for row in (row for row in rows if row["state"] == "done"):
        ratio = row["times_as_fast"] or {}
        for name, rate in row["targets_per_s"].items():
            cells.append([row["peer"], name, rate, ratio.get(name) if name != "theirs" else None, row["off"]])
    return grid(["peer", "contender", "targets_per_s", "times as fast", "off"], cells)
