"""Preference-aware attention on a CPU: numba kernels, forward and backward, parallel over groups of sequences.

A sequence is copied into scratch of its own, laid out as :mod:`.cpu_tiles` says. No more than :data:`~.cpu_tiles.ROWS`
rows of scores (forward) or a block of them (backward, which computes them anew from each row's log-sum-exp) exist at a
time. The last row alone has kernels of its own, :mod:`.cpu_last`.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_ssm.ops.compiled import compiled, exp, group_borders, helper
from recbole_ssm.ops.preference_attention.cpu_last import backward_last, forward_last
from recbole_ssm.ops.preference_attention.cpu_tiles import (
    HIDDEN,
    LANES,
    ROWS,
    add_transposed_rows,
    inner_products,
    larger,
    multiply,
    multiply_rows,
    padded_rows,
    panels,
    unpad,
    whole,
)

BLOCK = 64  # queries, and keys, of a block of scores in the backward pass: three such blocks fit in a cache


@helper
def _attend(q, v, d, k_panels, d_panels, P, E, weight, threshold, window, out, log_sums):
    """One head of one sequence: padded rows and panels, ``out`` too; ``log_sums [L]`` is not padded."""
    length, padded = len(log_sums), len(q)
    logits, cosines = np.empty((ROWS, padded), np.float32), np.empty((ROWS, padded), np.float32)
    for first in range(0, length, ROWS):
        low, high = max(0, first - window + 1), first + ROWS
        start, stop = low // LANES * LANES, whole(high, LANES)
        for j in range(start, stop, LANES):
            multiply(logits, 0, j, q, first, 0, k_panels, j // LANES * P, 0, P, False)
            multiply(cosines, 0, j, d, first, 0, d_panels, j // LANES * E, 0, E, False)
        for r in range(min(ROWS, length - first)):
            logit, cosine = logits[r, start:stop], cosines[r, start:stop]
            i = first + r - start
            top = HIDDEN
            for j in range(len(logit)):
                similarity = cosine[j] if cosine[j] > threshold else np.float32(0.0)
                visible = i - window < j <= i
                logit[j] = logit[j] + weight * similarity if visible else HIDDEN
                top = larger(top, logit[j])
            total = np.float32(0.0)
            for j in range(len(logit)):
                logit[j] = exp(logit[j] - top)
                total += logit[j]
            for j in range(len(logit)):
                logit[j] /= total
            log_sums[first + r] = top + np.log(total)
        multiply_rows(out, first, logits, 0, low, v, low, high - low, False)


@helper
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
                start, stop = low // LANES * LANES, whole(high, LANES)
                for j in range(start, stop, LANES):
                    y, x, panel = first - top, j - left, j // LANES
                    multiply(scores, y, x, q, first, 0, k_panels, panel * P, 0, P, False)
                    multiply(cosines, y, x, d, first, 0, d_panels, panel * E, 0, E, False)
                    multiply(slopes, y, x, g, first, 0, v_panels, panel * P, 0, P, False)
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
                multiply_rows(into_q, first, slopes, y, x, k, low, count, True)
                multiply_rows(into_d, first, cosines, y, x, d, low, count, True)
            for first in range(left, min(right, bottom), ROWS):
                low, high = max(top, first), min(bottom, first + ROWS - 1 + window)
                y, x, count = low - top, first - left, high - low
                add_transposed_rows(into_k, first, slopes, y, x, q, low, count)
                add_transposed_rows(into_v, first, scores, y, x, g, low, count)
                add_transposed_rows(into_d, first, cosines, y, x, d, low, count)
    return into_weight


@compiled
def _forward(q, k, v, direction, similarity_weight, threshold, cu_seqlens, group_of, window, out, log_sums):
    (_, H, P), (_, M, E) = q.shape, direction.shape
    for group in prange(len(group_of) - 1):
        for s in range(group_of[group], group_of[group + 1]):
            rows = slice(cu_seqlens[s], cu_seqlens[s + 1])
            # Copied for all heads at a time, for a head's rows lie apart in memory.
            q_rows, k_rows, v_rows, d_rows = (
                padded_rows(q[rows]),
                padded_rows(k[rows]),
                padded_rows(v[rows]),
                padded_rows(direction[rows]),
            )
            k_panels, d_panels = panels(k_rows, P), panels(d_rows, E)
            context = np.empty_like(q_rows)
            for h in range(H):
                _attend(
                    q_rows[h], v_rows[h], d_rows[h % M], k_panels[h], d_panels[h % M], P, E,
                    similarity_weight[h], threshold[h], window, context[h], log_sums[h, rows],
                )  # fmt: skip
            unpad(context, out[rows])


@compiled
def _backward(
    q, k, v, direction, similarity_weight, threshold, cu_seqlens, group_of, window, out, log_sums, grad_out,
    grad_q, grad_k, grad_v, grad_direction, grad_weight,
):  # fmt: skip
    (_, H, P), (_, M, E) = q.shape, direction.shape
    for group in prange(len(group_of) - 1):
        for s in range(group_of[group], group_of[group + 1]):
            rows = slice(cu_seqlens[s], cu_seqlens[s + 1])
            q_rows, k_rows, v_rows, d_rows = (
                padded_rows(q[rows]),
                padded_rows(k[rows]),
                padded_rows(v[rows]),
                padded_rows(direction[rows]),
            )
            g_rows = padded_rows(grad_out[rows])
            k_panels, v_panels, d_panels = panels(k_rows, P), panels(v_rows, P), panels(d_rows, E)
            into_q, into_k, into_v = np.zeros_like(q_rows), np.zeros_like(q_rows), np.zeros_like(q_rows)
            into_d = np.zeros_like(d_rows)
            delta = inner_products(out[rows], grad_out[rows])
            for h in range(H):
                m = h % M
                grad_weight[group, h] += _attend_backward(
                    q_rows[h], k_rows[h], d_rows[m], g_rows[h], k_panels[h], v_panels[h], d_panels[m], P, E,
                    similarity_weight[h], threshold[h], window, log_sums[h, rows], delta[h],
                    into_q[h], into_k[h], into_v[h], into_d[m],
                )  # fmt: skip
            unpad(into_q, grad_q[rows])
            unpad(into_k, grad_k[rows])
            unpad(into_v, grad_v[rows])
            unpad(into_d, grad_direction[rows])


def _groups(cu_seqlens: np.ndarray) -> np.ndarray:
    """First sequence of each group, of about equal work, which grows with a sequence's length squared."""
    lengths = np.diff(cu_seqlens).astype(np.int64)
    return group_borders(np.concatenate([[0], np.cumsum(lengths * (lengths + 64))]))


