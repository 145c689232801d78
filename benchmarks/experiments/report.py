"""The page of the papers' experiments, from the result files alone."""

from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks import plots
from benchmarks.accuracy.parts import LENGTHS, NEW, RAREST, TAIL
from benchmarks.accuracy.results import BASELINES, K, Results, chosen_by, compared, gain_cell, same_seeds, score_cell
from benchmarks.accuracy.runs import Store
from benchmarks.accuracy.statistics import spread
from benchmarks.accuracy.study import Study
from benchmarks.accuracy.worker import FULL, UNSEEN
from benchmarks.experiments.plan import EXPERIMENTS, Experiment
from benchmarks.pages import Page
from recbole_ssm.analysis.ranking import length_buckets

# So few users' mean is no more than noise.
FEWEST = 20

# The runs of an experiment on one set: by model and variant, a row of the result file a seed.
Rows = dict[tuple[str, str], list[dict[str, Any]]]


def write_pages(results: Path, file: Path) -> None:
    """Write the page and its pictures from the result files in a folder."""
    store, study, file = Store(results / "runs.jsonl"), Study.read(), file.resolve()
    page = Page("The papers' experiments")
    page.text(
        "Written by `python -m benchmarks experiments`. Split, candidates, order and choice of the epoch (by all "
        "items, where nothing else is said) are those of [the study](study.md). Where nothing else is said either, the "
        "models are [the papers', searched alike](study.md#the-papers-models-searched-alike), but for what an "
        "experiment varies (and 6 epochs on ml-1m, where lengths are not what varies); a variant that the search chose "
        "is not listed again. A model 'w/o seen items' is trained with them left out (`allow_repeats: False`), and "
        "ranks them last by itself among all items, too, where others rank them with the rest. "
        f"Test NDCG@{K}, mean ± standard deviation where there are several seeds; with one, differences of some "
        "percent are noise."
    )
    for name, experiment in EXPERIMENTS.items():
        found = {dataset: _rows(store, study, experiment, dataset) for dataset in _datasets(study, experiment)}
        found = {dataset: rows for dataset, rows in found.items() if _compares(experiment, rows)}
        if not found:
            continue
        page.heading(experiment.title)
        page.text(f"{experiment.source}. `python -m benchmarks experiments {name} --datasets {' '.join(found)}`.")
        for dataset, rows in found.items():
            _table(page, experiment, dataset, rows)
            _picture(page, file, name, experiment, dataset, rows)
        if name in PARTS:
            PARTS[name](page, file, store, found)
    grid = Results(store, study)
    _parts_of_the_study(page, file, grid)
    _by_length_of_the_user(page, file, grid)
    page.write(file)
    print(f"written: {file} and {file.with_suffix('.html')}")


def _datasets(study: Study, experiment: Experiment) -> Iterable[str]:
    return study.plan["datasets"] if experiment.datasets is None else experiment.datasets


def _rows(store: Store, study: Study, experiment: Experiment, dataset: str) -> Rows:
    specs = experiment.specs(study, dataset, store.seeds())
    found: Rows = {}
    for key, seeds in specs.items():
        rows = store.of(seeds)
        if rows and rows not in found.values():  # a variant that is what tuning chose stands as that alone
            found[key] = rows
    return same_seeds(found)


def _compares(experiment: Experiment, rows: Rows) -> bool:
    """Whether there are two variants of any model, or two models on a set of the experiment's own."""
    models = [model for model, _ in rows]
    return len(models) > (len(set(models)) if experiment.datasets is None else 1)


def _ndcg(rows: list[dict[str, Any]], protocol: str) -> tuple[float, float | None]:
    return spread([row["test"][protocol][f"ndcg@{K}"] for row in rows])


def _table(page: Page, experiment: Experiment, dataset: str, rows: Rows) -> None:
    models = [model for model in experiment.all_models if any(model == own for own, _ in rows)]
    for protocol in (FULL, UNSEEN):
        scores = {key: _ndcg(own, protocol) for key, own in rows.items()}
        best = {model: max(score[0] for (own, _), score in scores.items() if own == model) for model in models}
        lines = []
        for variant in experiment.variants:
            own = {model: scores.get((model, variant)) for model in models}
            counts = sorted({len(rows[model, variant]) for model, score in own.items() if score})
            cells = [score_cell(*score, bold=score[0] == best[model]) if score else "" for model, score in own.items()]
            if counts:
                lines.append([variant, *cells, " to ".join(map(str, counts))])
        page.table([f"{dataset}, {protocol}", *models, "seeds"], lines)


