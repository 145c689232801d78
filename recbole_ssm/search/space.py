"""Search spaces: RecBole's parameter files, and the YAML files of ``properties/search``."""

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recbole_ssm.config import properties_dir
from recbole_ssm.errors import UserError

TYPES = ("choice", "uniform", "quniform", "loguniform")


@dataclass(frozen=True)
class Parameter:
    """The values that one setting may take.

    Attributes:
        kind: one of :data:`TYPES`.
        values: those of a ``choice``.
        low: lower bound of the others, the value itself (of ``loguniform``, too, not its logarithm).
        high: upper bound.
        q: step of ``quniform``, of which all values are multiples.
    """

    kind: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    q: float = 0.0

    def __post_init__(self):
        if self.kind == "choice":
            if not self.values:
                raise UserError("a choice needs at least one value.")
        elif not (math.isfinite(self.low) and math.isfinite(self.high)) or self.low >= self.high:
            raise UserError(f"{self.kind} needs a lower bound below the upper one, not {self.low} and {self.high}.")
        elif self.kind == "quniform" and self.q <= 0:
            raise UserError(f"quniform needs a positive step, not {self.q}.")
        elif self.kind == "loguniform" and self.low <= 0:
            raise UserError(f"loguniform needs positive values, not {self.low}.")

    def grid(self) -> list[Any] | None:
        """All values, or None where there is a continuum of them."""
        if self.kind == "choice":
            return list(self.values)
        if self.kind != "quniform":
            return None
        first, last = round(self.low / self.q), round(self.high / self.q)
        return [self.round(n * self.q) for n in range(first, last + 1)]

    def round(self, value: float) -> float | int:
        """``value`` as the multiple of ``q`` next to it, a whole number where all multiples are."""
        rounded = round(value / self.q) * self.q
        return round(rounded) if float(self.q).is_integer() else float(f"{rounded:.12g}")

    def plain(self) -> list[Any] | dict[str, Any]:
        """It as a YAML file would have it."""
        if self.kind == "choice":
            return list(self.values)
        bounds = {"type": self.kind, "low": self.low, "high": self.high}
        return {**bounds, "q": self.q} if self.kind == "quniform" else bounds

    def domain(self) -> Any:
        """It as one of Ray Tune's."""
        from ray import tune

        if self.kind == "choice":
            return tune.choice(list(self.values))
        if self.kind == "uniform":
            return tune.uniform(self.low, self.high)
        if self.kind == "loguniform":
            return tune.loguniform(self.low, self.high)
        # Ray's quniform wants bounds that are multiples of q; these have the same outcomes.
        values = self.grid() or []
        if len(values) == 1:
            return tune.choice(values)
        if float(self.q).is_integer():
            return tune.qrandint(values[0], values[-1], int(self.q))
        return tune.quniform(values[0], values[-1], self.q)


Space = dict[str, Parameter]


def read_space(file: str | Path) -> Space:
    """Read a search space: YAML by its suffix, else a parameter file of RecBole's.

    A YAML file has a line a setting: ``name: [values]`` to choose from, or ``name: {type: loguniform, low: 1.0e-4,
    high: 1.0e-2}`` with the bounds as values. In a parameter file, ``name type bounds``, the bounds of ``loguniform``
    are RecBole's, natural logarithms.

    Raises:
        UserError: for a file that is missing, or a line that cannot be read, with its number or name.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"parameter file {file} not found.")
    text = path.read_text(encoding="utf-8")
    space = _read_yaml(path, text) if path.suffix in (".yaml", ".yml") else _read_lines(path, text)
    if not space:
        raise UserError(f"{file} names no parameter to search.")
    return space


def search_file(model: str) -> Path:
    """Where the space that is shipped for a model stands; there may be none."""
    return properties_dir() / "search" / f"{model}.yaml"


def space_of(params: dict[str, Any]) -> Space:
    """A space from the content of a YAML file, ``{name: [values] or {type, low, high, q}}``.

    RecBole's form by type, ``{"choice": {name: values}, "loguniform": {name: [low, high]}}``, is understood as well,
    with RecBole's bounds.
    """
    if params and set(params) <= set(TYPES) and all(isinstance(content, dict) for content in params.values()):
        return {
            name: _checked(name, _recboles, kind, values)
            for kind, content in params.items()
            for name, values in content.items()
        }
    return {name: _checked(name, _own, given) for name, given in params.items()}


def _read_yaml(path: Path, text: str) -> Space:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict | None):
        raise UserError(f"{path} should hold lines of name: values.")
    return space_of(content or {})


def _read_lines(path: Path, text: str) -> Space:
    space: Space = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split(maxsplit=2)
        if not words:
            continue
        where = f"line {number} of {path}"
        if len(words) < 3:
            raise UserError(f"{where} should be name, type and values, not {line.strip()!r}.")
        name, kind, values = words
        space[name] = _checked(f"{where}: {name}", _recboles, kind, _values(values))
    return space


def _values(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        # RecBole evaluates names as well, of which a file can need no others.
        return [word.strip().strip("'\"") for word in text.strip("[]()").split(",")]


def _recboles(kind: str, values: Any) -> Parameter:
    if kind not in TYPES:
        raise UserError(f"there is no type {kind!r}: choose one of {', '.join(TYPES)}.")
    values = tuple(values) if isinstance(values, list | tuple) else (values,)
    if kind == "choice":
        return Parameter(kind, values)
    low, high, *rest = _numbers(kind, values, 3 if kind == "quniform" else 2)
    if kind == "loguniform":
        low, high = math.exp(low), math.exp(high)
    return Parameter(kind, (), low, high, *rest)


def _numbers(kind: str, values: tuple[Any, ...], count: int) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count:
        raise UserError(f"{kind} needs {count} numbers, not {', '.join(map(str, values))}.")
    return numbers


def _own(given: Any) -> Parameter:
    if isinstance(given, list):
        return Parameter("choice", tuple(given))
    if not isinstance(given, dict) or given.get("type") not in TYPES[1:]:
        raise UserError(f"write a list of values, or {{type: …, low: …, high: …}} with type {', '.join(TYPES[1:])}.")
    kind = given["type"]
    keys = ("low", "high", "q") if kind == "quniform" else ("low", "high")
    if set(given) != {"type", *keys}:
        raise UserError(f"{kind} needs {', '.join(keys)}, not {', '.join(key for key in given if key != 'type')}.")
    return Parameter(kind, (), *_numbers(kind, tuple(given[key] for key in keys), len(keys)))


def _checked(where: str, read: Callable[..., Parameter], *given: Any) -> Parameter:
    try:
        return read(*given)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
