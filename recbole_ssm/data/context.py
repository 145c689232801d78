"""Columns of time that a model reads beside item ids; this is the one place that says what each of them is.

An event has the columns of :data:`COLUMNS`, of its own time and that of the event before it. A name that begins with
``next_`` (:data:`NEXT`) is the same column of the event that follows: in training and evaluation that is the target,
in serving the request, which knows its time before it knows its item (``request_time: known``).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recbole_ssm.errors import UserError

NEXT = "next_"

# Time gaps are told apart by powers of 2 of the timestamp's unit; 0 is that before a user's first interaction.
N_GAP_BUCKETS = 65

# Seconds since 1970 from 1973 to 5138: less are positions or days, more are milliseconds.
EPOCH_SECONDS = (1e8, 1e11)


def _gap_bucket(time: np.ndarray, before: np.ndarray, begins: np.ndarray) -> np.ndarray:
    gap = np.maximum(0, time.astype(np.float64) - before.astype(np.float64))
    bucket = np.minimum(1 + np.floor(np.log2(1 + gap)), N_GAP_BUCKETS - 1).astype(np.int64)
    bucket[begins] = 0
    return bucket


def _gap(time: np.ndarray, before: np.ndarray, begins: np.ndarray) -> np.ndarray:
    gap = np.maximum(0, time - before)
    return gap if gap.dtype.kind in "iu" else np.rint(np.minimum(gap, 2.0**62)).astype(np.int64)


def _hour(time: np.ndarray, before: np.ndarray, begins: np.ndarray) -> np.ndarray:
    return time // 3600 % 24


def _weekday(time: np.ndarray, before: np.ndarray, begins: np.ndarray) -> np.ndarray:
    return (time // 86400 + 3) % 7  # 1970 began on a Thursday


class Column(NamedTuple):
    """What a column is.

    Attributes:
        of: events' times, those of the events before them (their own where there is none) and whether there is none,
            all ``[n]``, to the column's integers ``[n]``.
        kinds: they are less than this; none for a column that is no class.
        meaning: in words.
    """

    of: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    kinds: int | None
    meaning: str


COLUMNS = {
    "gap_bucket": Column(
        _gap_bucket,
        N_GAP_BUCKETS,
        "0 for a first item, else `1 + floor(log2(1 + time since the item before))`, at most 64",
    ),
    "gap": Column(_gap, None, "the time since the item before, rounded, 0 for a first item"),
    "hour": Column(_hour, 24, "the hour, 0 to 23, UTC"),
    "weekday": Column(_weekday, 7, "the weekday from 0, Monday, to 6, UTC"),
}


def column(name: str) -> Column:
    """What is known of a column, whether it is an event's own or that of the next."""
    return COLUMNS[name.removeprefix(NEXT)]


def switched_on(config: Any) -> tuple[str, ...]:
    """The columns whose embeddings a configuration adds to those of items."""
    own = ("gap_bucket",) * bool(config["use_time_gaps"]) + ("hour", "weekday") * bool(config["use_clock"])
    return own + tuple(NEXT + name for name in own if config["request_time"] == "known")


def columns_of(model: type, config: Any) -> tuple[str, ...]:
    """The columns that a model's class reads by a configuration, in their order; none of RecBole's own.

    Raises:
        UserError: where the time of the request is known and nothing reads it.
    """
    if not hasattr(model, "time_columns"):
        return ()
    names = tuple(dict.fromkeys(model.time_columns(config)))
    if config["request_time"] == "known" and not reads_request(names):
        raise UserError(
            f"request_time is known, but {model.__name__}, as it is set, does not read it: set use_time_gaps or "
            "use_clock to True, or leave request_time at unknown."
        )
    return names


def reads_request(names: tuple[str, ...]) -> bool:
    """Whether one of these columns is of the event that follows."""
    return any(name.startswith(NEXT) for name in names)


def time_columns(
    names: tuple[str, ...], time: np.ndarray, first: np.ndarray, asked: np.ndarray | None = None
) -> np.ndarray:
    """Columns of histories that are laid end to end, int64 ``[n, C]``.

    Integers of time give exact gaps, floats rounded ones.

    Args:
        names: of the ``C`` columns.
        time: of each event, ``[n]``, ascending in each history.
        first: rows at which the histories begin, ``[S]``, each before the next.
        asked: the time that follows each history's last event, ``[S]``; that event's own where absent.
    """
    begins = np.zeros(len(time), dtype=bool)
    begins[first] = True
    ends = np.roll(begins, -1)
    before = np.where(begins, time, np.roll(time, 1))
    following = np.where(ends, time, np.roll(time, -1))
    if asked is not None:
        following[ends] = asked
    columns = np.zeros((len(time), len(names)), dtype=np.int64)
    for place, name in enumerate(names):
        given = (following, time, np.zeros_like(begins)) if name.startswith(NEXT) else (time, before, begins)
        columns[:, place] = column(name).of(*given)
    return columns


def not_a_clock(names: tuple[str, ...], time: np.ndarray) -> str | None:
    """A sentence where columns read the hour or the weekday of times that are no seconds since 1970."""
    if not len(time) or not any(name.endswith(("hour", "weekday")) for name in names):
        return None
    low, high = time.min(), time.max()
    if EPOCH_SECONDS[0] <= high <= EPOCH_SECONDS[1]:
        return None
    kind = "positions" if high < EPOCH_SECONDS[0] else "another unit"
    return (
        f"from {low} to {high}, look like {kind} instead of seconds since 1970: their hours and weekdays mean nothing"
    )


def beside(items: Tensor, columns: Tensor | np.ndarray | None) -> Tensor:
    """What models read: ids ``[...]``, or with columns ``[..., C]`` both, ``[..., 1 + C]``."""
    if columns is None:
        return items
    return torch.cat([items[..., None], torch.as_tensor(columns)], -1)
