"""``python -m benchmarks accuracy``: all models on all sets, tuned alike, several seeds, and what the numbers say."""

import argparse
import importlib.util
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path

from benchmarks.accuracy.runs import ROOT, Spec, Store, run_all
from benchmarks.accuracy.study import Study
from benchmarks.accuracy.worker import FULL, PROTOCOLS, checkpoint_in
from benchmarks.speed.contenders import QUIET, hush
from recbole_ssm.quick_start import evaluate

# Candidates of papers that sampled: the target and so many items drawn uniformly, or by popularity.
SAMPLED = ("uni100", "pop100")

RESULTS = ROOT / "benchmarks" / "results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    plan = Study.read().plan
    parser.add_argument(
        "--models", nargs="+", default=plan["models"], help="of the study, or RecBole's that train on whole histories"
    )
    parser.add_argument("--datasets", nargs="+", default=plan["datasets"], help="names; ml-100k comes with RecBole")
    parser.add_argument(
        "--protocols", nargs="+", choices=list(PROTOCOLS), default=list(PROTOCOLS), help="what to tune and choose by"
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=plan["seeds"], help="a run each; none to tune alone")
    parser.add_argument("--tune", action="store_true", help="first find settings, and write them to properties/tuned")
    parser.add_argument("--sampled", action="store_true", help="evaluate among sampled candidates, too; takes long")
    parser.add_argument("--report", action="store_true", help="train nothing: write the pages from the results")
    add_run_arguments(parser)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "study.md", help="page; .html beside it")
    parser.set_defaults(run=main)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every command that makes runs."""
    parser.add_argument("--data_path", default="dataset", help="folder that holds the datasets, but for ml-100k")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores")
    parser.add_argument("--work", type=Path, default=Path("saved/accuracy"), help="folder of logs and checkpoints")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")


def main(arguments: argparse.Namespace) -> None:
    """Tune where that is asked for, make the runs that are missing, and write the pages."""
    begin()
    study = Study.read()
    if not arguments.report:
        if arguments.tune:
            _tune(arguments, study)
        for protocol in arguments.protocols if arguments.seeds else []:
            refuse_untuned(study, product(arguments.models, arguments.datasets), protocol)
        specs = [
            (protocol, spec)
            for dataset in arguments.datasets
            for protocol in arguments.protocols
            for spec in study.grid(arguments.models, [dataset], arguments.seeds, protocol)
        ]
        store = Store(arguments.results / "runs.jsonl")
        run_specs(arguments, [spec for _, spec in specs], store)
        if arguments.sampled:  # of all items, which a run that leaves the history out refuses
            _sample(arguments, [spec for protocol, spec in specs if protocol == FULL], store)
    from benchmarks.accuracy.report import write_pages

    write_pages(arguments.results, arguments.page)


def begin() -> None:
    """What every command that makes runs and pages does first."""
    needed = ("matplotlib", "jinja2", "markdown_it")
    if not all(importlib.util.find_spec(name) for name in needed):  # known before anything is trained
        raise SystemExit("the pages need matplotlib, jinja2 and markdown-it-py: pip install 'recbole-ssm[bench]'")
    del sys.argv[1:]  # RecBole reads settings from there, and these options are none
    hush()


def refuse_untuned(study: Study, wanted: Iterable[tuple[str, str]], protocol: str = FULL) -> None:
    """Stop before the first run where a model has no tuned settings for its set."""
    missing = study.untuned(wanted, protocol)
    if missing:
        words = "python -m benchmarks accuracy --tune"
        raise SystemExit(
            f"nothing was tuned yet for {', '.join(missing)} ({protocol}): {words} does it; or name other --models"
        )


def run_specs(arguments: argparse.Namespace, specs: list[Spec], store: Store) -> None:
    """Make the runs that ``store`` lacks, with the command's own options."""
    data_path = str(Path(arguments.data_path).resolve())
    run_all(specs, store, arguments.work.resolve(), data_path, arguments.jobs)


def _sample(arguments: argparse.Namespace, specs: list[Spec], store: Store) -> None:
    """Add to each run's row what its best model reaches among sampled candidates."""
    for row in store.of(specs):
        checkpoint = checkpoint_in(arguments.work.resolve() / row["id"])
        missing = [mode for mode in SAMPLED if mode not in row.get("sampled", {})]
        if missing and checkpoint is None:
            print(f"{row['id']}: no checkpoint in {arguments.work}, so no sampled evaluation", flush=True)
        for mode in missing if checkpoint else []:
            settings = {**QUIET, "eval_args": {**row["config"]["eval_args"], "mode": mode}}
            result = evaluate(str(checkpoint), settings).result["test_result"]
            store.add({**row, "sampled": {**row.get("sampled", {}), mode: result}}, None)
            row = store.rows[row["id"]]
            print(f"{row['id']}: among {mode} NDCG@10 {result['ndcg@10']:.4f}", flush=True)


def _tune(arguments: argparse.Namespace, study: Study) -> None:
    from benchmarks.accuracy import tuning

    data_path, work = str(Path(arguments.data_path).resolve()), arguments.work.resolve() / "search"
    datasets = (name for name in arguments.datasets if name in study.plan["epochs"])
    models = [name for name in arguments.models if name not in study.also]
    for which in ((m, d, p) for d in datasets for p in arguments.protocols for m in models):
        if tuning.is_kept(study, *which, arguments.results):
            continue
        file = tuning.write(tuning.tune(study, *which, data_path, work, arguments.jobs), study, arguments.results)
        print(f"{', '.join(which)}: written to {file}", flush=True)
