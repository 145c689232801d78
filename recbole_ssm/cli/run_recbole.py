"""``run_recbole``: train and test a model, continue a run, or evaluate a checkpoint."""

import argparse
import sys
from collections.abc import Callable
from functools import partial

from recbole_ssm.cli import run, words

DESCRIPTION = """\
Train a model on a dataset in RecBole's atomic format and test it, by full ranking unless eval_args say otherwise.
Any setting can follow as --key=value, such as --learning_rate=0.0005 --epochs=50 --data_path=my_datasets; all are
listed at the end."""

EXAMPLES = """\
examples:
  run_recbole --model=STARRec --dataset=ml-100k
  run_recbole --model=SASRec --dataset=ml-1m --config_files "mine.yaml more.yaml" --result_file=sasrec.json
  run_recbole --resume saved/STARRec-Nov-21-2026_10-00-00.pth --epochs=100
  run_recbole --checkpoint saved/STARRec-Nov-21-2026_10-00-00.pth --mode evaluate
  run_recbole --doctor"""


def build_parser() -> argparse.ArgumentParser:
    """The command's own options; every other ``--key=value`` is a setting of the configuration."""
    from recbole_ssm.settings.text import help_text

    parser = argparse.ArgumentParser(
        prog="run_recbole",
        description=DESCRIPTION,
        epilog=EXAMPLES + "\n" + help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", "-m", help="name of the model (default: STARRec)")
    parser.add_argument("--dataset", "-d", help="name of the dataset (default: ml-100k)")
    parser.add_argument(
        "--config_files",
        help="YAML files with settings, separated by spaces (quote names that have some); later ones win",
    )
    parser.add_argument("--list_models", action="store_true", help="print the names of all models and exit")
    parser.add_argument(
        "--doctor", action="store_true",
        help="check every op and backend on this machine and print a table; status 0 where the main job can run",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="with --doctor: check again what has been checked before")
    parser.add_argument("--resume", metavar="FILE", help="continue the run that wrote this checkpoint")
    parser.add_argument("--checkpoint", metavar="FILE", help="with --mode evaluate: the checkpoint to evaluate")
    parser.add_argument(
        "--mode", choices=("train", "evaluate"), default="train", help="train and test (default), or evaluate only"
    )
    parser.add_argument("--result_file", metavar="FILE.json", help="write results, settings and timings there")
    processes = parser.add_argument_group("several processes, as in RecBole: one a GPU, or all on the CPU")
    processes.add_argument("--nproc", type=int, default=1, help="processes on this machine (default: 1)")
    processes.add_argument("--ip", default="localhost", help="address of the first machine")
    processes.add_argument("--port", default="5678", help="port of the first machine")
    processes.add_argument("--world_size", type=int, default=-1, help="processes on all machines")
    processes.add_argument("--group_offset", type=int, default=0, help="rank of this machine's first process")
    processes.add_argument(
        "--engine", choices=("torch", "ray"), default="torch",
        help="ray: on a Ray cluster, --nproc processes in all, started again from the last checkpoint if one dies",
    )  # fmt: skip
    processes.add_argument("--address", help="with --engine ray: address of a running cluster, or auto")
    return parser


def parse_settings(words: list[str]) -> dict[str, str]:
    """``--key=value`` words as a dict.

    Raises:
        UserError: for a word of another form, or a setting given twice with two values.
    """
    from recbole_ssm.errors import UserError

    settings: dict[str, str] = {}
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not equals:
            raise UserError(f"{word!r} is not of the form --key=value; see run_recbole --help.")
        if settings.setdefault(key, value) != value:
            raise UserError(f"--{key} is given twice, as {settings[key]} and as {value}.")
    return settings


def model_and_dataset(args: argparse.Namespace, files: list[str] | None) -> tuple[str, str]:
    """Names from the command line, else from its config files, else the defaults.

    Raises:
        UserError: for a file that cannot be read.
    """
    from recbole_ssm.settings.values import read_settings

    given = {"model": "STARRec", "dataset": "ml-100k"}
    for file in files or []:
        given |= read_settings(file)
    given |= {key: value for key in given if (value := getattr(args, key, None)) is not None}
    return given["model"], given["dataset"]


def main() -> int:
    """Run the command on ``sys.argv``; returns its exit status."""
    args, rest = build_parser().parse_known_args()
    return run("run_recbole", lambda: _run(args, rest))


def _run(args: argparse.Namespace, rest: list[str]) -> int:
    from recbole_ssm import quick_start
    from recbole_ssm.config import Config
    from recbole_ssm.distributed.launch import launch
    from recbole_ssm.errors import UserError
    from recbole_ssm.places import check_file
    from recbole_ssm.registry import list_models
    from recbole_ssm.results import FIRST_KEY

    if args.list_models:
        print("\n".join(list_models()))
        return 0
    if args.doctor or args.force:
        if not args.doctor or not {*sys.argv[1:]} <= {"--doctor", "--force"}:
            raise UserError("--doctor goes alone, or with --force.")
        from recbole_ssm.doctor import diagnose

        return diagnose(anew=args.force)
    settings = parse_settings(rest)
    files = words(args.config_files)
    if args.mode == "evaluate" and args.checkpoint is None:
        raise UserError("--mode evaluate needs --checkpoint FILE.")
    if args.mode == "train" and args.checkpoint is not None:
        raise UserError("--checkpoint FILE goes with --mode evaluate; to train on, use --resume FILE.")
    named = args.model is not None or args.dataset is not None or files
    if (args.resume or args.checkpoint) and named:
        raise UserError("--model, --dataset and --config_files are those of the checkpoint: leave them out.")
    model, dataset = model_and_dataset(args, files)
    if args.address and args.engine != "ray":
        raise UserError("--address is that of a Ray cluster: add --engine ray.")
    if args.engine == "ray":
        if args.result_file or args.resume or args.checkpoint:
            raise UserError("--engine ray goes with training from the start and without --result_file.")
        from recbole_ssm.distributed.ray_training import train_on_ray

        train_on_ray(model, dataset, files, settings, args.nproc, args.address)
        return 0
    if args.result_file:
        check_file(args.result_file, "name another --result_file", FIRST_KEY)
    if args.nproc != 1 or args.world_size > 0:
        if args.checkpoint:
            raise UserError("--mode evaluate runs in one process: leave --nproc out.")
        configuration: Callable[[dict[str, str]], Config] = partial(Config, model, dataset, files)
        if args.resume:
            configuration = partial(quick_start.config_of, args.resume)
        train = partial(
            quick_start.train_by_settings, configuration, resume_file=args.resume, result_file=args.result_file
        )
        launch(
            train, configuration(settings), settings,
            args.nproc, args.world_size, args.ip, args.port, args.group_offset,
        )  # fmt: skip
        return 0
    if args.mode == "evaluate":
        done = quick_start.evaluate(args.checkpoint, settings)
    elif args.resume:
        done = quick_start.train_and_test(quick_start.config_of(args.resume, settings), resume_file=args.resume)
    else:
        done = quick_start.train_and_test(Config(model, dataset, files, settings))
    if args.result_file:
        done.write(args.result_file)
    return 0
