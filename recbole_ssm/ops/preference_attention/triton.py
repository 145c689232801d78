"""Preference-aware attention on a GPU: Triton kernels that never write the score matrices out.

The tiled softmax of FlashAttention (arXiv 2205.14135, algorithm 1; its backward pass, algorithm 4), with a second
product of blocks, the cosines, beside that of queries and keys. Queries are the last rows of their sequences, as many
as there are: all of them or only the last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_ssm.ops.kernels import (
    columns_per_block,
    dense,
    dot,
    dot_precision,
    load_rows,
    rows,
    rows_per_block,
    store_rows,
    tuned,
)  # fmt: skip
from recbole_ssm.ops.packing import borders, last_rows, single_rows

# Finite, so that a row which has seen nothing yet does not subtract infinity from itself.
LOWEST = tl.constexpr(-1e30)


def _configs(block: str) -> list[triton.Config]:
    # The first needs the least shared memory.
    sizes = ((32, 4, 1), (64, 8, 2))
    return [triton.Config({block: size}, num_warps=warps, num_stages=stages) for size, warps, stages in sizes]


@triton.jit
def _span(cu_queries, cu_keys, sequences, starts, SIZE: tl.constexpr):
    """The program's block of rows within its sequence, and where the sequence's queries and keys begin and how many."""
    block = tl.program_id(0)
    sequence = tl.load(sequences + block).to(tl.int64)
    q_begin, k_begin = tl.load(cu_queries + sequence).to(tl.int64), tl.load(cu_keys + sequence).to(tl.int64)
    q_count = (tl.load(cu_queries + sequence + 1) - q_begin).to(tl.int32)
    k_count = (tl.load(cu_keys + sequence + 1) - k_begin).to(tl.int32)
    first = (block - tl.load(starts + sequence)) * SIZE
    return q_begin, q_count, k_begin, k_count, first


@triton.jit
def _logits(
    q, k, fq, fk, position, j, real, w2, threshold, WINDOW: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Logits, -inf where a query does not see a key; cosines; where these exceed the threshold: ``[queries, keys]``."""
    cosine = dot(fq, tl.trans(fk), PRECISION)
    above = cosine > threshold
    logits = dot(q, tl.trans(k), PRECISION) + tl.where(above, w2 * cosine, 0.0)
    seen = real & (j[None, :] <= position[:, None])
    if WINDOW is not None:
        seen = seen & (position[:, None] - j[None, :] < WINDOW)
    return tl.where(seen, logits, float("-inf")), cosine, above


