"""The output of recommendations for everyone, and the folder in which it is made.

The folder ``<output>.partial`` stands beside it until all is done::

    lock            held by the run that writes it
    state.json      what the run is of, and how much of the input has been read
    spills/         what has been read
    parts/          the parts that are answered
    before/         the folder that is being replaced

Whatever ``state.json`` tells of is there: it is the first to go.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet

from recbole_ssm.checkpoint import lock
from recbole_ssm.errors import UserError
from recbole_ssm.places import check_file, check_folder, writing
from recbole_ssm.serving.partition import whole

SCHEMA = pa.schema([("user", pa.string()), ("item", pa.string()), ("score", pa.float32()), ("rank", pa.int32())])
ROW_GROUP = 1 << 20
OF_OTHER_KINDS = {".csv", ".tsv", ".txt", ".json", ".inter", ".feather"}

REMEDY = "make room there, or choose another --output; given again, the same command goes on where it was"


@dataclass
class Progress:
    """What ``state.json`` holds: the job, into how many parts its users go, and what has been read of the input."""

    job: dict[str, Any]
    parts: int
    spills: int = 0
    rows: int = 0
    unknown: int = 0  # rows whose item the model does not know
    example: str = ""  # such an item
    columns: list[str] = field(default_factory=list)
    all_read: bool = False


class Output:
    """The output, and the folder in which it is made.

    Args:
        output: a file of Parquet, or a folder of such.
        read: files and folders that the run reads.

    Raises:
        UserError: where it would replace anything but recommendations, or be among what is read.
        CannotWrite: where it cannot be written.
    """

    def __init__(self, output: str | Path, read: Iterable[Path] = ()):
        self.output = Path(output)
        if not self.output.name:
            raise UserError(f"output is {str(output)!r}: name a file, or a folder with / at its end.")
        self.scratch = self.output.with_name(f"{self.output.name}.partial")
        self.parts, self._progress = self.scratch / "parts", self.scratch / "state.json"
        self._before = self.scratch / "before"
        self.is_folder = str(output).endswith(("/", os.sep)) or self.output.is_dir() or self._before.is_dir()
        self._check_apart({path.resolve() for path in read})
        if self.output.suffix in OF_OTHER_KINDS:
            raise UserError(f"output is {str(output)!r}, but it is written as Parquet: name a file .parquet.")
        if self.is_folder:
            check_folder(self.output.parent, "choose another --output")
            if self.output.exists() and (not self.output.is_dir() or not self._holds_parts()):
                raise UserError(
                    f"{self.output} holds other files than parts of recommendations: name another --output."
                )
        else:
            if self.output.exists() and not _replaceable(self.output):
                raise UserError(f"{self.output} is there, and holds no recommendations: name another --output.")
            check_file(self.output, "choose another --output")

    def _check_apart(self, read: set[Path]) -> None:
        place = self.output.resolve()
        replaced = {place, self.scratch.resolve()} & read.union(*(path.parents for path in read))
        if replaced or (place.parent in read and place.suffix == ".parquet"):
            raise UserError(
                f"{self.output} would replace the input, or be read as a part of it: name another --output."
            )

    def _holds_parts(self) -> bool:
        return all(file.match("part-*.parquet") and _replaceable(file) for file in self.output.iterdir())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs away. What fails before there is anything to go on with leaves no folder behind."""
        check_folder(self.scratch, "choose another --output")
        with (self.scratch / "lock").open("ab") as file:
            # A run that ended since it was opened has removed the file, which then keeps nobody away.
            if not lock(file) or not _stands(file):
                raise UserError(f"another run writes {self.output}: wait for it, or name another --output.")
            try:
                yield
            except Exception:
                if not self._progress.exists():
                    shutil.rmtree(self.scratch, ignore_errors=True)
                raise

    def begin(self, job: dict[str, Any], parts: int) -> Progress:
        """Where a run of the same job stopped, or a new one."""
        if self._before.exists() and not self.output.exists():
            with writing(self.output, REMEDY):
                os.replace(self._before, self.output)
        state = None
        try:
            state = Progress(**json.loads(self._progress.read_text()))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError):
            logging.getLogger().warning(f"{self._progress} is damaged: starting anew")
        if state is not None and state.job != job:
            other = ", ".join(sorted(key for key in job if state.job.get(key) != job[key]))
            logging.getLogger().warning(f"{self.scratch} is of another run (other {other}): starting anew")
            state = None
        if state is None:
            state = Progress(job, max(1, parts))
            self._progress.unlink(missing_ok=True)
            for path in self.scratch.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
        else:
            done = sum(self.part(number).exists() for number in range(state.parts))
            logging.getLogger().info(f"going on with {self.scratch}: {state.rows} rows read, {done} parts answered")
        with writing(self.scratch, REMEDY):
            self.parts.mkdir(exist_ok=True)
            (self.scratch / "spills").mkdir(exist_ok=True)
        return state

    def save(self, state: Progress) -> None:
        """Note how far reading has come."""
        with writing(self._progress, REMEDY), whole(self._progress) as scratch:
            scratch.write_text(json.dumps(asdict(state)))

    def spill(self, number: int) -> Path:
        """The file of a spill."""
        return self.scratch / "spills" / f"{number:06}"

    def part(self, number: int) -> Path:
        """The file of a part's answers."""
        return self.parts / f"part-{number:05}.parquet"

    def finish(self) -> dict[str, int]:
        """Put the parts where the output is to be, and remove the rest.

        Returns:
            How many ``users``, ``answered`` and ``rows`` there are.
        """
        files = sorted(self.parts.iterdir())
        counts = [counts_of(file) for file in files]
        rows = sum(pa.parquet.read_metadata(file).num_rows for file in files)
        with writing(self.output, REMEDY):
            if self.is_folder:
                shutil.rmtree(self._before, ignore_errors=True)
                if self.output.exists():
                    os.replace(self.output, self._before)
                os.replace(self.parts, self.output)
            else:
                with whole(self.scratch / "all") as scratch, pa.parquet.ParquetWriter(scratch, SCHEMA) as writer:
                    for file in files:
                        for batch in pa.parquet.ParquetFile(file, buffer_size=1 << 20).iter_batches(ROW_GROUP):
                            writer.write_batch(batch, ROW_GROUP)
                os.replace(self.scratch / "all", self.output)
        self._progress.unlink(missing_ok=True)
        shutil.rmtree(self.scratch, ignore_errors=True)  # Windows keeps the lock, which is open
        return {name: sum(count[name] for count in counts) for name in ("users", "answered")} | {"rows": rows}


def _stands(file: IO[bytes]) -> bool:
    """Whether a file that is open is still the one of its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        return False


def _replaceable(file: Path) -> bool:
    """Whether there is nothing in it, or recommendations."""
    try:
        return file.is_file() and (not file.stat().st_size or pa.parquet.read_schema(file).equals(SCHEMA))
    except (pa.ArrowException, OSError):
        return False


def counts_of(part: Path) -> dict[str, int]:
    """What a part's file says of itself: its users, those answered, and the interactions read."""
    metadata = pa.parquet.read_metadata(part).metadata
    return {name: int(metadata[name.encode()]) for name in ("users", "answered", "read")}
