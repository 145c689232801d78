"""Exact top-k of many users by blocks, so that memory grows neither with their number nor with the catalogue."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from recbole_ssm.serving.histories import Histories

# Scores held at a time: 64 MB in float32.
SCORES_AT_A_TIME = 1 << 24

# Below so many columns a group, the second search is no smaller than one of all.
SMALLEST_GROUP = 16


def top_items(
    scores_of: Callable[[slice], Tensor],
    count: int,
    candidates: np.ndarray,
    n_items: int,
    k: int,
    seen: Histories | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The items of the highest scores for each of ``count`` histories.

    Args:
        scores_of: scores of some histories and the items ``candidates``, ``[B, C]``; they are written into.
        count: number of histories, ``N``.
        candidates: ids of the items to choose from, ascending, ``[C]``.
        n_items: number of all ids.
        k: most items a history.
        seen: histories whose items are left out, ``N`` of them.

    Returns:
        Ids, int64 ``[N, k']``, with 0 where there are fewer than ``k'``, and their scores, float32 ``[N, k']``, best
        first; ``k'`` is ``k`` or the number of candidates.
    """
    k = min(k, len(candidates))
    ids, values = np.zeros((count, k), np.int64), np.full((count, k), -np.inf, np.float32)
    if seen is not None:
        place = None  # of all items the ids are the columns plus one, without a table as long as the catalogue
        if len(candidates) < n_items - 1:
            place = np.full(n_items, -1)
            place[candidates] = np.arange(len(candidates))
        ends = np.concatenate([[0], np.cumsum(seen.lengths)])
    step = max(1, SCORES_AT_A_TIME // max(1, len(candidates)))
    for begin in range(0, count if k else 0, step):
        end = min(count, begin + step)
        scores = scores_of(slice(begin, end))
        if seen is not None:
            items = seen.items[ends[begin] : ends[end]]
            column = items - 1 if place is None else place[items]
            row = np.repeat(np.arange(end - begin), seen.lengths[begin:end])
            at = (torch.from_numpy(indices[column >= 0]).to(scores.device) for indices in (row, column))
            scores[tuple(at)] = -torch.inf
        best, where = _topk(scores, k)
        found = candidates[where.cpu().numpy()]
        values[begin:end] = best.float().cpu().numpy()
        ids[begin:end] = np.where(values[begin:end] > -np.inf, found, 0)
    return ids, values


def _topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As ``scores.topk(k)`` of ``[B, C]``; of many columns in one pass, and a search among few.

    Columns are put into groups. The ``k`` highest scores are all in the ``k`` groups of the highest maxima.
    """
    rows, count = scores.shape
    size = int((count / k) ** 0.5)  # of a group: as many maxima to search as columns in the groups chosen
    if size < SMALLEST_GROUP:
        return scores.topk(k)
    groups = count // size
    maxima = scores[:, : groups * size].view(rows, size, groups).amax(1)
    # A group is every `groups`-th column, for a maximum over rows is the faster one.
    chosen = maxima.topk(k)[1][:, None] + groups * torch.arange(size, device=scores.device)[:, None]
    rest = torch.arange(groups * size, count, device=scores.device).expand(rows, -1)
    columns = torch.cat([chosen.view(rows, -1), rest], 1)
    best, where = scores.gather(1, columns).topk(k)
    return best, columns.gather(1, where)
