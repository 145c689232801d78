"""Interactions read from files a batch at a time, however large: RecBole's atomic files, CSV and Parquet."""

import csv
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from recbole_ssm.data.reading import MISSING_NUMBERS, columns_of
from recbole_ssm.errors import UserError

SCHEMA = pa.schema([("user", pa.string()), ("item", pa.string()), ("time", pa.float64())])
TEXT_AT_A_TIME, ROWS_AT_A_TIME = 1 << 22, 1 << 17
KINDS = (".inter", ".csv", ".parquet")
BYTES_OF_A_ROW = 32  # what a row of Parquet counts in `size`


@dataclass(frozen=True)
class Interactions:
    """Rows of users, items and perhaps times, in a file or a folder of Parquet files.

    Args:
        path: of a file ``.inter``, ``.csv`` or ``.parquet``, or a folder that holds some ``.parquet``, which are read
            in the order of their names.
        fields: names of the columns of users, items and times.
        wants_time: whether times must be there.
        separator: what stands between the cells of an atomic file.
        encoding: of an atomic file; a CSV file is in UTF-8.

    Raises:
        UserError: for a file that is missing, of another kind, or without these columns; for files of which some alone
            have times, and a separator of several bytes, by which files are not read a batch at a time.
    """

    path: Path
    fields: tuple[str, str, str]
    wants_time: bool = False
    separator: str = "\t"
    encoding: str = "utf-8"

    def __post_init__(self):
        if self.path.is_dir():
            others = sorted({file.name for file in self.path.iterdir()} - {file.name for file in self.files})
            if others := [name for name in others if not name.startswith((".", "_"))]:  # as other programs mark theirs
                logging.getLogger().warning(f"{self.path} holds more that is not read: {', '.join(others)}")
        with_time = set()
        for file in self.files:
            names, types = self._names(file)
            self._check_names(file, names, types)
            with_time.add(self.fields[2] in names)
        if len(with_time) > 1:
            raise UserError(f"some files of {self.path} have a column {self.fields[2]!r}, and some not: mend them.")

    @property
    def files(self) -> list[Path]:
        """In the order in which they are read."""
        if self.path.is_dir():
            files = sorted(file for file in self.path.iterdir() if file.suffix in KINDS)
            if not files:
                raise UserError(f"{self.path} holds no file .inter, .csv or .parquet.")
            return files
        if not self.path.is_file():
            raise UserError(f"{self.path} not found.")
        if self.path.suffix not in KINDS:
            raise UserError(f"{self.path} is of no kind that is known: give a file .inter, .csv or .parquet.")
        return [self.path]

    @property
    def rows(self) -> int | None:
        """How many there are, where that is known beforehand."""
        if any(file.suffix != ".parquet" for file in self.files):
            return None
        return sum(_opened(file).metadata.num_rows for file in self.files)

    @property
    def size(self) -> int:
        """Bytes of text, or as many as text would have."""
        rows = self.rows
        return sum(file.stat().st_size for file in self.files) if rows is None else rows * BYTES_OF_A_ROW

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows in order, users and items as text; without the column ``time`` where there is none.

        Raises:
            UserError: for a line that is broken, a row without a user, and a time that is no finite number.
        """
        for file in self.files:
            before = 0
            try:
                for batch in self._parquet(file) if file.suffix == ".parquet" else self._text(file):
                    self._check(file, batch, before)
                    before += len(batch)
                    yield batch
            except (pa.ArrowException, OSError, UnicodeError) as error:
                raise _unreadable(file, error) from error

    def _names(self, file: Path) -> tuple[list[str], dict[str, Any]]:
        """Names of a file's columns, and their types where it has some."""
        try:
            if file.suffix == ".parquet":
                schema = _opened(file).schema_arrow
                return schema.names, dict(zip(schema.names, schema.types, strict=True))
            if file.suffix == ".inter":
                if len(self.separator.encode()) > 1:
                    raise UserError(
                        f"{file} is separated by {self.separator!r} (field_separator), of more than a byte: give the "
                        "same rows as .csv or .parquet."
                    )
                with file.open(encoding=self.encoding, newline="\n") as lines:
                    header = lines.readline().removeprefix("\ufeff")
                return list(columns_of(file, header, self.separator)), {}
            with file.open(encoding="utf-8-sig", newline="") as lines:
                return next(csv.reader(lines), []), {}
        except (pa.ArrowException, OSError, UnicodeError, LookupError, csv.Error) as error:
            raise _unreadable(file, error) from error

    def _check_names(self, file: Path, names: list[str], types: dict[str, Any]) -> None:
        *needed, time = self.fields
        for field in [*needed, time] if self.wants_time else needed:
            if field not in names:
                has = f"it has {', '.join(names)}" if names else "it is empty"
                why = ", which this model reads" if field == time else ""
                raise UserError(f"{file} has no column {field!r}{why}: {has}.")
        for field in self.fields:
            if names.count(field) > 1:
                raise UserError(f"{file} has two columns {field!r}: give each a name of its own.")
            kind = types.get(field)
            if isinstance(kind, pa.DictionaryType):
                kind = kind.value_type
            numbers = kind is None or pa.types.is_integer(kind)
            words = kind is None or pa.types.is_string(kind) or pa.types.is_large_string(kind)
            if field == time and not (numbers or pa.types.is_floating(kind)):
                raise UserError(f"{file} has {kind} in the column {field!r}: times are to be numbers, such as seconds.")
            if field != time and not (numbers or words):
                raise UserError(f"{file} has {kind} in the column {field!r}: names are to be text or whole numbers.")

    def _read(self, names: list[str]) -> list[str]:
        return [field for field in self.fields if field in names]

    def _text(self, file: Path) -> Iterator[pa.RecordBatch]:
        """Names as they stand: no cell of an atomic file is quoted, and 01 is not 1."""
        names, _ = self._names(file)
        atomic, read = file.suffix == ".inter", self._read(names)
        stream = pa.csv.open_csv(
            file,
            pa.csv.ReadOptions(
                block_size=TEXT_AT_A_TIME,
                column_names=names if atomic else None,
                skip_rows=1 if atomic else 0,
                encoding=self.encoding if atomic else "utf-8",
            ),
            pa.csv.ParseOptions(
                delimiter=self.separator if atomic else ",",
                quote_char=False if atomic else '"',
                newlines_in_values=not atomic,
            ),
            pa.csv.ConvertOptions(
                include_columns=read,
                column_types=dict(zip(self.fields, SCHEMA.types, strict=True)),
                null_values=MISSING_NUMBERS,
                strings_can_be_null=False,
            ),
        )
        for batch in stream:
            yield pa.record_batch(batch.columns, schema=_schema(len(read)))

    def _parquet(self, file: Path) -> Iterator[pa.RecordBatch]:
        opened = _opened(file)
        read = self._read(opened.schema_arrow.names)
        for batch in opened.iter_batches(ROWS_AT_A_TIME, columns=read):
            schema = _schema(len(read))
            columns = [_plain(batch.column(name)).cast(kind) for name, kind in zip(read, schema.types, strict=True)]
            yield pa.record_batch(columns, schema=schema)

    def _check(self, file: Path, batch: pa.RecordBatch, before: int) -> None:
        users = batch.column("user")
        unnamed = pc.fill_null(pc.equal(pc.binary_length(users), 0), True)
        wrong = {f"no {self.fields[0]}": unnamed.to_numpy(zero_copy_only=False)}
        if "time" in batch.schema.names:
            times = batch.column("time").to_numpy(zero_copy_only=False)
            wrong[f"no finite number as {self.fields[2]}"] = ~np.isfinite(times)
        for what, rows in wrong.items():
            if rows.any():
                raise UserError(f"{file} has {what} in row {before + int(rows.argmax()) + 1}: mend the row.")


def _schema(columns: int) -> pa.Schema:
    return pa.schema([SCHEMA.field(i) for i in range(columns)])


def _plain(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column


def _opened(file: Path) -> pa.parquet.ParquetFile:
    try:
        return pa.parquet.ParquetFile(file, buffer_size=1 << 20)  # else all of a column chunk is read at once
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> UserError:
    about = " ".join(str(error).split())[:300]
    is_time = "conversion error to double" in about
    remedy = "write times as numbers, such as seconds since 1970" if is_time else "mend it, or give another"
    return UserError(f"{file} cannot be read ({about}): {remedy}.")
