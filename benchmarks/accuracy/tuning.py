"""Tuning: a search of ``run_hyper`` for each model, set and evaluation, with the same budget for all models."""

import json
from pathlib import Path
from typing import Any

from benchmarks.accuracy.runs import SHIPPED
from benchmarks.accuracy.study import Study, write_tuned
from benchmarks.environment import environment
from benchmarks.speed.contenders import QUIET
from recbole_ssm.search.definition import METRIC, SEARCH_FILE, Search

# Columns of a search's table that say nothing of a trial.
UNTOLD = ("trial", "status", "reason", "seconds")


def tune(study: Study, model: str, dataset: str, protocol: str, data_path: str, work: Path, jobs: int) -> dict:
    """Search a model's settings for a set and an evaluation, or go on with a search that was interrupted.

    Trials know the validation set alone.

    Args:
        study: what is searched, and how long.
        model: model name.
        dataset: dataset name.
        protocol: of :data:`benchmarks.accuracy.study.CHOSEN_BY`.
        data_path: folder that holds the dataset.
        work: folder that keeps searches.
        jobs: trials at a time, a core each.

    Returns:
        What :func:`write` keeps: ``environment``, ``settings`` of all trials, ``space``, and a row a trial, best first.
    """
    from recbole_ssm.search import resume
    from recbole_ssm.search import tune as search_settings
    from recbole_ssm.search.report import trials

    name = study.tuned_file(model, dataset, protocol).stem
    folder, about = work / name, environment()
    settings = study.base(model, dataset, protocol)
    if _goes_on(folder, about):
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
    table = trials(results, search)
    rows = [{key: row[key] for key in row if key not in UNTOLD} for row in table.to_dict("records")]
    return {
        "model": model,
        "dataset": dataset,
        "protocol": protocol,
        "environment": about,
        "search": study.plan["search"],
        "settings": settings,
        "space": search.space,
        "trials": [row for row in rows if row[METRIC] == row[METRIC]],  # a failed one has no score
    }


def _goes_on(folder: Path, about: dict[str, Any]) -> bool:
    """Whether a search was begun in a folder by the same code; one of another commit is put aside."""
    begun = folder.with_suffix(".json")
    same = {key: about[key] for key in ("commit", "versions")}
    if (folder / SEARCH_FILE).exists():
        if begun.exists() and json.loads(begun.read_text()) == same:
            return True
        print(f"{folder.name}: begun by another commit or version; it starts anew", flush=True)
        folder.rename(folder.with_name(f"{folder.name}-{folder.stat().st_mtime_ns}"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(same))
    return False


def is_kept(study: Study, model: str, dataset: str, protocol: str, results: Path) -> bool:
    """Whether :func:`write` kept the search that the study plans now."""
    file = _kept_file(study, model, dataset, protocol, results)
    if not file.exists():
        return False
    found = json.loads(file.read_text())
    planned = study.base(model, dataset, protocol), study.space(model), study.plan["search"]
    return (found["settings"], found["space"], found["search"]) == planned


def _kept_file(study: Study, model: str, dataset: str, protocol: str, results: Path) -> Path:
    return results / "tuning" / f"{study.tuned_file(model, dataset, protocol).stem}.json"


def write(found: dict[str, Any], study: Study, results: Path) -> Path:
    """Keep a search's trials with the results, and its winner as a property file, which is returned."""
    which = found["model"], found["dataset"], found["protocol"]
    file, kept = study.tuned_file(*which), _kept_file(study, *which, results)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found, indent=1) + "\n")
    best = found["trials"][0]
    write_tuned(
        file,
        found["model"],
        {**found["settings"], **{key: best[key] for key in found["space"]}},
        f"{found['model']} on {found['dataset']}, {found['protocol']}: the best of {len(found['trials'])} trials by "
        f"valid {found['settings']['valid_metric']}, {best[METRIC]:.4f}.\n"
        "Found by python -m benchmarks accuracy --tune; what is searched stands in benchmarks/accuracy/study.yaml.",
    )
    return file


def kept(results: Path) -> list[dict[str, Any]]:
    """All searches that were kept with the results."""
    return [json.loads(file.read_text()) for file in sorted((results / "tuning").glob("*.json"))]
