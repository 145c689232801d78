"""Preference-aware attention of each sequence's last row alone, on a CPU: one row of scores, no matrix products."""

import numpy as np
from numba import prange

from recbole_ssm.ops.compiled import compiled, exp, helper
from recbole_ssm.ops.preference_attention.cpu_tiles import HIDDEN, add_multiple, dot, larger


@helper
def _last_probabilities(q, k, direction, weight, threshold):
    """Attention of the last row, ``q [P]``, to the keys ``k [n, P]``: probabilities and cosines, ``[n]``."""
    n = len(k)
    probabilities, cosines = np.empty(n, np.float32), np.empty(n, np.float32)
    last = direction[n - 1]
    top = HIDDEN
    for j in range(n):
        cosines[j] = dot(last, direction[j])
        similarity = cosines[j] if cosines[j] > threshold else np.float32(0.0)
        probabilities[j] = dot(q, k[j]) + weight * similarity
        top = larger(top, probabilities[j])
    total = np.float32(0.0)
    for j in range(n):
        probabilities[j] = exp(probabilities[j] - top)
        total += probabilities[j]
    for j in range(n):
        probabilities[j] /= total
    return probabilities, cosines


@helper
def _last_backward(q, k, v, direction, weight, threshold, g, grad_q, grad_k, grad_v, grad_direction):
    """Gradients of the last row's output ``[P]``, given its gradient ``g``; adds to all and returns ``weight``'s."""
    probabilities, cosines = _last_probabilities(q, k, direction, weight, threshold)
    n = len(k)
    slopes = np.empty(n, np.float32)
    mean = np.float32(0.0)
    for j in range(n):
        slopes[j] = dot(g, v[j])
        mean += probabilities[j] * slopes[j]
    last, into_last = direction[n - 1], np.zeros(direction.shape[1], np.float32)
    into_weight = 0.0
    for j in range(n):
        slope = probabilities[j] * (slopes[j] - mean)
        add_multiple(grad_q, slope, k[j])
        add_multiple(grad_k[j], slope, q)
        add_multiple(grad_v[j], probabilities[j], g)
        if cosines[j] > threshold:
            into_weight += slope * cosines[j]
            add_multiple(into_last, weight * slope, direction[j])
            add_multiple(grad_direction[j], weight * slope, last)
    add_multiple(grad_direction[n - 1], np.float32(1.0), into_last)
    return into_weight


@compiled
def forward_last(q, k, v, direction, similarity_weight, threshold, cu_seqlens, group_of, window, out):
    """Adds each sequence's output to ``out [S, H, P]``."""
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
                    add_multiple(out[s, h], probabilities[j], values[j])


@compiled
def backward_last(
    q, k, v, direction, similarity_weight, threshold, cu_seqlens, group_of, window, grad_out,
    grad_q, grad_k, grad_v, grad_direction, grad_weight,
):  # fmt: skip
    """Adds to the gradients of all inputs; ``grad_weight`` is ``[groups, H]``."""
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
