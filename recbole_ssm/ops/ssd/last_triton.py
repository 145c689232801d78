"""The last rows' output of state-space duality on a GPU: one Triton kernel each way, see :func:`..ssd.ssd_last`.

A program works on one sequence and several heads of one group, ``ROWS`` rows at a time: forward from the last row to
the first, as a row's weight depends on the steps after it, and backward from the first to the last, as the gradient of
a step depends on the rows before it. Only the gradients of A, D and dt_bias are sums over several sequences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_ssm.ops.kernels import dense, dense_rows, sigmoid, softplus
from recbole_ssm.ops.scan_arguments import ScanArguments

# Numbers of a program's blocks of inputs, [ROWS, HEADS, P], and of B, [ROWS, N]: they lie in registers, of which two
# programs of 8 warps then have enough on one multiprocessor.
OF_INPUTS, OF_B = 4096, 2048
WARPS = 8
# Short sequences are many, which keeps a GPU busy with few rows of as many heads as share C . B; of longer ones, more
# rows at a time make fewer steps, and fewer heads more programs.
FEW_ROWS, MANY_ROWS, LONG = 8, 32, 256


@triton.jit
def _add_pairs(all_left, others_left, all_right, others_right):
    return all_left + all_right, all_left + others_right


@triton.jit
def _sum_of_others(value, REVERSE: tl.constexpr):
    """Sum of the rows before each one (``REVERSE``: after), along the first dimension; a row's own never takes part."""
    _all, others = tl.associative_scan((value, tl.zeros_like(value)), 0, _add_pairs, reverse=REVERSE)
    return others


@triton.jit
def _load_steps(dt, bias, t, real, h, ours, dt_stride, SOFTPLUS: tl.constexpr):
    """Step sizes ``[ROWS, HEADS]`` before and after softplus; none where there is no row."""
    here = real[:, None] & ours[None, :]
    raw = tl.load(dt + t[:, None] * dt_stride + h[None, :], mask=here, other=0.0).to(tl.float32) + bias[None, :]
    return raw, tl.where(here, softplus(raw) if SOFTPLUS else raw, 0.0)


@triton.jit
def _load_head(vector, h, ours):
    return tl.load(vector + h, mask=ours, other=0.0).to(tl.float32)


@triton.jit
def _load_last(x, place, inside, begin, end, x_stride):
    """The sequence's last row, zeros where it has none."""
    row = tl.zeros([place.shape[0], place.shape[1]], tl.float32)
    if end > begin:
        row = tl.load(x + (end - 1) * x_stride + place, mask=inside, other=0.0).to(tl.float32)
    return row


