"""Where a run writes: looked at before it starts, and what goes wrong there told in one sentence."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recbole_ssm.errors import CannotWrite, UserError

# RecBole names its log folders by the working directory, and has no setting for them.
LOGS_REMEDY = "start the run in a folder where files can be made"

# Bytes of a file that are looked at to know what it is.
BEGINNING = 1 << 16

CHECKPOINTS_REMEDY = "make room there, or choose another folder (--checkpoint_dir)"


@contextmanager
def writing(path: str | Path, remedy: str) -> Iterator[None]:
    """Tell of a file or folder that cannot be written.

    Args:
        path: what is written.
        remedy: what to do where that fails.

    Raises:
        CannotWrite: in place of an :class:`OSError`, or of what torch makes of one.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save goes on after a failed write, and then complains of a file that is too short.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        in_the_way = isinstance(cause, FileExistsError)
        what = "a file with that name is in the way" if in_the_way else cause.strerror or str(cause)
        raise CannotWrite(f"{path} cannot be written ({what}): {remedy}.") from error


def check_folder(folder: str | Path, remedy: str) -> None:
    """Make a folder where it is missing, and a file in it, which is removed again.

    Raises:
        CannotWrite: where that fails, with the ``remedy``.
    """
    with writing(folder, remedy):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))  # which a full disk, too, notices at the latest


def check_file(file: str | Path, remedy: str, mark: str = "") -> None:
    """Find out whether a file can be written, and leave it, or that there is none, as it was.

    Args:
        file: to be written, or replaced.
        remedy: what to do where that cannot be.
        mark: what the beginning of such a file, a text, holds; what is there without it, and is not empty, is something
            else.

    Raises:
        CannotWrite: where it cannot be written, with the ``remedy``.
        UserError: where it is something else, with the ``remedy``.
    """
    path = Path(file)
    if path.exists() and not path.is_file() and not path.is_dir():
        return  # a pipe, whose reader would take the end of this look for the end of all
    if not os.path.lexists(path):
        check_folder(path.parent, remedy)
        return
    with writing(path, remedy), path.open("ab+") as there:
        there.seek(0)
        found = there.read(BEGINNING)
    if mark and found and (b"\0" in found or mark.encode() not in found):  # a checkpoint holds a result's words, too
        raise UserError(f"{path} is there, and is no earlier file of this kind: {remedy}.")
