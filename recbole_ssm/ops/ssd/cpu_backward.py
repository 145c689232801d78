"""The backward pass of state-space duality on a CPU, in chunks as :mod:`.cpu` has them.

The gradient of the input is the same scan from the last row to the first, with B and C exchanged and the gradient of
the output as its input. The backward pass runs it after a forward scan that recomputes the states for the gradient of
C, chunk by chunk; nothing of the size of all states is ever kept. With ``g_t`` the gradient of the state after row
``t``, the exponent's gradient follows without states from that of the row after it::

    <g_t, a_t h_{t-1}> = <g_{t+1}, a_{t+1} h_t> + grad_y_t . a_t h_{t-1} C_t - u_t . a_{t+1} g_{t+1} B_t

where the last two are output and input gradient but for what a row gives to itself, which would only cancel. Rounding
adds up along such a sum, so it begins anew, from a kept state, every :data:`RESTART`
chunks.
"""

import numpy as np
from numba import prange

from recbole_ssm.ops.compiled import compiled, helper
from recbole_ssm.ops.ssd.cpu_tiles import (
    LANES,
    ROWS,
    VECTOR,
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

RESTART = 4


@helper
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


@helper
def _add_rows(target, rows_of, first, step, rows, g):
    for i in range(rows):
        row, values = target[first + i * step, g], rows_of[i]
        for n in range(len(row)):
            row[n] += values[n]


@helper
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


@helper
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


@helper
def _scan_rows_with_weights(out, weights, carried, decays, drive, paired, gram, rows):
    """As ``_scan_rows`` of the forward pass, and for ``j <= i``: ``weights[i, j] += paired[i] . carried[j]``."""
    zero(carried)
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


@helper
def _carry_to_end(carried, decays, drive, rows):
    """The buffer that ``_scan_rows`` of the forward pass leaves: each row's ``drive``, decayed to the last row."""
    zero(carried)
    decay = np.ones(LANES, np.float32)
    for i in range(rows - 1, -1, -1):
        a, u = decays[i * LANES : (i + 1) * LANES], drive[i * LANES : (i + 1) * LANES]
        c = carried[i * LANES : (i + 1) * LANES]
        for k in range(LANES):
            c[k] = decay[k] * u[k]
            decay[k] *= a[k]


@helper
def _gradient_of_C_from_states(x, dt, A, B, initial_state, cu_seqlens, s, g, head_of, grad_y, grad_C, kept):
    """What the states at the begin of each chunk add to the gradient of C; every few of these states are kept."""
    states = initial_state.shape[3]
    padded, blocks = up_to_4(states), len(head_of) // LANES
    channels = x.shape[1] // B.shape[1]
    inward, grad_rows = np.empty((ROWS, padded), np.float32), np.empty((ROWS, padded), np.float32)
    head_decays = np.empty((ROWS, len(A)), np.float32)
    decays, totals, steps = buffer(), buffer(), buffer()
    drive, carried = buffer(), buffer()
    state = np.empty((blocks, padded * LANES), np.float32)
    begin, end = cu_seqlens[s], cu_seqlens[s + 1]
    entered = len(initial_state) > 0
    if entered:
        for block in range(blocks):
            lane, stop = block_borders(g, block, channels)
            load_state(state[block], initial_state[s], lane, stop)
    for first in range(begin, end, ROWS):
        rows = min(ROWS, end - first)
        left = first + rows < end
        if not entered and not left:
            break
        load_rows(inward, B, first, 1, rows, g)
        load_decays(head_decays, dt, A, first, 1, rows, end)
        for i in range(ROWS):
            zero(grad_rows[i])
        chunks = (first - begin) // ROWS + 1
        for block in range(blocks):
            lane, stop = block_borders(g, block, channels)
            heads_here = head_of[block * LANES : (block + 1) * LANES]
            spread(decays, head_decays, 0, 1, rows, heads_here)
            accumulate(totals, decays, rows)
            if entered:
                load_channels(drive, grad_y, first, 1, rows, lane, stop)
                multiply(drive, totals)
                _add_dots(grad_rows, drive, state[block], up_to_4(rows), padded)
            if left:
                spread(steps, dt, first, 1, rows, heads_here)
                load_channels(drive, x, first, 1, rows, lane, stop)
                multiply(drive, steps)
                _carry_to_end(carried, decays, drive, rows)
                advance(state[block], entered, totals, carried, inward, rows)
                if chunks % RESTART == 0:
                    kept[chunks // RESTART - 1, block] = state[block]
        _add_rows(grad_C, grad_rows, first, 1, rows, g)
        entered = True


@helper
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


@helper
def _backward_sequence(
    x, dt, A, B, C, initial_state, cu_seqlens, s, g, head_of, kept, y_before, final_state, grad_y, grad_final, grad_x,
    grad_dt, grad_A, grad_B, grad_C, grad_initial,
):  # fmt: skip
    heads, width, states = initial_state.shape[1:]
    groups, padded = B.shape[1], up_to_4(states)
    channels = heads * width // groups
    inward, outward = np.empty((ROWS, padded), np.float32), np.empty((ROWS, padded), np.float32)
    grad_inward, grad_outward = np.empty((ROWS, padded), np.float32), np.empty((ROWS, padded), np.float32)
    gram, weights = np.zeros((ROWS, ROWS), np.float32), np.empty((ROWS, ROWS), np.float32)
    head_decays = np.empty((ROWS, heads), np.float32)
    into_step, changes = np.empty((ROWS, heads), np.float32), np.empty((ROWS, heads), np.float32)
    into_exponent = np.empty(heads)
    decays, totals, steps = buffer(), buffer(), buffer()
    drive, carried, out = buffer(), buffer(), buffer()
    inputs, paired, before = buffer(), buffer(), buffer()
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
            lane, stop = block_borders(g, block, channels)
            load_state(state[block], grad_final[s], lane, stop)
    for chunk in range((end - begin + ROWS - 1) // ROWS - 1, -1, -1):
        rows = min(ROWS, end - begin - chunk * ROWS)
        first = begin + chunk * ROWS + rows - 1
        left = chunk > 0 or len(grad_initial) > 0
        load_rows(inward, C, first, -1, rows, g)
        load_rows(outward, B, first, -1, rows, g)
        multiply_rows(gram, outward, inward, rows)
        load_decays(head_decays, dt, A, first, -1, rows, end)
        for i in range(ROWS):
            zero(weights[i])
            zero(grad_inward[i])
            zero(grad_outward[i])
            zero(into_step[i])
            zero(changes[i])
        if entered and (chunk + 1) % RESTART == 0 and first + 1 < end:
            into_exponent[g * heads // groups : (g + 1) * heads // groups] = 0.0
            _restart(into_exponent, state, kept[(chunk + 1) // RESTART - 1], dt[first + 1], A, head_of, channels)
        for block in range(blocks):
            lane, stop = block_borders(g, block, channels)
            heads_here = head_of[block * LANES : (block + 1) * LANES]
            spread(decays, head_decays, 0, 1, rows, heads_here)
            spread(steps, dt, first, -1, rows, heads_here)
            load_channels(inputs, x, first, -1, rows, lane, stop)
            load_channels(drive, grad_y, first, -1, rows, lane, stop)
            load_channels(before, y_before, first, -1, rows, lane, stop)
            load_channels(paired, x, first, -1, rows, lane, stop)
            multiply(paired, steps)
            if entered or left:
                accumulate(totals, decays, rows)
            zero(out)
            if entered:
                add_product(out, outward, state[block], up_to_4(rows), padded)
                multiply(out, totals)
            _scan_rows_with_weights(out, weights, carried, decays, drive, paired, gram, rows)
            if entered:
                multiply(paired, totals)
                _add_dots(grad_outward, paired, state[block], up_to_4(rows), padded)
            if left:
                advance(state[block], entered, totals, carried, inward, rows)
            _finish_gradients(out, inputs, before, steps, drive, gram, rows)
            _add_sums(into_step, inputs, rows, heads_here)
            _add_sums(changes, before, rows, heads_here)
            store_channels(grad_x, out, first, -1, rows, lane, stop)
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
            lane, stop = block_borders(g, block, channels)
            if not entered:
                zero(state[block])
            store_state(grad_initial[s], state[block], lane, stop)


@helper
def _decay_once(grad_initial, dt, A, cu_seqlens, s):
    """From the gradient of a sequence's state after its first row's decay to that before it."""
    if cu_seqlens[s] < cu_seqlens[s + 1]:
        for h in range(len(A)):
            decay = np.exp(dt[cu_seqlens[s], h] * A[h])  # a factor of the whole gradient: exact when tiny too
            for p in range(grad_initial.shape[2]):
                for n in range(grad_initial.shape[3]):
                    grad_initial[s, h, p, n] *= decay


@compiled
def backward(
    x, dt, A, B, C, initial_state, cu_seqlens, group_of, y_before, final_state, grad_y, grad_final, grad_x, grad_dt,
    grad_A, grad_B, grad_C, grad_initial,
):  # fmt: skip
    """Gradients of all inputs; ``y_before`` is each row's output but for what it has of its own input."""
    heads, width, states = initial_state.shape[1:]
    groups = B.shape[1]
    channels = heads * width // groups
    for group in prange(len(group_of) - 1):
        longest = 0
        for s in range(group_of[group], group_of[group + 1]):
            longest = max(longest, cu_seqlens[s + 1] - cu_seqlens[s])
        blocks = -(-channels // LANES)
        kept = np.empty((longest // (ROWS * RESTART), blocks, up_to_4(states) * LANES), np.float32)
        for g in range(groups):
            head_of = heads_of_lanes(g, channels, width)
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
