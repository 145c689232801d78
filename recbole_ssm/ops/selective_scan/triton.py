"""Selective scan on a GPU: Triton kernels that work on all chunks of :data:`ROWS` rows at once, forward and backward.

1. :func:`_chunk_states`: what each chunk alone adds to the state after it, and the sum of its step sizes, of which its
   decay follows. Backward (``REVERSE``): what it alone adds to the gradient of the state before it.
2. :func:`_pass_states`: from chunk to chunk of a sequence, one multiply-add a state; every state of every channel of
   every sequence on its own.
3. :func:`_outputs` and :func:`_gradients`: each chunk, given the states (and their gradients) at its borders.

Steps 1 and 2 are left out where every sequence fits a chunk. All that backward keeps of forward is the state at each
border of two chunks. Where outputs are not asked for (``C`` absent), 1 and 2 give the final states alone.

Tiles: in steps 1 and 3 forward a lane owns a channel and holds many of its states, so that the sum over states stays
within a thread. States lie with channels side by side, at a place to which the kernels add a ``zero`` that the compiler
does not know: taken for aligned, a lane would read four neighbouring channels at once, and hold these from there on.
:func:`_gradients` needs sums over states and over channels alike, and all states of a chunk's rows: a warp holds
:data:`GRADIENT_STATES` states of :data:`GRADIENT_CHANNELS` channels for all rows in registers, goes through the states
so many at a time, and sums over states once at the end. One warp a program throughout: there is nothing to wait for,
and no product of matrices.

A chunk of a table that was filled up (its rows lie past its sequence's end) reads and writes nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_ssm.ops.kernels import BATCH_SIZES, dense, dense_rows, sigmoid, softplus
from recbole_ssm.ops.packing import borders
from recbole_ssm.ops.scan_arguments import ScanArguments

ROWS = 16
# Rows whose loads _outputs has under way together; a shorter rest of a chunk costs no more than it holds.
UNROLLED = 8
GRADIENT_CHANNELS = 8
GRADIENT_STATES = 4
# Of 230 that the compiler would take: a tenth more instructions for what spills, and twice as many warps at a time.
GRADIENT_REGISTERS = 128
# Elements (channels x states) of a program of one warp: 16 a lane.
TILE = 512
PASSED = 128  # states a program of _pass_states
AHEAD = 8  # chunks that it loads at once
# Programs of _gradients: enough to fill a GPU (32 a multiprocessor). Beyond that a program goes through several chunks
# and blocks of channels, and sums as it goes, so that partial sums stay small.
PROGRAMS = 4096
CHUNKS = 2048  # most partial sums of a parameter's gradient

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _chunk(chunk, cu_seqlens, sequences, first_chunks, ROWS: tl.constexpr):
    """A chunk's sequence, its number within it, its first row (int64) and how many rows follow from there (int32).

    At most ``2 ROWS``; none, or less, where the chunk only fills up the table.
    """
    sequence = tl.load(sequences + chunk).to(tl.int64)
    number = (chunk - tl.load(first_chunks + sequence)).to(tl.int64)
    first = tl.load(cu_seqlens + sequence).to(tl.int64) + number * ROWS
    left = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - first
    return sequence, number, first, tl.minimum(left, 2 * ROWS).to(tl.int32)


@triton.jit
def _vector(pointer, place, inside):
    """Values in float32, zeros outside and where there is no such tensor."""
    return tl.load(pointer + place, mask=inside, other=0.0).to(tl.float32) if pointer is not None else 0.0


@triton.jit
def _step(dt, inside, bias, SOFTPLUS: tl.constexpr):
    """Step sizes before and after softplus; outside none is taken, which leaves a state as it is."""
    raw = tl.load(dt, mask=inside, other=0.0).to(tl.float32) + bias
    return raw, tl.where(inside, softplus(raw) if SOFTPLUS else raw, 0.0)


@triton.jit(do_not_specialize=["zero"])
def _chunk_states(
    x, dt, A, B, z, dt_bias, cu_seqlens, sequences, first_chunks, boundaries, states, totals, final, zero,
    WIDTH: tl.constexpr, N: tl.constexpr,
    X_STRIDE: tl.constexpr, DT_STRIDE: tl.constexpr, B_STRIDE: tl.constexpr, Z_STRIDE: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """State after each chunk that another follows, from none before it, and the sum of its step sizes.

    With ``final`` also of each sequence's last chunk, there. ``REVERSE``: gradient of the state before each chunk that
    follows another, from none of the state after it; with grad_y for ``x``, ``C`` for ``B`` and perhaps a gate. Where
    ``x`` is absent, too, it is zero: then only the sums are written.
    """
    chunk = tl.program_id(0)
    sequence, number, first, left = _chunk(chunk, cu_seqlens, sequences, first_chunks, ROWS)
    follows = (number > 0) & (left > 0) if REVERSE else left > ROWS
    if follows or ((final is not None) and (left > 0)):
        d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        n = tl.program_id(2) * STATES + tl.arange(0, STATES)
        here, of_state = d < WIDTH, n < N
        rows_of_d, rows_of_n = tl.where(here, left, 0), tl.where(of_state, left, 0)  # those that a lane may read
        inside_state = here[:, None] & of_state[None, :]
        place = n[None, :] * WIDTH + d[:, None] + zero
        bias = _vector(dt_bias, d, here)
        rate = tl.load(A + place, mask=inside_state, other=0.0) * LOG2_E
        state = tl.zeros([CHANNELS, STATES], tl.float32)
        total = tl.zeros([CHANNELS], tl.float32)
        dt_at = dt + first * DT_STRIDE + d
        if x is not None:
            x_at = x + first * X_STRIDE + d
            B_at = B + first * B_STRIDE + n
        if z is not None:
            z_at = z + first * Z_STRIDE + d
        for step_number in tl.static_range(ROWS):
            i = ROWS - 1 - step_number if REVERSE else step_number
            inside = i < rows_of_d
            _raw, step = _step(dt_at + i * DT_STRIDE, inside, bias, SOFTPLUS)
            total += step
            if x is not None:
                value = tl.load(x_at + i * X_STRIDE, mask=inside, other=0.0).to(tl.float32)
                vector = tl.load(B_at + i * B_STRIDE, mask=i < rows_of_n, other=0.0).to(tl.float32)
                decay = tl.exp2(step[:, None] * rate)
                if REVERSE:
                    if z is not None:
                        gate = tl.load(z_at + i * Z_STRIDE, mask=inside, other=0.0).to(tl.float32)
                        value *= gate * sigmoid(gate)
                    state = (state + value[:, None] * vector[None, :]) * decay
                else:
                    state = decay * state + (step * value)[:, None] * vector[None, :]
        if tl.program_id(2) == 0:
            tl.store(totals + chunk.to(tl.int64) * WIDTH + d, total, mask=here)
        if x is not None:
            size = WIDTH * N
            if follows:
                boundary = tl.load(boundaries + sequence).to(tl.int64) + (number - 1 if REVERSE else number)
                tl.store(states + boundary * size + place, state, mask=inside_state)
            elif final is not None:
                tl.store(final + sequence * size + d[:, None] * N + n[None, :], state, mask=inside_state)


@triton.jit
def _pass_states(
    A, totals, edge, cu_seqlens, first_chunks, boundaries, states, final, WIDTH: tl.constexpr, N: tl.constexpr,
    LOCAL: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Turn what each chunk adds to a state, in ``states`` (and ``final``), into the state, in place.

    ``edge`` is the state before the first chunk (``REVERSE``: the gradient of the state after the last one). Without
    ``LOCAL`` chunks add nothing, and what stands in ``states`` is not read.
    """
    sequence = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    size = WIDTH * N
    inside = place < size
    d = place % WIDTH
    by_channel = d * N + place // WIDTH
    begin, end = tl.load(cu_seqlens + sequence).to(tl.int64), tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    n_chunks = (end - begin + ROWS - 1) // ROWS
    n_boundaries = tl.where(inside, n_chunks - 1, 0)
    first_chunk = tl.load(first_chunks + sequence).to(tl.int64)
    first_boundary = tl.load(boundaries + sequence).to(tl.int64)
    rate = tl.load(A + place, mask=inside, other=0.0) * LOG2_E
    state = tl.zeros([BLOCK], tl.float32)
    if edge is not None:
        state += tl.load(edge + sequence * size + by_channel, mask=inside, other=0.0)
    for base in range(0, n_chunks - 1, AHEAD):
        added, sums = (), ()
        for i in tl.static_range(AHEAD):
            boundary = n_chunks - 2 - base - i if REVERSE else base + i
            inside_boundary = base + i < n_boundaries
            # A boundary lies after the chunk of its number; a gradient comes to it through the chunk behind it.
            chunk = first_chunk + boundary + 1 if REVERSE else first_chunk + boundary
            sums += (tl.load(totals + chunk * WIDTH + d, mask=inside_boundary, other=0.0),)
            if LOCAL:
                added_at = states + (first_boundary + boundary) * size + place
                added += (tl.load(added_at, mask=inside_boundary, other=0.0),)
        for i in tl.static_range(AHEAD):
            boundary = n_chunks - 2 - base - i if REVERSE else base + i
            inside_boundary = base + i < n_boundaries
            state *= tl.exp2(sums[i] * rate)
            if LOCAL:
                state += added[i]
            tl.store(states + (first_boundary + boundary) * size + place, state, mask=inside_boundary)
    if final is not None:
        if n_chunks > 0:
            total = tl.load(totals + (first_chunk + n_chunks - 1) * WIDTH + d, mask=inside, other=0.0)
            added = tl.load(final + sequence * size + by_channel, mask=inside, other=0.0)
            state = state * tl.exp2(total * rate) + added
        tl.store(final + sequence * size + by_channel, state, mask=inside)


