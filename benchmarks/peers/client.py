"""Our side: a peer's process, and the histories that it is given."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from recbole_ssm.errors import UserError

ROOT = Path(__file__).parents[2]
LOG_LINES = 12


@dataclass(frozen=True)
class Package:
    """A package whose SASRec is compared.

    Attributes:
        module: run in its environment, see :mod:`benchmarks.peers.serving`.
        contender: what the tables call it.
    """

    module: str
    contender: str


RECTOOLS = Package("benchmarks.peers.rectools", "SASRec, RecTools")
REPLAY = Package("benchmarks.peers.replay", "SASRec, RePlay")


def find_python(python: str) -> str:
    """Its place, whatever the current folder is.

    Raises:
        UserError: where there is none.
    """
    found = shutil.which(python)
    if found is None:
        raise UserError(f"{python} is no Python that can be run: give the bin/python of an environment with the peer.")
    return os.path.abspath(found)  # not resolved: a virtual environment's Python is a link, known by where that lies


class Peer:
    """Training steps of another package's SASRec, as large as RecBole's and on the same histories as ours.

    It is driven as :class:`benchmarks.speed.contenders.Steps` is, and ends with the ``with`` block.

    Args:
        package: which.
        python: of an environment that has it, from :func:`find_python`.
        config: RecBole's configuration of SASRec, whose sizes, dropout and learning rate the peer's model gets.
        train_data: our loader of SASRec in sequence mode.
        cuda: whether it is to train on a GPU.

    Attributes:
        steps: how many a call.
        batch: sequences a step.
        num_targets: how many targets the latest call has trained on.
        parameters: of its model, after the first call.
        versions: its package's and torch's.

    Raises:
        UserError: where the peer's process ends before it is told to.
    """

    unit = "sequences"

    def __init__(self, package: Package, python: str, config: Any, train_data: Any, cuda: bool):
        self.package, self.steps, self.batch = package, 1, 16
        self._python = python
        self._folder = tempfile.TemporaryDirectory()
        data = Path(self._folder.name, "histories.csv")
        write_histories(train_data, data)
        job = {
            "data": str(data), "items": train_data._dataset.item_num - 1, "cuda": cuda,
            "threads": torch.get_num_threads(), "seed": config["seed"], "hidden_size": config["hidden_size"],
            "inner_size": config["inner_size"], "n_layers": config["n_layers"], "n_heads": config["n_heads"],
            "dropout": config["hidden_dropout_prob"], "length": config["MAX_ITEM_LIST_LENGTH"],
            "learning_rate": config["learning_rate"],
        }  # fmt: skip
        # Another environment's packages are none of this one's.
        inherited = os.environ.get("PYTHONPATH") if python == sys.executable else None
        path = os.pathsep.join(filter(None, [str(ROOT), inherited]))
        self._log = Path(self._folder.name, "log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, "-m", package.module, json.dumps(job)],
                env={**os.environ, "PYTHONPATH": path}, cwd=self._folder.name, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        try:
            self.versions: dict[str, str] = self._answer()
        except UserError:
            self.close()
            raise

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def set_batch(self, batch: int) -> None:
        """Train with so many sequences a step from now on, a fresh model."""
        self.batch = batch

    def take(self) -> None:
        """Take the next steps.

        Raises:
            torch.OutOfMemoryError: where the peer's GPU has run out of memory.
        """
        self.peak()

    def peak(self) -> int | None:
        """Take them, and tell their peak memory, as :func:`benchmarks.measure.peak_bytes` does."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # that it has ended, the answer tells
            print(json.dumps({"batch": self.batch, "steps": self.steps}), file=self._process.stdin, flush=True)
        found = self._answer()
        if "out_of_memory" in found:
            raise torch.OutOfMemoryError(f"{self.package.contender} at {self.batch} sequences a step")
        self.num_targets, self.parameters = found["targets"], found["parameters"]
        return found["peak_bytes"]

    def close(self) -> None:
        """End its process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            end = "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            raise UserError(
                f"{self.package.contender} ended by itself; {self._python} must have it, "
                f"as docs/benchmarks.md tells. The end of what it said:\n{end}"
            )
        return json.loads(line)


def write_histories(train_data: Any, path: Path) -> None:
    """Write each user's training items in their order, as ``user``, ``item`` and ``timestamp``.

    The timestamp is the place in the history, by which ties stay in the order that ours are read in.
    """
    items = train_data._dataset.sorted_items.numpy()
    rows = [items[start : stop + 1] for start, stop in zip(train_data._start, train_data._stop, strict=True)]
    lengths = [len(row) for row in rows]
    table = {
        "user": np.repeat(np.arange(len(rows)), lengths),
        "item": np.concatenate(rows),
        "timestamp": np.concatenate([np.arange(length) for length in lengths]),
    }
    pd.DataFrame(table).to_csv(path, index=False)
