"""``python -m benchmarks speed``: training, evaluation, data, and how all of it grows, on the same data in one run."""

import argparse
import gc
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.environment import environment, slug
from benchmarks.peers.client import find_python
from benchmarks.report import write_section
from benchmarks.speed import accuracy, catalogue, data, evaluation, lengths, models, training
from benchmarks.speed.contenders import hush
from benchmarks.speed.tables import draw, speed_tables

ROOT = Path(__file__).parents[2]
MODELS = ("SASRec", "STARRec", "Mamba4Rec", "SSD4Rec")

# What figures must have in common to be compared; parts of one file need not.
SAME = ("device", "versions")

# Each yields its part of the result file, whenever there is something worth keeping; it is given what an earlier run
# on the same device with the same versions has yielded.
PARTS: dict[str, Callable[[argparse.Namespace, dict[str, Any]], Iterator[dict[str, Any]]]] = {
    "training": training.measure,
    "models": models.measure,
    "evaluation": evaluation.measure,
    "data": data.measure,
    "lengths": lengths.measure,
    "catalogue": catalogue.measure,
    "accuracy": accuracy.measure,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which comparisons")
    parser.add_argument("--dataset", default="ml-1m", help="of training, evaluation and data")
    parser.add_argument("--data_path", type=Path, default=Path("dataset"), help="folder that holds the datasets")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="beside RecBole's own SASRec; all that run well")
    parser.add_argument(
        "--authors_ssd4rec", type=Path, help="checkout of SSD4Rec's released code, to train beside ours (mamba_ssm)"
    )
    parser.add_argument("--rectools", metavar="PYTHON", help="of an environment with RecTools, to train its SASRec")
    parser.add_argument("--replay", metavar="PYTHON", help="of an environment with RePlay, to train its SASRec")
    parser.add_argument("--rounds", type=int, default=7, help="of all contenders, one after the other")
    parser.add_argument("--settings", nargs="+", default=[], metavar="KEY=VALUE", help="of every configuration")
    parser.add_argument("--interactions", type=int, default=10_000_000, help="of the generated set; 0 for none")
    parser.add_argument("--train_steps", type=int, default=20, help="of training on the generated set")
    parser.add_argument("--lengths", nargs="+", type=int, default=[200, 1000, 4000, 16000], help="of a sequence")
    parser.add_argument("--tokens", type=int, default=65_536, help="of all sequences together, at every length")
    parser.add_argument("--limit", type=float, default=120.0, help="leave out a length at which a call takes longer")
    parser.add_argument(
        "--catalogue", nargs="+", type=int, default=[3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000], help="items"
    )
    parser.add_argument("--accuracy_dataset", default="amazon-beauty", help="of accuracy")
    parser.add_argument("--epochs", type=int, default=8, help="of accuracy")
    parser.add_argument("--seeds", type=int, default=3, help="of accuracy")
    models.add_arguments(parser)
    parser.add_argument("--output", type=Path, help="result file; benchmarks/results/speed-<device>.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md", help="page with the tables")
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Measure, and write the result file, its plots and its tables."""
    if importlib.util.find_spec("matplotlib") is None:  # known before anything is measured
        raise SystemExit("the plots need matplotlib: pip install 'recbole-ssm[bench]'")
    hush()
    del sys.argv[1:]  # RecBole reads settings from there, and these options are none
    arguments.settings = dict(setting.split("=", 1) for setting in arguments.settings)
    if arguments.authors_ssd4rec:
        arguments.authors_ssd4rec = arguments.authors_ssd4rec.resolve()
    arguments.data_path = str(arguments.data_path.resolve())
    for peer in ("rectools", "replay"):
        if python := getattr(arguments, peer):
            setattr(arguments, peer, find_python(python))
    output = (arguments.output or ROOT / "benchmarks" / "results" / f"speed-{slug()}.json").resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    page = arguments.page.resolve()
    found = _earlier(output)
    with _scratch_folder():
        for name in (part for part in PARTS if part in arguments.parts):
            about = {key: found["environment"][key] for key in ("commit", "date", *SAME)}
            before = found["parts"].get(name, {})
            comparable = all(before.get(key) == about[key] for key in SAME)
            for part in PARTS[name](arguments, before if comparable else {}):
                found["parts"][name] = about | part
                output.write_text(json.dumps(found, indent=1) + "\n")
            gc.collect()  # models and loaders hold each other
    found["parts"] = {name: found["parts"][name] for name in PARTS if name in found["parts"]}
    output.write_text(json.dumps(found, indent=1) + "\n")
    images = draw(found, page.parent / "images", slug())
    write_section(page, f"speed {slug()}", speed_tables(found, images))
    print(f"written: {output} and {page}")


def _earlier(output: Path) -> dict[str, Any]:
    """The result file as it is, each part with the device and the versions that it was measured with."""
    earlier = json.loads(output.read_text()) if output.exists() else {"environment": {}, "parts": {}}
    known = {key: earlier["environment"][key] for key in SAME if key in earlier["environment"]}
    return {"environment": environment(), "parts": {name: known | part for name, part in earlier["parts"].items()}}


@contextmanager
def _scratch_folder() -> Iterator[None]:
    """Work in an empty folder: RecBole writes its logs, and looks for saved datasets, where it is started."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)
