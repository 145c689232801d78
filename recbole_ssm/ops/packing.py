"""Packed sequences: ``S`` sequences laid end to end in ``T`` rows, no padding.

``cu_seqlens`` (int32, ``[S+1]``) holds the borders: sequence ``s`` owns the rows ``cu_seqlens[s]`` to
``cu_seqlens[s+1] - 1``. For lengths 3, 0 and 2, ``cu_seqlens = [0, 3, 3, 5]``.
"""

from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


def cu_seqlens_from_lengths(lengths: Tensor) -> Tensor:
    """Borders (int32 ``[S+1]``) of sequences with the given ``lengths`` (integer ``[S]``)."""
    borders = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, 0, out=borders[1:])
    return borders


def sequence_lengths(cu_seqlens: Tensor) -> Tensor:
    """Length of each sequence, int64 ``[S]``."""
    return cu_seqlens.diff().long()


def sequence_ids(cu_seqlens: Tensor) -> Tensor:
    """The sequence register: which sequence each row belongs to, int64 ``[T]`` (Mamba-2's ``seq_idx``)."""
    lengths = sequence_lengths(cu_seqlens)
    numbers = torch.arange(len(lengths), device=cu_seqlens.device)
    return torch.repeat_interleave(numbers, lengths, output_size=borders(cu_seqlens).total)


def positions(cu_seqlens: Tensor) -> Tensor:
    """Position of each row within its own sequence, counted from 0, int64 ``[T]``."""
    starts = cu_seqlens[:-1].long()[sequence_ids(cu_seqlens)]
    return torch.arange(len(starts), device=cu_seqlens.device) - starts


def last_rows(cu_seqlens: Tensor) -> Tensor:
    """Row of the last position of each sequence, int64 ``[S]``; every sequence must have one."""
    return cu_seqlens[1:].long() - 1


def rows(packed: Tensor, read: Tensor | None) -> Tensor:
    """The rows ``read`` (int64 ``[R]``, each at most once) of ``[T, ...]``, all where absent.

    ``packed[read]`` is the same, but its backward pass is made for rows that are read more than once, and slow.
    """
    return packed if read is None else packed.index_select(0, read)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def single_rows(count: int, device: torch.device) -> Tensor:
    """Borders of ``count`` sequences of one row each, int32 ``[count+1]``; not to be written to."""
    return torch.arange(count + 1, dtype=torch.int32, device=device)


def flip_rows(cu_seqlens: Tensor) -> Tensor:
    """Row order, int64 ``[T]``, that reverses each sequence in its place; it is its own inverse."""
    borders = cu_seqlens.long()
    mirror = (borders[:-1] + borders[1:] - 1)[sequence_ids(cu_seqlens)]
    return mirror - torch.arange(len(mirror), device=cu_seqlens.device)


