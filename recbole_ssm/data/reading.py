"""Atomic files read so that every row counts: each line is a row of what is read, or the file is refused."""

import codecs
import csv
import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
from recbole.utils.enum_type import FeatureType

from recbole_ssm.errors import UserError

HEADER_EXAMPLE = "user_id:token<TAB>item_id:token<TAB>timestamp:float"

# What a column is read as: numbers, numbers whose whole ones stay whole (float64 does not hold a clock in nanoseconds),
# names, or names that are kept once each.
NUMBERS, EXACT_NUMBERS, NAMES, REPEATED_NAMES = "numbers", "exact numbers", "names", "repeated names"

# What RecBole's reader takes for a number that is missing. Of a name an empty cell alone is missing.
MISSING_NUMBERS = [
    "", "NA", "N/A", "n/a", "<NA>", "#NA", "#N/A", "#N/A N/A", "NULL", "null", "None", "NaN", "-NaN", "nan", "-nan",
    "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN",
]  # fmt: skip

LARGEST_NUMBER = float(np.finfo(np.float32).max)  # numbers become float32 in a batch

BYTES_AT_A_TIME = 1 << 22

# Before 3.1 pandas rounded a number's last digit otherwise, unless it was asked not to.
_EXACTLY: dict[str, Any] = {}
if tuple(int(part) for part in pd.__version__.split(".")[:2]) < (3, 1):
    _EXACTLY["float_precision"] = "round_trip"

_DATE = re.compile(r"\d+[-/.]\d+[-/.]\d+|\d:\d\d")

# What may stand for a separator of several bytes while a file is read.
STAND_INS = [bytes([code]) for code in range(1, 32) if code not in b"\n\r"]


def separator(config: Any, setting: str) -> str:
    """What ``field_separator`` or ``seq_separator`` says, also where a shell left the backslash of a tab in it.

    Raises:
        UserError: where that is nothing, or ends a line.
    """
    found = "" if config[setting] is None else str(config[setting]).replace("\\t", "\t")
    if not found or set(found) & set("\r\n\0"):
        raise UserError(f"{setting} is {config[setting]!r}: set it to what stands between, such as '\\t'.")
    return found


def file_format(config: Any) -> tuple[str, str]:
    """How a dataset's files are written: what stands between their cells, and their encoding."""
    return separator(config, "field_separator"), config["encoding"] or "utf-8"


def columns_of(path: Path, header: str, separator: str, between: str | None = None) -> dict[str, FeatureType]:
    """Each column's type by its name, of a file's first line.

    Args:
        path: of the file.
        header: the line.
        separator: what stands between the columns.
        between: what stands there now, where that is a stand-in for it.

    Raises:
        UserError: for a line that is empty, or no such header.
    """
    header = header.rstrip("\r\n")
    if not header:
        raise UserError(f"{path} is empty: its first line should read like {HEADER_EXAMPLE}.")
    columns: dict[str, FeatureType] = {}
    types = {ftype.value: ftype for ftype in FeatureType}
    for column in header.split(between or separator):
        name, _, ftype = column.partition(":")
        if not name or ftype not in types:
            raise UserError(
                f"{path} has a bad header: column {column!r} should be name:type with a type of "
                f"{', '.join(types)}, separated by {separator!r} (field_separator), such as {HEADER_EXAMPLE}."
            )
        if name in columns:
            raise UserError(f"{path} has two columns {name}: give each a name of its own.")
        columns[name] = types[ftype]
    return columns


