"""``run_export``: a checkpoint as files that ONNX Runtime runs."""

import argparse
import sys

from recbole_ssm.cli import run

DESCRIPTION = """\
Write a trained model as a folder of ONNX graphs, its items and a model card, which needs ONNX Runtime and NumPy to run
and nothing else."""


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="run_export", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--checkpoint", metavar="FILE", required=True, help="the checkpoint")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="a new folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in that folder")
    parser.add_argument(
        "--with_data", action="store_true",
        help="read the dataset, too, for the models of RecBole that are built of more than its items",
    )  # fmt: skip
    return parser


def main() -> int:
    """Run the command on ``sys.argv``; returns its exit status."""
    args = build_parser().parse_args()
    return run("run_export", lambda: _export(args))


def _export(args: argparse.Namespace) -> None:
    from recbole_ssm.serving import Recommender

    recommender = Recommender.load(args.checkpoint, "cpu", args.with_data)
    recommender.export(args.output, args.overwrite)
    print(f"{args.output}: {recommender.config['model']} for ONNX Runtime; its README.md says how to run it")


if __name__ == "__main__":
    sys.exit(main())
