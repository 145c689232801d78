"""The study's page: its tables, tests and pictures, from the result files alone."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import plots
from benchmarks.accuracy.claims import CLAIMS, LEVEL, Claim
from benchmarks.accuracy.runs import Store
from benchmarks.accuracy.statistics import Comparison, compare, critical_difference, mean_ranks, spread
from benchmarks.accuracy.study import Study
from benchmarks.accuracy.worker import FULL, TOPK, UNSEEN
from benchmarks.pages import Page
from benchmarks.report import versions

BASELINES = ("SASRec", "Mamba4Rec")
K = 10
METRICS = {"ndcg": "NDCG", "recall": "Recall", "mrr": "MRR"}

Rows = list[dict[str, Any]]


def same_seeds(rows: dict[Any, Rows]) -> dict[Any, Rows]:
    """Of each list the rows of seeds that all lists have, so that means compare alike; all where none is shared."""
    shared = set.intersection(*({row["seed"] for row in own} for own in rows.values())) if rows else set()
    if not shared:
        return rows
    return {key: [row for row in own if row["seed"] in shared] for key, own in rows.items()}


class Results:
    """The rows of the study's grid, by set and model; seeds in their order.

    Args:
        store: all runs.
        study: what belongs to the grid.
    """

    def __init__(self, store: Store, study: Study):
        self.store = store
        datasets, models = (
            # Sets that stand in `also` alone are an experiment's.
            dict.fromkeys([*names, *(row[key] for row in store.rows.values() if row[key] not in study.also)])
            for key, names in (("dataset", study.plan["datasets"]), ("model", study.model_names))
        )
        self.rows: dict[str, dict[str, Rows]] = {}
        for dataset in datasets:
            for model in models:
                rows = store.of(study.grid([model], [dataset], store.seeds()))
                if rows:
                    self.rows.setdefault(dataset, {})[model] = rows

    def all_rows(self) -> Rows:
        """Every row."""
        return [row for models in self.rows.values() for rows in models.values() for row in rows]


def write_pages(results: Path, file: Path) -> None:
    """Write the page and its pictures from the result files in a folder."""
    study, file = Study.read(), file.resolve()
    found = Results(Store(results / "runs.jsonl"), study)
    page = Page("The study: accuracy of STAR-Rec, SSD4Rec and Mamba4Rec beside SASRec and GRU4Rec")
    _protocol(page, found, study)
    for dataset in found.rows:
        _dataset(page, found, study, dataset, file)
    _critical_differences(page, found, study, file)
    _claims(page, found)
    _sampled(page, found)
    _tuning(page, study, Store(results / "tuning.jsonl"))
    _commands(page, found)
    page.write(file)
    print(f"written: {file} and {file.with_suffix('.html')}")


def _protocol(page: Page, found: Results, study: Study) -> None:
    page.text(
        "Written by `python -m benchmarks accuracy`; every number is from a run of `run_recbole` whose row stands in "
        "`benchmarks/results/runs.jsonl` with its settings, versions, commit and hardware."
    )
    about = [row["environment"] for row in found.all_rows()]
    page.bullets([
        "**Split**: leave-one-out: a user's last item is the test target, the one before it the validation target.",
        f"**Candidates**: all items. In columns '{FULL}' the history's items are among them, as RecBole evaluates; in "
        f"'{UNSEEN}' they are not, as gSASRec's code evaluates. The two must not be mixed.",
        "**Order**: by the exact timestamp (`time_order: exact`) but where a set's section says otherwise.",
        "**Time of the request**: unknown to the models (`request_time: unknown`) but where a row says that it is "
        "known.",
        "**Choice**: the best epoch by NDCG@10 on the validation set, all items; tuning by the same. What the test set "
        "says chooses nothing.",
        f"**Models**: hidden size {study.plan['common']['hidden_size']}, cross-entropy over all items, trained on "
        "every position of a history at once, a cosine learning rate; rows that differ say so. SASRec and GRU4Rec are "
        f"RecBole's classes. {' and '.join(study.plan['smaller'])} is smaller than its authors run it, so that a CPU "
        "can.",
        "**Values**: mean ± standard deviation over seeds of the run's test result; best mean in bold. p: paired "
        "t-test over users of NDCG@10 averaged over seeds, two-sided, Bonferroni-adjusted for a set's comparisons.",
        "**Minutes**: of training and validation up to the best epoch, on a machine that did other work as well, so an "
        "upper bound; speed is measured side by side in [the benchmarks](benchmarks.md).",
        f"**Hardware**: {_distinct(a['device'] for a in about)}. **Commits**: {_distinct(a['commit'] for a in about)}. "
        f"**Versions**: {_distinct(versions(a) for a in about)}.",
    ])  # fmt: skip


def _dataset(page: Page, found: Results, study: Study, dataset: str, file: Path) -> None:
    models = found.rows[dataset]
    config = next(iter(models.values()))[0]["config"]
    page.heading(dataset)
    page.text(
        f"Maximum length {config['MAX_ITEM_LIST_LENGTH']}, {config['epochs']} epochs of "
        f"{config['train_batch_size']:,} targets a step, 5-core, seeds "
        f"{_distinct(str(row['seed']) for rows in models.values() for row in rows)}. "
        f"{study.plan['notes'].get(dataset, '')}"
    )
    heads = ["model", "seeds", *(f"{name}@{K}, {protocol}" for protocol in (FULL, UNSEEN) for name in METRICS.values())]
    heads += ["epochs to best", "minutes to best", "parameters"]
    cells = {(metric, protocol): _column(models, metric, protocol) for protocol in (FULL, UNSEEN) for metric in METRICS}
    rows = []
    for model, runs in models.items():
        row = [_title(model, runs, config), str(len(runs))]
        row += [cells[metric, protocol][model] for protocol in (FULL, UNSEEN) for metric in METRICS]
        row.append(f"{np.mean([run['epochs_to_best'] for run in runs]):.0f}")
        row.append(f"{np.mean([run['seconds_to_best'] for run in runs]) / 60:.1f}")
        row.append(f"{runs[0]['parameters'] / 1e3:,.0f}k")
        rows.append(row)
    page.table(heads, rows)
    _pairs(page, found, dataset)
    _other_cutoffs(page, models)
    means = {
        f"{model}, {protocol}": spread([run["test"][protocol][f"ndcg@{K}"] for run in runs])
        for protocol in (FULL, UNSEEN)
        for model, runs in models.items()
    }
    picture = file.parent / "images" / f"{file.stem}-{dataset}.svg"
    plots.dots(picture, f"{dataset}: test NDCG@{K}, mean and standard deviation over seeds", means, f"NDCG@{K}")
    page.figure(picture, file, f"{dataset}: NDCG@{K} of all models")


def _column(models: dict[str, Rows], metric: str, protocol: str, k: int = K) -> dict[str, str]:
    """Each model's mean and deviation, the best mean in bold."""
    values = {m: spread([row["test"][protocol][f"{metric}@{k}"] for row in rows]) for m, rows in models.items()}
    best = max(mean for mean, _ in values.values())
    return {model: score_cell(*score, bold=score[0] == best) for model, score in values.items()}


