"""What a search leaves behind: a table of its trials, the best one's settings and model, pictures."""

import html
import json
import logging
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from recbole_ssm.distributed.ray_cluster import CHECKPOINT, reason
from recbole_ssm.errors import UserError
from recbole_ssm.quick_start import evaluate
from recbole_ssm.search.definition import FOLDER_PREFIX, METRIC, Search
from recbole_ssm.search.space import Parameter

if TYPE_CHECKING:
    from ray.tune import Result, ResultGrid

TRIALS, BEST_SETTINGS, BEST_MODEL, PICTURES = "trials.csv", "best.yaml", "best.pth", "trials.html"


def statuses(results: "ResultGrid") -> list[str]:
    """How each trial ended: ``failed``, ``finished``, ``stopped early`` by the scheduler, or ``unfinished``."""
    from ray.tune import ExperimentAnalysis

    kept = {trial.trial_id: trial.status for trial in ExperimentAnalysis(results.experiment_path).trials}
    return [_status(result, kept) for result in results]


def _status(result: "Result", kept: dict[str, str]) -> str:
    if result.error is not None:
        return "failed"
    if kept.get(_trial_id(result)) != "TERMINATED":
        return "unfinished"
    return "finished" if result.metrics.get("ended") else "stopped early"


def _trial_id(result: "Result") -> str:
    return Path(result.path).name.removeprefix(FOLDER_PREFIX)


def trials(results: "ResultGrid", search: Search) -> pd.DataFrame:
    """A row a trial, best first, then those that failed, with what went wrong.

    Columns: ``trial``, ``status``, ``reason``, the settings that were searched, ``best_valid_score``, ``evaluations``,
    ``seconds`` and the validation metrics of the best epoch.
    """
    rows = []
    for result, status in zip(results, statuses(results), strict=True):
        metrics = result.metrics or {}
        rows.append(
            {
                "trial": _trial_id(result),
                "status": status,
                "reason": reason(result.error) if result.error is not None else "",
                **search.chosen(result.config),
                METRIC: metrics.get(METRIC),
                "evaluations": metrics.get("training_iteration", 0),
                "seconds": metrics.get("time_total_s"),
                **{name: value for name, value in metrics.items() if "@" in name},
            }
        )
    table = pd.DataFrame(rows)
    return table.sort_values(METRIC, ascending=not search.bigger, kind="stable", ignore_index=True)


def best(results: "ResultGrid", search: Search) -> "Result":
    """The trial with the best validation score, among those that failed later, too.

    Raises:
        UserError: where no trial came to an evaluation.
    """
    scored = [result for result in results if METRIC in (result.metrics or {}) and result.checkpoint is not None]
    if not scored:
        failures = {reason(result.error) for result in results if result.error is not None}
        why = ": " + "; ".join(sorted(failures)) if failures else "."
        more = f" Unfinished trials go on with: run_hyper --resume {shlex.quote(results.experiment_path)}"
        raise UserError(f"no trial came to an evaluation{why}{more if 'unfinished' in statuses(results) else ''}")
    return (max if search.bigger else min)(scored, key=lambda result: result.metrics[METRIC])


def write_report(results: "ResultGrid", search: Search, folder: Path) -> dict[str, Any]:
    """Write ``trials.csv``, ``best.yaml``, ``best.pth`` and ``trials.html`` into a search's folder.

    The best trial's model is evaluated on the test set, the only look that a search takes at it.

    Returns:
        The best trial's values of what was searched (``params``), and RecBole's results of its run.

    Raises:
        UserError: where no trial came to an evaluation; the table is written even so.
    """
    table = trials(results, search)
    table.to_csv(folder / TRIALS, index=False)
    winner = best(results, search)
    params = search.chosen(winner.config)
    lines = [
        f"# The best of {len(table)} trials by validation: {winner.metrics[METRIC]:.4f}. "
        f"run_recbole --config_files={BEST_SETTINGS} trains it again.",
        yaml.safe_dump({**search.settings, **params}, sort_keys=False),
    ]
    (folder / BEST_SETTINGS).write_text("\n".join(lines))
    with winner.checkpoint.as_directory() as checkpoint:
        shutil.copyfile(Path(checkpoint) / CHECKPOINT, folder / BEST_MODEL)
    draw(results, search, folder / PICTURES)
    logging.disable(logging.INFO)  # its settings and data were told as the search began
    try:
        return {"params": params, **evaluate(str(folder / BEST_MODEL), {"show_progress": False}).result}
    finally:
        logging.disable(logging.NOTSET)


