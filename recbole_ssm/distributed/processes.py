"""Several processes train one model together: shards of a batch, and what all must agree on.

Every process goes through the same batches as one process alone would, and takes every so-many-th row of each. Losses
are means over rows, so a process's counts by its shard's part of them (:func:`weight_of`); gradients are averaged by
torch's DistributedDataParallel. RecBole's own ways for several processes, which double rows and average metrics, stay
off: to RecBole each process is one alone (``single_spec``).
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
import torch
import torch.distributed as dist
from recbole.evaluator.collector import DataStruct
from torch import Tensor, nn

from recbole_ssm.errors import UserError

LOOPBACK = ("127.0.0.1", "::1")


def meet_on_this_machine(backend: str, file: str, rank: int, world_size: int) -> None:
    """Join the other processes, all on this machine, without a port that another machine could reach.

    torch's own meeting point listens on all interfaces, and so may its backends.

    Args:
        backend: ``gloo`` or ``nccl``.
        file: where they meet: a new one, in a folder that nobody else can write to, which lasts as long as they do.
        rank: number of this process, from 0.
        world_size: number of processes.

    Raises:
        UserError: where this machine has no loopback interface.
    """
    names = [name for name, found in psutil.net_if_addrs().items() if any(a.address in LOOPBACK for a in found)]
    if not names:
        raise UserError(f"several processes need the loopback interface ({LOOPBACK[0]}), which is off: switch it on.")
    os.environ["GLOO_SOCKET_IFNAME"] = names[0]
    os.environ["NCCL_SOCKET_IFNAME"] = f"={names[0]}"  # that very one, not all whose names begin so
    dist.init_process_group(backend, store=dist.FileStore(file, world_size), rank=rank, world_size=world_size)


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def same_weights(model: nn.Module) -> None:
    """Give all processes the first one's weights."""
    if world_size() > 1:
        for weight in model.state_dict().values():
            dist.broadcast(weight, 0)


def from_all(value: Any) -> list[Any]:
    """What each process has for ``value``, in the order of their ranks."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def shard(rows: Any) -> Any:
    """This process's rows of a batch that all processes see; the first row where there are fewer than processes.

    A row that is taken for want of an own one must not count: see :func:`own_rows`.
    """
    own = rows[rank() :: world_size()]
    return own if len(own) else rows[:1]


def own_rows(count: int) -> int:
    """How many rows of a batch of ``count`` are this process's."""
    return len(range(rank(), count, world_size()))


def shard_batches(loader: Any) -> Any:
    """Let a loader of RecBole's gather this process's shard of each batch alone; returns it."""
    if world_size() > 1:
        loader.collate_fn = partial(_collate_shard, loader.collate_fn)
    return loader


def _collate_shard(collate: Callable[[Any], Any], index: list[int]) -> Any:
    batch = collate(shard(index))
    weight = own_rows(len(index)) * world_size() / len(index)
    if not isinstance(batch, tuple):
        batch.weight = weight
    return batch


def weight_of(batch: Any) -> float:
    """How much this process's shard of a batch weighs: its part of the batch's rows times the number of processes.

    Looked up among what a batch was given itself: an Interaction of RecBole's answers for a missing attribute with the
    column of that name.
    """
    return getattr(batch, "__dict__", {}).get("weight", 1.0)


def mean_over_processes(mean: Tensor, weight: float) -> Tensor:
    """A mean over this process's rows as that over all processes' rows.

    For losses that are no means over rows themselves but functions of one. The gradient stays that of this process's
    rows, which the gradients' own mean over processes completes.

    Args:
        mean: any shape.
        weight: see :func:`weight_of`.
    """
    if world_size() == 1:
        return mean
    whole = mean.detach() * (weight / world_size())
    dist.all_reduce(whole)
    return mean + (whole - mean.detach())


class MergedEvaluator:
    """An evaluator of RecBole's over the rows of all processes.

    Args:
        evaluator: what it stands in front of.
    """

    def __init__(self, evaluator: Any):
        self._evaluator = evaluator
        self.surplus = 0  # last rows of this process that must not count

    def evaluate(self, struct: DataStruct) -> Any:
        """Metrics over the rows of all processes, the same on each."""
        rows = {key: value for key, value in struct._data_dict.items() if key.startswith("rec.") or key == "data.label"}
        own = {key: value[: len(value) - self.surplus].cpu() for key, value in rows.items()}
        of_all = from_all(own)
        for key in rows:
            struct.set(key, torch.cat([part[key] for part in of_all]))
        return self._evaluator.evaluate(struct)


def surplus_rows(loader: Any) -> int:
    """How many of the last rows that this process gathers from a loader are not its own (see :func:`shard`)."""
    last_batch = loader.sample_size % loader.step or loader.step
    return 0 if own_rows(last_batch) else 1
