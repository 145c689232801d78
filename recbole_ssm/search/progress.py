"""What a person sees of a search while it runs."""

import pickle
import time
from typing import Any

from ray.tune import Callback

from recbole_ssm.distributed.ray_cluster import reason
from recbole_ssm.search.definition import METRIC


class Progress(Callback):
    """Prints a line for each evaluation and each end of a trial.

    Args:
        metric: name of the validation metric.
        names: what is searched.
        count: number of trials.
    """

    def __init__(self, metric: str, names: list[str], count: int):
        self._metric, self._names, self._count = metric, names, count

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Tell the values of a trial."""
        values = ", ".join(f"{name} {_short(trial.config[name])}" for name in self._names)
        self._tell(trial, f"starts with {values}")

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any) -> None:
        """Tell a score."""
        score, best = result["valid_score"], result[METRIC]
        self._tell(trial, f"epoch {result['epoch'] + 1}: valid {self._metric} {score:.4f}, best {best:.4f}")

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Tell whether a trial ended by itself."""
        ended = trial.last_result.get("ended")
        self._tell_end(trials, trial, "has ended" if ended else "was stopped early")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Tell why a trial failed."""
        error = None
        if trial.pickled_error_file:  # this machine's copy; get_pickled_error reads the storage's, which comes later
            with open(trial.pickled_error_file, "rb") as file:
                error = pickle.load(file)
        self._tell_end(trials, trial, f"failed: {reason(error)}")

    def _tell_end(self, trials: list, trial: Any, what: str) -> None:
        done = 1 + sum(other.is_finished() for other in trials if other is not trial)
        self._tell(trial, f"{what} ({done} of {self._count} done)")

    def _tell(self, trial: Any, what: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} trial {trial.trial_id} {what}", flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