@tuned(_configs("KEYS"), ["P", "E", "QUERIES"])
@triton.jit
def _forward(
    q, k, v, fq, fk, similarity_weight, thresholds, cu_queries, cu_keys, sequences, starts, out, log_sums,
    n_heads, n_metrics, q_stride, k_stride, v_stride, fq_stride, fk_stride,
    P: tl.constexpr, E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr, WINDOW: tl.constexpr,
    QUERIES: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    metric = tl.minimum(h, n_metrics - 1)
    q_begin, q_count, k_begin, k_count, first = _span(cu_queries, cu_keys, sequences, starts, QUERIES)
    w2, threshold = tl.load(similarity_weight + h), tl.load(thresholds + h)
    i = first + tl.arange(0, QUERIES)
    asked = i < q_count
    position = k_count - q_count + i
    queries = load_rows(q, q_begin + i, asked, q_stride, h * P, P, BLOCK_P)
    q_features = load_rows(fq, q_begin + i, asked, fq_stride, metric * E, E, BLOCK_E)
    highest = tl.full([QUERIES], LOWEST, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    context = tl.zeros([QUERIES, BLOCK_P], tl.float32)
    begin = 0
    if WINDOW is not None:
        begin = tl.maximum(0, k_count - q_count + first - WINDOW + 1)
    end = k_count - q_count + tl.minimum(first + QUERIES, q_count)
    for start in range(begin, end, KEYS):
        j = start + tl.arange(0, KEYS)
        there = j < k_count
        keys = load_rows(k, k_begin + j, there, k_stride, h * P, P, BLOCK_P)
        k_features = load_rows(fk, k_begin + j, there, fk_stride, metric * E, E, BLOCK_E)
        values = load_rows(v, k_begin + j, there, v_stride, h * P, P, BLOCK_P)
        logits, _cosine, _above = _logits(
            queries, keys, q_features, k_features, position, j, there[None, :], w2, threshold, WINDOW, PRECISION
        )  # fmt: skip
        now = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp(logits - now[:, None])
        shrink = tl.exp(highest - now)
        total = total * shrink + tl.sum(weights, 1)
        context = context * shrink[:, None] + dot(weights.to(values.dtype), values, PRECISION)
        highest = now
    total = tl.where(asked, total, 1.0)
    store_rows(out, q_begin + i, asked, n_heads * P, h * P, context / total[:, None], P, BLOCK_P)
    tl.store(log_sums + (q_begin + i) * n_heads + h, highest + tl.log(total), mask=asked)


@tuned(_configs("KEYS"), ["P", "E", "QUERIES"])
@triton.jit
def _backward_queries(
    q, k, v, fq, fk, similarity_weight, thresholds, cu_queries, cu_keys, sequences, starts,
    log_sums, grad_out, deltas, grad_q, grad_fq, grad_weight,
    n_heads, n_metrics, q_stride, k_stride, v_stride, fq_stride, fk_stride, out_stride,
    P: tl.constexpr, E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr, WINDOW: tl.constexpr,
    QUERIES: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    metric = tl.minimum(h, n_metrics - 1)
    q_begin, q_count, k_begin, k_count, first = _span(cu_queries, cu_keys, sequences, starts, QUERIES)
    w2, threshold = tl.load(similarity_weight + h), tl.load(thresholds + h)
    i = first + tl.arange(0, QUERIES)
    asked = i < q_count
    position = k_count - q_count + i
    queries = load_rows(q, q_begin + i, asked, q_stride, h * P, P, BLOCK_P)
    q_features = load_rows(fq, q_begin + i, asked, fq_stride, metric * E, E, BLOCK_E)
    of_out = load_rows(grad_out, q_begin + i, asked, out_stride, h * P, P, BLOCK_P)
    log_sum = tl.load(log_sums + (q_begin + i) * n_heads + h, mask=asked, other=0.0)
    delta = tl.load(deltas + (q_begin + i) * n_heads + h, mask=asked, other=0.0)
    of_queries = tl.zeros([QUERIES, BLOCK_P], tl.float32)
    of_features = tl.zeros([QUERIES, BLOCK_E], tl.float32)
    of_weight = tl.zeros([QUERIES], tl.float32)
    begin = 0
    if WINDOW is not None:
        begin = tl.maximum(0, k_count - q_count + first - WINDOW + 1)
    end = k_count - q_count + tl.minimum(first + QUERIES, q_count)
    for start in range(begin, end, KEYS):
        j = start + tl.arange(0, KEYS)
        there = j < k_count
        keys = load_rows(k, k_begin + j, there, k_stride, h * P, P, BLOCK_P)
        k_features = load_rows(fk, k_begin + j, there, fk_stride, metric * E, E, BLOCK_E)
        values = load_rows(v, k_begin + j, there, v_stride, h * P, P, BLOCK_P)
        logits, cosine, above = _logits(
            queries, keys, q_features, k_features, position, j, there[None, :], w2, threshold, WINDOW, PRECISION
        )  # fmt: skip
        of_weights = dot(of_out, tl.trans(values), PRECISION)
        of_logits = tl.exp(logits - log_sum[:, None]) * (of_weights - delta[:, None])
        of_queries += dot(of_logits.to(keys.dtype), keys, PRECISION)
        of_weight += tl.sum(tl.where(above, of_logits * cosine, 0.0), 1)
        of_cosine = tl.where(above, of_logits * w2, 0.0)
        of_features += dot(of_cosine, k_features, PRECISION)
    store_rows(grad_q, q_begin + i, asked, n_heads * P, h * P, of_queries, P, BLOCK_P)
    store_rows(grad_fq, q_begin + i, asked, n_heads * E, h * E, of_features, E, BLOCK_E)
    tl.store(grad_weight + (q_begin + i) * n_heads + h, of_weight, mask=asked)


@tuned(_configs("QUERIES"), ["P", "E", "KEYS"])
@triton.jit
def _backward_keys(
    q, k, v, fq, fk, similarity_weight, thresholds, cu_queries, cu_keys, sequences, starts,
    log_sums, grad_out, deltas, grad_k, grad_v, grad_fk,
    n_heads, n_metrics, q_stride, k_stride, v_stride, fq_stride, fk_stride, out_stride,
    P: tl.constexpr, E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr, WINDOW: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    metric = tl.minimum(h, n_metrics - 1)
    q_begin, q_count, k_begin, k_count, first = _span(cu_queries, cu_keys, sequences, starts, KEYS)
    w2, threshold = tl.load(similarity_weight + h), tl.load(thresholds + h)
    j = first + tl.arange(0, KEYS)
    there = j < k_count
    keys = load_rows(k, k_begin + j, there, k_stride, h * P, P, BLOCK_P)
    k_features = load_rows(fk, k_begin + j, there, fk_stride, metric * E, E, BLOCK_E)
    values = load_rows(v, k_begin + j, there, v_stride, h * P, P, BLOCK_P)
    of_keys = tl.zeros([KEYS, BLOCK_P], tl.float32)
    of_values = tl.zeros([KEYS, BLOCK_P], tl.float32)
    of_features = tl.zeros([KEYS, BLOCK_E], tl.float32)
    begin = tl.maximum(0, first - (k_count - q_count))
    end = q_count
    if WINDOW is not None:
        end = tl.minimum(end, first + KEYS + WINDOW - 1 - (k_count - q_count))
    for start in range(begin, end, QUERIES):
        i = start + tl.arange(0, QUERIES)
        asked = i < q_count
        position = k_count - q_count + i
        queries = load_rows(q, q_begin + i, asked, q_stride, h * P, P, BLOCK_P)
        q_features = load_rows(fq, q_begin + i, asked, fq_stride, metric * E, E, BLOCK_E)
        of_out = load_rows(grad_out, q_begin + i, asked, out_stride, h * P, P, BLOCK_P)
        log_sum = tl.load(log_sums + (q_begin + i) * n_heads + h, mask=asked, other=0.0)
        delta = tl.load(deltas + (q_begin + i) * n_heads + h, mask=asked, other=0.0)
        real = asked[:, None] & there[None, :]
        logits, _cosine, above = _logits(
            queries, keys, q_features, k_features, position, j, real, w2, threshold, WINDOW, PRECISION
        )  # fmt: skip
        weights = tl.exp(logits - log_sum[:, None])
        of_values += dot(tl.trans(weights.to(of_out.dtype)), of_out, PRECISION)
        of_logits = weights * (dot(of_out, tl.trans(values), PRECISION) - delta[:, None])
        of_keys += dot(tl.trans(of_logits.to(queries.dtype)), queries, PRECISION)
        of_cosine = tl.where(above, of_logits * w2, 0.0)
        of_features += dot(tl.trans(of_cosine), q_features, PRECISION)
    store_rows(grad_k, k_begin + j, there, n_heads * P, h * P, of_keys, P, BLOCK_P)
    store_rows(grad_v, k_begin + j, there, n_heads * P, h * P, of_values, P, BLOCK_P)
    store_rows(grad_fk, k_begin + j, there, n_heads * E, h * E, of_features, E, BLOCK_E)


class _PreferenceAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, fq, fk, similarity_weight, threshold, cu_queries, cu_keys, window):
        q, k, v, fq, fk = (rows(t) for t in (q, k, v, fq, fk))
        (n_queries, n_heads, width), (n_metrics, size) = q.shape, fq.shape[1:]
        out = q.new_empty(q.shape)
        log_sums = q.new_empty(n_queries, n_heads, dtype=torch.float32)
        sizes = {
            "P": width, "E": size, "BLOCK_P": columns_per_block(width),
            "BLOCK_E": columns_per_block(size), "WINDOW": window, "PRECISION": dot_precision(),
        }  # fmt: skip
        tensors = (q, k, v, fq, fk, similarity_weight, threshold, cu_queries, cu_keys)
        strides = (n_heads, n_metrics, *(t.stride(0) for t in (q, k, v, fq, fk)))
        if n_queries:
            block = rows_per_block(n_queries, len(cu_queries) - 1)
            sequences, starts = borders(cu_queries).chunks(block)
            _forward[len(sequences), n_heads](
                *tensors, sequences, starts, out, log_sums, *strides, **sizes, QUERIES=block
            )  # fmt: skip
        ctx.save_for_backward(*tensors, out, log_sums)
        ctx.sizes, ctx.strides = sizes, strides
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        *tensors, out, log_sums = ctx.saved_tensors
        q, k, v, fq, fk, *_, cu_queries, cu_keys = tensors
        n_heads, n_metrics = ctx.strides[:2]
        grad_out = rows(grad_out)
        deltas = (grad_out.float() * out.float()).sum(-1)
        grad_q, grad_k, grad_v = (t.new_empty(t.shape) for t in (q, k, v))
        grad_fq, grad_fk = (t.new_empty(len(t), n_heads, t.shape[2]) for t in (fq, fk))
        grad_weight = torch.empty_like(log_sums)
        strides = (*ctx.strides, grad_out.stride(0))
        if len(q):
            block = rows_per_block(len(q), len(cu_queries) - 1)
            sequences, starts = borders(cu_queries).chunks(block)
            _backward_queries[len(sequences), n_heads](
                *tensors, sequences, starts, log_sums, grad_out, deltas, grad_q, grad_fq, grad_weight, *strides,
                **ctx.sizes, QUERIES=block,
            )  # fmt: skip
            block = rows_per_block(len(k), len(cu_keys) - 1)
            sequences, starts = borders(cu_keys).chunks(block)
            _backward_keys[len(sequences), n_heads](
                *tensors, sequences, starts, log_sums, grad_out, deltas, grad_k, grad_v, grad_fk, *strides,
                **ctx.sizes, KEYS=block,
            )  # fmt: skip
        if n_metrics == 1:
            grad_fq, grad_fk = grad_fq.sum(1, keepdim=True), grad_fk.sum(1, keepdim=True)
        return grad_q, grad_k, grad_v, grad_fq, grad_fk, grad_weight.sum(0), None, None, None, None


def preference_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    direction: Tensor,
    similarity_weight: Tensor,
    threshold: Tensor,
    cu_seqlens: Tensor,
    window: int | None,
    last_only: bool,
) -> Tensor:
    """As :func:`.reference.preference_attention_reference`; the cosines are taken in float32 whatever ``q``'s dtype."""
    cu_seqlens = cu_seqlens.contiguous()
    queries, asked, cu_queries = q, direction, cu_seqlens
    if last_only:
        read = last_rows(cu_seqlens)
        queries, asked, cu_queries = q[read], direction[read], single_rows(len(read), q.device)
    with torch.cuda.device_of(q):
        return _PreferenceAttention.apply(
            queries, k.to(q.dtype), v.to(q.dtype), asked, direction, dense(similarity_weight), dense(threshold),
            cu_queries, cu_seqlens, window,
        )  # fmt: skip
