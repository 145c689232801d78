"""What the schema says, in words: sentences for errors, lines of ``--help``, property files and tables of the docs."""

import re
import textwrap
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from recbole_ssm.settings.models import CAUSAL_MODELS, SCHEMAS, ModelSettings, OnePass, Scheduled, WithFeatures
from recbole_ssm.settings.parts import UNSUPPORTED, near
from recbole_ssm.settings.schema import Common

COLUMN = 32  # at which comments of property files begin


def extra(field: FieldInfo) -> dict[str, Any]:
    """What :func:`recbole_ssm.settings.parts.setting` keeps beside pydantic's own."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _kinds(annotation: Any) -> list[Any]:
    """The types of a union, without None, and what is annotated."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for part in get_args(annotation) if part is not type(None) for kind in _kinds(part)]
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    return [annotation]


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The words to choose from, where they are listed."""
    kinds = _kinds(field.annotation)
    return get_args(kinds[0]) if len(kinds) == 1 and get_origin(kinds[0]) is Literal else ()


def type_name(field: FieldInfo) -> str:
    """A setting's type as in RecBole's property files."""
    names = []
    for kind in _kinds(field.annotation):
        origin = get_origin(kind) or kind
        if origin is Literal:
            origin = type(get_args(kind)[0])
        names.append("dict" if isinstance(origin, type) and issubclass(origin, BaseModel) else origin.__name__)
    return " or ".join(dict.fromkeys(names))


def allowed(field: FieldInfo) -> str:
    """What a setting may be, as the end of "choose ..."."""
    if words := extra(field).get("allowed"):
        return words
    name, empty = type_name(field), type(None) in get_args(field.annotation)
    if choices(field):
        what = "one of " + ", ".join(map(str, choices(field)))
    elif name in ("int", "float"):
        what = _range("a whole number" if name == "int" else "a number", field)
    elif name == "bool":
        what = "True or False"
    else:
        what = " or ".join(
            {"str": "a word", "list": "a list", "dict": "a dict"}.get(part, part) for part in name.split(" or ")
        )
    return what + (", or ~ for none" if empty else "")


def _range(what: str, field: FieldInfo) -> str:
    bounds = {
        key: getattr(item, key) for item in field.metadata for key in ("ge", "gt", "le", "lt") if hasattr(item, key)
    }
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if low is None:
        return what
    if bounds.get("gt") == 0 and high is None:
        return what.replace("a ", "a positive ", 1)
    words = f"{what} {'from' if 'ge' in bounds else 'above'} {low}"
    # The largest integers are no choice but what can be stored.
    if high is None or high >= 2**31 - 1:
        return words
    return f"{words} to {'' if 'le' in bounds else 'below '}{high}"


def sentence(schema: type[BaseModel], settings: dict[str, Any], error: ValidationError) -> str:
    """The first thing that is wrong with ``settings``, in a sentence that says what to do."""
    found = error.errors()[0]
    if found["type"] == "value_error":
        return str(found["ctx"]["error"])
    name, *path = map(str, found["loc"])
    field, value, where = schema.model_fields[name], settings[name], name
    for part in path:
        inner = _model(field)
        if inner is None or not isinstance(value, dict) or part not in {*value, *inner.model_fields}:
            continue  # pydantic's name of a type, or a place in a list
        if part not in inner.model_fields:
            return f"{where} has no {part!r}{near(part, list(inner.model_fields))}"
        field, value, where = inner.model_fields[part], value.get(part), f"{part} of {where}"
    choice = allowed(field)
    example = """, such as "['a', 'b']\"""" if choice.startswith("a list") and isinstance(value, str) else ""
    return f"{where} is {value!r}: choose {choice}{example}."


def _model(field: FieldInfo) -> type[BaseModel] | None:
    models = (kind for kind in _kinds(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel))
    return next(models, None)


def registered() -> dict[str, type[ModelSettings]]:
    """The settings of each model that was registered, by its name."""
    return {name: schema for name, schema in SCHEMAS.items() if issubclass(schema, ModelSettings)}


def ours() -> dict[str, type[ModelSettings]]:
    """Those of this package's models, which have property files here."""
    package = __name__.partition(".")[0]
    return {name: schema for name, schema in registered().items() if schema.__module__.partition(".")[0] == package}


def shared() -> list[str]:
    """Names of what our models share, above RecBole's: those of ``overall.yaml``."""
    names = [name for schema in (OnePass, Scheduled, ModelSettings) for name in schema.__annotations__]
    return [name for name in names if not all(name in model.__annotations__ for model in ours().values())]


