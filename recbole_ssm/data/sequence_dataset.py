"""RecBole's sequential dataset as an index into the sorted interactions."""

import numpy as np
import pandas as pd
import torch
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from recbole.utils.enum_type import FeatureSource, FeatureType
from scipy.sparse import coo_matrix

from recbole_ssm.data.atomic_files import AtomicFiles
from recbole_ssm.data.context import columns_of, not_a_clock, time_columns
from recbole_ssm.data.reading import EXACT_NUMBERS, REPEATED_NAMES
from recbole_ssm.errors import UserError
from recbole_ssm.registry import model_class


class _Rows(Interaction):
    """An Interaction that rows are taken of by arrays; RecBole's makes lists of Python's integers of these first."""

    def __getitem__(self, index):
        if isinstance(index, np.ndarray | torch.Tensor):
            return _Rows({field: values[index] for field, values in self.interaction.items()})
        return super().__getitem__(index)


class SequenceDataset(AtomicFiles, SequentialDataset):
    """RecBole's rows (a prefix of a user's history and the item that followed), built when they are asked for.

    RecBole copies every prefix of every user into padded tensors. Here the interactions are sorted once by user and
    time, and a row is a pointer to its target; ``dataset[index]`` gathers the padded rows of one batch, the same as
    RecBole's but for list fields other than the item's, which no model here reads.

    Attributes:
        sorted_items: all interactions' item ids by user and time, int64 ``[n]``.
        user_start: where the history of each interaction's user begins in ``sorted_items``, int64 ``[n]``.
        longest_row: most items of a row's history, and so the width of padded rows.
        sorted_columns: what the model reads of their times (:mod:`recbole_ssm.data.context`), int64 ``[n, C]``; or
            none.
    """

    TIME_COLUMNS = "time_columns_list"  # of rows: what the model reads of their history's times, ``[B, L, C]``
    TARGET_POSITION = "target_position"  # the column of inter_feat that points into sorted_items

    sorted_items: torch.Tensor
    user_start: torch.Tensor
    longest_row: int
    sorted_columns: torch.Tensor | None

    own_columns = (TIME_COLUMNS, TARGET_POSITION)

    def _kind(self, name, ftype, source):
        """As before, but names of interactions are kept once each, and times exactly."""
        if source == FeatureSource.INTERACTION and ftype == FeatureType.TOKEN:
            return REPEATED_NAMES
        return EXACT_NUMBERS if name == self.time_field else super()._kind(name, ftype, source)

    def _remove_duplication(self):
        """As RecBole's, but ties keep file order: RecBole sorts by an unstable method and leaves the rows sorted."""
        keep = self.config["rm_dup_inter"]
        if keep is not None:
            by_time = self.inter_feat.sort_values(self.time_field, kind="stable")
            pairs = [self.uid_field, self.iid_field]
            with self.telling("rm_dup_inter"):
                self.inter_feat = by_time.drop_duplicates(subset=pairs, keep=keep).sort_index()

    def _filter_by_inter_num(self):
        """As RecBole's (k-core filtering), counting arrays instead of looping over interactions."""
        fields = (self.uid_field, self.iid_field)
        wanted = [self.config["user_inter_num_interval"], self.config["item_inter_num_interval"]]
        intervals = [self._parse_intervals_str(interval) for interval in wanted]
        if self.user_feat is not None or self.item_feat is not None or intervals == [None, None]:
            return super()._filter_by_inter_num()  # which keeps the features of users and items in step
        ids = [pd.factorize(self.inter_feat[field])[0] for field in fields]
        kept = np.arange(len(self.inter_feat))
        while True:
            legal = np.ones(len(kept), dtype=bool)
            for numbers, interval in zip(ids, intervals, strict=True):
                if interval is not None:
                    legal &= self._within_intervals(np.bincount(numbers[kept]), interval)[numbers[kept]]
            if legal.all():
                break
            kept = kept[legal]
        with self.telling("user_inter_num_interval", "item_inter_num_interval"):
            self.inter_feat = self.inter_feat.iloc[kept]

    def _remap_ID_all(self):
        super()._remap_ID_all()
        # Taken here, between the filters and RecBole's normalisation and float32 conversion.
        time = self.inter_feat[self.time_field]
        self._exact_time = time.to_numpy()
        self.inter_feat[self.time_field] = time.astype(np.float64)

    def data_augmentation(self):
        """Sort the interactions by user and time (ties in file order) and make a row of each but a user's first."""
        self._aug_presets()
        exact = self.config["time_order"] == "exact"
        time = self._exact_time if exact else self.inter_feat[self.time_field].numpy()
        order = np.lexsort((time, self.inter_feat[self.uid_field].numpy()))
        self.inter_feat._reindex(order)
        users = self.inter_feat[self.uid_field].numpy()
        first = np.flatnonzero(np.diff(users, prepend=-1))
        sizes = np.diff(first, append=len(users))
        self._report_short_users(sizes)
        user_start = np.repeat(first, sizes)
        self.sorted_items = self.inter_feat[self.iid_field]
        time = self._exact_time[order]
        self._report_doubled(users, self.sorted_items.numpy(), time)
        self.sorted_columns = self._columns(time, first)
        self.user_start = torch.from_numpy(user_start)

        targets = np.flatnonzero(np.arange(len(users)) > user_start)
        rows = _Rows(self.inter_feat.interaction)[targets]
        length = np.minimum(targets - user_start[targets], self.max_item_list_len)
        self.longest_row = int(length.max())
        pointers = {self.item_list_length_field: length, self.TARGET_POSITION: targets}
        rows.update(Interaction({field: torch.from_numpy(values) for field, values in pointers.items()}))
        self.inter_feat, self._exact_time = rows, None

    def _columns(self, time: np.ndarray, first: np.ndarray) -> torch.Tensor | None:
        names = columns_of(model_class(self.config), self.config)
        if not names:
            return None
        if words := not_a_clock(names, time):
            self.logger.warning(f"The times of {self.dataset_name}, {words}.")
        return torch.from_numpy(time_columns(names, time, first))

    def _report_short_users(self, sizes: np.ndarray) -> None:
        single = int((sizes == 1).sum())
        if single == len(sizes):
            raise UserError(
                f"every user of {self.dataset_name} has a single interaction, so there is nothing to predict from."
            )
        if single:
            self.logger.warning(
                f"{single} of {len(sizes)} users of {self.dataset_name} have a single interaction, "
                "nothing to predict from; they are left out."
            )

    def _report_doubled(self, *columns: np.ndarray) -> None:
        """Tell of interactions that follow themselves; of those among others at one time, it is not worth a sort."""
        doubled = int(np.logical_and.reduce([column[1:] == column[:-1] for column in columns]).sum())
        if doubled:
            self.logger.warning(
                f"At least {doubled} of {len(columns[0])} interactions of {self.dataset_name} stand twice, with one "
                "user, item and time: a model that is asked for such a one has just read it."
            )

    def build(self):
        """Split by RecBole's ``eval_args``.

        Raises:
            UserError: where a part that training or its choice of the best epoch needs is left empty.
        """
        parts = super().build()
        for name, part in zip(("training", "validation", "test"), parts, strict=True):
            if not len(part) and name == "training":
                raise UserError(
                    f"eval_args {self.config['eval_args']['split']} leave nothing of {self.dataset_name} for training."
                )
            if not len(part):
                self.logger.warning(f"The {name} set of {self.dataset_name} is empty: there will be no {name} result.")
        return parts

    def _grouped_index(self, group_by_list):
        """Rows of each group in their order, groups in that of their first rows: ``(rows [n], sizes [G])``."""
        group = pd.factorize(group_by_list)[0]
        return group.argsort(kind="stable"), np.bincount(group)

    def _split_index_by_leave_one_out(self, grouped_index, leave_one_num):
        """As RecBole's: the last ``leave_one_num`` rows of a group to one part each, but never its first row."""
        rows, sizes = grouped_index
        from_end = np.repeat(np.cumsum(sizes), sizes) - np.arange(len(rows)) - 1
        held_out = np.repeat(np.minimum(leave_one_num, sizes - 1), sizes)
        part = np.where(from_end < held_out, leave_one_num - from_end, 0)
        return [rows[part == i] for i in range(leave_one_num + 1)]

    def split_by_ratio(self, ratios, group_by=None):
        """See :meth:`recbole.data.dataset.Dataset.split_by_ratio`."""
        if group_by is None:
            return super().split_by_ratio(ratios)
        shares = [ratio / sum(ratios) for ratio in ratios]
        rows, sizes = self._grouped_index(self.inter_feat[group_by].numpy())
        different, number = np.unique(sizes, return_inverse=True)
        borders = np.array([self._calcu_split_ids(int(size), shares) for size in different])
        begin = np.cumsum(sizes) - sizes
        place = np.arange(len(rows)) - np.repeat(begin, sizes)
        part = (place[:, None] >= borders[np.repeat(number, sizes)]).sum(1)
        self._drop_unused_col()
        return [self.copy(self.inter_feat[rows[part == i]]) for i in range(len(ratios))]

    def __getitem__(self, index, join=True) -> Interaction:
        rows = super().__getitem__(index, join)
        target, length = rows[self.TARGET_POSITION], rows[self.item_list_length_field]
        column = torch.arange(self.longest_row)
        # Places past a row's end would point behind its target; they read the target and are zeroed.
        places = torch.minimum((target - length)[..., None] + column, target[..., None])
        real = column < length[..., None]
        item_list = self.iid_field + self.config["LIST_SUFFIX"]
        rows.update(Interaction({item_list: self.sorted_items[places] * real}))
        if self.sorted_columns is not None:
            rows.update(Interaction({self.TIME_COLUMNS: self.sorted_columns[places] * real[..., None]}))
        return rows

    def inter_matrix(self, form="coo", value_field=None):
        """See :meth:`recbole.data.dataset.SequentialDataset.inter_matrix`, of this set's targets and first items.

        Raises:
            NotImplementedError: with a ``value_field``, which no model here reads.
        """
        if value_field is not None:
            raise NotImplementedError("inter_matrix of a SequenceDataset has no value_field")
        target = self.inter_feat[self.TARGET_POSITION]
        opening = self.user_start[target] == target - 1
        users = torch.cat([self.inter_feat[self.uid_field], self.inter_feat[self.uid_field][opening]])
        items = torch.cat([self.sorted_items[target], self.sorted_items[target[opening] - 1]])
        matrix = coo_matrix((np.ones(len(users)), (users, items)), shape=(self.user_num, self.item_num))
        return matrix if form == "coo" else matrix.tocsr()
