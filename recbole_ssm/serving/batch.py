"""Recommendations for every user of a file, however many: in bounded memory, and gone on with where a run was killed.

Interactions come in any order. They are read once and put, by a hash of their users, into parts that each fit into
memory (:mod:`~recbole_ssm.serving.partition`). Then each part's users are answered, into a file that appears in one
step (:mod:`~recbole_ssm.serving.output`).
"""

import hashlib
import importlib.util
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import torch
from tqdm import tqdm

from recbole_ssm.data.context import reads_request
from recbole_ssm.data.reading import file_format
from recbole_ssm.errors import UserError
from recbole_ssm.places import writing
from recbole_ssm.serving.approximate import ApproximateIndex, overlap
from recbole_ssm.serving.histories import ASK_WITH_TIME, ASKED_IN_VAIN, Histories, histories_of, numbers
from recbole_ssm.serving.output import REMEDY, ROW_GROUP, SCHEMA, Output, Progress, counts_of
from recbole_ssm.serving.partition import MOST_PARTS, read_part, whole, write_spill
from recbole_ssm.serving.recommender import Recommender
from recbole_ssm.serving.tables import Interactions

FORMAT = 1
INDEXES = ("exact", "faiss")

ROWS_OF_A_SPILL = 1 << 20
BYTES_OF_A_PART = 1 << 24  # of text
ANSWERS_AT_A_TIME = 1 << 20

# Users for whom an approximate answer is held to the exact one.
SAMPLE = 1000


@dataclass(frozen=True)
class Summary:
    """What :func:`recommend_all` has done.

    Attributes:
        users: how many there are.
        answered: how many of them get recommendations: the others have no item that the model knows, or none is left.
        rows: recommendations, of all users.
        recall: of the index: the part of the exact answer's items that it found, for a sample of ``sampled`` users;
            none without an index, or where no user was left to be answered.
        sampled: see ``recall``.
    """

    users: int
    answered: int
    rows: int
    recall: float | None = None
    sampled: int = 0


