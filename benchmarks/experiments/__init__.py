"""``python -m benchmarks experiments``: the papers' own experiments, each with its table and its figure."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from benchmarks.accuracy import add_run_arguments, begin, refuse_untuned, run_specs
from benchmarks.accuracy.runs import ROOT, Store
from benchmarks.accuracy.study import Study
from benchmarks.experiments.plan import EXPERIMENTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}; all by default")
    parser.add_argument("--models", nargs="+", help="of those that an experiment varies; all by default")
    parser.add_argument("--variants", nargs="+", help="of an experiment's, as its table names them; all by default")
    parser.add_argument("--datasets", nargs="+", default=["ml-100k", "amazon-beauty"], help="names")
    parser.add_argument("--seeds", nargs="+", type=int, default=[2020], help="a run of each variant for each")
    parser.add_argument("--report", action="store_true", help="train nothing: write the pages from the results")
    add_run_arguments(parser)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "experiments.md", help="page; .html beside it")
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> None:
    """Make the runs that are missing, and write the pages from all that there are."""
    begin()
    _refuse_unknown("experiment", arguments.names, EXPERIMENTS)
    named = [EXPERIMENTS[name] for name in arguments.names or EXPERIMENTS]
    _refuse_unknown("model", arguments.models, dict.fromkeys(model for e in named for model in e.all_models))
    _refuse_unknown("variant", arguments.variants, dict.fromkeys(variant for e in named for variant in e.variants))
    from benchmarks.experiments.report import write_pages

    if not arguments.report:
        study = Study.read()
        wanted = (e.specs(study, dataset, arguments.seeds) for dataset in arguments.datasets for e in named)
        specs = [
            spec
            for runs in wanted
            for (model, variant), seeds in runs.items()
            if model in (arguments.models or [model]) and variant in (arguments.variants or [variant])
            for spec in seeds
        ]
        tuned = {(spec.model, spec.dataset): None for spec in specs if spec.settings.get("tuned", True)}
        refuse_untuned(study, tuned)
        run_specs(arguments, specs, Store(arguments.results / "runs.jsonl"))
    write_pages(arguments.results, arguments.page)


def _refuse_unknown(what: str, asked: Iterable[str] | None, known: Iterable[str]) -> None:
    """Stop where a name was asked for that there is not."""
    unknown = [name for name in asked or () if name not in known]
    if unknown:
        raise SystemExit(f"no {what} {', '.join(unknown)}: choose of {', '.join(known)}")
