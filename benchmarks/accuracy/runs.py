"""Runs of the study: what identifies one, how many are made at a time, and where their results are kept."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from benchmarks.speed.contenders import QUIET
from recbole_ssm import Config
from recbole_ssm.analysis import Ranks
from recbole_ssm.config import tuned_settings
from recbole_ssm.errors import UserError

ROOT = Path(__file__).parents[2]

# The set that RecBole ships, and looks for in its own folder.
SHIPPED = "ml-100k"


@dataclass(frozen=True)
class Spec:
    """One run to be made.

    Attributes:
        model: model name.
        dataset: dataset name.
        seed: seed of everything.
        settings: what is asked for beside the property files.
    """

    model: str
    dataset: str
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)

    def config(self, data_path: str | None = None, **places: Any) -> Config:
        """Its configuration."""
        if data_path is not None and self.dataset != SHIPPED:
            places["data_path"] = data_path
        return Config(self.model, self.dataset, config_dict={**QUIET, **places, "seed": self.seed, **self.settings})

    def resolved(self) -> "Spec":
        """The same run, with what was tuned for it among its settings."""
        if not self.settings.get("tuned", True):
            return self
        tuned = tuned_settings(self.model, self.dataset, self.settings.get("exclude_history", False))
        return replace(self, settings={**tuned, **self.settings, "tuned": False})

    def identity(self) -> str:
        """A name for what it computes: its settings above the defaults, whether they were tuned or are asked for.

        Of defaults that change, the commits of two rows tell.
        """
        settings = {key: value for key, value in self.resolved().settings.items() if key != "tuned"}
        text = json.dumps(settings, sort_keys=True)
        return f"{self.model}-{self.dataset}-{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def command(self) -> str:
        """What repeats it."""
        words = [f"--model={self.model}", f"--dataset={self.dataset}", f"--seed={self.seed}"]
        return " ".join(["run_recbole", *words, *self._words("--")])

    def __str__(self) -> str:
        return " ".join([self.model, self.dataset, f"seed {self.seed}", *self._words("")])

    def _words(self, prefix: str) -> list[str]:
        return [f"{prefix}{key}={_word(value)}" for key, value in self.settings.items()]


def _word(value: Any) -> str:
    text = "~" if value is None else str(value).replace(" ", "")
    return f'"{text}"' if set(text) & set("{}[]()'*") else text


class Store:
    """Results in ``<name>.jsonl``, a line a run, and each run's ranks in ``<name>-ranks/``.

    Several commands may add to one store at a time.

    Args:
        file: the JSON lines; made with its folder where it is missing.

    Raises:
        UserError: for a line that is broken.
    """

    def __init__(self, file: Path):
        self.file, self.ranks = file, file.with_name(f"{file.stem}-ranks")
        self.rows = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        rows = {}
        for number, line in enumerate(self.file.read_text().splitlines() if self.file.exists() else [], 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{self.file}, line {number} is no JSON ({error}): remove the line.") from error
            rows[row["id"]] = row
        return rows

    def add(self, row: dict[str, Any], ranks: Path | None) -> None:
        """Keep a run; the file is written anew and moved into place, so that a kill leaves the old or the new one."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.file.with_suffix(".lock")):
            if ranks is not None:
                self.ranks.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ranks, self.ranks / f"{row['id']}.npz")
            self.rows = {**self._read(), row["id"]: row}
            scratch = self.file.with_suffix(".partial")
            scratch.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()))
            scratch.replace(self.file)

    def of(self, specs: Iterable[Spec]) -> list[dict[str, Any]]:
        """Rows of those runs that were made, in the order of ``specs``."""
        return [self.rows[name] for name in dict.fromkeys(spec.identity() for spec in specs) if name in self.rows]

    def seeds(self) -> list[int]:
        """All seeds of any run."""
        return sorted({row["seed"] for row in self.rows.values()})

    def read_ranks(self, identity: str, protocol: str) -> Ranks:
        """Ranks of a run's test targets; those past the largest k count as infinitely far behind.

        Raises:
            UserError: where they are missing.
        """
        file = self.ranks / f"{identity}.npz"
        if not file.exists():
            raise UserError(f"{file} is missing: copy it from where the run was made, or remove its row and run again.")
        with np.load(file) as held:
            rank = held[protocol].astype(np.int64)
            rank[rank == 0] = np.iinfo(np.int64).max - 1
            return Ranks(held["users"].astype(np.int64), held["lengths"].astype(np.int64), rank)

    def user_scores(self, rows: Iterable[dict[str, Any]], protocol: str, metric: str) -> np.ndarray:
        """``ndcg@k`` or ``recall@k`` of each user in each run of ``rows``, ``[S, N]``."""
        name, k = metric.split("@")
        ranks = [self.read_ranks(row["id"], protocol) for row in rows]
        return np.stack([own.ndcg(int(k)) if name == "ndcg" else own.ranks <= int(k) for own in ranks])


def run_all(specs: Iterable[Spec], store: Store, work: Path, data_path: str | None, jobs: int) -> None:
    """Make every run that the store lacks, ``jobs`` at a time with an equal share of the cores each.

    ``OMP_NUM_THREADS`` sets the threads of each run where it is set.

    A run is a process of its own in ``work/<identity>``, where its log and checkpoint stay; one that was killed goes on
    from there when it is asked for again. A run that fails is reported and left out.

    Args:
        specs: the runs, most wanted first.
        store: where their rows go.
        work: folder of the runs' own folders.
        data_path: folder that holds the datasets.
        jobs: how many runs at a time.
    """
    named = {spec.identity(): spec for spec in specs}
    missing = {name: spec for name, spec in named.items() if name not in store.rows}
    print(f"{len(named)} runs, {len(named) - len(missing)} of them made before", flush=True)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // jobs))
    begin, made, failed = time.monotonic(), 0, 0

    def make(spec: Spec) -> Path:
        folder = write_task(work, spec, data_path)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
        with open(folder / "log.txt", "a") as log:
            command = [sys.executable, "-m", "benchmarks.accuracy.worker", str(folder)]
            subprocess.run(command, cwd=ROOT, env=environment, stderr=log, check=True)
        return folder

    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(make, spec): spec for spec in missing.values()}
        try:
            for done in as_completed(waiting):
                try:
                    folder = done.result()
                except subprocess.CalledProcessError as error:
                    failed += 1
                    log = Path(error.cmd[-1]) / "log.txt"
                    print(f"failed: {waiting[done]}; {log} ends: {_last_line(log)}", flush=True)
                    continue
                store.add(json.loads((folder / "row.json").read_text()), folder / "ranks.npz")
                made += 1
                minutes = (time.monotonic() - begin) / 60
                left = minutes / made * (len(missing) - made - failed)
                print(f"{made} of {len(missing)} made in {minutes:.0f} min, {left:.0f} more", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        print(f"{failed} runs failed; the same command tries them again", flush=True)


def write_task(work: Path, spec: Spec, data_path: str | None) -> Path:
    """Make a run's folder, which tells the worker what to do."""
    folder = work / spec.identity()
    folder.mkdir(parents=True, exist_ok=True)
    # With what is tuned now; the files may have changed when the worker reads them.
    settings = spec.resolved().settings
    task = {"spec": asdict(spec), "settings": settings, "id": folder.name, "data_path": data_path}
    (folder / "task.json").write_text(json.dumps(task))
    return folder


def _last_line(log: Path) -> str:
    lines = log.read_text().strip().splitlines()
    return lines[-1] if lines else "with nothing"
