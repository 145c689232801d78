"""The study's page: its tables, tests and pictures, from the result files alone."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import plots
from benchmarks.accuracy import tuning
from benchmarks.accuracy.results import (
    BASELINES,
    K,
    Results,
    Rows,
    chosen_by,
    column,
    compared,
    gain_cell,
    leaves_out_seen,
    mark,
    score_cell,
    tests_of,
)
from benchmarks.accuracy.runs import Store
from benchmarks.accuracy.statistics import spread
from benchmarks.accuracy.study import Study
from benchmarks.accuracy.summary import write_claims, write_published, write_searched, write_summary
from benchmarks.accuracy.worker import FULL, TOPK, UNSEEN
from benchmarks.pages import Page
from benchmarks.report import versions
from recbole_ssm.search.definition import METRIC

METRICS = {"ndcg": "NDCG", "recall": "Recall", "mrr": "MRR"}


def write_pages(results: Path, file: Path) -> None:
    """Write the page and its pictures from the result files in a folder."""
    study, file = Study.read(), file.resolve()
    found = Results(Store(results / "runs.jsonl"), study)
    page = Page("The study: accuracy of STAR-Rec, SSD4Rec and Mamba4Rec beside SASRec")
    write_summary(page, found)
    _protocol(page, found, study, tuning.kept(results))
    for dataset in found.rows:
        _dataset(page, found, study, dataset, file)
    write_searched(page, found)
    write_claims(page, found)
    write_published(page)
    _sampled(page, found)
    _tuning(page, results)
    _commands(page, found)
    page.write(file)
    print(f"written: {file} and {file.with_suffix('.html')}")


def _protocol(page: Page, found: Results, study: Study, searches: list[dict[str, Any]]) -> None:
    rows, everything = found.all_rows(), list(found.store.rows.values())
    about = [row["environment"] for row in rows]
    page.heading("How it was measured")
    page.text(
        "By `python -m benchmarks accuracy`; every number is from a run of `run_recbole` whose row stands in "
        "`benchmarks/results/runs.jsonl` with its settings, versions, commit and hardware."
    )
    page.bullets([
        "**Split**: leave-one-out: a user's last item is the test target, the one before it the validation target.",
        f"**Candidates**: all items. Under '{FULL}' the history's items are among them, as RecBole evaluates; under "
        f"'{UNSEEN}' they are not, as gSASRec's code evaluates. The two must not be mixed: a model that is trained "
        f"with 'seen items left out' (`allow_repeats: False`) ranks them last by itself and stands under '{UNSEEN}' "
        "alone.",
        "**Order**: by the exact timestamp (`time_order: exact`) but where a set's section says otherwise.",
        "**Time of the request**: unknown to the models (`request_time: unknown`) but where a row says that it is "
        "known.",
        "**Choice**: settings and the best epoch by NDCG@10 on the validation set, among the candidates of the table, "
        "or with '*' as said above. What the test set says chooses nothing.",
        f"**Models**: hidden size {study.plan['common']['hidden_size']}, cross-entropy over all items, trained on "
        "every position of a history at once; rows that differ say so. SASRec is RecBole's class. "
        f"{' and '.join(study.plan['smaller'])} is smaller than its authors run it, so that a CPU can.",
        "**Epoch**: the best one, mean over seeds. A run ends where validation stops improving; '14 of 15' was cut off "
        "before that.",
        "**Values**: mean ± standard deviation over seeds of the run's test result; best mean in bold.",
        "**Over** another model: how far NDCG@10 is above its, over the seeds that both have (so with one seed it is "
        "not the change of the means beside it). p: paired t-test over users of NDCG@10 averaged over seeds, "
        "two-sided, Bonferroni-adjusted for a set's comparisons. It speaks of these trained models and other users; "
        "where seeds differ in sign, or there is one, other seeds may say otherwise.",
        "**Minutes**: of training and validation up to the best epoch, on a machine that did other work as well, so an "
        "upper bound; speed is measured side by side in [the benchmarks](benchmarks.md). "
        f"The {len(rows)} runs of this page took {_hours(rows):.0f} hours, the {len(everything) - len(rows)} that "
        f"[the experiments](experiments.md) have beside them {_hours(everything) - _hours(rows):.0f}, and the searches "
        f"about {_hours_of_searches(searches, everything):.0f} (their epochs, at the time that one takes in a run of "
        "the same model and set).",
        f"**Hardware**: {_distinct(a['device'] for a in about)}. **Commits**: {_distinct(a['commit'] for a in about)}. "
        f"**Versions**: {_distinct(versions(a) for a in about)}.",
    ])  # fmt: skip


def _dataset(page: Page, found: Results, study: Study, dataset: str, file: Path) -> None:
    page.heading(dataset)
    rows = [row for models in found.rows[dataset].values() for own in models.values() for row in own]
    page.text(
        f"Maximum length {rows[0]['config']['MAX_ITEM_LIST_LENGTH']}, 5-core, seeds "
        f"{_distinct(str(row['seed']) for row in rows)}. {' '.join(study.plan['notes'].get(dataset, []))}".rstrip()
    )
    for protocol, models in found.rows[dataset].items():
        page.heading(f"{dataset}, {protocol}", level=3)
        _table(page, found, dataset, protocol)
        _other_cutoffs(page, models, protocol)
    means = {
        f"{model}, {protocol}": spread([run["test"][protocol][f"ndcg@{K}"] for run in runs])
        for protocol, models in found.rows[dataset].items()
        for model, runs in models.items()
    }
    picture = file.parent / "images" / f"{file.stem}-{dataset}.svg"
    plots.dots(picture, f"{dataset}: test NDCG@{K}, mean and standard deviation over seeds", means, f"NDCG@{K}")
    page.figure(picture, file, f"{dataset}: NDCG@{K} of all models")
    _curves(page, found.rows[dataset], dataset, file)


def _table(page: Page, found: Results, dataset: str, protocol: str) -> None:
    models, tests = found.rows[dataset][protocol], tests_of(found.rows[dataset][protocol])
    baselines = [model for model in BASELINES if model in models and len(models) > 1]
    cells = [column(models, metric, protocol) for metric in METRICS]
    rows = []
    for model, runs in models.items():
        row = [_title(model, runs, protocol), str(len(runs)), *(cell[model] for cell in cells)]
        for baseline in baselines:
            same = model == baseline
            gain = "" if same else gain_cell(compared(found.store, models, model, baseline, protocol, tests))
            row.append(gain)
        row.append(_epochs_cell(runs))
        row.append(f"{np.mean([run['seconds_to_best'] for run in runs]) / 60:.0f}")
        rows.append(row)
    heads = [f"{name}@{K}" for name in METRICS.values()] + [f"over {baseline}" for baseline in baselines]
    page.table(["model", "seeds", *heads, "epoch", "minutes"], rows)


def _patience_ends(run: dict[str, Any]) -> int:
    """How many epochs a run goes before patience ends, if it may."""
    return run["epochs_to_best"] + run["config"]["stopping_step"] + 1


def _epochs_cell(runs: Rows) -> str:
    """The mean best epoch, and of how many where the last one came before patience had ended."""
    cut_off = [run["config"]["epochs"] for run in runs if _patience_ends(run) > run["config"]["epochs"]]
    return f"{np.mean([run['epochs_to_best'] for run in runs]):.0f}" + (f" of {max(cut_off)}" if cut_off else "")


def _hours(rows: Rows) -> float:
    """How long runs took, until patience or their epochs ended."""
    return sum(_epoch_seconds(run) * min(run["config"]["epochs"], _patience_ends(run)) for run in rows) / 3600


def _epoch_seconds(run: dict[str, Any]) -> float:
    """Training and validation."""
    return run["seconds_to_best"] / run["epochs_to_best"]


def _hours_of_searches(searches: list[dict[str, Any]], rows: Rows) -> float:
    """How long searches took, of which only the epochs are kept, by the median epoch of runs like theirs."""
    hours = 0.0
    for search in searches:
        alike = [_epoch_seconds(run) for run in rows if all(run[key] == search[key] for key in ("model", "dataset"))]
        if alike:
            hours += sum(trial["evaluations"] for trial in search["trials"]) * float(np.median(alike)) / 3600
    return hours


def _other_cutoffs(page: Page, models: dict[str, Rows], protocol: str) -> None:
    others = [k for k in TOPK if k != K]
    heads = ["model", *(f"{m}@{k}" for k in others for m in ("NDCG", "Recall"))]
    cells = [column(models, metric, protocol, k) for k in others for metric in ("ndcg", "recall")]
    page.table(heads, [[model, *(cell[model] for cell in cells)] for model in models])


def _curves(page: Page, sets: dict[str, dict[str, Rows]], dataset: str, file: Path) -> None:
    """Validation against steps and against seconds, of each model's first run, where there are two to compare."""
    for protocol, models in sets.items():
        kept = {
            model: run
            for model, runs in models.items()
            for run in runs[:1]
            if run.get("curve") and chosen_by(run) == protocol
        }
        if len(kept) < 2:
            continue
        for what, place in (("steps", _steps), ("seconds", _seconds)):
            series = {m: [(place(run, *point), point[1]) for point in run["curve"]] for m, run in kept.items()}
            picture = file.parent / "images" / f"{file.stem}-{dataset}-{protocol.replace(' ', '-')}-{what}.svg"
            title = f"{dataset}, {protocol}: validation by {what} of training"
            plots.lines(picture, title, series, what, f"valid NDCG@{K}", logx=False, logy=False, ticks=False)
            page.figure(picture, file, title)


