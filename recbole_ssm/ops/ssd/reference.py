"""State-space duality: the chunked algorithm of arXiv 2405.21060, section 6, in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.packing import block_rows, length_blocks, sequence_lengths

# Entries of the decay matrices ([chunk, chunk] a head) worked on together: 16 MB in float32, which an allocator reuses
# where it would return larger pieces to the system and fetch them anew.
ENTRIES_PER_BLOCK = 1 << 22


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The recurrence of :func:`recbole_ssm.ops.ssd`, without skip and softplus.

    Returns:
        Output ``[T, H, P]`` and final state ``[S, H, P, N]``.
    """
    y, final_state = torch.zeros_like(x), initial_state
    rows_per_block = ENTRIES_PER_BLOCK // (chunk_size * x.shape[1])
    for sequences in length_blocks(sequence_lengths(cu_seqlens), rows_per_block):
        rows, real = block_rows(cu_seqlens, sequences)
        # A padded place with dt = 0 neither decays the state nor adds to it.
        block_dt = dt[rows] * real[..., None]
        block_y, block_state = _ssd_padded(
            x[rows], block_dt, A, B[rows], C[rows], initial_state[sequences], chunk_size
        )
        y = y.index_put((rows[real],), block_y[real])
        final_state = final_state.index_put((sequences,), block_state)
    return y, final_state


def _ssd_padded(x, dt, A, B, C, state, chunk_size):
    """Sequences of one length: ``x [n, L, H, P]``, ``dt [n, L, H]``, ``B, C [n, L, G, N]``, ``state [n, H, P, N]``."""
    n, length, heads, _ = x.shape
    chunk = min(chunk_size, length)
    pad = -length % chunk

    def split(tensor):  # [n, L, ...] -> [n, chunks, chunk, ...]
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, pad))
        return tensor.unflatten(1, (-1, chunk))

    groups = B.shape[2]
    drive = split((x * dt[..., None]).unflatten(2, (groups, heads // groups)))  # n c l g r p
    B, C = split(B), split(C)  # n c l g m
    log_decay = split((dt * A).unflatten(2, (groups, heads // groups))).cumsum(2)  # n c l g r

    # 1. Within each chunk: the quadratic, attention-like form.
    since = log_decay[:, :, :, None] - log_decay[:, :, None]  # n c l s g r: decay from row s to row l
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    decay = torch.where(causal[:, :, None, None], since, -torch.inf).exp()
    scores = torch.einsum("nclgm,ncsgm->nclsg", C, B)
    y = torch.einsum("nclsgr,ncsgrp->nclgrp", scores[..., None] * decay, drive)

    # 2. The state that each chunk adds by its end.
    to_end = (log_decay[:, :, -1:] - log_decay).exp()
    added = torch.einsum("ncsgm,ncsgr,ncsgrp->ncgrpm", B, to_end, drive)

    # 3. The recurrence from chunk to chunk.
    state = state.unflatten(1, (groups, heads // groups))
    entering = []
    for c in range(added.shape[1]):
        entering.append(state)
        state = log_decay[:, c, -1, :, :, None, None].exp() * state + added[:, c]

    # 4. What the state at a chunk's entry contributes to its outputs.
    y = y + torch.einsum("nclgm,ncgrpm,nclgr->nclgrp", C, torch.stack(entering, 1), log_decay.exp())
    return y.flatten(1, 2)[:, :length].flatten(2, 3), state.flatten(1, 2)
