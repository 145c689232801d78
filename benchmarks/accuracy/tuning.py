"""Tuning: a search of ``run_hyper`` for each model, set and evaluation, with the same budget for all models."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.accuracy.runs import SHIPPED
from benchmarks.accuracy.study import Study, write_tuned
from benchmarks.environment import environment
from benchmarks.speed.contenders import QUIET
from recbole_ssm.search.definition import METRIC, SEARCH_FILE, Search
from recbole_ssm.search.space import space_of

# Columns of a search's table that say nothing of a trial.
LEFT_OUT = ("trial", "status", "reason", "seconds")


def tune(study: Study, model: str, dataset: str, protocol: str, data_path: str, work: Path, jobs: int) -> dict:
    """Search a model's settings for a set and an evaluation, or go on with a search that was interrupted.

    Trials know the validation set alone.

    Args:
        study: what is searched, and how long.
        model: model name.
        dataset: dataset name.
        protocol: of :data:`benchmarks.accuracy.worker.PROTOCOLS`.
        data_path: folder that holds the dataset.
        work: folder that keeps searches.
        jobs: trials at a time, a core each.

    Returns:
        What :func:`write` keeps: ``environment``, ``settings`` of all trials, ``space``, and a row a trial, best first.

    Raises:
        UserError: where no trial came to a score.
    """
    from recbole_ssm.search import resume
    from recbole_ssm.search import tune as search_settings
    from recbole_ssm.search.report import best, trials

    name = study.tuned_file(model, dataset, protocol).stem
    folder, about = work / name, environment()
    settings, plan = study.base(model, dataset, protocol), _plan(study, model, dataset, protocol)
    if _can_resume(folder, {**plan, **{key: about[key] for key in ("commit", "versions")}}):
        results = resume(folder)
    else:
        places = {} if dataset == SHIPPED else {"data_path": data_path}
        results = search_settings(
            model,
            dataset,
            config_dict={**QUIET, **places, "tuned": False, **settings},
            space=study.space(model),
            storage_path=work,
            name=name,
            max_concurrent=jobs,
            **study.plan["search"],
        )
    search = Search.read(folder)
    best(results, search)
    return {
        "model": model,
        "dataset": dataset,
        "protocol": protocol,
        "environment": {**about, "threads": search.cpus_per_trial},
        **plan,
        "trials": _rows(trials(results, search)),
    }


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The trials that came to a score; what is unset in one (``~``) is None, not the NaN of a column of numbers."""
    scored = table[table[METRIC].notna()].drop(columns=list(LEFT_OUT)).astype(object)
    rows: Any = scored.where(scored.notna(), None).to_dict("records")
    return rows


def _plan(study: Study, model: str, dataset: str, protocol: str) -> dict[str, Any]:
    """What a search is made by, in the form in which it is read back."""
    plan = {
        "search": study.plan["search"],
        "settings": study.base(model, dataset, protocol),
        "space": {key: parameter.plain() for key, parameter in space_of(study.space(model)).items()},
    }
    return json.loads(json.dumps(plan))


def _can_resume(folder: Path, begun_by: dict[str, Any]) -> bool:
    """Whether a search was begun in a folder by the same code and plan; one of another is put aside."""
    file = folder.with_suffix(".json")
    if (folder / SEARCH_FILE).exists():
        if file.exists() and json.loads(file.read_text()) == begun_by:
            return True
        print(f"{folder.name}: begun by another commit, version or plan; it starts anew", flush=True)
        folder.rename(folder.with_name(f"{folder.name}-{folder.stat().st_mtime_ns}"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(begun_by))
    return False


def is_kept(study: Study, model: str, dataset: str, protocol: str, results: Path) -> bool:
    """Whether :func:`write` kept the search that the study plans now."""
    tuned, file = study.tuned_file(model, dataset, protocol), _kept_file(study, model, dataset, protocol, results)
    if not (tuned.exists() and file.exists()):
        return False
    plan = _plan(study, model, dataset, protocol)
    return plan.items() <= json.loads(file.read_text()).items()


def _kept_file(study: Study, model: str, dataset: str, protocol: str, results: Path) -> Path:
    return results / "tuning" / f"{study.tuned_file(model, dataset, protocol).stem}.json"


def write(found: dict[str, Any], study: Study, results: Path) -> Path:
    """Keep a search's trials with the results, and its winner as a property file, which is returned."""
    which = found["model"], found["dataset"], found["protocol"]
    file, kept = study.tuned_file(*which), _kept_file(study, *which, results)
    best = found["trials"][0]
    write_tuned(
        file,
        found["model"],
        {**found["settings"], **{key: best[key] for key in found["space"]}},
        f"{', '.join(which)}: the best of {len(found['trials'])} trials by valid {found['settings']['valid_metric']}, "
        f"{best[METRIC]:.4f}.\n"
        "Found by python -m benchmarks accuracy --tune; what is searched stands in benchmarks/accuracy/study.yaml.",
    )
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found, indent=1) + "\n")
    return file


def kept(results: Path) -> list[dict[str, Any]]:
    """All searches that were kept with the results."""
    return [json.loads(file.read_text()) for file in sorted((results / "tuning").glob("*.json"))]
