"""Where and how a figure was measured."""

import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch

from recbole_ssm.ops.self_check import cpu_name, package_version

PACKAGES = ("torch", "triton", "numba", "numpy", "recbole", "mamba-ssm", "causal-conv1d")


def environment() -> dict[str, Any]:
    """Hardware, versions and commit, for a result file."""
    # What runs and searches themselves write does not make the code that they measured another.
    written = ("benchmarks/results", "benchmarks/accuracy/tuned", "properties/tuned", "docs")
    changed = _git("status", "--porcelain", "--", ":/", *(f":!/{place}" for place in written))
    commit = _git("rev-parse", "--short", "HEAD") + "-dirty" * bool(changed)
    return {
        "device": device_name(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: package_version(package) for package in PACKAGES},
        "commit": commit or "unknown",
        "date": date.today().isoformat(),
    }


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # as in a slim container
        return ""
    return done.stdout.strip()


def device_name() -> str:
    """The GPU's name, or the CPU's with its threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def slug() -> str:
    """The device's kind for a file's name: ``cpu-2`` or such as ``nvidia-h100-80gb-hbm3``."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{torch.get_num_threads()}"
