"""Preference-aware attention on a GPU: Triton kernels that never write the score matrices out.

The tiled softmax of FlashAttention (arXiv 2205.14135, algorithm 1; its backward pass, algorithm 4), with a second
product of blocks, the cosines, beside that of queries and keys. Queries are the last rows of their sequences: all of
them or only the last, where a block holds the one query of its sequence.

Features may be as wide as the model. They are read :data:`TILE` columns at a time, and where they are wider, a program
of the backward kernels takes the gradient of one tile: the first also those of queries, keys and values. They are made
unit vectors here: with ``d_i`` the direction of feature ``i`` and ``g_ij`` the gradient of the cosine of ``i`` and
``j``, the gradient of feature ``i`` is ``sum_j g_ij (d_j - cos_ij d_i) / |f_i|``, in which no other tile appears.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_ssm.ops.kernels import (
    columns_per_block,
    dense,
    dense_rows,
    dot,
    dot_precision,
    load_rows,
    rows_per_block,
    store_rows,
    tuned,
)  # fmt: skip
from recbole_ssm.ops.packing import borders

TILE = 64
STEP = tl.constexpr(32)  # columns read at a time where features are wider than a tile
ONE_QUERY = 16  # rows of a block that holds one: a product has at least so many

# Finite, so that a row which has seen nothing yet does not subtract infinity from itself.
LOWEST = tl.constexpr(-1e30)
# Below it a norm counts as this, as torch's normalize has it.
SHORTEST = tl.constexpr(1e-12)

# The first needs the least shared memory.
LAUNCHES = ((4, 1), (8, 2))
SHAPE = ["P", "E", "QUERIES", "KEYS", "LAST"]


@triton.jit
def _block(cu_seqlens, sequences, first_chunks, SIZE: tl.constexpr):
    """The program's sequence, where it begins, its length, and the first of the program's rows, counted from there.

    Without tables a program's rows are the last of its sequence.
    """
    block = tl.program_id(0)
    sequence = block.to(tl.int64)
    if sequences is not None:
        sequence = tl.load(sequences + block).to(tl.int64)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    count = (tl.load(cu_seqlens + sequence + 1) - begin).to(tl.int32)
    first = count - 1
    if sequences is not None:
        first = (block - tl.load(first_chunks + sequence)) * SIZE
    return sequence, begin, count, first


# Rows of a block are counted from its first, at which the pointers stand: so their offsets fit 32 bits.


@triton.jit
def _inverse_norms(norms, row, real, n_metrics):
    return 1.0 / tl.maximum(tl.load(norms + row * n_metrics, mask=real, other=1.0), SHORTEST)


@triton.jit
def _products(
    tile_q, tile_k, q_features, k_features, i, j, query_mask, key_mask, stride,
    E: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of queries' and keys' features, ``[queries, keys]``; one tile is all of narrow ones."""
    if E <= TILE:
        return dot(tile_q, tl.trans(tile_k), PRECISION)
    products = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for start in range(0, E, STEP):
        of_q = load_rows(q_features, i, query_mask, stride, 0, E, STEP, start)
        of_k = load_rows(k_features, j, key_mask, stride, 0, E, STEP, start)
        products += dot(of_q, tl.trans(of_k), PRECISION)
    return products


