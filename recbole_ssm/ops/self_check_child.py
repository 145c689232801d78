"""The process that makes the checks of :mod:`.self_check`: an op forward and backward, beside its reference."""

import faulthandler
import json
import os
import sys
import threading
import time
from dataclasses import asdict, replace
from statistics import median
from types import FrameType
from typing import Any

import torch

from recbole_ssm.ops.self_check import COMPILATION_S, Check, Verdict, one_line

# Below this a deviation is that of another order of summation. The reference may happen to err less than a rounding,
# and a right kernel must not be left for that.
ROUNDING = 1e-5

# Sequences that are empty, of one row, of part of a block and of several blocks.
LENGTHS = (1, 0, 33, 200)
# A small training step, by which speed is told.
TIMED_LENGTHS = (200,) * 12


def answer() -> None:
    """Make the checks that the command line asks for, a line of JSON each.

    After what has failed the process ends, for a GPU's context may be broken; the parent starts another.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is not an answer

    one_at_a_time = threading.Lock()

    def say(**message: Any) -> None:
        with one_at_a_time:
            print(json.dumps(message), file=answers, flush=True)

    def tell_of_compilation() -> None:
        while True:
            time.sleep(1)
            if is_compiling(sys._current_frames()[threading.main_thread().ident or 0]):
                say()

    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except ImportError:  # Windows
        pass
    request = json.loads(sys.argv[1])
    checks = [Check(**{**asked, "sizes": tuple(map(tuple, asked["sizes"]))}) for asked in request["checks"]]
    if torch.device(checks[0].device).type == "cuda":
        torch.cuda.set_device(checks[0].device)
    torch.zeros(1, device=checks[0].device).item()
    say()
    threading.Thread(target=tell_of_compilation, daemon=True).start()
    for check in checks:
        # Where the parent is gone, nobody else ends what hangs.
        faulthandler.dump_traceback_later(COMPILATION_S + 10, exit=True)
        found = examine(check, request["timed"])
        say(verdict=asdict(found))
        if found.state not in ("right", "wrong"):
            os._exit(0)
    faulthandler.cancel_dump_traceback_later()


COMPILERS = {("triton.compiler.compiler", "compile"), ("numba.core.dispatcher", "_compile_for_args")}


def is_compiling(frame: FrameType | None) -> bool:
    """Whether a stack is that of Triton's or numba's compiler, not of a kernel at work."""
    while frame is not None:
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) in COMPILERS:
            return True
        frame = frame.f_back
    return False


def examine(check: Check, timed: bool = False) -> Verdict:
    """Make one check in this process."""
    try:
        torch.set_float32_matmul_precision("high" if check.tf32 else "highest")
        found = _compare(check)
        if timed and found.state == "right":
            found = replace(found, times_as_fast=1.0 if check.backend == "reference" else _times_as_fast(check))
        return found
    except (torch.OutOfMemoryError, MemoryError) as error:
        return Verdict("out of memory", one_line(str(error)))
    except Exception as error:
        # Triton's, where a kernel needs more shared memory than the GPU has.
        state = "out of memory" if type(error).__name__ == "OutOfResources" else "crashes"
        return Verdict(state, one_line(f"{type(error).__name__}: {error}"))


def cases(check: Check, lengths: tuple[int, ...], filled: bool = True) -> list[Any]:
    """The op as models call it: on all rows, and where it has such a form on the last rows alone.

    With ``filled`` tables of fixed shapes (:func:`recbole_ssm.ops.cases.make`).
    """
    from recbole_ssm.ops.cases import make

    sizes = dict(check.sizes)
    options = {"window": sizes.pop("window")} if "window" in sizes else {}

    def case(op: str, lengths: tuple[int, ...], **more: Any) -> Any:
        return make(
            op, list(lengths), sizes, getattr(torch, check.dtype), check.device, check.states, torch.float32,
            filled=filled, **options, **more,
        )  # fmt: skip

    cases = [case(check.op, lengths)]
    if check.states:
        return cases
    if check.op in ("selective_scan", "ssd"):
        cases.append(case(f"{check.op}_last", lengths))
    if check.op == "preference_attention":
        cases.append(case(check.op, tuple(length for length in lengths if length), queries="last"))
    return cases


def _compare(check: Check) -> Verdict:
    from recbole_ssm.ops.cases import compared, true_results

    largest, worst = 0.0, (0.0, "")
    for case in cases(check, LENGTHS):
        form = "" if case.op == check.op and "queries" not in case.fixed else " of last rows"
        for name, (off, allowed) in compared(case, check.backend, true_results(case)).items():
            largest = max(largest, off)
            worst = max(worst, (off / max(allowed, ROUNDING), name + form))
    if worst[0] > 1:
        return Verdict("wrong", f"{worst[1]}: off by {worst[0]:.2g} times what is allowed", largest)
    return Verdict("right", "", largest)


def _times_as_fast(check: Check, rounds: int = 5) -> float:
    """The reference's time over the backend's: the median of rounds in which both take their turn."""
    case = cases(check, TIMED_LENGTHS)[0]
    leaves = list(case.inputs.values())

    def seconds(backend: str) -> float:
        begin = time.perf_counter()
        out = case.run(backend)[0]
        torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
        if out.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    for backend in ("reference", check.backend):
        seconds(backend)
    return median(seconds("reference") / seconds(check.backend) for _ in range(rounds))
