"""``python -m benchmarks models``: every model of RecBole runs."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import __main__
from benchmarks.models import jobs, report, run


def model(here, old, unfused=None):
    return {"here": here, "old": old, "unfused": unfused}


def test_what_is_said_of_a_comparison():
    one, other, broken = {"metrics": {"test auc": 0.5}}, {"metrics": {"test auc": 0.75}}, {"error": "E: no"}
    assert report.compared(model(one, one)) == "yes"
    assert report.compared(model(one, other)) == "no: up to 0.25"
    assert report.compared(model(one, other, unfused=other)) == "yes, by RecBole's optimizer"
    assert report.compared(model(one, other, unfused=one)) == "no: up to 0.25"
    assert report.compared(model(one, broken)) == "RecBole 1.2.0 does not run it: E: no"
    assert report.compared(model(broken, one)) == "no"
    assert report.compared(model(one, None)) == "not compared"


def test_a_model_that_ends_its_process_does_not_end_the_others(empty_folder):
    empty_folder.joinpath("python").write_text(
        f"#!{sys.executable}\nimport json, sys\nfrom pathlib import Path\n"
        "models = list(json.loads(Path(sys.argv[4]).read_text())['models'])\n"
        "print(json.dumps({'model': models[0], 'metrics': {}}), file=open(sys.argv[5], 'a'))\n"
        "sys.exit(9 if len(models) == 3 else 0)\n"
    )
    empty_folder.joinpath("python").chmod(0o755)
    found, _ = run("./python", empty_folder, {"A": [], "B": [], "C": []})
    assert found == {"A": {"metrics": {}}, "B": {"error": "its process ended with status 9"}, "C": {"metrics": {}}}


@pytest.mark.slow
def test_every_model_runs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "models", "--output", "r.json", "--page", "page.md"])
    __main__.main()
    models = json.loads(Path("r.json").read_text())["models"]
    assert models.keys() == jobs.families().keys()
    assert {name: found["here"].get("error") for name, found in models.items() if "metrics" not in found["here"]} == {}
    assert "| LightGCN | general | yes | not compared |" in Path("page.md").read_text()
