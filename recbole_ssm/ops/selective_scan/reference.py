"""Selective scan, step by step in plain torch."""

import torch
from torch import Tensor

from recbole_ssm.ops.packing import sequence_lengths


def selective_scan_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence of :func:`recbole_ssm.ops.selective_scan`, without skip, gate and softplus.

    All sequences advance together, one step of time after another; sorted by length, those still running are always
    the first ones.

    Returns:
        Output ``[T, D]`` and final state ``[S, D, N]``.
    """
    lengths, by_length = sequence_lengths(cu_seqlens).sort(descending=True, stable=True)
    starts = cu_seqlens[:-1].long()[by_length]
    if initial_state is None:
        initial_state = x.new_zeros(len(lengths), *A.shape)
    state = initial_state[by_length]
    outputs, rows_done = [], []
    for t in range(int(lengths[0]) if len(lengths) else 0):
        running = int((lengths > t).sum())
        rows = starts[:running] + t
        decay = torch.exp(dt[rows, :, None] * A)  # [running, D, N]
        update = (dt[rows] * x[rows])[:, :, None] * B[rows, None, :]
        advanced = decay * state[:running] + update  # eq. 2a
        outputs.append((advanced * C[rows, None, :]).sum(-1))  # eq. 2b
        rows_done.append(rows)
        state = torch.cat([advanced, state[running:]])
    y = torch.cat(outputs)[torch.cat(rows_done).argsort()] if outputs else torch.zeros_like(x)
    return y, state[by_length.argsort()]
