"""``python -m benchmarks <what>``."""

import argparse

from benchmarks import ops


def main() -> None:
    """Run the command that the first word names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure this package on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    ops.add_arguments(commands.add_parser("ops", help="the ops, on every backend and beside others' kernels"))
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
