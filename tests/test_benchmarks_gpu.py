"""``python -m benchmarks gpu``: every part on tiny data, so that none dies of a slip on a machine lent for minutes."""

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from recbole.model.abstract_recommender import SequentialRecommender
from torch import nn

from benchmarks import __main__, gpu, outside
from benchmarks.gpu import check, jobs, peers, subjects
from benchmarks.gpu.jobs import Lane
from benchmarks.ops import timed_case
from benchmarks.peers.client import Package
from benchmarks.speed.authors import deviation
from recbole_ssm import ops
from recbole_ssm.cli import run_recbole
from recbole_ssm.graphs import GraphedSteps
from recbole_ssm.layers import Mamba, Mamba2
from recbole_ssm.ops import cases
from recbole_ssm.ops.packing import borders, cu_seqlens_from_lengths
from recbole_ssm.trainer import SequenceTrainer
from tests.conftest import random_rows, write_dataset
from tests.test_graphs import Graph

SMALL = ("hidden_size=16", "MAX_ITEM_LIST_LENGTH=10", "train_batch_size=64", "eval_batch_size=64")

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
    assert told(rows).count(("fine", "done", 7)) == 4
    crashed, failed = (row for row in rows if row["how"] != "fine")
    assert (crashed["how"], crashed["state"], crashed["detail"]) == ("aborts", "crashes", "SIGABRT")
    assert (failed["how"], failed["state"], failed["detail"]) == ("raises", "fails", "ValueError: of no use")
    assert any("at_work.py" in line for line in failed["log"])


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
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # in which a part takes minutes
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(subjects, "_datasets", {})
    write_dataset("tiny", random_rows())


def run(monkeypatch, part, *words, settings=()):
    """The part's result file."""
    words = (
        "--device",
        "cpu",
        "--quick",
        "--dataset",
        "tiny",
        *words,
        "--results",
        "results",
        "--settings",
        *SMALL,
        *settings,
    )
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


def test_a_kernel_is_checked_with_the_tables_of_a_batch_that_is_filled_up(monkeypatch):
    about, rooms = {"device": "cpu", "quick": True}, []
    compared = check.compared

    def seen(case, backend, truth):
        rooms.append(borders(case.fixed["cu_seqlens"]).room)
        return compared(case, backend, truth)

    monkeypatch.setattr(check, "compared", seen)
    for form in ("filled", "plain"):
        row = check.check_op(about, "op", "causal_conv", "triton", "float32", form, {"D": 4, "K": 2})
        assert row["verdict"] == "right"
    assert rooms == [max(check.INERT), None]


def test_check_finds_a_backend_that_errs(monkeypatch):
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
        ("float32", "off"), ("bfloat16", "off"),
    ]  # fmt: skip
    assert all(row["ms"] > 0 and row["targets_per_s"] > 0 and row["waits"] == 0 for row in steps)
    starts = [row for row in rows if row["measure"] == "start"]
    assert [row["process"] for row in starts] == ["first", "second"]
    assert all(row["to_first_step_s"] > 0 for row in starts)
    assert "| Mamba4Rec | float32 | 64 | off |" in capsys.readouterr().out


def test_ops(here, monkeypatch, capsys):
    rows = run(monkeypatch, "ops")
    assert [(row["op"], row["dtype"]) for row in rows] == [("causal_conv", "float32"), ("causal_conv", "bfloat16")]
    assert rows[0]["results"]["torch conv1d, padded"]["both_s"] > 0
    assert "torch conv1d, padded" in rows[0]["results"]["cpu"]["times_as_fast_as"]
    assert "| torch conv1d, padded |" in capsys.readouterr().out


