"""What is compared and how each model is tuned: ``study.yaml`` as runs, and winners as property files."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from benchmarks.accuracy.runs import Spec, Store
from recbole_ssm.config import tuned_file
from recbole_ssm.settings.text import meaning

FILE = Path(__file__).with_name("study.yaml")


@dataclass(frozen=True)
class Study:
    """The content of ``study.yaml``.

    Attributes:
        plan: the file as it stands.
    """

    plan: dict[str, Any]

    @classmethod
    def read(cls, file: Path = FILE) -> "Study":
        """Read a file of the form of ``study.yaml``."""
        return cls(yaml.safe_load(file.read_text()))

    def grid(self, models: Iterable[str], datasets: Iterable[str], seeds: Iterable[int]) -> list[Spec]:
        """A run a seed of each model on each set, sets first; settings are those of the property files."""
        models, seeds = list(models), list(seeds)
        return [self._spec(m, dataset, seed) for dataset in datasets for seed in seeds for m in models]

    def _spec(self, name: str, dataset_name: str, seed: int) -> Spec:
        read, run = self.also.get(dataset_name, {}), self.also.get(name, {})
        model, dataset = run.get("model", name), read.get("dataset", dataset_name)
        settings = {**read.get("settings", {}), **run.get("settings", {})}
        if name in self.plan["smaller"] and (file := self.tuned_file(name, dataset)).exists():
            settings = {"tuned": False, **yaml.safe_load(file.read_text()), **settings}
        return Spec(model, dataset, seed, settings)

    def tuned_file(self, model: str, dataset: str) -> Path:
        """Where what tuning finds is written: a property file, but for models that are run smaller than released."""
        if model in self.plan["smaller"]:
            return FILE.parent / "tuned" / f"{dataset}-{model}.yaml"
        return tuned_file(model, dataset)

    def untuned(self, models: Iterable[str], datasets: Iterable[str]) -> list[str]:
        """Models that tuning must come before, each with its set."""
        wanted = [(m, d) for d in datasets for m in models if m not in self.also and d in self.plan["stages"]]
        return [f"{m} on {d}" for m, d in wanted if not self.tuned_file(m, d).exists()]

    @property
    def also(self) -> dict[str, dict[str, Any]]:
        """What stands for another model or set with settings of its own, by name."""
        return self.plan.get("also", {})

    @property
    def model_names(self) -> list[str]:
        """All models, those that are run only where they are asked for last."""
        return [*self.plan["models"], *(name for name, other in self.also.items() if "model" in other)]

    def base(self, model: str, dataset: str) -> dict[str, Any]:
        """Settings of all runs of a model on a set, those apart that tuning finds."""
        of_set = {key: self.plan[key][dataset] for key in ("train_batch_size", "epochs")}
        return {**self.plan["common"], **self.plan["own"].get(model, {}), **of_set}

    def tune(
        self, model: str, dataset: str, run: Callable[[list[Spec]], list[dict[str, Any]]]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Find a model's settings for a set, stage by stage.

        Args:
            model: model name.
            dataset: dataset name.
            run: makes trials and returns their rows.

        Returns:
            What was found, and the rows of all trials.
        """
        stages = self.plan["stages"][dataset]
        found = {key: values[0] for stage in stages for key, values in stage.items()}
        trials: dict[str, dict[str, Any]] = {}
        for stage in stages:
            tried = [{**found, **dict(zip(stage, values, strict=True))} for values in product(*stage.values())]
            specs = [self._trial(model, dataset, choice) for choice in tried]
            rows = {row["id"]: row for row in run(specs)}
            trials |= rows
            scores = [rows[spec.identity()]["best_valid_score"] for spec in specs]
            found = tried[scores.index(max(scores))]
        return self.named(model, found), list(trials.values())

    def trials_in(self, store: Store, model: str, dataset: str) -> list[dict[str, Any]]:
        """Rows of the trials that tuning as it is planned now has made, or began with."""
        made: list[dict[str, Any]] = []

        def look_up(specs: list[Spec]) -> list[dict[str, Any]]:
            rows = store.of(specs)
            made.extend(row for row in rows if row not in made)
            if len(rows) < len(specs):
                raise LookupError
            return rows

        with suppress(LookupError):
            self.tune(model, dataset, look_up)
        return made

    def _trial(self, model: str, dataset: str, choices: dict[str, Any]) -> Spec:
        settings = {**self.base(model, dataset), "epochs": self.plan["trial_epochs"][dataset]}
        # tuned: False keeps a winner that was written before from what its own trials start with.
        return Spec(model, dataset, self.plan["trial_seed"], {"tuned": False, **settings, **self.named(model, choices)})

    def named(self, model: str, choices: dict[str, Any]) -> dict[str, Any]:
        """``choices`` under the names that the model's settings have."""
        names = self.plan["dropout"]
        named: dict[str, Any] = {}
        for key, value in choices.items():
            if key == "alternative":
                named |= self.plan[key][model] if value else {}
            else:
                own = names.get(model, names["default"]) if key == "dropout" else [key]
                named |= dict.fromkeys(own, value)
        return named


def write_tuned(file: Path, settings: dict[str, Any], trials: list[dict[str, Any]]) -> None:
    """Write what tuning found as a property file that ``run_recbole`` picks up by itself."""
    best = max(trials, key=lambda row: row["best_valid_score"])
    epochs = best["config"]["epochs"]
    lines = [
        f"# {best['model']} on {best['dataset']}: the best of {len(trials)} trials by valid NDCG@10 "
        f"({best['best_valid_score']:.4f} after {epochs} epochs).",
        "# Found by python -m benchmarks accuracy --tune; the space is in benchmarks/accuracy/study.yaml.",
    ]
    for key, value in settings.items():
        setting = f"{key}: {'~' if value is None else value}"
        lines.append(f"{setting:<31} {meaning(best['model'], key)}".rstrip())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
