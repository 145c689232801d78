"""Commands: argument parsing, and how they end."""

import sys
import warnings
from collections.abc import Callable


def run(command: str, job: Callable[[], int | None], interrupted: str = "interrupted.") -> int:
    """Do a command's job; returns its exit status, and tells what went wrong in one sentence.

    Args:
        command: its name.
        job: what it does; it may import what takes seconds, and return a status.
        interrupted: what is told where somebody presses Ctrl-C, and the job has nothing to say of it.

    Returns:
        The job's status, or 0; 1 where something cannot be written; 2 for another
        :class:`~recbole_ssm.errors.UserError`; 130 where it was interrupted.
    """
    # What RecBole does that torch and pandas warn of is not for the person at the command to mend.
    warnings.filterwarnings("ignore", module=r"recbole\.|thop\.")
    from recbole_ssm.errors import CannotWrite, UserError

    try:
        return job() or 0
    except UserError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 1 if isinstance(error, CannotWrite) else 2
    except KeyboardInterrupt as interrupt:
        print(f"\n{command}: {str(interrupt) or interrupted}", file=sys.stderr)
        return 130
