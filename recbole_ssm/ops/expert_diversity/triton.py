"""How alike experts answer on a GPU: one Triton kernel that computes the loss and, at the same time, its gradient.

A program holds all experts' directions ``u`` of one representation, ``[E, d]``, and goes through the experts once more:
``c_j = u_i . u_j`` for all ``j != i`` gives what ``i`` adds to the loss, ``sum_j c_j^2``, and its direction's gradient,
``4 sum_j c_j u_j``, for each pair counts twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_ssm.ops.kernels import BATCH_SIZES, columns_per_block, dense, load_rows

# Below it a length counts as this, as torch's normalize has it.
SHORTEST = tl.constexpr(1e-12)
ELEMENTS_PER_WARP = 1024  # 32 a thread, as long as there are no more than MOST_WARPS
MOST_WARPS = 16


@triton.jit(do_not_specialize=BATCH_SIZES)
def _loss_and_gradient(
    experts, weights, losses, gradient, scale, n_rows, expert_stride, row_stride,
    E: tl.constexpr, D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    expert, column = tl.arange(0, BLOCK_E).to(tl.int64), tl.arange(0, BLOCK_D)
    inside = column < D
    one = experts + m * row_stride + column
    if gradient is not None:
        into = gradient + m * D + column
    block = load_rows(experts + m * row_stride, expert, expert < E, expert_stride, 0, D, BLOCK_D).to(tl.float32)
    directions = block / tl.maximum(tl.sqrt(tl.sum(block * block, 1)), SHORTEST)[:, None]
    if weights is not None:
        weight = tl.load(weights + m).to(tl.float32)
    else:
        weight = 1.0 / n_rows.to(tl.float32)
    weight = scale * weight / (E * (E - 1))
    squares = tl.zeros([BLOCK_E], tl.float32)
    for i in range(E):
        own = tl.load(one, mask=inside, other=0.0).to(tl.float32)
        one += expert_stride
        norm = tl.sqrt(tl.sum(own * own, 0))
        length = tl.maximum(norm, SHORTEST)
        own = own / length
        cosines = tl.where(expert == i, 0.0, tl.sum(directions * own[None, :], 1))
        squares += cosines * cosines
        if gradient is not None:
            g = 4.0 * weight * tl.sum(directions * cosines[:, None], 0)
            # Below the shortest length a direction is the vector over a constant.
            along = tl.where(norm >= SHORTEST, tl.sum(g * own, 0), 0.0)
            g = (g - along * own) / length
            tl.store(into, g.to(gradient.dtype.element_ty), mask=inside)
            into += n_rows * D
    tl.store(losses + m, weight * tl.sum(squares, 0))


class _ExpertDiversity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, experts, weights, scale):
        experts = experts if experts.stride(-1) == 1 else experts.contiguous()
        n_experts, n_rows, width = experts.shape
        losses = experts.new_empty(n_rows, dtype=torch.float32)
        # A loss that is scaled for float16's range is so only after this gradient has been made.
        kept = torch.float32 if experts.dtype == torch.float16 else experts.dtype
        gradient = experts.new_empty(experts.shape, dtype=kept) if ctx.needs_input_grad[0] else None
        if n_rows:
            sizes = {
                "E": n_experts, "D": width,
                "BLOCK_E": triton.next_power_of_2(n_experts), "BLOCK_D": columns_per_block(width),
            }  # fmt: skip
            warps = max(1, min(MOST_WARPS, sizes["BLOCK_E"] * sizes["BLOCK_D"] // ELEMENTS_PER_WARP))
            _loss_and_gradient[(n_rows,)](
                experts=experts, weights=weights, losses=losses, gradient=gradient, scale=scale, n_rows=n_rows,
                expert_stride=experts.stride(0), row_stride=experts.stride(1), **sizes, num_warps=warps,
            )  # fmt: skip
        ctx.gradient, ctx.dtype = gradient, experts.dtype
        return losses.sum() if n_rows or weights is not None else losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.gradient is None:
            raise RuntimeError("expert_diversity keeps its gradient for one backward pass, and this is the second")
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grad).to(ctx.dtype), None, None


def expert_diversity_triton(experts: Tensor, weights: Tensor | None, scale: float) -> Tensor:
    """The scaled mean of :func:`recbole_ssm.ops.expert_diversity` for two experts or more, float32."""
    with torch.cuda.device_of(experts):
        return _ExpertDiversity.apply(experts, dense(weights), scale)