def write_recboles(file: str | Path, results: "ResultGrid", search: Search, winner: dict[str, Any]) -> None:
    """Write all trials as RecBole's ``run_hyper`` does; but only the best one has a test result."""
    parts = []
    for result, status in zip(results, statuses(results), strict=True):
        metrics = {name: value for name, value in (result.metrics or {}).items() if "@" in name}
        params = search.chosen(result.config)
        parts.append(", ".join(f"{name}:{value}" for name, value in params.items()))
        parts.append("Valid result:\n" + (_metrics(metrics) if metrics else status))
        if params == winner["params"]:
            parts.append("Test result:\n" + _metrics(winner["test_result"]))
        parts.append("")
    Path(file).write_text("\n".join(parts) + "\n")


def draw(results: "ResultGrid", search: Search, file: Path) -> None:
    """One page, which needs no network: history, parallel coordinates, importance and learning curves."""
    import optuna
    from optuna import visualization

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize" if search.bigger else "minimize")
    distributions = {name: _distribution(parameter) for name, parameter in search.parameters().items()}
    for result in results:
        if METRIC not in (result.metrics or {}):
            continue
        curve = result.metrics_dataframe
        study.add_trial(
            optuna.trial.create_trial(
                params={name: _value(v, distributions[name]) for name, v in search.chosen(result.config).items()},
                distributions=distributions,
                value=result.metrics[METRIC],
                intermediate_values={}
                if curve is None
                else dict(zip(curve["epoch"], curve["valid_score"], strict=True)),
            )
        )
    figures = [visualization.plot_optimization_history(study), visualization.plot_parallel_coordinate(study)]
    varied = {name for name in search.space if len({str(trial.params[name]) for trial in study.trials}) > 1}
    if len(study.trials) > 1 and varied:
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        figures.append(visualization.plot_param_importances(study, evaluator=evaluator, params=sorted(varied)))
    figures.append(visualization.plot_intermediate_values(study))
    parts = [figure.to_html(full_html=False, include_plotlyjs=number == 0) for number, figure in enumerate(figures)]
    title = html.escape(f"{search.settings['model']} on {search.settings['dataset']}")
    page = f"<!doctype html><html><head><meta charset='utf-8'><title>{title}</title></head><body><h1>{title}</h1>"
    file.write_text(page + "\n".join(parts) + "</body></html>", encoding="utf-8")


def _distribution(parameter: Parameter) -> Any:
    from optuna import distributions

    if parameter.kind == "choice":
        return distributions.CategoricalDistribution([_category(value) for value in parameter.values])
    if parameter.kind == "quniform":
        values = parameter.grid() or []
        if isinstance(values[0], int):
            return distributions.IntDistribution(values[0], values[-1], step=round(parameter.q))
        return distributions.FloatDistribution(values[0], values[-1], step=parameter.q)
    return distributions.FloatDistribution(parameter.low, parameter.high, log=parameter.kind == "loguniform")


def _category(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _value(value: Any, distribution: Any) -> Any:
    return _category(value) if hasattr(distribution, "choices") else value


def _metrics(metrics: dict[str, float]) -> str:
    return "    ".join(f"{name} : {value:.4f}" for name, value in metrics.items())
