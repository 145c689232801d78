"""Which models there are, and how RecBole comes to know them.

A model is registered where it stands, by :func:`register_model`; those of other packages are found by their entry
points of the group :data:`ENTRY_POINTS`.

RecBole finds a model as the class ``Name`` in the module ``recbole.model.<family>.<name in lower case>``, its dataset
as ``NameDataset`` in ``recbole.data.dataset`` and its trainer as ``NameTrainer`` in ``recbole.trainer``.
:func:`register` adds our names to these places, and replaces none. What it does replace are functions that could not do
with our models, or on today's stack, what they are documented to do: :data:`QUICK_START` and ``full_sort_scores``.
"""

import importlib
import pkgutil
import sys
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TypeVar

import recbole.data.dataset
import recbole.model
import recbole.trainer
import recbole.utils.case_study
import torch
from recbole.utils import get_model

from recbole_ssm.compat import mended
from recbole_ssm.errors import UserError
from recbole_ssm.settings import CAUSAL_MODELS, SCHEMAS, ModelSettings

# The models that were registered, by name.
MODELS: dict[str, type] = {}

# By which another package names modules that register models.
ENTRY_POINTS = "recbole_ssm.models"

FAMILIES = ("sequential_recommender", "general_recommender", "context_aware_recommender", "knowledge_aware_recommender")

Model = TypeVar("Model", bound=type)

# RecBole's functions that build all by names of their own module, where nothing can be added.
QUICK_START = ("run", "run_recbole", "run_recboles", "load_data_and_model", "objective_function")


def register_model(settings: type[ModelSettings]) -> Callable[[Model], Model]:
    """Decorator of a model's class, which makes it known by its name.

    Args:
        settings: every setting that it reads beside RecBole's own, with types, bounds and defaults.

    Raises:
        UserError: where another class has the name.
    """

    def registered(model: Model) -> Model:
        name = model.__name__
        taken = "RecBole" if name.lower() in _recboles_modules() else MODELS.get(name, model).__module__
        if taken != model.__module__:
            raise UserError(f"the name of the model {name} of {model.__module__} is taken by {taken}: choose another.")
        MODELS[name], SCHEMAS[name] = model, settings
        return model

    return registered


def register() -> None:
    """Make our models and other packages' known to RecBole's own look-ups by name, and to its quick start."""
    # RecBole's look-up imports all its sequential models, and one of them (SINE) switches torch's anomaly detection on
    # for the whole process, which slows every model's backward pass down. It did so before now where RecBole was
    # imported first; whoever wants it switches it on after this import.
    importlib.import_module("recbole.model.sequential_recommender")
    torch.autograd.set_detect_anomaly(False)

    from recbole_ssm import models
    from recbole_ssm.data.sequence_dataset import SequenceDataset
    from recbole_ssm.trainer import SequenceTrainer

    for module in pkgutil.iter_modules(models.__path__, f"{models.__name__}."):
        importlib.import_module(module.name)
    for point in entry_points(group=ENTRY_POINTS):
        _load(point)
    for name, model in MODELS.items():
        alias = f"recbole.model.sequential_recommender.{name.lower()}"
        sys.modules.setdefault(alias, sys.modules[model.__module__])
        for home, suffix, cls in (
            (recbole.data.dataset, "Dataset", SequenceDataset),
            (recbole.trainer, "Trainer", SequenceTrainer),
        ):
            if not hasattr(home, name + suffix):
                setattr(home, name + suffix, cls)
    _take_quick_start()
    _take_case_study()


def _load(point: EntryPoint) -> None:
    try:
        point.load()
    except Exception as error:  # of another package, which must not keep anybody from the other models
        warnings.warn(f"the models of {point.value} are left out, for it cannot be loaded: {error}", stacklevel=3)


def _take_quick_start() -> None:
    """Let :mod:`recbole.quick_start` be ours, by its signatures; so it comes without Ray, which RecBole's imports."""
    from recbole_ssm import quick_start

    theirs = sys.modules.get("recbole.quick_start.quick_start")
    sys.modules["recbole.quick_start.quick_start"] = quick_start
    package = importlib.import_module("recbole.quick_start")
    functions = {name: getattr(quick_start, name) for name in QUICK_START}
    vars(package).update(functions, quick_start=quick_start)
    if theirs not in (None, quick_start):
        # Functions that somebody has taken from it already go on in it.
        names = ("Config", "create_dataset", "data_preparation", "get_trainer")
        vars(theirs).update(functions, **{name: getattr(quick_start, name) for name in names})


def _take_case_study() -> None:
    """Let ``full_sort_scores`` of :mod:`recbole.utils.case_study`, and all that call it there, be ours."""
    from recbole_ssm.data import full_ranking

    recbole.utils.case_study.full_sort_scores = full_ranking.full_sort_scores


def model_class(config) -> type:
    """The class that ``config`` names, as :func:`recbole.utils.get_model`, made to run here and to train as it asks."""
    found = mended(get_model(config["model"]))
    if config["train_mode"] == "sequence" and config["model"] in CAUSAL_MODELS:
        from recbole_ssm.models.sequence_mode import with_sequence_mode

        return with_sequence_mode(found)
    return found


def list_models() -> list[str]:
    """Names of all models that ``--model`` takes: ours first, then RecBole's by family."""
    names = list(MODELS)
    for family in FAMILIES:
        found = {name for name in vars(importlib.import_module(f"recbole.model.{family}")) if not name.islower()}
        names += sorted(name for name in found - {*names} if name.lower() in _recboles_modules())
    return [*names, "lightgbm", "xgboost"]  # of the family whose import needs these packages


@cache
def _recboles_modules() -> set[str]:
    """Names of the modules that RecBole's models are in; without an import of these."""
    folder = Path(recbole.model.__file__ or "").parent
    return {module.name for module in pkgutil.iter_modules([str(folder / family) for family in FAMILIES])}
