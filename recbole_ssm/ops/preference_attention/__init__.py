"""Preference-aware attention of STAR-Rec (arXiv 2505.03484, section 3.1.2) over packed sequences."""

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.backend import choose
from recbole_ssm.ops.packing import borders, check_packed
from recbole_ssm.ops.preference_attention.reference import preference_attention_reference


def preference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature: Tensor,
    score_weight: Tensor,
    similarity_weight: Tensor,
    threshold: Tensor,
    *,
    cu_seqlens: Tensor,
    window: int | None = None,
    queries: str = "all",
    backend: str = "auto",
) -> Tensor:
    """Attend causally, with scores that add a thresholded cosine similarity of the items.

    ::

        S_h[i, j] = cos(feature_i, feature_j)  where that exceeds threshold_h, else 0
        out_h[i]  = sum_j softmax_j(w1_h q_i k_j^T / sqrt(P) + w2_h S_h[i, j]) v_j,   j <= i in the same sequence

    The similarity's step at the threshold has no useful gradient: within the pass it is a constant 0/1 mask, so
    ``threshold`` itself receives none.

    Args:
        q: queries, ``[T, H, P]``.
        k: keys, ``[T, H, P]``.
        v: values, ``[T, H, P]``.
        feature: vectors to compare, ``[T, M, E]``; one metric space for all heads (``M = 1``) or one a head.
        score_weight: w1, ``[H]``.
        similarity_weight: w2, ``[H]``.
        threshold: ``[H]``.
        cu_seqlens: borders of the sequences, int32 ``[S+1]``.
        window: attend to at most this many rows, the query's own included; all where absent.
        queries: ``all``, or ``last`` for the last row of each sequence only (every sequence must have one).
        backend: see :mod:`recbole_ssm.ops.backend`; ``mamba_ssm`` has no such kernel.

    Returns:
        ``[T, H, P]``, or ``[S, H, P]`` for ``last``.

    Raises:
        ValueError: shapes that do not fit, an unknown ``queries`` or backend, a window below 1, ``last`` with an
            empty sequence.
        BackendUnavailable: a backend that cannot run here.
    """
    check_packed(cu_seqlens, q=q, k=k, v=v, feature=feature)
    heads = q.shape[1]
    if q.shape != k.shape or q.shape != v.shape or feature.shape[1] not in (1, heads):
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} and feature {list(feature.shape)} do not fit "
            "[T, H, P], [T, H, P], [T, H, P] and [T, 1 or H, E]"
        )
    if queries not in ("all", "last"):
        raise ValueError(f"unknown queries {queries!r}: all or last")
    if queries == "last" and bool((borders(cu_seqlens).lengths == 0).any()):
        raise ValueError("queries='last' needs at least one row in every sequence")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, but at least the query's own row must be seen")
    last_only = queries == "last"
    sizes = {"H": heads, "P": q.shape[2], "M": feature.shape[1], "E": feature.shape[2]}
    chosen = choose("preference_attention", backend, q, sizes if window is None else {**sizes, "window": window})
    # Scores, cosines and softmax are taken in float32 whatever the dtype of the activations.
    compute = torch.promote_types(q.dtype, torch.float32)
    scaled_q = q.to(compute) * (score_weight.to(compute)[:, None] / q.shape[2] ** 0.5)
    direction = F.normalize(feature.to(compute), dim=-1)
    w2, tau = similarity_weight.to(compute), threshold.to(compute)
    if chosen == "triton":
        from recbole_ssm.ops.preference_attention.triton import preference_attention_triton

        return preference_attention_triton(
            scaled_q.to(q.dtype), k, v, direction, w2, tau, cu_seqlens, window, last_only
        )
    k, v = k.to(compute), v.to(compute)
    with torch.autocast(q.device.type, enabled=False):
        if chosen == "cpu":
            from recbole_ssm.ops.preference_attention.cpu import preference_attention_cpu

            out = preference_attention_cpu(scaled_q, k, v, direction, w2, tau, cu_seqlens, window, last_only)
        else:
            out = preference_attention_reference(scaled_q, k, v, direction, w2, tau, cu_seqlens, window, last_only)
    return out.to(q.dtype)
