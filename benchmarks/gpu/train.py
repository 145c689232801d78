"""Whole runs of the command: seconds, and whether what was learned is as good as on a CPU."""

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from benchmarks.gpu import ROOT, grid
from benchmarks.gpu.jobs import Lane, Row
from benchmarks.gpu.subjects import chosen

LIMIT_S = 150.0
PROTOCOL = {
    "runs": "the command run_recbole, with the package's tuned settings to their last epoch; of SSD4Rec one epoch",
    "command_s": "of the whole command, imports, data, kernels' first use, validations and test included",
    "epoch_s": "mean of the run's epochs, the first one included",
    "cpu": "mean of the study's runs on a CPU with the same settings (benchmarks/results/runs.jsonl)",
}
METRIC = "ndcg@10"
# Of the last, as its authors release it, an epoch takes as long as all of the others.
RUNS = (("STARRec", "float32"), ("Mamba4Rec", "float32"), ("SASRec", "float32"), ("SSD4Rec", "bfloat16"),
        ("STARRec", "bfloat16"), ("SSD4Rec", "float32"))  # fmt: skip


def stages(about: Row) -> Iterator[tuple[list[Lane], int]]:
    """One run after another."""
    cases = [{"model": model, "precision": precision} for model, precision in RUNS if model in chosen(about)]
    yield [Lane(f"{__name__}:train", tuple(cases), about, LIMIT_S)], 1


def train(about: Row, model: str, precision: str) -> Row:
    """Run the command."""
    settings = {
        "data_path": about["data_path"], "show_progress": False, "state": "WARNING", **about["settings"],
        **({"use_gpu": False} if about["device"] == "cpu" else {}),
        **({"enable_amp": True} if precision == "bfloat16" else {}),
        **({"epochs": 1} if model == "SSD4Rec" or about["quick"] else {}),
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in settings.items()]
    result = Path("result.json").resolve()
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "recbole_ssm", f"--model={model}", f"--dataset={about['dataset']}", *words,
         f"--result_file={result}"],
        check=True,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    found = json.loads(result.read_text())
    return {
        "command_s": seconds,
        "epochs": settings.get("epochs"),
        "epoch_s": found["train_seconds_per_epoch"],
        "targets_per_s": found["train_targets_per_second"],
        "eval_s": found["eval_seconds"],
        "peak_MiB": found.get("peak_gpu_memory_bytes", 0) / 2**20,
        METRIC: found["test_result"][METRIC],
        "best_epoch": found["best_epoch"],
        "cpu": on_a_cpu().get((model, about["dataset"])) if "epochs" not in settings else None,
    }


def on_a_cpu() -> dict[tuple[str, str], float]:
    """What the study's untouched settings reached, by model and set."""
    reached: dict[tuple[str, str], list[float]] = defaultdict(list)
    for line in (ROOT / "benchmarks" / "results" / "runs.jsonl").read_text().splitlines():
        run = json.loads(line)
        if not run["settings"]:
            reached[run["model"], run["dataset"]].append(run["test"]["all items"][METRIC])
    return {key: mean(values) for key, values in reached.items()}


def table(rows: list[Row]) -> list[str]:
    """A line a run."""
    heads = ["model", "precision", "command_s", "epoch_s", "targets_per_s", "eval_s", "peak_MiB", METRIC, "cpu"]
    cells = []
    for row in (row for row in rows if row["state"] == "done"):
        ratio = row[METRIC] / row["cpu"] if row["cpu"] else None
        cells.append([*(row[name] for name in heads), ratio])
    return grid([*heads, "over the CPU's"], cells)
