"""``python -m benchmarks gpu``: every part on tiny data, so that no part dies of a slip on a machine lent for minutes."""

import json
import os
import subprocess
import sys
import time
import types
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import __main__, gpu, outside
from benchmarks.gpu import check, jobs, peers, subjects
from benchmarks.gpu.jobs import Lane
from benchmarks.ops import checks
from benchmarks.speed import authors
from recbole_ssm.cli import run_recbole
from recbole_ssm.graphs import GraphedSteps
from recbole_ssm.layers import Mamba, Mamba2
from recbole_ssm.models.ssd4rec import SSD4Rec
from recbole_ssm.ops import selective_scan, ssd
from recbole_ssm.trainer import SequenceTrainer
from tests.conftest import build, random_rows, write_dataset
from tests.test_graphs import Graph

SMALL = ("hidden_size=16", "MAX_ITEM_LIST_LENGTH=10", "train_batch_size=64", "eval_batch_size=64", "d_state=4")
SMALL += ("headdim=8", "n_heads=2", "n_experts=3")

# Functions as the parts have them, in a module that a lane's process imports within a moment.
WORK = """
import atexit, os, time

def work(about, how):
    if how == "aborts":
        os.abort()
    if how == "raises":
        raise ValueError("of no use\\nand more")
    if how == "sleeps":
        time.sleep(60)
    if how == "is watched":
        print("========= Invalid __global__ read of size 4 bytes")
        atexit.register(os._exit, 86)
    return {"value": about["value"], "process": os.getpid()}
"""


