"""The one place that knows which backends this machine has, and chooses among them."""

import importlib.metadata
import importlib.util
import logging
import os
from functools import lru_cache

import torch
from torch.backends import cuda

from recbole_ssm.errors import BackendUnavailable
from recbole_ssm.ops import self_check
from recbole_ssm.settings import BACKENDS

NO_KERNEL = "there is no such kernel; use ssm_backend: auto"

# Oldest Triton that the kernels are made for.
TRITON = (3, 4)

# Types of device on which ``auto`` takes only what has passed its check there; what numba compiles, tests hold to it.
CHECKED_DEVICES = ("cuda",)

# Ops that a CPU runs as their reference, in torch's own operators.
WITHOUT_CPU = ("expert_diversity", "preference_features")

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


def choose(
    op: str,
    backend: str,
    tensor: torch.Tensor,
    sizes: dict[str, int],
    mamba_ssm_lacks: str = "",
    states: bool = False,
) -> str:
    """Resolve a requested backend for one op.

    ``auto`` takes the first that can run of :func:`preferred`, else ``reference``. On a GPU it must also have passed
    its check on that machine (:mod:`recbole_ssm.ops.self_check`), at these sizes; the first use of them waits for that.
    What it takes is logged once, and so is what it does not take because of a failed check.

    Args:
        op: the op's name.
        backend: one of :data:`BACKENDS`.
        tensor: the op's main input; its device and dtype decide.
        sizes: the widths of this call, by the letters of the op's docstring.
        mamba_ssm_lacks: an option of this call that the adapter to mamba_ssm or causal_conv1d cannot serve.
        states: whether this call reads initial states or gives final ones.

    Raises:
        ValueError: for a name that is no backend.
        BackendUnavailable: for a backend that was asked for by name and cannot run here, with the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown ssm_backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        letters = tuple(sizes.items())
        return _automatic(
            op, tensor.device, tensor.dtype, letters, mamba_ssm_lacks, states, tf32_allowed(tensor.device)
        )
    reason = why_not(op, backend, tensor, mamba_ssm_lacks)
    if reason:
        raise BackendUnavailable(f"the {backend} backend of {op} cannot run here: {reason}.")
    return backend


def preferred(device: torch.device) -> tuple[str, ...]:
    """What ``auto`` tries on a device before the reference, the fastest first."""
    return ("cpu",) if device.type == "cpu" else ("triton", "mamba_ssm")


def is_checked(device: torch.device) -> bool:
    """Whether ``auto`` asks for a check there; tensors that only pretend to lie on a GPU run no kernel."""
    return device.type in CHECKED_DEVICES and (device.type != "cuda" or torch.cuda.is_available())


def tf32_allowed(device: torch.device) -> bool:
    """Whether torch may round float32 products to TF32 there, by ``set_float32_matmul_precision``."""
    if device.type != "cuda":
        return False
    # torch 2.9 and later refuse to tell the one by the other's name once both have been set.
    precision = getattr(cuda.matmul, "fp32_precision", None)
    return cuda.matmul.allow_tf32 if precision is None else precision == "tf32"


@lru_cache(maxsize=None)
def _automatic(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[tuple[str, int], ...],
    mamba_ssm_lacks: str,
    states: bool,
    tf32: bool,
) -> str:
    chosen = "reference"
    probe = torch.empty(0, dtype=dtype, device=device)
    for backend in preferred(device):
        # A check takes gradients of final states, too, which mamba_ssm has not.
        if why_not(op, backend, probe, mamba_ssm_lacks) or (states and backend == "mamba_ssm"):
            continue
        if not is_checked(device) or _passes(op, backend, device, dtype, sizes, states, tf32):
            chosen = backend
            break
    _announce(op, chosen, device.type, dtype)
    return chosen


def _passes(
    op: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[tuple[str, int], ...],
    states: bool,
    tf32: bool,
) -> bool:
    check = self_check.Check(op, backend, str(device), str(dtype).removeprefix("torch."), sizes, states, tf32)
    found = self_check.verdict(check)
    if found.state != "right":
        logging.getLogger().warning(f"not used here: {check}: {found}; run_recbole --doctor tells more")
    return found.state == "right"


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
