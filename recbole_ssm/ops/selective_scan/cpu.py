"""Selective scan on a CPU: numba kernels, forward and backward, parallel over groups of sequences.

One channel of one sequence is scanned at a time with its states in registers or the first-level cache; the loop over
the ``N`` states is what the compiler vectorises. The backward pass recomputes the states of that one channel into a
scratch of ``[L, N]`` rather than keep ``[T, D, N]`` from the forward pass.
"""

import numba
import numpy as np
import torch
from numba import prange
from torch import Tensor

# Sums over sequences (the gradient of A) are taken per group and then over the groups in order, so the result does
# not depend on how many threads ran; 32 groups keep up to 32 cores busy.
GROUPS = 32


def _compiled(function):
    options = {"fastmath": True, "parallel": True, "error_model": "numpy"}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # neither this folder nor the user's cache can be written: compile anew in each process
        return numba.njit(function, **options)


@numba.njit(fastmath=True, inline="always")
def _exp(v):
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


@_compiled
def _forward(x, dt, A, B, C, initial_state, cu_seqlens, group_of, y, final_state):
    D, N = A.shape
    for group in prange(len(group_of) - 1):
        for s in range(group_of[group], group_of[group + 1]):
            begin, end = cu_seqlens[s], cu_seqlens[s + 1]
            for d in range(D):
                state = final_state[s, d]
                rate = A[d]
                for n in range(N):
                    state[n] = initial_state[s, d, n]
                for t in range(begin, end):
                    step = dt[t, d]
                    drive = step * x[t, d]
                    total = np.float32(0.0)
                    for n in range(N):
                        h = _exp(step * rate[n]) * state[n] + drive * B[t, n]
                        state[n] = h
                        total += h * C[t, n]
                    y[t, d] = total


@_compiled
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
                    states[0, n] = initial_state[s, d, n]
                    grad_state[n] = grad_final[s, d, n]
                for i in range(length):
                    step = dt[begin + i, d]
                    drive = step * x[begin + i, d]
                    for n in range(N):
                        a = _exp(step * rate[n])
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
                for n in range(N):
                    grad_initial[s, d, n] = grad_state[n]


def _group_borders(cu_seqlens: np.ndarray) -> np.ndarray:
    """First sequence of each of at most :data:`GROUPS` groups of about equally many rows."""
    total = int(cu_seqlens[-1])
    groups = max(1, min(GROUPS, len(cu_seqlens) - 1))
    borders = np.searchsorted(cu_seqlens, np.arange(groups + 1) * total / groups)
    borders[0], borders[-1] = 0, len(cu_seqlens) - 1
    return borders.astype(np.int64)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, initial_state, cu_seqlens):
        inputs = [t.detach().contiguous() for t in (x, dt, A, B, C, initial_state)]
        arrays = [t.numpy() for t in inputs]
        borders = cu_seqlens.numpy()
        y, final_state = torch.empty_like(inputs[0]), torch.empty_like(inputs[5])
        _forward(*arrays, borders, _group_borders(borders), y.numpy(), final_state.numpy())
        ctx.save_for_backward(*inputs, cu_seqlens)
        return y, final_state

    @staticmethod
    def backward(ctx, grad_y, grad_final):
        *inputs, cu_seqlens = ctx.saved_tensors
        x, dt, A, B, C, initial_state = inputs
        borders = cu_seqlens.numpy()
        groups = _group_borders(borders)
        grad_x, grad_dt = torch.empty_like(x), torch.empty_like(dt)
        grad_A = torch.zeros(len(groups) - 1, *A.shape)
        grad_B, grad_C = torch.zeros_like(B), torch.zeros_like(C)
        grad_initial = torch.empty_like(initial_state)
        grads = (grad_x, grad_dt, grad_A, grad_B, grad_C, grad_initial)
        incoming = (grad_y.contiguous(), grad_final.contiguous())
        arrays = [t.numpy() for t in (*inputs, *incoming, *grads)]
        _backward(*arrays[:6], borders, groups, *arrays[6:])
        return grad_x, grad_dt, grad_A.sum(0), grad_B, grad_C, grad_initial, None


def selective_scan_cpu(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """As :func:`.reference.selective_scan_reference`, compiled; float32 on the CPU, ``dt * A <= 0``."""
    return _SelectiveScan.apply(x, dt, A, B, C, initial_state, cu_seqlens)
