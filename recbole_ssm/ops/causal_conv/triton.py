"""Causal depthwise convolution on a GPU: Triton kernels, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_ssm.ops.kernels import BATCH_SIZES, dense, dense_rows, sigmoid
from recbole_ssm.ops.packing import positions as row_positions

ROWS = 32
CHANNELS = 64


@triton.jit
def _tile(n_rows, n_channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Rows (int64 ``[ROWS]``) and channels of a program's tile, and which of each there are."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return t, d, t < n_rows, d < n_channels


@triton.jit
def _before_activation(x, weight, bias, t, d, position, real, here, x_stride, K: tl.constexpr):
    """The weighted sum over the last K rows; ``position`` says how many of these the sequence has."""
    total = tl.zeros([t.shape[0], d.shape[0]], tl.float32)
    if bias is not None:
        total += tl.load(bias + d, mask=here, other=0.0).to(tl.float32)[None, :]
    for back in tl.static_range(K):
        w = tl.load(weight + d * K + (K - 1 - back), mask=here, other=0.0).to(tl.float32)
        seen = (real & (position >= back))[:, None] & here[None, :]
        value = tl.load(x + (t - back)[:, None] * x_stride + d[None, :], mask=seen, other=0.0)
        total += w[None, :] * value.to(tl.float32)
    return total


@triton.jit(do_not_specialize=BATCH_SIZES)
def _forward(
    x, weight, bias, positions, y, n_rows, n_channels, x_stride,
    SILU: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    t, d, real, here = _tile(n_rows, n_channels, ROWS, CHANNELS)
    position = tl.load(positions + t, mask=real, other=0)
    out = _before_activation(x, weight, bias, t, d, position, real, here, x_stride, K)
    if SILU:
        out = out * sigmoid(out)
    place = t[:, None] * n_channels + d[None, :]
    tl.store(y + place, out.to(y.dtype.element_ty), mask=real[:, None] & here[None, :])


@triton.jit(do_not_specialize=BATCH_SIZES)
def _backward_weight(
    x, weight, bias, positions, grad_y, grad_sum, sums, n_rows, n_channels, x_stride, y_stride,
    SILU: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradient of the weighted sum, and its sums over this tile's rows for the weight and, after that, the bias."""
    t, d, real, here = _tile(n_rows, n_channels, ROWS, CHANNELS)
    sums += tl.program_id(0).to(tl.int64) * n_channels * (K + 1)
    position = tl.load(positions + t, mask=real, other=0)
    inside = real[:, None] & here[None, :]
    g = tl.load(grad_y + t[:, None] * y_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if SILU:
        total = _before_activation(x, weight, bias, t, d, position, real, here, x_stride, K)
        gate = sigmoid(total)
        g *= gate * (1.0 + total * (1.0 - gate))
        tl.store(grad_sum + t[:, None] * n_channels + d[None, :], g.to(grad_sum.dtype.element_ty), mask=inside)
    for back in tl.static_range(K):
        seen = (real & (position >= back))[:, None] & here[None, :]
        value = tl.load(x + (t - back)[:, None] * x_stride + d[None, :], mask=seen, other=0.0).to(tl.float32)
        tl.store(sums + d * K + (K - 1 - back), tl.sum(g * value, 0), mask=here)
    if bias is not None:
        tl.store(sums + n_channels * K + d, tl.sum(g, 0), mask=here)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _backward_input(
    grad_sum, weight, positions, grad_x, n_rows, n_channels, sum_stride,
    K: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    t, d, real, here = _tile(n_rows, n_channels, ROWS, CHANNELS)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for ahead in tl.static_range(K):
        w = tl.load(weight + d * K + (K - 1 - ahead), mask=here, other=0.0).to(tl.float32)
        later = t + ahead < n_rows
        # The row that many rows later has seen this one where its own sequence had begun by then.
        position = tl.load(positions + t + ahead, mask=later, other=0)
        seen = (later & (position >= ahead))[:, None] & here[None, :]
        g = tl.load(grad_sum + (t + ahead)[:, None] * sum_stride + d[None, :], mask=seen, other=0.0)
        total += w[None, :] * g.to(tl.float32)
    place = t[:, None] * n_channels + d[None, :]
    tl.store(grad_x + place, total.to(grad_x.dtype.element_ty), mask=real[:, None] & here[None, :])


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, silu, cu_seqlens):
        x, weight = dense_rows(x), weight.contiguous()
        positions = row_positions(cu_seqlens)
        (n_rows, n_channels), taps = x.shape, weight.shape[1]
        y = x.new_empty(x.shape)
        grid = (triton.cdiv(n_rows, ROWS), triton.cdiv(n_channels, CHANNELS))
        if n_rows:
            _forward[grid](
                x=x, weight=weight, bias=bias, positions=positions, y=y, n_rows=n_rows, n_channels=n_channels,
                x_stride=x.stride(0), SILU=silu, K=taps, ROWS=ROWS, CHANNELS=CHANNELS,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, positions)
        ctx.silu, ctx.grid = silu, grid
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight, bias, positions = ctx.saved_tensors
        (n_rows, n_channels), taps = x.shape, weight.shape[1]
        grad_y = dense_rows(grad_y)
        grad_sum = torch.empty_like(x, memory_format=torch.contiguous_format) if ctx.silu else grad_y
        grad_x = x.new_empty(x.shape)
        sums = x.new_empty(ctx.grid[0], n_channels * (taps + 1), dtype=torch.float32)
        sizes = {"n_rows": n_rows, "n_channels": n_channels, "K": taps, "ROWS": ROWS, "CHANNELS": CHANNELS}
        if n_rows:
            _backward_weight[ctx.grid](
                x=x, weight=weight, bias=bias, positions=positions, grad_y=grad_y, grad_sum=grad_sum, sums=sums,
                x_stride=x.stride(0), y_stride=grad_y.stride(0), SILU=ctx.silu, **sizes,
            )  # fmt: skip
            _backward_input[ctx.grid](
                grad_sum=grad_sum, weight=weight, positions=positions, grad_x=grad_x, sum_stride=grad_sum.stride(0),
                **sizes,
            )  # fmt: skip
        grad_weight, grad_bias = sums.sum(0).split([n_channels * taps, n_channels])
        return grad_x, grad_weight.view(weight.shape), None if bias is None else grad_bias, None, None


def causal_conv_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, cu_seqlens: Tensor
) -> Tensor:
    """The sum of :func:`recbole_ssm.ops.causal_conv` over sequences that start from zeros: ``[T, D]``."""
    with torch.cuda.device_of(x):
        return _CausalConv.apply(x, weight, dense(bias), activation == "silu", cu_seqlens)