def recommend_all(
    recommender: Recommender,
    input: str | Path,
    output: str | Path,
    k: int = 10,
    exclude_seen: bool = True,
    candidates: Iterable[Any] | None = None,
    index: str = "exact",
    lists_searched: int = 64,
    batch_users: int = 4096,
    show_progress: bool = False,
    at: float | None = None,
) -> Summary:
    """Write the items that are most likely to come next for each user of a file.

    The output has the columns ``user`` and ``item`` (text), ``score`` and ``rank`` (from 1), a user's rows together; it
    replaces recommendations that are there, and nothing else. A run that was killed is gone on with by the same call.
    One of another input, model or option starts anew.

    Args:
        recommender: whose recommendations they are.
        input: interactions, see :class:`~recbole_ssm.serving.tables.Interactions`, with the names of columns that the
            model was trained with. A user's rows may be anywhere, and are ordered by time where there is one (ties, or
            all, as they come).
        output: a file of Parquet; with a slash at its end, or where there is a folder, a folder of such files.
        k: most items a user.
        exclude_seen: whether a user's own items are left out.
        candidates: items to choose from; all that the model knows where absent.
        index: ``exact``, or ``faiss`` (:class:`~recbole_ssm.serving.approximate.ApproximateIndex`).
        lists_searched: of that index.
        batch_users: most users answered at a time.
        show_progress: whether bars are drawn on the standard error.
        at: the time at which recommendations are asked for, where the model reads it.

    Raises:
        UserError: for an input that cannot be read, an option that makes no sense, or an output that would replace
            anything but recommendations.
        CannotWrite: where the output cannot be written.
    """
    if index not in INDEXES:
        raise UserError(f"index is {index!r}: choose {' or '.join(INDEXES)}.")
    for name, number in (("k", k), ("batch_users", batch_users)):
        if number < 1:
            raise UserError(f"{name} is {number}: choose a whole number from 1.")
    if (at is not None) != reads_request(recommender.time_columns):
        raise UserError(f"{ASK_WITH_TIME[:-1]} by --at." if at is None else ASKED_IN_VAIN)
    at = at if at is None else float(numbers([at], "at")[0])
    vocabulary, config = recommender.vocabulary, recommender.config
    fields = (vocabulary.uid_field, vocabulary.iid_field, config["TIME_FIELD"])
    interactions = Interactions(Path(input), fields, bool(recommender.time_columns), *file_format(config))
    chosen = recommender.candidate_ids(candidates)
    if not len(chosen):
        raise UserError("none of the candidates is known to the model: name items that it was trained on.")
    job = {
        "format": FORMAT,
        "input": [
            [str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns] for file in interactions.files
        ],
        "model": recommender.digest,
        "k": k,
        "exclude_seen": exclude_seen,
        "at": at,
        "candidates": hashlib.blake2b(chosen.tobytes(), digest_size=16).hexdigest(),
        "index": [index, lists_searched] if index == "faiss" else [index],
    }
    place = Output(output, [interactions.path, *interactions.files])
    with place.held():
        state = place.begin(job, min(MOST_PARTS, -(-interactions.size // BYTES_OF_A_PART)))
        answers = _Answers(recommender, chosen, k, exclude_seen, batch_users, at)
        if index == "faiss":
            answers.index = ApproximateIndex(recommender, chosen, lists_searched)
        if not state.all_read:
            _read(interactions, recommender, place, state, show_progress)
        if state.unknown:
            logging.getLogger().warning(
                f"{state.unknown} of {state.rows} rows name items that are unknown to the model, such as "
                f"{state.example!r}: they are left out"
            )
        _answer(answers, place, state, show_progress)
        found, there = answers.overlap
        return Summary(**place.finish(), recall=found / there if there else None, sampled=answers.sampled)


def set_threads(threads: int) -> None:
    """Let everything that computes here use so many threads of the CPU.

    Raises:
        UserError: for fewer than one.
    """
    if threads < 1:
        raise UserError(f"threads are {threads}: choose a whole number from 1.")
    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    pa.set_cpu_count(threads)
    if importlib.util.find_spec("faiss") is not None:
        import faiss

        faiss.omp_set_num_threads(threads)


class _Answers:
    """Answers for users, a batch at a time."""

    def __init__(
        self, recommender: Recommender, candidates: np.ndarray, k: int, exclude_seen: bool, batch_users: int,
        at: float | None,
    ):  # fmt: skip
        self.recommender, self.candidates, self.k, self.exclude_seen = recommender, candidates, k, exclude_seen
        self._at = at
        self.index: ApproximateIndex | None = None
        self.sampled, self.overlap = 0, (0, 0)
        self._users_at_a_time = max(1, min(batch_users, ANSWERS_AT_A_TIME // min(k, len(candidates))))
        self._tokens = pa.array(recommender.vocabulary.items.tolist(), pa.string())

    def histories(self, rows: pa.Table) -> tuple[pa.Array, Histories]:
        """The users of a part in the order in which they first come, and their histories in the order of time."""
        encoded = rows.column("user").combine_chunks().dictionary_encode()
        users, of_user = encoded.dictionary, encoded.indices.to_numpy()
        times = rows.column("time").to_numpy() if "time" in rows.column_names else None
        order = np.argsort(of_user, kind="stable") if times is None else np.lexsort((times, of_user))
        ids = rows.column("item").to_numpy().astype(np.int64)[order]
        when = times if times is None else times[order]
        at = None if self._at is None else np.full(len(users), self._at)
        return users, histories_of(ids, of_user[order], len(users), when, self.recommender.time_columns, at)

    def of(self, users: pa.Array, histories: Histories) -> Iterator[tuple[pa.Table, int]]:
        """Tables of :data:`SCHEMA`, and how many items were read for each."""
        for begin in range(0, len(users), self._users_at_a_time):
            which = np.arange(begin, min(begin + self._users_at_a_time, len(users)))
            part = histories.take(which)
            ids, scores = self._top(part)
            row, place = np.nonzero(ids)
            arrays = [users.take(pa.array(begin + row)), self._tokens.take(pa.array(ids[row, place]))]
            arrays += [pa.array(scores[row, place]), pa.array((place + 1).astype(np.int32))]
            yield pa.Table.from_arrays(arrays, schema=SCHEMA), len(part.items)

    def _top(self, histories: Histories) -> tuple[np.ndarray, np.ndarray]:
        if self.index is None:
            return self.recommender.top(histories, self.k, self.exclude_seen, self.candidates)
        ids, scores = self.index.top(histories, self.k, self.exclude_seen)
        sample = np.flatnonzero(histories.lengths)[: SAMPLE - self.sampled]
        if len(sample):
            exact, _ = self.recommender.top(histories.take(sample), self.k, self.exclude_seen, self.candidates)
            found, there = overlap(ids[sample], exact)
            self.overlap = (self.overlap[0] + found, self.overlap[1] + there)
            self.sampled += len(sample)
        return ids, scores


def _read(
    interactions: Interactions, recommender: Recommender, place: Output, state: Progress, show_progress: bool
) -> None:
    """Put all rows into spills, from the row on where a run before has stopped."""
    pending: list[pa.RecordBatch] = []
    skip, count = state.rows, 0

    def spill() -> None:
        nonlocal pending, count
        with writing(place.spill(state.spills), REMEDY):
            write_spill(place.spill(state.spills), pa.Table.from_batches(pending), state.parts)
        state.rows, state.spills = state.rows + count, state.spills + 1
        place.save(state)
        pending, count = [], 0

    with _bar("reading", interactions.rows, " rows", show_progress) as bar:
        for rows in interactions.batches():
            bar.update(len(rows))
            rows = rows.slice(min(skip, batch_size := len(rows)))
            skip -= batch_size - len(rows)
            if not len(rows):
                continue
            items = rows.column("item").fill_null("").dictionary_encode()
            words = pd.Index(items.dictionary.to_numpy(zero_copy_only=False))
            ids = recommender.vocabulary.find(words)[items.indices.to_numpy()]
            unknown = np.flatnonzero(ids == 0)
            if len(unknown):
                state.unknown, state.example = (
                    state.unknown + len(unknown),
                    rows.column("item")[int(unknown[0])].as_py(),
                )
            state.columns = rows.schema.names
            pending.append(rows.set_column(1, "item", pa.array(ids.astype(np.int32))))
            count += len(rows)
            if count >= ROWS_OF_A_SPILL:
                spill()
        if count:
            spill()
    if not state.rows:
        raise UserError(f"{interactions.path} has no rows.")
    state.all_read = True
    place.save(state)


def _answer(answers: _Answers, place: Output, state: Progress, show_progress: bool) -> None:
    """Write each part that no run before has written."""
    spills = [place.spill(number) for number in range(state.spills)]
    users_answered, begun = 0, time.monotonic()
    with _bar("recommending", state.rows, " rows", show_progress) as bar:
        for number in range(state.parts):
            path = place.part(number)
            if path.exists():
                bar.update(counts_of(path)["read"])
                continue
            rows = read_part(spills, number, state.columns)
            users, histories = answers.histories(rows)
            answered = 0
            with writing(path, REMEDY), whole(path) as scratch, pa.parquet.ParquetWriter(scratch, SCHEMA) as writer:
                for table, items in answers.of(users, histories):
                    writer.write_table(table, ROW_GROUP)
                    answered += pc.sum(pc.equal(table.column("rank"), 1)).as_py() or 0
                    bar.update(items)
                about = {"users": len(users), "answered": answered, "read": len(rows)}
                writer.add_key_value_metadata({name: str(value) for name, value in about.items()})
            bar.update(len(rows) - len(histories.items))
            users_answered += len(users)
            bar.set_postfix_str(f"{users_answered / (time.monotonic() - begun):,.0f} users/s", refresh=False)


def _bar(description: str, total: int | None, unit: str, shown: bool) -> tqdm:
    # A file that the standard error goes to gets a line now and then.
    seconds = 0.5 if sys.stderr.isatty() else 10
    return tqdm(
        desc=description, total=total, unit=unit, unit_scale=True, disable=not shown, mininterval=seconds, leave=True
    )
