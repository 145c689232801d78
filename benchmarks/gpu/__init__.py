"""``python -m benchmarks gpu PART``: all that a machine with a GPU is needed for, in parts of minutes.

A part is made of cases, each in a process of its own or one of several in one that is started anew where it dies
(:mod:`benchmarks.gpu.jobs`). Its result file is written after every case, its table printed last.
"""

import argparse
import json
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu.jobs import Row, run
from benchmarks.report import markdown_table, versions, write_section

ROOT = Path(__file__).parents[2]

# The most telling first; each is a module of this package, with LIMIT_S, PROTOCOL, stages() and table().
PARTS = ("check", "steps", "ops", "peers", "train")
REPORT = "report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("part", choices=(*PARTS, REPORT), help="report: the tables of all result files, into the page")
    parser.add_argument("--data_path", type=Path, default=Path("dataset"), help="folder that holds the dataset's")
    parser.add_argument("--dataset", default="ml-1m", help="of all parts but ops")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the script itself")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few steps: to try the script itself")
    parser.add_argument("--models", nargs="+", help="only these, of steps and train; of check the steps")
    parser.add_argument("--settings", nargs="+", default=[], metavar="KEY=VALUE", help="of every configuration")
    parser.add_argument("--ssd4rec", type=Path, help="checkout of SSD4Rec's released code, of peers (mamba_ssm)")
    parser.add_argument("--mamba4rec", type=Path, help="checkout of Mamba4Rec's released code, of peers (mamba_ssm)")
    parser.add_argument("--limit", type=float, help="seconds that the part may take; its own by default")
    parser.add_argument("--results", type=Path, help="folder for result files; benchmarks/results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md", help="page of report")
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Measure one part, write its result file, and print its table."""
    from benchmarks.environment import slug

    folder = arguments.results or ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.part == REPORT:
        report(folder, arguments.page)
        return
    found = measure(arguments, folder / f"gpu-{arguments.part}-{slug()}.json")
    print(f"\n{table(found)}")
    if not found["rows"]:
        raise SystemExit(f"{arguments.part}: nothing was measured")


def measure(arguments: argparse.Namespace, output: Path) -> dict[str, Any]:
    """All cases of a part, as they are written to ``output``."""
    import torch

    from benchmarks.environment import environment
    from recbole_ssm.ops.self_check import hardware

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use; --device cpu --quick tries the script itself")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and with it what it has started
    part = import_module(f"benchmarks.gpu.{arguments.part}")
    about: Row = {
        "device": arguments.device,
        "quick": arguments.quick,
        "dataset": arguments.dataset,
        "data_path": str(arguments.data_path.resolve()),
        "settings": dict(setting.split("=", 1) for setting in arguments.settings),
        "models": arguments.models,
        "checkouts": {
            name: str(folder.resolve())
            for name, folder in (("SSD4Rec", arguments.ssd4rec), ("Mamba4Rec", arguments.mamba4rec))
            if folder is not None
        },
    }
    where = environment()
    # A copy of the tree on another machine may have no repository.
    where["commit"] = os.environ.get("COMMIT") or where["commit"]
    device = {} if arguments.device == "cpu" else hardware("cuda:0")
    limit = arguments.limit or part.LIMIT_S
    found: dict[str, Any] = {
        "part": arguments.part, "environment": where | device, "settings": {k: about[k] for k in SETTINGS},
        "protocol": part.PROTOCOL, "limit_s": limit, "seconds": 0.0, "rows": [],
    }  # fmt: skip
    begin = time.monotonic()

    def keep(row: Row) -> None:
        found["rows"].append(row)
        found["seconds"] = time.monotonic() - begin
        output.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{found['seconds']:6.1f} s  {_line(row)}", flush=True)

    for lanes, at_once in part.stages(about):
        run(lanes, keep, at_once, begin + limit)
    print(f"written: {output}")
    return found


SETTINGS = ("device", "quick", "dataset", "settings", "models")


def _line(row: Row) -> str:
    told = {name: value for name, value in row.items() if name not in ("log", "results", "state") and value is not None}
    return f"{row['state']}: " + ", ".join(f"{name} {_number(value)}" for name, value in told.items())


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(found: dict[str, Any]) -> str:
    """A part's rows as Markdown, with where and how they were measured."""
    about = found["environment"]
    part = import_module(f"benchmarks.gpu.{found['part']}")
    lines = [f"#### `gpu {found['part']}` on {about['device']}", ""]
    told = [versions(about), *([f"driver {about['driver']}"] if "driver" in about else [])]
    lines += [f"Commit {about['commit']}, {about['date']}; {', '.join(told)}. {found['seconds']:.0f} s.", ""]
    lines += part.table(found["rows"])
    lines += ["", *failures(found["rows"])]
    return "\n".join([*lines, *(f"- {name}: {text}." for name, text in found["protocol"].items())])


def failures(rows: list[Row]) -> list[str]:
    """A line for each case that has no result, and one for all that no time was left for."""
    bad = [row for row in rows if row["state"] not in ("done", "left out")]
    lines = [f"- **{row['state']}**: {_line({**row, 'state': ''})[2:]}." for row in bad]
    left_out = sum(row["state"] == "left out" for row in rows)
    return lines + [f"- **left out**, for want of time: {left_out} of {len(rows)} cases."] * bool(left_out)


def grid(heads: list[str], rows: list[list[Any]]) -> list[str]:
    """A Markdown table; None is an empty cell."""
    cells = [["" if cell is None else _number(cell) for cell in row] for row in rows]
    return markdown_table(heads, cells, text=range(len(heads)))


def report(folder: Path, page: Path) -> None:
    """Write the tables of all result files in ``folder`` into ``page``, a section a device."""
    sections: dict[str, list[str]] = {}
    for part in PARTS:
        for file in sorted(folder.glob(f"gpu-{part}-*.json")):
            device = file.stem.removeprefix(f"gpu-{part}-")
            sections.setdefault(device, []).append(table(json.loads(file.read_text())))
    for device, tables in sections.items():
        write_section(page, f"gpu {device}", "\n\n".join([f"### On a GPU: {device}", *tables]))
    print(f"written: {page} ({', '.join(sections) or 'there are no result files'})")