@triton.jit(do_not_specialize=["zero"])
def _outputs(
    x, dt, A, B, C, D, z, dt_bias, initial, cu_seqlens, sequences, first_chunks, boundaries, states, y, final, zero,
    WIDTH: tl.constexpr, N: tl.constexpr, X_STRIDE: tl.constexpr, DT_STRIDE: tl.constexpr,
    B_STRIDE: tl.constexpr, C_STRIDE: tl.constexpr, Z_STRIDE: tl.constexpr,
    SOFTPLUS: tl.constexpr, ROWS: tl.constexpr, UNROLLED: tl.constexpr,
    CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    sequence, number, first, left = _chunk(tl.program_id(0), cu_seqlens, sequences, first_chunks, ROWS)
    if left > 0:
        d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        n = tl.arange(0, STATES)
        here, of_state = d < WIDTH, n < N
        rows_of_d, rows_of_n = tl.where(here, left, 0), tl.where(of_state, left, 0)  # those that a lane may read
        inside_state = here[:, None] & of_state[None, :]
        size = WIDTH * N
        place, by_channel = n[None, :] * WIDTH + d[:, None] + zero, d[:, None] * N + n[None, :]
        bias, skip = _vector(dt_bias, d, here), _vector(D, d, here)
        rate = tl.load(A + place, mask=inside_state, other=0.0) * LOG2_E
        state = tl.zeros([CHANNELS, STATES], tl.float32)
        if number > 0:
            boundary = tl.load(boundaries + sequence).to(tl.int64) + number - 1
            state = tl.load(states + boundary * size + place, mask=inside_state, other=0.0)
        elif initial is not None:
            state = tl.load(initial + sequence * size + by_channel, mask=inside_state, other=0.0)
        x_at = x + first * X_STRIDE + d
        dt_at = dt + first * DT_STRIDE + d
        B_at = B + first * B_STRIDE + n
        C_at = C + first * C_STRIDE + n
        y_at = y + first * WIDTH + d
        if z is not None:
            z_at = z + first * Z_STRIDE + d
        for row in range(0, min(left, ROWS), UNROLLED):
            outs = ()
            for i in tl.static_range(UNROLLED):
                inside, real = row + i < rows_of_d, row + i < rows_of_n
                _raw, step = _step(dt_at + row * DT_STRIDE + i * DT_STRIDE, inside, bias, SOFTPLUS)
                value = tl.load(x_at + row * X_STRIDE + i * X_STRIDE, mask=inside, other=0.0).to(tl.float32)
                b = tl.load(B_at + row * B_STRIDE + i * B_STRIDE, mask=real, other=0.0).to(tl.float32)
                c = tl.load(C_at + row * C_STRIDE + i * C_STRIDE, mask=real, other=0.0).to(tl.float32)
                state = tl.exp2(step[:, None] * rate) * state + (step * value)[:, None] * b[None, :]
                out = tl.sum(state * c[None, :], 1) + value * skip
                if z is not None:
                    gate = tl.load(z_at + row * Z_STRIDE + i * Z_STRIDE, mask=inside, other=0.0).to(tl.float32)
                    out *= gate * sigmoid(gate)
                outs += (out,)
            # After all loads, which could not be moved ahead of a store.
            for i in tl.static_range(UNROLLED):
                tl.store(y_at + row * WIDTH + i * WIDTH, outs[i].to(y.dtype.element_ty), mask=row + i < rows_of_d)
        if final is not None and left <= ROWS:
            tl.store(final + sequence * size + by_channel, state, mask=inside_state)


@triton.jit
def _accumulate(pointer, value, inside, again, SHARED: tl.constexpr):
    """Store ``inside``, and add to what stands there already ``again``; not ``SHARED``: nothing does."""
    if SHARED:
        value += tl.load(pointer, mask=again, other=0.0)
    tl.store(pointer, value, mask=inside)


@triton.jit(do_not_specialize=[*BATCH_SIZES, "n_chunks", "zero"])
def _gradients(
    x, dt, A, B, C, D, z, dt_bias, initial, cu_seqlens, sequences, first_chunks, boundaries, states, grad_y, grad_final,
    grad_states, grad_x, grad_dt, grad_z, grad_initial, by_row, sums,
    n_rows, n_chunks, zero, WIDTH: tl.constexpr, N: tl.constexpr, X_STRIDE: tl.constexpr, DT_STRIDE: tl.constexpr,
    B_STRIDE: tl.constexpr, C_STRIDE: tl.constexpr, Z_STRIDE: tl.constexpr, Y_STRIDE: tl.constexpr,
    SOFTPLUS: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Gradients of everything.

    ``by_row`` has those of ``B`` and ``C``, ``[programs over channels, 2, T, N]`` (without grad_y 1 for 2), ``sums``
    those of ``A``, ``D`` and ``dt_bias`` side by side, ``[programs over chunks, D N + 2 D]``. ``SHARED``: a program has
    several chunks or several blocks of channels.
    """
    size = WIDTH * N
    sums += tl.program_id(0).to(tl.int64) * (size + 2 * WIDTH)
    grad_B = by_row + tl.program_id(1).to(tl.int64) * n_rows * N * (1 if grad_y is None else 2)
    grad_C = grad_B + tl.cast(n_rows, tl.int64) * N
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        sequence, number, first, left = _chunk(chunk, cu_seqlens, sequences, first_chunks, ROWS)
        boundary = tl.load(boundaries + sequence).to(tl.int64) + number
        for block in range(tl.program_id(1), tl.cdiv(WIDTH, CHANNELS), tl.num_programs(1)):
            if SHARED:
                tl.debug_barrier()  # what one lane has stored another may read now, to add to it
            d = block * CHANNELS + tl.arange(0, CHANNELS)
            here = d < WIDTH
            bias, skip = _vector(dt_bias, d, here), _vector(D, d, here)
            added = block > tl.program_id(1)
            again = tl.where(here, chunk, 0) > tl.program_id(0)
            rows_of_d = tl.where(here, left, 0)
            x_at, dt_at = x + first * X_STRIDE + d, dt + first * DT_STRIDE + d
            grad_x_at, grad_dt_at = grad_x + first * WIDTH + d, grad_dt + first * WIDTH + d
            if grad_y is not None:
                grad_y_at = grad_y + first * Y_STRIDE + d
            if z is not None:
                z_at, grad_z_at = z + first * Z_STRIDE + d, grad_z + first * WIDTH + d
            steps, drives, outs, into_step, into_drive, ungated = (), (), (), (), (), ()
            for i in tl.static_range(ROWS):
                inside = i < rows_of_d
                _raw, step = _step(dt_at + i * DT_STRIDE, inside, bias, SOFTPLUS)
                steps += (step,)
                drives += (step * tl.load(x_at + i * X_STRIDE, mask=inside, other=0.0).to(tl.float32),)
                if grad_y is not None:
                    out = tl.load(grad_y_at + i * Y_STRIDE, mask=inside, other=0.0).to(tl.float32)
                    if z is not None:
                        gate = tl.load(z_at + i * Z_STRIDE, mask=inside, other=0.0).to(tl.float32)
                        out *= gate * sigmoid(gate)
                        ungated += (tl.zeros([CHANNELS, STATES], tl.float32),)
                    outs += (out,)
                into_step += (tl.zeros([CHANNELS, STATES], tl.float32),)
                into_drive += (tl.zeros([CHANNELS, STATES], tl.float32),)
            for first_state in range(0, N, STATES):
                n = first_state + tl.arange(0, STATES)
                of_state = n < N
                inside_state = here[:, None] & of_state[None, :]
                rows_of_n = tl.where(of_state, left, 0)
                again_of_n = tl.where(added, rows_of_n, 0)
                place, by_channel = n[None, :] * WIDTH + d[:, None] + zero, d[:, None] * N + n[None, :]
                rate = tl.load(A + place, mask=inside_state, other=0.0) * LOG2_E
                h = tl.zeros([CHANNELS, STATES], tl.float32)
                if left > 0:
                    if number > 0:
                        h = tl.load(states + (boundary - 1) * size + place, mask=inside_state, other=0.0)
                    elif initial is not None:
                        h = tl.load(initial + sequence * size + by_channel, mask=inside_state, other=0.0)
                g = tl.zeros([CHANNELS, STATES], tl.float32)
                if left > ROWS:
                    g = tl.load(grad_states + boundary * size + place, mask=inside_state, other=0.0)
                elif grad_final is not None and left > 0:
                    g = tl.load(grad_final + sequence * size + by_channel, mask=inside_state, other=0.0)
                B_at, grad_B_at = B + first * B_STRIDE + n, grad_B + first * N + n
                if grad_y is not None:
                    C_at, grad_C_at = C + first * C_STRIDE + n, grad_C + first * N + n
                before, decays, later = (), (), ()
                for i in tl.static_range(ROWS):
                    real = i < rows_of_n
                    b = tl.load(B_at + i * B_STRIDE, mask=real, other=0.0).to(tl.float32)
                    before += (h,)
                    decays += (tl.exp2(steps[i][:, None] * rate),)
                    h = decays[i] * h + drives[i][:, None] * b[None, :]
                    if grad_y is not None:
                        of_c = tl.sum(outs[i][:, None] * h, 0)
                        _accumulate(grad_C_at + i * N, of_c, real, i < again_of_n, SHARED)
                        if z is not None:
                            c = tl.load(C_at + i * C_STRIDE, mask=real, other=0.0).to(tl.float32)
                            later += (ungated[i] + h * c[None, :],)
                if z is not None:
                    ungated = later
                of_rate = tl.zeros([CHANNELS, STATES], tl.float32)
                # Built from the last row to the first; the loop after it runs the other way round.
                last_step, last_drive = (), ()
                for i in tl.static_range(ROWS - 1, -1, -1):
                    real = i < rows_of_n
                    b = tl.load(B_at + i * B_STRIDE, mask=real, other=0.0).to(tl.float32)
                    if grad_y is not None:
                        c = tl.load(C_at + i * C_STRIDE, mask=real, other=0.0).to(tl.float32)
                        g += outs[i][:, None] * c[None, :]
                    of_b = tl.sum(g * drives[i][:, None], 0)
                    _accumulate(grad_B_at + i * N, of_b, real, i < again_of_n, SHARED)
                    last_drive += (into_drive[i] + g * b[None, :],)
                    g *= decays[i]
                    exponent = g * before[i]
                    last_step += (into_step[i] + exponent * rate,)
                    of_rate += exponent * steps[i][:, None]
                into_drive, into_step = (), ()
                for i in tl.static_range(ROWS):
                    into_drive += (last_drive[ROWS - 1 - i],)
                    into_step += (last_step[ROWS - 1 - i],)
                _accumulate(sums + by_channel, of_rate, inside_state, again[:, None] & of_state[None, :], SHARED)
                if grad_initial is not None and (number == 0) & (left > 0):
                    tl.store(grad_initial + sequence * size + by_channel, g, mask=inside_state)
            of_skip = tl.zeros([CHANNELS], tl.float32)
            of_bias = tl.zeros([CHANNELS], tl.float32)
            for i in tl.static_range(ROWS):
                inside = i < rows_of_d
                value = tl.load(x_at + i * X_STRIDE, mask=inside, other=0.0).to(tl.float32)
                of_drive = tl.sum(into_drive[i], 1)
                # The rates carry log2(e) for exp2, and so does what came through them.
                of_step = of_drive * value + tl.sum(into_step[i], 1) * LN_2
                if SOFTPLUS:
                    raw, _step_again = _step(dt_at + i * DT_STRIDE, inside, bias, False)
                    of_step *= sigmoid(raw)
                of_bias += tl.where(inside, of_step, 0.0)
                of_input = of_drive * steps[i]
                if grad_y is not None:
                    of_input += outs[i] * skip
                    of_skip += outs[i] * value
                    if z is not None:
                        gate = tl.load(z_at + i * Z_STRIDE, mask=inside, other=0.0).to(tl.float32)
                        out = tl.load(grad_y_at + i * Y_STRIDE, mask=inside, other=0.0).to(tl.float32)
                        open_gate = sigmoid(gate)
                        whole = tl.sum(ungated[i], 1) + value * skip
                        of_gate = out * whole * open_gate * (1.0 + gate * (1.0 - open_gate))
                        tl.store(grad_z_at + i * WIDTH, of_gate.to(grad_z.dtype.element_ty), mask=inside)
                tl.store(grad_dt_at + i * WIDTH, of_step.to(grad_dt.dtype.element_ty), mask=inside)
                tl.store(grad_x_at + i * WIDTH, of_input.to(grad_x.dtype.element_ty), mask=inside)
            _accumulate(sums + size + d, of_skip, here, again, SHARED)
            _accumulate(sums + size + WIDTH + d, of_bias, here, again, SHARED)


def _tiles(n_states: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Channels and states of a program's tile where it needs all states of a channel, and where any will do."""
    padded = triton.next_power_of_2(n_states)
    some = min(16, padded)
    return (max(8, min(32, TILE // padded)), padded), (min(32, TILE // some), some)


def _grid_of_gradients(n_chunks: int, n_blocks: int) -> tuple[int, int]:
    """Programs of :func:`_gradients` over the chunks, and over the blocks of channels."""
    over_channels = max(1, min(n_blocks, PROGRAMS // max(1, n_chunks)))
    return max(1, min(n_chunks, CHUNKS)), over_channels


def _row_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _states(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _launch_chunk_states(inputs, states, totals, final, softplus, reverse):
    """:func:`_chunk_states` of ``inputs``, its arguments from ``x`` to ``boundaries``."""
    n_states, n_channels = inputs["A"].shape
    channels, some_states = _tiles(n_states)[1]
    _chunk_states[len(inputs["sequences"]), triton.cdiv(n_channels, channels), triton.cdiv(n_states, some_states)](
        **inputs, states=states, totals=totals, final=final, zero=0, WIDTH=n_channels, N=n_states,
        X_STRIDE=_row_stride(inputs["x"]), DT_STRIDE=_row_stride(inputs["dt"]), B_STRIDE=_row_stride(inputs["B"]),
        Z_STRIDE=_row_stride(inputs["z"]), SOFTPLUS=softplus, REVERSE=reverse, ROWS=ROWS, CHANNELS=channels,
        STATES=some_states, num_warps=1,
    )  # fmt: skip


def _launch_pass_states(inputs, totals, edge, states, final, local, reverse):
    """:func:`_pass_states`, with A and the tables of chunks from ``inputs``."""
    n_states, n_channels = inputs["A"].shape
    tables = {name: inputs[name] for name in ("cu_seqlens", "first_chunks", "boundaries")}
    _pass_states[len(tables["cu_seqlens"]) - 1, triton.cdiv(n_channels * n_states, PASSED)](
        A=inputs["A"], totals=totals, edge=edge, **tables, states=states, final=final, WIDTH=n_channels, N=n_states,
        LOCAL=local, REVERSE=reverse, ROWS=ROWS, BLOCK=PASSED, AHEAD=AHEAD, num_warps=1,
    )  # fmt: skip


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, z, dt_bias, initial, cu_seqlens, dt_softplus, return_final_state):
        x, dt, B = dense_rows(x), dense_rows(dt), dense_rows(B)
        A = A.float().mT.contiguous()  # neighbouring lanes have neighbouring channels
        C, z = (None if t is None else dense_rows(t) for t in (C, z))
        initial = _states(initial)
        (n_states, n_channels), n_sequences = A.shape, len(cu_seqlens) - 1
        known = borders(cu_seqlens)
        (sequences, first_chunks), (boundaries, n_boundaries) = known.chunks(ROWS), known.chunk_boundaries(ROWS)
        inputs = {
            "x": x, "dt": dt, "A": A, "B": B, "z": z, "dt_bias": dt_bias, "cu_seqlens": cu_seqlens,
            "sequences": sequences, "first_chunks": first_chunks, "boundaries": boundaries,
        }  # fmt: skip
        states = x.new_empty(n_boundaries, n_states, n_channels, dtype=torch.float32)
        totals = x.new_empty(len(sequences), n_channels, dtype=torch.float32)
        y = final = None
        if return_final_state and C is None:
            final = x.new_empty(n_sequences, n_channels, n_states, dtype=torch.float32)
        elif return_final_state:
            # An empty sequence hands its state on as it came.
            no_state = (n_sequences, n_channels, n_states)
            final = x.new_zeros(no_state, dtype=torch.float32) if initial is None else initial.clone()
        if n_boundaries or (C is None and n_sequences):
            own_final = final if C is None else None
            if len(sequences):
                _launch_chunk_states({**inputs, "z": None}, states, totals, own_final, dt_softplus, reverse=False)
            _launch_pass_states(inputs, totals, initial, states, own_final, local=True, reverse=False)
        inputs |= {"C": C, "D": D, "initial": initial, "states": states}
        if C is not None:
            y = x.new_empty(x.shape)
            if len(sequences):
                channels, all_states = _tiles(n_states)[0]
                _outputs[len(sequences), triton.cdiv(n_channels, channels)](
                    **inputs, y=y, final=final, zero=0, WIDTH=n_channels, N=n_states, X_STRIDE=x.stride(0),
                    DT_STRIDE=dt.stride(0), B_STRIDE=B.stride(0), C_STRIDE=C.stride(0), Z_STRIDE=_row_stride(z),
                    SOFTPLUS=dt_softplus, ROWS=ROWS, UNROLLED=UNROLLED, CHANNELS=channels, STATES=all_states,
                    num_warps=1,
                )  # fmt: skip
        ctx.save_for_backward(*inputs.values(), totals if C is None else None)
        ctx.names, ctx.dt_softplus = tuple(inputs), dt_softplus
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_final):
        *saved, totals = ctx.saved_tensors
        inputs = dict(zip(ctx.names, saved, strict=True))
        x, dt, A, B, C, D, z = (inputs[name] for name in ("x", "dt", "A", "B", "C", "D", "z"))
        initial, states, n_chunks = inputs["initial"], inputs["states"], len(inputs["sequences"])
        n_states, n_channels = A.shape
        if C is not None:
            grad_y = torch.zeros_like(x) if grad_y is None else dense_rows(grad_y)
        grad_final = _states(grad_final)
        grad_states = torch.empty_like(states)
        if len(states):
            if C is not None:
                totals = x.new_empty(n_chunks, n_channels, dtype=torch.float32)
                of_y = {name: t for name, t in inputs.items() if name not in ("C", "D", "initial", "states")}
                of_y |= {"x": grad_y, "B": C}
                _launch_chunk_states(of_y, grad_states, totals, None, ctx.dt_softplus, reverse=True)
            _launch_pass_states(inputs, totals, grad_final, grad_states, None, local=C is not None, reverse=True)
        grad_x, grad_dt = x.new_empty(x.shape), dt.new_empty(dt.shape)
        grad_z = None if z is None else z.new_empty(z.shape)
        grad_initial = None
        if initial is not None:
            # An empty sequence hands its state on as it came.
            grad_initial = torch.zeros_like(initial) if grad_final is None else grad_final.clone()
        n_blocks = triton.cdiv(n_channels, GRADIENT_CHANNELS)
        over_chunks, over_channels = _grid_of_gradients(n_chunks, n_blocks)
        by_row = x.new_empty(over_channels, 1 if C is None else 2, len(x), n_states, dtype=torch.float32)
        sums = x.new_empty(over_chunks, A.numel() + 2 * n_channels, dtype=torch.float32)
        if n_chunks:
            _gradients[over_chunks, over_channels](
                **inputs, grad_y=grad_y, grad_final=grad_final, grad_states=grad_states, grad_x=grad_x,
                grad_dt=grad_dt, grad_z=grad_z, grad_initial=grad_initial, by_row=by_row, sums=sums, n_rows=len(x),
                n_chunks=n_chunks, zero=0, WIDTH=n_channels, N=n_states, X_STRIDE=x.stride(0), DT_STRIDE=dt.stride(0),
                B_STRIDE=B.stride(0), C_STRIDE=_row_stride(C), Z_STRIDE=_row_stride(z), Y_STRIDE=_row_stride(grad_y),
                SOFTPLUS=ctx.dt_softplus, SHARED=over_chunks < n_chunks or over_channels < n_blocks, ROWS=ROWS,
                CHANNELS=GRADIENT_CHANNELS, STATES=GRADIENT_STATES, num_warps=1, maxnreg=GRADIENT_REGISTERS,
            )  # fmt: skip
        else:
            sums.zero_()
        grad_A, grad_D, grad_bias = sums.sum(0).split([A.numel(), n_channels, n_channels])
        grad_B, *grad_C = (by_row[0] if over_channels == 1 else by_row.sum(0)).unbind()
        return (
            grad_x, grad_dt, grad_A.view(n_channels, n_states), grad_B, grad_C[0] if grad_C else None,
            None if D is None else grad_D, grad_z, None if inputs["dt_bias"] is None else grad_bias, grad_initial,
            None, None, None,
        )  # fmt: skip


def selective_scan_triton(scan: ScanArguments) -> tuple[Tensor | None, Tensor | None]:
    """All of :func:`recbole_ssm.ops.selective_scan` in Triton kernels; states are float32.

    Without ``C`` there are no outputs (nor ``D`` and ``z``): the final state alone is computed.
    """
    with torch.cuda.device_of(scan.x):
        return _SelectiveScan.apply(
            scan.x, scan.dt, scan.A, scan.B, scan.C, dense(scan.D), scan.z, dense(scan.dt_bias), scan.initial_state,
            scan.cu_seqlens.contiguous(), scan.dt_softplus, scan.return_final_state,
        )  # fmt: skip
