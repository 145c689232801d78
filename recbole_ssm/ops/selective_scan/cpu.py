"""Selective scan on a CPU: numba kernels, forward and backward, parallel over groups of sequences.

One channel of one sequence is scanned at a time with its states in registers or the first-level cache; the loop over
the ``N`` states is what the compiler vectorises. The backward pass recomputes the states of that one channel into
scratch of ``[L, N]`` rather than keep ``[T, D, N]`` from the forward pass.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_ssm.ops.compiled import compiled, exp_of_negative, group_borders, helper

# States worked on together in the backward pass, more of them in turn. With all that belongs to a row in one array, at
# distances known beforehand, the compiler sees what does not overlap: twice as fast as one array for each.
STATES = 32


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
                    if len(C) > 0:
                        total = np.float32(0.0)
                        for n in range(N):
                            h = exp_of_negative(step * rate[n]) * state[n] + drive * B[t, n]
                            state[n] = h
                            total += h * C[t, n]
                        y[t, d] = total
                    else:
                        for n in range(N):
                            state[n] = exp_of_negative(step * rate[n]) * state[n] + drive * B[t, n]
                if len(final_state) > 0:
                    for n in range(N):
                        final_state[s, d, n] = state[n]


@helper
def _backward_of_channel(rows, history, channel, x, dt, grad_y, grad_x, grad_dt):
    """One channel of one sequence and :data:`STATES` of its states; adds to the gradients.

    Args:
        rows: for each row B, C and the gradients of both, flat ``[L * 4 * STATES]``.
        history: for each row its decays and the states before it, flat ``[(L + 1) * 2 * STATES]``.
        channel: gradient of the state, rates, gradient of the rates, flat ``[3 * STATES]``.
        x: ``[L]``.
        dt: ``[L]``.
        grad_y: ``[L]``.
        grad_x: ``[L]``.
        grad_dt: ``[L]``.
    """
    for i in range(len(x)):
        step = dt[i]
        drive = step * x[i]
        row, here = rows[i * 4 * STATES : (i + 1) * 4 * STATES], history[i * 2 * STATES : (i + 2) * 2 * STATES]
        for n in range(STATES):
            a = exp_of_negative(step * channel[n + STATES])
            after = a * here[n + STATES] + drive * row[n]
            here[n] = a
            here[n + 3 * STATES] = after
    for j in range(len(x)):
        i = len(x) - 1 - j
        step, inp, out = dt[i], x[i], grad_y[i]
        drive = step * inp
        row, here = rows[i * 4 * STATES : (i + 1) * 4 * STATES], history[i * 2 * STATES : (i + 2) * 2 * STATES]
        into_drive, into_step = np.float32(0.0), np.float32(0.0)
        for n in range(STATES):
            b, before, after = row[n], here[n + STATES], here[n + 3 * STATES]
            g = channel[n] + out * row[n + STATES]
            into_b, into_c = row[n + 2 * STATES] + g * drive, row[n + 3 * STATES] + out * after
            into_drive += g * b
            carried = g * here[n]
            into_exponent = carried * before
            into_step += into_exponent * channel[n + STATES]
            into_rate = channel[n + 2 * STATES] + into_exponent * step
            # Stored after all loads: the compiler cannot know that the arrays do not overlap.
            row[n + 2 * STATES], row[n + 3 * STATES] = into_b, into_c
            channel[n + 2 * STATES], channel[n] = into_rate, carried
        grad_x[i] += into_drive * step
        grad_dt[i] += into_drive * inp + into_step


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
        rows = np.empty(longest * 4 * STATES, np.float32)
        history = np.empty((longest + 1) * 2 * STATES, np.float32)
        channel = np.empty(3 * STATES, np.float32)
        for s in range(group_of[group], group_of[group + 1]):
            begin, end = cu_seqlens[s], cu_seqlens[s + 1]
            inputs, steps, into_y = x[begin:end].T.copy(), dt[begin:end].T.copy(), grad_y[begin:end].T.copy()
            into_x, into_dt = np.zeros_like(inputs), np.zeros_like(inputs)
            for first in range(0, N, STATES):
                count = min(STATES, N - first)
                rows[: (end - begin) * 4 * STATES] = np.float32(0.0)
                for i in range(end - begin):
                    for n in range(count):
                        rows[i * 4 * STATES + n] = B[begin + i, first + n]
                        rows[i * 4 * STATES + n + STATES] = C[begin + i, first + n]
                for d in range(D):
                    channel[:] = np.float32(0.0)
                    history[: 2 * STATES] = np.float32(0.0)
                    for n in range(count):
                        channel[n + STATES] = A[d, first + n]
                        if len(grad_final) > 0:
                            channel[n] = grad_final[s, d, first + n]
                        if len(initial_state) > 0:
                            history[n + STATES] = initial_state[s, d, first + n]
                    _backward_of_channel(rows, history, channel, inputs[d], steps[d], into_y[d], into_x[d], into_dt[d])
                    for n in range(count):
                        grad_A[group, d, first + n] += channel[n + 2 * STATES]
                        if len(grad_initial) > 0:
                            grad_initial[s, d, first + n] = channel[n]
                for i in range(end - begin):
                    for n in range(count):
                        grad_B[begin + i, first + n] = rows[i * 4 * STATES + n + 2 * STATES]
                        grad_C[begin + i, first + n] = rows[i * 4 * STATES + n + 3 * STATES]
            grad_x[begin:end] = into_x.T
            grad_dt[begin:end] = into_dt.T


class _SelectiveScan(torch.autograd.Function):
    """A state that is not given or not asked for is a tensor of no sequences, ``[0, D, N]``.

    Without rows in ``C [0, N]`` there is no output, ``[0, D]``.
    """

    @staticmethod
    def forward(ctx, x, dt, A, B, C, initial_state, cu_seqlens, return_final_state):
        given = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "initial_state": initial_state}
        inputs = {name: t.detach().contiguous() for name, t in given.items()}
        borders = cu_seqlens.numpy()
        y = x.new_empty(len(C), x.shape[1])
        final_state = torch.empty((len(borders) - 1) * return_final_state, *A.shape)
        _forward(
            **{name: t.numpy() for name, t in inputs.items()}, cu_seqlens=borders, group_of=group_borders(borders),
            y=y.numpy(), final_state=final_state.numpy(),
        )  # fmt: skip
        ctx.save_for_backward(*inputs.values(), cu_seqlens)
        ctx.names = tuple(inputs)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_final):
        *inputs, cu_seqlens = ctx.saved_tensors
        inputs = dict(zip(ctx.names, inputs, strict=True))
        x, dt, A, B, C, initial_state = inputs.values()
        rows_of_C = len(C)
        if rows_of_C < len(x):
            C, grad_y = torch.zeros_like(B), torch.zeros_like(x)
            inputs["C"] = C
        borders = cu_seqlens.numpy()
        groups = group_borders(borders)
        grad_x, grad_dt = torch.empty_like(x), torch.empty_like(dt)
        grad_A = torch.zeros(len(groups) - 1, *A.shape)
        grad_B, grad_C = torch.empty_like(B), torch.empty_like(C)
        grad_initial = torch.empty_like(initial_state)
        gradients = {
            "grad_y": grad_y.contiguous(), "grad_final": grad_final.contiguous(), "grad_x": grad_x, "grad_dt": grad_dt,
            "grad_A": grad_A, "grad_B": grad_B, "grad_C": grad_C, "grad_initial": grad_initial,
        }  # fmt: skip
        arrays = {name: t.numpy() for name, t in (inputs | gradients).items()}
        _backward(**arrays, cu_seqlens=borders, group_of=groups)
        return grad_x, grad_dt, grad_A.sum(0), grad_B, grad_C[:rows_of_C], grad_initial, None, None


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