def _steps(run: dict[str, Any], epoch: int, score: float) -> float:
    return (epoch + 1) * run["steps_per_epoch"]


def _seconds(run: dict[str, Any], epoch: int, score: float) -> float:
    return (epoch + 1) * run["train_seconds_per_epoch"]


def _sampled(page: Page, found: Results) -> None:
    rows = [
        [f"{dataset}, {model}", mode, str(len(runs)), *(_sampled_cell(runs, mode, f"{m}@{K}") for m in METRICS)]
        for dataset, protocols in found.rows.items()
        for model, rows in protocols.get(FULL, {}).items()
        for mode in dict.fromkeys(mode for row in rows for mode in row.get("sampled", {}))
        if (runs := [row for row in rows if mode in row.get("sampled", {})])
    ]
    if rows:
        page.heading("Among sampled candidates")
        page.text(
            "For comparison with papers that ranked the target among 100 items drawn uniformly (`uni100`) or by "
            "popularity (`pop100`), and with nothing else: **these are no full ranking**. The same models as above; "
            "`run_recbole --mode evaluate --checkpoint FILE --eval_args=\"{'mode': 'uni100'}\"`."
        )
        page.table(["set, model", "candidates", "seeds", *(f"{name}@{K}" for name in METRICS.values())], rows)


