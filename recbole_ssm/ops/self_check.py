"""Whether a backend of an op is right on this machine: found out in a process of its own, and kept.

A compiler may get a kernel wrong for one chip and one size alone, and the kernel may then crash, hang or give wrong
numbers. So the op runs, forward and backward, at the sizes that are asked for, beside the reference, in a child process
that costs nothing when it dies. Verdicts lie in the user's cache folder, a file each, under all that they depend on.

Here is what asks; :mod:`.self_check_child` is what runs in the other process.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

# Longest that a check may be silent, its compilation not counted: the run itself would have to wait for that, too.
LIMIT_S = 20.0
# Longest that a check may take with it.
COMPILATION_S = 300.0
# Longest that a child may take to import torch, from a slow disk.
START_S = 60.0

# The packages by whose code a verdict may change; Triton has other names on some platforms.
PACKAGES = ("torch", "triton", "numba", "mamba-ssm", "causal-conv1d")
TRITON_NAMES = ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows")

STATES = ("right", "wrong", "crashes", "hangs", "out of memory")
UNCHECKED = "unchecked"  # not kept


@dataclass(frozen=True)
class Check:
    """One op on one backend, as a model calls it.

    Attributes:
        op: such as ``selective_scan``; its form for the last rows belongs to it.
        backend: which implementation.
        device: such as ``cuda:0``.
        dtype: of the activations, such as ``bfloat16``; weights and embeddings are float32, as under autocast.
        sizes: the letters of the op's docstring, and ``window`` where the attention has one.
        states: whether sequences have initial and final states, as in serving.
        tf32: whether products of float32 may be rounded to TF32.
    """

    op: str
    backend: str
    device: str
    dtype: str
    sizes: tuple[tuple[str, int], ...]
    states: bool = False
    tf32: bool = False

    def __str__(self) -> str:
        letters = " ".join(f"{letter} {size}" for letter, size in self.sizes)
        return f"{self.op} on {self.backend} ({letters}, {self.dtype}{', with states' * self.states})"


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        state: one of :data:`STATES`, or :data:`UNCHECKED`.
        detail: what went wrong.
        error: largest deviation from float64 of any output or gradient, relative to its largest value.
        times_as_fast: the reference's time over the backend's, forward and backward; none where it was not taken.
    """

    state: str
    detail: str = ""
    error: float = 0.0
    times_as_fast: float | None = None

    def __str__(self) -> str:
        if self.state == "right":
            return f"right (off by {self.error:.0e})"
        return f"{self.state} ({self.detail})" if self.detail else self.state


# What this process has asked for.
_known: dict[Check, Verdict] = {}


def verdict(check: Check) -> Verdict:
    """The verdict on one check: known, kept from an earlier process, or found now."""
    return _known.get(check) or verdicts([check])[check]


def verdicts(
    checks: list[Check], limit_s: float | None = None, timed: bool = False, anew: bool = False
) -> dict[Check, Verdict]:
    """Verdicts on several checks; those that nobody knows are found side by side, and kept.

    Args:
        checks: what is asked.
        limit_s: another limit than :data:`LIMIT_S`.
        timed: also time what is right; then one check runs after another, with a bar on the standard error.
        anew: find even what is known.
    """
    missing = []
    for check in dict.fromkeys(checks):
        found = None if anew else _known.get(check) or _read(check)
        if found is None or (timed and found.state == "right" and found.times_as_fast is None):
            missing.append(check)
        else:
            _known[check] = found
    if missing:
        logging.getLogger().info(
            f"checking, once on this machine, in a process of its own: {'; '.join(map(str, missing))}"
        )
        for check, found in _judge(missing, limit_s or LIMIT_S, timed).items():
            _known[check] = found
            if found.state != UNCHECKED:
                _write(check, found)
    return {check: _known[check] for check in checks}


# --- What verdicts depend on, and where they are kept


@lru_cache(maxsize=None)
def kernels_digest() -> str:
    """Digest of the source of all ops."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def package_version(name: str) -> str:
    """Version of an installed package, ``not installed`` else."""
    names = TRITON_NAMES if name == "triton" else (name,)
    found = (package.version for known_as in names for package in importlib.metadata.distributions(name=known_as))
    return next(found, "not installed")


def cpu_name() -> str:
    """The CPU's model."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


def driver_version() -> str:
    """The NVIDIA driver's version where the system tells it, else the CUDA version that the driver is made for."""
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module\D*([\d.]+)", file.read_text()) if file.exists() else None
    return found[1] if found else f"for CUDA {getattr(torch._C, '_cuda_getDriverVersion')()}"  # noqa: B009 (CUDA builds)


@lru_cache(maxsize=None)
def hardware(device: str) -> dict[str, str]:
    """Name of a device, and of a GPU its compute capability and driver."""
    if torch.device(device).type != "cuda":
        return {"device": cpu_name()}
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "device": torch.cuda.get_device_name(device),
        "compute capability": f"{major}.{minor}",
        "driver": driver_version(),
    }


@lru_cache(maxsize=None)
def environment(device: str) -> dict[str, str]:
    """All that verdicts on a device depend on."""
    versions = {name: package_version(name) for name in PACKAGES}
    return {
        **hardware(device), **versions, "CUDA": torch.version.cuda or torch.version.hip or "none",
        "kernels": kernels_digest(),
    }  # fmt: skip


