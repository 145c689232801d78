"""Sequences read in both directions, by one pass over twice as many."""

import torch
from torch import Tensor

from recbole_ssm.ops.packing import Borders, borders, flip_rows, know


def both_ways(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Lay all sequences end to end as they are, and then all of them once more, each from its last row to its first.

    What is known of their borders is made of what is known of ``cu_seqlens``, where that is: nothing is read back.

    Returns:
        Which row each of the ``2 T`` is, int32, and their borders, int32 ``[2 S + 1]``.
    """
    flipped = flip_rows(cu_seqlens)
    as_they_are = torch.arange(len(flipped), dtype=flipped.dtype, device=flipped.device)
    return torch.cat([as_they_are, flipped]), twice(cu_seqlens)


@torch.inference_mode(False)  # what is kept must serve training, too
def twice(cu_seqlens: Tensor) -> Tensor:
    """Borders of all sequences and then the same ones again, int32 ``[2 S + 1]``."""
    known = borders(cu_seqlens)
    doubled = torch.cat([cu_seqlens[:-1], cu_seqlens + known.total])
    know(doubled, _Twice(known, cu_seqlens.device))
    return doubled


class _Twice(Borders):
    """What is known of all sequences and then the same ones again, made on their device of what is known of them."""

    def __init__(self, once: Borders, device: torch.device):
        super().__init__(once.lengths.repeat(2), device, room=once.room)
        self._once = once

    @torch.inference_mode(False)
    def table(self, name: str) -> Tensor:
        """See :meth:`Borders.table`."""
        if name not in self._tables:
            kind, _, size = name.partition("/")
            first = second = self._once.table(name)
            if kind in ("chunks", "sequence_ids"):
                second = second + len(self._once.lengths)
            elif kind in ("flip_rows", "last_rows"):
                second = second + self._once.total
            elif kind == "first_chunks":
                first, second = first[:-1], second + len(self._once.table(f"chunks/{size}"))
            elif kind == "chunk_boundaries":
                first, second = first[:-1], second + self._once.chunk_boundaries(int(size))[1]
            self._tables[name] = torch.cat([first, second])
        return self._tables[name]
