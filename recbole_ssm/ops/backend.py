"""The one place that knows which backends this machine has, and chooses among them."""

import importlib.metadata
import importlib.util
import logging
import os
from functools import lru_cache

import torch

from recbole_ssm.errors import BackendUnavailable

BACKENDS = ("auto", "reference", "cpu", "triton", "mamba_ssm")

NO_KERNEL = "there is no such kernel; use ssm_backend: auto"

# Oldest Triton that the kernels are made for.
TRITON = (3, 4)

# Ops that a CPU runs as their reference, in torch's own operators.
WITHOUT_CPU = ("expert_diversity", "preference_directions")

# What the adapters need, and how to get it.
EXTERNAL = {
    "selective_scan": ("selective_scan_cuda", "MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm --no-build-isolation"),
    "ssd": ("mamba_ssm", "pip install 'mamba-ssm[causal-conv1d]' --no-build-isolation"),
    "causal_conv": ("causal_conv1d", "pip install causal-conv1d --no-build-isolation"),
}


@lru_cache(maxsize=None)
def _announce(op: str, backend: str, device: str, dtype: torch.dtype) -> None:
    first = "; its first use on a machine compiles it, in up to half a minute" if backend != "reference" else ""
    logging.getLogger().info(f"{op} runs on the {backend} backend ({device}, {dtype}){first}")


def choose(op: str, backend: str, tensor: torch.Tensor, mamba_ssm_lacks: str = "") -> str:
    """Resolve a requested backend for one op.

    ``auto`` takes ``triton`` on a GPU and the compiled ``cpu`` path on a CPU; where that cannot run or there is none,
    and for float64, ``reference``. What it takes is logged once.

    Args:
        op: the op's name.
        backend: one of :data:`BACKENDS`.
        tensor: the op's main input; its device and dtype decide.
        mamba_ssm_lacks: an option of this call that the adapter to mamba_ssm or causal_conv1d cannot serve.

    Raises:
        ValueError: for a name that is no backend.
        BackendUnavailable: for a backend that was asked for by name and cannot run here, with the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown ssm_backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        fast = "cpu" if tensor.device.type == "cpu" else "triton"
        backend = "reference" if why_not(op, fast, tensor) else fast
        _announce(op, backend, tensor.device.type, tensor.dtype)
        return backend
    reason = why_not(op, backend, tensor, mamba_ssm_lacks)
    if reason:
        raise BackendUnavailable(f"the {backend} backend of {op} cannot run here: {reason}.")
    return backend


def why_not(op: str, backend: str, tensor: torch.Tensor, mamba_ssm_lacks: str = "") -> str:
    """Why ``backend``, one of :data:`BACKENDS` but not ``auto``, cannot run ``op`` on this tensor; empty if it can."""
    if backend == "reference":
        return ""
    if tensor.dtype == torch.float64:
        return "it computes in float32; use ssm_backend: reference for float64"
    if backend == "cpu":
        return NO_KERNEL if op in WITHOUT_CPU else _without_cpu(tensor)
    if backend == "triton":
        return _without_triton(tensor)
    if op not in EXTERNAL:
        return NO_KERNEL
    module, install = EXTERNAL[op]
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed; run: {install}"
    if tensor.device.type != "cuda":
        return f"the tensors are on {tensor.device}, its kernels need a GPU; use ssm_backend: auto"
    return f"it has no {mamba_ssm_lacks}; use ssm_backend: auto" if mamba_ssm_lacks else ""


def _without_cpu(tensor: torch.Tensor) -> str:
    if tensor.device.type != "cpu":
        return f"the tensors are on {tensor.device}; use ssm_backend: auto"
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed; run: pip install numba"
    return ""


def _without_triton(tensor: torch.Tensor) -> str:
    if not _triton_version():
        return "Triton is not installed; run: pip install 'triton>=3.4' (Linux only)"
    if _triton_version() < TRITON:
        return (
            "Triton is too old; run: pip install --upgrade 'triton>=3.4', with a PyTorch that takes it (2.8 or later)"
        )
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if tensor.device.type == "cuda" or (interpreted and tensor.device.type == "cpu"):
        return ""
    return f"the tensors are on {tensor.device}, its kernels need a GPU; use ssm_backend: auto"


@lru_cache(maxsize=None)
def _triton_version() -> tuple[int, ...]:
    """Triton's version, major and minor; empty where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return ()
    try:
        return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:  # other distributions ship it under names of their own
        import triton

        return tuple(int(part) for part in triton.__version__.split(".")[:2])
