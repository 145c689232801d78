"""``python -m benchmarks profile``: every part's time in its own row, all of it, and a floor beside it."""

import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import numba
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import record_function

from benchmarks import __main__, profile
from benchmarks.floors import OP_COSTS, Cost, Rates, measure_rates
from benchmarks.parts import LAYERS, OP_PARTS, attribute
from recbole_ssm.ops.cases import make
from tests.conftest import SMALL, random_rows, small_settings, write_dataset

pytest.importorskip("matplotlib")

PAUSE_MS = 100.0  # much longer than a step of this size
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU a part's time is that of its kernels")


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch):
    """Rates that are known, and one thread: several, with other tests beside, would mostly wait for each other."""
    monkeypatch.setattr(profile, "measure_rates", lambda device, dtype: Rates(1e11, 1e10))
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    numba.set_num_threads(before[1])


def run(monkeypatch, model="STARRec", **settings):
    """The result file's entry for one model."""
    write_dataset("tiny", random_rows())
    settings = {**small_settings(model), "train_batch_size": 64, **settings}
    words = ["--models", model, "--dataset", "tiny", "--data_path", "dataset", "--steps", "3"]
    words += ["--settings", *(f"{key}={value}" for key, value in settings.items())]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "profile", *words, "--output", "r.json", "--page", "page.md"])
    __main__.main()
    (found,) = json.loads(Path("r.json").read_text())["models"]
    return found


def test_every_layer_and_model_that_calls_an_op_is_known():
    """Else its op would count as the layer's own work, without a floor."""
    found = {
        module
        for name, module in sys.modules.items()
        if name.startswith(("recbole_ssm.layers.", "recbole_ssm.models.", "recbole_ssm.ops.rotating_scan"))
        and OP_PARTS.keys() & vars(module)
    }
    assert found == set(LAYERS)


def times(found):
    return {row["part"]: row["ms_per_step"] for row in found["parts"]}


