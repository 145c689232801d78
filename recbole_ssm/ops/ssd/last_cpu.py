"""The last rows' output of state-space duality on a CPU: numba kernels, forward and backward.

A sequence is read once each way. From its last row to its first, decays are multiplied from row to row, so that no sum
of exponents rounds; the backward pass reads it from its first row, as a step's gradient depends on the rows before it.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_ssm.ops.compiled import compiled, exp_of_negative, group_borders, helper


@helper
def _dot(a, b):
    total = np.float32(0.0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@helper
def _add_multiple(out, factor, values):
    for i in range(len(out)):
        out[i] += factor * values[i]


@compiled
def _forward(x, dt, A, B, C, cu_seqlens, groups, decay_to_end, y):
    """``decay_to_end [T, H]``, the decay from after each row to the sequence's end, is kept unless it has no rows."""
    heads = len(A)
    heads_per_group = heads // B.shape[1]
    for group in prange(len(groups) - 1):
        decay, affinity = np.empty(heads, np.float32), np.empty(B.shape[1], np.float32)
        for s in range(groups[group], groups[group + 1]):
            out = y[s]
            out[:] = np.float32(0.0)
            decay[:] = np.float32(1.0)
            for t in range(cu_seqlens[s + 1] - 1, cu_seqlens[s] - 1, -1):
                inputs, steps = x[t], dt[t]
                for g in range(len(affinity)):
                    affinity[g] = _dot(B[t, g], C[s, g])
                if len(decay_to_end):
                    kept = decay_to_end[t]
                    for h in range(len(kept)):
                        kept[h] = decay[h]
                for h in range(heads):
                    _add_multiple(out[h], steps[h] * decay[h] * affinity[h // heads_per_group], inputs[h])
                for h in range(len(steps)):
                    decay[h] *= exp_of_negative(steps[h] * A[h])


@compiled
def _backward(x, dt, A, B, C, cu_seqlens, groups, decay_to_end, grad_y, grad_x, grad_dt, grad_A, grad_B, grad_C):
    heads = len(A)
    heads_per_group = heads // B.shape[1]
    for group in prange(len(groups) - 1):
        affinity, of_affinity = np.empty(B.shape[1], np.float32), np.empty(B.shape[1], np.float32)
        earlier = np.empty(heads, np.float32)  # sum of the exponents' gradients of the rows before
        of_rate = grad_A[group]
        for s in range(groups[group], groups[group + 1]):
            of_out = grad_y[s]
            earlier[:] = np.float32(0.0)
            grad_C[s] = np.float32(0.0)
            for t in range(cu_seqlens[s], cu_seqlens[s + 1]):
                inputs, of_inputs, steps, decay, of_steps = x[t], grad_x[t], dt[t], decay_to_end[t], grad_dt[t]
                for g in range(len(affinity)):
                    affinity[g] = _dot(B[t, g], C[s, g])
                    of_affinity[g] = np.float32(0.0)
                for h in range(heads):
                    g = h // heads_per_group
                    of_weight, weight = _dot(inputs[h], of_out[h]), steps[h] * decay[h]
                    of_row, of_head, factor = of_inputs[h], of_out[h], weight * affinity[g]
                    for p in range(len(of_row)):
                        of_row[p] = factor * of_head[p]
                    of_affinity[g] += weight * of_weight
                    of_steps[h] = decay[h] * affinity[g] * of_weight + A[h] * earlier[h]
                    of_rate[h] += steps[h] * earlier[h]
                    earlier[h] += factor * of_weight
                for g in range(len(affinity)):
                    of_b, c = grad_B[t, g], C[s, g]
                    for n in range(len(of_b)):
                        of_b[n] = of_affinity[g] * c[n]
                    _add_multiple(grad_C[s, g], of_affinity[g], B[t, g])


class _SSDLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, cu_seqlens, differentiable):
        inputs = [t.detach().contiguous() for t in (x, dt, A, B, C)]
        borders = cu_seqlens.long().numpy()
        decay_to_end = torch.empty_like(inputs[1] if differentiable and any(ctx.needs_input_grad) else inputs[1][:0])
        y = x.new_empty(len(C), *x.shape[1:])
        _forward(*(t.numpy() for t in inputs), borders, group_borders(borders), decay_to_end.numpy(), y.numpy())
        ctx.save_for_backward(*inputs, cu_seqlens, decay_to_end)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        *inputs, cu_seqlens, decay_to_end = ctx.saved_tensors
        x, dt, A, B, C = inputs
        borders = cu_seqlens.long().numpy()
        groups = group_borders(borders)
        grad_x, grad_dt, grad_B, grad_C = (torch.empty_like(t) for t in (x, dt, B, C))
        grad_A = torch.zeros(len(groups) - 1, len(A), dtype=torch.float64)
        _backward(
            *(t.numpy() for t in inputs), borders, groups, decay_to_end.numpy(), grad_y.contiguous().numpy(),
            *(t.numpy() for t in (grad_x, grad_dt, grad_A, grad_B, grad_C)),
        )  # fmt: skip
        return grad_x, grad_dt, grad_A.sum(0).float(), grad_B, grad_C, None, None


def ssd_last_cpu(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor) -> Tensor:
    """As :func:`.reference.ssd_last_reference`, compiled; float32 on the CPU, ``dt * A <= 0``."""
    return _SSDLast.apply(x, dt, A, B, C, cu_seqlens, torch.is_grad_enabled())