def score_cell(mean: float, deviation: float | None, bold: bool = False) -> str:
    """A metric's mean and deviation, as a table shows them."""
    number = f"{mean:.4f}"[1:] if 0 <= mean < 1 else f"{mean:.4f}"
    number = f"**{number}**" if bold else number
    return number if deviation is None else f"{number} ± {f'{deviation:.4f}'[1:]}"


def _pairs(page: Page, found: Results, dataset: str) -> None:
    models = found.rows[dataset]
    baselines = [model for model in BASELINES if model in models]
    if len(models) < 2 or not baselines:
        return
    tests = _tests(models)
    heads = ["model"] + [f"NDCG@{K} over {b}, {protocol}" for b in baselines for protocol in (FULL, UNSEEN)]
    rows = []
    for model in models:
        row = [model]
        for baseline in baselines:
            for protocol in (FULL, UNSEEN):
                if model == baseline:
                    row.append("")
                    continue
                row.append(gain_cell(compared(found.store, models, model, baseline, protocol, tests)))
        rows.append(row)
    page.table(heads, rows)


def _tests(models: dict[str, Rows]) -> int:
    """How many comparisons a set's table holds: of each pair with a baseline, under both protocols."""
    return 2 * len({frozenset((m, b)) for m in models for b in BASELINES if b in models and m != b})


