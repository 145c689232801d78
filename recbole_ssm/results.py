"""What a finished run has to tell, and its file."""

import json
import platform
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import psutil
import torch

from recbole_ssm.config import Config
from recbole_ssm.errors import CannotWrite
from recbole_ssm.places import writing
from recbole_ssm.settings.values import plain

RECORDED_PACKAGES = (
    "recbole-ssm",
    "recbole",
    "torch",
    "numpy",
    "pandas",
    "numba",
    "triton",
    "mamba-ssm",
    "causal-conv1d",
)

# Of a result file, by which one is known.
FIRST_KEY = "best_valid_result"

# Settings that say how metrics were measured, and what the model could know.
PROTOCOL = (
    "eval_args", "valid_metric", "topk", "repeatable", "exclude_history", "time_order", "request_time",
    "user_inter_num_interval", "item_inter_num_interval",
)  # fmt: skip


def protocol(config: Config) -> dict[str, Any]:
    """How the metrics of a run are measured: what two runs must have in common for their metrics to compare."""
    given = {name: config[name] for name in PROTOCOL if config[name] is not None}
    candidates = {"allow_repeats": False} if config["allow_repeats"] is False else {}
    return {**given, **candidates, "request_time": config["request_time"] or "unknown"}


@dataclass
class Run:
    """One finished run.

    Attributes:
        config: the configuration it ran with.
        result: RecBole's result: ``best_valid_score``, ``valid_score_bigger``, ``best_valid_result``,
            ``test_result``.
        checkpoint: the file that holds the best model, or none where it was not saved.
        timings: see :meth:`recbole_ssm.durable.Timings.summary`.
        best_epoch: index of the best epoch.
    """

    config: Config
    result: dict[str, Any]
    checkpoint: str | None
    timings: dict[str, float | None]
    best_epoch: int | None = None

    def write(self, file: str | Path) -> None:
        """Write results, configuration, versions and timings to a JSON file.

        Raises:
            CannotWrite: where that fails; what should stand there is printed.
        """
        report = {
            FIRST_KEY: self.result[FIRST_KEY],
            "test_result": self.result["test_result"],
            "best_epoch": self.best_epoch,
            "checkpoint": self.checkpoint,
            "protocol": plain(protocol(self.config)),
            "config": self.config.given,
            "versions": versions(),
            **self.timings,
            **peak_memory(),
        }
        path, text = Path(file), json.dumps(report, indent=2, default=float)
        kept = "" if self.checkpoint is None else f", and the model is in {self.checkpoint}"
        try:
            with writing(path, f"the result is printed instead{kept}"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text + "\n")
        except CannotWrite:
            print(text)
            raise


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that can change a result."""
    installed = {name.lower(): package.version for package in distributions() if (name := package.name)}
    found = {package: installed[package] for package in RECORDED_PACKAGES if package in installed}
    return {"python": platform.python_version(), "platform": platform.platform(), **found}


def peak_memory() -> dict[str, int]:
    """Most bytes held at once by this process, and by its GPU's tensors where there is one."""
    peak = {"peak_memory_bytes": _peak_of_the_process()}
    if torch.cuda.is_available():
        peak["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    return peak


def _peak_of_the_process() -> int:
    with suppress(OSError):
        # Linux's own, where it is there: ru_maxrss may begin with the peak of the process that started this one.
        if own := re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()):
            return int(own[1]) * 1024
    try:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:  # Windows
        return getattr(psutil.Process().memory_info(), "peak_wset", 0)