@triton.jit
def _logits(
    q, k, cosine, position, j, real, scale, w2, threshold, WINDOW: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Logits, -inf where a query does not see a key, and where cosines exceed the threshold: ``[queries, keys]``."""
    above = cosine > threshold
    logits = scale * dot(q, tl.trans(k), PRECISION) + tl.where(above, w2 * cosine, 0.0)
    seen = real & (j[None, :] <= position[:, None])
    if WINDOW is not None:
        seen = seen & (position[:, None] - j[None, :] < WINDOW)
    return tl.where(seen, logits, float("-inf")), above


@triton.jit
def _weights(score_weight, similarity_weight, thresholds, h, P: tl.constexpr):
    """The head's ``w1 / sqrt(P)``, ``w2`` and threshold."""
    scale = tl.load(score_weight + h).to(tl.float32) * P**-0.5
    return scale, tl.load(similarity_weight + h).to(tl.float32), tl.load(thresholds + h).to(tl.float32)


@tuned(SHAPE, LAUNCHES, KEYS=32)
@triton.jit
def _forward(
    q, k, v, feature, norms, score_weight, similarity_weight, thresholds, cu_seqlens, sequences, first_chunks, out,
    log_sums,
    n_heads, n_metrics, q_stride, k_stride, v_stride, feature_stride,
    P: tl.constexpr, E: tl.constexpr, BLOCK_P: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    LAST: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    metric = tl.minimum(h, n_metrics - 1)
    feature, norms = feature + metric * E, norms + metric
    sequence, begin, count, first = _block(cu_seqlens, sequences, first_chunks, QUERIES)
    scale, w2, threshold = _weights(score_weight, similarity_weight, thresholds, h, P)
    i, j = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    position = first + i
    query_mask = (position >= 0) & (position < count)
    first_query = begin + first
    queries = load_rows(q + first_query * q_stride, i, query_mask, q_stride, h * P, P, BLOCK_P)
    tile_q = load_rows(feature + first_query * feature_stride, i, query_mask, feature_stride, 0, E, TILE)
    inverse_q = _inverse_norms(norms + first_query * n_metrics, i, query_mask, n_metrics)
    highest = tl.full([QUERIES], LOWEST, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    context = tl.zeros([QUERIES, BLOCK_P], tl.float32)
    earliest = 0 if WINDOW is None else tl.maximum(0, first - WINDOW + 1)
    end = tl.where(first < count, tl.minimum(first + QUERIES, count), 0)
    for start in range(earliest, end, KEYS):
        key_mask = start + j < count
        first_key = begin + start
        keys = load_rows(k + first_key * k_stride, j, key_mask, k_stride, h * P, P, BLOCK_P)
        values = load_rows(v + first_key * v_stride, j, key_mask, v_stride, h * P, P, BLOCK_P)
        tile_k = load_rows(feature + first_key * feature_stride, j, key_mask, feature_stride, 0, E, TILE)
        inverse_k = _inverse_norms(norms + first_key * n_metrics, j, key_mask, n_metrics)
        products = _products(
            tile_q, tile_k, feature + first_query * feature_stride, feature + first_key * feature_stride, i, j,
            query_mask, key_mask, feature_stride, E, TILE, PRECISION,
        )  # fmt: skip
        cosine = products * inverse_q[:, None] * inverse_k[None, :]
        logits, _above = _logits(
            queries, keys, cosine, position, start + j, key_mask[None, :], scale, w2, threshold, WINDOW, PRECISION
        )  # fmt: skip
        now = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp(logits - now[:, None])
        shrink = tl.exp(highest - now)
        total = total * shrink + tl.sum(weights, 1)
        context = context * shrink[:, None] + dot(weights.to(values.dtype), values, PRECISION)
        highest = now
    total = tl.where(query_mask, total, 1.0)
    out_row = first_query
    if LAST:
        # The output of a sequence without rows is 0.
        out_row, query_mask = sequence, i == 0
    store_rows(out + out_row * n_heads * P, i, query_mask, n_heads * P, h * P, context / total[:, None], P, BLOCK_P)
    tl.store(log_sums + (out_row + i) * n_heads + h, highest + tl.log(total), mask=query_mask)


@tuned(SHAPE, LAUNCHES, KEYS=32)
@triton.jit
def _backward_queries(
    q, k, v, feature, norms, score_weight, similarity_weight, thresholds, cu_seqlens, sequences, first_chunks, out,
    log_sums, grad_out, deltas, grad_q, grad_feature, grad_weights,
    n_heads, n_metrics, q_stride, k_stride, v_stride, feature_stride, out_stride,
    P: tl.constexpr, E: tl.constexpr, BLOCK_P: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    LAST: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and of their features, those of the weights summed over this block's rows, and ``deltas``.

    A row's delta is the sum over keys of each weight times its gradient, or the product of output and its gradient.
    """
    h = tl.program_id(1)
    column = tl.program_id(2) * TILE
    metric = tl.minimum(h, n_metrics - 1)
    feature, norms = feature + metric * E, norms + metric
    sequence, begin, count, first = _block(cu_seqlens, sequences, first_chunks, QUERIES)
    scale, w2, threshold = _weights(score_weight, similarity_weight, thresholds, h, P)
    i, j = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    position = first + i
    query_mask = (position >= 0) & (position < count)
    first_query = begin + first
    out_row = sequence if LAST else first_query
    queries = load_rows(q + first_query * q_stride, i, query_mask, q_stride, h * P, P, BLOCK_P)
    tile_q = load_rows(feature + first_query * feature_stride, i, query_mask, feature_stride, 0, E, TILE, column)
    inverse_q = _inverse_norms(norms + first_query * n_metrics, i, query_mask, n_metrics)
    of_out = load_rows(grad_out + out_row * out_stride, i, query_mask, out_stride, h * P, P, BLOCK_P)
    context = load_rows(out + out_row * n_heads * P, i, query_mask, n_heads * P, h * P, P, BLOCK_P)
    # Taken as the products with values are, so that where one key is seen alone their difference is exactly 0.
    delta = tl.sum(tl.where(i[:, None] == i[None, :], dot(of_out, tl.trans(context), PRECISION), 0.0), 1)
    log_sum = tl.load(log_sums + (out_row + i) * n_heads + h, mask=query_mask, other=0.0)
    of_queries = tl.zeros([QUERIES, BLOCK_P], tl.float32)
    of_similarity = tl.zeros([QUERIES], tl.float32)
    of_directions = tl.zeros([QUERIES, TILE], tl.float32)
    earliest = 0 if WINDOW is None else tl.maximum(0, first - WINDOW + 1)
    end = tl.where(first < count, tl.minimum(first + QUERIES, count), 0)
    for start in range(earliest, end, KEYS):
        key_mask = start + j < count
        first_key = begin + start
        keys = load_rows(k + first_key * k_stride, j, key_mask, k_stride, h * P, P, BLOCK_P)
        values = load_rows(v + first_key * v_stride, j, key_mask, v_stride, h * P, P, BLOCK_P)
        tile_k = load_rows(feature + first_key * feature_stride, j, key_mask, feature_stride, 0, E, TILE, column)
        inverse_k = _inverse_norms(norms + first_key * n_metrics, j, key_mask, n_metrics)
        products = _products(
            tile_q, tile_k, feature + first_query * feature_stride, feature + first_key * feature_stride, i, j,
            query_mask, key_mask, feature_stride, E, TILE, PRECISION,
        )  # fmt: skip
        cosine = products * inverse_q[:, None] * inverse_k[None, :]
        logits, above = _logits(
            queries, keys, cosine, position, start + j, key_mask[None, :], scale, w2, threshold, WINDOW, PRECISION
        )  # fmt: skip
        of_weights = dot(of_out, tl.trans(values), PRECISION)
        of_logits = tl.exp(logits - log_sum[:, None]) * (of_weights - delta[:, None])
        of_queries += dot(of_logits.to(keys.dtype), keys, PRECISION)
        of_similarity += tl.sum(tl.where(above, of_logits * cosine, 0.0), 1)
        if grad_feature is not None:
            of_cosine = tl.where(above, of_logits * w2, 0.0) * inverse_k[None, :]
            of_directions += dot(of_cosine.to(tile_k.dtype), tile_k, PRECISION)
    if grad_feature is not None:
        along = w2 * of_similarity * inverse_q
        of_features = (of_directions - along[:, None] * tile_q.to(tl.float32)) * inverse_q[:, None]
        grad_feature += first_query * n_heads * E + h * E
        store_rows(grad_feature, i, query_mask, n_heads * E, 0, of_features, E, TILE, column)
    if column == 0:
        place, row = first_query * n_heads * P, n_heads * P
        store_rows(grad_q + place, i, query_mask, row, h * P, scale * of_queries, P, BLOCK_P)
        tl.store(deltas + (out_row + i) * n_heads + h, delta, mask=query_mask)
        weights_at = grad_weights + tl.program_id(0).to(tl.int64) * n_heads + h
        tl.store(weights_at, tl.sum(of_queries * queries.to(tl.float32)) * P**-0.5)
        tl.store(weights_at + tl.num_programs(0).to(tl.int64) * n_heads, tl.sum(of_similarity, 0))


@tuned(SHAPE, LAUNCHES, QUERIES=32)
@triton.jit
def _backward_keys(
    q, k, v, feature, norms, score_weight, similarity_weight, thresholds, cu_seqlens, sequences, first_chunks, log_sums,
    grad_out, deltas, of_queries, grad_q, grad_k, grad_v, grad_feature,
    n_heads, n_metrics, q_stride, k_stride, v_stride, feature_stride, out_stride,
    P: tl.constexpr, E: tl.constexpr, BLOCK_P: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    LAST: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, and of features, with ``of_queries``, what these gave as features of queries."""
    h = tl.program_id(1)
    column = tl.program_id(2) * TILE
    metric = tl.minimum(h, n_metrics - 1)
    feature, norms = feature + metric * E, norms + metric
    sequence, begin, count, first = _block(cu_seqlens, sequences, first_chunks, KEYS)
    scale, w2, threshold = _weights(score_weight, similarity_weight, thresholds, h, P)
    i, j = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    key_mask = first + j < count
    first_key = begin + first
    keys = load_rows(k + first_key * k_stride, j, key_mask, k_stride, h * P, P, BLOCK_P)
    values = load_rows(v + first_key * v_stride, j, key_mask, v_stride, h * P, P, BLOCK_P)
    tile_k = load_rows(feature + first_key * feature_stride, j, key_mask, feature_stride, 0, E, TILE, column)
    inverse_k = _inverse_norms(norms + first_key * n_metrics, j, key_mask, n_metrics)
    of_keys = tl.zeros([KEYS, BLOCK_P], tl.float32)
    of_values = tl.zeros([KEYS, BLOCK_P], tl.float32)
    of_directions = tl.zeros([KEYS, TILE], tl.float32)
    along = tl.zeros([KEYS], tl.float32)
    earliest = tl.maximum(first, count - 1) if LAST else first
    end = count if WINDOW is None else tl.minimum(count, first + KEYS + WINDOW - 1)
    for start in range(earliest, end, QUERIES):
        position = start + i
        query_mask = position < count
        first_query = begin + start
        out_row = sequence if LAST else first_query
        queries = load_rows(q + first_query * q_stride, i, query_mask, q_stride, h * P, P, BLOCK_P)
        tile_q = load_rows(feature + first_query * feature_stride, i, query_mask, feature_stride, 0, E, TILE, column)
        inverse_q = _inverse_norms(norms + first_query * n_metrics, i, query_mask, n_metrics)
        of_out = load_rows(grad_out + out_row * out_stride, i, query_mask, out_stride, h * P, P, BLOCK_P)
        log_sum = tl.load(log_sums + (out_row + i) * n_heads + h, mask=query_mask, other=0.0)
        delta = tl.load(deltas + (out_row + i) * n_heads + h, mask=query_mask, other=0.0)
        products = _products(
            tile_q, tile_k, feature + first_query * feature_stride, feature + first_key * feature_stride, i, j,
            query_mask, key_mask, feature_stride, E, TILE, PRECISION,
        )  # fmt: skip
        cosine = products * inverse_q[:, None] * inverse_k[None, :]
        real = query_mask[:, None] & key_mask[None, :]
        logits, above = _logits(
            queries, keys, cosine, position, first + j, real, scale, w2, threshold, WINDOW, PRECISION
        )  # fmt: skip
        weights = tl.exp(logits - log_sum[:, None])
        of_values += dot(tl.trans(weights.to(of_out.dtype)), of_out, PRECISION)
        of_logits = weights * (dot(of_out, tl.trans(values), PRECISION) - delta[:, None])
        of_keys += dot(tl.trans(of_logits.to(queries.dtype)), queries, PRECISION)
        if grad_feature is not None:
            of_cosine = tl.where(above, of_logits * w2, 0.0)
            along += tl.sum(of_cosine * cosine, 0)
            of_cosine = tl.trans((of_cosine * inverse_q[:, None]).to(tile_q.dtype))
            of_directions += dot(of_cosine, tile_q, PRECISION)
    if grad_feature is not None:
        of_features = (of_directions - (along * inverse_k)[:, None] * tile_k.to(tl.float32)) * inverse_k[:, None]
        asks = first + j == count - 1 if LAST else key_mask
        place = first_key * n_heads * E + h * E
        of_features += load_rows(of_queries + place, j, asks, n_heads * E, 0, E, TILE, column)
        store_rows(grad_feature + place, j, key_mask, n_heads * E, 0, of_features, E, TILE, column)
    if column == 0:
        place, row = first_key * n_heads * P, n_heads * P
        store_rows(grad_k + place, j, key_mask, row, h * P, scale * of_keys, P, BLOCK_P)
        store_rows(grad_v + place, j, key_mask, row, h * P, of_values, P, BLOCK_P)
        if LAST:
            silent = first + j < count - 1
            store_rows(grad_q + place, j, silent, row, h * P, tl.zeros([KEYS, BLOCK_P], tl.float32), P, BLOCK_P)


class _PreferenceAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, feature, score_weight, similarity_weight, threshold, cu_seqlens, window, last):
        q, k, v, feature = (dense_rows(t) for t in (q, k, v, feature))
        (n_rows, n_heads, width), (n_metrics, size) = q.shape, feature.shape[1:]
        n_sequences = len(cu_seqlens) - 1
        block = rows_per_block(n_rows, n_sequences)
        tables = borders(cu_seqlens).chunks(block)
        out = q.new_empty(n_sequences if last else n_rows, n_heads, width)
        log_sums = q.new_empty(out.shape[:2], dtype=torch.float32)
        inputs = {
            "q": q, "k": k, "v": v, "feature": feature,
            "norms": torch.linalg.vector_norm(feature, dim=-1, dtype=torch.float32),
            "score_weight": score_weight, "similarity_weight": similarity_weight, "thresholds": threshold,
            "cu_seqlens": cu_seqlens,
        }  # fmt: skip
        # The kernels over queries; without tables where there is one query a sequence.
        by_query = {
            "sequences": None if last else tables[0], "first_chunks": None if last else tables[1],
            "QUERIES": ONE_QUERY if last else block,
        }  # fmt: skip
        sizes = {
            "n_heads": n_heads, "n_metrics": n_metrics, "q_stride": q.stride(0), "k_stride": k.stride(0),
            "v_stride": v.stride(0), "feature_stride": feature.stride(0), "P": width, "E": size,
            "BLOCK_P": columns_per_block(width), "TILE": min(TILE, columns_per_block(size)), "WINDOW": window,
            "LAST": last, "PRECISION": dot_precision(),
        }  # fmt: skip
        if len(out):
            grid = (n_sequences if last else len(tables[0]), n_heads)
            _forward[grid](**inputs, **by_query, out=out, log_sums=log_sums, **sizes)
        ctx.save_for_backward(*inputs.values(), *tables, out, log_sums)
        ctx.names, ctx.by_query, ctx.sizes, ctx.block = tuple(inputs), by_query, sizes, block
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        *inputs, sequences, first_chunks, out, log_sums = ctx.saved_tensors
        inputs = dict(zip(ctx.names, inputs, strict=True))
        q, k, v, feature = (inputs[name] for name in ("q", "k", "v", "feature"))
        last, n_heads = ctx.sizes["LAST"], q.shape[1]
        grad_out = dense_rows(grad_out)
        sizes = {**ctx.sizes, "out_stride": grad_out.stride(0)}
        deltas = torch.empty_like(log_sums)
        grad_q, grad_k, grad_v = (t.new_empty(t.shape) for t in (q, k, v))
        of_queries = grad_feature = None
        if ctx.needs_input_grad[3]:
            of_queries = q.new_empty(len(q), n_heads, feature.shape[2], dtype=torch.float32)
            # Of its own: a kernel that is timed runs many times.
            grad_feature = torch.empty_like(of_queries, dtype=feature.dtype if feature.shape[1] == n_heads else None)
        n_tiles = triton.cdiv(feature.shape[2], sizes["TILE"]) if ctx.needs_input_grad[3] else 1
        n_blocks = len(out) if last else len(sequences)
        grad_weights = q.new_empty(2, n_blocks, n_heads, dtype=torch.float32)
        if len(out):
            _backward_queries[n_blocks, n_heads, n_tiles](
                **inputs, **ctx.by_query, out=out, log_sums=log_sums, grad_out=grad_out, deltas=deltas,
                grad_q=grad_q, grad_feature=of_queries, grad_weights=grad_weights, **sizes,
            )  # fmt: skip
        if len(sequences):
            _backward_keys[len(sequences), n_heads, n_tiles](
                **inputs, sequences=sequences, first_chunks=first_chunks, log_sums=log_sums, grad_out=grad_out,
                deltas=deltas, of_queries=of_queries, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v,
                grad_feature=grad_feature, **sizes, KEYS=ctx.block,
            )  # fmt: skip
        if grad_feature is not None and feature.shape[1] < n_heads:
            grad_feature = grad_feature.sum(1, keepdim=True)
        return grad_q, grad_k, grad_v, grad_feature, *grad_weights.sum(1), None, None, None, None


def preference_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature: Tensor,
    score_weight: Tensor,
    similarity_weight: Tensor,
    threshold: Tensor,
    cu_seqlens: Tensor,
    window: int | None,
    last_only: bool,
) -> Tensor:
    """All of :func:`recbole_ssm.ops.preference_attention` in one kernel forward and two backward.

    With ``last_only`` the output of an empty sequence is 0.
    """
    with torch.cuda.device_of(q):
        return _PreferenceAttention.apply(
            q, k.to(q.dtype), v.to(q.dtype), feature, dense(score_weight), dense(similarity_weight), dense(threshold),
            cu_seqlens.contiguous(), window, last_only,
        )  # fmt: skip