def test_a_kernel_of_others_that_disagrees_has_no_time(monkeypatch):
    ops = import_module("benchmarks.gpu.ops")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(outside, "_sdpa", lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    ops._checked.cache_clear()
    case = {"op": "preference_attention", "dtype": "float32", "length": "16", "rows": 32, "compiled": False}
    row = ops.measure_op({"device": "cpu", "quick": True}, **case)
    ops._checked.cache_clear()
    assert "torch sdpa with bias, padded" in row["wrong"]
    assert "torch sdpa with bias, padded" not in row["results"]
    lines = ops.table([{**case, **row, "state": "done"}])
    assert any("| torch sdpa with bias, padded | disagrees: " in line for line in lines)


def test_the_tables_go_into_a_page(monkeypatch):
    about = {"device": "a chip", "commit": "abc1234", "date": "today", "versions": {"torch": "2", "numba": "not there"}}
    row = {
        "peer": "SSD4Rec",
        "off": 1e-6,
        "targets_per_s": {"theirs": 1.0, "ours": 3.0},
        "times_as_fast": {"ours": 3.0},
    }
    rows = [{**row, "state": "done"}, {"peer": "RecTools", "state": "crashes", "detail": "SIGSEGV", "log": []}]
    Path("results").mkdir()
    found = {"part": "peers", "environment": about, "seconds": 7.0, "protocol": peers.PROTOCOL, "rows": rows}
    Path("results", "gpu-peers-chip.json").write_text(json.dumps(found))
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu", "report", "--results", "results", "--page", "page.md"])
        __main__.main()
    page = Path("page.md").read_text()
    assert page.count("#### `gpu peers` on a chip") == 1
    assert "Commit abc1234, today; torch 2. 7 s." in page
    assert "| SSD4Rec | ours | 3 | 3 | 1e-06 |" in page
    assert "**crashes**: peer RecTools, detail SIGSEGV" in page


# --- Others' code, by stand-ins that have its names and compute by our layers


class Theirs(nn.Module):
    """A block of mamba_ssm's, with its parameters' names."""

    def __init__(self, block):
        super().__init__()
        self.block = [block]  # hidden from the names
        for name, module in block.named_children():
            self.add_module("conv1d" if name == "conv" else name, module)
        for name, parameter in block.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def forward(self, x, seq_idx=None):
        count, length, _ = x.shape
        lengths = torch.full((count,), length) if seq_idx is None else torch.bincount(seq_idx[0])
        return self.block[0](x.flatten(0, 1), cu_seqlens_from_lengths(lengths)).view(x.shape)


class FeedForwardOfTheirs(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=1e-12)

    def forward(self, x):
        return self.LayerNorm(self.w_2(F.gelu(self.w_1(x))) + x)


class LayerOfTheirs(nn.Module):
    def __init__(self, name, block, size):
        super().__init__()
        self.add_module(name, Theirs(block))
        self.LayerNorm, self.ffn = nn.LayerNorm(size, eps=1e-12), FeedForwardOfTheirs(size)


class ModelOfTheirs(SequentialRecommender):
    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.item_embedding = nn.Embedding(self.n_items, config["hidden_size"])
        self.LayerNorm = nn.LayerNorm(config["hidden_size"], eps=1e-12)

    def scores(self, hidden):
        return hidden @ self.item_embedding.weight.T


class Mamba4Rec(ModelOfTheirs):
    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        size = config["hidden_size"]
        block = Mamba(size, config["d_state"], config["d_conv"], config["expand"])
        self.mamba_layers = nn.ModuleList([LayerOfTheirs("mamba", block, size)])

    def full_sort_predict(self, interaction):
        hidden = self.LayerNorm(self.item_embedding(interaction[self.ITEM_SEQ]))
        for layer in self.mamba_layers:
            hidden = layer.ffn(layer.LayerNorm(layer.mamba(hidden)))
        return self.scores(self.gather_indexes(hidden, interaction[self.ITEM_SEQ_LEN] - 1))

    def calculate_loss(self, interaction):
        return F.cross_entropy(self.full_sort_predict(interaction), interaction[self.POS_ITEM_ID])


class SSD4Rec(ModelOfTheirs):
    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        size, self.beta = config["hidden_size"], config["beta"]
        blocks = [
            Mamba2(size, config["d_state"], config["d_conv"], config["expand"], config["headdim"])
            for _ in range(config["num_layers"])
        ]
        self.BiSSD_layers = nn.ModuleList([LayerOfTheirs("forward_ssd", block, size) for block in blocks])

    def forward(self, items, ends, register, flip):
        hidden = self.LayerNorm(self.item_embedding(items[None]))
        for layer in self.BiSSD_layers:
            backward = layer.forward_ssd(hidden[:, flip.long()], seq_idx=register[None])
            hidden = layer.forward_ssd(hidden, seq_idx=register[None]) + self.beta * backward + hidden
            hidden = layer.ffn(layer.LayerNorm(hidden))
        return self.scores(hidden[0, ends - 1])

    def full_sort_predict(self, *laid_out):
        return self(*laid_out)

    def calculate_loss(self, targets, *laid_out):
        return F.cross_entropy(self(*laid_out), targets)


def test_peers(here, monkeypatch, capsys, tmp_path):
    for name in ("mamba4rec", "ssd4rec"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        class_name = "Mamba4Rec" if name == "mamba4rec" else "SSD4Rec"
        (tmp_path / f"{name}.py").write_text(f"from {__name__} import {class_name}\n")
    rows = run(monkeypatch, "peers", "--ssd4rec", str(tmp_path), "--mamba4rec", str(tmp_path), settings=["d_state=4"])
    assert [row["peer"] for row in rows if row["peer"] != "RecTools"] == ["SSD4Rec", "Mamba4Rec"]
    for row in rows[:2]:
        assert row["off"] < 1e-4
        assert row["targets_per_s"]["theirs"] > 0
        assert row["times_as_fast"].keys() == row["targets_per_s"].keys()
    assert "| Mamba4Rec | ours, the same rows |" in capsys.readouterr().out


def test_rectools_beside_ours(here, monkeypatch):
    monkeypatch.setattr(peers, "RECTOOLS", Package("tests.fake_peer", "SASRec, RecTools"))
    write_dataset("tiny", random_rows())
    settings = {"hidden_size": 16, "MAX_ITEM_LIST_LENGTH": 10, "train_batch_size": 64}
    about = {"device": "cpu", "quick": True, "data_path": str(Path("dataset").resolve()), "dataset": "tiny"}
    row = peers.measure_peer({**about, "settings": settings}, "RecTools")
    assert row["times_as_fast"].keys() == {"ours, float32"}
    theirs, ours = row["targets_per_s"]["theirs"], row["targets_per_s"]["ours, float32"]
    assert row["times_as_fast"]["ours, float32"] == pytest.approx(ours / theirs)


def test_scores_that_differ_are_noticed():
    class Model(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def full_sort_predict(self, rows):
            return self.factor * torch.tensor([[9.0, 1.0, -2.0], [9.0, 3.0, 4.0]])

    def contender(factor):
        data = [(SimpleNamespace(to=lambda device: None), None)]
        return SimpleNamespace(model=Model(factor), config={"device": "cpu"}, valid_data=data)

    assert deviation(contender(1.0), contender(1.0)) == 0
    assert deviation(contender(1.01), contender(1.0)) == pytest.approx(0.01)


def test_no_ratio_is_told_of_models_that_differ(monkeypatch):
    class Steps:
        num_targets = 10

        def __init__(self, contender):
            pass

        def take(self):
            pass

    monkeypatch.setattr(peers, "Steps", Steps)
    for off, told in ((1e-5, True), (0.01, False), (float("nan"), False)):
        monkeypatch.setattr(peers, "deviation", lambda ours, theirs, off=off: off)
        row = peers._compared({"quick": True}, None, {"ours": None})
        assert (row["times_as_fast"] is not None) == told


@pytest.mark.parametrize(
    ("op", "package"), [("selective_scan", "mamba_ssm"), ("ssd", "mamba_ssm"), ("causal_conv", "causal_conv1d")]
)
def test_others_kernels_get_the_same_work(monkeypatch, op, package):
    """Their layouts, by stand-ins that compute by our references and take exactly what their kernels take."""

    def selective_scan_fn(u, delta, A, B, C, delta_bias, delta_softplus):
        count, channels, length = u.shape
        assert (B.shape[0], B.shape[2], A.shape) == (count, length, (channels, B.shape[1]))
        x, dt, B, C = (t.mT.flatten(0, 1) for t in (u, delta, B, C))
        cu_seqlens = cu_seqlens_from_lengths(torch.full((count,), length))
        out = ops.selective_scan(
            x, dt, A, B, C, dt_bias=delta_bias, dt_softplus=delta_softplus, cu_seqlens=cu_seqlens, backend="reference"
        )
        return out.unflatten(0, (count, length)).mT

    def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, dt_bias, seq_idx, dt_softplus):
        count, length = x.shape[:2]
        lengths = torch.full((count,), length) if seq_idx is None else torch.bincount(seq_idx[0])
        x, dt, B, C = (t.flatten(0, 1) for t in (x, dt, B, C))
        out = ops.ssd(
            x, dt, A, B, C, dt_bias=dt_bias, dt_softplus=dt_softplus, cu_seqlens=cu_seqlens_from_lengths(lengths),
            backend="reference",
        )  # fmt: skip
        return out.unflatten(0, (count, length))

    def causal_conv1d_fn(x, weight, bias, seq_idx, activation):
        assert x.stride(1) == 1
        cu_seqlens = cu_seqlens_from_lengths(torch.bincount(seq_idx[0]))
        return ops.causal_conv(x[0].T, weight, bias, activation, cu_seqlens=cu_seqlens, backend="reference").T[None]

    for name, function in (
        ("mamba_ssm.ops.selective_scan_interface", selective_scan_fn),
        ("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined),
        ("causal_conv1d", causal_conv1d_fn),
    ):
        module = ModuleType(name)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)
    case = timed_case(op, [1, 2, 17, 5], SIZES[op], torch.float32, "cpu")
    truth = cases.true_results(case)
    theirs = {
        "selective_scan": lambda: [outside._selective_scan(case)],
        "ssd": lambda: [outside._ssd(case, packed=True), outside._ssd(case, packed=False)],
        "causal_conv": lambda: [outside._causal_conv1d(case)],
    }
    for other in theirs[op]():
        assert other.disagrees(case, truth) == {}
        leaves = other.leaves(case)
        assert all(t.is_leaf and t.requires_grad for t in leaves.values())
        other.function(**leaves).sum().backward()


SIZES = {
    "selective_scan": {"D": 6, "N": 3},
    "ssd": {"H": 4, "P": 3, "G": 1, "N": 5},
    "causal_conv": {"D": 6, "K": 4},
}


def test_flex_attention_has_the_same_bias(monkeypatch):
    """Its forward pass, which a CPU has without torch's compiler."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(outside, "_compiled_flex", lambda: flex_attention)
    sizes = {"H": 2, "P": 8, "M": 2, "E": 16}
    case = timed_case("preference_attention", [1, 20, 7], sizes, torch.float32, "cpu")
    other = outside.outside(case, compiled=True)["FlexAttention with bias, padded"]
    with torch.no_grad():
        found = other.rows(other.function(**other.lay_out(case.inputs)))
        torch.testing.assert_close(found, case.run("reference")[0], rtol=1e-4, atol=1e-5)


def test_train(here, monkeypatch, capsys):
    def in_process(words, check):
        monkeypatch.setattr(sys, "argv", words[2:])
        assert run_recbole.main() in (0, None)

    monkeypatch.setattr("benchmarks.gpu.train.subprocess", SimpleNamespace(run=in_process))
    (row,) = run(monkeypatch, "train", "--models", "Mamba4Rec")
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
