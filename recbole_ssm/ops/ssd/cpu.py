"""State-space duality on a CPU: numba kernels, forward and backward, parallel over groups of sequences.

Sequences are cut into chunks of :data:`~.cpu_tiles.ROWS` rows (arXiv 2405.21060, section 6). Where the paper keeps a
matrix of decays for each head, these kernels lay the heads' channels side by side, ``LANES`` at a time, and carry each
row's input along the chunk, decayed from row to row. So the products with B and C need no head in them, every inner
loop is a plain one over channels, and decays are multiplied, never divided or taken as differences of logarithms.

Here is the forward pass; :mod:`.cpu_backward` has the other, :mod:`.cpu_tiles` what both do with a chunk's channels.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_ssm.ops.compiled import compiled, group_borders, helper
from recbole_ssm.ops.ssd.cpu_backward import backward
from recbole_ssm.ops.ssd.cpu_tiles import (
    LANES,
    ROWS,
    accumulate,
    add_product,
    advance,
    block_borders,
    buffer,
    heads_of_lanes,
    load_channels,
    load_decays,
    load_rows,
    load_state,
    multiply,
    multiply_rows,
    spread,
    store_channels,
    store_state,
    up_to_4,
    zero,
)


@helper
def _add_own(lanes, gram, drive, rows):
    """``lanes[i] += gram[i, i] drive[i]``: what each row contributes to itself."""
    for i in range(rows):
        row, u = lanes[i * LANES : (i + 1) * LANES], drive[i * LANES : (i + 1) * LANES]
        own = gram[i, i]
        for k in range(LANES):
            row[k] += own * u[k]


@helper
def _scan_rows(out, carried, decays, drive, gram, rows):
    """Add to each row of ``out`` what the rows of its chunk before it contribute.

    ``out[i] += sum_{j<i} gram[i, j] carried[j]`` with ``carried[j]``, the row's ``drive``, decayed from ``j`` to ``i``;
    it is left decayed to the last row.
    """
    zero(carried)
    for i in range(rows):
        a, u = decays[i * LANES : (i + 1) * LANES], drive[i * LANES : (i + 1) * LANES]
        o, new = out[i * LANES : (i + 1) * LANES], carried[i * LANES : (i + 1) * LANES]
        for j in range(0, i, 4):  # rows of the four that have not begun yet are zero
            d = carried[j * LANES : (j + 4) * LANES]
            g0, g1, g2, g3 = gram[i, j], gram[i, j + 1], gram[i, j + 2], gram[i, j + 3]
            for k in range(LANES):
                d0, d1, d2, d3 = a[k] * d[k], a[k] * d[k + LANES], a[k] * d[k + 2 * LANES], a[k] * d[k + 3 * LANES]
                o[k] += g0 * d0 + g1 * d1 + g2 * d2 + g3 * d3
                d[k], d[k + LANES], d[k + 2 * LANES], d[k + 3 * LANES] = d0, d1, d2, d3
        for k in range(LANES):
            new[k] = u[k]


@helper
def _forward_group(x, dt, A, B, C, initial_state, cu_seqlens, sequences, y, y_before, final_state):
    heads, width, states = initial_state.shape[1:]
    groups, padded = B.shape[1], up_to_4(states)
    channels = heads * width // groups
    inward, outward = np.empty((ROWS, padded), np.float32), np.empty((ROWS, padded), np.float32)
    gram, head_decays = np.zeros((ROWS, ROWS), np.float32), np.empty((ROWS, heads), np.float32)
    decays, totals, steps = buffer(), buffer(), buffer()
    drive, carried, out = buffer(), buffer(), buffer()
    blocks = -(-channels // LANES)
    state = np.empty((blocks, padded * LANES), np.float32)
    for g in range(groups):
        head_of = heads_of_lanes(g, channels, width)
        for s in range(sequences[0], sequences[1]):
            end = cu_seqlens[s + 1]
            entered = len(initial_state) > 0
            if entered:
                for block in range(blocks):
                    lane, stop = block_borders(g, block, channels)
                    load_state(state[block], initial_state[s], lane, stop)
            for first in range(cu_seqlens[s], end, ROWS):
                rows = min(ROWS, end - first)
                load_rows(inward, B, first, 1, rows, g)
                load_rows(outward, C, first, 1, rows, g)
                multiply_rows(gram, outward, inward, rows)
                load_decays(head_decays, dt, A, first, 1, rows, end)
                left = first + rows < end or len(final_state) > 0
                for block in range(blocks):
                    lane, stop = block_borders(g, block, channels)
                    heads_here = head_of[block * LANES : (block + 1) * LANES]
                    spread(decays, head_decays, 0, 1, rows, heads_here)
                    spread(steps, dt, first, 1, rows, heads_here)
                    load_channels(drive, x, first, 1, rows, lane, stop)
                    multiply(drive, steps)
                    if entered or left:
                        accumulate(totals, decays, rows)
                    zero(out)
                    if entered:
                        add_product(out, outward, state[block], up_to_4(rows), padded)
                        multiply(out, totals)
                    _scan_rows(out, carried, decays, drive, gram, rows)
                    if left:
                        advance(state[block], entered, totals, carried, inward, rows)
                    if len(y_before) > 0:
                        store_channels(y_before, out, first, 1, rows, lane, stop)
                    _add_own(out, gram, drive, rows)
                    store_channels(y, out, first, 1, rows, lane, stop)
                entered = entered or left
            if len(final_state) > 0:
                for block in range(blocks):
                    lane, stop = block_borders(g, block, channels)
                    if not entered:
                        zero(state[block])
                    store_state(final_state[s], state[block], lane, stop)


@compiled
def _forward(x, dt, A, B, C, initial_state, cu_seqlens, group_of, y, y_before, final_state):
    for group in prange(len(group_of) - 1):
        sequences = group_of[group : group + 2]
        _forward_group(x, dt, A, B, C, initial_state, cu_seqlens, sequences, y, y_before, final_state)


def _arrays(**tensors: Tensor) -> dict[str, np.ndarray]:
    """As the kernels take them: those like the input with the channels of all heads side by side."""
    flat = ("x", "y", "y_before", "grad_y", "grad_x")
    return {name: (t.flatten(1) if name in flat else t).numpy() for name, t in tensors.items()}


class _SSD(torch.autograd.Function):
    """A state that is not given or not asked for is a tensor of no sequences, ``[0, H, P, N]``."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, initial_state, cu_seqlens, return_final_state, differentiable):
        given = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "initial_state": initial_state}
        inputs = {name: t.detach().contiguous() for name, t in given.items()}
        x, initial_state = inputs["x"], inputs["initial_state"]
        borders = cu_seqlens.long().numpy()
        y = torch.empty_like(x)
        y_before = torch.empty_like(x if differentiable and any(ctx.needs_input_grad) else x[:0])
        final_state = torch.empty((len(borders) - 1) * return_final_state, *initial_state.shape[1:])
        outputs = _arrays(y=y, y_before=y_before, final_state=final_state)
        _forward(**_arrays(**inputs), cu_seqlens=borders, group_of=group_borders(borders), **outputs)
        ctx.save_for_backward(*inputs.values(), cu_seqlens, y_before, final_state)
        ctx.names = tuple(inputs)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_final):
        *inputs, cu_seqlens, y_before, final_state = ctx.saved_tensors
        inputs = dict(zip(ctx.names, inputs, strict=True))
        x, dt, A, B, C, initial_state = inputs.values()
        borders = cu_seqlens.long().numpy()
        groups = group_borders(borders)
        grad_x, grad_dt = torch.empty_like(x), torch.empty_like(dt)
        grad_A = torch.zeros(len(groups) - 1, len(A), dtype=torch.float64)
        grad_B, grad_C = torch.zeros_like(B), torch.zeros_like(C)
        grad_initial = torch.empty_like(initial_state if ctx.needs_input_grad[5] else initial_state[:0])
        kept = _arrays(y_before=y_before, final_state=final_state)
        incoming = _arrays(grad_y=grad_y.contiguous(), grad_final=grad_final.contiguous())
        gradients = _arrays(
            grad_x=grad_x, grad_dt=grad_dt, grad_A=grad_A, grad_B=grad_B, grad_C=grad_C, grad_initial=grad_initial
        )
        backward(**_arrays(**inputs), cu_seqlens=borders, group_of=groups, **kept, **incoming, **gradients)
        return grad_x, grad_dt, grad_A.sum(0).float(), grad_B, grad_C, grad_initial, None, None, None


def ssd_cpu(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`.reference.ssd_reference`, compiled; float32 on the CPU, ``dt * A <= 0``."""
    if initial_state is None:
        initial_state = x.new_empty(0, *x.shape[1:], B.shape[2])
    differentiable = torch.is_grad_enabled()  # which the forward of a Function cannot see
    y, final_state = _SSD.apply(x, dt, A, B, C, initial_state, cu_seqlens, return_final_state, differentiable)
    return y, final_state if return_final_state else None
