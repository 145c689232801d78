"""What a case may not do: run code, reach out of its folder, take for ever; and how what it did is told."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole_ssm.errors import UserError

# Seconds of this process's own work, after which a case counts as a hang. Others may keep the machine busy.
PATIENCE = 30.0

# What no file that is read may bring about, whatever it holds (names of sys.audit's events).
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "socket.bind",
             "socket.getaddrinfo", "pickle.find_class", "webbrowser.open")  # fmt: skip
WRITING = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.chmod", "os.link", "os.symlink")

TRAP = "trap"  # the file that code leaves which ought not to run
SUSPICIOUS: list[str] = []
_folder: list[str] = []  # where a case may write; empty while none runs


class Hang(BaseException):
    """Raised in a case that takes too long; no ``except Exception`` keeps it back."""


@dataclass
class Outcome:
    """What became of a case.

    Attributes:
        word: one of :data:`GOOD` (``large``: accepted, but not run), or of :data:`BAD`, what ought not to be.
        detail: the sentence, or where it happened.
        told: lines of the log.
        by_name: whether a refusal is one that was written for its reason, not the last resort of ``quick_start``.
        result: what the call returned.
    """

    word: str
    detail: str = ""
    told: list[str] = field(default_factory=list)
    by_name: bool = True
    result: Any = None


GOOD = ("refused", "equal", "different", "large")
BAD = ("traceback", "crash", "hang", "code", "damage", "rows", "senseless", "ignored", "unclear")


def _hook(event: str, args: tuple) -> None:
    if not _folder:
        return
    if event in FORBIDDEN and not (event in ("pickle.find_class", "socket.connect") and _from_this_machine()):
        SUSPICIOUS.append(f"{event} {args}"[:300])
    elif event in WRITING or (event == "open" and _writes(args)):
        with suppress(Exception):
            path = os.path.abspath(os.fsdecode(args[0]))
            inside = path.startswith(_folder[0]) and not path.startswith(os.path.join(_folder[0], "elsewhere"))
            if not inside and not path.startswith("/dev/") and "__pycache__" not in path:
                SUSPICIOUS.append(f"{event} {path}"[:300])


def _from_this_machine() -> bool:
    """Whether it is between this run and its own processes (those of ``worker``), or of numba's cache."""
    frame = sys._getframe()
    while frame is not None and not any(part in frame.f_code.co_filename for part in ("multiprocessing", "numba/core")):
        frame = frame.f_back
    return frame is not None


def _writes(args: tuple) -> bool:
    path, mode, flags = (*args, None, None)[:3]
    if not isinstance(path, str | bytes):
        return False
    return bool(set(mode) & set("wax+")) if isinstance(mode, str) else bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))


sys.addaudithook(_hook)


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def give_up(*_):
        raise Hang

    before = signal.signal(signal.SIGPROF, give_up)
    # Again and again: one that is raised in a destructor is lost.
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def attempt(call: Callable[[], Any], patience: float = PATIENCE, level: str = "WARNING") -> Outcome:
    """Make a call in the working directory, and tell what became of it; ``equal`` where it returned.

    Args:
        call: what is tried.
        patience: seconds of this process's own work that it may take.
        level: of the lines of the log that are kept.
    """
    lines = _Lines()
    root = logging.getLogger()
    before = root.handlers[:], root.level
    root.handlers[:] = [lines]
    root.setLevel(level)
    SUSPICIOUS.clear()
    _folder.append(os.getcwd())
    try:
        with _limited(patience):
            outcome = Outcome("equal", result=call())
    except UserError as error:
        last_resort = "cannot be used as it is" in str(error)
        detail = f"{type(error.__cause__).__name__} {_place(error.__cause__)}" if last_resort else str(error)
        outcome = Outcome("refused", detail, by_name=not last_resort)
        if "Traceback" in str(error) or "\n" in str(error).strip():
            outcome = Outcome("traceback", f"a refusal of several lines: {error!s:.300}")
    except Hang as error:
        outcome = Outcome("hang", f"after {patience:.0f} s of work {_place(error)}")
    except BaseException as error:
        outcome = Outcome("traceback", f"{type(error).__name__}: {str(error)[:300]} {_place(error)}")
    finally:
        _folder.clear()
        root.handlers[:] = before[0]
        root.setLevel(before[1])
    outcome.told = lines.lines
    if Path(TRAP).exists() or SUSPICIOUS:
        outcome = Outcome("code", "; ".join(SUSPICIOUS) or "the trap was set off", lines.lines)
        Path(TRAP).unlink(missing_ok=True)
    return outcome


def _place(error: BaseException | None) -> str:
    """The innermost line of ours and the innermost of all, where an exception was raised."""
    frames = [] if error is None else traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "recbole_ssm" in frame.filename]
    shown = [*ours[-1:], *frames[-1:]]
    return " < ".join(dict.fromkeys(f"{Path(frame.filename).name}:{frame.lineno}" for frame in shown))
