"""The batch that models work on."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from recbole_ssm.ops.packing import Borders, borders, cu_seqlens_from_lengths, know, pack, positions

ALIGNMENT = 16  # bytes; Triton compiles faster code for tensors that begin at a multiple of it


def size_class(count: int) -> int:
    """``count`` rounded up to a multiple of an eighth of the power of 2 below it, at least 16: a few sizes for all."""
    step = max(16, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


@dataclass(frozen=True)
class SeenItems:
    """What a batch's windows hold up to each of its target rows, made for some targets at a time.

    Attributes:
        items: item ids of the windows, int64 ``[T]``.
        first: where the window of each target begins, int64 ``[M]``.
        last: the target's own row, int64 ``[M]``.
        longest: a length that no window exceeds.
    """

    items: Tensor
    first: Tensor
    last: Tensor
    longest: int

    def of(self, targets: slice = slice(None)) -> Tensor:
        """Item ids ``[m, longest]``; shorter windows are filled up with their last item."""
        rows = self.first[targets, None] + torch.arange(self.longest, device=self.items.device)
        return self.items[torch.minimum(rows, self.last[targets, None])]


@dataclass(frozen=True)
class SequenceBatch:
    """``N`` windows of users' histories laid end to end, and the targets to predict from some of their positions.

    Attributes:
        items: item ids, int64 ``[T]``; with ``C`` columns of time (:mod:`recbole_ssm.data.context`) ``[T, 1 + C]``.
        cu_seqlens: borders of the windows, int32 ``[N+1]`` (see :mod:`recbole_ssm.ops.packing`).
        target_rows: rows whose next item is a target of this step, int64 ``[M]``; the other rows are context.
        targets: the items to predict there, int64 ``[M]``.
        negatives: sampled items, int64 ``[M, K]``; absent where the loss needs none.
        target_weights: what each target counts in the loss, float32 ``[M]``, summing to 1; all alike where absent.
        weight: see :func:`recbole_ssm.distributed.weight_of`.
        last: whether ``target_rows`` is the last row of every window, one target each.
        buffer: the bytes that all of these tensors, and the tables of their borders, are views of, where they are.
    """

    items: Tensor
    cu_seqlens: Tensor
    target_rows: Tensor
    targets: Tensor
    negatives: Tensor | None = None
    target_weights: Tensor | None = None
    weight: float = 1.0
    last: bool = False
    buffer: Tensor | None = None

    @classmethod
    def of_rows(
        cls, items: Tensor, lengths: Tensor, targets: Tensor, negatives: Tensor | None = None
    ) -> "SequenceBatch":
        """Pack right-padded rows, whose last item is followed by the target.

        Args:
            items: ``[N, L]`` or, with columns of time, ``[N, L, 1 + C]``.
            lengths: integer ``[N]``, each at least 1.
            targets: int64 ``[N]``.
            negatives: int64 ``[N, K]``.
        """
        packed, cu_seqlens = pack(items, lengths)
        return cls(packed, cu_seqlens, cu_seqlens[1:].long() - 1, targets, negatives, last=True)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def seen(self) -> SeenItems:
        """The items that come before each target, as far as its window reaches."""
        items = self.items if self.items.dim() == 1 else self.items[:, 0]
        first = self.target_rows - positions(self.cu_seqlens)[self.target_rows]
        return SeenItems(items, first, self.target_rows, borders(self.cu_seqlens).longest)

    @property
    def shape(self) -> tuple:
        """All that a step by a filled batch depends on but for its numbers: what a CUDA graph is made for."""
        tensors = ((name, tensor.dtype, tensor.shape) for name, tensor in self._tensors().items())
        return self.last, borders(self.cu_seqlens).room, *tensors

    def filled(self, longest: int) -> "SequenceBatch":
        """The same batch in one of a few shapes; what is added counts nothing.

        Rows are filled up by windows of item 0, windows by empty ones, and targets by some of weight 0. (Of a batch of
        ``last`` targets no window is empty, and each has its target.)

        Args:
            longest: most rows that a window may have.
        """
        known, count = borders(self.cu_seqlens), len(self)
        longest = min(longest, size_class(known.longest))
        rows, windows = known.total, len(known.lengths)
        all_rows = size_class(rows)
        inert = -(-(all_rows - rows) // longest)
        all_windows = size_class(windows + inert)
        all_targets = size_class(count)
        if self.last:
            all_windows = size_class(windows + 1)
            while (all_rows := size_class(rows + all_windows - windows)) - rows > (all_windows - windows) * longest:
                all_windows = size_class(all_windows + 1)
            inert, all_targets = all_windows - windows, all_windows
        lengths = torch.zeros(all_windows, dtype=torch.int64)
        lengths[:windows] = known.lengths
        if inert:
            each, rest = divmod(all_rows - rows, inert)
            lengths[windows : windows + inert] = each
            lengths[windows : windows + rest] += 1
        cu_seqlens = cu_seqlens_from_lengths(lengths)
        know(cu_seqlens, Borders(lengths, room=longest))
        weights = torch.zeros(all_targets)
        weights[:count] = 1 / count
        last_row = cu_seqlens[1 + count :].long() - 1 if self.last else torch.full((all_targets - count,), all_rows - 1)
        return replace(
            self,
            items=_longer(self.items, all_rows),
            cu_seqlens=cu_seqlens,
            target_rows=torch.cat([self.target_rows, last_row]),
            targets=_longer(self.targets, all_targets),
            negatives=None if self.negatives is None else _longer(self.negatives, all_targets),
            target_weights=weights,
            buffer=None,
        )

    @torch.inference_mode(False)  # as in :meth:`to`
    def split(self, windows: list[int]) -> list["SequenceBatch"]:
        """Cut a batch of ``last`` targets into batches of so many windows each."""
        if len(windows) == 1:
            return [self]
        parts, lengths = [], borders(self.cu_seqlens).lengths.split(windows)
        stop = row = 0
        for count, of_part in zip(windows, lengths, strict=True):
            begin, stop = stop, stop + count
            cu_seqlens = self.cu_seqlens[begin : stop + 1] - self.cu_seqlens[begin]
            know(cu_seqlens, Borders(of_part, cu_seqlens.device))
            own: dict[str, Any] = {
                name: value[begin:stop]
                for name in ("target_rows", "targets", "negatives", "target_weights")
                if (value := getattr(self, name)) is not None
            }
            own["target_rows"] = own["target_rows"] - row
            items = self.items[row : row + int(of_part.sum())]
            parts.append(replace(self, items=items, cu_seqlens=cu_seqlens, buffer=None, **own))
            row += len(items)
        return parts

    def _tensors(self) -> dict[str, Tensor]:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "buffer"}
        tables = borders(self.cu_seqlens).all_tables()
        return {name: value for name, value in {**own, **tables}.items() if isinstance(value, Tensor)}

    def in_one_buffer(self, pinned: bool) -> "SequenceBatch":
        """The same batch on the host, its tensors and the tables of its borders laid out in one ``buffer``."""
        tensors = self._tensors()
        sizes = [-(-t.numel() * t.element_size() // ALIGNMENT) * ALIGNMENT for t in tensors.values()]
        buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pinned)
        for name, view in self._views(buffer).items():
            view.copy_(tensors[name])
        return self.within(buffer)

    def _views(self, buffer: Tensor) -> dict[str, Tensor]:
        views, begin = {}, 0
        for name, tensor in self._tensors().items():
            size = tensor.numel() * tensor.element_size()
            views[name] = buffer[begin : begin + size].view(tensor.dtype).view(tensor.shape)
            begin += -(-size // ALIGNMENT) * ALIGNMENT
        return views

    def within(self, buffer: Tensor) -> "SequenceBatch":
        """A batch of this one's shape whose tensors are views of ``buffer``, whatever that holds now."""
        views = self._views(buffer)
        own: dict[str, Any] = {f.name: views.pop(f.name) for f in fields(self) if f.name in views}
        batch = replace(self, **own, buffer=buffer)
        known = borders(self.cu_seqlens)
        know(batch.cu_seqlens, Borders(known.lengths, buffer.device, views, known.room))
        return batch

    @torch.inference_mode(False)  # or nothing is kept of the borders, and each op reads them back from the device
    def to(self, device: torch.device | str) -> "SequenceBatch":
        """The same batch on another device, by one copy for which the host does not wait."""
        device, here = torch.device(device), self.items.device
        if device.type == here.type and device.index in (None, here.index):
            return self
        batch = self if self.buffer is not None else self.in_one_buffer(pinned=torch.cuda.is_available())
        return batch.within(batch.bytes.to(device, non_blocking=True))

    @property
    def bytes(self) -> Tensor:
        """The ``buffer`` of a batch that has one."""
        assert self.buffer is not None, "the batch was not laid out by in_one_buffer"
        return self.buffer


def _longer(tensor: Tensor, count: int) -> Tensor:
    """``[n, ...]`` to ``[count, ...]``, filled up with zeros."""
    return torch.cat([tensor, tensor.new_zeros(count - len(tensor), *tensor.shape[1:])])
