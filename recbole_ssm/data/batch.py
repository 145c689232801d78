"""The batch that models work on."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceBatch:
    """``N`` windows of users' histories laid end to end, and the targets to predict from some of their positions.

    Attributes:
        items: item ids, int64 ``[T]``; with ``use_time_gaps`` their time gaps beside them, ``[T, 2]``.
        cu_seqlens: borders of the windows, int32 ``[N+1]`` (see :mod:`recbole_ssm.ops.packing`).
        target_rows: rows whose next item is a target of this step, int64 ``[M]``; the other rows are context.
        targets: the items to predict there, int64 ``[M]``.
        negatives: sampled items, int64 ``[M, K]``; absent where the loss needs none.
        weight: see :func:`recbole_ssm.distributed.weighted`.
    """

    items: Tensor
    cu_seqlens: Tensor
    target_rows: Tensor
    targets: Tensor
    negatives: Tensor | None = None
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.targets)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "SequenceBatch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        mapped: dict[str, Any] = {k: function(value) for k, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **mapped)

    def to(self, device: torch.device | str) -> "SequenceBatch":
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "SequenceBatch":
        """The same batch in page-locked memory; torch's DataLoader calls this."""
        return self._map(torch.Tensor.pin_memory)
