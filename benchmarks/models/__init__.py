"""``python -m benchmarks models``: RecBole's models here and, where it is given, in its old environment."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--models", nargs="+", help="some of RecBole's; all without it")
    parser.add_argument("--old", type=Path, metavar="PYTHON", help="of an environment with RecBole 1.2.0 and its NumPy")
    parser.add_argument("--output", type=Path, help="result file; benchmarks/results/models-<device>.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "recbole_models.md", help="page for the table")
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Run, compare, ask for sequence mode, and write the result file and its table."""
    from benchmarks.environment import environment, slug
    from benchmarks.models import jobs, report
    from benchmarks.report import write_section
    from recbole_ssm.errors import UserError

    families = jobs.families()
    if unknown := set(arguments.models or ()) - families.keys():
        raise UserError(f"RecBole has no model {', '.join(sorted(unknown))}.")
    chosen = {name: family for name, family in families.items() if name in (arguments.models or families)}
    stages = {name: jobs.stages(name, family) for name, family in chosen.items()}
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, name) for name in ("here", "old", "unfused")]
        for folder in folders:
            jobs.write_dataset(folder)
        here, about_here = run(sys.executable, folders[0], stages)
        old, about_old = run(str(arguments.old), folders[1], stages, alone=True) if arguments.old else ({}, None)
        # The optimizer's fused step rounds otherwise than RecBole's: by RecBole's these must be equal.
        again = {name: stages[name] for name in here if report.differ(here[name], old.get(name))}
        unfused = run(sys.executable, folders[2], again, fused=False)[0] if again else {}
        modes = {name: jobs.sequence_mode(name, folders[0]) for name in chosen if chosen[name] == "sequential"}
    found = {
        name: {
            "family": family, "here": here[name], "old": old.get(name), "unfused": unfused.get(name),
            "sequence_mode": modes.get(name),
        }
        for name, family in chosen.items()
    }  # fmt: skip
    about = environment()
    output = arguments.output or ROOT / "benchmarks" / "results" / f"models-{slug()}.json"
    result = {"environment": about, "versions": {"here": about_here, "old": about_old}, "models": found}
    output.write_text(json.dumps(result, indent=1) + "\n")
    write_section(arguments.page, "models", report.table(result))
    print(f"written: {output} and {arguments.page}")


def run(
    python: str, folder: Path, stages: dict[str, list[dict[str, Any]]], alone: bool = False, fused: bool = True
) -> tuple[dict[str, Any], dict[str, str]]:
    """Train models by another Python, one after the other; one that takes its process down is no end of the others.

    Args:
        python: its command.
        folder: where the data are, and what a run writes goes.
        stages: of each model, see :func:`benchmarks.models.jobs.stages`.
        alone: whether RecBole runs alone, without this package.
        fused: whether this package's optimizers take fused steps.

    Returns:
        What came of each model, and versions of packages there.
    """
    script, job, lines = (folder / name for name in ("child.py", "job.json", "lines.jsonl"))
    shutil.copy(Path(__file__).with_name("child.py"), script)  # away from files that would hide others' modules
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    if not alone:
        environment["PYTHONPATH"] = str(ROOT)
    found: dict[str, Any] = {}
    versions: dict[str, str] = {}
    while left := {name: each for name, each in stages.items() if name not in found}:
        job.write_text(json.dumps({"alone": alone, "fused": fused, "dataset": "zoo", "models": left}))
        lines.write_text("")
        done = subprocess.run([python, "-W", "ignore", script.name, job.name, lines.name], cwd=folder, env=environment)
        for line in map(json.loads, lines.read_text().splitlines()):
            if "versions" in line:
                versions = line["versions"]
            else:
                found[line.pop("model")] = line
        if done.returncode:
            died = next(name for name in stages if name not in found)
            found[died] = {"error": f"its process ended with status {done.returncode}"}
    return found, versions
