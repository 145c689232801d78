"""``python -m benchmarks history``: what each change gave, several commits of this repository measured in turns."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
# The losses without logits, before and after; scans and gates at the rows that are read, and data by array operations.
COMMITS = ("9d61176", "d3d651a", "3b9d540")
STEPS, REPEATS = 12, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--commits", nargs="+", default=COMMITS, help="oldest first")
    parser.add_argument("--datasets", nargs="+", default=["ml-1m", "amazon-beauty"])
    parser.add_argument("--models", nargs="+", default=["STARRec", "Mamba4Rec"])
    parser.add_argument("--data_path", type=Path, default=Path("dataset"), help="folder that holds the datasets")
    parser.add_argument("--rounds", type=int, default=2, help="of all commits, one after the other")
    parser.add_argument("--output", type=Path, help="result file; benchmarks/results/history-<device>.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md", help="page for the table")
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Measure each commit in a process of its own, and write the result file and its table."""
    from benchmarks.environment import environment, slug
    from benchmarks.report import write_section

    probe = json.dumps([str(arguments.data_path.resolve()), arguments.datasets, arguments.models])
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        # Away from this folder, whose modules an older commit's code must not find.
        script = Path(scratch, "probe.py")
        script.write_text(Path(__file__).read_text())
        for _ in range(arguments.rounds):
            for commit in arguments.commits:
                tree = Path(scratch, commit)
                if not tree.exists():
                    subprocess.run(["git", "worktree", "add", "--detach", tree, commit, "-q"], cwd=ROOT, check=True)
                done = subprocess.run(
                    [sys.executable, "-W", "ignore", script, probe], cwd=scratch, check=True, text=True,
                    stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(tree)},
                )  # fmt: skip
                for case, values in json.loads(done.stdout.splitlines()[-1]).items():
                    found.setdefault(case, {}).setdefault(commit, []).append(values)
                    print(f"{commit}, {case}: {values}", flush=True)
    subprocess.run(["git", "worktree", "prune"], cwd=ROOT, check=True)
    subjects = {commit: _subject(commit) for commit in arguments.commits}
    about = environment()
    output = arguments.output or ROOT / "benchmarks" / "results" / f"history-{slug()}.json"
    output.write_text(json.dumps({"environment": about, "commits": subjects, "cases": found}, indent=1) + "\n")
    write_section(arguments.page, f"history {slug()}", _table(found, subjects, about, arguments.rounds))
    print(f"written: {output} and {arguments.page}")


def _subject(commit: str) -> str:
    line = subprocess.run(
        ["git", "log", "-1", "--format=%h %s", commit], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return line.stdout.strip()


def _table(found: dict[str, Any], subjects: dict[str, str], about: dict[str, Any], rounds: int) -> str:
    from benchmarks.report import markdown_table

    lines = [
        f"### What each change gave, on {about['device']}",
        "",
        f"`python -m benchmarks history`, {about['date']}: each commit in a process of its own, {rounds} rounds in "
        f"turns, the least of them. A step is the trainer's own, median of {REPEATS} times {STEPS}, with the "
        "package's settings for the set; loading is reading, filtering and splitting; evaluation ranks all users of "
        "the validation set.",
        "",
    ]
    rows = []
    for case, commits in found.items():
        for commit, runs in commits.items():
            best = [min(run[key] for run in runs) for key in ("step_ms", "load_s", "eval_s")]
            rows.append([case, subjects[commit], *(f"{value:.3g}" for value in best)])
    heads = ["set and model", "commit", "ms a step", "s to load", "s to evaluate"]
    return "\n".join(lines + markdown_table(heads, rows, text=(0, 1)))


class _First:
    """A loader's first batches."""

    num_targets = 1

    def __init__(self, loader: Any, count: int):
        self.loader, self.count = loader, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        for _, batch in zip(range(self.count), self.loader, strict=False):
            yield batch


def _probe(data_path: str, datasets: list[str], models: list[str]) -> dict[str, dict[str, float]]:
    """Figures of the ``recbole_ssm`` that this process finds, which may be an older one than this file."""
    from recbole_ssm import Config
    from recbole_ssm.data import create_dataset, data_preparation
    from recbole_ssm.quick_start import build_model
    from recbole_ssm.trainer import get_trainer

    found = {}
    for dataset in datasets:
        for name in models:
            quiet = {"data_path": data_path, "state": "ERROR", "show_progress": False}
            config = Config(name, dataset, config_dict=quiet)
            begin = time.perf_counter()
            train_data, valid_data, _ = data_preparation(config, create_dataset(config))
            load_s = time.perf_counter() - begin
            trainer = get_trainer(config["MODEL_TYPE"], name)(config, build_model(config, train_data))
            trainer._train_epoch(_First(train_data, 3), 0)  # compile, warm up
            step_s = median(_seconds(lambda t=trainer, d=train_data: t._train_epoch(_First(d, STEPS), 0)))
            trainer.eval_collector.data_collect(train_data)
            eval_s = median(_seconds(lambda t=trainer, d=valid_data: t.evaluate(d, load_best_model=False)))
            found[f"{dataset}, {name}"] = {"step_ms": step_s / STEPS * 1e3, "load_s": load_s, "eval_s": eval_s}
    return found


def _seconds(function: Any) -> list[float]:
    taken = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        function()
        taken.append(time.perf_counter() - begin)
    return taken


if __name__ == "__main__":
    arguments = json.loads(sys.argv.pop())
    print(json.dumps(_probe(*arguments)))
