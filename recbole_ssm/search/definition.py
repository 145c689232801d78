"""What is searched and how, which a search's runs and its report all read."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recbole_ssm.config import Config
from recbole_ssm.errors import UserError
from recbole_ssm.search.space import Space, space_of

# What trials are compared by: the best validation score so far, by which RecBole chooses a run's model.
METRIC = "best_valid_score"

SCHEDULERS = ("asha", "median", "none")
ALGORITHMS = ("random", "grid", "optuna", "hyperopt")

SEARCH_FILE, FOLDER_PREFIX = "search.json", "trial_"


@dataclass(frozen=True)
class Search:
    """What is searched and how; kept beside its results, for :func:`recbole_ssm.search.resume`.

    Attributes:
        settings: of all trials, above the property files; ``model`` and ``dataset`` among them.
        space: what is searched, in the form of a YAML file (:func:`recbole_ssm.search.read_space`).
        bigger: whether a larger validation score is better.
        scheduler: what stops trials early, one of :data:`SCHEDULERS`.
        algorithm: what proposes values, one of :data:`ALGORITHMS`.
        num_samples: number of trials, 10 where absent; with ``grid``, how many times to try the whole grid, 1 where
            absent.
        max_concurrent: most trials at a time; as many as there is room for where absent.
        cpus_per_trial: cores of a trial.
        gpus_per_trial: GPUs of a trial, or a part of one.
        time_budget: seconds after which no trial goes on; no end where absent.
        seed: of the values that are proposed.
    """

    settings: dict[str, Any]
    space: dict[str, Any]
    bigger: bool = True
    scheduler: str = "asha"
    algorithm: str = "random"
    num_samples: int | None = None
    max_concurrent: int | None = None
    cpus_per_trial: float = 1
    gpus_per_trial: float = 0
    time_budget: float | None = None
    seed: int = 2020

    def __post_init__(self):
        for name, value, choices in (
            ("scheduler", self.scheduler, SCHEDULERS),
            ("search algorithm", self.algorithm, ALGORITHMS),
        ):
            if value not in choices:
                raise UserError(f"there is no {name} {value!r}: choose one of {', '.join(choices)}.")
        if self.num_samples is None:
            object.__setattr__(self, "num_samples", 1 if self.algorithm == "grid" else 10)
        for name in ("num_samples", "max_concurrent", "cpus_per_trial", "time_budget"):
            if (number := getattr(self, name)) is not None and not number > 0:
                raise UserError(f"{name} is {number}: give a number above 0.")
        if not self.gpus_per_trial >= 0:
            raise UserError(f"gpus_per_trial is {self.gpus_per_trial}: give 0 or a number above it.")
        endless = [name for name, parameter in self.parameters().items() if parameter.grid() is None]
        if self.algorithm == "grid" and endless:
            raise UserError(f"a grid needs values to choose from, which {', '.join(endless)} has not: write choice.")

    @classmethod
    def read(cls, folder: Path) -> "Search":
        """Read what a search was started with.

        Raises:
            UserError: where the folder holds none.
        """
        file = folder / SEARCH_FILE
        if not file.is_file():
            raise UserError(f"{folder} holds no search: there is no {SEARCH_FILE} in it.")
        return cls(**json.loads(file.read_text()))

    def write(self, folder: Path) -> None:
        """Keep it in the folder of its results."""
        folder.mkdir(parents=True)
        (folder / SEARCH_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def parameters(self) -> Space:
        """What is searched."""
        return space_of(self.space)

    def trial_count(self) -> int:
        """Number of trials."""
        grids = [parameter.grid() or [] for parameter in self.parameters().values()]
        assert self.num_samples is not None
        return self.num_samples * (math.prod(map(len, grids)) if self.algorithm == "grid" else 1)

    def chosen(self, values: dict[str, Any] | None) -> dict[str, Any]:
        """A trial's values as settings: steps of ``quniform`` without the error of their multiplication.

        A trial that never began has none.
        """
        if values is None:
            return {}
        return {
            name: parameter.round(values[name]) if parameter.kind == "quniform" else values[name]
            for name, parameter in self.parameters().items()
        }

    def config(self) -> Config:
        """The configuration that all trials start from.

        Raises:
            UserError: where its runs have no validation score to be compared by.
        """
        config = Config.from_settings(self.settings)
        if not config["eval_step"] > 0:
            raise UserError(f"eval_step is {config['eval_step']}: trials are compared by their validation score.")
        return config
