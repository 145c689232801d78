"""State-space duality: the chunked algorithm of arXiv 2405.21060, section 6, in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.packing import block_rows, last_rows, length_blocks, sequence_ids, sequence_lengths

# Entries of the decay matrices ([chunk, chunk] a head) worked on together: 16 MB in float32, which an allocator reuses
# where it would return larger pieces to the system and fetch them anew.
ENTRIES_PER_BLOCK = 1 << 22


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    chunk_size: int,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence of :func:`recbole_ssm.ops.ssd`, without skip and softplus.

    Returns:
        Output ``[T, H, P]`` and, where asked for, the final state ``[S, H, P, N]``.
    """
    all_rows, outputs, all_sequences, states = [], [], [], []
    rows_per_block = max(1, ENTRIES_PER_BLOCK // (chunk_size * x.shape[1]))
    for sequences in length_blocks(sequence_lengths(cu_seqlens), rows_per_block):
        rows, real = block_rows(cu_seqlens, sequences)
        # A padded place with dt = 0 neither decays the state nor adds to it.
        block_dt = dt[rows] * real[..., None]
        state = None if initial_state is None else initial_state[sequences]
        y, state = _ssd_padded(x[rows], block_dt, A, B[rows], C[rows], state, chunk_size, return_final_state)
        all_rows.append(rows[real])
        outputs.append(y[real])
        all_sequences.append(sequences)
        states.append(state)
    y = torch.zeros_like(x)
    if outputs:
        y = torch.cat(outputs)[torch.cat(all_rows).argsort()]
    if not return_final_state:
        return y, None
    if initial_state is None:
        initial_state = x.new_zeros(len(cu_seqlens) - 1, *x.shape[1:], B.shape[2])
    if states:
        return y, initial_state.index_put((torch.cat(all_sequences),), torch.cat(states))
    return y, initial_state


def _ssd_padded(x, dt, A, B, C, state, chunk_size, return_final_state):
    """Sequences of one length: ``x [n, L, H, P]``, ``dt [n, L, H]``, ``B, C [n, L, G, N]``, ``state [n, H, P, N]``.

    Inside, heads are split into ``G`` groups of ``R`` and rows into ``c`` chunks of ``Q``.
    """
    length, groups = x.shape[1], B.shape[2]
    chunk = min(chunk_size, length)
    pad = -length % chunk

    def split(tensor):  # [n, L, H or G, ...] -> [n, c, G, R or 1, Q, ...]
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, pad))
        return tensor.unflatten(2, (groups, -1)).unflatten(1, (-1, chunk)).movedim(2, 4)

    drive = split(x * dt[..., None])  # [n, c, G, R, Q, P]
    log_decay = split(dt * A).cumsum(-1)  # [n, c, G, R, Q]: of all rows of the chunk up to each
    B, C = split(B), split(C)  # [n, c, G, 1, Q, N]

    # 1. Within each chunk: the quadratic, attention-like form.
    since = log_decay[..., :, None] - log_decay[..., None, :]  # [n, c, G, R, Q, Q]: from a row (last) to a later one
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    y = (C @ B.mT * since.masked_fill(~causal, -torch.inf).exp()) @ drive

    def joined(tensor):  # [n, c, G, R, Q, P] -> [n, L, H, P]
        return tensor.movedim(4, 2).flatten(1, 2)[:, :length].flatten(2, 3)

    if state is None and y.shape[1] == 1 and not return_final_state:
        return joined(y), None

    # 2. The state that each chunk adds by its end.
    to_end = (log_decay[..., -1:] - log_decay).exp()
    added = (drive * to_end[..., None]).mT @ B  # [n, c, G, R, P, N]

    # 3. The recurrence from chunk to chunk.
    state = torch.zeros_like(added[:, 0]) if state is None else state.unflatten(1, (groups, -1))
    entering = []
    for c in range(added.shape[1]):
        entering.append(state)
        state = log_decay[:, c, :, :, -1, None, None].exp() * state + added[:, c]

    # 4. What the state at a chunk's entry contributes to its outputs.
    y = y + (C @ torch.stack(entering, 1).mT) * log_decay.exp()[..., None]
    return joined(y), state.flatten(1, 2)


def ssd_last_reference(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sum of :func:`recbole_ssm.ops.ssd_last`, without skip and softplus: ``[S, H, P]``."""
    # One running sum over all sequences, in float64: differences within a sequence lose nothing to those before.
    log_decay = (dt.double() * A.double()).cumsum(0)
    sequence = sequence_ids(cu_seqlens)
    left = (log_decay.index_select(0, last_rows(cu_seqlens).index_select(0, sequence)) - log_decay).exp().to(x.dtype)
    affinity = (B * C.index_select(0, sequence)).sum(-1)  # [T, G]
    weight = dt * left * affinity.repeat_interleave(x.shape[1] // B.shape[1], 1)
    return x.new_zeros(len(C), *x.shape[1:]).index_add(0, sequence, weight[..., None] * x)