def compared(store: Store, models: dict[str, Rows], model: str, other: str, protocol: str, tests: int) -> Comparison:
    """A model against another one, over the seeds of both."""
    rows = same_seeds({name: models[name] for name in (model, other)})
    own, others = (store.user_ndcg(rows[name], protocol, K) for name in (model, other))
    return compare(own, others, tests)


def gain_cell(found: Comparison) -> str:
    """How far one model is above another, and by what chance it might not be."""
    p = "< .001" if found.p < 0.001 else f"{found.p:.3f}"[1:] if found.p < 0.9995 else "1"
    return f"{found.change:+.1%} (p {p})"


def _other_cutoffs(page: Page, models: dict[str, Rows]) -> None:
    others = [k for k in TOPK if k != K]
    heads = ["model", *(f"{m}@{k}, {p}" for p in (FULL, UNSEEN) for k in others for m in ("NDCG", "Recall"))]
    cells = [_column(models, metric, p, k) for p in (FULL, UNSEEN) for k in others for metric in ("ndcg", "recall")]
    page.table(heads, [[model, *(column[model] for column in cells)] for model in models])


def _critical_differences(page: Page, found: Results, study: Study, file: Path) -> None:
    sets = {name: models for name, models in found.rows.items() if name not in study.also}
    common = [m for m in study.plan["models"] if all(m in models for models in sets.values())]
    if len(common) < 2 or len(sets) < 2:
        return
    scores = np.array([
        [np.mean([row["test"][FULL][f"ndcg@{K}"] for row in models[model]]) for model in common]
        for models in sets.values()
    ])  # fmt: skip
    ranks = dict(zip(common, mean_ranks(scores), strict=True))
    difference = critical_difference(len(common), len(sets))
    page.heading("Over all sets")
    page.text(
        f"Mean rank by NDCG@{K}, {FULL}, over {len(sets)} sets. By Nemenyi's test (Demsar, JMLR 7, 2006) two models "
        f"differ at 5% where their mean ranks are {difference:.2f} apart. With so few sets only large gaps can show; "
        "the paired tests above look at users instead."
    )
    picture = file.parent / "images" / f"{file.stem}-ranks.svg"
    plots.critical_differences(picture, f"Mean rank over {len(sets)} sets, 1 is best", ranks, difference)
    page.figure(picture, file, "Mean ranks and the critical difference")


def _measured(found: Results, claim: Claim) -> float | Comparison | None:
    """What a claim is held against; None where one of its models was not run."""
    models = found.rows.get(claim.dataset, {})
    if claim.model not in models or claim.over not in {None, *models}:
        return None
    if claim.over:
        return compared(found.store, models, claim.model, claim.over, claim.protocol, _tests(models))
    return spread([run["test"][claim.protocol][claim.metric] for run in models[claim.model]])[0]


def _claims(page: Page, found: Results) -> None:
    measured = ((claim, _measured(found, claim)) for claim in CLAIMS)
    rows = [[f"{claim.dataset}: {claim.text}", *claim.verdict(m)] for claim, m in measured if m is not None]
    page.heading("Do the claims hold?")
    page.text(
        f"Means over seeds of NDCG@{K}, {FULL} where nothing else is said. A difference whose p above is over "
        f"{LEVEL} may be chance, whatever its sign."
    )
    page.table(["claim", "measured", "verdict"], rows)


