"""What a step asks of a GPU: counted, where there is none, on torch's ``meta`` device.

Tensors on it have shapes and no values. So what a step launches shows, at any size and within a second, and a step
that reads the device anywhere (``.item()``, ``.tolist()``, ``.cpu()``, ``nonzero``, a mask as an index) raises, while
what it does on the host, on tensors of the CPU, is neither counted nor refused.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that hand out memory, or another look at it, though their schema does not say so.
NO_LAUNCH = {"_unsafe_view", "_reshape_alias", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class _AsOnAGPU(TorchFunctionMode):
    """Functions that are one operator on a GPU, and several elsewhere."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _ON_A_GPU.get(func, func)(*args, **(kwargs or {}))


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p else x


def _rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    # One operator each way, as the fused RMSNorm that torch has on a GPU since 2.9; only its shapes are the same.
    return F.layer_norm(x, normalized_shape, weight, None, eps or 0.0)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    if attn_mask is not None:  # torch makes it the number that is added to scores
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, dropout_p, is_causal)[0]


_ON_A_GPU = {F.dropout: _dropout, F.rms_norm: _rms_norm, F.scaled_dot_product_attention: _attention}


class _Launches(TorchDispatchMode):
    def __init__(self, device: str):
        super().__init__()
        self.device, self.counts = device, Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if _launches(func) and any(
            isinstance(t, Tensor) and t.device.type == self.device and t.numel()
            for t in tree_leaves((args, kwargs, result))
        ):
            self.counts[func.overloadpacket.__name__] += 1
        return result


def _launches(func: Any) -> bool:
    if func.overloadpacket.__name__ in NO_LAUNCH or func.namespace == "profiler":
        return False
    views = [r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns]
    return not (views and all(views))


@contextmanager
def kernels_counted(counts: Counter[str]) -> Iterator[None]:
    """Count Triton kernels instead of launching them, by names as ``ssd.triton._forward``."""

    def run(kernel, *args, warmup=False, **kwargs):
        if not warmup:
            function = kernel.fn
            counts[".".join([*function.__module__.split(".")[-2:], function.__name__])] += 1

    with ExitStack() as stack:
        for kind in (triton.runtime.interpreter.InterpretedFunction, triton.runtime.JITFunction):
            stack.enter_context(mock.patch.object(kind, "run", run))
        # The kernels take tensors of any device then.
        stack.enter_context(mock.patch("recbole_ssm.ops.backend._without_triton", return_value=""))
        yield


def count_launches(step: Callable[[], object], device: str = "meta") -> Counter[str]:
    """How often ``step`` launches each operator and each of our kernels; ``.total()`` is all of them.

    An operator counts once, be it made of several kernels. Those count that have a tensor on ``device``, copies to it
    included, but for views, allocations and empty tensors.

    Args:
        step: works on tensors of ``device``, with Triton kernels, which are counted and not run.
        device: ``meta``, or ``cpu`` to count what runs there.
    """
    launches = _Launches(device)
    with kernels_counted(launches.counts), optimizers_fused(), _autocast_on_meta(), _AsOnAGPU(), launches:
        step()
    return launches.counts


@contextmanager
def _autocast_on_meta() -> Iterator[None]:
    """Let code ask for autocast on ``meta``, and switch it off there, as on any device; there is none to be on."""

    def as_of_cpu(function):
        return lambda device, *args, **kwargs: function("cpu" if device == "meta" else device, *args, **kwargs)

    with ExitStack() as stack:
        for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
            stack.enter_context(mock.patch.object(torch, name, as_of_cpu(getattr(torch, name))))
        yield


@contextmanager
def optimizers_fused() -> Iterator[None]:
    """Let torch's optimizers be made with ``fused=True``, and stepped, for parameters on ``meta``, too."""
    supported = "torch.optim.optimizer._get_fused_kernels_supported_devices"
    with mock.patch(supported, return_value=["meta", "cpu", "cuda"]):
        yield
