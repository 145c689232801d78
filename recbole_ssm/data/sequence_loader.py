"""Training batches of whole histories: the loss at every position, each target once an epoch."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recbole_ssm.data.batch import SequenceBatch
from recbole_ssm.data.context import beside
from recbole_ssm.data.negatives import check_shares
from recbole_ssm.data.sequence_dataset import SequenceDataset
from recbole_ssm.distributed import own_rows, shard, world_size
from recbole_ssm.ops.packing import cu_seqlens_from_lengths


def cut_windows(
    start: np.ndarray, stop: np.ndarray, max_length: int, generator: np.random.Generator | None
) -> np.ndarray:
    """Cut histories into windows whose positions are all predicted from enough context.

    A history no longer than ``max_length`` is one window. A longer one is cut at borders a little over half that
    length apart. A window between two borders owns the targets there, and reaches back before its first border for
    context, so that no target has less than half of ``max_length`` behind it where the history has that much.

    Args:
        start: first position of each history, ``[U]``.
        stop: position after its last, ``[U]``.
        max_length: most positions a window.
        generator: draws the first border of each long history anew; without one it lies at ``max_length``.

    Returns:
        int64 ``[W, 3]``: a window's first position, the first whose target is its own, and the one after its last.
    """
    half = -(-max_length // 2)
    stride = max_length - half + 1
    first_border = np.full(len(start), max_length)
    if generator is not None:
        first_border = generator.integers(half, max_length, size=len(start), endpoint=True)
    length = stop - start
    first_border = np.where(length <= max_length, length, first_border)
    count = 1 - (first_border - length) // stride  # windows a history
    history = np.repeat(np.arange(len(start)), count)
    nth = np.arange(len(history)) - np.repeat(np.cumsum(count) - count, count)
    end = np.minimum(start[history] + first_border[history] + nth * stride, stop[history])
    owned = np.where(nth == 0, start[history], start[history] + first_border[history] + (nth - 1) * stride)
    begin = np.where(nth == 0, start[history], owned - (half - 1))
    return np.stack([begin, owned, end], 1)


class SequenceDataLoader(DataLoader):
    """Batches of windows of users' training histories with about ``train_batch_size`` targets each.

    Where several processes train together, each gathers its shard of every batch's windows.

    A target at position ``p + 1`` is predicted at ``p``. Epoch ``e`` depends on the seed and ``e`` alone, so a
    resumed run sees what an uninterrupted one would.

    Args:
        config: RecBole's configuration; reads ``train_batch_size``, ``MAX_ITEM_LIST_LENGTH``, ``seed``, ``worker``.
        dataset: the training set.
        sampler: RecBole's sampler of negatives, or none.
        shuffle: whether windows change batches (and long histories their borders) from epoch to epoch.

    Raises:
        UserError: where negatives would all be one item.
    """

    def __init__(self, config, dataset: SequenceDataset, sampler, shuffle: bool):
        self.config, self._dataset, self._sampler, self.shuffle = config, dataset, sampler, shuffle
        targets = dataset.inter_feat[dataset.TARGET_POSITION].numpy()
        self.num_targets = len(targets)
        self._is_target = np.zeros(len(dataset.sorted_items), dtype=bool)
        self._is_target[targets] = True
        self._targets_before = np.concatenate([[0], np.cumsum(self._is_target)])
        self._start, first = np.unique(dataset.user_start.numpy()[targets], return_inverse=True)
        self._stop = np.zeros_like(self._start)
        np.maximum.at(self._stop, first, targets)  # the last target is predicted, never read
        negative = config["train_neg_sample_args"]
        self._negatives = 0 if negative["distribution"] == "none" else negative["sample_num"]
        self._popularity = None  # running sum over items of how often each is drawn, up to a factor
        if negative["distribution"] == "popularity":
            counts = np.bincount(sampler._get_candidates_list())
            weights = np.where(counts, counts.astype(float) ** negative["alpha"], 0.0)
            check_shares(weights, dataset.dataset_name)
            self._popularity = np.cumsum(weights)
        elif self._negatives:
            check_shares(np.ones(dataset.item_num - 1), dataset.dataset_name)
        self._epoch = 0
        self._plan = self._plan_epoch()
        super().__init__(
            _Windows(self),
            batch_sampler=_Plan(self),
            collate_fn=_as_is,
            num_workers=config["worker"],
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose which epoch the next iteration is; the trainer calls this before each."""
        self._epoch = epoch
        self._plan = self._plan_epoch()

    def _plan_epoch(self) -> list[np.ndarray]:
        """The windows of each batch."""
        generator = np.random.default_rng([self.config["seed"], self._epoch]) if self.shuffle else None
        windows = cut_windows(self._start, self._stop, self.config["MAX_ITEM_LIST_LENGTH"], generator)
        owned = self._targets_of(windows)
        windows, owned = windows[owned > 0], owned[owned > 0]
        if generator is not None:
            order = generator.permutation(len(windows))
            windows, owned = windows[order], owned[order]
        batch = (np.cumsum(owned) - owned) // self.config["train_batch_size"]
        return np.split(windows, np.flatnonzero(np.diff(batch)) + 1)

    def _targets_of(self, windows: np.ndarray) -> np.ndarray:
        """How many targets each window owns."""
        return self._targets_before[windows[:, 2] + 1] - self._targets_before[windows[:, 1] + 1]

    def collate(self, windows: np.ndarray) -> SequenceBatch:
        """Gather this process's shard of the windows ``[W, 3]`` of one batch."""
        whole, windows = windows, shard(windows)
        weight = self._targets_of(windows).sum() * world_size() / self._targets_of(whole).sum()
        if not own_rows(len(whole)):
            weight = 0.0
        begin, owned, end = torch.from_numpy(windows).unbind(1)
        cu_seqlens = cu_seqlens_from_lengths(end - begin)
        offset = begin - cu_seqlens[:-1]
        place = torch.arange(int(cu_seqlens[-1])) + offset.repeat_interleave(end - begin)
        is_read = torch.from_numpy(self._is_target)[place + 1] & (place >= owned.repeat_interleave(end - begin))
        target_rows = is_read.nonzero()[:, 0]
        items = self._dataset.sorted_items
        targets = items[place[target_rows] + 1]
        columns = self._dataset.sorted_columns
        items = beside(items[place], None if columns is None else columns[place])
        return SequenceBatch(items, cu_seqlens, target_rows, targets, self._sample(targets), weight=float(weight))

    def _sample(self, targets: Tensor) -> Tensor | None:
        """``K`` items for each target, none of them the target itself, from the distribution of RecBole's sampler."""
        if not self._negatives:
            return None
        unwanted = targets.numpy()[:, None]
        drawn = self._draw(unwanted.shape[0] * self._negatives).reshape(-1, self._negatives)
        while (again := drawn == unwanted).any():
            drawn[again] = self._draw(int(again.sum()))
        return torch.from_numpy(drawn)

    def _draw(self, count: int) -> np.ndarray:
        # RecBole's samplers loop over single draws in Python, but for the uniform one.
        if self._popularity is None:
            return self._sampler.sampling(count)
        return np.searchsorted(self._popularity, np.random.random(count) * self._popularity[-1], side="right")


class _Windows(Dataset):
    """What torch's DataLoader indexes, a batch at a time; to RecBole's collector of statistics, the dataset itself."""

    def __init__(self, loader: SequenceDataLoader):
        self._loader = loader

    def __getattr__(self, name: str):
        if name == "_loader":  # while it is being unpickled in a worker
            raise AttributeError(name)
        return getattr(self._loader._dataset, name)

    def __getitems__(self, windows: np.ndarray) -> SequenceBatch:
        return self._loader.collate(windows)


class _Plan:
    """The current epoch's batches, as torch's DataLoader iterates them."""

    def __init__(self, loader: SequenceDataLoader):
        self._loader = loader

    def __iter__(self):
        return iter(self._loader._plan)

    def __len__(self) -> int:
        return len(self._loader._plan)


def _as_is(batch: Any) -> Any:
    return batch
