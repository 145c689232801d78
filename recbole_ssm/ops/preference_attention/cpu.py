"""Preference-aware attention on a CPU: numba kernels, forward and backward, parallel over groups of sequences.

A sequence is copied into scratch of its own: as rows, padded with zeros to whole tiles, and, where keys are the lanes
of a product, as panels of :data:`LANES` keys with the features down each panel. Every matrix product is then made of
tiles of :data:`ROWS` by :data:`LANES` that are summed in registers, :func:`_multiply`. No more than :data:`ROWS` rows
of scores (forward) or a block of them (backward, which computes them anew from each row's log-sum-exp) exist at a time.
The last row alone needs no products of matrices, and its scores are a single row.
"""

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_ssm.ops.compiled import compiled, exp, group_borders, part

ROWS = 8  # of a product in registers: as many sums as it takes to keep two multiply-adds a cycle busy
LANES = 16  # floats in the widest vector register there is; narrower ones are used several at a time
BLOCK = 64  # queries, and keys, of a block of scores in the backward pass: three such blocks fit in a cache

# Stands for minus infinity, which the kernels are compiled to assume never occurs.
HIDDEN = np.float32(-1e30)


def _multiplier(transposed, vectors):
    """A kernel's matrix product; LLVM does not keep its sums in registers when it is written as loops over arrays."""

    @intrinsic
    def multiply(typingctx, out, row, column, a, a_row, a_column, b, b_row, b_column, count, keep):
        signature = types.void(
            out, types.intp, types.intp, a, types.intp, types.intp, b, types.intp, types.intp, types.intp, types.boolean
        )
        vector = ir.VectorType(ir.FloatType(), LANES)
        first = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        undefined = ir.Constant(vector, ir.Undefined)

        def generate(context, builder, signature, arguments):
            out, row, column, a, a_row, a_column, b, b_row, b_column, count, keep = arguments

            def constant(number):
                return context.get_constant(types.intp, number)

            def matrix(position, value):
                array = context.make_array(signature.args[position])(context, builder, value)
                width = cgutils.unpack_tuple(builder, array.shape)[1]
                return lambda i, j: builder.gep(array.data, [builder.add(builder.mul(i, width), j)])

            def lanes(pointer):
                return builder.bitcast(pointer, vector.as_pointer())

            out_at, a_at, b_at = matrix(0, out), matrix(3, a), matrix(6, b)
            columns = [constant(LANES * c) for c in range(vectors)]
            places = [
                [lanes(out_at(builder.add(row, constant(r)), builder.add(column, c))) for c in columns]
                for r in range(ROWS)
            ]
            sums = [[cgutils.alloca_once(builder, vector) for _ in columns] for _ in range(ROWS)]
            pairs = [pair for r in range(ROWS) for pair in zip(places[r], sums[r], strict=True)]
            for place, total in pairs:
                old = builder.load(place, align=4)
                builder.store(builder.select(keep, old, ir.Constant(vector, None)), total)
            with cgutils.for_range(builder, count) as loop:
                k = builder.add(b_row, loop.index)
                rights = [builder.load(lanes(b_at(k, builder.add(b_column, c))), align=4) for c in columns]
                for r in range(ROWS):
                    down, along = (loop.index, constant(r)) if transposed else (constant(r), loop.index)
                    left = builder.load(a_at(builder.add(a_row, down), builder.add(a_column, along)))
                    spread = builder.shuffle_vector(
                        builder.insert_element(undefined, left, ir.Constant(ir.IntType(32), 0)), undefined, first
                    )
                    for right, total in zip(rights, sums[r], strict=True):
                        term = builder.fmul(spread, right, flags=("contract",))
                        builder.store(builder.fadd(builder.load(total), term, flags=("contract",)), total)
            for place, total in pairs:
                builder.store(builder.load(total), place, align=4)
            return context.get_dummy_value()

        return signature, generate

    return multiply


# ``out[row + r, column + l] = sum_k a[a_row + r, a_column + k] b[b_row + k, b_column + l]`` for ROWS r, LANES l and
# ``count`` k, added to what is there where ``keep``; twice as many l; and both with ``a[a_row + k, a_column + r]``.
_multiply, _multiply_double = _multiplier(False, 1), _multiplier(False, 2)
_multiply_transposed, _multiply_transposed_double = _multiplier(True, 1), _multiplier(True, 2)