def cache_folder() -> Path:
    """Where verdicts are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    return (Path(root) if root else Path("~/.cache").expanduser()) / "recbole_ssm" / "checks"


def _key(check: Check) -> dict[str, Any]:
    asked = asdict(check) | {"device": torch.device(check.device).type, "sizes": dict(check.sizes)}
    return {"check": asked, "machine": environment(check.device)}


def _file(key: dict[str, Any]) -> Path:
    return cache_folder() / (hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32] + ".json")


def _read(check: Check) -> Verdict | None:
    """The kept verdict; none where there is no file, or none that can be understood."""
    key = _key(check)
    try:
        kept = json.loads(_file(key).read_text(encoding="utf-8"))
        found = Verdict(**kept["verdict"])
        return found if kept["key"] == key and found.state in STATES else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(check: Check, found: Verdict) -> None:
    """Keep a verdict; where that is not possible, the next process asks anew."""
    key = _key(check)
    file = _file(key)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, delete=False) as new:
            json.dump({"key": key, "verdict": asdict(found)}, new, indent=1)
        os.replace(new.name, file)
    except OSError as error:
        logging.getLogger().info(f"the verdict cannot be kept for the next time: {error}")


# --- The process that asks

_CODE = "from recbole_ssm.ops.self_check_child import answer; answer()"


class _Child:
    """A process that makes checks one after another, and what it has not answered yet."""

    def __init__(self, checks: list[Check], limit_s: float, timed: bool, answers: queue.SimpleQueue):
        self.left, self.limit_s = list(checks), limit_s
        self.ready = False  # it has imported everything and reached the device
        self.leaves = False  # it has said that it ends now
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 (closed at its end)
        request = {"checks": [asdict(check) for check in checks], "limit_s": limit_s, "timed": timed}
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CODE, json.dumps(request)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.said, text=True,
            env=os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"},  # it finds the modules that this process does
            start_new_session=True,  # with the compilers that it starts it can be ended as one group
        )  # fmt: skip
        self.began = time.monotonic()
        self.deadline = self.began + START_S
        threading.Thread(target=self._listen, args=(answers,), daemon=True).start()

    def _listen(self, answers: queue.SimpleQueue) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                answers.put((self, line))
        answers.put((self, None))

    def hear(self, line: str) -> Verdict | None:
        """Take a line of the child's: a sign of life, or the verdict on the first check that is left."""
        try:
            message = json.loads(line)
            found = Verdict(**message["verdict"]) if "verdict" in message else None
        except (ValueError, TypeError, KeyError):
            return None  # something else that it runs has printed
        now = time.monotonic()
        if found is not None or not self.ready:
            self.began = now
        self.deadline = min(now + self.limit_s, self.began + COMPILATION_S)
        self.ready = True
        self.leaves = found is not None and found.state not in ("right", "wrong")
        return found

    def end(self) -> None:
        """End it and all that it has started."""
        if self.process.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
            self.process.wait()
        self.said.close()

    def cause_of_death(self) -> str:
        """Its signal or exit status, and the last line that it wrote."""
        status = self.process.wait()
        try:
            how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        except ValueError:
            how = f"signal {-status}"
        self.said.seek(0)
        # Python's crash handler lists threads and modules below what happened.
        lines = self.said.read().decode(errors="replace").split("Fatal Python error")[0].strip().splitlines()
        return one_line(f"{how}: {lines[-1]}" if lines else how)


def _judge(checks: list[Check], limit_s: float, timed: bool) -> dict[Check, Verdict]:
    """Make checks in child processes; the one that a child dies of is answered by that, and another child goes on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = 1 if timed else max(1, min(len(checks), cores // 4))  # compilers keep some cores busy
    answers: queue.SimpleQueue = queue.SimpleQueue()
    found: dict[Check, Verdict] = {}
    running: set[_Child] = set()

    def start(left: list[Check]) -> None:
        try:
            if left:
                running.add(_Child(left, limit_s, timed, answers))
        except OSError as error:
            found.update(dict.fromkeys(left, Verdict(UNCHECKED, one_line(f"no process can be started: {error}"))))

    def settle(child: _Child, state: str, detail: str) -> None:
        """What its end says of what it has not answered."""
        running.remove(child)
        child.end()
        if not child.ready:
            found.update(dict.fromkeys(child.left, Verdict(UNCHECKED, detail)))
            return
        if child.left and not child.leaves:
            found[child.left.pop(0)] = Verdict(state, detail)
        start(child.left)

    bar = tqdm(total=len(checks), desc="checking; kernels compile the first time", unit=" cases", disable=not timed)
    try:
        for i in range(processes):
            start(checks[i::processes])
        while running:
            bar.update(len(found) - bar.n)
            try:
                child, line = answers.get(timeout=max(0.0, min(c.deadline for c in running) - time.monotonic()))
            except queue.Empty:
                for child in [c for c in running if c.deadline <= time.monotonic()]:
                    settle(child, "hangs", f"no result in {time.monotonic() - child.began:.0f} s")
                continue
            if child not in running:
                continue
            if line is None:
                settle(child, "crashes", child.cause_of_death())
                continue
            heard = child.hear(line)
            if heard is not None:
                found[child.left.pop(0)] = heard
        bar.update(len(found) - bar.n)
    finally:
        bar.close()
        for child in running:
            child.end()
    return found


def one_line(text: str) -> str:
    """``text`` on one line of at most 160 characters."""
    text = " ".join(text.split())
    return text if len(text) <= 160 else text[:157] + "..."
