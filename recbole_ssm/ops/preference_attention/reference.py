"""Preference-aware attention with its score matrix written out, in plain torch."""

import torch
from torch import Tensor

from recbole_ssm.ops.packing import block_rows, length_blocks, sequence_lengths

# Sequences of similar length are worked on together up to this many entries of their score matrices: 16 MB in float32,
# which an allocator reuses where it would return larger pieces to the system and fetch them anew.
ENTRIES_PER_BLOCK = 1 << 22


def preference_attention_reference(
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
    """The sum of :func:`recbole_ssm.ops.preference_attention`.

    Args:
        q: queries times w1 / sqrt(P), ``[T, H, P]``.
        k: ``[T, H, P]``.
        v: ``[T, H, P]``.
        direction: features of unit length, ``[T, 1 or H, E]``.
        similarity_weight: w2, ``[H]``.
        threshold: ``[H]``.
        cu_seqlens: ``[S+1]``.
        window: rows attended to; all where absent.
        last_only: whether only the last row of each sequence asks.

    Returns:
        ``[T, H, P]``, or ``[S, H, P]`` with ``last_only``.
    """
    heads, width = q.shape[1:]
    lengths = sequence_lengths(cu_seqlens)
    longest = int(lengths.max()) if len(lengths) else 0
    entries_per_row = heads * ((1 if last_only else longest) + direction.shape[2])
    out = q.new_zeros(len(lengths) if last_only else len(q), heads, width)
    for sequences in length_blocks(lengths, max(1, ENTRIES_PER_BLOCK // max(1, entries_per_row))):
        rows, real = block_rows(cu_seqlens, sequences)
        last = lengths[sequences, None] - 1
        i = last if last_only else torch.arange(rows.shape[1], device=q.device)[None]  # query positions [n or 1, Lq]
        query_rows = rows.gather(1, i) if last_only else rows
        j = torch.arange(rows.shape[1], device=q.device)
        # A place past its sequence's end is never seen from within; what it sees itself is dropped below.
        visible = j <= i[..., None]
        if window is not None:
            visible = visible & (i[..., None] - j < window)

        scores = torch.einsum("nihp,njhp->nhij", q[query_rows], k[rows])
        cosine = torch.einsum("nime,njme->nmij", direction[query_rows], direction[rows])
        similarity = torch.where(cosine > threshold[:, None, None], cosine, 0.0)
        logits = torch.addcmul(scores, similarity_weight[:, None, None], similarity)
        attention = logits.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
        context = torch.einsum("nhij,njhp->nihp", attention, v[rows])
        if last_only:
            out = out.index_put((sequences,), context[:, 0])
        else:
            out = out.index_put((rows[real],), context[real])
    return out
