"""An approximate index of the items, by FAISS: for catalogues so large that a score of every item costs too much."""

import numpy as np
import torch

from recbole_ssm.errors import BackendUnavailable, UserError
from recbole_ssm.serving.histories import Histories
from recbole_ssm.serving.recommender import Recommender

# Histories searched at a time, ordered by how many of their items are to be left out.
ROWS_AT_A_TIME = 256
POINTS_OF_A_LIST = 39  # fewer, and FAISS warns that its clusters are poor


class ApproximateIndex:
    """Items in lists of like ones (FAISS' ``IndexIVFFlat``), of which the most promising are searched.

    Scores are those of the model; what is not in the lists searched is missed.

    Args:
        recommender: whose items they are.
        candidates: ids of the items to choose from, ascending, ``[C]``.
        lists_searched: lists searched for each history: with more, less is missed and the search takes longer.

    Attributes:
        lists: how many there are.
        lists_searched: as given; it can be changed.

    Raises:
        UserError: for a model whose scores are no inner products, or for fewer lists than one.
        BackendUnavailable: where FAISS is not installed.
    """

    def __init__(self, recommender: Recommender, candidates: np.ndarray, lists_searched: int):
        if not recommender.packs:
            raise UserError(
                f"an index needs scores that are inner products, and {recommender.config['model']} may make others: "
                "leave --index out."
            )
        if lists_searched < 1:
            raise UserError(f"the lists to search are {lists_searched}: choose a whole number from 1.")
        try:
            import faiss
        except ImportError as error:
            raise BackendUnavailable("FAISS is not installed: pip install 'recbole-ssm[faiss]'.") from error
        self.recommender, self.candidates, self.lists_searched = recommender, candidates, lists_searched
        nobody = Histories(np.zeros(0, np.int64), np.zeros(0, np.int64))
        with torch.inference_mode():
            width = recommender.model.item_embedding.weight.shape[1]
            unused = torch.zeros(0, width, device=recommender.device)
            _, table = recommender.factors(nobody, candidates, unused)
            items = np.ascontiguousarray(table.float().cpu().numpy())
        self.lists = max(1, min(int(4 * len(items) ** 0.5), len(items) // POINTS_OF_A_LIST))
        self._index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, self.lists, faiss.METRIC_INNER_PRODUCT)
        self._index.cp.min_points_per_centroid = 1  # no warning of a catalogue that makes a single list
        self._index.train(items)
        self._index.add(items)

    def top(self, histories: Histories, k: int, exclude_seen: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`Recommender.top`; a history for which too few items are found is answered exactly."""
        self._index.nprobe = min(self.lists_searched, self.lists)
        k = min(k, len(self.candidates))
        ids, values = np.zeros((len(histories), k), np.int64), np.full((len(histories), k), -np.inf, np.float32)
        n_items = self.recommender.vocabulary.item_num
        seen = np.zeros(0, np.int64)
        if exclude_seen or not self.recommender.allow_repeats:
            seen = np.unique(histories.rows * n_items + histories.items)
            seen = seen[np.isin(seen % n_items, self.candidates)]
        left_out = np.bincount(seen // n_items, minlength=len(histories))
        some = np.flatnonzero(histories.lengths)
        if not len(some):
            return ids, values
        some = some[np.argsort(left_out[some], kind="stable")]
        with torch.inference_mode():
            hidden, _ = self.recommender.factors(histories.take(some), self.candidates[:1])
        queries = np.ascontiguousarray(hidden.float().cpu().numpy())
        for begin in range(0, len(some), ROWS_AT_A_TIME):
            which = some[begin : begin + ROWS_AT_A_TIME]
            wanted = min(k + int(left_out[which].max()), len(self.candidates))
            scores, found = self._index.search(queries[begin : begin + ROWS_AT_A_TIME], wanted)
            found = np.where(found < 0, 0, self.candidates[found])
            out = (found == 0) | np.isin(which[:, None] * n_items + found, seen)
            best = np.argsort(out, axis=1, kind="stable")[:, :k]  # FAISS has them in order
            kept = ~np.take_along_axis(out, best, 1)
            ids[which] = np.where(kept, np.take_along_axis(found, best, 1), 0)
            values[which] = np.where(kept, np.take_along_axis(scores, best, 1), -np.inf)
        there = np.minimum(k, len(self.candidates) - left_out)
        short = some[(ids[some] > 0).sum(1) < there[some]]
        if len(short):
            ids[short], values[short] = self.recommender.top(histories.take(short), k, exclude_seen, self.candidates)
        return ids, values


def overlap(found: np.ndarray, exact: np.ndarray) -> tuple[int, int]:
    """How many of the exact answers' items were found, and how many there are; ids ``[N, k]``, 0 for none."""
    n_items = max(int(found.max(initial=0)), int(exact.max(initial=0))) + 1
    row = np.arange(len(exact))[:, None] * n_items
    return int((np.isin(row + exact, row + found) & (exact > 0)).sum()), int((exact > 0).sum())
