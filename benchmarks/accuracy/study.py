"""What is compared and how each model is tuned: ``study.yaml`` as runs, and winners as property files."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.accuracy.runs import Spec
from benchmarks.accuracy.worker import FULL, PROTOCOLS, UNSEEN
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

    def grid(
        self,
        models: Iterable[str],
        datasets: Iterable[str],
        seeds: Iterable[int],
        protocol: str = FULL,
        tuned_by: str | None = None,
    ) -> list[Spec]:
        """A run a seed of each model on each set, sets first; settings are those of the property files.

        Args:
            models: model names, or names of ``also``.
            datasets: dataset names, or names of ``also``.
            seeds: seeds of everything.
            protocol: of :data:`~benchmarks.accuracy.worker.PROTOCOLS`, by which each run's epoch is chosen.
            tuned_by: that of the property files; the same where it is absent.
        """
        models, seeds, tuned_by = list(models), list(seeds), tuned_by or protocol
        return [
            self._spec(model, dataset, seed, protocol, tuned_by)
            for dataset in datasets
            for seed in seeds
            for model in models
        ]

    def _spec(self, name: str, dataset_name: str, seed: int, protocol: str, tuned_by: str) -> Spec:
        read, run = self.also.get(dataset_name, {}), self.also.get(name, {})
        model, dataset = run.get("model", name), read.get("dataset", dataset_name)
        settings = {**PROTOCOLS[protocol], **read.get("settings", {}), **run.get("settings", {})}
        if name in self.plan["smaller"] or tuned_by != protocol:
            file = self.tuned_file(name, dataset, tuned_by)
            if file.exists():
                settings = {"tuned": False, **yaml.safe_load(file.read_text()), **settings}
        return Spec(model, dataset, seed, settings)

    def searched(self, model: str, dataset: str, seeds: Iterable[int]) -> list[Spec]:
        """A run a seed of a model as its paper has it, with what a search of equal budget for all found.

        Where this package's own settings have taken the place of what a search found, that stands in ``searched``.
        """
        file = FILE.parent / "searched" / f"{dataset}-{model}.yaml"
        if not file.exists():
            return self.grid([model], [dataset], seeds)
        return [Spec(model, dataset, seed, {"tuned": False, **yaml.safe_load(file.read_text())}) for seed in seeds]

    def tuned_file(self, model: str, dataset: str, protocol: str) -> Path:
        """Where what tuning finds is written: a property file, but for models that are run smaller than released."""
        file = tuned_file(model, dataset, protocol == UNSEEN)
        return FILE.parent / "tuned" / file.name if model in self.plan["smaller"] else file

    def untuned(self, wanted: Iterable[tuple[str, str]], protocol: str) -> list[str]:
        """Those pairs of a model and a set that tuning must come before."""
        tuned = [(m, d) for m, d in wanted if m not in self.also and d in self.plan["epochs"]]
        return [f"{m} on {d}" for m, d in tuned if not self.tuned_file(m, d, protocol).exists()]

    @property
    def also(self) -> dict[str, dict[str, Any]]:
        """What stands for another model or set with settings of its own, by name."""
        return self.plan.get("also", {})

    @property
    def model_names(self) -> list[str]:
        """All models, those that are run only where they are asked for last."""
        return [*self.plan["models"], *(name for name, other in self.also.items() if "model" in other)]

    def base(self, model: str, dataset: str, protocol: str) -> dict[str, Any]:
        """Settings of all trials of a model on a set, and so of its runs, those apart that are searched."""
        own = self.plan["own"].get(model, {})
        return {**PROTOCOLS[protocol], **self.plan["common"], **own, "epochs": self.plan["epochs"][dataset]}

    def space(self, model: str) -> dict[str, Any]:
        """What is searched of a model, in the form of ``properties/search``."""
        space, names = dict(self.plan["space"]), self.plan["dropout"]
        dropout = space.pop("dropout")
        own = names.get(model, names["default"])
        return {**space, **dict.fromkeys(own, dropout), **self.plan["own_space"].get(model, {})}


def write_tuned(file: Path, model: str, settings: dict[str, Any], about: str) -> None:
    """Write settings as a property file that ``run_recbole`` picks up by itself, under lines of comment."""
    lines = [f"# {line}" for line in about.splitlines()]
    for key, value in settings.items():
        setting = f"{key}: {'~' if value is None else value}"
        lines.append(f"{setting:<31} {meaning(model, key)}".rstrip())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
