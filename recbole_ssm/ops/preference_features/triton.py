"""Features of gated embeddings on a GPU: one Triton kernel each way, which keeps nothing but its inputs."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_ssm.ops.kernels import BATCH_SIZES, columns_per_block, dense, dense_rows, load_rows, sigmoid, store_rows

ELEMENTS = 1024  # of a block of rows: eight a thread, for the backward pass holds several such blocks


@triton.jit
def _inputs(embedding, gate_logits, t, real, embedding_stride, gate_stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Embeddings of the rows ``t`` and how far their gates are open, float32 ``[ROWS, BLOCK_D]``."""
    e = load_rows(embedding, t, real, embedding_stride, 0, D, BLOCK_D).to(tl.float32)
    logits = load_rows(gate_logits, t, real, gate_stride, 0, D, BLOCK_D).to(tl.float32)
    return e, sigmoid(logits)


@triton.jit
def _of_head(metric, h, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Head ``h``'s metric vector, float32 ``[1, BLOCK_D]``."""
    column = tl.arange(0, BLOCK_D)
    return tl.load(metric + h * D + column, mask=column < D, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=BATCH_SIZES)
def _forward(
    embedding, gate_logits, metric, features, n_rows, n_heads, embedding_stride, gate_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # A block's heads follow each other, so that its rows are still in the cache.
    block, h = tl.program_id(0) // n_heads, tl.program_id(0) % n_heads
    t = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = t < n_rows
    e, gate = _inputs(embedding, gate_logits, t, real, embedding_stride, gate_stride, D, BLOCK_D)
    store_rows(features, t, real, n_heads * D, h * D, e * gate * _of_head(metric, h, D, BLOCK_D), D, BLOCK_D)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _backward(
    embedding, gate_logits, metric, grad_out, grad_embedding, grad_logits, grad_metric,
    n_rows, n_heads, embedding_stride, gate_stride, out_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of embeddings and logits, and the metric's summed over this block's rows, ``grad_metric[block]``."""
    block = tl.program_id(0).to(tl.int64)
    t = block * ROWS + tl.arange(0, ROWS)
    real = t < n_rows
    column = tl.arange(0, BLOCK_D)
    e, gate = _inputs(embedding, gate_logits, t, real, embedding_stride, gate_stride, D, BLOCK_D)
    gated = e * gate
    of_gated = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for h in range(n_heads):
        g = load_rows(grad_out, t, real, out_stride, h * D, D, BLOCK_D).to(tl.float32)
        of_gated += g * _of_head(metric, h, D, BLOCK_D)
        place = (block * n_heads + h) * D + column
        tl.store(grad_metric + place, tl.sum(g * gated, 0), mask=column < D)
    store_rows(grad_embedding, t, real, D, 0, of_gated * gate, D, BLOCK_D)
    store_rows(grad_logits, t, real, D, 0, of_gated * e * gate * (1.0 - gate), D, BLOCK_D)


class _PreferenceFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embedding, gate_logits, metric):
        embedding, gate_logits, metric = dense_rows(embedding), dense_rows(gate_logits), dense(metric)
        (n_rows, width), n_heads = embedding.shape, len(metric)
        dtype = torch.promote_types(torch.promote_types(embedding.dtype, gate_logits.dtype), metric.dtype)
        features = embedding.new_empty(n_rows, n_heads, width, dtype=dtype)
        block = columns_per_block(width)
        ctx.sizes = {"D": width, "BLOCK_D": block, "ROWS": max(1, ELEMENTS // block)}
        if features.numel():
            _forward[(triton.cdiv(n_rows, ctx.sizes["ROWS"]) * n_heads,)](
                embedding=embedding, gate_logits=gate_logits, metric=metric, features=features, n_rows=n_rows,
                n_heads=n_heads, embedding_stride=embedding.stride(0), gate_stride=gate_logits.stride(0), **ctx.sizes,
            )  # fmt: skip
        ctx.save_for_backward(embedding, gate_logits, metric)
        return features

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        embedding, gate_logits, metric = ctx.saved_tensors
        (n_rows, width), n_heads = embedding.shape, len(metric)
        grad_out = dense_rows(grad_out)
        blocks = triton.cdiv(n_rows, ctx.sizes["ROWS"])
        grad_embedding, grad_logits = (t.new_empty(t.shape) for t in (embedding, gate_logits))
        grad_metric = metric.new_empty(blocks, n_heads, width, dtype=torch.float32)
        if embedding.numel():
            _backward[(blocks,)](
                embedding=embedding, gate_logits=gate_logits, metric=metric, grad_out=grad_out,
                grad_embedding=grad_embedding, grad_logits=grad_logits, grad_metric=grad_metric, n_rows=n_rows,
                n_heads=n_heads, embedding_stride=embedding.stride(0), gate_stride=gate_logits.stride(0),
                out_stride=grad_out.stride(0), **ctx.sizes,
            )  # fmt: skip
        return grad_embedding, grad_logits, grad_metric.sum(0).to(metric.dtype)


def preference_features_triton(embedding: Tensor, gate_logits: Tensor, metric: Tensor) -> Tensor:
    """The vectors of :func:`recbole_ssm.ops.preference_features`: ``[T, H, d]``."""
    with torch.cuda.device_of(embedding):
        return _PreferenceFeatures.apply(embedding, gate_logits, metric)
