"""The study's runs by set, candidates and model, and how tables write them."""

from itertools import product
from typing import Any

from benchmarks.accuracy.runs import Store
from benchmarks.accuracy.statistics import Comparison, compare, spread
from benchmarks.accuracy.study import Study
from benchmarks.accuracy.worker import FULL, PROTOCOLS, UNSEEN

BASELINES = ("SASRec", "Mamba4Rec")
K = 10

Rows = list[dict[str, Any]]


def same_seeds(rows: dict[Any, Rows]) -> dict[Any, Rows]:
    """Of each list the rows of seeds that all lists have, so that means compare alike; all where none is shared."""
    shared = set.intersection(*({row["seed"] for row in own} for own in rows.values())) if rows else set()
    if not shared:
        return rows
    return {key: [row for row in own if row["seed"] in shared] for key, own in rows.items()}


class Results:
    """The rows of the study's grid, by set, candidates and model; seeds in their order.

    Of a model's runs that were tuned and chosen among these candidates and among the others (:func:`chosen_by`) those
    stand there that are the best on the validation set, ranked among these, by the seeds that all have. Among all items
    none does that leaves out seen ones by itself (:func:`leaves_out_seen`): it would be compared with models that rank
    more than it does.

    Attributes:
        store: all runs.
        rows: by set, candidates and model.
        searched: by set and model, the runs of :meth:`Study.searched`.

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
        self.rows: dict[str, dict[str, dict[str, Rows]]] = {}
        for dataset in datasets:
            for protocol in PROTOCOLS:
                for model in models:
                    both = dict.fromkeys((protocol, *PROTOCOLS))
                    grids = (
                        study.grid([model], [dataset], store.seeds(), chosen_by, tuned_by)
                        for chosen_by, tuned_by in product(both, both)
                    )
                    made = {
                        number: rows
                        for number, rows in enumerate(map(store.of, grids))
                        if rows and not (protocol == FULL and leaves_out_seen(rows[0]))
                    }
                    if made:
                        alike = same_seeds(made)
                        best = max(made, key=lambda number: _valid(alike[number], protocol))
                        self.rows.setdefault(dataset, {}).setdefault(protocol, {})[model] = made[best]
        self.searched: dict[str, dict[str, Rows]] = {}
        for dataset in (name for name in study.plan["datasets"] if name not in study.also):
            for model in study.plan["models"]:
                if rows := store.of(study.searched(model, dataset, store.seeds())):
                    self.searched.setdefault(dataset, {})[model] = rows

    def all_rows(self) -> Rows:
        """Every row, once."""
        tables = [*(models for sets in self.rows.values() for models in sets.values()), *self.searched.values()]
        rows = (row for models in tables for own in models.values() for row in own)
        return list({row["id"]: row for row in rows}.values())


def _valid(rows: Rows, protocol: str) -> float:
    return spread([row["valid"][protocol][f"ndcg@{K}"] for row in rows])[0]


def chosen_by(row: dict[str, Any]) -> str:
    """The candidates among which a run's epoch and settings were chosen."""
    return UNSEEN if row["config"].get("exclude_history") else FULL


def leaves_out_seen(row: dict[str, Any]) -> bool:
    """Whether a run's model ranks what a history holds last by itself (``allow_repeats: False``)."""
    return row["config"].get("allow_repeats") is False


def mark(row: dict[str, Any], protocol: str) -> str:
    """What stands behind the name of a model in a table whose candidates are not those that it was chosen among."""
    return "" if chosen_by(row) == protocol else "\\*"


def tests_of(models: dict[str, Rows]) -> int:
    """How many comparisons a set's two tables hold: of each pair with a baseline, under both evaluations."""
    pairs = {frozenset((m, b)) for m in models for b in BASELINES if b in models and m != b}
    return len(PROTOCOLS) * len(pairs)


def compared(store: Store, models: dict[str, Rows], model: str, other: str, protocol: str, tests: int) -> Comparison:
    """A model against another one, over the seeds of both."""
    rows = same_seeds({name: models[name] for name in (model, other)})
    own, others = (store.user_scores(rows[name], protocol, f"ndcg@{K}") for name in (model, other))
    return compare(own, others, tests)


def column(models: dict[str, Rows], metric: str, protocol: str, k: int = K) -> dict[str, str]:
    """Each model's mean and deviation, the best mean in bold."""
    values = {m: spread([row["test"][protocol][f"{metric}@{k}"] for row in rows]) for m, rows in models.items()}
    best = max(mean for mean, _ in values.values())
    return {model: score_cell(*score, bold=score[0] == best) for model, score in values.items()}


def score_cell(mean: float, deviation: float | None, bold: bool = False) -> str:
    """A metric's mean and deviation, as a table shows them."""
    number = f"{mean:.4f}"[1:] if 0 <= mean < 1 else f"{mean:.4f}"
    number = f"**{number}**" if bold else number
    return number if deviation is None else f"{number} ± {f'{deviation:.4f}'[1:]}"


def gain_cell(found: Comparison) -> str:
    """How far one model is above another, by what chance over users it might not be, and whether its seeds say so."""
    p = "< .001" if found.p < 0.001 else f"{found.p:.3f}"[1:] if found.p < 0.9995 else "1"
    seeds = ", 1 seed" * (found.seeds == 1) + ", seeds differ" * (not found.agree)
    return f"{found.change:+.1%} (p {p}{seeds})"
