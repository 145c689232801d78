"""Interactions in any order, put by their users into parts that each fit into memory, in files on disk."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

SCHEMA = pa.schema([("user", pa.string()), ("item", pa.int32()), ("time", pa.float64())])
MOST_PARTS = np.iinfo(np.uint16).max


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` in one step when all is written, and is on the disk then."""
    scratch = path.with_name(f"{path.name}.writing")
    try:
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_spill(path: Path, rows: pa.Table, parts: int) -> None:
    """Write some interactions, part by part, each in the order in which they are given.

    The file begins with the places in it of all parts, int64 ``[parts + 1]``.

    Args:
        path: of the file.
        rows: with the columns of :data:`SCHEMA`, perhaps without times.
        parts: how many, at most :data:`MOST_PARTS`.
    """
    part = _parts_of(rows.column("user").combine_chunks(), parts)
    ordered = rows.take(pa.array(np.argsort(part, kind="stable"))).combine_chunks()
    ends = np.cumsum(np.bincount(part, minlength=parts))
    (batch,) = ordered.to_batches()
    places = np.zeros(parts + 1, np.int64)
    with whole(path) as scratch, scratch.open("wb") as file:
        file.write(places.tobytes())
        begin = 0
        for i, end in enumerate(ends.tolist()):
            places[i] = file.tell()
            if end > begin:
                file.write(batch.slice(begin, end - begin).serialize())
            begin = end
        places[parts] = file.tell()
        file.seek(0)
        file.write(places.tobytes())


def read_part(spills: Sequence[Path], part: int, columns: Sequence[str]) -> pa.Table:
    """One part's interactions of all spills, in the order in which they were written."""
    schema = pa.schema([SCHEMA.field(name) for name in columns])
    batches = []
    for path in spills:
        with path.open("rb") as file:
            file.seek(8 * part)
            begin, end = np.frombuffer(file.read(16), np.int64).tolist()
            if end > begin:
                file.seek(begin)
                batches.append(pa.ipc.read_record_batch(pa.py_buffer(file.read(end - begin)), schema))
    return pa.Table.from_batches(batches, schema)


def _parts_of(users: pa.Array, parts: int) -> np.ndarray:
    """The part of each user by a hash of the name, uint16 ``[n]``; the same in every process and on every machine."""
    encoded = users.dictionary_encode()
    names = encoded.dictionary.to_numpy(zero_copy_only=False)
    hashed = pd.util.hash_array(names, categorize=False) % np.uint64(parts)
    return hashed.astype(np.uint16)[encoded.indices.to_numpy()]
