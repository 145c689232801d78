"""The schema of all settings (:mod:`recbole_ssm.settings.schema`), and settings held to it."""

import logging
from typing import Any

from pydantic import ValidationError
from recbole.utils import ModelType

from recbole_ssm.errors import UserError
from recbole_ssm.settings.models import (
    BACKENDS,
    CAUSAL_MODELS,
    LOGISTIC_LOSSES,
    LOSS_TYPES,
    SCHEMAS,
    LossType,
    ModelSettings,
    Recboles,
    RecbolesSequential,
    TrainMode,
    divides,
    fixed,
)
from recbole_ssm.settings.parts import MOST, NEGATIVES, Cosine, Whole, near, setting
from recbole_ssm.settings.schema import Common, Sequential
from recbole_ssm.settings.text import sentence

__all__ = [
    "BACKENDS",
    "CAUSAL_MODELS",
    "LOGISTIC_LOSSES",
    "LOSS_TYPES",
    "MOST",
    "NEGATIVES",
    "SCHEMAS",
    "Common",
    "Cosine",
    "LossType",
    "ModelSettings",
    "TrainMode",
    "Whole",
    "check",
    "divides",
    "fixed",
    "near",
    "schema_of",
    "setting",
    "unread",
]  # fmt: skip

# Of our settings, values that ask a model which does not read them for nothing.
NEUTRAL = {
    "train_mode": ("prefix",), "time_order": ("float32",), "lr_scheduler_type": ("constant",), "warmup_ratio": (0,),
    "lr_restarts": (0,), "ema_decay": (0,),
    "cuda_graphs": ("auto", "off"), "exclude_history": (False,), "temperature": (None,), "label_smoothing": (0,),
    "allow_repeats": (True,),
    "use_time_gaps": (False,), "use_clock": (False,), "request_time": ("unknown",), "gbce_t": (),
    "item_features": (None,), "feature_fusion": ("sum",), "score_features": (False,),
    "ssm_backend": ("auto",), "loss_type": (),
}  # fmt: skip

# Who reads what RecBole gives to all models: those of a type, or some by name.
READERS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("MAX_ITEM_LIST_LENGTH", "ITEM_LIST_LENGTH_FIELD", "LIST_SUFFIX"), (ModelType.SEQUENTIAL,)),
    **dict.fromkeys(("alias_of_entity_id", "alias_of_relation_id"), (ModelType.KNOWLEDGE, "GRU4RecKG", "KSR")),
    "require_pow": ("LightGCN", "SimpleX"),
    "POSITION_FIELD": (),
}


def schema_of(model: str, ours: bool, sequential: bool, own_trainer: bool) -> type[Common]:
    """The settings that a model reads, but for those of RecBole's models that their property files alone know of.

    Args:
        model: its name.
        ours: whether it is one of this package's, or registered beside them.
        sequential: whether it is a sequential model.
        own_trainer: whether it is trained by another class than RecBole's ``Trainer``.
    """
    if model in SCHEMAS:
        return SCHEMAS[model]
    if ours:
        return ModelSettings
    if own_trainer:
        return Sequential if sequential else Common
    return RecbolesSequential if sequential else Recboles


def check(schema: type[Common], settings: dict[str, Any]) -> None:
    """Hold settings to a schema; those that it does not know are not looked at, and those in vain are told of.

    Raises:
        UserError: for a value that a setting cannot have, or settings that exclude each other.
    """
    for key, value in settings.items():
        if isinstance(value, int) and abs(value) >= 2**64 and key not in schema.model_fields:
            raise UserError(f"{key} is an integer of more than 64 bits: choose a smaller number.")
    known = {key: value for key, value in settings.items() if key in schema.model_fields}
    try:
        schema.model_validate(known)
    except ValidationError as error:
        raise UserError(sentence(schema, known, error)) from None
    for key, readers in READERS.items():
        in_vain = settings["MODEL_TYPE"] not in readers and settings["model"] not in readers
        if in_vain and known.get(key, schema.model_fields[key].default) != schema.model_fields[key].default:
            logging.getLogger().warning(f"{key} is {known[key]!r}, which {settings['model']} does not read")


def unread(schema: type[Common], given: dict[str, Any]) -> list[str]:
    """Which of the settings that our models share are given to a model that reads none of them."""
    return [
        key for key, neutral in NEUTRAL.items()
        if key in given and key not in schema.model_fields and not _is_among(given[key], neutral)
    ]  # fmt: skip


def _is_among(value: Any, neutral: tuple) -> bool:
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)
