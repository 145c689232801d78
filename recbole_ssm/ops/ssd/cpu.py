"""State-space duality on a CPU: numba kernels, forward and backward, parallel over groups of sequences.

Sequences are cut into chunks of :data:`ROWS` rows (arXiv 2405.21060, section 6). Where the paper keeps a matrix of
decays for each head, these kernels lay the heads' channels side by side, ``LANES`` at a time, and carry each row's
input along the chunk, decayed from row to row. So the products with B and C need no head in them, every inner loop is
a plain one over channels, and decays are multiplied, never divided or taken as differences of logarithms.

The gradient of the input is the same scan from the last row to the first, with B and C exchanged and the gradient of
the output as its input. The backward pass runs it after a forward scan that recomputes the states for the gradient of
C, chunk by chunk; nothing of the size of all states is ever kept. With ``g_t`` the gradient of the state after row
``t``, the exponent's gradient follows without states from that of the row after it::

    <g_t, a_t h_{t-1}> = <g_{t+1}, a_{t+1} h_t> + grad_y_t . a_t h_{t-1} C_t - u_t . a_{t+1} g_{t+1} B_t

where the last two are output and input gradient but for what a row gives to itself, which would only cancel. Rounding
adds up along such a sum, so it begins anew, from a kept state, every :data:`RESTART` chunks.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_ssm.ops.compiled import compiled, exp_of_negative, group_borders, part

ROWS = 16  # a chunk; sequences no longer than this need no state at all
RESTART = 4
# Channels worked on together. Row i of a buffer begins at i * LANES: with the distance between rows known, the compiler
# sees that they do not overlap.
LANES = 128
VECTOR = 16  # lanes that a processor works on at once; faster where it divides the heads' width


@part
def _up_to_4(count):
    return (count + 3) // 4 * 4


@part
def _add_product(out, left, right, rows, inner):
    """``out [rows, LANES] += left [rows, inner] @ right [inner, LANES]``, both sizes multiples of 4."""
    for i in range(0, rows, 4):
        o = out[i * LANES : (i + 4) * LANES]
        for j in range(0, inner, 4):
            r = right[j * LANES : (j + 4) * LANES]
            a0, a1, a2, a3 = left[i, j], left[i, j + 1], left[i, j + 2], left[i, j + 3]
            b0, b1, b2, b3 = left[i + 1, j], left[i + 1, j + 1], left[i + 1, j + 2], left[i + 1, j + 3]
            c0, c1, c2, c3 = left[i + 2, j], left[i + 2, j + 1], left[i + 2, j + 2], left[i + 2, j + 3]
            d0, d1, d2, d3 = left[i + 3, j], left[i + 3, j + 1], left[i + 3, j + 2], left[i + 3, j + 3]
            for k in range(LANES):
                r0, r1, r2, r3 = r[k], r[k + LANES], r[k + 2 * LANES], r[k + 3 * LANES]
                a = o[k] + a0 * r0 + a1 * r1 + a2 * r2 + a3 * r3
                b = o[k + LANES] + b0 * r0 + b1 * r1 + b2 * r2 + b3 * r3
                c = o[k + 2 * LANES] + c0 * r0 + c1 * r1 + c2 * r2 + c3 * r3
                d = o[k + 3 * LANES] + d0 * r0 + d1 * r1 + d2 * r2 + d3 * r3
                # Stored after all loads: the compiler cannot know that `out` is not `right`.
                o[k], o[k + LANES], o[k + 2 * LANES], o[k + 3 * LANES] = a, b, c, d


@part
def _add_dots(out, left, right, rows, columns):
    """``out [rows, columns] += left [rows, LANES] @ right [columns, LANES]^T``, both sizes multiples of 4."""
    for i in range(0, rows, 4):
        le = left[i * LANES : (i + 4) * LANES]
        for j in range(0, columns, 4):
            r = right[j * LANES : (j + 4) * LANES]
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0.0)
            c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = np.float32(0.0)
            for k in range(LANES):
                a, b, c, d = le[k], le[k + LANES], le[k + 2 * LANES], le[k + 3 * LANES]
                r0, r1, r2, r3 = r[k], r[k + LANES], r[k + 2 * LANES], r[k + 3 * LANES]
                a0, a1, a2, a3 = a0 + a * r0, a1 + a * r1, a2 + a * r2, a3 + a * r3
                b0, b1, b2, b3 = b0 + b * r0, b1 + b * r1, b2 + b * r2, b3 + b * r3
                c0, c1, c2, c3 = c0 + c * r0, c1 + c * r1, c2 + c * r2, c3 + c * r3
                d0, d1, d2, d3 = d0 + d * r0, d1 + d * r1, d2 + d * r2, d3 + d * r3
            for n, total in enumerate((a0, a1, a2, a3)):
                out[i, j + n] += total
            for n, total in enumerate((b0, b1, b2, b3)):
                out[i + 1, j + n] += total
            for n, total in enumerate((c0, c1, c2, c3)):
                out[i + 2, j + n] += total
            for n, total in enumerate((d0, d1, d2, d3)):
                out[i + 3, j + n] += total


@part
def _buffer():
    return np.empty(ROWS * LANES, np.float32)


@part
def _zero(values):
    for k in range(len(values)):
        values[k] = np.float32(0.0)


@part
def _load_rows(rows_of, source, first, step, rows, g):
    """Rows ``first``, ``first + step``, ... of group ``g`` of B or C; zeros beside and after them."""
    for i in range(ROWS):
        row = rows_of[i]
        _zero(row)
        if i < rows:
            values = source[first + i * step, g]
            for n in range(len(values)):
                row[n] = values[n]


@part
def _add_rows(target, rows_of, first, step, rows, g):
    for i in range(rows):
        row, values = target[first + i * step, g], rows_of[i]
        for n in range(len(row)):
            row[n] += values[n]


@part
def _multiply_rows(gram, outward, inward, rows):
    """``gram[i, j] = outward[i] . inward[j]`` for ``j <= i``."""
    for i in range(rows):
        for j in range(i + 1):
            o, w = outward[i], inward[j]
            total = np.float32(0.0)
            for n in range(len(o)):
                total += o[n] * w[n]
            gram[i, j] = total


@part
def _load_decays(decays, dt, A, first, step, rows, end):
    """``decays [ROWS, H]`` of a chunk's rows as the scan in that direction meets them.

    Backwards, what reaches a row comes from the row after it, and is decayed as it is from this row to that.
    """
    for i in range(rows):
        t = first + i * step + (step < 0)
        row = decays[i]
        if t < end:
            steps = dt[t]
            for h in range(len(row)):
                row[h] = exp_of_negative(steps[h] * A[h])
        else:
            for h in range(len(row)):
                row[h] = np.float32(1.0)


@part
def _load(lanes, source, first, step, rows, begin, end):
    """Channels ``begin`` to ``end`` of a chunk's rows of ``source [T, H * P]``; zeros in lanes and rows after them."""
    if rows < ROWS or end - begin < LANES:
        _zero(lanes)
    for i in range(rows):
        row, values = lanes[i * LANES : (i + 1) * LANES], source[first + i * step, begin:end]
        for k in range(len(values)):
            row[k] = values[k]


