"""Property files, docs and ``--help`` say what the schema says."""

import re
from pathlib import Path

import pytest
import yaml

from recbole_ssm.cli.run_recbole import build_parser
from recbole_ssm.config import properties_dir
from recbole_ssm.settings.text import allowed, default, ours, property_files, shared, tables, with_tables

REMEDY = "run python -m recbole_ssm.settings, which writes it from the schema"
FILES = property_files(properties_dir())
PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_property_files(file):
    assert file.read_text(encoding="utf-8") == FILES[file], REMEDY


def test_every_property_file_is_held_to_the_schema():
    assert set(FILES) == set(properties_dir().rglob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_shipped_setting_is_in_the_schema(file):
    """So that none of their comments is left as somebody wrote it."""
    known = {name for schema, _ in tables().values() for name in schema.model_fields}
    assert set(yaml.safe_load(file.read_text(encoding="utf-8"))) <= known


def test_docs():
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), REMEDY
    assert set(re.findall(r"<!-- (.+) settings -->", page)) == set(tables())
    for name in (*shared(), *ours()["STARRec"].__annotations__, "eval_args"):
        assert f"\n| `{name}` | `" in page


def test_help():
    """It gives each setting's default, meaning and values, whatever the lines are wrapped to."""
    words = " ".join(build_parser().format_help().split())
    for schema, names in tables().values():
        for name in names:
            field = schema.model_fields[name]
            said = f"--{name}={default(field)} {field.description} Values: {allowed(field)}."
            assert " ".join(said.split()) in words
    assert "--d_conv=4 Local convolution width. Values: a whole number from 1 to 8." in words


def test_all_three_follow_the_schema(monkeypatch):
    monkeypatch.setattr(ours()["Mamba4Rec"].model_fields["d_conv"], "description", "Another meaning.")
    monkeypatch.setattr(ours()["Mamba4Rec"].model_fields["d_conv"], "default", 3)
    file = property_files(properties_dir())[properties_dir() / "model" / "Mamba4Rec.yaml"]
    assert re.search(r"^d_conv: 3 +# \(int\) Another meaning\.", file, re.MULTILINE)
    page = with_tables(PAGE.read_text(encoding="utf-8"))
    assert "| `d_conv` | `3` | a whole number from 1 to 8 | Another meaning. |" in page
    assert "--d_conv=3 Another meaning. Values:" in " ".join(build_parser().format_help().split())
