"""Full ranking among the items that are new to a user."""

import torch
from recbole.data.dataloader.general_dataloader import FullSortEvalDataLoader

from recbole_ssm.data.sequence_dataset import SequenceDataset


class UnseenItemsDataLoader(FullSortEvalDataLoader):
    """RecBole's full ranking of a sequential model, without the items of the whole history before the target.

    That is how RecBole ranks for its general models, and how gSASRec's own code evaluates. A target that the history
    holds already stays a candidate.
    """

    _dataset: SequenceDataset

    def collate_fn(self, index):
        """As RecBole's, with the places ``(rows, items)`` of the scores to leave out second."""
        rows, _, positive_rows, positives = super().collate_fn(index)
        target = rows[SequenceDataset.TARGET_POSITION]
        begin = self._dataset.user_start[target]
        length = target - begin
        row = torch.arange(len(length)).repeat_interleave(length)
        place = torch.arange(len(row)) + (begin - (length.cumsum(0) - length)).repeat_interleave(length)
        items = self._dataset.sorted_items[place]
        seen = items != positives[row]
        return rows, (row[seen], items[seen]), positive_rows, positives