@part
def _store(target, lanes, first, step, rows, begin, end):
    for i in range(rows):
        row, values = lanes[i * LANES : (i + 1) * LANES], target[first + i * step, begin:end]
        for k in range(len(values)):
            values[k] = row[k]


@part
def _spread(lanes, per_head, first, step, rows, head_of):
    """The value that rows of ``per_head [.., H]`` have for each channel's head."""
    for i in range(rows):
        values = per_head[first + i * step]
        for k in range(0, LANES, VECTOR):
            vector = lanes[i * LANES + k : i * LANES + k + VECTOR]
            if head_of[k] == head_of[k + VECTOR - 1]:
                value = values[head_of[k]]
                for n in range(VECTOR):
                    vector[n] = value
            else:
                for n in range(VECTOR):
                    vector[n] = values[head_of[k + n]]


@part
def _add_sums(per_head, lanes, rows, head_of):
    """Add to ``per_head [rows, H]`` the sums over each head's channels."""
    for i in range(rows):
        totals = per_head[i]
        for k in range(0, LANES, VECTOR):
            vector = lanes[i * LANES + k : i * LANES + k + VECTOR]
            if head_of[k] == head_of[k + VECTOR - 1]:
                total = np.float32(0.0)
                for n in range(VECTOR):
                    total += vector[n]
                totals[head_of[k]] += total
            else:
                for n in range(VECTOR):
                    totals[head_of[k + n]] += vector[n]


