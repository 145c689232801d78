"""Time and peak memory of a function, on a GPU or a CPU."""

import ctypes
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

CLEAR_REFS = Path("/proc/self/clear_refs")


def seconds(function: Callable[[], object], cuda: bool) -> float:
    """How long one call takes; on a GPU by its own clock."""
    if not cuda:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Work enough that the launches of what is timed are queued by the time that it is their turn.
    torch.cuda._sleep(1_000_000)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def rounds(functions: dict[str, Callable[[], object]], count: int, cuda: bool) -> dict[str, list[float]]:
    """Time each function ``count`` times, one after the other in every round, so that all meet the same noise."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(count):
        for name, function in functions.items():
            taken[name].append(seconds(function, cuda))
    return taken


def peak_bytes(function: Callable[[], object], cuda: bool) -> int | None:
    """Memory that a call takes at its peak, above what was held before it; None where this cannot be known.

    On a GPU as torch's allocator counts it; on a CPU as the process's resident set grows (Linux).
    """
    before = mark_peak(cuda)
    function()
    return peak_since(before, cuda)


def mark_peak(cuda: bool) -> int | None:
    """What is held now, for :func:`peak_since`; peaks are counted anew from here."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        CLEAR_REFS.write_text("5")
    except OSError:
        return None
    return resident("VmRSS")


def peak_since(mark: int | None, cuda: bool) -> int | None:
    """The peak since :func:`mark_peak`, above what was held then."""
    if mark is None:
        return None
    if cuda:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - mark
    return max(0, resident("VmHWM") - mark)


def resident(field: str) -> int:
    """This process's resident bytes, now (``VmRSS``) or at their peak (``VmHWM``).

    Linux's own peak is that of this program alone; ``ru_maxrss``, all that other systems have, may begin with the peak
    of the process that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(field + ":"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def copy_rate(device: str) -> float:
    """Bytes read and written a second by a plain copy: the bandwidth that a floor is reckoned with."""
    source = torch.ones(1 << (28 if device == "cuda" else 26), device=device)
    target = torch.empty_like(source)
    taken = rounds({"copy": lambda: target.copy_(source)}, 7, device == "cuda")["copy"]
    return 2 * source.numel() * source.element_size() / min(taken)
