"""Selective scan on a CPU: numba kernels, forward and backward, parallel over groups of sequences.

One channel of one sequence is scanned at a time with its states in registers or the first-level cache; the loop over
the ``N`` states is what the compiler vectorises. The backward pass recomputes the states of that one channel into a
scratch of ``[L, N]`` rather than keep ``[T, D, N]`` from the forward pass.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_ssm.ops.compiled import compiled, exp_of_negative, group_borders


@compiled
def _forward(x, dt, A, B, C, initial_state, cu_seqlens, group_of, y, final_state):
    D, N = A.shape
    for group in prange(len(group_of) - 1):
        state = np.empty(N, np.float32)
        for s in range(group_of[group], group_of[group + 1]):
            begin, end = cu_seqlens[s], cu_seqlens[s + 1]
            for d in range(D):
                rate = A[d]
                for n in range(N):
                    state[n] = initial_state[s, d, n] if len(initial_state) > 0 else np.float32(0.0)
                for t in range(begin, end):
                    step = dt[t, d]
                    drive = step * x[t, d]
                    total = np.float32(0.0)
                    for n in range(N):
                        h = exp_of_negative(step * rate[n]) * state[n] + drive * B[t, n]
                        state[n] = h
                        total += h * C[t, n]
                    y[t, d] = total
                if len(final_state) > 0:
                    for n in range(N):
                        final_state[s, d, n] = state[n]


@compiled
def _backward(
    x, dt, A, B, C, initial_state, cu_seqlens, group_of, grad_y, grad_final, grad_x, grad_dt, grad_A, grad_B, grad_C,
    grad_initial,
):  # fmt: skip
    D, N = A.shape
    for group in prange(len(group_of) - 1):
        longest = 0
        for s in range(group_of[group], group_of[group + 1]):
            longest = max(longest, cu_seqlens[s + 1] - cu_seqlens[s])
        states = np.empty((longest + 1, N), np.float32)
        decays = np.empty((longest, N), np.float32)
        grad_state = np.empty(N, np.float32)
        grad_rate = grad_A[group]
        for s in range(group_of[group], group_of[group + 1]):
            begin, end = cu_seqlens[s], cu_seqlens[s + 1]
            length = end - begin
            for d in range(D):
                rate = A[d]
                for n in range(N):
                    states[0, n] = initial_state[s, d, n] if len(initial_state) > 0 else np.float32(0.0)
                    grad_state[n] = grad_final[s, d, n] if len(grad_final) > 0 else np.float32(0.0)
                for i in range(length):
                    step = dt[begin + i, d]
                    drive = step * x[begin + i, d]
                    for n in range(N):
                        a = exp_of_negative(step * rate[n])
                        decays[i, n] = a
                        states[i + 1, n] = a * states[i, n] + drive * B[begin + i, n]
                for j in range(length):
                    i = length - 1 - j
                    t = begin + i
                    step = dt[t, d]
                    inp = x[t, d]
                    out = grad_y[t, d]
                    drive = step * inp
                    into_drive = np.float32(0.0)
                    into_step = np.float32(0.0)
                    for n in range(N):
                        g = grad_state[n] + out * C[t, n]
                        grad_C[t, n] += out * states[i + 1, n]
                        grad_B[t, n] += g * drive
                        into_drive += g * B[t, n]
                        carried = g * decays[i, n]
                        into_exponent = carried * states[i, n]
                        into_step += into_exponent * rate[n]
                        grad_rate[d, n] += into_exponent * step
                        grad_state[n] = carried
                    grad_x[t, d] = into_drive * step
                    grad_dt[t, d] = into_drive * inp + into_step
                if len(grad_initial) > 0:
                    for n in range(N):
                        grad_initial[s, d, n] = grad_state[n]


class _SelectiveScan(torch.autograd.Function):
    """A state that is not given or not asked for is a tensor of no sequences, ``[0, D, N]``."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, initial_state, cu_seqlens, return_final_state):
        inputs = [t.detach().contiguous() for t in (x, dt, A, B, C, initial_state)]
        arrays = [t.numpy() for t in inputs]
        borders = cu_seqlens.numpy()
        y = torch.empty_like(inputs[0])
        final_state = torch.empty((len(borders) - 1) * return_final_state, *A.shape)
        _forward(*arrays, borders, group_borders(borders), y.numpy(), final_state.numpy())
        ctx.save_for_backward(*inputs, cu_seqlens)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_final):
        *inputs, cu_seqlens = ctx.saved_tensors
        x, dt, A, B, C, initial_state = inputs
        borders = cu_seqlens.numpy()
        groups = group_borders(borders)
        grad_x, grad_dt = torch.empty_like(x), torch.empty_like(dt)
        grad_A = torch.zeros(len(groups) - 1, *A.shape)
        grad_B, grad_C = torch.zeros_like(B), torch.zeros_like(C)
        grad_initial = torch.empty_like(initial_state)
        grads = (grad_x, grad_dt, grad_A, grad_B, grad_C, grad_initial)
        incoming = (grad_y.contiguous(), grad_final.contiguous())
        arrays = [t.numpy() for t in (*inputs, *incoming, *grads)]
        _backward(*arrays[:6], borders, groups, *arrays[6:])
        return grad_x, grad_dt, grad_A.sum(0), grad_B, grad_C, grad_initial, None, None


def selective_scan_cpu(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`.reference.selective_scan_reference`, compiled; float32 on the CPU, ``dt * A <= 0``."""
    if initial_state is None:
        initial_state = x.new_empty(0, *A.shape)
    y, final_state = _SelectiveScan.apply(x, dt, A, B, C, initial_state, cu_seqlens, return_final_state)
    return y, final_state if return_final_state else None
