"""Cases in processes of their own: one that crashes or hangs costs its own row, and nothing of the others'."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
POLL_S = 0.02
START_S = 120.0  # to import everything from a cold disk
LOG_LINES = 40
CODE = "import json, sys; from benchmarks.gpu.jobs import answer; answer(json.loads(sys.argv[1]))"
NO_TIME = "the part's time was over"

Row = dict[str, Any]


@dataclass(frozen=True)
class Lane:
    """Cases that one process takes one after another, and another process from there on where it dies.

    Attributes:
        function: ``module:function``, called with ``about`` and a case's keys; returns a dictionary.
        cases: what is measured.
        about: what all cases share.
        limit_s: longest that a case may take; the first one's begins after all imports.
        prefix: words before the command, of a tool that watches it.
        environment: further variables.
        fresh: start the process when it is its turn. The others' import beforehand, and then wait.
    """

    function: str
    cases: tuple[Row, ...]
    about: Row
    limit_s: float
    prefix: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    fresh: bool = False


def run(lanes: list[Lane], keep: Callable[[Row], None], at_once: int = 1, deadline: float = float("inf")) -> None:
    """Run lanes side by side, and give ``keep`` a row for each case: its keys, ``state`` and what was measured.

    ``state`` is ``done``, ``crashes`` (a signal, or a tool's exit status), ``fails`` (an exception), ``time limit`` or
    ``left out`` (no time was left); all but the first come with a ``detail`` and the end of the ``log``.

    Args:
        lanes: the earlier ones first.
        keep: takes each row as soon as it is known.
        at_once: how many lanes.
        deadline: when all must be over, by :func:`time.monotonic`.
    """
    waiting, started = deque(lanes), list[_Process]()
    try:
        while (waiting or started) and time.monotonic() < deadline:
            while waiting and len(started) < at_once + (not waiting[0].fresh):
                started.append(_Process(waiting.popleft()))
            for process in started[:at_once]:
                process.go()
                for row in process.new_rows():
                    keep(row)
                if not process.over():
                    continue
                started.remove(process)
                for row in [*process.new_rows(), *process.last_rows()]:
                    keep(row)
                process.end()
                if process.left:
                    waiting.appendleft(replace(process.lane, cases=tuple(process.left)))
            time.sleep(POLL_S)
        for process in started:
            for row in [*process.new_rows(), *process.cut_off()]:
                keep(row)
    finally:
        for process in started:
            process.end()
    never = [case for process in started for case in process.left] + [case for lane in waiting for case in lane.cases]
    for case in never:
        keep({**case, "state": "left out", "detail": NO_TIME})


class _Process:
    """One process of a lane, and what of it has been heard."""

    def __init__(self, lane: Lane):
        self.lane, self.left = lane, deque(lane.cases)
        self.folder = tempfile.TemporaryDirectory(prefix="gpu-")
        self._answers, self._log = (Path(self.folder.name, name) for name in ("answers", "log"))
        self._answers.touch()
        self._heard = 0
        self._last: Row | None = None  # held back until the process has ended well
        self._gone = self._timed_out = self._leaves = self.begun = False
        request = {"function": lane.function, "cases": lane.cases, "about": lane.about, "answers": str(self._answers)}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*lane.prefix, sys.executable, "-c", CODE, json.dumps(request)],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, cwd=self.folder.name,
                env=os.environ | {"PYTHONPATH": path} | lane.environment,
                start_new_session=True,  # with what it starts it can be ended as one group
            )  # fmt: skip
        self._deadline = time.monotonic() + START_S

    def go(self) -> None:
        """Let it begin."""
        if not self._gone:
            self._gone = True
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._deadline = time.monotonic() + START_S

    def new_rows(self) -> Iterator[Row]:
        """What it has measured since the last call."""
        lines = self._answers.read_text().split("\n")
        new = lines[self._heard : -1]
        self._heard += len(new)
        for line in map(json.loads, new):
            self._deadline = time.monotonic() + self.lane.limit_s
            if line == "begin":
                self.begun = True
                continue
            row = {**self.left.popleft(), **line}
            self._leaves = row["state"] != "done"
            if self.left or self._leaves:
                yield row
            else:
                self._last = row

    def over(self) -> bool:
        """Whether it has ended, or is to be ended."""
        self._timed_out = self._process.poll() is None and time.monotonic() > self._deadline
        return self._timed_out or self._process.poll() is not None

    def last_rows(self) -> list[Row]:
        """Once it is over: the rows that only its end decides on."""
        if self._timed_out:
            limit = self.lane.limit_s if self.begun else START_S
            return self._ended_well() or [self.failed("time limit", f"no result in {limit:.0f} s")]
        status = self._process.wait()
        if status == 0 and (self._leaves or not self.left):
            return self._ended_well()
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        if self._last is not None:
            return [{**self._last, "state": "crashes", "detail": how, "log": self._end_of_log()}]
        # Where it has not even begun, another process would not, either.
        return [self.failed("crashes", how) for _ in range(1 if self.begun else len(self.left))]

    def cut_off(self) -> list[Row]:
        """The rows of a process that is ended before its time."""
        return self._ended_well() or ([self.failed("time limit", NO_TIME)] if self.begun and self.left else [])

    def _ended_well(self) -> list[Row]:
        return [] if self._last is None else [self._last]

    def failed(self, state: str, detail: str) -> Row:
        """The row of the case that it has not done."""
        return {**self.left.popleft(), "state": state, "detail": detail, "log": self._end_of_log()}

    def _end_of_log(self) -> list[str]:
        lines = self._log.read_text(errors="replace").splitlines()
        of_tool = [line for line in lines if line.startswith("=========")]
        return of_tool[:LOG_LINES] or lines[-LOG_LINES:]

    def end(self) -> None:
        """End it and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.folder.cleanup()


def answer(request: Row) -> None:
    """What a lane's process does: each case in turn, until one fails."""
    del sys.argv[1:]  # RecBole reads settings from there
    module, name = request["function"].split(":")
    function = getattr(import_module(module), name)
    sys.stdin.read()  # until it is its turn
    with open(request["answers"], "a", buffering=1) as answers:
        print(json.dumps("begin"), file=answers)
        for case in request["cases"]:
            try:
                row = {**function(request["about"], **case), "state": "done"}
            except Exception as error:
                traceback.print_exc()
                lines = str(error).strip().splitlines()
                row = {"state": "fails", "detail": f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]}
                row["log"] = traceback.format_exc().splitlines()[-LOG_LINES:]
            print(json.dumps(row, default=float), file=answers)
            if row["state"] != "done":
                sys.stdout.flush()
                os._exit(0)  # a GPU's context may be broken; another process goes on
