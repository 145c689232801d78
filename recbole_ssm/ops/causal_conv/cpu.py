"""Causal depthwise convolution on a CPU: numba kernels, forward and backward, parallel over groups of sequences.

Rows are worked through in order, all channels at once, while the few rows before each are still in the first-level
cache. The backward pass recomputes each row's sum before the activation.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_ssm.ops.compiled import compiled, exp, group_borders, helper


@helper
def _sum_taps(out, x, taps, bias, t, begin):
    """``out [D] = bias + sum_k taps[k] x[t - K + 1 + k]`` over the rows that are not before ``begin``."""
    first = max(begin, t - len(taps) + 1)
    k = len(taps) - 1 - t  # the tap of row r is k + r
    if (t - first) % 2 == 0:
        row, tap = x[first], taps[k + first]
        for d in range(len(out)):
            out[d] = bias[d] + tap[d] * row[d]
        first += 1
    else:
        for d in range(len(out)):
            out[d] = bias[d]
    for r in range(first, t, 2):
        row, tap, next_row, next_tap = x[r], taps[k + r], x[r + 1], taps[k + r + 1]
        for d in range(len(out)):
            out[d] += tap[d] * row[d] + next_tap[d] * next_row[d]


@helper
def _sigmoid(v):
    e = exp(-abs(v))
    return (np.float32(1.0) if v >= np.float32(0.0) else e) / (np.float32(1.0) + e)


@compiled
def _forward(x, taps, bias, silu, cu_seqlens, group_of, y):
    for group in prange(len(group_of) - 1):
        for s in range(group_of[group], group_of[group + 1]):
            for t in range(cu_seqlens[s], cu_seqlens[s + 1]):
                out = y[t]
                _sum_taps(out, x, taps, bias, t, cu_seqlens[s])
                if silu:
                    for d in range(len(out)):
                        out[d] *= _sigmoid(out[d])


@compiled
def _backward(x, taps, bias, silu, cu_seqlens, group_of, grad_y, grad_x, grad_taps, grad_bias):
    for group in prange(len(group_of) - 1):
        grad_sum = np.empty(x.shape[1], np.float32)
        for s in range(group_of[group], group_of[group + 1]):
            begin = cu_seqlens[s]
            # Summed a sequence at a time in float32, and these sums in float64.
            into_taps, into_bias = np.zeros(taps.shape, np.float32), np.zeros(len(bias), np.float32)
            for t in range(begin, cu_seqlens[s + 1]):
                incoming, into_row = grad_y[t], grad_x[t]
                if silu:
                    _sum_taps(grad_sum, x, taps, bias, t, begin)
                    for d in range(len(grad_sum)):
                        v = grad_sum[d]
                        gate = _sigmoid(v)
                        grad_sum[d] = incoming[d] * gate * (np.float32(1.0) + v * (np.float32(1.0) - gate))
                else:
                    for d in range(len(grad_sum)):
                        grad_sum[d] = incoming[d]
                for d in range(len(grad_sum)):
                    into_bias[d] += grad_sum[d]
                    into_row[d] = np.float32(0.0)
                for k in range(max(0, len(taps) - 1 - (t - begin)), len(taps)):
                    r = t - len(taps) + 1 + k
                    row, tap, into_row, into_tap = x[r], taps[k], grad_x[r], into_taps[k]
                    for d in range(len(grad_sum)):
                        g = grad_sum[d]
                        into_row[d] += g * tap[d]
                        into_tap[d] += g * row[d]
            grad_taps[group] += into_taps
            grad_bias[group] += into_bias


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, silu, cu_seqlens):
        x, taps, bias = x.detach().contiguous(), weight.detach().T.contiguous(), bias.detach().contiguous()
        y = torch.empty_like(x)
        borders = cu_seqlens.numpy()
        _forward(x.numpy(), taps.numpy(), bias.numpy(), silu, borders, group_borders(borders), y.numpy())
        ctx.save_for_backward(x, taps, bias, cu_seqlens)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, taps, bias, cu_seqlens = ctx.saved_tensors
        borders = cu_seqlens.numpy()
        groups = group_borders(borders)
        grad_x = torch.empty_like(x)
        grad_taps, grad_bias = (torch.zeros(len(groups) - 1, *t.shape, dtype=torch.float64) for t in (taps, bias))
        grads = (grad_x, grad_taps, grad_bias)
        _backward(
            *(t.numpy() for t in (x, taps, bias)), ctx.silu, borders, groups,
            *(t.numpy() for t in (grad_y.contiguous(), *grads)),
        )  # fmt: skip
        return grad_x, grad_taps.sum(0).T.float(), grad_bias.sum(0).float(), None, None


def causal_conv_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, cu_seqlens: Tensor
) -> Tensor:
    """As :func:`recbole_ssm.ops.causal_conv` without states, compiled; float32 on the CPU."""
    if bias is None:
        bias = x.new_zeros(x.shape[1])
    return _CausalConv.apply(x, weight, bias, activation == "silu", cu_seqlens)
