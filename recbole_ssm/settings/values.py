"""Values of settings as Python's own words and numbers: read without running anything, and told in one line."""

import ast
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from recbole_ssm.errors import UserError


class PlainLoader(yaml.SafeLoader):
    """Reads data alone, and numbers as RecBole does, such as ``1e-3``."""


def literal(text: str) -> Any:
    """What a word of the command line stands for: a literal of Python's, true, false, ``~`` for None, or itself."""
    lowered = text.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    if text == "~":
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def read_settings(file: str | Path, loader: Any = yaml.SafeLoader) -> dict[str, Any]:
    """The settings in a YAML file, which holds data alone.

    Raises:
        UserError: where there is no such file, or it cannot be read as lines of ``key: value``.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"config file {file} not found.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise UserError(f"config file {file} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict | None) or not all(isinstance(key, str) for key in content or {}):
        raise UserError(f"config file {file} should hold lines of key: value.")
    return content or {}


def is_name(word: Any) -> bool:
    """Whether ``word`` names a file in a folder, and not one elsewhere, and may stand in a line of a log."""
    return isinstance(word, str) and word.isprintable() and not set(word) & set("/\\:") and bool(word.strip(". "))


def printable(value: Any) -> Any:
    """``value`` as it may stand in a line of a log: a word's line breaks and control characters are escaped."""
    if not isinstance(value, str) or value.isprintable():
        return value
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in value)


def is_plain(value: Any) -> bool:
    """Whether ``value`` is built of Python's own types alone, as what :attr:`Config.given` holds is."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def native(value):
    """``value`` with NumPy's numbers and with paths as what they stand for."""
    if isinstance(value, dict):
        return {key: native(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(native(item) for item in value)
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, Path) else value


def plain(value):
    """A :func:`native` ``value`` as built of Python's own types, which a checkpoint can hold safely."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