@pytest.fixture
def lane(tmp_path, monkeypatch):
    """A lane whose cases do what they say."""
    (tmp_path / "at_work.py").write_text(WORK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(*cases, limit_s=60.0, function="at_work:work", **more):
        return Lane(function, tuple({"how": how} for how in cases), {"value": 7}, limit_s, **more)

    return make


def ran(*lanes, **more):
    rows = []
    jobs.run(list(lanes), rows.append, **more)
    return rows


def told(rows):
    return [(row["how"], row["state"], row.get("value")) for row in rows]


def test_what_crashes_or_fails_costs_no_other_case(lane):
    rows = ran(lane("fine", "aborts", "fine", "raises", "fine"), lane("fine"))
    assert told(rows) == [
        ("fine", "done", 7), ("aborts", "crashes", None), ("fine", "done", 7), ("raises", "fails", None),
        ("fine", "done", 7), ("fine", "done", 7),
    ]  # fmt: skip
    assert rows[1]["detail"] == "SIGABRT"
    assert rows[3]["detail"] == "ValueError: of no use"
    assert any("at_work.py" in line for line in rows[3]["log"])


def test_a_case_that_hangs_is_ended(lane):
    rows = ran(lane("fine", "sleeps", "fine", limit_s=1.0))
    assert told(rows) == [("fine", "done", 7), ("sleeps", "time limit", None), ("fine", "done", 7)]


def test_when_the_time_is_over_what_was_measured_is_kept(lane):
    begin = time.monotonic()
    rows = ran(lane("fine", "fine", "sleeps", "fine"), lane("fine"), deadline=begin + 5)
    assert time.monotonic() - begin < 15
    assert [state for _, state, _ in told(rows)] == ["done", "done", "time limit", "left out", "left out"]


def test_a_tools_verdict_comes_with_the_end_of_the_process(lane):
    (row,) = ran(lane("is watched", fresh=True, environment={"VALUE": "1"}))
    assert (row["state"], row["detail"], row["value"]) == ("crashes", "exit status 86", 7)
    assert row["log"] == ["========= Invalid __global__ read of size 4 bytes"]


def test_what_cannot_even_begin_is_told_once_a_case(lane):
    rows = ran(lane("fine", "fine", function="nowhere:work"))
    assert [(row["state"], row["detail"]) for row in rows] == [("crashes", "exit status 1")] * 2
    assert "nowhere" in rows[0]["log"][-1]


def test_lanes_run_side_by_side(lane):
    rows = ran(*[lane("fine", "fine")] * 3, at_once=3)
    assert len({row["process"] for row in rows}) == 3
    assert all(state == "done" for _, state, _ in told(rows))


# --- The parts


@pytest.fixture
def here(monkeypatch):
    """Lanes run in this process; what fails in one fails the test."""

    def in_process(lanes, keep, at_once, deadline):
        for lane in lanes:
            module, name = lane.function.split(":")
            for case in lane.cases:
                keep({**case, **getattr(import_module(module), name)(lane.about, **case), "state": "done"})

    monkeypatch.setattr(gpu, "run", in_process)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(subjects, "_datasets", {})
    write_dataset("tiny", random_rows())


def run(monkeypatch, part, *words):
    """The part's result file."""
    words = ("--device", "cpu", "--quick", "--dataset", "tiny", *words, "--results", "results", "--settings", *SMALL)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu", part, *words])
    monkeypatch.setenv("COMMIT", "abc1234")
    __main__.main()
    (file,) = Path("results").glob(f"gpu-{part}-*.json")
    found = json.loads(file.read_text())
    assert found["environment"]["commit"] == "abc1234"
    assert {"versions", "device", "date"} <= found["environment"].keys()
    assert found["protocol"]
    return found["rows"]


def test_check(here, monkeypatch, capsys):
    monkeypatch.setattr("recbole_ssm.graphs.WARM_UP_STEPS", 1)
    monkeypatch.setattr(SequenceTrainer, "_wants_graphs", lambda t, scaled: t.config["cuda_graphs"] != "off")
    monkeypatch.setattr(
        SequenceTrainer,
        "_graphed_steps",
        lambda t: GraphedSteps(t._backward, t._update, t.optimizer, t.device, graph=Graph),
    )
    rows = run(monkeypatch, "check", "--models", "Mamba4Rec")
    ops = [row for row in rows if row["check"] == "op"]
    assert {row["form"] for row in ops} == {"plain", "states", "filled", "tf32"}
    assert {row["verdict"] for row in ops} == {"right"}
    graphs = [row for row in rows if row["check"] == "graphs"]
    assert [(row["precision"], row["verdict"]) for row in graphs] == [("float32", "right"), ("bfloat16", "right")]
    assert all(row["replays"] and row["off"] < 0.1 for row in graphs)
    (watched,) = (row for row in rows if row["check"] == "memcheck")
    assert "compute-sanitizer" in watched["verdict"]
    assert "| causal_conv | cpu | float32 | 3 | 3 |" in capsys.readouterr().out


def test_check_finds_a_backend_that_errs(monkeypatch, capsys):
    monkeypatch.setattr(check, "compared", lambda *_: {"output": (1.0, 0.1), "gradient of x": (1e-9, 0.1)})
    about = {"device": "cpu", "quick": True}
    row = check.check_op(about, "op", "causal_conv", "cpu", "float32", "plain", {"D": 4, "K": 2})
    assert (row["verdict"], row["worst"]) == ("wrong", "causal_conv: output")
    case = {
        "check": "op",
        "op": "causal_conv",
        "backend": "cpu",
        "dtype": "float32",
        "form": "plain",
        "sizes": {"D": 4},
    }
    lines = "\n".join(check.table([{**case, **row, "state": "done"}]))
    assert "**wrong**: causal_conv on cpu, float32, plain" in lines
    assert "10 times what is allowed" in lines


def test_steps(here, monkeypatch, capsys):
    rows = run(monkeypatch, "steps", "--models", "Mamba4Rec")
    steps = [row for row in rows if row["measure"] == "steps"]
    assert [(row["precision"], row["graphs"]) for row in steps] == [
        ("float32", "auto"), ("float32", "off"), ("bfloat16", "auto"), ("bfloat16", "off"),
    ]  # fmt: skip
    assert all(row["ms"] > 0 and row["targets_per_s"] > 0 and row["waits"] == 0 for row in steps)
    starts = [row for row in rows if row["measure"] == "start"]
    assert [row["process"] for row in starts] == ["first", "second"]
    assert all(row["to_first_step_s"] > 0 for row in starts)
    assert "| Mamba4Rec | float32 | 64 | off |" in capsys.readouterr().out


def test_ops(here, monkeypatch, capsys):
    rows = run(monkeypatch, "ops")
    assert {(row["op"], row["length"]) for row in rows} == {
        (op, length) for op in ("causal_conv", "preference_attention") for length in ("16", "beauty")
    }
    row = next(row for row in rows if row["op"] == "preference_attention")
    assert row["results"]["torch sdpa with bias, padded"]["both_s"] > 0
    assert "torch sdpa with bias, padded" in row["results"]["cpu"]["times_as_fast_as"]
    assert "| torch conv1d, padded |" in capsys.readouterr().out


def test_a_kernel_of_others_that_disagrees_has_no_time(here, monkeypatch, capsys):
    monkeypatch.setattr(outside, "_sdpa", lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    monkeypatch.setattr(sys.modules["benchmarks.gpu.ops"], "_checked", lambda *key: checks(key[0], *_sizes(key)))
    rows = run(monkeypatch, "ops")
    wrong = [row for row in rows if row["op"] == "preference_attention"]
    assert all("torch sdpa with bias, padded" in row["wrong"] for row in wrong)
    assert all("torch sdpa with bias, padded" not in row["results"] for row in wrong)
    assert "| disagrees: " in capsys.readouterr().out


def _sizes(key):
    from benchmarks.ops import SIZES

    return SIZES[key[0]][0], getattr(torch, key[1]), key[2]


def test_the_tables_go_into_a_page(here, monkeypatch, capsys):
    run(monkeypatch, "ops")
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu", "report", "--results", "results", "--page", "page.md"])
        __main__.main()
    page = Path("page.md").read_text()
    assert page.count("#### `gpu ops` on ") == 1
    assert "Commit abc1234" in page


def test_train(here, monkeypatch, capsys):
    def in_process(words, check):
        argv, sys.argv = sys.argv, words[2:]
        assert run_recbole.main() in (0, None)
        sys.argv = argv

    monkeypatch.setattr(subprocess, "run", in_process)
    (row,) = [row for row in run(monkeypatch, "train", "--models", "Mamba4Rec")]
    assert row["epoch_s"] > 0
    assert row["command_s"] > row["epoch_s"]
    assert 0 <= row["ndcg@10"] <= 1
    assert row["cpu"] is None  # of other settings
    assert "| Mamba4Rec | float32 |" in capsys.readouterr().out


def test_what_the_study_reached_on_a_cpu():
    from benchmarks.gpu.train import on_a_cpu

    reached = on_a_cpu()
    assert reached["STARRec", "ml-1m"] == pytest.approx(0.158, abs=0.002)


def test_without_a_gpu_the_script_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu", "check", "--results", "results"])
    with pytest.raises(SystemExit, match="no GPU"):
        __main__.main()


def test_the_script_runs_parts_and_shows_their_tables(tmp_path):
    """From a process of its own, as on a lent machine: a part, its limit, and the result file."""
    write_dataset("tiny", random_rows())
    script = Path(gpu.__file__).parents[1] / "gpu.sh"
    words = ["ops", "--device=cpu", "--quick", "--limit=1"]
    environment = os.environ | {"DATA": "dataset", "RESULTS": str(tmp_path / "results"), "COMMIT": "abc1234"}
    python = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", script, *words], env=environment | {"PATH": f"{python}:{os.environ['PATH']}"}, capture_output=True,
        text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "#### `gpu ops` on " in done.stdout
    assert "**left out**, for want of time" in done.stdout
    (file,) = (tmp_path / "results").glob("gpu-ops-*.json")
    assert json.loads(file.read_text())["limit_s"] == 1.0
