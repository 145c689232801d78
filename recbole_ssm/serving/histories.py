"""Histories as they come (lists, a DataFrame, an Arrow table) and as models read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from recbole_ssm.data.context import beside, reads_request, time_columns
from recbole_ssm.errors import UserError
from recbole_ssm.ops.packing import Borders, cu_seqlens_from_lengths, know
from recbole_ssm.serving.vocabulary import Vocabulary

ASK_WITH_TIME = "this model reads the time at which it is asked (it was trained with request_time: known): give it."
ASKED_IN_VAIN = (
    "this model does not read the time at which it is asked (it was trained without request_time: known): leave at out."
)


@dataclass(frozen=True)
class Histories:
    """``N`` histories laid end to end, oldest item first.

    Attributes:
        items: ids, int64 ``[T]``; none is 0.
        lengths: int64 ``[N]``.
        columns: what the model reads of their times (:mod:`recbole_ssm.data.context`), int64 ``[T, C]``, or none.
        times: of each item, float64 ``[T]``, where they are known.
        at: when it is asked what comes next, float64 ``[N]``, where that is known.
    """

    items: np.ndarray
    lengths: np.ndarray
    columns: np.ndarray | None = None
    times: np.ndarray | None = None
    at: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def rows(self) -> np.ndarray:
        """Which history each item is of, int64 ``[T]``."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def latest(self, count: int) -> "Histories":
        """At most ``count`` latest items of each."""
        if not len(self) or self.lengths.max() <= count:
            return self
        from_end = np.repeat(np.cumsum(self.lengths), self.lengths) - np.arange(len(self.items))
        kept = from_end <= count
        return Histories(self.items[kept], np.minimum(self.lengths, count), *self._of_items(kept), self.at)

    @staticmethod
    def joined(parts: Sequence["Histories"]) -> "Histories":
        """The histories of at least one of these, in that order."""

        def all_of(values: list[np.ndarray | None]) -> np.ndarray | None:
            given = [value for value in values if value is not None]
            return np.concatenate(given) if len(given) == len(values) else None

        return Histories(
            np.concatenate([part.items for part in parts]),
            np.concatenate([part.lengths for part in parts]),
            all_of([part.columns for part in parts]),
            all_of([part.times for part in parts]),
            all_of([part.at for part in parts]),
        )

    def take(self, which: np.ndarray) -> "Histories":
        """The histories ``which`` (integer ``[M]``), in that order."""
        end = np.cumsum(self.lengths)
        begin, lengths = (end - self.lengths)[which], self.lengths[which]
        place = np.arange(lengths.sum()) + np.repeat(begin - (np.cumsum(lengths) - lengths), lengths)
        at = self.at if self.at is None else self.at[which]
        return Histories(self.items[place], lengths, *self._of_items(place), at)

    def _of_items(self, rows: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Columns and times of some items."""
        columns, times = (values if values is None else values[rows] for values in (self.columns, self.times))
        return columns, times

    def without_last(self) -> "Histories":
        """All but the last item of each, whose columns still tell of it as of what follows."""
        kept = np.ones(len(self.items), dtype=bool)
        kept[np.cumsum(self.lengths)[self.lengths > 0] - 1] = False
        return Histories(self.items[kept], np.maximum(0, self.lengths - 1), *self._of_items(kept))

    @torch.inference_mode(False)  # or nothing is kept of it
    def cu_seqlens(self, device: torch.device | str = "cpu") -> Tensor:
        """Borders, int32 ``[N+1]``."""
        lengths = torch.from_numpy(self.lengths)
        found = cu_seqlens_from_lengths(lengths).to(device)
        know(found, Borders(lengths, found.device))
        return found

    def inputs(self) -> Tensor:
        """What a model's ``encode`` takes: ids ``[T]``, or with columns ``[T, 1 + C]``."""
        return beside(torch.from_numpy(self.items), self.columns)


def read_histories(
    given: Any, vocabulary: Vocabulary, time_field: str, times: Any = None, names: tuple[str, ...] = (), at: Any = None
) -> tuple[Histories, Any]:
    """Histories of item tokens; unknown items are left out.

    Args:
        given: a list of lists of tokens, or a DataFrame or Arrow table of interactions with RecBole's columns of users,
            items and perhaps times. Interactions are ordered by time (ties as they come) where there is one.
        vocabulary: of the model.
        time_field: name of the column of times.
        times: with lists, of their items, none before that of the item before it.
        names: what the model reads of times.
        at: when it is asked what comes next, one time for all or one a history; of a table, in the order in which its
            users come.

    Returns:
        The histories, and the users that they are of where ``given`` names them: in the order in which they come.

    Raises:
        UserError: for a missing column, times that are missing, do not fit, go backwards or are no finite numbers, or
            anything but these kinds.
    """
    if hasattr(given, "to_pandas") and not isinstance(given, pd.DataFrame):
        given = given.to_pandas()
    users = None
    if isinstance(given, pd.DataFrame):
        for field in (vocabulary.uid_field, vocabulary.iid_field):
            if field not in given.columns:
                raise UserError(f"the table has no column {field!r}: it has {', '.join(map(str, given.columns))}.")
        group, users = pd.factorize(given[vocabulary.uid_field], use_na_sentinel=False)
        when = None
        if time_field in given.columns:
            when = numbers(given[time_field], f"a time in the column {time_field!r}")
        order = np.argsort(group, kind="stable") if when is None else np.lexsort((when, group))
        tokens, rows = given[vocabulary.iid_field].iloc[order], group[order]
        when = when if when is None else when[order]
        count = len(users)
    elif isinstance(given, Sequence) and not isinstance(given, str):
        if not all(isinstance(one, Sequence | np.ndarray) and not isinstance(one, str) for one in given):
            raise UserError("sequences are lists of items, one list a history; of a single one write [history].")
        count = len(given)
        rows = np.repeat(np.arange(count), [len(one) for one in given])
        tokens = [token for one in given for token in one]
        when = None
        if times is not None:
            try:
                fit = [len(one) for one in times] == [len(one) for one in given]
            except TypeError:  # it is of times instead of lists of them
                fit = False
            if not fit:
                raise UserError("times are to be lists of as many times as there are items.")
            when = numbers([time for one in times for time in one], "a time")
    else:
        raise UserError(f"sequences are lists of items, a DataFrame or an Arrow table, not {type(given).__name__}.")
    ids = vocabulary.ids(tokens) if len(rows) else np.zeros(0, np.int64)
    return histories_of(ids, rows, count, when, names, _times_of_requests(at, count)), users


def numbers(times: Any, what: str) -> np.ndarray:
    """Times as float64, in the shape ``[]`` or ``[n]`` in which they are given.

    Raises:
        UserError: for anything but finite numbers. Dates are no numbers: they do not say what unit the model knows.
    """
    try:
        found = np.asarray(times)
    except ValueError:  # lists of several lengths
        found = np.zeros((1, 1))
    if (
        found.ndim > 1
        or (found.size and found.dtype.kind not in "iuf")
        or not np.isfinite(found := found.astype(np.float64)).all()
    ):
        raise UserError(f"{what} is no finite number: give numbers, in the unit that the model was trained with.")
    return found


def _times_of_requests(at: Any, count: int) -> np.ndarray | None:
    """One time a history, float64 ``[N]``."""
    if at is None:
        return None
    found = numbers(at, "at")
    if found.ndim and len(found) != count:
        raise UserError(f"at is to be a time, or one a history, of which there are {count}.")
    return np.broadcast_to(found, count)


def histories_of(
    ids: np.ndarray, rows: np.ndarray, count: int, times: np.ndarray | None = None, names: tuple[str, ...] = (),
    at: np.ndarray | None = None,
) -> Histories:  # fmt: skip
    """Histories of ids, without those that are 0.

    Args:
        ids: int64 ``[T]``.
        rows: which history each is of, ascending ``[T]``.
        count: number of histories.
        times: of each id, float64 ``[T]``, where they are known.
        names: what the model reads of times.
        at: see :class:`Histories`; columns of what follows a history are unknown without it.

    Raises:
        UserError: for times that are missing where the model reads them, a time before that of the item before, and one
            in ``at`` that is before that of the history's last item, or that the model does not read.
    """
    if names and times is None:
        raise UserError("this model reads the time of each item: give times, or a table with TIME_FIELD's column.")
    if at is not None and not reads_request(names):
        raise UserError(ASKED_IN_VAIN)
    known = ids > 0
    ids, rows, times = ids[known], rows[known], times if times is None else times[known]
    if times is not None and (backwards := (np.diff(times) < 0) & (np.diff(rows) == 0)).any():
        place = int(backwards.argmax())
        raise UserError(
            f"the time {times[place + 1]:.15g} of an item is before that of the item before it, {times[place]:.15g}: "
            "give each history's items oldest first."
        )
    lengths = np.bincount(rows, minlength=count).astype(np.int64)
    first = (np.cumsum(lengths) - lengths)[lengths > 0]
    columns = None
    if times is not None and names:
        asked = at if at is None else at[lengths > 0]
        if asked is not None and (early := asked < times[np.append(first, len(ids))[1:] - 1]).any():
            raise UserError(
                f"at is {asked[early][0]:.15g} for a history whose last item is of a later time: ask for a time "
                "after it."
            )
        columns = time_columns(names, times, first, asked)
    return Histories(ids, lengths, columns, times, at)
