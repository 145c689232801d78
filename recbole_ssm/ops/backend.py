"""The one place that knows which backends this machine has, and chooses among them."""

import importlib.util
import logging
from functools import lru_cache

import torch

from recbole_ssm.errors import BackendUnavailable

BACKENDS = ("auto", "reference", "cpu")


@lru_cache(maxsize=None)
def _announce(op: str, backend: str, device: str, dtype: torch.dtype) -> None:
    logging.getLogger().info(f"{op} runs on the {backend} backend ({device}, {dtype})")


def choose(op: str, backend: str, available: tuple[str, ...], tensor: torch.Tensor) -> str:
    """Resolve a requested backend for one op.

    ``auto`` takes the compiled ``cpu`` path for float32 and lower on a CPU where the op has one and numba can be
    imported, else ``reference``; what it takes is logged once.

    Args:
        op: the op's name, for messages.
        backend: one of :data:`BACKENDS`.
        available: the backends that the op implements.
        tensor: the op's main input; its device and dtype decide.

    Raises:
        ValueError: for a name that is no backend.
        BackendUnavailable: for a backend that was asked for by name and cannot run here, with the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown ssm_backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    reason = "" if backend in ("auto", "reference") else _why_not(op, backend, available, tensor)
    if reason:
        raise BackendUnavailable(f"the {backend} backend of {op} cannot run here: {reason}.")
    if backend == "auto":
        backend = "reference" if _why_not(op, "cpu", available, tensor) else "cpu"
        _announce(op, backend, tensor.device.type, tensor.dtype)
    return backend


def _why_not(op: str, backend: str, available: tuple[str, ...], tensor: torch.Tensor) -> str:
    if backend not in available:
        return f"{op} has only {', '.join(available)}; use ssm_backend: auto"
    if tensor.device.type != "cpu":
        return f"the tensors are on {tensor.device}; use ssm_backend: auto"
    if tensor.dtype == torch.float64:
        return "it computes in float32; use ssm_backend: reference for float64"
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed; run: pip install numba"
    return ""