@triton.jit
def _forward(
    x, dt, A, B, C, D, dt_bias, cu_seqlens, decay_to_end, y,
    n_heads, heads_per_group, x_stride, dt_stride, B_stride, C_stride,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    sequence, first_head = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    begin, end = tl.load(cu_seqlens + sequence).to(tl.int64), tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    n, p, head = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_HEADS)
    h, ours = first_head + head, head < HEADS
    group = (first_head // heads_per_group) * N
    rate = _load_head(A, h, ours)
    bias = tl.zeros([BLOCK_HEADS], tl.float32)
    if dt_bias is not None:
        bias = _load_head(dt_bias, h, ours)
    c = tl.load(C + sequence * C_stride + group + n, mask=n < N, other=0.0).to(tl.float32)
    place, inside = h[:, None] * P + p[None, :], ours[:, None] & (p < P)[None, :]
    after = tl.zeros([BLOCK_HEADS], tl.float32)  # sum of the steps of all rows after the block
    out = tl.zeros([BLOCK_HEADS, BLOCK_P], tl.float32)
    for i in range((end - begin + ROWS - 1) // ROWS):
        t = end - (i + 1) * ROWS + tl.arange(0, ROWS)
        real = t >= begin
        _raw, step = _load_steps(dt, bias, t, real, h, ours, dt_stride, SOFTPLUS)
        decay = tl.exp((_sum_of_others(step, True) + after[None, :]) * rate[None, :])
        after += tl.sum(step, 0)
        if decay_to_end is not None:
            tl.store(decay_to_end + t[:, None] * n_heads + h[None, :], decay, mask=real[:, None] & ours[None, :])
        b = tl.load(B + t[:, None] * B_stride + group + n[None, :], mask=real[:, None] & (n < N)[None, :], other=0.0)
        affinity = tl.sum(b.to(tl.float32) * c[None, :], 1)
        mask = real[:, None, None] & inside[None, :, :]
        inputs = tl.load(x + t[:, None, None] * x_stride + place[None, :, :], mask=mask, other=0.0).to(tl.float32)
        out += tl.sum(inputs * (step * decay * affinity[:, None])[:, :, None], 0)
    if D is not None:
        out += _load_head(D, h, ours)[:, None] * _load_last(x, place, inside, begin, end, x_stride)
    tl.store(y + sequence * n_heads * P + place, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x, dt, A, B, C, D, dt_bias, cu_seqlens, decay_to_end, grad_y, grad_x, grad_dt, grad_BC, grad_heads,
    n_rows, n_sequences, n_heads, heads_per_group, blocks_per_group,
    x_stride, dt_stride, B_stride, C_stride, y_stride, BC_stride,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    sequence, first_head = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    begin, end = tl.load(cu_seqlens + sequence).to(tl.int64), tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    n, p, head = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_HEADS)
    h, ours = first_head + head, head < HEADS
    group = (first_head // heads_per_group) * N
    rate = _load_head(A, h, ours)
    bias = tl.zeros([BLOCK_HEADS], tl.float32)
    if dt_bias is not None:
        bias = _load_head(dt_bias, h, ours)
    c = tl.load(C + sequence * C_stride + group + n, mask=n < N, other=0.0).to(tl.float32)
    place, inside = h[:, None] * P + p[None, :], ours[:, None] & (p < P)[None, :]
    g = tl.load(grad_y + sequence * y_stride + place, mask=inside, other=0.0).to(tl.float32)
    # Of this block of heads: rows of the gradient of B, then those of C.
    partial = grad_BC + (tl.program_id(1) % blocks_per_group).to(tl.int64) * (n_rows + n_sequences) * BC_stride + group
    skip = tl.zeros([BLOCK_HEADS], tl.float32)
    if D is not None:
        skip = _load_head(D, h, ours)
        of_skip = tl.sum(_load_last(x, place, inside, begin, end, x_stride) * g, 1)
        tl.store(grad_heads + (sequence * 3 + 2) * n_heads + h, of_skip, mask=ours)
    before = tl.zeros([BLOCK_HEADS], tl.float32)  # sum of the exponents' gradients of all rows before the block
    of_rate = tl.zeros([BLOCK_HEADS], tl.float32)
    of_bias = tl.zeros([BLOCK_HEADS], tl.float32)
    of_c = tl.zeros([BLOCK_N], tl.float32)
    for i in range((end - begin + ROWS - 1) // ROWS):
        t = begin + i * ROWS + tl.arange(0, ROWS)
        real = t < end
        here = real[:, None] & ours[None, :]
        states = real[:, None] & (n < N)[None, :]
        raw, step = _load_steps(dt, bias, t, real, h, ours, dt_stride, SOFTPLUS)
        decay = tl.load(decay_to_end + t[:, None] * n_heads + h[None, :], mask=here, other=0.0)
        b = tl.load(B + t[:, None] * B_stride + group + n[None, :], mask=states, other=0.0).to(tl.float32)
        affinity = tl.sum(b * c[None, :], 1)
        mask = real[:, None, None] & inside[None, :, :]
        inputs = tl.load(x + t[:, None, None] * x_stride + place[None, :, :], mask=mask, other=0.0).to(tl.float32)

        of_weight = tl.sum(inputs * g[None, :, :], 2)  # but for the affinity
        direct = decay * affinity[:, None] * of_weight
        of_exponent = step * direct
        # A row's exponent holds the steps of all rows after it.
        earlier = _sum_of_others(of_exponent, False) + before[None, :]
        before += tl.sum(of_exponent, 0)
        of_rate += tl.sum(step * earlier, 0)
        of_step = direct + rate[None, :] * earlier
        if SOFTPLUS:
            of_step *= sigmoid(raw)
        of_bias += tl.sum(tl.where(here, of_step, 0.0), 0)
        tl.store(grad_dt + t[:, None] * n_heads + h[None, :], of_step.to(grad_dt.dtype.element_ty), mask=here)

        weight = step * decay * affinity[:, None] + tl.where(t == end - 1, 1.0, 0.0)[:, None] * skip[None, :]
        of_inputs = (weight[:, :, None] * g[None, :, :]).to(grad_x.dtype.element_ty)
        tl.store(grad_x + t[:, None, None] * n_heads * P + place[None, :, :], of_inputs, mask=mask)

        of_affinity = tl.sum(step * decay * of_weight, 1)
        of_b = (of_affinity[:, None] * c[None, :]).to(grad_BC.dtype.element_ty)
        tl.store(partial + t[:, None] * BC_stride + n[None, :], of_b, mask=states)
        of_c += tl.sum(of_affinity[:, None] * b, 0)
    tl.store(partial + (n_rows + sequence) * BC_stride + n, of_c.to(grad_BC.dtype.element_ty), mask=n < N)
    tl.store(grad_heads + sequence * 3 * n_heads + h, of_rate, mask=ours)
    tl.store(grad_heads + (sequence * 3 + 1) * n_heads + h, of_bias, mask=ours)


class _SSDLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, dt_bias, cu_seqlens, dt_softplus, differentiable):
        x, dt, B, C = dense_rows(x), dense_rows(dt), dense_rows(B), dense_rows(C)
        (n_rows, n_heads, width), (n_sequences, groups, n_states) = x.shape, C.shape
        per_group, block_p, block_n = n_heads // groups, *map(triton.next_power_of_2, (width, n_states))
        fitting = min(MANY_ROWS, OF_B // block_n, OF_INPUTS // (4 * block_p))  # with 4 heads at least
        many = max(FEW_ROWS, fitting) if n_rows > LONG * n_sequences else FEW_ROWS
        most = max(1, OF_INPUTS // (many * block_p))
        heads = next(k for k in range(min(most, per_group), 0, -1) if per_group % k == 0)
        sizes = {
            "P": width, "N": n_states, "BLOCK_P": block_p, "BLOCK_N": block_n, "ROWS": many, "HEADS": heads,
            "BLOCK_HEADS": triton.next_power_of_2(heads), "SOFTPLUS": dt_softplus, "num_warps": WARPS,
            "n_heads": n_heads, "heads_per_group": per_group, "x_stride": x.stride(0), "dt_stride": dt.stride(0),
            "B_stride": B.stride(0), "C_stride": C.stride(0),
        }  # fmt: skip
        y = x.new_empty(n_sequences, n_heads, width)
        decay_to_end = x.new_empty(n_rows, n_heads, dtype=torch.float32) if differentiable else None
        inputs = {
            "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias, "cu_seqlens": cu_seqlens,
            "decay_to_end": decay_to_end,
        }  # fmt: skip
        if n_sequences:
            _forward[n_sequences, n_heads // heads](
                **inputs, y=y, **sizes
            )  # fmt: skip
        ctx.save_for_backward(*inputs.values())
        ctx.names, ctx.sizes = tuple(inputs), sizes
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        inputs = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        x, dt, B, C, D = (inputs[name] for name in ("x", "dt", "B", "C", "D"))
        (n_rows, n_heads, _), (n_sequences, groups, n_states) = x.shape, C.shape
        blocks = n_heads // groups // ctx.sizes["HEADS"]
        grad_y = dense_rows(grad_y)
        grad_x, grad_dt = x.new_empty(x.shape), dt.new_empty(dt.shape)
        one_dtype = B.dtype if blocks == 1 and B.dtype == C.dtype else torch.float32
        grad_BC = x.new_empty(blocks, n_rows + n_sequences, groups, n_states, dtype=one_dtype)
        grad_heads = x.new_empty(n_sequences, 3, n_heads, dtype=torch.float32)
        if n_sequences:
            _backward[n_sequences, groups * blocks](
                **inputs, grad_y=grad_y, grad_x=grad_x, grad_dt=grad_dt, grad_BC=grad_BC, grad_heads=grad_heads,
                n_rows=n_rows, n_sequences=n_sequences, blocks_per_group=blocks, y_stride=grad_y.stride(0),
                BC_stride=groups * n_states, **ctx.sizes,
            )  # fmt: skip
        grad_B, grad_C = (grad_BC[0] if blocks == 1 else grad_BC.sum(0)).split([n_rows, n_sequences])
        # Without D its row was not written.
        grad_A, grad_bias, grad_D = (*grad_heads[:, : 2 + (D is not None)].sum(0), None)[:3]
        grad_bias = None if inputs["dt_bias"] is None else grad_bias
        return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_bias, None, None, None


def ssd_last_triton(scan: ScanArguments) -> Tensor:
    """All of :func:`recbole_ssm.ops.ssd_last` in Triton kernels, summed in float32."""
    differentiable = torch.is_grad_enabled()  # which the forward of a Function cannot see
    with torch.cuda.device_of(scan.x):
        return _SSDLast.apply(
            scan.x, scan.dt, dense(scan.A), scan.B, scan.C, dense(scan.D), dense(scan.dt_bias),
            scan.cu_seqlens.contiguous(), scan.dt_softplus, differentiable,
        )  # fmt: skip