def _sampled(page: Page, found: Results) -> None:
    rows = [
        [f"{dataset}, {model}", mode, str(len(runs)), *(_sampled_cell(runs, mode, f"{m}@{K}") for m in METRICS)]
        for dataset, models in found.rows.items()
        for model, rows in models.items()
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


def _tuning(page: Page, study: Study, store: Store) -> None:
    trials = {
        dataset: [row for model in study.plan["models"] for row in study.trials_in(store, model, dataset)]
        for dataset in study.plan["stages"]
    }
    if not any(trials.values()):
        return
    page.heading("Tuning")
    page.text(
        "The same budget and space for every model of a set: one trial a combination of values, stage by stage, each "
        "with what the one before found; the best validation NDCG@10 wins and goes to `properties/tuned/`, which "
        "`run_recbole` reads by itself (but for models that are run smaller than released). Trials know the validation "
        "set alone."
    )
    for dataset, rows in trials.items():
        if not rows:
            continue
        stages = study.plan["stages"][dataset]
        tried = "; then ".join(
            " times ".join(f"{key} of {', '.join(map(str, values))}" for key, values in stage.items())
            for stage in stages
        )
        page.text(f"**{dataset}**, {study.plan['trial_epochs'][dataset]} epochs a trial: {tried}.")
        keys = [key for stage in stages for key in stage]
        page.table(
            ["model", *keys, "valid NDCG@10"],
            [[r["model"], *_values_tried(study, r, keys), f"{r['best_valid_score']:.4f}"] for r in rows],
        )


def _values_tried(study: Study, trial: dict[str, Any], keys: list[str]) -> list[str]:
    """The values that a trial had for what the study's stages vary; the alternative by its own name."""
    model, settings = trial["model"], trial["settings"]

    def value(key: str) -> str:
        own = study.named(model, {key: True})
        if key != "alternative":
            return str(settings[next(iter(own))])
        taken = own.items() <= settings.items()
        return ", ".join(f"{name} {setting}" for name, setting in own.items()) if taken else ""

    return [value(key) for key in keys]


def _commands(page: Page, found: Results) -> None:
    page.heading("Repeat any row")
    threads = " or ".join(sorted({str(row["environment"]["threads"]) for row in found.all_rows()}))
    page.text(
        "With `--data_path` where the set is not RecBole's own. On a CPU the same commit with the same number of "
        f"threads ({threads} here; `OMP_NUM_THREADS` and `NUMBA_NUM_THREADS` set it) gives the same result to 3 "
        "places; another number sums in another order, which training magnifies to about a percent. "
        "`--exclude_history=True` with `--mode evaluate --checkpoint FILE` gives the second protocol."
    )
    heads = ["run", f"test NDCG@{K}, {FULL}", UNSEEN, "commit"]
    rows = [
        [f"`{r['command']}`", *(f"{r['test'][p][f'ndcg@{K}']:.4f}" for p in (FULL, UNSEEN)), r["environment"]["commit"]]
        for r in found.all_rows()
    ]
    page.table(heads, rows)


def _title(model: str, runs: Rows, common: dict[str, Any]) -> str:
    """The model's name, its layers, and in what else it differs from the set's other models."""
    config = runs[0]["config"]
    layers = config.get("num_layers") or config.get("n_layers")
    keys = ("hidden_size", "epochs", "train_mode", "lr_scheduler_type")
    others = [f"{key} {config.get(key)}" for key in keys if config.get(key) != common.get(key)]
    others += ["request_time known"] * (config.get("request_time") == "known")
    return ", ".join([model, f"{layers} layer{'s' * (layers != 1)}", *others])


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))