class AtomicFile:
    """One atomic file: a header of cells ``name:type``, then a row a line.

    A cell is what stands between two separators, its spaces and quotes included. Blank lines hold no row.

    Args:
        path: the file.
        separator: what stands between cells, literally.
        encoding: a codec of Python's; a byte order mark is no part of the first name.

    Attributes:
        columns: each column's type by its name, in the order of the file.

    Raises:
        UserError: for a file that is empty, is not in this encoding or has no such header.
    """

    def __init__(self, path: Path, separator: str, encoding: str = "utf-8"):
        self.path = path
        self._separator, self._converted = separator.encode(), None
        try:
            if codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig") or len(self._separator) > 1:
                self._converted = self._for_pandas(encoding)
        except LookupError as error:
            raise UserError(f"encoding is {encoding!r}, which is none of Python's for text: name another.") from error
        with self._open() as file:
            line = file.readline()
        self._check_text(line, 1)
        header = line.removeprefix(codecs.BOM_UTF8).decode()
        self.columns = columns_of(path, header, separator, self._separator.decode())

    def read(self, kinds: Mapping[str, str]) -> pd.DataFrame:
        """The columns that ``kinds`` names, each as the kind that it gives; a row's index is its line, counted from 0.

        Raises:
            UserError: for a row with more or fewer cells than the header, and a cell that is not of its column's kind.
        """
        count, blank = self._check_rows()
        if count == len(blank):
            raise UserError(f"{self.path} has a header but no rows.")
        numbers = [name for name, kind in kinds.items() if kind in (NUMBERS, EXACT_NUMBERS)]
        # As objects, for pandas' own categories are numbers where all look like numbers: 01 would be 1.
        dtypes = {name: "object" for name in kinds if name not in numbers}
        try:
            # Numbers as they are found, for pandas makes some of True and False where it is told that they are numbers.
            table = self._parse(list(kinds), dtypes, count, blank)
            if any(table[name].dtype.kind not in "iuf" for name in numbers):
                self._refuse_words(numbers, count, blank)
                table = self._parse(list(kinds), {**dtypes, **dict.fromkeys(numbers, "float64")}, count, blank)
        except UserError:
            raise
        except (ValueError, OverflowError) as error:
            raise UserError(f"{self.path} cannot be read: {error}.") from error
        for name in numbers:
            self._refuse(name, table[name].abs() > LARGEST_NUMBER, table[name], "no number that float32 holds")
            if kinds[name] == NUMBERS:
                table[name] = table[name].astype("float64")
        for name in kinds:
            if kinds[name] == REPEATED_NAMES:
                codes, categories = pd.factorize(table[name])
                table[name] = pd.Categorical.from_codes(codes, categories)
        return table

    def lists(self, name: str, cells: pd.Series, separator: str) -> pd.Series:
        """The lists that the cells of a column hold, by RecBole's rule: an empty cell is an empty list.

        Raises:
            UserError: for a list of numbers that holds anything else.
        """
        parts = [[part for part in cell.split(separator) if part] for cell in cells]
        if self.columns[name] == FeatureType.TOKEN_SEQ:
            rows = [np.array(row, dtype=str) for row in parts]
        else:
            wrong = [not all(map(_is_finite, row)) for row in parts]
            self._refuse(name, pd.Series(wrong, cells.index), cells, "no list of numbers")
            rows = [np.array(row, dtype=np.float64) for row in parts]
        return pd.Series(rows, cells.index, dtype=object)

    def _for_pandas(self, encoding: str) -> bytes:
        """The content in UTF-8 with a separator of one byte, as pandas' compiled reader wants it."""
        content = self.path.read_bytes()
        try:
            content = content.decode(encoding).encode()
        except UnicodeError as error:
            raise UserError(f"{self.path} is not in {encoding} ({error}): set --encoding to what it is in.") from error
        if len(self._separator) > 1:
            stand_in = next((byte for byte in STAND_INS if byte not in content), None)
            if stand_in is None:
                raise UserError(f"{self.path} holds every control character: separate its cells by a single character.")
            content, self._separator = content.replace(self._separator, stand_in), stand_in
        return content

    def _open(self) -> BinaryIO:
        return open(self.path, "rb") if self._converted is None else io.BytesIO(self._converted)

    def _check_text(self, lines: bytes, first: int) -> None:
        """Refuse what pandas would cut or take for a line's end, in whole lines of which the first has this number."""
        if not lines.isascii():
            try:
                lines.decode()
            except UnicodeDecodeError as error:
                line = first + lines.count(b"\n", 0, error.start)
                raise UserError(
                    f"{self.path} is not in UTF-8 (line {line}: {error}): convert it, or set --encoding."
                ) from error
        if b"\0" in lines or lines.count(b"\r") != lines.count(b"\r\n"):
            found = re.search(rb"\0|\r(?!\n)", lines)
            assert found is not None
            line = first + lines.count(b"\n", 0, found.start())
            name = "a NUL byte" if found[0] == b"\0" else "a carriage return that ends no line"
            raise UserError(f"{self.path} holds {name} in line {line}: take it out.")

    def _check_rows(self) -> tuple[int, list[int]]:
        """How many lines follow the header, and which of them, counted from 0, are blank.

        pandas would fill up a row of too few cells, and cut one of too many.
        """
        newline, separator, cells = ord("\n"), ord(self._separator), len(self.columns)
        blank: list[int] = []
        count = 0
        with self._open() as file:
            file.readline()
            while lines := file.read(BYTES_AT_A_TIME) + file.readline():
                self._check_text(lines, count + 2)
                lines = lines if lines.endswith(b"\n") else lines + b"\n"
                content = np.frombuffer(lines, np.uint8)
                borders = content[(content == newline) | (content == separator)]
                row = [separator] * (cells - 1) + [newline]
                if len(borders) % cells == 0 and (borders.reshape(-1, cells) == row).all():
                    count += len(borders) // cells
                    continue
                for line in lines.split(b"\n")[:-1]:
                    found = line.count(self._separator) + 1
                    if not line.rstrip(b"\r"):
                        blank.append(count)
                    elif found != cells:
                        raise UserError(
                            f"{self.path} has {found} cells in line {count + 2}, not {cells} as in its header: "
                            "mend the row."
                        )
                    count += 1
        return count, blank

    def _parse(self, names: list[str], dtypes: dict[str, str], count: int, blank: list[int]) -> pd.DataFrame:
        missing = {name: MISSING_NUMBERS for name, ftype in self.columns.items() if ftype == FeatureType.FLOAT}
        missing |= {name: [""] for name, ftype in self.columns.items() if ftype == FeatureType.TOKEN}
        with self._open() as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", pd.errors.DtypeWarning)  # of numbers beside words, which are refused
            table = pd.read_csv(
                file,
                sep=self._separator.decode(),
                header=None,
                names=list(self.columns),
                index_col=False,
                usecols=names,
                dtype=dtypes,
                skiprows=[0, *(line + 1 for line in blank)],
                skip_blank_lines=False,
                quoting=csv.QUOTE_NONE,
                keep_default_na=False,
                na_values=missing,
                **_EXACTLY,
            )
        lines = pd.RangeIndex(count).delete(blank)
        if len(table) != len(lines):
            raise ValueError(f"pandas found {len(table)} of its {len(lines)} rows")
        return table.set_axis(lines)

    def _refuse_words(self, numbers: list[str], count: int, blank: list[int]) -> None:
        table = self._parse(numbers, dict.fromkeys(numbers, "object"), count, blank)
        for name in numbers:
            cells = table[name].dropna()
            self._refuse(name, ~cells.map(_is_number).astype(bool), cells, "no number")

    def _refuse(self, name: str, wrong: pd.Series, cells: pd.Series, what: str) -> None:
        if wrong.any():
            cell = str(cells[wrong].iloc[0])
            remedy = "write dates as seconds since 1970" if _DATE.search(cell) else "mend the cell, or leave it empty"
            raise UserError(
                f"{self.path} cannot be read: line {first_line(wrong)} has {cell:.100} in column "
                f"{name}:{self.columns[name].value}, which is {what}; {remedy}."
            )


def first_line(rows: pd.Series) -> int:
    """Number of the line in which the first of some rows of :meth:`AtomicFile.read` stands."""
    return int(rows.index[rows].min()) + 2


def _is_number(cell: str) -> bool:
    try:
        number = float(cell)
    except ValueError:
        return False
    return number == number and "_" not in cell and cell.isascii()  # what Python alone takes, pandas does not


def _is_finite(cell: str) -> bool:
    return _is_number(cell) and abs(float(cell)) <= LARGEST_NUMBER
