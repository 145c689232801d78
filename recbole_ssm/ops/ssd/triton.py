"""State-space duality on a GPU: the chunked algorithm of arXiv 2405.21060, section 6, in two Triton kernels each way.

:func:`_pass_states` carries the states (backward: their gradients) from chunk to chunk, one program a sequence and
head; where every sequence fits a chunk there is nothing to carry and it is not launched. :func:`_forward` and
:func:`_backward` then work on all chunks at once, one program for several heads, which share ``C B^T``.

Shapes inside: ``Q`` rows a chunk, ``P`` the width of a head, ``N`` states; ``l`` is the log decay from before the
chunk's first row to after each of its rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_ssm.ops.kernels import (
    BATCH_SIZES,
    MOST_ROWS,
    columns_per_block,
    dense,
    dense_rows,
    dot,
    dot_precision,
    load_rows,
    rows_per_block,
    sigmoid,
    softplus,
    store_rows,
    tuned,
)  # fmt: skip
from recbole_ssm.ops.packing import borders
from recbole_ssm.ops.scan_arguments import ScanArguments

HEADS_PER_PROGRAM = 8
LAUNCHES = ((4, 1), (8, 2))  # the first needs the least shared memory
SHAPE = ["Q", "P", "N"]
# Gradients that are sums over chunks, of which each chunk writes its own.
GRAD_A, GRAD_D, GRAD_BIAS, N_PARTIAL = (tl.constexpr(i) for i in range(4))


@triton.jit
def _load_steps(dt, dt_bias, A, h, t, real, dt_stride, SOFTPLUS: tl.constexpr):
    """Step sizes before and after softplus and ``l``, each ``[Q]``, and the last of ``l``; no step past the end."""
    raw = tl.load(dt + t * dt_stride + h, mask=real, other=0.0).to(tl.float32)
    if dt_bias is not None:
        raw += tl.load(dt_bias + h).to(tl.float32)
    step = tl.where(real, softplus(raw) if SOFTPLUS else raw, 0.0)
    log_decay = tl.cumsum(step * tl.load(A + h).to(tl.float32), 0)
    # Read rather than summed anew: differences from it must be exactly 0 at the last row.
    last = tl.arange(0, t.shape[0]) == t.shape[0] - 1
    return raw, step, log_decay, tl.sum(tl.where(last, log_decay, 0.0), 0)


@triton.jit
def _state_places(P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, first=0):
    """Offsets within a state ``[P, N]``, from its row ``first`` on, and which of them there are."""
    p, n = (first + tl.arange(0, BLOCK_P))[:, None], tl.arange(0, BLOCK_N)[None, :]
    return p * N + n, (p < P) & (n < N)


@tuned([*SHAPE, "REVERSE"], LAUNCHES)
@triton.jit
def _pass_states(
    x, dt, A, B, dt_bias, edge, cu_seqlens, boundaries, states, last,
    n_heads, heads_per_group, x_stride, dt_stride, B_stride,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``BLOCK_P`` rows of the state at each chunk boundary; ``REVERSE``: its gradient, with grad_y for x and C for B.

    ``edge`` is the state that enters the first chunk (the gradient that enters the last), ``last`` the state that
    leaves the last one (the gradient that leaves the first); either may be absent.
    """
    sequence, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = tl.load(cu_seqlens + sequence).to(tl.int64), tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    boundary = tl.load(boundaries + sequence).to(tl.int64)
    n_chunks = (end - begin + Q - 1) // Q
    first = tl.program_id(2) * BLOCK_P
    place, inside = _state_places(P, N, BLOCK_P, BLOCK_N, first)
    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    if edge is not None:
        state = tl.load(edge + (sequence * n_heads + h) * P * N + place, mask=inside, other=0.0)
    for i in range(n_chunks):
        if REVERSE:
            chunk = n_chunks - 1 - i
            between = chunk
        else:
            chunk = i
            between = chunk - 1
        if i > 0:
            tl.store(states + ((boundary + between) * n_heads + h) * P * N + place, state, mask=inside)
        if (i + 1 < n_chunks) or (last is not None):
            t = begin + chunk * Q + tl.arange(0, Q)
            real = t < end
            _raw, step, log_decay, total = _load_steps(dt, dt_bias, A, h, t, real, dt_stride, SOFTPLUS)
            weight = tl.exp(log_decay) if REVERSE else step * tl.exp(total - log_decay)
            inputs = load_rows(x, t, real, x_stride, h * P, P, BLOCK_P, first)
            matrix = load_rows(B, t, real, B_stride, (h // heads_per_group) * N, N, BLOCK_N)
            weighted = (inputs * weight[:, None]).to(matrix.dtype)
            state = tl.exp(total) * state + dot(tl.trans(weighted), matrix, PRECISION)
    if last is not None:
        tl.store(last + (sequence * n_heads + h) * P * N + place, state, mask=inside)


@triton.jit
def _chunk_rows(cu_seqlens, sequences, first_chunks, boundaries, Q: tl.constexpr):
    """The program's chunk: sequence, first row, which are real, the boundary at its end, neighbours before and after.

    A chunk that lies past its sequence's end fills a table up: it has neither rows nor neighbours.
    """
    chunk = tl.program_id(0)
    sequence = tl.load(sequences + chunk).to(tl.int64)
    number = chunk - tl.load(first_chunks + sequence)
    begin, end = tl.load(cu_seqlens + sequence).to(tl.int64), tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    first = begin + number * Q
    real = first + tl.arange(0, Q) < end
    follows, leads = (number > 0) & (first < end), first + Q < end
    boundary = tl.load(boundaries + sequence).to(tl.int64) + number
    return sequence, first, real, boundary, follows, leads


@triton.jit
def _decay_between(log_decay, Q: tl.constexpr):
    """``[Q, Q]``: decay from a row (second index) to a later one (first), 0 to an earlier one."""
    i, j = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    return tl.exp(tl.where(i >= j, log_decay[:, None] - log_decay[None, :], float("-inf")))


@tuned(SHAPE, LAUNCHES)
@triton.jit
def _forward(
    x, dt, A, B, C, D, dt_bias, initial, cu_seqlens, sequences, first_chunks, boundaries, states, y,
    n_heads, heads_per_group, x_stride, dt_stride, B_stride, C_stride,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr, SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, first, real, boundary, follows, _leads = _chunk_rows(cu_seqlens, sequences, first_chunks, boundaries, Q)
    # The pointers stand at the chunk's first row, so that offsets of rows fit 32 bits.
    t = tl.arange(0, Q)
    x, dt, y = x + first * x_stride, dt + first * dt_stride, y + first * n_heads * P
    B, C = B + first * B_stride, C + first * C_stride
    first_head = tl.program_id(1) * HEADS
    group = first_head // heads_per_group
    place, inside = _state_places(P, N, BLOCK_P, BLOCK_N)
    b = load_rows(B, t, real, B_stride, group * N, N, BLOCK_N)
    c = load_rows(C, t, real, C_stride, group * N, N, BLOCK_N)
    scores = dot(c, tl.trans(b), PRECISION)
    for h in range(first_head, first_head + HEADS):
        _raw, step, log_decay, _total = _load_steps(dt, dt_bias, A, h, t, real, dt_stride, SOFTPLUS)
        inputs = load_rows(x, t, real, x_stride, h * P, P, BLOCK_P)
        mixing = scores * _decay_between(log_decay, Q) * step[None, :]
        out = dot(mixing.to(inputs.dtype), inputs, PRECISION)
        if follows or (initial is not None):
            state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
            if follows:
                state = tl.load(states + ((boundary - 1) * n_heads + h) * P * N + place, mask=inside, other=0.0)
            elif initial is not None:
                state = tl.load(initial + (sequence * n_heads + h) * P * N + place, mask=inside, other=0.0)
            carried = dot(c, tl.trans(state).to(c.dtype), PRECISION)
            out += tl.exp(log_decay)[:, None] * carried
        if D is not None:
            out += tl.load(D + h).to(tl.float32) * inputs.to(tl.float32)
        store_rows(y, t, real, n_heads * P, h * P, out, P, BLOCK_P)


@tuned(SHAPE, LAUNCHES)
@triton.jit(do_not_specialize=BATCH_SIZES)
def _backward(
    x, dt, A, B, C, D, dt_bias, initial, cu_seqlens, sequences, first_chunks, boundaries, states, grad_y, grad_final,
    grad_states, grad_x, grad_dt, grad_B, grad_C, partial_sums,
    n_rows, n_heads, heads_per_group, x_stride, dt_stride, B_stride, C_stride, y_stride,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr, SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, first, real, boundary, follows, leads = _chunk_rows(cu_seqlens, sequences, first_chunks, boundaries, Q)
    t = tl.arange(0, Q)
    x, dt, grad_y = x + first * x_stride, dt + first * dt_stride, grad_y + first * y_stride
    B, C = B + first * B_stride, C + first * C_stride
    grad_x, grad_dt = grad_x + first * n_heads * P, grad_dt + first * n_heads
    partial_sums += tl.program_id(0).to(tl.int64) * N_PARTIAL * n_heads
    first_head = tl.program_id(1) * HEADS
    group = first_head // heads_per_group
    place, inside = _state_places(P, N, BLOCK_P, BLOCK_N)
    i, j = t[:, None], t[None, :]
    # Read anew for each use, as registers do not hold them through the loop over heads.
    b = load_rows(B, t, real, B_stride, group * N, N, BLOCK_N)
    c = load_rows(C, t, real, C_stride, group * N, N, BLOCK_N)
    scores = dot(c, tl.trans(b), PRECISION)
    of_scores = tl.zeros([Q, Q], tl.float32)
    of_b = tl.zeros([Q, BLOCK_N], tl.float32)
    of_c = tl.zeros([Q, BLOCK_N], tl.float32)
    for h in range(first_head, first_head + HEADS):
        rate = tl.load(A + h).to(tl.float32)
        raw, step, log_decay, total = _load_steps(dt, dt_bias, A, h, t, real, dt_stride, SOFTPLUS)
        inputs = load_rows(x, t, real, x_stride, h * P, P, BLOCK_P)
        of_out = load_rows(grad_y, t, real, y_stride, h * P, P, BLOCK_P)

        # Within the chunk: out = (scores * decay * step) inputs.
        decay = _decay_between(log_decay, Q)
        of_mixing = dot(of_out, tl.trans(inputs), PRECISION)
        of_scores += of_mixing * decay * step[None, :]
        mixing = (scores * decay * step[None, :]).to(inputs.dtype)
        of_inputs = dot(tl.trans(mixing), of_out, PRECISION)
        through_decay = of_mixing * scores * decay
        of_step = tl.sum(through_decay, 0)
        # A row's own term does not decay; left in, it would cancel only up to rounding.
        through_decay = tl.where(i > j, through_decay * step[None, :], 0.0)
        of_log_decay = tl.sum(through_decay, 1) - tl.sum(through_decay, 0)
        of_total = 0.0

        # From the entering state: out += exp(l) C state.
        state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        if follows:
            state = tl.load(states + ((boundary - 1) * n_heads + h) * P * N + place, mask=inside, other=0.0)
        elif initial is not None:
            state = tl.load(initial + (sequence * n_heads + h) * P * N + place, mask=inside, other=0.0)
        if follows or (initial is not None):
            read = dot(of_out, state.to(of_out.dtype), PRECISION) * tl.exp(log_decay)[:, None]
            of_c += read
            c = load_rows(C, t, real, C_stride, group * N, N, BLOCK_N)
            of_log_decay += tl.sum(read * c.to(tl.float32), 1)

        # To the leaving state: exp(l_end) state + sum_j exp(l_end - l_j) step_j inputs_j B_j^T.
        if leads or (grad_final is not None):
            g = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
            if leads:
                g = tl.load(grad_states + (boundary * n_heads + h) * P * N + place, mask=inside, other=0.0)
            elif grad_final is not None:
                g = tl.load(grad_final + (sequence * n_heads + h) * P * N + place, mask=inside, other=0.0)
            to_end = tl.exp(total - log_decay)
            b = load_rows(B, t, real, B_stride, group * N, N, BLOCK_N)
            written = dot(b, tl.trans(g).to(b.dtype), PRECISION)
            of_inputs += (step * to_end)[:, None] * written
            of_b += (step * to_end)[:, None] * dot(inputs, g.to(inputs.dtype), PRECISION)
            per_step = to_end * tl.sum(inputs.to(tl.float32) * written, 1)
            of_step += per_step
            of_log_decay -= step * per_step
            of_total += tl.sum(step * per_step, 0) + tl.exp(total) * tl.sum(g * state)

        if D is not None:
            skip = tl.load(D + h).to(tl.float32)
            of_inputs += skip * of_out.to(tl.float32)
            tl.store(partial_sums + GRAD_D * n_heads + h, tl.sum(of_out.to(tl.float32) * inputs.to(tl.float32)))
        # l at a row sums the exponents of all rows up to it.
        of_exponent = tl.cumsum(of_log_decay, 0, reverse=True) + of_total
        tl.store(partial_sums + GRAD_A * n_heads + h, tl.sum(of_exponent * step, 0))
        of_step += of_exponent * rate
        if SOFTPLUS:
            of_step *= sigmoid(raw)
        if dt_bias is not None:
            tl.store(partial_sums + GRAD_BIAS * n_heads + h, tl.sum(tl.where(real, of_step, 0.0), 0))
        tl.store(grad_dt + t * n_heads + h, of_step.to(grad_dt.dtype.element_ty), mask=real)
        store_rows(grad_x, t, real, n_heads * P, h * P, of_inputs, P, BLOCK_P)
    b = load_rows(B, t, real, B_stride, group * N, N, BLOCK_N)
    c = load_rows(C, t, real, C_stride, group * N, N, BLOCK_N)
    of_scores = of_scores.to(b.dtype)
    of_c += dot(of_scores, b, PRECISION)
    of_b += dot(tl.trans(of_scores), c, PRECISION)
    partial = (tl.program_id(1).to(tl.int64) * n_rows + first) * N
    store_rows(grad_B + partial, t, real, N, 0, of_b, N, BLOCK_N)
    store_rows(grad_C + partial, t, real, N, 0, of_c, N, BLOCK_N)


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, dt, A, B, C, D, dt_bias, initial, cu_seqlens, dt_softplus, return_final_state, chunk_size
    ):  # fmt: skip
        x, dt, B, C = dense_rows(x), dense_rows(dt), dense_rows(B), dense_rows(C)
        initial = None if initial is None else initial.float().contiguous()
        known = borders(cu_seqlens)
        (n_rows, n_heads, width), (groups, n_states) = x.shape, B.shape[1:]
        n_sequences = len(cu_seqlens) - 1
        Q = min(rows_per_block(n_rows, n_sequences), 1 << (max(16, chunk_size).bit_length() - 1))
        sequences, first_chunks = known.chunks(Q)
        boundaries, n_boundaries = known.chunk_boundaries(Q)
        per_group = n_heads // groups
        heads = next(k for k in range(min(HEADS_PER_PROGRAM, per_group), 0, -1) if per_group % k == 0)
        block = columns_per_block(width)
        sizes = {
            "n_heads": n_heads, "heads_per_group": per_group, "x_stride": x.stride(0), "dt_stride": dt.stride(0),
            "B_stride": B.stride(0), "Q": Q, "P": width, "N": n_states, "BLOCK_N": columns_per_block(n_states),
            "SOFTPLUS": dt_softplus, "PRECISION": dot_precision(),
        }  # fmt: skip
        by_chunk = {"C_stride": C.stride(0), "BLOCK_P": block, "HEADS": heads}
        # A product of these rows is taken.
        by_sequence = {"BLOCK_P": min(MOST_ROWS.value, block)}
        states = x.new_empty(n_boundaries, n_heads, width, n_states, dtype=torch.float32)
        final = None
        if return_final_state:
            final = x.new_empty(n_sequences, n_heads, width, n_states, dtype=torch.float32)
        if n_sequences and (n_boundaries or return_final_state):
            _pass_states[n_sequences, n_heads, triton.cdiv(width, by_sequence["BLOCK_P"])](
                x=x, dt=dt, A=A, B=B, dt_bias=dt_bias, edge=initial, cu_seqlens=cu_seqlens, boundaries=boundaries,
                states=states, last=final, **sizes, **by_sequence, REVERSE=False,
            )  # fmt: skip
        inputs = {
            "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias, "initial": initial,
            "cu_seqlens": cu_seqlens, "sequences": sequences, "first_chunks": first_chunks, "boundaries": boundaries,
            "states": states,
        }  # fmt: skip
        y = x.new_empty(x.shape)
        if n_rows:
            _forward[len(sequences), n_heads // heads](**inputs, y=y, **sizes, **by_chunk)
        ctx.save_for_backward(*inputs.values())
        ctx.names, ctx.sizes, ctx.by_chunk, ctx.by_sequence = tuple(inputs), sizes, by_chunk, by_sequence
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_final):
        inputs = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        x, dt, A, B, C, D, dt_bias, initial, cu_seqlens = (inputs[name] for name in ctx.names[:9])
        sequences, boundaries, states = inputs["sequences"], inputs["boundaries"], inputs["states"]
        (n_rows, n_heads, width), (groups, n_states) = x.shape, B.shape[1:]
        blocks = n_heads // ctx.by_chunk["HEADS"]
        grad_y = torch.zeros_like(x) if grad_y is None else dense_rows(grad_y)
        grad_final = None if grad_final is None else grad_final.contiguous()
        grad_states = torch.empty_like(states)
        grad_initial = None if initial is None else torch.empty_like(initial)
        if len(cu_seqlens) > 1 and (len(states) or grad_initial is not None):
            of_y = {**ctx.sizes, "x_stride": grad_y.stride(0), "B_stride": C.stride(0)}
            _pass_states[len(cu_seqlens) - 1, n_heads, triton.cdiv(width, ctx.by_sequence["BLOCK_P"])](
                x=grad_y, dt=dt, A=A, B=C, dt_bias=dt_bias, edge=grad_final, cu_seqlens=cu_seqlens,
                boundaries=boundaries, states=grad_states, last=grad_initial, **of_y, **ctx.by_sequence, REVERSE=True,
            )  # fmt: skip
        grad_x, grad_dt = x.new_empty(x.shape), dt.new_empty(dt.shape)
        partial_sums = x.new_empty(len(sequences), N_PARTIAL.value, n_heads, dtype=torch.float32)
        # Sums over a group's blocks of heads, of which each writes its own; where there is one, it is the sum.
        one = blocks == groups
        grad_BC = x.new_empty(2, blocks, n_rows, n_states, dtype=x.dtype if one else torch.float32)
        if n_rows:
            _backward[len(sequences), blocks](
                **inputs, grad_y=grad_y, grad_final=grad_final, grad_states=grad_states, grad_x=grad_x,
                grad_dt=grad_dt, grad_B=grad_BC[0], grad_C=grad_BC[1], partial_sums=partial_sums, n_rows=n_rows,
                y_stride=grad_y.stride(0), **ctx.sizes, **ctx.by_chunk,
            )  # fmt: skip
        if not one:
            grad_BC = grad_BC.view(2, groups, blocks // groups, n_rows, n_states).sum(2).to(x.dtype)
        grad_B, grad_C = grad_BC.transpose(1, 2)
        grad_A, grad_D, grad_bias = partial_sums.sum(0)
        return (
            grad_x, grad_dt, grad_A, grad_B, grad_C, None if D is None else grad_D,
            None if dt_bias is None else grad_bias, grad_initial, None, None, None, None,
        )  # fmt: skip


def ssd_triton(scan: ScanArguments, chunk_size: int) -> tuple[Tensor, Tensor | None]:
    """All of :func:`recbole_ssm.ops.ssd` in Triton kernels; states are float32."""
    x = scan.x
    with torch.cuda.device_of(x):
        return _SSD.apply(
            x, scan.dt, dense(scan.A), scan.B.to(x.dtype), scan.C.to(x.dtype), dense(scan.D), dense(scan.dt_bias),
            scan.initial_state, scan.cu_seqlens.contiguous(), scan.dt_softplus, scan.return_final_state, chunk_size,
        )  # fmt: skip
