"""Commands: argument parsing, and how they end."""

import os
import shlex
import sys
from collections.abc import Callable


def words(text: str | None) -> list[str] | None:
    """Names separated by spaces, which quotes keep together; None where nothing was given."""
    if not text:
        return None
    return text.split() if os.name == "nt" else shlex.split(text)  # to which Windows' paths are escapes


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
    from recbole_ssm.compat import ignore_recboles_warnings
    from recbole_ssm.errors import CannotWrite, UserError

    ignore_recboles_warnings()

    try:
        return job() or 0
    except UserError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 1 if isinstance(error, CannotWrite) else 2
    except BrokenPipeError:  # whoever read what is printed has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, which Python writes into as it ends
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"\n{command}: {str(interrupt) or interrupted}", file=sys.stderr)
        return 130
