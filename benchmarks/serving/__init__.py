"""``python -m benchmarks serving``: events, answers, recommendations for all users, memory, an index, HTTP."""

import argparse
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.environment import environment, slug
from benchmarks.report import markdown_table, versions, write_section
from benchmarks.serving import answers, events, everyone, index, memory, rules, servers
from benchmarks.serving.contenders import ROOT

PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "events": events.measure,
    "answers": answers.measure,
    "everyone": everyone.measure,
    "memory": memory.measure,
    "faiss": index.measure,
    "http": servers.measure,
    "rules": rules.measure,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which comparisons")
    parser.add_argument("--histories", nargs="+", type=int, default=[10, 200, 5000], help="events before the next")
    parser.add_argument("--catalogues", nargs="+", type=int, default=[3416, 1_000_000], help="items")
    parser.add_argument("--users", nargs="+", type=int, default=[1, 64], help="at a time")
    parser.add_argument("--all_users", type=int, default=6040, help="of everyone")
    parser.add_argument("--memory_users", nargs="+", type=int, default=[10_000, 100_000, 1_000_000], help="of memory")
    parser.add_argument("--index_items", type=int, default=1_000_000, help="of faiss")
    parser.add_argument("--http_histories", nargs="+", type=int, default=[10, 200], help="events before, of http")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 64], help="of http, at a time")
    parser.add_argument("--rounds", type=int, default=200, help="at most, of all contenders, one after the other")
    parser.add_argument("--seconds", type=float, default=30.0, help="at most, of a case's rounds")
    rules.add_arguments(parser)
    parser.add_argument("--output", type=Path, help="result file; benchmarks/results/serving-<device>.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md", help="page with the tables")
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Measure, and write the result file and its tables."""
    logging.disable(logging.INFO)
    del sys.argv[1:]  # RecBole reads settings from there, and these options are none
    output = arguments.output or ROOT / "benchmarks" / "results" / f"serving-{slug()}.json"
    about = environment()
    earlier = json.loads(output.read_text()) if output.exists() else {}
    parts = earlier.get("parts", {}) if earlier.get("environment", {}).get("versions") == about["versions"] else {}
    for name in arguments.parts:
        parts[name] = {key: about[key] for key in ("commit", "date", "device")} | PARTS[name](arguments)
    found = {"environment": about, "parts": {name: parts[name] for name in PARTS if name in parts}}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + "\n")
    write_section(arguments.page, f"serving {slug()}", _tables(found))
    print(f"written: {output} and {arguments.page}")


def _tables(found: dict[str, Any]) -> str:
    about = found["environment"]
    lines = [f"### Serving on {about['device']}", "", f"{versions(about)}. `python -m benchmarks serving`."]
    for part in found["parts"].values():
        heads = list(part["rows"][0])
        elsewhere = (
            f", on {part['device']}" if part["device"] != about["device"] else ""
        )  # parts can be of several runs
        when = f"Commit {part['commit']}, {part['date']}{elsewhere}"
        lines += ["", f"#### {part['title']}", "", f"{when}. {part['settings']}.", ""]
        lines += markdown_table(heads, [list(map(str, row.values())) for row in part["rows"]])
        lines += ["", *(f"- {key}: {text}." for key, text in part["protocol"].items())]
    return "\n".join(lines)
