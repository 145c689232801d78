"""``python -m benchmarks``: result files with their provenance, and no figure for what is wrong."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__, environment, ops
from benchmarks.measure import peak_bytes
from recbole_ssm.ops import cases, causal_conv


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "ops", *words, "--output", "r.json", "--page", "page.md"])
    __main__.main()
    return json.loads(Path("r.json").read_text())


def test_a_machine_without_git_has_no_commit_to_tell(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment.environment()["commit"] == "unknown"


@pytest.mark.slow
def test_result_file_and_table(monkeypatch):
    words = ("--ops", "causal_conv", "--tokens", "100", "--lengths", "50", "beauty", "--dtypes", "float32")
    found = run(monkeypatch, *words)
    assert {"device", "versions", "commit", "date"} <= found["environment"].keys()
    assert [(case["length"], case["tokens"]) for case in found["cases"]] == [("50", 100), ("beauty", 100)]
    backend = "triton" if torch.cuda.is_available() else "cpu"
    row = found["cases"][0]["results"][backend]
    assert row["forward_s"] > 0
    assert row["times_as_fast_as"]["reference"]["both"] > 0
    page = Path("page.md").read_text()
    assert f"| 50 | 100 | {backend} |" in page
    again = run(monkeypatch, "--ops", "causal_conv", "--tokens", "100", "--lengths", "50", "--dtypes", "float32")
    assert [(case["length"], case["tokens"]) for case in again["cases"]] == [("50", 100), ("beauty", 100)]
    assert again["cases"][0] != found["cases"][0]  # measured anew, and the other one kept
    assert again["cases"][1] == found["cases"][1]
    assert Path("page.md").read_text().count("### Ops on") == 1  # written over, not beside


def test_no_time_is_told_of_a_backend_that_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(ops, "right", lambda case, backend: {"output": 3.0} if backend != "reference" else {})
    found = run(monkeypatch, "--ops", "causal_conv", "--tokens", "100", "--lengths", "50", "--dtypes", "float32")
    assert "FAILS its parity check" in capsys.readouterr().out
    assert {"cpu", "triton"}.isdisjoint(found["cases"][0]["results"])
    assert "| cpu |" not in Path("page.md").read_text()


@pytest.mark.parametrize("factor", [1 + 1e-5, float("nan")])
def test_a_wrong_gradient_is_found(monkeypatch, factor):
    case = cases.make("causal_conv", [5, 3], {"D": 4, "K": 2})
    assert cases.right(case, "cpu") == {}

    def slightly_wrong(bias, backend, **others):
        off = bias * (factor - 1) if backend == "cpu" else 0 * bias
        return causal_conv(bias=bias + (off - off.detach()), backend=backend, **others)

    monkeypatch.setitem(cases.FUNCTIONS, "causal_conv", slightly_wrong)
    assert "gradient of bias" in cases.right(case, "cpu")


def test_what_would_take_too_long_or_too_much_is_left_out(monkeypatch):
    monkeypatch.setattr(ops, "reference_bytes", lambda case, longest: 1e18)
    words = ("--ops", "causal_conv", "--lengths", "50", "--dtypes", "float32", "--limit", "1e-9")
    found = run(monkeypatch, *words, "--tokens", "100", "200")
    first, second = (case["results"] for case in found["cases"])
    assert "GiB" in first["reference"]["left out"]
    assert "both_s" in first["cpu" if "cpu" in first else "triton"]
    assert all("left out" in row for row in second.values())


def test_sequences_have_the_tokens_that_are_asked_for():
    assert ops.sequences("50", 120) == [50, 50, 20]
    beauty = ops.sequences("beauty", 4096)
    assert 4000 < sum(beauty) <= 4096
    assert 7 < sum(beauty) / len(beauty) < 11


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_memory_is_that_of_the_call():
    def call():
        torch.ones(50_000_000).sum()

    peak = peak_bytes(call, cuda=False)
    assert peak is None or 150e6 < peak < 300e6
