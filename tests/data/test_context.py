"""Columns of time against plain loops, and where they stand in what models read."""

from datetime import UTC, datetime

import numpy as np
import pytest
import torch

from recbole_ssm.data.context import COLUMNS, NEXT, not_a_clock, time_columns
from recbole_ssm.data.sequence_dataset import SequenceDataset

from ..conftest import build, write_dataset

ALL = (*COLUMNS, *(NEXT + name for name in COLUMNS))
KNOWN = {"use_time_gaps": True, "use_clock": True, "request_time": "known"}


def of_event(time: float, before: float | None) -> dict[str, int]:
    """The columns of one event, by other means."""
    when = datetime.fromtimestamp(time, UTC)
    gap = 0 if before is None else round(time - before)
    bucket = 0 if before is None else 1 + int(np.floor(np.log2(1 + time - before)))
    return {"gap_bucket": bucket, "gap": gap, "hour": when.hour, "weekday": when.weekday()}


def of_history(times: list[float], asked: float) -> list[dict[str, int]]:
    """The columns of each event of a history."""
    following = [*times[1:], asked]
    return [
        of_event(time, times[i - 1] if i else None)
        | {NEXT + name: value for name, value in of_event(following[i], time).items()}
        for i, time in enumerate(times)
    ]


@pytest.mark.parametrize("dtype", [np.int64, np.float64])
def test_columns_are_what_they_are_named(dtype):
    generator = np.random.default_rng(0)
    histories = [1.6e9 + np.cumsum(generator.choice([0, 1, 2.6, 3e3, 4e5], length)) for length in (7, 1, 12)]
    histories = [times.astype(dtype).tolist() for times in histories]
    asked = [times[-1] + 90_000 for times in histories]
    expected = [row for times, at in zip(histories, asked, strict=True) for row in of_history(times, at)]
    found = time_columns(ALL, np.concatenate(histories).astype(dtype), np.array([0, 7, 8]), np.array(asked))
    assert [dict(zip(ALL, row, strict=True)) for row in found.tolist()] == expected
    assert found.dtype == np.int64


def test_gaps_are_exact_and_never_below_zero():
    nanoseconds = 10**18 * np.ones(3, np.int64) + np.array([0, 3, 1])
    assert time_columns(("gap", "next_gap"), nanoseconds, np.array([0])).tolist() == [[0, 3], [3, 0], [0, 0]]


@pytest.mark.parametrize(
    ("names", "times", "words"),
    [
        (("hour",), [1, 2, 3], "from 1 to 3, look like positions"),
        (("next_weekday",), [1.6e12], "another unit"),
        (("hour",), [1.6e9], None),
        (("gap", "gap_bucket"), [1, 2, 3], None),
    ],
)
def test_hours_of_what_is_no_clock(names, times, words):
    found = not_a_clock(names, np.array(times))
    assert found is None if words is None else words in found


@pytest.mark.parametrize("mode", ["sequence", "prefix"])
def test_a_position_knows_the_time_of_its_target(mode):
    generator = np.random.default_rng(1)
    times = {user: (1_500_000_000 + np.cumsum(generator.integers(0, 200_000, 6))).tolist() for user in "abc"}
    rows = [f"{user}\t{user}{place}\t{time}" for user in times for place, time in enumerate(times[user])]
    write_dataset("clock", rows[::-1])
    _, model, (train_data, _, test_data) = build("Mamba4Rec", "clock", train_mode=mode, **KNOWN)
    token = train_data._dataset.field2id_token["item_id"]
    expected = {f"{user}{i}": row for user in times for i, row in enumerate(of_history(times[user], times[user][-1]))}
    assert model.columns == ("gap_bucket", "hour", "weekday", "next_gap_bucket", "next_hour", "next_weekday")
    batch = model.packed(next(iter(train_data)))
    test_rows = test_data._dataset[torch.arange(3)]
    together = torch.cat([batch.items, *model._history(test_rows)])
    seen = [row.tolist() for row in together if row[0]]
    assert len(seen) > 20
    for item, *columns in seen:
        assert columns == [expected[token[item]][name] for name in model.columns]
    assert not test_rows[SequenceDataset.TIME_COLUMNS][test_rows["item_id_list"] == 0].any()