def _arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: t.numpy() for name, t in tensors.items()}


class _PreferenceAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, direction, similarity_weight, threshold, cu_seqlens, window, last_only):
        given = {
            "q": q, "k": k, "v": v, "direction": direction, "similarity_weight": similarity_weight,
            "threshold": threshold, "cu_seqlens": cu_seqlens,
        }  # fmt: skip
        inputs = {name: t.detach().contiguous() for name, t in given.items()}
        settings = {"group_of": _groups(inputs["cu_seqlens"].numpy()), "window": window}
        if last_only:
            kept = {}
            out = torch.zeros(len(cu_seqlens) - 1, *q.shape[1:])
            forward_last(**_arrays(inputs), **settings, out=out.numpy())
        else:
            out = torch.empty_like(inputs["q"])
            kept = {"out": out, "log_sums": torch.empty(q.shape[1], len(q))}
            _forward(**_arrays(inputs | kept), **settings)
        ctx.save_for_backward(*inputs.values(), *kept.values())
        ctx.names, ctx.last_only, ctx.settings = (*inputs, *kept), last_only, settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        saved = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        kernel, new = (backward_last, torch.zeros_like) if ctx.last_only else (_backward, torch.empty_like)
        gradients = {f"grad_{name}": new(saved[name]) for name in ("q", "k", "v", "direction")}
        n_groups = len(ctx.settings["group_of"]) - 1
        grad_weight = torch.zeros(n_groups, len(saved["similarity_weight"]), dtype=torch.float64)
        others = {"grad_out": grad_out.contiguous(), "grad_weight": grad_weight}
        kernel(**_arrays(saved | gradients | others), **ctx.settings)
        return *gradients.values(), grad_weight.sum(0).float(), None, None, None, None


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
