"""``python -m benchmarks <what>``."""

import argparse

from benchmarks import accuracy, experiments, gpu, history, models, ops, profile, search, serving, speed
from recbole_ssm.errors import UserError


def main() -> None:
    """Run the command that the first word names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure this package on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    ops.add_arguments(commands.add_parser("ops", help="the ops, on every backend and beside others' kernels"))
    speed.add_arguments(
        commands.add_parser("speed", help="training, evaluation and data beside RecBole's, and scaling")
    )
    profile.add_arguments(commands.add_parser("profile", help="a training step's parts beside their floors"))
    history.add_arguments(commands.add_parser("history", help="several commits of this repository, in turns"))
    accuracy.add_arguments(commands.add_parser("accuracy", help="all models on all sets, tuned alike, several seeds"))
    models.add_arguments(commands.add_parser("models", help="each of RecBole's, beside RecBole's own environment"))
    experiments.add_arguments(commands.add_parser("experiments", help="the papers' own, each with its figure"))
    search.add_arguments(commands.add_parser("search", help="trials side by side against one after the other"))
    serving.add_arguments(commands.add_parser("serving", help="live sessions, recommendations for all users, and HTTP"))
    gpu.add_arguments(
        commands.add_parser("gpu", help="all that a machine with a GPU is needed for, in parts of minutes")
    )
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