def _picture(page: Page, file: Path, name: str, experiment: Experiment, dataset: str, rows: Rows) -> None:
    picture = file.parent / "images" / f"{file.stem}-{name}-{dataset}.svg"
    protocol = chosen_by(next(iter(rows.values()))[0])
    title = f"{dataset}: {experiment.title}"
    axis = f"NDCG@{K}, {protocol}"
    if experiment.xlabel is None:
        several = len({model for model, _ in rows}) > 1
        means = {
            f"{model}, {variant}" if several else variant: _ndcg(own, protocol)
            for (model, variant), own in rows.items()
        }
        plots.dots(picture, title, means, axis)
    else:
        numbers = [_number(variant) for variant in experiment.variants]
        known = [number for number in numbers if number is not None]
        step = {v: known[-1] * 2 if n is None else n for v, n in zip(experiment.variants, numbers, strict=True)}
        series: dict[str, list[tuple[float, float]]] = {}
        for (model, variant), own in rows.items():
            series.setdefault(model, []).append((step[variant], _ndcg(own, protocol)[0]))
        names = {place: variant for variant, place in step.items()}
        plots.lines(picture, title, series, experiment.xlabel, axis, logx=False, logy=False, xnames=names)
    page.figure(picture, file, title)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _fusion(page: Page, file: Path, store: Store, found: dict[str, Rows]) -> None:
    """Fusion weights by the length that a model was trained at, or by that of each user's history."""
    for dataset, rows in found.items():
        lines, series = [], {}
        for (_, variant), own in rows.items():
            weights = [row["parts"]["fusion"] for row in own if "fusion" in row.get("parts", {})]
            lengths = list(weights[0]) if weights else []
            if not own[0]["config"]["input_dependent_fusion"]:
                lengths = lengths and ["all"]  # the same for every history
            for length in lengths:
                attention = mean(weight[length][0] for weight in weights)
                lines.append([f"{dataset}, {variant}", length, f"{attention:.3f}", f"{1 - attention:.3f}"])
                series[f"{variant}, {length}"] = {"attention": attention, "state space": 1 - attention}
        if lines:
            page.table(["trained with", "history of", "attention, gamma_1", "state space, gamma_2"], lines)
            picture = file.parent / "images" / f"{file.stem}-gamma-{dataset}.svg"
            plots.stacked_bars(picture, f"{dataset}: fusion weights by length of the history", series, "share")
            page.figure(picture, file, f"{dataset}: fusion weights")


def _lengths(page: Page, file: Path, store: Store, found: dict[str, Rows]) -> None:
    """STAR-Rec against the others at each maximum length, and its fusion weights there."""
    lines = []
    for dataset, rows in found.items():
        for variant in EXPERIMENTS["max_length"].variants:
            models = {model: own for (model, name), own in rows.items() if name == variant}
            others = [model for model in BASELINES if model in models and "STARRec" in models]
            tests = len(others) * len(EXPERIMENTS["max_length"].variants)
            cells = {other: gain_cell(compared(store, models, "STARRec", other, FULL, tests)) for other in others}
            if cells:
                lines.append([f"{dataset}, {variant}", *(cells.get(other, "") for other in BASELINES)])
    if lines:
        page.text(
            f"STAR-Rec's NDCG@{K} over the others' at the same maximum length (its paper's claim at length 5), {FULL}; "
            "p: paired t-test over users, Bonferroni-adjusted for a set's comparisons."
        )
        page.table(["maximum length", *(f"over {other}" for other in BASELINES)], lines)
    lines = []
    for dataset, rows in found.items():
        for (model, variant), own in rows.items():
            weights = [row["parts"]["fusion"]["all"] for row in own if "fusion" in row.get("parts", {})]
            if model == "STARRec" and weights:
                lines.append([f"{dataset}, {variant}", *(f"{number:.3f}" for number in np.mean(weights, axis=0))])
    if lines:
        page.text("The fusion weights that STAR-Rec learned at each maximum length (eq. 3):")
        page.table(["trained at length", "attention, gamma_1", "state space, gamma_2"], lines)


def _experts(page: Page, file: Path, store: Store, found: dict[str, Rows]) -> None:
    """Shares of the gate's mass, how even each user's gate is, and who is routed where."""
    for dataset, rows in found.items():
        variants = {variant: own for (_, variant), own in rows.items()}
        _shares(page, file, f"{file.stem}-experts-share-{dataset}", dataset, variants)
        _by_category(page, dataset, variants)


def _shares(page: Page, file: Path, name: str, title: str, groups: dict[str, list[dict[str, Any]]]) -> None:
    """A table and a picture of the experts' shares, a line a group of runs."""
    lines, series = [], {}
    for group, own in groups.items():
        experts = [row["parts"]["experts"] for row in own if "experts" in row.get("parts", {})]
        if not experts:
            continue
        shares = sorted(np.mean([sorted(expert["share"]) for expert in experts], axis=0), reverse=True)
        entropy = mean(expert["entropy"] for expert in experts)
        lines.append([group, *(f"{share:.1%}" for share in shares), f"{entropy:.2f}"])
        series[group] = {f"expert {i + 1}": share for i, share in enumerate(shares)}
    if not lines:
        return
    page.text(
        "Each expert's share of the gate's mass over the test users, largest first, and the mean entropy of a "
        "user's gate (0: one expert alone, 1: all alike)."
    )
    page.table([title, *(str(i + 1) for i in range(len(lines[0]) - 2)), "entropy"], lines)
    picture = file.parent / "images" / f"{name}.svg"
    plots.stacked_bars(picture, f"{title}: shares of the experts", series, "share of the gate's mass")
    page.figure(picture, file, f"{title}: shares of the experts")


