"""``python -m tests.fuzz.campaign --kind checkpoint --count 10000``: many changed files, and what becomes of each.

Cases run in batches, each in a process of its own, so that one that dies is counted and named, and the batch goes on
behind it. A batch is made anew by its ``--seed``; files of what went wrong are kept in ``--folder``, and a campaign
that was ended goes on with what it has left there.
"""

import argparse
import copy
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from .watch import BAD, GOOD

BATCH = 1000
# Seconds without a sign of life, after which a batch's process is killed: PATIENCE is of its own time, and this is
# for what no signal interrupts.
SILENCE = 300
# Bytes that a case may ask for beside what the process has: a checkpoint of a few kB has no use for more.
ROOM = 3 << 30


def run_batch(kind: str, count: int, seed: int, skip: int, log: Path, absurd: bool) -> None:
    """Run ``count`` cases in the working directory but the first ``skip``, and write a line a case to ``log``."""
    import torch
    import yaml
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    torch.set_num_threads(1)
    warnings.filterwarnings("error", module="recbole_ssm")  # as in the tests
    psutil.cpu_percent = lambda *_, **__: 0.0  # which RecBole waits a second for after each run
    read = lru_cache(maxsize=None)(yaml.load)
    yaml.load = lambda text, Loader: copy.deepcopy(read(text, Loader))  # of the same property files each time
    sys.argv = ["fuzz"]
    if kind == "checkpoint":
        from . import checkpoints as module
    elif kind == "inter":
        from . import interactions as module  # type: ignore[no-redef]
    else:
        from . import settings as module  # type: ignore[no-redef]
    bases = module.Bases()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    number, current = -1, Path("current.case")

    @seeded(seed)
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=HealthCheck
    )
    @given(module.cases(bases, absurd))
    def one(case: Any) -> None:
        nonlocal number
        number += 1
        if number < skip:
            return
        current.write_bytes(case.data)
        with log.open("a") as file:
            file.write(json.dumps({"case": number, "kind": case.kind, "begun": True}) + "\n")
        outcome = module.check(case, bases)
        if outcome.word in BAD:
            shutil.copy(current, log.with_name(f"{log.stem}-{number}.case"))
        with log.open("a") as file:
            made = {name: value for name, value in vars(case).items() if name != "data"}
            line = {"case": number, **made, "word": outcome.word, "by_name": outcome.by_name, "detail": outcome.detail}
            file.write(json.dumps(line, default=repr) + "\n")
        for folder in ("log", "saved", "log_tensorboard"):
            shutil.rmtree(folder, ignore_errors=True)

    one()


def lines_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def supervise(kind: str, count: int, seed: int, folder: Path, absurd: bool) -> list[dict[str, Any]]:
    """Run a batch to its end, however often it dies; returns a line a case."""
    log = folder / f"{kind}-{seed}.jsonl"
    found = lines_of(log)  # of a campaign that was ended: it goes on where that was
    skip = found[-1]["case"] + ("word" in found[-1]) if found else 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), environment.get("PYTHONPATH", "")])
    while True:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            environment["TMPDIR"] = scratch  # to which a case may write, as the working directory
            batch = [
                f"--batch={skip}",
                f"--kind={kind}",
                f"--count={count}",
                f"--seed={seed}",
                f"--log={log.resolve()}",
            ]
            command = [sys.executable, "-m", "tests.fuzz.campaign", *batch, *(["--absurd"] if absurd else [])]
            with (folder / f"{kind}-{seed}.err").open("wb") as errors:
                child = subprocess.Popen(command, cwd=scratch, env=environment, stdout=errors, stderr=errors)
                silent = _wait(child, log)
            found = lines_of(log)
            if child.returncode == 0 and not silent:
                return [line for line in found if "word" in line]
            if not found or "word" in found[-1]:
                raise SystemExit(f"a batch failed between cases: see {folder}/{kind}-{seed}.err")
            last = found[-1]
            word = "hang" if silent else "crash"
            detail = f"no sign of life for {SILENCE} s" if silent else f"process ended with {child.returncode}"
            shutil.copy(Path(scratch, "current.case"), folder / f"{kind}-{seed}-{last['case']}.case")
            with log.open("a") as file:
                file.write(json.dumps({**last, "word": word, "by_name": True, "detail": detail}) + "\n")
            skip = last["case"] + 1


def _wait(child: subprocess.Popen, log: Path) -> bool:
    """Wait for a process; True where it had to be killed, for it showed no sign of life."""
    silent, last = 0.0, -1.0
    while child.poll() is None:
        sign = log.stat().st_mtime if log.exists() else 0.0
        stopped = psutil.Process(child.pid).status() == psutil.STATUS_STOPPED  # by whoever wants the machine's time
        silent = silent + 0.5 * (not stopped) if sign == last else 0.0
        last = sign
        if silent > SILENCE:
            child.kill()
            child.wait()
            return True
        time.sleep(0.5)
    return False


def summary(kind: str, cases: list[tuple[int, dict[str, Any]]]) -> str:
    """Counts by kind of change and outcome, then what ought not to be, then what was refused by the last resort."""
    words = (*GOOD, *BAD)
    table = Counter((line["kind"], line["word"]) for _, line in cases)
    kinds = sorted({name for name, _ in table})
    rows = [[name, *(str(table[name, word]) for word in words)] for name in kinds]
    rows.append(["all", *(str(sum(table[name, word] for name in kinds)) for word in words)])
    text = [f"{len(cases)} cases of {kind}", " ".join(f"{cell:>12}" for cell in ["", *words])]
    text += [" ".join(f"{cell:>12}" for cell in row) for row in rows]
    text.append("\nWhat ought not to be:")
    for seed, line in cases:
        if line["word"] in BAD:
            text.append(f"  seed {seed} case {line['case']} ({line['kind']}): {line['word']}: {line['detail']:.500}")
            text.append(f"    { ({key: line[key] for key in ('model', 'settings', 'then') if key in line}) }")
    text.append("\nRefused by the last resort:")
    resort = Counter(line["detail"] for _, line in cases if not line["by_name"])
    text += [f"  {number:>6} {place}" for place, number in resort.most_common()]
    return "\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 1 where something happened that ought not to."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.campaign", description=__doc__)
    parser.add_argument("--kind", choices=["checkpoint", "inter", "settings"], required=True)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1, help="of the first batch; each further one has the next")
    parser.add_argument("--folder", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--absurd", action="store_true", help="numbers in settings may ask for any time and memory")
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.batch is not None:
        run_batch(given.kind, given.count, given.seed, given.batch, given.log, given.absurd)
        return 0
    given.folder.mkdir(parents=True, exist_ok=True)
    cases: list[tuple[int, dict[str, Any]]] = []
    seed = given.seed
    while len(cases) < given.count:
        size = min(BATCH, given.count - len(cases))
        found = supervise(given.kind, size, seed, given.folder, given.absurd)
        cases += [(seed, line) for line in found]
        seed += 1
        (given.folder / f"{given.kind}.txt").write_text(summary(given.kind, cases))
        if len(found) < size:
            print(f"batch {seed - 1} had {len(found)} cases of {size}", flush=True)
            if not found:
                break
    print(summary(given.kind, cases))
    return int(any(line["word"] in BAD for _, line in cases))


if __name__ == "__main__":
    raise SystemExit(main())