@part
def _multiply_rows(out, row, a, a_row, a_column, b, b_row, count, keep):
    """:func:`_multiply` for whole rows of ``out`` and ``b``."""
    width = out.shape[1]
    for e in range(0, width - LANES, 2 * LANES):
        _multiply_double(out, row, e, a, a_row, a_column, b, b_row, e, count, keep)
    if width % (2 * LANES):
        _multiply(out, row, width - LANES, a, a_row, a_column, b, b_row, width - LANES, count, keep)


@part
def _add_transposed_rows(out, row, a, a_row, a_column, b, b_row, count):
    """The same with ``a`` transposed, always added."""
    width = out.shape[1]
    for e in range(0, width - LANES, 2 * LANES):
        _multiply_transposed_double(out, row, e, a, a_row, a_column, b, b_row, e, count, True)
    if width % (2 * LANES):
        _multiply_transposed(out, row, width - LANES, a, a_row, a_column, b, b_row, width - LANES, count, True)


@intrinsic
def _larger(typingctx, a, b):
    """The larger of two numbers that are no NaN; a running ``max`` is not vectorised, for it must look out for them."""

    def generate(context, builder, signature, arguments):
        a, b = arguments
        return builder.select(builder.fcmp_ordered(">", a, b, flags=("fast",)), a, b, flags=("fast",))

    return a(a, b), generate


# In the loops below every array is first cut to where the loop begins: an index that might be negative, and count
# from the end, keeps a loop from being vectorised.


@part
def _dot(a, b):
    total = np.float32(0.0)
    for e in range(len(a)):
        total += a[e] * b[e]
    return total


@part
def _add(target, factor, source):
    for e in range(len(target)):
        target[e] += factor * source[e]


@part
def _whole(count, step):
    """The smallest multiple of ``step`` that is not below ``count``."""
    return (count + step - 1) // step * step


@part
def _zeros(length, heads, width):
    """Padded rows, ``[H, L, width]`` with ``L`` and ``width`` up to whole tiles."""
    return np.zeros((heads, _whole(length, LANES), _whole(width, LANES)), np.float32)


@part
def _rows(source):
    """A copy of ``[L, H, width]`` as padded rows."""
    length, heads, width = source.shape
    rows = _zeros(length, heads, width)
    for i in range(length):
        for h in range(heads):
            for e in range(width):
                rows[h, i, e] = source[i, h, e]
    return rows


@part
def _unpad(rows, target):
    """Copy padded rows into ``[L, H, width]``."""
    length, heads, width = target.shape
    for i in range(length):
        for h in range(heads):
            for e in range(width):
                target[i, h, e] = rows[h, i, e]


@part
def _inner_products(a, b):
    """Of the rows of two ``[L, H, width]``, as ``[H, L]``."""
    length, heads, _ = a.shape
    products = np.empty((heads, length), np.float32)
    for i in range(length):
        for h in range(heads):
            products[h, i] = _dot(a[i, h], b[i, h])
    return products


@part
def _panels(rows, width):
    """Padded rows as panels ``[H, L / LANES * width, LANES]``: a row is a lane of one panel."""
    tiles = rows.reshape(-1, LANES, rows.shape[2])
    panels = np.empty((len(tiles), width, LANES), np.float32)
    for panel in range(len(tiles)):
        for e in range(width):
            for lane in range(LANES):
                panels[panel, e, lane] = tiles[panel, lane, e]
    return panels.reshape(len(rows), -1, LANES)