@part
def _finish_gradients(out, inputs, before, steps, drive, gram, rows):
    """From the gradient of ``dt x`` but for each row's own output (``out``), and the output but for its own input.

    Leaves the gradient of x in ``out``, that of dt as a factor of x in ``inputs`` (x) and, in ``before`` (that output),
    by how much the gradient of the exponent ``dt A`` differs from the next row's; both yet to be summed over a head.
    """
    for i in range(rows):
        span = slice(i * LANES, (i + 1) * LANES)
        o, x, b, s, g = out[span], inputs[span], before[span], steps[span], drive[span]
        own = gram[i, i]
        for k in range(LANES):
            whole = o[k] + own * g[k]
            change = g[k] * b[k] - x[k] * s[k] * o[k]
            into_step = whole * x[k]
            o[k], x[k], b[k] = whole * s[k], into_step, change


@part
def _multiply(lanes, factor):
    for k in range(ROWS * LANES):
        lanes[k] *= factor[k]


@part
def _add_own(lanes, gram, drive, rows):
    """``lanes[i] += gram[i, i] drive[i]``: what each row contributes to itself."""
    for i in range(rows):
        row, u = lanes[i * LANES : (i + 1) * LANES], drive[i * LANES : (i + 1) * LANES]
        own = gram[i, i]
        for k in range(LANES):
            row[k] += own * u[k]


@part
def _accumulate(totals, decays, rows):
    """Each row's decay from before the chunk: the product of all rows' up to it."""
    if rows < ROWS:
        _zero(totals)
    for k in range(LANES):
        totals[k] = decays[k]
    for i in range(1, rows):
        before, row = totals[(i - 1) * LANES : i * LANES], totals[i * LANES : (i + 1) * LANES]
        a = decays[i * LANES : (i + 1) * LANES]
        for k in range(LANES):
            row[k] = before[k] * a[k]


@part
def _scan_rows(out, carried, decays, drive, gram, rows):
    """Add to each row of ``out`` what the rows of its chunk before it contribute.

    ``out[i] += sum_{j<i} gram[i, j] carried[j]`` with ``carried[j]``, the row's ``drive``, decayed from ``j`` to ``i``;
    it is left decayed to the last row.
    """
    _zero(carried)
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


@part
def _scan_rows_with_weights(out, weights, carried, decays, drive, paired, gram, rows):
    """As :func:`_scan_rows`, and for ``j <= i``: ``weights[i, j] += paired[i] . carried[j]``."""
    _zero(carried)
    for i in range(rows):
        a, u = decays[i * LANES : (i + 1) * LANES], drive[i * LANES : (i + 1) * LANES]
        o, new = out[i * LANES : (i + 1) * LANES], carried[i * LANES : (i + 1) * LANES]
        p = paired[i * LANES : (i + 1) * LANES]
        for j in range(0, i, 4):
            d = carried[j * LANES : (j + 4) * LANES]
            g0, g1, g2, g3 = gram[i, j], gram[i, j + 1], gram[i, j + 2], gram[i, j + 3]
            w0 = w1 = w2 = w3 = np.float32(0.0)
            for k in range(LANES):
                d0, d1, d2, d3 = a[k] * d[k], a[k] * d[k + LANES], a[k] * d[k + 2 * LANES], a[k] * d[k + 3 * LANES]
                w0, w1, w2, w3 = w0 + p[k] * d0, w1 + p[k] * d1, w2 + p[k] * d2, w3 + p[k] * d3
                o[k] += g0 * d0 + g1 * d1 + g2 * d2 + g3 * d3
                d[k], d[k + LANES], d[k + 2 * LANES], d[k + 3 * LANES] = d0, d1, d2, d3
            for n, total in enumerate((w0, w1, w2, w3)):
                weights[i, j + n] += total
        total = np.float32(0.0)
        for k in range(LANES):
            total += p[k] * u[k]
            new[k] = u[k]
        weights[i, i] += total


@part
def _carry_to_end(carried, decays, drive, rows):
    """The buffer that :func:`_scan_rows` leaves: each row's ``drive``, decayed to the last row."""
    _zero(carried)
    decay = np.ones(LANES, np.float32)
    for i in range(rows - 1, -1, -1):
        a, u = decays[i * LANES : (i + 1) * LANES], drive[i * LANES : (i + 1) * LANES]
        c = carried[i * LANES : (i + 1) * LANES]
        for k in range(LANES):
            c[k] = decay[k] * u[k]
            decay[k] *= a[k]


