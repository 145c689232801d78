"""What the compiled CPU paths share: how numba compiles them, and how they divide packed sequences among threads."""

import logging
import threading
from contextlib import suppress
from functools import wraps

import numba
import numpy as np
from numba.core.caching import FunctionCache
from numba.core.codegen import get_host_cpu_features

# Each of at most this many groups of sequences is one thread's work. Sums over sequences are taken per group and then
# over the groups in order, so the result does not depend on how many threads ran; 32 groups keep up to 32 cores busy.
GROUPS = 32

# Where a processor has vectors of 512 bits, LLVM keeps to 256 on most, to spare their clocks, and a scan's forward pass
# takes 1.5 times as long. Read when a process compiles its first function; a user's choice in the environment stays.
if numba.config.CPU_FEATURES is None and "+avx512f" in (_features := get_host_cpu_features()):
    numba.config.CPU_FEATURES = f"{_features},-prefer-256-bit"

_OPTIONS = {"fastmath": True, "error_model": "numpy"}

_TURN = threading.Lock()

# A function that kernels call: compiled with them, and cached in them.
helper = numba.njit(**_OPTIONS)


def compiled(function):
    """Compile a kernel that is called from Python and loops over groups of sequences with ``prange``.

    It may be called by several threads at once.
    """
    kernel = numba.njit(function, parallel=True, **_OPTIONS)
    with suppress(RuntimeError):  # neither this folder nor the user's cache can be written: compile anew each time
        kernel._cache = _Cache(function)  # as cache=True would, with numba's own

    @wraps(function)
    def call(*args, **named):
        if _takes_turns():
            with _TURN:
                return kernel(*args, **named)
        return kernel(*args, **named)

    return call


def _takes_turns() -> bool:
    """Whether numba ends the process where two threads meet: in its own pool, which it has without OpenMP and TBB."""
    try:
        return numba.threading_layer() == "workqueue"
    except ValueError:  # the first kernel has not run yet
        return True


class _Cache(FunctionCache):
    """Numba's, which lets a kernel that was compiled be used where a full disk does not take it."""

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except OSError as error:
            logging.getLogger().warning(
                f"{self.cache_path} cannot be written ({error}): kernels are compiled anew in each process."
            )


@numba.njit(fastmath=True, inline="always")
def exp_of_negative(v):
    """Exponential of v <= 0, branch-free, so that the loop around it vectorises; off by at most 2e-7.

    A decay multiplies a state, so it is the absolute error that counts, above all near 1, where a slow channel raises
    it to the power of the sequence's length. Hence expm1(v/16) as a polynomial q, and then four times
    (1 + q)^2 - 1 = q (q + 2), which never rounds against the 1. Below -17 the result stays at 4e-8.
    """
    r = max(v, np.float32(-17.0)) * np.float32(1.0 / 16.0)
    p = r * np.float32(1.0 / 720.0) + np.float32(1.0 / 120.0)
    p = p * r + np.float32(1.0 / 24.0)
    p = p * r + np.float32(1.0 / 6.0)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    q = p * r
    q = q * (q + np.float32(2.0))
    q = q * (q + np.float32(2.0))
    q = q * (q + np.float32(2.0))
    q = q * (q + np.float32(2.0))
    return q + np.float32(1.0)


@numba.njit(fastmath=True, inline="always")
def exp(v):
    """Exponential of v <= 0 as a power of two times a polynomial, branch-free; 1e-38 where it would be less.

    Its error is relative, 1e-7, also where the result is tiny: a softmax adds many such.
    """
    v = max(v, np.float32(-87.0))
    power = np.int32(v * np.float32(1.44269504) - np.float32(0.5))  # to the nearest: the cast drops the fraction
    r = v - np.float32(power) * np.float32(0.693359375) + np.float32(power) * np.float32(2.12194440e-4)
    p = r * np.float32(1.9875691500e-4) + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * np.int32((power + np.int32(127)) << np.int32(23)).view(np.float32)


def group_borders(cu_seqlens: np.ndarray) -> np.ndarray:
    """First sequence of each of at most :data:`GROUPS` groups of about equally many rows."""
    total = int(cu_seqlens[-1])
    groups = max(1, min(GROUPS, len(cu_seqlens) - 1))
    borders = np.searchsorted(cu_seqlens, np.arange(groups + 1) * total / groups)
    borders[0], borders[-1] = 0, len(cu_seqlens) - 1
    return borders.astype(np.int64)
