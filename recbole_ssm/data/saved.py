"""Filtered datasets in a file: RecBole's ``save_dataset``, as arrays instead of a pickle, which could run code."""

import logging
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from recbole.utils import dataset_arguments, set_color
from recbole.utils.enum_type import FeatureSource, FeatureType

from recbole_ssm.checkpoint import digest, load_checkpoint, save_checkpoint
from recbole_ssm.data.context import columns_of
from recbole_ssm.errors import UserError
from recbole_ssm.registry import model_class

# What a dataset is made by, beside RecBole's dataset_arguments, which forget the last five.
OWN_ARGUMENTS = (
    "seed", "repeatable", "time_order", "encoding", "numerical_features", "discretization", "kg_reverse_r",
    "entity_kg_num_interval", "relation_kg_num_interval",
)  # fmt: skip

ENUMS = {cls.__name__: cls for cls in (FeatureSource, FeatureType)}


def made_by(config) -> dict[str, str]:
    """The settings that filtered data depend on, in a form that can be compared."""
    settings = {key: repr(config[key]) for key in [*dataset_arguments, *OWN_ARGUMENTS]}
    columns = columns_of(model_class(config), config)
    return {**settings, "time columns": repr(columns), "dataset": repr(config["dataset"])}


def save_dataset(dataset: Any, file: str | Path) -> None:
    """Write a filtered dataset.

    Raises:
        UserError: for one that keeps something else than numbers, words and tables.
    """
    derived = ("config", "logger", "field2token_id")
    own = {name: value for name, value in vars(dataset).items() if name not in derived}
    state = {
        "dataset_class": type(dataset).__name__,
        "made_by": made_by(dataset.config),
        "files": _digests(dataset.dataset_path, dataset.dataset_name),
        "dataset": _encode(own),
    }
    save_checkpoint(file, state)
    logging.getLogger().info(set_color("Saving filtered dataset into ", "pink") + f"[{file}]")


def load_dataset(file: str | Path, config: Any, dataset_class: Any) -> Any:
    """Read a dataset that :func:`save_dataset` wrote; None, and a line that says why, where another is asked for.

    Args:
        file: the file.
        config: what the dataset is for, and follows in all that comes after the filters.
        dataset_class: the class that it should have.

    Raises:
        UserError: for a file that is damaged or none of ours; RecBole's are pickles, which could run code.
    """
    if not Path(file).is_file():
        raise UserError(f"dataset_save_path is {file!s}, and there is no such file: save_dataset makes one.")
    state = load_checkpoint(file)
    wanted = made_by(config)
    differing = [key for key, value in wanted.items() if state.get("made_by", {}).get(key) != value]
    if state.get("dataset_class") != dataset_class.__name__:
        differing = ["the model's kind of dataset"]
    files = {} if differing else _digests(config["data_path"], config["dataset"])
    if files and files != state.get("files"):  # where they are gone, the saved dataset is what there is
        differing = [f"the files in {config['data_path']}"]
    if differing:
        logging.getLogger().warning(
            f"the dataset saved in {file} is not used: {', '.join(differing)} changed since. It is made anew."
        )
        return None
    try:
        dataset = object.__new__(dataset_class)
        vars(dataset).update(_decode(state["dataset"]), config=config, logger=logging.getLogger())
        dataset.field2token_id = {
            field: {token: number for number, token in enumerate(tokens)}
            for field, tokens in dataset.field2id_token.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} holds no dataset: remove it.") from error
    logging.getLogger().info(set_color("Load filtered dataset from", "pink") + f": [{file}]")
    return dataset


def _digests(folder: str | Path, name: str) -> dict[str, str]:
    """Digests of a dataset's atomic files, by their names."""
    found = {}
    for path in sorted(Path(folder).glob(f"{name}.*")):
        if path.is_file():
            with path.open("rb") as file:
                found[path.name] = digest(file)
    return found


def _encode(value: Any) -> Any:
    if isinstance(value, pd.DataFrame):
        columns = {str(name): _encode(column.to_numpy()) for name, column in value.items()}
        return {"__frame__": columns, "index": value.index.to_numpy()}
    if isinstance(value, np.ndarray) and value.dtype.kind in "OUS":
        if all(isinstance(item, str) for item in value):
            return {"__words__": value.tolist()}
        if all(isinstance(item, np.ndarray) for item in value):  # a column of lists
            return {
                "__lists__": np.concatenate(list(value)),
                "lengths": np.array([len(v) for v in value]),
            }
    if isinstance(value, Enum):
        return {"__enum__": type(value).__name__, "value": value.value}
    if isinstance(value, set | frozenset):
        return {"__set__": [_encode(item) for item in sorted(value, key=str)]}
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_encode(item) for item in value)
    plain = value is None or isinstance(value, str | int | float | bool | np.generic)
    if plain or (isinstance(value, np.ndarray) and value.dtype.kind in "biuf"):
        return value
    raise UserError(f"the dataset cannot be saved, for it keeps a {type(value).__name__}: leave save_dataset out.")


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if "__frame__" in value:
            columns = {name: _decode(column) for name, column in value["__frame__"].items()}
            return pd.DataFrame(columns, index=value["index"], copy=True)
        if "__words__" in value:
            return np.array(value["__words__"])
        if "__lists__" in value:
            lists = np.empty(len(value["lengths"]), dtype=object)
            lists[:] = np.split(value["__lists__"], np.cumsum(value["lengths"])[:-1])
            return lists
        if "__enum__" in value:
            return ENUMS[value["__enum__"]](value["value"])
        if "__set__" in value:
            return set(_decode(value["__set__"]))
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_decode(item) for item in value)
    return value
