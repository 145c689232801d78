"""``run_hyper``: search a model's settings with Ray Tune."""

import argparse
import shlex
import shutil
import sys
from pathlib import Path

from recbole_ssm.cli import run, words
from recbole_ssm.cli.run_recbole import model_and_dataset, parse_settings

DESCRIPTION = """\
Search a model's settings by its validation score, with Ray Tune. Settings of all trials can follow as --key=value."""

EXAMPLES = """\
examples:
  run_hyper --model=STARRec --dataset=ml-100k --num_samples=20
  run_hyper --model=SASRec --dataset=ml-1m --params_file=hyper.test --search_alg=grid --data_path=my_datasets
  run_hyper --model=STARRec --dataset=ml-1m --search_alg=optuna --gpus_per_trial=0.5 --time_budget=7200
  run_hyper --resume search/STARRec-ml-100k-Nov-21-2026_10-00-00"""


def build_parser() -> argparse.ArgumentParser:
    """The command's own options; every other ``--key=value`` is a setting of all trials."""
    parser = argparse.ArgumentParser(
        prog="run_hyper",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", "-m", help="name of the model (default: STARRec)")
    parser.add_argument("--dataset", "-d", help="name of the dataset (default: ml-100k)")
    parser.add_argument(
        "--config_files",
        help="YAML files with settings, separated by spaces (quote names that have some); later ones win",
    )
    parser.add_argument(
        "--params_file", help="what is searched: YAML, or RecBole's format (default: the model's own space)"
    )
    parser.add_argument("--output_file", help="write all trials there, as RecBole's run_hyper does")
    parser.add_argument("--display_file", metavar="FILE.html", help="write the pictures there")
    parser.add_argument(
        "--tool",
        choices=("Ray", "Hyperopt"),
        default="Ray",
        help="Hyperopt: RecBole's exhaustive search, by Ray's grid",
    )
    parser.add_argument("--resume", metavar="FOLDER", help="go on with the search in this folder")
    parser.add_argument("--address", help="address of a Ray cluster, or auto (default: one on this machine alone)")
    how = parser.add_argument_group("how it is searched")
    how.add_argument("--scheduler", help="what stops trials early: asha (default), median or none")
    how.add_argument("--search_alg", dest="algorithm", help="random (default), grid, optuna or hyperopt")
    how.add_argument("--num_samples", type=int, help="number of trials (default: 10; with grid: of times, 1)")
    how.add_argument("--max_concurrent", type=int, help="most trials at a time")
    how.add_argument("--cpus_per_trial", type=float, help="cores of a trial (default: 1)")
    how.add_argument("--gpus_per_trial", type=float, help="GPUs of a trial, or a part of one (default: 0)")
    how.add_argument("--time_budget", type=float, metavar="SECONDS", help="after which no trial goes on")
    how.add_argument("--storage_path", help="folder that keeps searches (default: search)")
    how.add_argument("--name", help="of this search's folder (default: model, dataset and time)")
    return parser


def main() -> int:
    """Run the command on ``sys.argv``; returns its exit status."""
    args, rest = build_parser().parse_known_args()
    return run("run_hyper", lambda: _search(args, parse_settings(rest)))


def _search(args: argparse.Namespace, settings: dict[str, str]) -> None:
    from recbole_ssm.errors import UserError
    from recbole_ssm.places import check_file, writing
    from recbole_ssm.search import Search, resume, tune

    for option, mark in {"output_file": "Valid result:", "display_file": "<!doctype html>"}.items():
        if file := getattr(args, option):
            check_file(file, f"name another --{option}", mark)
    options = {
        name: value
        for name in (
            "scheduler", "algorithm", "num_samples", "max_concurrent", "cpus_per_trial", "gpus_per_trial",
            "time_budget", "storage_path", "name",
        )
        if (value := getattr(args, name)) is not None
    }  # fmt: skip
    if args.resume:
        if options or settings or args.params_file or args.config_files or args.model or args.dataset:
            raise UserError("--resume goes on with a search as it was started: leave all but --address and files out.")
        results = resume(args.resume, args.address)
    else:
        if args.tool == "Hyperopt" and options.setdefault("algorithm", "grid") != "grid":
            raise UserError(f"--tool=Hyperopt is an exhaustive search: leave --search_alg={args.algorithm} out.")
        files = words(args.config_files)
        model, dataset = model_and_dataset(args, files)
        results = tune(model, dataset, files, settings, space=args.params_file, address=args.address, **options)

    from recbole_ssm.search.report import BEST_SETTINGS, PICTURES, statuses, write_recboles, write_report

    folder = Path(results.experiment_path)
    search = Search.read(folder)
    with writing(folder, f"the trials are kept there; make room, then: run_hyper --resume {folder}"):
        winner = write_report(results, search, folder)
    if args.output_file:
        with writing(args.output_file, f"all trials are in {folder}"):
            write_recboles(args.output_file, results, search, winner)
    if args.display_file:
        with writing(args.display_file, f"the pictures are in {folder}"):
            shutil.copyfile(folder / PICTURES, args.display_file)
    ends = statuses(results)
    print(", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends)))
    print("best params: " + ", ".join(f"{name}: {value}" for name, value in winner["params"].items()))
    print(f"best valid : {winner['best_valid_result']}")
    print(f"test result: {winner['test_result']}")
    again = f"--config_files={shlex.quote(str(folder / BEST_SETTINGS))}"
    print(f"run_recbole {again} trains it again; all else is in {folder}")
    if "unfinished" in ends:
        print(f"unfinished trials go on with: run_hyper --resume {shlex.quote(str(folder))}")


if __name__ == "__main__":
    sys.exit(main())
