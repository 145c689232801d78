"""Causal depthwise convolution over packed sequences."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.backend import choose
from recbole_ssm.ops.causal_conv.reference import causal_conv_reference
from recbole_ssm.ops.packing import check_packed


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Any:
    """Convolve each channel of each sequence with its own filter over the last ``K`` rows.

    ``y_t[d] = activation(bias[d] + sum_k weight[d, k] x_{t-K+1+k}[d])``; rows before a sequence's first are its
    ``initial_state``, zeros where absent.

    Args:
        x: ``[T, D]``.
        weight: ``[D, K]``; the last column weighs the current row.
        bias: ``[D]``.
        activation: ``silu`` or none.
        cu_seqlens: borders of the sequences, int32 ``[S+1]``.
        initial_state: the ``K-1`` rows before each sequence, oldest first, ``[S, D, K-1]``.
        return_final_state: also return the last ``K-1`` rows of each sequence, ``[S, D, K-1]``.
        backend: ``auto`` or ``reference``.

    Returns:
        ``[T, D]`` and, where asked for, the final state.

    Raises:
        ValueError: shapes that do not fit, an unknown activation or backend.
        BackendUnavailable: a backend that cannot run here.
    """
    check_packed(cu_seqlens, x=x)
    if weight.dim() != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(f"weight is {list(weight.shape)}, not [{x.shape[1]}, K]")
    if activation not in (None, "silu"):
        raise ValueError(f"unknown activation {activation!r}: silu or None")
    state_shape = (len(cu_seqlens) - 1, x.shape[1], weight.shape[1] - 1)
    if initial_state is None:
        initial_state = x.new_zeros(state_shape)
    elif initial_state.shape != state_shape:
        raise ValueError(f"initial_state is {list(initial_state.shape)}, not {list(state_shape)}")
    choose("causal_conv", backend, ("reference",), x)
    y, final_state = causal_conv_reference(x, weight.to(x.dtype), initial_state, cu_seqlens)
    if bias is not None:
        y = y + bias.to(x.dtype)
    if activation == "silu":
        y = F.silu(y)
    return (y, final_state) if return_final_state else y
