"""The ops' definitions as loops over single rows, one sequence at a time: the truth that every backend is held to."""

from itertools import pairwise

import torch
from torch import Tensor


def sequences(cu_seqlens: Tensor):
    return [(s, begin, end) for s, (begin, end) in enumerate(pairwise(cu_seqlens.tolist()))]


def selective_scan_loop(x, dt, A, B, C, initial_state, cu_seqlens):
    outputs, states = [], []
    for s, begin, end in sequences(cu_seqlens):
        h = initial_state[s]
        for t in range(begin, end):
            h = torch.exp(dt[t][:, None] * A) * h + (dt[t] * x[t])[:, None] * B[t][None]
            outputs.append(h @ C[t])
        states.append(h)
    return torch.stack(outputs), torch.stack(states)


def ssd_loop(x, dt, A, B, C, initial_state, cu_seqlens):
    per_group = x.shape[1] // B.shape[1]
    outputs, states = [], []
    for s, begin, end in sequences(cu_seqlens):
        h = initial_state[s]
        for t in range(begin, end):
            b, c = B[t].repeat_interleave(per_group, 0), C[t].repeat_interleave(per_group, 0)
            h = torch.exp(dt[t] * A)[:, None, None] * h + (dt[t][:, None] * x[t])[:, :, None] * b[:, None, :]
            outputs.append((h * c[:, None, :]).sum(-1))
        states.append(h)
    return torch.stack(outputs), torch.stack(states)


def causal_conv_loop(x, weight, initial_state, cu_seqlens):
    taps = weight.shape[1]
    outputs, states = [], []
    for s, begin, end in sequences(cu_seqlens):
        rows = [initial_state[s, :, k] for k in range(taps - 1)] + [x[t] for t in range(begin, end)]
        outputs += [sum(weight[:, k] * rows[t + k] for k in range(taps)) for t in range(end - begin)]
        states.append(torch.stack(rows[len(rows) - taps + 1 :], -1) if taps > 1 else initial_state[s])
    return torch.stack(outputs), torch.stack(states)


def preference_attention_loop(q, k, v, feature, w1, w2, threshold, cu_seqlens, window=None, last_only=False):
    heads, width = q.shape[1:]
    outputs = []
    for _, begin, end in sequences(cu_seqlens):
        for i in range(end - 1 if last_only else begin, end):
            first = begin if window is None else max(begin, i - window + 1)
            row = []
            for h in range(heads):
                m = min(h, feature.shape[1] - 1)
                logits = []
                for j in range(first, i + 1):
                    cosine = torch.cosine_similarity(feature[i, m], feature[j, m], dim=0)
                    similarity = cosine if cosine > threshold[h] else torch.zeros_like(cosine)
                    logits.append(w1[h] * (q[i, h] @ k[j, h]) / width**0.5 + w2[h] * similarity)
                row.append(torch.stack(logits).softmax(0) @ v[first : i + 1, h])
            outputs.append(torch.stack(row))
    return torch.stack(outputs)