def _sampled_cell(runs: Rows, mode: str, metric: str) -> str:
    return score_cell(*spread([run["sampled"][mode][metric] for run in runs]))


def _tuning(page: Page, results: Path) -> None:
    searches = tuning.kept(results)
    if not searches:
        return
    page.heading("Tuning")
    page.text(
        "The same number of trials for every model of a set. A grid, stage by stage, is of an earlier plan than that "
        "of `benchmarks/accuracy/study.yaml`, which was not run yet. The best validation NDCG@10 wins; it goes to "
        "`properties/tuned/`, which `run_recbole` reads by itself, but for models that are run smaller than released, "
        "and where settings of an experiment have taken its place (the set's section says so). Trials know the "
        "validation set alone. Best first, each with how many epochs it went."
    )
    for search in searches:
        how = ", ".join(f"{key} {value}" for key, value in search["search"].items())
        page.text(f"**{search['model']} on {search['dataset']}, {search['protocol']}** ({how})")
        keys = list(search["space"])
        lines = [
            [*(str(_rounded(trial[key])) for key in keys), score_cell(trial[METRIC], None), str(trial["evaluations"])]
            for trial in search["trials"]
        ]
        page.table([*keys, "valid NDCG@10", "epochs"], lines)


def _rounded(value: Any) -> Any:
    return f"{value:.2g}" if isinstance(value, float) else value


def _commands(page: Page, found: Results) -> None:
    page.heading("Repeat any row")
    threads = " or ".join(sorted({str(row["environment"]["threads"]) for row in found.all_rows()}))
    page.text(
        "With `--data_path` where the set is not RecBole's own. On a CPU the same commit with the same number of "
        f"threads ({threads} here; `OMP_NUM_THREADS` and `NUMBA_NUM_THREADS` set it) gives the same result to 3 "
        "places; another number sums in another order, which training magnifies to about a percent. "
        f"`--exclude_history=True` with `--mode evaluate --checkpoint FILE` gives what is '{UNSEEN}' of a run that was "
        f"chosen among {FULL}. After each command: its test NDCG@{K} among {FULL}, and with the history excluded."
    )
    page.bullets([
        f"`{r['command']}`: {', '.join(score_cell(r['test'][p][f'ndcg@{K}'], None) for p in (FULL, UNSEEN))} "
        f"({r['environment']['commit']})"
        for r in found.all_rows()
    ])  # fmt: skip


def _title(model: str, runs: Rows, protocol: str) -> str:
    """The model's name, its layers, and in what else it differs from the study's other models."""
    config = runs[0]["config"]
    layers = config.get("num_layers") or config.get("n_layers")
    size = config.get("hidden_size", 64)
    others = [f"hidden size {size}"] * (size != 64)
    others += ["request_time known"] * (config.get("request_time") == "known")
    others += [f"filter {config.get('filter_share')}"] * bool(config.get("filter_share"))
    others += ["cosine scores"] * bool(config.get("temperature"))
    others += ["seen items left out"] * leaves_out_seen(runs[0])
    return ", ".join([f"{model}{mark(runs[0], protocol)}", f"{layers} layer{'s' * (layers != 1)}", *others])


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))
