"""Packed sequences: ``S`` sequences laid end to end in ``T`` rows, no padding.

``cu_seqlens`` (int32, ``[S+1]``) holds the borders: sequence ``s`` owns the rows ``cu_seqlens[s]`` to
``cu_seqlens[s+1] - 1``. For lengths 3, 0 and 2, ``cu_seqlens = [0, 3, 3, 5]``.

What else ops need to know of the borders is made of the lengths on the host, as tables (:class:`Borders`). A loader
makes them with the batch (:func:`know`), so that nothing is ever read back from a GPU; of a ``cu_seqlens`` that comes
without, :func:`borders` reads the lengths once.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# Rows of a chunk that kernels work on together: the sizes that a batch's tables are made for.
CHUNK_SIZES = (16, 32)


def cu_seqlens_from_lengths(lengths: Tensor) -> Tensor:
    """Borders (int32 ``[S+1]``) of sequences with the given ``lengths`` (integer ``[S]``)."""
    borders = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, 0, out=borders[1:])
    return borders


def sequence_lengths(cu_seqlens: Tensor) -> Tensor:
    """Length of each sequence, int64 ``[S]``."""
    return cu_seqlens.diff().long()


def sequence_ids(cu_seqlens: Tensor) -> Tensor:
    """The sequence register: which sequence each row belongs to, int32 ``[T]`` (Mamba-2's ``seq_idx``)."""
    return borders(cu_seqlens).table("sequence_ids")


def positions(cu_seqlens: Tensor) -> Tensor:
    """Position of each row within its own sequence, counted from 0, int32 ``[T]``."""
    return borders(cu_seqlens).table("positions")


def last_rows(cu_seqlens: Tensor) -> Tensor:
    """Row of the last position of each sequence, int32 ``[S]``; every sequence must have one."""
    return borders(cu_seqlens).table("last_rows")


def ring_places(cu_seqlens: Tensor, length: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Where the latest rows of each sequence stand in rings of ``length`` places: row ``p`` at ``p`` modulo that.

    Returns:
        Which rows are kept, bool ``[T]``; and their sequence and place, int64 ``[R]`` each.
    """
    position, sequence = positions(cu_seqlens).long(), sequence_ids(cu_seqlens).long()
    kept = position >= sequence_lengths(cu_seqlens)[sequence] - length
    return kept, (sequence[kept], position[kept] % length)


def flip_rows(cu_seqlens: Tensor) -> Tensor:
    """Row order, int32 ``[T]``, that reverses each sequence in its place; it is its own inverse."""
    return borders(cu_seqlens).table("flip_rows")


def select_rows(packed: Tensor, read: Tensor | None) -> Tensor:
    """The rows ``read`` (integer ``[R]``, each at most once) of ``[T, ...]``, all where absent.

    ``packed[read]`` is the same, but its backward pass is made for rows that are read more than once, and slow.
    """
    return packed if read is None else packed.index_select(0, read)


@lru_cache(maxsize=None)  # never let go: a CUDA graph goes on reading what it was captured with
def _numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def single_rows(count: int, device: torch.device) -> Tensor:
    """Borders of ``count`` sequences of one row each, int32 ``[count+1]``; not to be written to."""
    cu_seqlens = _numbers(1 << count.bit_length(), device)[: count + 1]
    know(cu_seqlens, Borders(torch.ones(count, dtype=torch.int64), device))
    return cu_seqlens


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
    """What ops need to know of sequences' borders, made of their lengths on the host.

    With ``room`` all shapes follow from ``T``, ``S`` and it alone, as a CUDA graph wants them: tables of chunks are
    filled up to as many as that many sequences with that many rows could have. A surplus chunk belongs to the last
    sequence, and begins past its end.

    Args:
        lengths: length of each sequence, int64 ``[S]``, on the CPU.
        device: where the tables are wanted.
        tables: those that are there already, as of :meth:`all_tables`.
        room: a length that no sequence exceeds.

    Attributes:
        lengths: as given.
        total: rows of all sequences, ``T``.
        longest: length of the longest sequence, 0 where there is none; ``room`` where that is given.
        room: as given.
    """

    def __init__(
        self,
        lengths: Tensor,
        device: torch.device | str = "cpu",
        tables: dict[str, Tensor] | None = None,
        room: int | None = None,
    ):
        self.lengths, self.room = lengths, room
        self.total = int(lengths.sum())
        self.longest = room or (int(lengths.max()) if len(lengths) else 0)
        self._device, self._tables = device, dict(tables or {})
        self._boundary_counts: dict[int, int] = {}

    @classmethod
    def read(cls, cu_seqlens: Tensor) -> "Borders":
        """Those of a ``cu_seqlens`` of which no more is known; for a GPU's, the host waits.

        Raises:
            ValueError: where the borders are none.
        """
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
            raise ValueError(f"cu_seqlens must be int32 [S+1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
        host = cu_seqlens.cpu()
        lengths = sequence_lengths(host)
        if int(host[0]) != 0 or bool((lengths < 0).any()):
            raise ValueError("cu_seqlens must start at 0 and never decrease")
        return cls(lengths, cu_seqlens.device)

    def all_tables(self) -> dict[str, Tensor]:
        """Every table that an op may ask for, by name."""
        names = ["sequence_ids", "positions", "flip_rows", "last_rows"]
        names += [f"{kind}/{size}" for size in CHUNK_SIZES for kind in ("chunks", "first_chunks", "chunk_boundaries")]
        return {name: self.table(name) for name in names}

    @torch.inference_mode(False)  # what is kept must serve training, too
    def table(self, name: str) -> Tensor:
        """A table by its name, int32: see the functions of this module that are called like it."""
        if name not in self._tables:
            self._tables[name] = self._make(*name.split("/")).to(self._device)
        return self._tables[name]

    def chunks(self, size: int) -> tuple[Tensor, Tensor]:
        """Cut each sequence into chunks of ``size`` rows, its last one shorter.

        Returns:
            The sequence of each chunk, int32 ``[C]``, and the number of each sequence's first chunk, int32 ``[S+1]``.
        """
        return self.table(f"chunks/{size}"), self.table(f"first_chunks/{size}")

    def chunk_boundaries(self, size: int) -> tuple[Tensor, int]:
        """Where state passes from one chunk of ``size`` rows to the next: nowhere in a sequence of one chunk.

        Returns:
            The number of each sequence's first boundary, int32 ``[S+1]``, and how many there are (could be, with
            ``room``).
        """
        if size not in self._boundary_counts:
            self._boundary_counts[size] = self.total // size if self.room else int(self._boundaries_each(size).sum())
        return self.table(f"chunk_boundaries/{size}"), self._boundary_counts[size]

    def _boundaries_each(self, size: int) -> Tensor:
        return (self.lengths - 1).clamp_min(0) // size

    def _make(self, kind: str, size: str = "") -> Tensor:
        lengths = self.lengths
        if kind in ("chunks", "first_chunks"):
            counts = (lengths + int(size) - 1) // int(size)
            if kind == "first_chunks":
                return cu_seqlens_from_lengths(counts)
            sequence = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(counts)
            surplus = self.total // int(size) + len(lengths) - len(sequence) if self.room else 0
            return torch.cat([sequence, sequence.new_full((surplus,), max(0, len(lengths) - 1))])
        if kind == "chunk_boundaries":
            return cu_seqlens_from_lengths(self._boundaries_each(int(size)))
        stops = lengths.cumsum(0)
        if kind == "last_rows":
            return (stops - 1).to(torch.int32)
        if kind == "sequence_ids":
            return torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)
        row = torch.arange(self.total)
        starts = (stops - lengths).repeat_interleave(lengths)
        if kind == "positions":
            return (row - starts).to(torch.int32)
        if kind == "flip_rows":
            return (starts + stops.repeat_interleave(lengths) - 1 - row).to(torch.int32)
        raise KeyError(kind)


_known = WeakTensorKeyDictionary()


def know(cu_seqlens: Tensor, found: Borders) -> None:
    """Keep what is known of ``cu_seqlens``, for as long as the tensor lives unchanged."""
    if not cu_seqlens.is_inference():  # which does not tell whether it has been written to
        _known[cu_seqlens] = (cu_seqlens._version, found)


def known_borders() -> list[Borders]:
    """All that :func:`know` keeps now."""
    return [found for _, found in _known.values()]


def borders(cu_seqlens: Tensor) -> Borders:
    """What is known of ``cu_seqlens``, read from it where nothing is."""
    if cu_seqlens.is_inference():
        return Borders.read(cu_seqlens)
    found = _known.get(cu_seqlens)
    if found is None or found[0] != cu_seqlens._version:
        known = Borders.read(cu_seqlens)
        know(cu_seqlens, known)
        return known
    return found[1]


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
