"""State-space duality on a CPU: what its forward and its backward pass do with the channels of a chunk's rows.

A buffer holds :data:`LANES` channels of a chunk's :data:`ROWS` rows, a row after the other.
"""

import numpy as np

from recbole_ssm.ops.compiled import exp_of_negative, helper

ROWS = 16  # a chunk; sequences no longer than this need no state at all
# Channels worked on together. Row i of a buffer begins at i * LANES: with the distance between rows known, the compiler
# sees that they do not overlap.
LANES = 128
VECTOR = 16  # lanes that a processor works on at once; faster where it divides the heads' width


@helper
def up_to_4(count):
    """The smallest multiple of 4 that is not below ``count``."""
    return (count + 3) // 4 * 4


@helper
def add_product(out, left, right, rows, inner):
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


@helper
def buffer():
    """Room for a chunk's rows, ``[ROWS * LANES]``."""
    return np.empty(ROWS * LANES, np.float32)


@helper
def zero(values):
    """Set all to 0."""
    for k in range(len(values)):
        values[k] = np.float32(0.0)


@helper
def load_rows(rows_of, source, first, step, rows, g):
    """Rows ``first``, ``first + step``, ... of group ``g`` of B or C; zeros beside and after them."""
    for i in range(ROWS):
        row = rows_of[i]
        zero(row)
        if i < rows:
            values = source[first + i * step, g]
            for n in range(len(values)):
                row[n] = values[n]


@helper
def multiply_rows(gram, outward, inward, rows):
    """``gram[i, j] = outward[i] . inward[j]`` for ``j <= i``."""
    for i in range(rows):
        for j in range(i + 1):
            o, w = outward[i], inward[j]
            total = np.float32(0.0)
            for n in range(len(o)):
                total += o[n] * w[n]
            gram[i, j] = total


@helper
def load_decays(decays, dt, A, first, step, rows, end):
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


@helper
def load_channels(lanes, source, first, step, rows, begin, end):
    """Channels ``begin`` to ``end`` of a chunk's rows of ``source [T, H * P]``; zeros in lanes and rows after them."""
    if rows < ROWS or end - begin < LANES:
        zero(lanes)
    for i in range(rows):
        row, values = lanes[i * LANES : (i + 1) * LANES], source[first + i * step, begin:end]
        for k in range(len(values)):
            row[k] = values[k]


@helper
def store_channels(target, lanes, first, step, rows, begin, end):
    """Write what :func:`load_channels` would read."""
    for i in range(rows):
        row, values = lanes[i * LANES : (i + 1) * LANES], target[first + i * step, begin:end]
        for k in range(len(values)):
            values[k] = row[k]


@helper
def spread(lanes, per_head, first, step, rows, head_of):
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


@helper
def multiply(lanes, factor):
    """``lanes *= factor``, both ``[ROWS * LANES]``."""
    for k in range(ROWS * LANES):
        lanes[k] *= factor[k]


@helper
def accumulate(totals, decays, rows):
    """Each row's decay from before the chunk: the product of all rows' up to it."""
    if rows < ROWS:
        zero(totals)
    for k in range(LANES):
        totals[k] = decays[k]
    for i in range(1, rows):
        before, row = totals[(i - 1) * LANES : i * LANES], totals[i * LANES : (i + 1) * LANES]
        a = decays[i * LANES : (i + 1) * LANES]
        for k in range(LANES):
            row[k] = before[k] * a[k]


@helper
def advance(state, entered, totals, carried, inward, rows):
    """State after a chunk from that before it, if any ``entered``."""
    if entered:
        a = totals[(rows - 1) * LANES : rows * LANES]
        for n in range(0, len(state), LANES):
            row = state[n : n + LANES]
            for k in range(LANES):
                row[k] *= a[k]
    else:
        zero(state)
    add_product(state, inward.T, carried, inward.shape[1], up_to_4(rows))


@helper
def load_state(state, source, begin, end):
    """Channels ``begin`` to ``end`` of ``source [H, P, N]`` as ``[N, LANES]``."""
    zero(state)
    for channel in range(begin, end):
        row = source[channel // source.shape[1], channel % source.shape[1]]
        for n in range(len(row)):
            state[n * LANES + channel - begin] = row[n]


@helper
def store_state(target, state, begin, end):
    """Write what :func:`load_state` would read."""
    for channel in range(begin, end):
        row = target[channel // target.shape[1], channel % target.shape[1]]
        for n in range(len(row)):
            row[n] = state[n * LANES + channel - begin]


@helper
def heads_of_lanes(g, channels, width):
    """The head of each lane of group ``g``; lanes after its last channel count as that channel's head."""
    heads = np.empty(-(-channels // LANES) * LANES, np.int64)
    for k in range(len(heads)):
        heads[k] = (g * channels + min(k, channels - 1)) // width
    return heads


@helper
def block_borders(g, block, channels):
    """First channel of a block of group ``g``, and the one after its last."""
    first = g * channels + block * LANES
    return first, min(first + LANES, (g + 1) * channels)