class Slow(torch.autograd.Function):
    """Multiplies by 2, and takes its time over the gradient."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        time.sleep(PAUSE_MS / 1e3)
        return 2 * grad


def test_result_file_table_and_picture(monkeypatch, capsys):
    found = run(monkeypatch)
    written = json.loads(Path("r.json").read_text())
    assert {"device", "versions", "commit", "date"} <= written["environment"].keys()
    assert found["settings"]["dataset"] == "tiny"
    assert found["settings"]["given"]["hidden_size"] == str(SMALL["hidden_size"])
    assert found["steps"] == 4  # three, in whole rounds
    page = Path("page.md").read_text()
    assert "| attention |" in page
    assert "| evaluation |" in page
    assert "images/profile-" in page
    assert "| attention |" in capsys.readouterr().out
    (picture,) = Path("images").glob("profile-*.svg")
    text = picture.read_text()
    assert "floor of STARRec" in text
    assert "attention" in text


def test_parts_sum_to_the_step_and_have_floors(monkeypatch):
    found = run(monkeypatch)
    assert sum(times(found).values()) == pytest.approx(found["ms_per_step"], rel=1e-6)
    assert sum(row["share"] for row in found["parts"]) == pytest.approx(1, rel=1e-6)
    epoch = sum(row["seconds_per_epoch"] for row in found["parts"])
    assert epoch == pytest.approx(found["ms_per_step"] * found["batches"] / 1e3, rel=1e-6)
    by_name = {row["part"]: row for row in found["parts"]}
    assert {"embedding", "scan", "convolution", "attention", "experts", "layers", "loss", "optimizer"} < by_name.keys()
    for name in by_name.keys() - {"loading", "other", "idle"}:
        assert by_name[name]["ms_per_step"] > 0, name
    for name in by_name.keys() - {"other", "idle"}:
        assert by_name[name]["floor_seconds"] > 0, name
    evaluation = found["evaluation"]
    assert evaluation["rows"] == 40
    assert evaluation["seconds"] > evaluation["floor_seconds"] > 0


@pytest.mark.parametrize("model", ["Mamba4Rec", "SSD4Rec"])
def test_other_models_have_the_parts_that_they_are_made_of(monkeypatch, model):
    parts = times(run(monkeypatch, model)).keys()
    assert {"embedding", "scan", "convolution", "layers", "loss", "optimizer"} < parts
    assert {"attention", "experts"}.isdisjoint(parts)


def test_a_backend_moves_neither_time_nor_floors_between_parts(monkeypatch):
    reference, compiled = (
        {row["part"]: row for row in run(monkeypatch, ssm_backend=backend)["parts"]}
        for backend in ("reference", "auto")
    )
    assert reference.keys() == compiled.keys()
    for part in ("scan", "convolution", "layers"):
        assert reference[part]["ms_per_step"] > 0
        assert reference[part]["floor_seconds"] == compiled[part]["floor_seconds"]


def test_kernels_belong_to_the_op_that_launched_them_and_the_rest_of_the_time_is_idle():
    with torch.profiler.profile(record_shapes=True) as profiler, record_function("counted layers"):
        torch.ones(8, 4) @ torch.ones(4, 2)
    events = list(profiler.events())
    (product,) = (event for event in events if event.name == "aten::mm")
    product.append_kernel("gemm", 0, 2000)
    for name, end_us, annotation in (("gemm", 2000, False), ("memset", 1000, False), ("counted layers", 9000, True)):
        events.append(
            FunctionEvent(
                id=0, name=name, thread=0, start_us=0, end_us=end_us, device_type=DeviceType.CUDA, use_device="cuda",
                is_user_annotation=annotation,
            )
        )  # fmt: skip
    shares = attribute(events, itemsize=4)
    assert shares["layers"].device == pytest.approx(2e-3)
    assert shares["other"].device == pytest.approx(1e-3)
    assert shares["layers"].products == Cost(2 * 8 * 4 * 2, 4 * (8 * 4 + 4 * 2 + 8 * 2))
    taken = profile.Taken(1, 10e-3, 12e-3, shares, defaultdict(Cost))
    found = {row["part"]: row for row in profile.rows(taken, 5, Rates(1e11, 1e10), "cuda")}
    assert {part: row["ms_per_step"] for part, row in found.items()} == pytest.approx(
        {"layers": 2, "other": 1, "idle": 7}
    )
    assert found["layers"]["host_ms_per_step"] > 0
    assert found["idle"]["seconds_per_epoch"] == pytest.approx(5 * 7e-3)


@pytest.mark.parametrize(("window", "queries", "pairs"), [(None, "all", 10 + 1), (3, "all", 9 + 1), (3, "last", 3 + 1)])
def test_attention_is_charged_for_the_pairs_that_it_sees(window, queries, pairs):
    case = make("preference_attention", [4, 0, 1] if queries == "all" else [4, 1], {"H": 2, "P": 3, "M": 1, "E": 5})
    named = {"cu_seqlens": case.fixed["cu_seqlens"], "window": window, "queries": queries}
    y = case.inputs["q"]
    forward, both = (OP_COSTS["preference_attention"](trained, y, **case.inputs, **named) for trained in (False, True))
    assert forward.operations == pairs * (2 * (3 + 3) * 2 + 2 * 5 * 1)
    assert both.operations == 3.5 * forward.operations


@ON_CPU
def test_what_slows_the_optimizer_is_seen_there(monkeypatch):
    step = sys.modules["torch.optim.adam"].adam

    def slow(*args, **kwargs):
        time.sleep(PAUSE_MS / 1e3)
        return step(*args, **kwargs)

    monkeypatch.setattr(sys.modules["torch.optim.adam"], "adam", slow)
    found = run(monkeypatch)
    assert times(found)["optimizer"] > PAUSE_MS / 2
    assert max(times(found), key=times(found).get) == "optimizer"


@ON_CPU
def test_what_slows_a_gradient_is_seen_in_its_forward_part(monkeypatch):
    monkeypatch.setattr(F, "gelu", Slow.apply)  # which nothing but the experts calls
    found = run(monkeypatch)
    assert times(found)["experts"] > PAUSE_MS / 2
    assert max(times(found), key=times(found).get) == "experts"


@ON_CPU
def test_what_slows_loading_is_seen_there(monkeypatch):
    from recbole_ssm.data.sequence_loader import SequenceDataLoader

    collate = SequenceDataLoader.collate

    def slow(self, windows):
        time.sleep(PAUSE_MS / 1e3)
        return collate(self, windows)

    monkeypatch.setattr(SequenceDataLoader, "collate", slow)
    assert times(run(monkeypatch))["loading"] > PAUSE_MS / 2


def test_rates_are_those_of_a_machine():
    rates = measure_rates("cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    assert 1e9 < rates.operations_per_s < 1e16
    assert 1e8 < rates.bytes_per_s < 1e14