def pack(padded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the padding of right-padded sequences.

    Args:
        padded: ``[S, L, ...]``, sequence ``s`` in its first ``lengths[s]`` places.
        lengths: integer ``[S]``.

    Returns:
        The rows ``[T, ...]`` and ``cu_seqlens``.
    """
    real = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
    return padded[real], cu_seqlens_from_lengths(lengths)


def pad(packed: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Lay packed rows ``[T, ...]`` out as ``[S, L, ...]``, zeros after each sequence's end."""
    padded = packed.new_zeros((len(cu_seqlens) - 1, borders(cu_seqlens).longest, *packed.shape[1:]))
    return padded.index_put((sequence_ids(cu_seqlens), positions(cu_seqlens)), packed)


class Borders:
    """What ops need to know of a ``cu_seqlens``, read from the device once a batch.

    Attributes:
        lengths: length of each sequence, int64 ``[S]``, on the CPU.
        total: rows of all sequences, ``T``.
        positions: what :func:`row_positions` has found.

    Raises:
        ValueError: where the borders are none.
    """

    def __init__(self, cu_seqlens: Tensor):
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
            raise ValueError(f"cu_seqlens must be int32 [S+1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
        host = cu_seqlens.cpu()
        self.lengths = sequence_lengths(host)
        if int(host[0]) != 0 or bool((self.lengths < 0).any()):
            raise ValueError("cu_seqlens must start at 0 and never decrease")
        self.device = cu_seqlens.device
        self.total = int(host[-1])
        self._chunks: dict[int, tuple[Tensor, Tensor]] = {}
        self._joints: dict[int, tuple[Tensor, int]] = {}
        self.positions: Tensor | None = None

    @cached_property
    def longest(self) -> int:
        """Length of the longest sequence, 0 where there is none."""
        return int(self.lengths.max()) if len(self.lengths) else 0

    @torch.inference_mode(False)
    def chunks(self, size: int) -> tuple[Tensor, Tensor]:
        """Cut each sequence into chunks of ``size`` rows, its last one shorter.

        Returns:
            The sequence of each chunk, int32 ``[C]``, and the number of each sequence's first chunk, int32 ``[S+1]``.
        """
        if size not in self._chunks:
            counts = (self.lengths + size - 1) // size
            sequences = torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32), counts)
            starts = cu_seqlens_from_lengths(counts)
            self._chunks[size] = sequences.to(self.device), starts.to(self.device)
        return self._chunks[size]

    @torch.inference_mode(False)
    def joints(self, size: int) -> tuple[Tensor, int]:
        """Where state passes from one chunk of ``size`` rows to the next: nowhere in a sequence of one chunk.

        Returns:
            The number of each sequence's first joint, int32 ``[S+1]``, and how many there are.
        """
        if size not in self._joints:
            starts = cu_seqlens_from_lengths((self.lengths - 1).clamp_min(0) // size)
            self._joints[size] = starts.to(self.device), int(starts[-1])
        return self._joints[size]


_known = WeakTensorKeyDictionary()


@torch.inference_mode(False)  # what is kept must serve training, too
def borders(cu_seqlens: Tensor) -> Borders:
    """The borders' :class:`Borders`, kept for as long as the tensor lives unchanged: each look at a GPU's waits."""
    if cu_seqlens.is_inference():  # which does not tell whether it has been written to
        return Borders(cu_seqlens)
    found = _known.get(cu_seqlens)
    if found is None or found[0] != cu_seqlens._version:
        found = _known[cu_seqlens] = (cu_seqlens._version, Borders(cu_seqlens))
    return found[1]


@torch.inference_mode(False)
def row_positions(cu_seqlens: Tensor) -> Tensor:
    """As :func:`positions`, int32, and kept like :func:`borders`."""
    known = borders(cu_seqlens)
    if known.positions is None:
        known.positions = positions(cu_seqlens).to(torch.int32)
    return known.positions


def check_packed(cu_seqlens: Tensor, **tensors: Tensor | None) -> None:
    """Raise unless ``cu_seqlens`` is a valid border list and each tensor has as many rows as it says.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    total = borders(cu_seqlens).total
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape[0] != total:
            raise ValueError(f"{name} has {tensor.shape[0]} rows, but cu_seqlens ends at {total}")


def length_blocks(lengths: Tensor, rows_per_block: int) -> list[Tensor]:
    """Group the non-empty sequences by similar length, for work that needs them padded.

    Args:
        lengths: integer ``[S]``.
        rows_per_block: most rows, padding included, that a block of several sequences may have.

    Returns:
        Sequence numbers (int64), one tensor a block, longest sequences first. Within a block the longest sequence is
        at most twice as long as the shortest, so that no more than half of a block is padding.
    """
    by_length = lengths.argsort(descending=True, stable=True)
    sizes = lengths[by_length].tolist()
    blocks, begin = [], 0
    for end in range(1, len(sizes) + 1):
        if sizes[begin] == 0:
            break
        full = end < len(sizes) and (end - begin + 1) * sizes[begin] > rows_per_block
        if end == len(sizes) or full or 2 * sizes[end] < sizes[begin]:
            blocks.append(by_length[begin:end])
            begin = end
    return blocks


def block_rows(cu_seqlens: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a block of sequences laid out as ``[n, L]``, and which of these places are real.

    Places after a sequence's end point at its last row, so that gathering by them stays in bounds.
    """
    starts, stops = cu_seqlens[:-1].long()[sequences], cu_seqlens[1:].long()[sequences]
    longest = int((stops - starts).max())
    rows = starts[:, None] + torch.arange(longest, device=cu_seqlens.device)
    return torch.minimum(rows, stops[:, None] - 1), rows < stops[:, None]
