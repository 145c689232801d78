"""The ops' definitions as loops over single rows, one sequence at a time: the truth that every backend is held to."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def sequences(cu_seqlens: Tensor):
    return [(s, begin, end) for s, (begin, end) in enumerate(pairwise(cu_seqlens.tolist()))]


def selective_scan(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, **_):
    dt = F.softplus(dt + dt_bias)
    outputs, states = [], []
    for s, begin, end in sequences(cu_seqlens):
        h = initial_state[s]
        for t in range(begin, end):
            h = torch.exp(dt[t][:, None] * A) * h + (dt[t] * x[t])[:, None] * B[t][None]
            outputs.append((h @ C[t] + D * x[t]) * F.silu(z[t]))
        states.append(h)
    return torch.stack(outputs), torch.stack(states)


def ssd(x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, **_):
    dt = F.softplus(dt + dt_bias)
    per_group = x.shape[1] // B.shape[1]
    outputs, states = [], []
    for s, begin, end in sequences(cu_seqlens):
        h = initial_state[s]
        for t in range(begin, end):
            b, c = B[t].repeat_interleave(per_group, 0), C[t].repeat_interleave(per_group, 0)
            h = torch.exp(dt[t] * A)[:, None, None] * h + (dt[t][:, None] * x[t])[:, :, None] * b[:, None, :]
            outputs.append((h * c[:, None, :]).sum(-1) + D[:, None] * x[t])
        states.append(h)
    return torch.stack(outputs), torch.stack(states)


def causal_conv(x, weight, bias, initial_state, cu_seqlens, **_):
    taps = weight.shape[1]
    outputs, states = [], []
    for s, begin, end in sequences(cu_seqlens):
        rows = [initial_state[s, :, k] for k in range(taps - 1)] + [x[t] for t in range(begin, end)]
        outputs += [F.silu(bias + sum(weight[:, k] * rows[t + k] for k in range(taps))) for t in range(end - begin)]
        states.append(torch.stack(rows[len(rows) - taps + 1 :], -1) if taps > 1 else initial_state[s])
    return torch.stack(outputs), torch.stack(states)


def preference_attention(
    q, k, v, feature, score_weight, similarity_weight, threshold, cu_seqlens, window=None, queries="all"
):
    heads, width = q.shape[1:]
    outputs = []
    for _, begin, end in sequences(cu_seqlens):
        for i in range(end - 1 if queries == "last" else begin, end):
            seen = slice(begin if window is None else max(begin, i - window + 1), i + 1)
            row = []
            for h in range(heads):
                m = min(h, feature.shape[1] - 1)
                cosine = torch.cosine_similarity(feature[i, m], feature[seen, m], dim=-1)
                similarity = torch.where(cosine > threshold[h], cosine, 0.0)
                logits = score_weight[h] * (k[seen, h] @ q[i, h]) / width**0.5 + similarity_weight[h] * similarity
                row.append(logits.softmax(0) @ v[seen, h])
            outputs.append(torch.stack(row))
    return (torch.stack(outputs),)
