"""Selective scan on a GPU: Triton kernels, forward and backward.

A lane owns a channel and keeps it for :data:`ROWS` rows in registers, so the recurrence itself needs no exchange
between lanes; the loop runs over the states, one after another. Between such groups of rows the state passes through
memory. These states, one every :data:`ROWS` rows, are all that the backward pass needs: it recomputes the rest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_ssm.ops.kernels import BATCH_SIZES, dense, rows, sigmoid, softplus
from recbole_ssm.ops.packing import borders

ROWS = 16
CHANNELS = 32  # one warp's lanes
# Programs that share out the sequences: enough to fill a GPU, few enough that their sums of A's gradient stay small.
PROGRAMS = 2048

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _forward(
    x, dt, A, B, C, D, z, dt_bias, initial, cu_seqlens, starts, states, y, final,
    n_channels, n_states, x_stride, dt_stride, B_stride, C_stride, z_stride,
    SOFTPLUS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    here = d < n_channels
    size = n_channels * n_states
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    joint = tl.load(starts + sequence).to(tl.int64)
    bias = tl.load(dt_bias + d, mask=here, other=0.0).to(tl.float32) if dt_bias is not None else 0.0
    skip = tl.load(D + d, mask=here, other=0.0).to(tl.float32) if D is not None else 0.0
    for first in range(begin, end, ROWS):
        steps, drives, outs = (), (), ()
        for i in tl.static_range(ROWS):
            t = first + i
            inside = d < tl.where(t < end, n_channels, 0)
            step = tl.load(dt + t * dt_stride + d, mask=inside, other=0.0).to(tl.float32) + bias
            step = tl.where(inside, softplus(step) if SOFTPLUS else step, 0.0)
            inp = tl.load(x + t * x_stride + d, mask=inside, other=0.0).to(tl.float32)
            steps += (step,)
            drives += (step * inp,)
            outs += (inp * skip,)
        for n in range(n_states):
            rate = tl.load(A + n * n_channels + d, mask=here, other=0.0)
            h = tl.zeros([CHANNELS], tl.float32)
            if first > begin:
                h = tl.load(states + (joint - 1) * size + n * n_channels + d, mask=here, other=0.0)
            elif initial is not None:
                h = tl.load(initial + sequence * size + n * n_channels + d, mask=here, other=0.0)
            summed = ()
            for i in tl.static_range(ROWS):
                t = first + i
                b = tl.load(B + t * B_stride + n, mask=t < end, other=0.0).to(tl.float32)
                c = tl.load(C + t * C_stride + n, mask=t < end, other=0.0).to(tl.float32)
                h = tl.exp2(steps[i] * rate) * h + drives[i] * b
                summed += (outs[i] + h * c,)
            outs = summed
            if first + ROWS < end:
                tl.store(states + joint * size + n * n_channels + d, h, mask=here)
            elif final is not None:
                tl.store(final + sequence * size + n * n_channels + d, h, mask=here)
        joint += 1
        for i in tl.static_range(ROWS):
            t = first + i
            inside = d < tl.where(t < end, n_channels, 0)
            out = outs[i]
            if z is not None:
                gate = tl.load(z + t * z_stride + d, mask=inside, other=0.0).to(tl.float32)
                out = out * gate * sigmoid(gate)
            tl.store(y + t * n_channels + d, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _backward(
    x, dt, A, B, C, D, z, dt_bias, initial, cu_seqlens, starts, states, grad_y, grad_final,
    grad_states, grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial,
    n_sequences, n_rows, n_channels, n_states, x_stride, dt_stride, B_stride, C_stride, z_stride, y_stride,
    SOFTPLUS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    here = d < n_channels
    size = n_channels * n_states
    grad_A += program * size
    grad_B += block * n_rows * n_states
    grad_C += block * n_rows * n_states
    bias = tl.load(dt_bias + d, mask=here, other=0.0).to(tl.float32) if dt_bias is not None else 0.0
    skip = tl.load(D + d, mask=here, other=0.0).to(tl.float32) if D is not None else 0.0
    sum_bias = tl.zeros([CHANNELS], tl.float32)
    sum_skip = tl.zeros([CHANNELS], tl.float32)
    for sequence in range(program, n_sequences, tl.num_programs(0)):
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
        begin = tl.load(cu_seqlens + sequence).to(tl.int64)
        joint = tl.load(starts + sequence).to(tl.int64)
        n_groups = (end - begin + ROWS - 1) // ROWS
        for back in range(n_groups):
            group = n_groups - 1 - back
            first = begin + group * ROWS
            inputs, steps, slopes, outs, ungated, into_step, into_drive = (), (), (), (), (), (), ()
            for i in tl.static_range(ROWS):
                t = first + i
                inside = d < tl.where(t < end, n_channels, 0)
                raw = tl.load(dt + t * dt_stride + d, mask=inside, other=0.0).to(tl.float32) + bias
                steps += (tl.where(inside, softplus(raw) if SOFTPLUS else raw, 0.0),)
                slopes += (sigmoid(raw) if SOFTPLUS else 1.0,)
                inp = tl.load(x + t * x_stride + d, mask=inside, other=0.0).to(tl.float32)
                inputs += (inp,)
                out = tl.load(grad_y + t * y_stride + d, mask=inside, other=0.0).to(tl.float32)
                if z is not None:
                    gate = tl.load(z + t * z_stride + d, mask=inside, other=0.0).to(tl.float32)
                    out = out * gate * sigmoid(gate)
                outs += (out,)
                ungated += (inp * skip,)
                into_step += (tl.zeros([CHANNELS], tl.float32),)
                into_drive += (tl.zeros([CHANNELS], tl.float32),)
            for n in range(n_states):
                place = n * n_channels + d
                rate = tl.load(A + place, mask=here, other=0.0)
                h = tl.zeros([CHANNELS], tl.float32)
                if group > 0:
                    h = tl.load(states + (joint + group - 1) * size + place, mask=here, other=0.0)
                elif initial is not None:
                    h = tl.load(initial + sequence * size + place, mask=here, other=0.0)
                g = tl.zeros([CHANNELS], tl.float32)
                if back > 0:
                    g = tl.load(grad_states + (joint + group) * size + place, mask=here, other=0.0)
                elif grad_final is not None:
                    g = tl.load(grad_final + sequence * size + place, mask=here, other=0.0)
                before, decays, summed = (), (), ()
                for i in tl.static_range(ROWS):
                    t = first + i
                    b = tl.load(B + t * B_stride + n, mask=t < end, other=0.0).to(tl.float32)
                    before += (h,)
                    decays += (tl.exp2(steps[i] * rate),)
                    h = decays[i] * h + steps[i] * inputs[i] * b
                    tl.store(grad_C + t * n_states + n, tl.sum(outs[i] * h), mask=t < end)
                    if z is not None:
                        c = tl.load(C + t * C_stride + n, mask=t < end, other=0.0).to(tl.float32)
                        summed += (ungated[i] + h * c,)
                if z is not None:
                    ungated = summed
                sum_rate = tl.zeros([CHANNELS], tl.float32)
                # Built from the last row to the first; the loop after it runs the other way round, so it is reversed.
                last_step, last_drive = (), ()
                for i in tl.static_range(ROWS - 1, -1, -1):
                    t = first + i
                    b = tl.load(B + t * B_stride + n, mask=t < end, other=0.0).to(tl.float32)
                    c = tl.load(C + t * C_stride + n, mask=t < end, other=0.0).to(tl.float32)
                    g += outs[i] * c
                    tl.store(grad_B + t * n_states + n, tl.sum(g * steps[i] * inputs[i]), mask=t < end)
                    last_drive += (into_drive[i] + g * b,)
                    g *= decays[i]
                    exponent = g * before[i]
                    last_step += (into_step[i] + exponent * rate,)
                    sum_rate += exponent * steps[i]
                into_drive, into_step = (), ()
                for i in tl.static_range(ROWS):
                    into_drive += (last_drive[ROWS - 1 - i],)
                    into_step += (last_step[ROWS - 1 - i],)
                tl.store(grad_A + place, tl.load(grad_A + place, mask=here, other=0.0) + sum_rate, mask=here)
                if group > 0:
                    tl.store(grad_states + (joint + group - 1) * size + place, g, mask=here)
                elif grad_initial is not None:
                    tl.store(grad_initial + sequence * size + place, g, mask=here)
            for i in tl.static_range(ROWS):
                t = first + i
                inside = d < tl.where(t < end, n_channels, 0)
                # The rates carry log2(e) for exp2, and so does what came through them.
                of_step = (into_drive[i] * inputs[i] + into_step[i] * LN_2) * slopes[i]
                of_input = into_drive[i] * steps[i] + outs[i] * skip
                tl.store(grad_dt + t * n_channels + d, of_step.to(grad_dt.dtype.element_ty), mask=inside)
                tl.store(grad_x + t * n_channels + d, of_input.to(grad_x.dtype.element_ty), mask=inside)
                sum_bias += tl.where(inside, of_step, 0.0)
                sum_skip += outs[i] * inputs[i]
                if z is not None:
                    gate = tl.load(z + t * z_stride + d, mask=inside, other=0.0).to(tl.float32)
                    out = tl.load(grad_y + t * y_stride + d, mask=inside, other=0.0).to(tl.float32)
                    share = sigmoid(gate)
                    of_gate = out * ungated[i] * share * (1.0 + gate * (1.0 - share))
                    tl.store(grad_z + t * n_channels + d, of_gate.to(grad_z.dtype.element_ty), mask=inside)
    if grad_D is not None:
        tl.store(grad_D + program * n_channels + d, sum_skip, mask=here)
    if grad_bias is not None:
        tl.store(grad_bias + program * n_channels + d, sum_bias, mask=here)


def _by_state(tensor: Tensor | None) -> Tensor | None:
    """States first, so that neighbouring lanes read neighbouring channels: ``[..., D, N]`` to ``[..., N, D]``."""
    return None if tensor is None else tensor.float().mT.contiguous()


def _row_strides(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.stride(0) for t in tensors]


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, z, dt_bias, initial, cu_seqlens, dt_softplus, return_final_state):
        x, dt, B, C = rows(x), rows(dt), rows(B), rows(C)
        z = None if z is None else rows(z)
        rate, start = _by_state(A) * LOG2_E.value, _by_state(initial)
        (n_channels, n_states), n_sequences = A.shape, len(cu_seqlens) - 1
        starts, n_joints = borders(cu_seqlens).joints(ROWS)
        states = x.new_empty(n_joints, n_states, n_channels, dtype=torch.float32)
        y = x.new_empty(x.shape)
        final = None
        if return_final_state:
            shape = (n_sequences, n_states, n_channels)
            final = x.new_zeros(shape, dtype=torch.float32) if start is None else start.clone()
        if n_sequences:
            _forward[n_sequences, triton.cdiv(n_channels, CHANNELS)](
                x, dt, rate, B, C, D, z, dt_bias, start, cu_seqlens, starts, states, y, final,
                n_channels, n_states, *_row_strides(x, dt, B, C, z), dt_softplus, ROWS, CHANNELS, num_warps=1,
            )  # fmt: skip
        ctx.save_for_backward(x, dt, rate, B, C, D, z, dt_bias, start, cu_seqlens, starts, states)
        ctx.dt_softplus = dt_softplus
        ctx.set_materialize_grads(False)
        return y, None if final is None else final.mT

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_final):
        x, dt, rate, B, C, D, z, dt_bias, start, cu_seqlens, starts, states = ctx.saved_tensors
        n_sequences, (n_states, n_channels) = len(cu_seqlens) - 1, rate.shape
        grad_y = torch.zeros_like(x) if grad_y is None else rows(grad_y)
        n_programs, n_blocks = min(n_sequences, PROGRAMS), triton.cdiv(n_channels, CHANNELS)
        grad_x, grad_dt = x.new_empty(x.shape), dt.new_empty(dt.shape)
        grad_z = None if z is None else z.new_empty(z.shape)
        grad_A = rate.new_zeros(n_programs, n_states, n_channels)
        grad_B, grad_C = (rate.new_empty(n_blocks, len(x), n_states) for _ in range(2))
        grad_D = None if D is None else rate.new_empty(n_programs, n_channels)
        grad_bias = None if dt_bias is None else rate.new_empty(n_programs, n_channels)
        final = _by_state(grad_final)
        grad_initial = None
        if start is not None:
            # An empty sequence hands its state on as it came.
            grad_initial = torch.zeros_like(start) if final is None else final.clone()
        if n_sequences:
            _backward[n_programs, n_blocks](
                x, dt, rate, B, C, D, z, dt_bias, start, cu_seqlens, starts, states, grad_y, final,
                torch.empty_like(states), grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias,
                grad_initial, n_sequences, len(x), n_channels, n_states, *_row_strides(x, dt, B, C, z, grad_y),
                ctx.dt_softplus, ROWS, CHANNELS, num_warps=1,
            )  # fmt: skip

        return (
            grad_x, grad_dt, grad_A.sum(0).mT, grad_B.sum(0), grad_C.sum(0),
            None if D is None else grad_D.sum(0), grad_z, None if dt_bias is None else grad_bias.sum(0),
            None if start is None else grad_initial.mT, None, None, None,
        )  # fmt: skip


def selective_scan_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """All of :func:`recbole_ssm.ops.selective_scan` in one kernel each way; states are float32."""
    with torch.cuda.device_of(x):
        return _SelectiveScan.apply(
            x, dt, A, B, C, dense(D), z, dense(dt_bias), initial_state, cu_seqlens.contiguous(),
            dt_softplus, return_final_state,
        )  # fmt: skip
