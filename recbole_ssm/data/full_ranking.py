"""Full ranking: among the items that are new to a user, and for users who are asked for."""

from typing import Any

import numpy as np
import torch
from recbole.data.dataloader.general_dataloader import FullSortEvalDataLoader
from recbole.utils.case_study import full_sort_scores as scores_of_rows

from recbole_ssm.data.sequence_dataset import SequenceDataset
from recbole_ssm.errors import UserError

NAMED_USERS = 5  # in a sentence


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


def full_sort_scores(uid_series: Any, model: Any, test_data: Any, device: Any = None) -> torch.Tensor:
    """As :func:`recbole.utils.case_study.full_sort_scores`, which for sequential models scores the rows that there are.

    Args:
        uid_series: numbers of users, ``[B]``.
        model: a trained model.
        test_data: its loader of rows to score.
        device: the model's; the CPU where absent.

    Returns:
        Scores of all items, ``[B, n_items]``, -inf at the padding: row ``b`` is of user ``uid_series[b]``.

    Raises:
        UserError: naming users who have no row among the data, or several, so that no answer could be told apart.
    """
    users = np.asarray(uid_series)
    if test_data.is_sequential:
        dataset = test_data._dataset
        numbers, counts = np.unique(dataset.inter_feat[dataset.uid_field].numpy(), return_counts=True)
        rows = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
        for problem, wrong in (
            ("no row", [user for user in users.tolist() if rows.get(user, 0) == 0]),
            ("several rows", [user for user in users.tolist() if rows.get(user, 0) > 1]),
        ):
            if wrong:
                names = ", ".join(_name(dataset, user) for user in wrong[:NAMED_USERS])
                more = f" and {len(wrong) - NAMED_USERS} more" if len(wrong) > NAMED_USERS else ""
                raise UserError(
                    f"of these data there is {problem} of user {names}{more}: ask for users that have one row each."
                )
    return scores_of_rows(users, model, test_data, device)


def _name(dataset: Any, user: int) -> str:
    known = 0 < user < dataset.user_num
    return str(dataset.id2token(dataset.uid_field, user)) if known else f"number {user}, who is not in the dataset"