def own(model: str) -> list[str]:
    """Names of a model's settings that do not stand in ``overall.yaml``: what stands in its property file."""
    schema = SCHEMAS[model]
    if not issubclass(schema, ModelSettings):
        return list(schema.__annotations__)
    classes = [one for one in reversed(schema.__mro__) if issubclass(one, ModelSettings) and one is not ModelSettings]
    names = [name for one in classes for name in one.__annotations__]
    return list(dict.fromkeys([*names, *(name for name in ModelSettings.__annotations__ if name not in shared())]))


def comment(field: FieldInfo, source: bool = True) -> str:
    """The comment that explains a setting in a property file, with where its default comes from."""
    words = [f"# ({type_name(field)})", field.description or ""]
    if choices(field) and not all(f"'{word}'" in words[1] for word in choices(field)):
        words.append(f"Range in {list(choices(field))}.")
    if source and extra(field)["source"]:
        words.append(extra(field)["source"])
    return " ".join(words)


def meaning(model: str, key: str) -> str:
    """The comment of a setting as a model reads it, without its default's source; empty where it has none."""
    field = SCHEMAS.get(model, Common).model_fields.get(key)
    return "" if field is None else comment(field, source=False)


def _as_yaml(value: Any) -> str:
    return "~" if value is None else repr(value) if isinstance(value, float) else str(value)


def property_file(schema: type[Common], names: list[str], title: str) -> str:
    """The property file of our models' shared settings, or of a model's own."""
    lines = [f"# {line}" for line in title.splitlines()]
    for name in names:
        field = schema.model_fields[name]
        if extra(field)["section"]:
            lines += ["", f"# {extra(field)['section']}"]
        elif lines[-1].startswith("#"):
            lines.append("")
        lines.append(f"{name + ': ' + _as_yaml(field.default):<{COLUMN - 1}} {comment(field)}")
    return "\n".join(lines) + "\n"


def recommented(text: str, model: str) -> str:
    """A property file written by hand or by tuning with the schema's comments."""
    lines = []
    for line in text.splitlines():
        key, colon, _ = line.partition(":")
        if colon and key.isidentifier() and "  # (" in line and (words := meaning(model, key)):
            line = line[: line.index("# (")] + words
        lines.append(line)
    return "\n".join(lines) + "\n"


def property_files(folder: Path) -> dict[Path, str]:
    """What all our property files should hold."""
    files = {
        folder / "overall.yaml": property_file(
            ModelSettings, shared(), "Settings that all models of recbole-ssm share, above RecBole's own overall.yaml."
        )
    }
    for name, schema in ours().items():
        title = textwrap.dedent("    " + (schema.__doc__ or "")).strip()
        files[folder / "model" / f"{name}.yaml"] = property_file(schema, own(name), title)
    for kind in ("dataset", "tuned", "search"):
        for file in sorted((folder / kind).glob("*.yaml")):
            model = "" if kind == "dataset" else file.stem.rpartition("-")[2]
            files[file] = recommented(file.read_text(encoding="utf-8"), model)
    return files


def table(schema: type[Common], names: list[str]) -> str:
    """A table of settings in Markdown."""
    lines = ["| key | default | values | meaning |", "| --- | --- | --- | --- |"]
    for name in names:
        field = schema.model_fields[name]
        cells = [
            f"`{name}`",
            f"`{default(field)}`",
            allowed(field),
            f"{field.description} {extra(field)['source']}".strip(),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def default(field: FieldInfo) -> str:
    """A default as it could be given on the command line."""
    value = field.default
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_none=True)
    return repr(value) if isinstance(value, str) and not value.strip() else _as_yaml(value)


def tables() -> dict[str, tuple[type[Common], list[str]]]:
    """Which settings stand in a table, by its title."""
    plain = [name for name in CAUSAL_MODELS if not issubclass(SCHEMAS[name], WithFeatures)]
    recboles = [name for name, field in Common.model_fields.items() if field.description != UNSUPPORTED]
    return {
        "our models'": (ModelSettings, shared()),
        **{f"{name}'s": (SCHEMAS[name], own(name)) for name in (*registered(), *plain)},
        "item features'": (WithFeatures, list(WithFeatures.__annotations__)),
        "RecBole's": (Common, recboles),
    }


def with_tables(page: str) -> str:
    """A page of the docs with its tables, each between ``<!-- NAME settings -->`` and ``<!-- end -->``."""

    def written(match: re.Match[str]) -> str:
        return f"{match[1]}\n{table(*tables()[match[2]])}{match[3]}"

    return re.sub(r"(<!-- ([^\n]+) settings -->)\n.*?(<!-- end -->)", written, page, flags=re.DOTALL)


def help_text() -> str:
    """All settings of the schema for ``--help``."""
    lines = []
    for title, (schema, names) in tables().items():
        lines += ["", f"{title} settings and their defaults:"]
        for name in names:
            field = schema.model_fields[name]
            words = f"{field.description} Values: {allowed(field)}."
            lines.append(f"  --{name}={default(field)}")
            lines += textwrap.wrap(words, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
