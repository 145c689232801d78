"""``python -m benchmarks search``: trials side by side against the same trials one after the other."""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import markdown_table

ROOT = Path(__file__).parents[1]
SETTINGS = {"epochs": 3, "train_batch_size": 512, "show_progress": False, "state": "ERROR"}
SPACE = {"learning_rate": [0.001, 0.002], "dropout_prob": [0.1, 0.2]}

# Cores of a trial, and trials at a time.
WAYS = {
    "one at a time, on one core": (1, 1),
    "one at a time, on two cores": (2, 1),
    "two at a time, a core each": (1, 2),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--model", default="STARRec")
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path", type=Path, default=Path("dataset"), help="folder that holds the datasets")
    parser.add_argument("--rounds", type=int, default=3, help="of all ways, one after the other")
    parser.add_argument("--output", type=Path, help="result file; benchmarks/results/search-<device>.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md", help="page for the table")
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Time a grid of four trials each way, in turns, and write the result file and its table."""
    from benchmarks.environment import environment, slug
    from benchmarks.report import versions, write_section
    from recbole_ssm.distributed.ray_cluster import start_ray
    from recbole_ssm.search import tune

    start_ray()
    settings = {**SETTINGS, "data_path": str(arguments.data_path.resolve())}

    def search(cores: int, at_once: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            tune(
                arguments.model, arguments.dataset, None, settings, space=SPACE, algorithm="grid", scheduler="none",
                cpus_per_trial=cores, max_concurrent=at_once, storage_path=folder,
            )  # fmt: skip
            return time.perf_counter() - begin

    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way, (cores, at_once) in WAYS.items():
            taken[way].append(search(cores, at_once))
            print(f"{way}: {taken[way][-1]:.0f} s", flush=True)
    about = environment()
    found = {"environment": about, "settings": SETTINGS, "space": SPACE, "seconds": taken}
    found |= {"model": arguments.model, "dataset": arguments.dataset}
    output = arguments.output or ROOT / "benchmarks" / "results" / f"search-{slug()}.json"
    output.write_text(json.dumps(found, indent=1) + "\n")
    title = f"### A search's trials, side by side, on {about['device']}"
    head = f"Commit {about['commit']}, {about['date']}; {versions(about)}. `python -m benchmarks search`."
    write_section(arguments.page, f"search {slug()}", f"{title}\n\n{head}\n\n{_table(found)}")
    print(f"written: {output} and {arguments.page}")


def _table(found: dict[str, Any]) -> str:
    seconds = found["seconds"]
    rounds = len(next(iter(seconds.values())))
    lines = [
        f"Four trials of {found['model']} on {found['dataset']}, {found['settings']['epochs']} epochs each, without "
        f"early stopping; Ray runs already. Rounds in which all three take turns: {rounds}.",
        "",
    ]
    rows = []
    for way, times in seconds.items():
        ratio = median(other / own for other, own in zip(next(iter(seconds.values())), times, strict=True))
        rows.append([way, f"{median(times):.0f}", f"{ratio:.2f}"])
    heads = ["trials", "seconds", "times as fast as one at a time, on one core"]
    return "\n".join(lines + markdown_table(heads, rows))