def _by_category(page: Page, dataset: str, variants: dict[str, list[dict[str, Any]]]) -> None:
    lines = []
    for variant, own in variants.items():
        experts = own[0].get("parts", {}).get("experts", {})
        gates = {genre: gate for genre, gate in experts.get("by_category", {}).items() if sum(gate)}
        if gates:
            away = np.abs(np.array(list(gates.values())) - experts["share"])
            genre = list(gates)[away.max(1).argmax()]
            lines.append([variant, str(len(gates)), f"{away.mean():.1%}", f"{away.max():.1%}", genre])
    if lines:
        page.text(
            "How far an expert's share among the users of a genre (each weighted by the genre's part in the history) "
            "is from its share among all, in points; the first seed's run."
        )
        page.table([dataset, "genres", "mean", "largest", "at"], lines)


def _rare_items(page: Page, file: Path, store: Store, found: dict[str, Rows]) -> None:
    """Accuracy for the users whose target is a rare item, or one that training never had."""
    for dataset, rows in found.items():
        lines = []
        for group in (NEW, RAREST, TAIL):
            for (model, variant), own in rows.items():
                groups = [row["popularity"][group] for row in own if group in row.get("popularity", {})]
                if groups:
                    score = spread([one[f"ndcg@{K}"] for one in groups])
                    auc = mean(one["auc"] for one in groups)
                    users = f"{groups[0]['number']:,}"
                    lines.append([group, f"{model}, {variant}", users, score_cell(*score), f"{auc:.3f}"])
        if lines:
            page.text(
                f"Test users of {dataset} by their target, {FULL}; AUC is the part of the other items that are ranked "
                "behind it, by chance a half."
            )
            page.table(["target", "model", "users", f"NDCG@{K}", "AUC"], lines)


PARTS: dict[str, Callable[[Page, Path, Store, dict[str, Rows]], None]] = {
    "max_length": _lengths,
    "fusion": _fusion,
    "experts": _experts,
    "features": _rare_items,
}


def _parts_of_the_study(page: Page, file: Path, results: Results) -> None:
    """Experts and fusion weights of the study's own STAR-Rec, by set."""
    sets = ((dataset, protocols.get(FULL, {})) for dataset, protocols in results.rows.items())
    groups = {dataset: models["STARRec"] for dataset, models in sets if "STARRec" in models}
    if not groups:
        return
    page.heading("What the study's STAR-Rec makes of its parts, by set")
    _shares(page, file, f"{file.stem}-experts-by-set", "STAR-Rec as tuned, mean over seeds", groups)
    weights = {dataset: [row["parts"]["fusion"]["all"] for row in own] for dataset, own in groups.items()}
    page.table(
        ["fusion weights, mean over seeds", "attention, gamma_1", "state space, gamma_2"],
        [[dataset, *(f"{number:.3f}" for number in np.mean(own, axis=0))] for dataset, own in weights.items()],
    )


def _by_length_of_the_user(page: Page, file: Path, results: Results) -> None:
    """Accuracy of the study's own models by how long a history each user has."""
    rows = {dataset: protocols[FULL] for dataset, protocols in results.rows.items() if FULL in protocols}
    if not rows:
        return
    page.heading("Who is served how well, by length of the history")
    page.text(f"Test NDCG@{K}, {FULL}, of the study's runs, mean over seeds; lengths that {FEWEST} users or more have.")
    for dataset, models in ((dataset, same_seeds(models)) for dataset, models in rows.items()):
        first = next(iter(models.values()))[0]
        buckets = length_buckets(results.store.read_ranks(first["id"], FULL).lengths, LENGTHS)
        buckets = {name: users for name, users in buckets.items() if len(users) >= FEWEST}
        if not buckets:
            continue
        scores = {model: results.store.user_scores(rows, FULL, f"ndcg@{K}").mean(0) for model, rows in models.items()}
        lines = []
        for name, users in buckets.items():
            means = {model: float(score[users].mean()) for model, score in scores.items()}
            best = max(means.values())
            lines.append([name, f"{len(users):,}", *(score_cell(m, None, bold=m == best) for m in means.values())])
        page.table([f"{dataset}: items before the target", "users", *models], lines)
        picture = file.parent / "images" / f"{file.stem}-by-length-{dataset}.svg"
        places = {float(place): name for place, name in enumerate(buckets)}
        series = {
            model: [(place, float(score[buckets[name]].mean())) for place, name in places.items()]
            for model, score in scores.items()
        }
        title = f"{dataset}: NDCG@{K} by length of the history"
        plots.lines(picture, title, series, "items", f"NDCG@{K}", logx=False, logy=False, xnames=places)
        page.figure(picture, file, title)
