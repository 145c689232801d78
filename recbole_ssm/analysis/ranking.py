"""Where each user's held-out item ranks, from which every top-k metric of leave-one-out follows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from recbole.data.dataloader.general_dataloader import FullSortEvalDataLoader

from recbole_ssm.data.sequence_dataset import SequenceDataset
from recbole_ssm.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """Ranks of one target a row of an evaluation set, rows by user.

    Attributes:
        users: RecBole's internal user ids, int64 ``[N]``, ascending.
        lengths: items of the history before the target, all of them, int64 ``[N]``.
        ranks: from 1, int64 ``[N]``. Among candidates of the target's own score it is the mean of their ranks, rounded
            up: a model that scores all alike ranks nothing.
    """

    users: np.ndarray
    lengths: np.ndarray
    ranks: np.ndarray

    def ndcg(self, k: int) -> np.ndarray:
        """NDCG@k of each row, ``[N]``; with one target ``1 / log2(rank + 1)``."""
        return np.where(self.ranks <= k, 1 / np.log2(self.ranks + 1.0), 0.0)

    def metrics(self, topk: Iterable[int], rows: np.ndarray | slice = slice(None)) -> dict[str, float]:
        """Recall, MRR and NDCG at each of ``topk`` over ``rows``, named as RecBole names them.

        With one target a row they are RecBole's own, and Hit@k is Recall@k.
        """
        found = {}
        for k in topk:
            hit = self.ranks[rows] <= k
            found[f"recall@{k}"] = float(hit.mean())
            found[f"mrr@{k}"] = float(np.where(hit, 1 / self.ranks[rows], 0.0).mean())
            found[f"ndcg@{k}"] = float(self.ndcg(k)[rows].mean())
        return found


def length_buckets(lengths: np.ndarray, borders: Sequence[int]) -> dict[str, np.ndarray]:
    """Rows whose history is from one border (inclusive) to the next, by the bucket's name; empty ones left out.

    Args:
        lengths: items of each row's history, ``[N]``.
        borders: ascending; the last bucket has no end.
    """
    buckets = {}
    for begin, end in zip_longest(borders, borders[1:]):
        rows = np.flatnonzero((lengths >= begin) & (lengths < (end or np.inf)))
        if len(rows):
            buckets[f"{begin} to {end - 1}" if end else f"{begin} and more"] = rows
    return buckets


@torch.no_grad()
def rank_targets(trainer, eval_data) -> Ranks:
    """Rank every row's target among all items, or among the unseen ones where ``exclude_history`` is set.

    Args:
        trainer: trainer of the model, from :func:`recbole_ssm.trainer.get_trainer`.
        eval_data: validation or test loader of a leave-one-out split.

    Raises:
        UserError: for a loader that does not rank all items, or of rows that RecBole has copied.
    """
    if not (isinstance(eval_data, FullSortEvalDataLoader) and isinstance(eval_data._dataset, SequenceDataset)):
        raise UserError("ranks need full ranking of whole histories: a model of this package, or train_mode: sequence.")
    trainer.model.eval()
    trainer.tot_item_num = eval_data._dataset.item_num
    dataset: SequenceDataset = eval_data._dataset
    users, lengths, ranks = [], [], []
    for batch in eval_data:
        with trainer._precision_of_evaluation():
            rows, scores, _, targets = trainer._full_sort_batch_eval(batch)
        own = scores.gather(1, targets[:, None].to(scores.device))
        ahead = (~(scores <= own)).sum(1)  # NaN is no good score: it puts a target last
        equal = (scores == own).sum(1) - 1
        ranks.append((1 + ahead + (equal.clamp_min(0) + 1) // 2).cpu())
        users.append(rows[dataset.uid_field].cpu())
        place = rows[SequenceDataset.TARGET_POSITION].cpu()
        lengths.append(place - dataset.user_start[place])
    user, length, rank = (torch.cat(part).numpy() for part in (users, lengths, ranks))
    order = user.argsort(kind="stable")
    return Ranks(user[order], length[order], rank[order])
