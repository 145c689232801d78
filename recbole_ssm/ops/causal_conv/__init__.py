"""Causal depthwise convolution over packed sequences."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.backend import choose
from recbole_ssm.ops.causal_conv.reference import causal_conv_reference
from recbole_ssm.ops.packing import borders, check_packed, sequence_ids, single_rows

LONGEST_FILTER = 8


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
        weight: ``[D, K]``, K from 1 to 8; the last column weighs the current row.
        bias: ``[D]``.
        activation: ``silu`` or none.
        cu_seqlens: borders of the sequences, int32 ``[S+1]``.
        initial_state: the ``K-1`` rows before each sequence, oldest first, ``[S, D, K-1]``.
        return_final_state: also return the last ``K-1`` rows of each sequence, ``[S, D, K-1]``.
        backend: see :mod:`recbole_ssm.ops.backend`; ``mamba_ssm`` is the causal_conv1d package.

    Returns:
        ``[T, D]`` and, where asked for, the final state, both in ``x``'s dtype.

    Raises:
        ValueError: shapes that do not fit, an unknown activation or backend.
        BackendUnavailable: a backend that cannot run here.
    """
    check_packed(cu_seqlens, x=x)
    if weight.dim() != 2 or weight.shape[0] != x.shape[1] or not 1 <= weight.shape[1] <= LONGEST_FILTER:
        raise ValueError(f"weight is {list(weight.shape)}, not [{x.shape[1]}, K] with K from 1 to {LONGEST_FILTER}")
    if activation not in (None, "silu"):
        raise ValueError(f"unknown activation {activation!r}: silu or None")
    state_shape = (len(cu_seqlens) - 1, x.shape[1], weight.shape[1] - 1)
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(f"initial_state is {list(initial_state.shape)}, not {list(state_shape)}")
    taps = weight.shape[1]
    lacks = "" if 2 <= taps <= 4 else f"filter of {taps} taps, only of 2 to 4"
    chosen = choose("causal_conv", backend, x, {"D": x.shape[1], "K": taps}, lacks)
    if initial_state is None and not return_final_state:
        return _stateless(chosen, x, weight, bias, activation, cu_seqlens)

    if initial_state is not None and len(x) == state_shape[0] and borders(cu_seqlens).longest == 1:
        y, seen = _step(x, weight, bias, activation, initial_state)
        return (y, seen) if return_final_state else y

    # No backend knows of states: their rows are laid in front of each sequence, whose outputs are dropped.
    before = taps - 1
    sequence = torch.arange(len(cu_seqlens) - 1, device=x.device)
    extended_cu = cu_seqlens + before * single_rows(len(sequence), x.device)
    rows = torch.arange(len(x), device=x.device) + before * (sequence_ids(cu_seqlens) + 1)
    extended = x.new_zeros(len(x) + before * len(sequence), x.shape[1]).index_put((rows,), x)
    if initial_state is not None:
        fronts = extended_cu[:-1, None].long() + torch.arange(before, device=x.device)
        extended = extended.index_put((fronts,), initial_state.mT.to(x.dtype))
    y = _stateless(chosen, extended, weight, bias, activation, extended_cu)[rows]
    if not return_final_state:
        return y
    ends = extended_cu[1:, None].long() - before + torch.arange(before, device=x.device)
    return y, extended[ends].mT


def _step(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, before: Tensor
) -> tuple[Tensor, Tensor]:
    """One more row of each sequence: a few operations on small tensors, which no kernel is worth its call for."""
    compute = torch.promote_types(x.dtype, torch.float32)
    seen = torch.cat([before.to(x.dtype), x[..., None]], -1)
    y = (seen.to(compute) * weight.to(compute)).sum(-1)
    y = y if bias is None else y + bias.to(compute)
    return (F.silu(y) if activation else y).to(x.dtype), seen[..., 1:]


def _stateless(chosen, x, weight, bias, activation, cu_seqlens):
    if chosen == "triton":
        from recbole_ssm.ops.causal_conv.triton import causal_conv_triton

        return causal_conv_triton(x, weight, bias, activation, cu_seqlens)
    if chosen == "mamba_ssm":
        from recbole_ssm.ops.causal_conv.external import causal_conv_external

        return causal_conv_external(x, weight, bias, activation, cu_seqlens)
    compute = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(compute)
    if chosen == "cpu":
        from recbole_ssm.ops.causal_conv.cpu import causal_conv_cpu

        return causal_conv_cpu(x.to(compute), weight.to(compute), bias, activation, cu_seqlens).to(x.dtype)
    return causal_conv_reference(x.to(compute), weight.to(compute), bias, activation, cu_seqlens).to(x.dtype)