@part
def _advance(state, entered, totals, carried, inward, rows):
    """State after a chunk from that before it, if any ``entered``."""
    if entered:
        a = totals[(rows - 1) * LANES : rows * LANES]
        for n in range(0, len(state), LANES):
            row = state[n : n + LANES]
            for k in range(LANES):
                row[k] *= a[k]
    else:
        _zero(state)
    _add_product(state, inward.T, carried, inward.shape[1], _up_to_4(rows))


@part
def _load_state(state, source, begin, end):
    """Channels ``begin`` to ``end`` of ``source [H, P, N]`` as ``[N, LANES]``."""
    _zero(state)
    for channel in range(begin, end):
        row = source[channel // source.shape[1], channel % source.shape[1]]
        for n in range(len(row)):
            state[n * LANES + channel - begin] = row[n]


@part
def _store_state(target, state, begin, end):
    for channel in range(begin, end):
        row = target[channel // target.shape[1], channel % target.shape[1]]
        for n in range(len(row)):
            row[n] = state[n * LANES + channel - begin]


@part
def _heads_of_lanes(g, channels, width):
    """The head of each lane of group ``g``; lanes after its last channel count as that channel's head."""
    heads = np.empty(-(-channels // LANES) * LANES, np.int64)
    for k in range(len(heads)):
        heads[k] = (g * channels + min(k, channels - 1)) // width
    return heads


@part
def _borders(g, block, channels):
    """First channel of a block of group ``g``, and the one after its last."""
    first = g * channels + block * LANES
    return first, min(first + LANES, (g + 1) * channels)


@part
def _forward_group(x, dt, A, B, C, initial_state, cu_seqlens, sequences, y, y_before, final_state):
    heads, width, states = initial_state.shape[1:]
    groups, padded = B.shape[1], _up_to_4(states)
    channels = heads * width // groups
    inward, outward = np.empty((ROWS, padded), np.float32), np.empty((ROWS, padded), np.float32)
    gram, head_decays = np.zeros((ROWS, ROWS), np.float32), np.empty((ROWS, heads), np.float32)
    decays, totals, steps = _buffer(), _buffer(), _buffer()
    drive, carried, out = _buffer(), _buffer(), _buffer()
    blocks = -(-channels // LANES)
    state = np.empty((blocks, padded * LANES), np.float32)
    for g in range(groups):
        head_of = _heads_of_lanes(g, channels, width)
        for s in range(sequences[0], sequences[1]):
            end = cu_seqlens[s + 1]
            entered = len(initial_state) > 0
            if entered:
                for block in range(blocks):
                    lane, stop = _borders(g, block, channels)
                    _load_state(state[block], initial_state[s], lane, stop)
            for first in range(cu_seqlens[s], end, ROWS):
                rows = min(ROWS, end - first)
                _load_rows(inward, B, first, 1, rows, g)
                _load_rows(outward, C, first, 1, rows, g)
                _multiply_rows(gram, outward, inward, rows)
                _load_decays(head_decays, dt, A, first, 1, rows, end)
                left = first + rows < end or len(final_state) > 0
                for block in range(blocks):
                    lane, stop = _borders(g, block, channels)
                    heads_here = head_of[block * LANES : (block + 1) * LANES]
                    _spread(decays, head_decays, 0, 1, rows, heads_here)
                    _spread(steps, dt, first, 1, rows, heads_here)
                    _load(drive, x, first, 1, rows, lane, stop)
                    _multiply(drive, steps)
                    if entered or left:
                        _accumulate(totals, decays, rows)
                    _zero(out)
                    if entered:
                        _add_product(out, outward, state[block], _up_to_4(rows), padded)
                        _multiply(out, totals)
                    _scan_rows(out, carried, decays, drive, gram, rows)
                    if left:
                        _advance(state[block], entered, totals, carried, inward, rows)
                    if len(y_before) > 0:
                        _store(y_before, out, first, 1, rows, lane, stop)
                    _add_own(out, gram, drive, rows)
                    _store(y, out, first, 1, rows, lane, stop)
                entered = entered or left
            if len(final_state) > 0:
                for block in range(blocks):
                    lane, stop = _borders(g, block, channels)
                    if not entered:
                        _zero(state[block])
                    _store_state(final_state[s], state[block], lane, stop)


@part
def _gradient_of_C_from_states(x, dt, A, B, initial_state, cu_seqlens, s, g, head_of, grad_y, grad_C, kept):
    """What the states at the begin of each chunk add to the gradient of C; every few of these states are kept."""
    states = initial_state.shape[3]
    padded, blocks = _up_to_4(states), len(head_of) // LANES
    channels = x.shape[1] // B.shape[1]
    inward, grad_rows = np.empty((ROWS, padded), np.float32), np.empty((ROWS, padded), np.float32)
    head_decays = np.empty((ROWS, len(A)), np.float32)
    decays, totals, steps = _buffer(), _buffer(), _buffer()
    drive, carried = _buffer(), _buffer()
    state = np.empty((blocks, padded * LANES), np.float32)
    begin, end = cu_seqlens[s], cu_seqlens[s + 1]
    entered = len(initial_state) > 0
    if entered:
        for block in range(blocks):
            lane, stop = _borders(g, block, channels)
            _load_state(state[block], initial_state[s], lane, stop)
    for first in range(begin, end, ROWS):
        rows = min(ROWS, end - first)
        left = first + rows < end
        if not entered and not left:
            break
        _load_rows(inward, B, first, 1, rows, g)
        _load_decays(head_decays, dt, A, first, 1, rows, end)
        for i in range(ROWS):
            _zero(grad_rows[i])
        chunks = (first - begin) // ROWS + 1
        for block in range(blocks):
            lane, stop = _borders(g, block, channels)
            heads_here = head_of[block * LANES : (block + 1) * LANES]
            _spread(decays, head_decays, 0, 1, rows, heads_here)
            _accumulate(totals, decays, rows)
            if entered:
                _load(drive, grad_y, first, 1, rows, lane, stop)
                _multiply(drive, totals)
                _add_dots(grad_rows, drive, state[block], _up_to_4(rows), padded)
            if left:
                _spread(steps, dt, first, 1, rows, heads_here)
                _load(drive, x, first, 1, rows, lane, stop)
                _multiply(drive, steps)
                _carry_to_end(carried, decays, drive, rows)
                _advance(state[block], entered, totals, carried, inward, rows)
                if chunks % RESTART == 0:
                    kept[chunks // RESTART - 1, block] = state[block]
        _add_rows(grad_C, grad_rows, first, 1, rows, g)
        entered = True


@part
def _restart(into_exponent, state, kept, steps, A, head_of, channels):
    """``<a g, h>`` a head: of the states' gradient after a row, decayed across it, and the kept state before it.

    ``steps [H]`` are that row's; lanes from ``channels`` on are none.
    """
    for block in range(len(state)):
        totals = np.zeros(LANES, np.float32)
        for n in range(0, state.shape[1], LANES):
            gradient, before = state[block, n : n + LANES], kept[block, n : n + LANES]
            for k in range(LANES):
                totals[k] += gradient[k] * before[k]
        for k in range(min(LANES, channels - block * LANES)):
            h = head_of[block * LANES + k]
            into_exponent[h] += np.exp(steps[h] * A[h]) * totals[k]


@part
def _backward_sequence(
    x, dt, A, B, C, initial_state, cu_seqlens, s, g, head_of, kept, y_before, final_state, grad_y, grad_final, grad_x,
    grad_dt, grad_A, grad_B, grad_C, grad_initial,
):  # fmt: skip
    heads, width, states = initial_state.shape[1:]
    groups, padded = B.shape[1], _up_to_4(states)
    channels = heads * width // groups
    inward, outward = np.empty((ROWS, padded), np.float32), np.empty((ROWS, padded), np.float32)
    grad_inward, grad_outward = np.empty((ROWS, padded), np.float32), np.empty((ROWS, padded), np.float32)
    gram, weights = np.zeros((ROWS, ROWS), np.float32), np.empty((ROWS, ROWS), np.float32)
    head_decays = np.empty((ROWS, heads), np.float32)
    into_step, changes = np.empty((ROWS, heads), np.float32), np.empty((ROWS, heads), np.float32)
    into_exponent = np.empty(heads)
    decays, totals, steps = _buffer(), _buffer(), _buffer()
    drive, carried, out = _buffer(), _buffer(), _buffer()
    inputs, paired, before = _buffer(), _buffer(), _buffer()
    blocks = len(head_of) // LANES
    state = np.empty((blocks, padded * LANES), np.float32)
    begin, end = cu_seqlens[s], cu_seqlens[s + 1]
    entered = len(grad_final) > 0
    for h in range(g * heads // groups, (g + 1) * heads // groups):
        into_exponent[h] = 0.0
        if entered:
            for p in range(width):
                for n in range(states):
                    into_exponent[h] += grad_final[s, h, p, n] * final_state[s, h, p, n]
    if entered:
        for block in range(blocks):
            lane, stop = _borders(g, block, channels)
            _load_state(state[block], grad_final[s], lane, stop)
    for chunk in range((end - begin + ROWS - 1) // ROWS - 1, -1, -1):
        rows = min(ROWS, end - begin - chunk * ROWS)
        first = begin + chunk * ROWS + rows - 1
        left = chunk > 0 or len(grad_initial) > 0
        _load_rows(inward, C, first, -1, rows, g)
        _load_rows(outward, B, first, -1, rows, g)
        _multiply_rows(gram, outward, inward, rows)
        _load_decays(head_decays, dt, A, first, -1, rows, end)
        for i in range(ROWS):
            _zero(weights[i])
            _zero(grad_inward[i])
            _zero(grad_outward[i])
            _zero(into_step[i])
            _zero(changes[i])
        if entered and (chunk + 1) % RESTART == 0 and first + 1 < end:
            into_exponent[g * heads // groups : (g + 1) * heads // groups] = 0.0
            _restart(into_exponent, state, kept[(chunk + 1) // RESTART - 1], dt[first + 1], A, head_of, channels)
        for block in range(blocks):
            lane, stop = _borders(g, block, channels)
            heads_here = head_of[block * LANES : (block + 1) * LANES]
            _spread(decays, head_decays, 0, 1, rows, heads_here)
            _spread(steps, dt, first, -1, rows, heads_here)
            _load(inputs, x, first, -1, rows, lane, stop)
            _load(drive, grad_y, first, -1, rows, lane, stop)
            _load(before, y_before, first, -1, rows, lane, stop)
            _load(paired, x, first, -1, rows, lane, stop)
            _multiply(paired, steps)
            if entered or left:
                _accumulate(totals, decays, rows)
            _zero(out)
            if entered:
                _add_product(out, outward, state[block], _up_to_4(rows), padded)
                _multiply(out, totals)
            _scan_rows_with_weights(out, weights, carried, decays, drive, paired, gram, rows)
            if entered:
                _multiply(paired, totals)
                _add_dots(grad_outward, paired, state[block], _up_to_4(rows), padded)
            if left:
                _advance(state[block], entered, totals, carried, inward, rows)
            _finish_gradients(out, inputs, before, steps, drive, gram, rows)
            _add_sums(into_step, inputs, rows, heads_here)
            _add_sums(changes, before, rows, heads_here)
            _store(grad_x, out, first, -1, rows, lane, stop)
        entered = entered or left
        for i in range(rows):
            for j in range(i + 1):
                o, w, grad_o, grad_w = outward[i], inward[j], grad_outward[i], grad_inward[j]
                weight = weights[i, j]
                for n in range(padded):
                    grad_o[n] += weight * w[n]
                for n in range(padded):
                    grad_w[n] += weight * o[n]
        _add_rows(grad_C, grad_inward, first, -1, rows, g)
        _add_rows(grad_B, grad_outward, first, -1, rows, g)
        for i in range(rows):
            t = first - i
            for h in range(g * heads // groups, (g + 1) * heads // groups):
                into_exponent[h] += changes[i, h]
                if t == begin and len(initial_state) == 0:
                    into_exponent[h] = 0.0  # there is nothing to decay; only rounding is left in the sum
                grad_dt[t, h] = into_step[i, h] + A[h] * into_exponent[h]
                grad_A[h] += dt[t, h] * into_exponent[h]
    if len(grad_initial) > 0:
        for block in range(blocks):
            lane, stop = _borders(g, block, channels)
            if not entered:
                _zero(state[block])
            _store_state(grad_initial[s], state[block], lane, stop)


@part
def _decay_once(grad_initial, dt, A, cu_seqlens, s):
    """From the gradient of a sequence's state after its first row's decay to that before it."""
    if cu_seqlens[s] < cu_seqlens[s + 1]:
        for h in range(len(A)):
            decay = np.exp(dt[cu_seqlens[s], h] * A[h])  # a factor of the whole gradient: exact when tiny too
            for p in range(grad_initial.shape[2]):
                for n in range(grad_initial.shape[3]):
                    grad_initial[s, h, p, n] *= decay


@compiled
def _forward(x, dt, A, B, C, initial_state, cu_seqlens, group_of, y, y_before, final_state):
    for group in prange(len(group_of) - 1):
        sequences = group_of[group : group + 2]
        _forward_group(x, dt, A, B, C, initial_state, cu_seqlens, sequences, y, y_before, final_state)


@compiled
def _backward(
    x, dt, A, B, C, initial_state, cu_seqlens, group_of, y_before, final_state, grad_y, grad_final, grad_x, grad_dt,
    grad_A, grad_B, grad_C, grad_initial,
):  # fmt: skip
    heads, width, states = initial_state.shape[1:]
    groups = B.shape[1]
    channels = heads * width // groups
    for group in prange(len(group_of) - 1):
        longest = 0
        for s in range(group_of[group], group_of[group + 1]):
            longest = max(longest, cu_seqlens[s + 1] - cu_seqlens[s])
        blocks = -(-channels // LANES)
        kept = np.empty((longest // (ROWS * RESTART), blocks, _up_to_4(states) * LANES), np.float32)
        for g in range(groups):
            head_of = _heads_of_lanes(g, channels, width)
            for s in range(group_of[group], group_of[group + 1]):
                _gradient_of_C_from_states(
                    x, dt, A, B, initial_state, cu_seqlens, s, g, head_of, grad_y, grad_C, kept
                )  # fmt: skip
                _backward_sequence(
                    x, dt, A, B, C, initial_state, cu_seqlens, s, g, head_of, kept, y_before, final_state, grad_y,
                    grad_final, grad_x, grad_dt, grad_A[group], grad_B, grad_C, grad_initial,
                )  # fmt: skip
        if len(grad_initial) > 0:
            for s in range(group_of[group], group_of[group + 1]):
                _decay_once(grad_initial, dt, A, cu_seqlens, s)


class _SSD(torch.autograd.Function):
    """A state that is not given or not asked for is a tensor of no sequences, ``[0, H, P, N]``."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, initial_state, cu_seqlens, return_final_state, differentiable):
        inputs = [t.detach().contiguous() for t in (x, dt, A, B, C, initial_state)]
        x, dt, A, B, C, initial_state = inputs
        borders = cu_seqlens.long().numpy()
        y = torch.empty_like(x)
        y_before = torch.empty_like(x if differentiable and any(ctx.needs_input_grad) else x[:0])
        final_state = torch.empty((len(borders) - 1) * return_final_state, *initial_state.shape[1:])
        _forward(
            x.flatten(1).numpy(), *(t.numpy() for t in inputs[1:]), borders, group_borders(borders),
            y.flatten(1).numpy(), y_before.flatten(1).numpy(), final_state.numpy(),
        )  # fmt: skip
        ctx.save_for_backward(*inputs, cu_seqlens, y_before, final_state)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_final):
        *inputs, cu_seqlens, y_before, final_state = ctx.saved_tensors
        x, dt, A, B, C, initial_state = inputs
        borders = cu_seqlens.long().numpy()
        groups = group_borders(borders)
        grad_x, grad_dt = torch.empty_like(x), torch.empty_like(dt)
        grad_A = torch.zeros(len(groups) - 1, len(A), dtype=torch.float64)
        grad_B, grad_C = torch.zeros_like(B), torch.zeros_like(C)
        grad_initial = torch.empty_like(initial_state if ctx.needs_input_grad[5] else initial_state[:0])
        _backward(
            x.flatten(1).numpy(), *(t.numpy() for t in inputs[1:]), borders, groups,
            y_before.flatten(1).numpy(), final_state.numpy(), grad_y.contiguous().flatten(1).numpy(),
            grad_final.contiguous().numpy(), grad_x.flatten(1).numpy(),
            *(t.numpy() for t in (grad_dt, grad_A, grad_B, grad_C, grad_initial)),
        )  # fmt: skip
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