@part
def _attend(q, v, d, k_panels, d_panels, P, E, weight, threshold, window, out, log_sums):
    """One head of one sequence: padded rows and panels, ``out`` too; ``log_sums [L]`` is not padded."""
    length, padded = len(log_sums), len(q)
    logits, cosines = np.empty((ROWS, padded), np.float32), np.empty((ROWS, padded), np.float32)
    for first in range(0, length, ROWS):
        low, high = max(0, first - window + 1), first + ROWS
        start, stop = low // LANES * LANES, _whole(high, LANES)
        for j in range(start, stop, LANES):
            _multiply(logits, 0, j, q, first, 0, k_panels, j // LANES * P, 0, P, False)
            _multiply(cosines, 0, j, d, first, 0, d_panels, j // LANES * E, 0, E, False)
        for r in range(min(ROWS, length - first)):
            logit, cosine = logits[r, start:stop], cosines[r, start:stop]
            i = first + r - start
            top = HIDDEN
            for j in range(len(logit)):
                similarity = cosine[j] if cosine[j] > threshold else np.float32(0.0)
                visible = i - window < j <= i
                logit[j] = logit[j] + weight * similarity if visible else HIDDEN
                top = _larger(top, logit[j])
            total = np.float32(0.0)
            for j in range(len(logit)):
                logit[j] = exp(logit[j] - top)
                total += logit[j]
            for j in range(len(logit)):
                logit[j] /= total
            log_sums[first + r] = top + np.log(total)
        _multiply_rows(out, first, logits, 0, low, v, low, high - low, False)


@part
def _attend_backward(
    q, k, d, g, k_panels, v_panels, d_panels, P, E, weight, threshold, window, log_sums, delta,
    into_q, into_k, into_v, into_d,
):  # fmt: skip
    """As :func:`_attend`, given also the output's gradient ``g`` and its inner products with the output, ``delta [L]``.

    Adds to the gradients ``into_*``, of which the padding is left with anything, and returns that of ``weight``.
    """
    length = len(log_sums)
    scores, slopes = np.empty((BLOCK, BLOCK), np.float32), np.empty((BLOCK, BLOCK), np.float32)
    cosines = np.empty((BLOCK, BLOCK), np.float32)
    into_weight, lane_sums = 0.0, np.zeros(LANES, np.float32)
    for top in range(0, length, BLOCK):
        bottom = min(top + BLOCK, length)
        for left in range(max(0, top - window + 1) // BLOCK * BLOCK, bottom, BLOCK):
            right = left + BLOCK
            for first in range(top, bottom, ROWS):
                low, high = max(left, first - window + 1), min(right, first + ROWS)
                start, stop = low // LANES * LANES, _whole(high, LANES)
                for j in range(start, stop, LANES):
                    y, x, panel = first - top, j - left, j // LANES
                    _multiply(scores, y, x, q, first, 0, k_panels, panel * P, 0, P, False)
                    _multiply(cosines, y, x, d, first, 0, d_panels, panel * E, 0, E, False)
                    _multiply(slopes, y, x, g, first, 0, v_panels, panel * P, 0, P, False)
                    for r in range(min(ROWS, bottom - first)):
                        score, cosine = scores[y + r, x : x + LANES], cosines[y + r, x : x + LANES]
                        slope = slopes[y + r, x : x + LANES]
                        i, shift, mean = first + r - j, log_sums[first + r], delta[first + r]
                        for lane in range(LANES):
                            above = cosine[lane] > threshold
                            similarity = cosine[lane] if above else np.float32(0.0)
                            p = exp(min(score[lane] + weight * similarity - shift, np.float32(0.0)))
                            p = p if i - window < lane <= i else np.float32(0.0)
                            into_logit = p * (slope[lane] - mean)
                            score[lane] = p
                            slope[lane] = into_logit
                            cosine[lane] = weight * into_logit if above else np.float32(0.0)
                            lane_sums[lane] += into_logit * similarity
                into_weight += lane_sums.sum()
                lane_sums[:] = np.float32(0.0)
                y, x, count = first - top, low - left, high - low
                _multiply_rows(into_q, first, slopes, y, x, k, low, count, True)
                _multiply_rows(into_d, first, cosines, y, x, d, low, count, True)
            for first in range(left, min(right, bottom), ROWS):
                low, high = max(top, first), min(bottom, first + ROWS - 1 + window)
                y, x, count = low - top, first - left, high - low
                _add_transposed_rows(into_k, first, slopes, y, x, q, low, count)
                _add_transposed_rows(into_v, first, scores, y, x, g, low, count)
                _add_transposed_rows(into_d, first, cosines, y, x, d, low, count)
    return into_weight


@compiled
def _forward(q, k, v, direction, similarity_weight, threshold, cu_seqlens, group_of, window, out, log_sums):
    (_, H, P), (_, M, E) = q.shape, direction.shape
    for group in prange(len(group_of) - 1):
        for s in range(group_of[group], group_of[group + 1]):
            rows = slice(cu_seqlens[s], cu_seqlens[s + 1])
            # Copied for all heads at a time, for a head's rows lie apart in memory.
            q_rows, k_rows, v_rows, d_rows = _rows(q[rows]), _rows(k[rows]), _rows(v[rows]), _rows(direction[rows])
            k_panels, d_panels = _panels(k_rows, P), _panels(d_rows, E)
            context = np.empty_like(q_rows)
            for h in range(H):
                _attend(
                    q_rows[h], v_rows[h], d_rows[h % M], k_panels[h], d_panels[h % M], P, E,
                    similarity_weight[h], threshold[h], window, context[h], log_sums[h, rows],
                )  # fmt: skip
            _unpad(context, out[rows])


@compiled
def _backward(
    q, k, v, direction, similarity_weight, threshold, cu_seqlens, group_of, window, out, log_sums, grad_out,
    grad_q, grad_k, grad_v, grad_direction, grad_weight,
):  # fmt: skip
    (_, H, P), (_, M, E) = q.shape, direction.shape
    for group in prange(len(group_of) - 1):
        for s in range(group_of[group], group_of[group + 1]):
            rows = slice(cu_seqlens[s], cu_seqlens[s + 1])
            q_rows, k_rows, v_rows, d_rows = _rows(q[rows]), _rows(k[rows]), _rows(v[rows]), _rows(direction[rows])
            g_rows = _rows(grad_out[rows])
            k_panels, v_panels, d_panels = _panels(k_rows, P), _panels(v_rows, P), _panels(d_rows, E)
            into_q, into_k, into_v = np.zeros_like(q_rows), np.zeros_like(q_rows), np.zeros_like(q_rows)
            into_d = np.zeros_like(d_rows)
            delta = _inner_products(out[rows], grad_out[rows])
            for h in range(H):
                m = h % M
                grad_weight[group, h] += _attend_backward(
                    q_rows[h], k_rows[h], d_rows[m], g_rows[h], k_panels[h], v_panels[h], d_panels[m], P, E,
                    similarity_weight[h], threshold[h], window, log_sums[h, rows], delta[h],
                    into_q[h], into_k[h], into_v[h], into_d[m],
                )  # fmt: skip
            _unpad(into_q, grad_q[rows])
            _unpad(into_k, grad_k[rows])
            _unpad(into_v, grad_v[rows])
            _unpad(into_d, grad_direction[rows])


@part
def _last_probabilities(q, k, direction, weight, threshold):
    """Attention of the last row, ``q [P]``, to the keys ``k [n, P]``: probabilities and cosines, ``[n]``."""
    n = len(k)
    probabilities, cosines = np.empty(n, np.float32), np.empty(n, np.float32)
    last = direction[n - 1]
    top = HIDDEN
    for j in range(n):
        cosines[j] = _dot(last, direction[j])
        similarity = cosines[j] if cosines[j] > threshold else np.float32(0.0)
        probabilities[j] = _dot(q, k[j]) + weight * similarity
        top = _larger(top, probabilities[j])
    total = np.float32(0.0)
    for j in range(n):
        probabilities[j] = exp(probabilities[j] - top)
        total += probabilities[j]
    for j in range(n):
        probabilities[j] /= total
    return probabilities, cosines


@part
def _last_backward(q, k, v, direction, weight, threshold, g, grad_q, grad_k, grad_v, grad_direction):
    """Gradients of the last row's output ``[P]``, given its gradient ``g``; adds to all and returns ``weight``'s."""
    probabilities, cosines = _last_probabilities(q, k, direction, weight, threshold)
    n = len(k)
    slopes = np.empty(n, np.float32)
    mean = np.float32(0.0)
    for j in range(n):
        slopes[j] = _dot(g, v[j])
        mean += probabilities[j] * slopes[j]
    last, into_last = direction[n - 1], np.zeros(direction.shape[1], np.float32)
    into_weight = 0.0
    for j in range(n):
        slope = probabilities[j] * (slopes[j] - mean)
        _add(grad_q, slope, k[j])
        _add(grad_k[j], slope, q)
        _add(grad_v[j], probabilities[j], g)
        if cosines[j] > threshold:
            into_weight += slope * cosines[j]
            _add(into_last, weight * slope, direction[j])
            _add(grad_direction[j], weight * slope, last)
    _add(grad_direction[n - 1], np.float32(1.0), into_last)
    return into_weight


@compiled
def _forward_last(q, k, v, direction, similarity_weight, threshold, cu_seqlens, group_of, window, out):
    H, M = q.shape[1], direction.shape[1]
    for group in prange(len(group_of) - 1):
        for s in range(group_of[group], group_of[group + 1]):
            end = cu_seqlens[s + 1]
            rows = slice(max(cu_seqlens[s], end - window), end)
            for h in range(H):
                probabilities, _ = _last_probabilities(
                    q[end - 1, h], k[rows, h], direction[rows, h % M], similarity_weight[h], threshold[h]
                )
                values = v[rows, h]
                for j in range(len(values)):
                    _add(out[s, h], probabilities[j], values[j])


@compiled
def _backward_last(
    q, k, v, direction, similarity_weight, threshold, cu_seqlens, group_of, window, grad_out,
    grad_q, grad_k, grad_v, grad_direction, grad_weight,
):  # fmt: skip
    H, M = q.shape[1], direction.shape[1]
    for group in prange(len(group_of) - 1):
        for s in range(group_of[group], group_of[group + 1]):
            end = cu_seqlens[s + 1]
            rows = slice(max(cu_seqlens[s], end - window), end)
            for h in range(H):
                m = h % M
                grad_weight[group, h] += _last_backward(
                    q[end - 1, h], k[rows, h], v[rows, h], direction[rows, m], similarity_weight[h], threshold[h],
                    grad_out[s, h], grad_q[end - 1, h], grad_k[rows, h], grad_v[rows, h], grad_direction[rows, m],
                )  # fmt: skip


def _groups(cu_seqlens: np.ndarray) -> np.ndarray:
    """First sequence of each group, of about equal work, which grows with a sequence's length squared."""
    lengths = np.diff(cu_seqlens).astype(np.int64)
    return group_borders(np.concatenate([[0], np.cumsum(lengths * (lengths + 64))]))


class _PreferenceAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, direction, similarity_weight, threshold, cu_seqlens, window, last_only):
        inputs = [t.detach().contiguous() for t in (q, k, v, direction, similarity_weight, threshold, cu_seqlens)]
        arrays = [t.numpy() for t in inputs]
        groups = _groups(arrays[-1])
        if last_only:
            saved = []
            out = torch.zeros(len(cu_seqlens) - 1, *q.shape[1:])
            _forward_last(*arrays, groups, window, out.numpy())
        else:
            out, log_sums = torch.empty_like(inputs[0]), torch.empty(q.shape[1], len(q))
            saved = [out, log_sums]
            _forward(*arrays, groups, window, *(t.numpy() for t in saved))
        ctx.save_for_backward(*inputs, *saved)
        ctx.window = window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        everything = ctx.saved_tensors
        inputs, saved = everything[:7], everything[7:]
        arrays = [t.numpy() for t in inputs]
        groups = _groups(arrays[-1])
        kernel, new = (_backward, torch.empty_like) if saved else (_backward_last, torch.zeros_like)
        grads = [new(t) for t in inputs[:4]]
        grad_weight = torch.zeros(len(groups) - 1, len(inputs[4]), dtype=torch.float64)
        others = (*saved, grad_out.contiguous(), *grads, grad_weight)
        kernel(*arrays, groups, ctx.window, *(t.numpy() for t in others))
        return *grads, grad_weight.sum(0).float(), None, None, None, None


def preference_attention_cpu(
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
    """As :func:`.reference.preference_attention_reference`, compiled; float32 on the CPU.

    Takes ``q`` already multiplied by ``score_weight / sqrt(P)``, and ``direction [T, M, E]``, the features at unit
    length.
    """
    if window is None:
        window = max(1, len(q))
    return _PreferenceAttention.apply(q, k, v, direction, similarity_weight, threshold, cu_seqlens, window, last_only)
