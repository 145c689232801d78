"""The doctor's table, its exit status, and that it knows what models need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recbole_ssm import doctor
from recbole_ssm.cli.run_recbole import main
from recbole_ssm.ops import backend as backends
from recbole_ssm.ops import self_check
from recbole_ssm.ops.self_check import Verdict
from recbole_ssm.registry import MODELS

from .conftest import build

RIGHT = Verdict("right", "", 2e-7, 12.3)
STATES = {
    "wrong": Verdict("wrong", "gradient of A: off by 4e+03 times what is allowed", 0.5),
    "crashes": Verdict("crashes", "SIGABRT: an illegal memory access was encountered"),
    "hangs": Verdict("hangs", "no result in 20 s"),
    "out of memory": Verdict("out of memory", "out of resource: shared memory, Required: 245760, limit: 232448"),
    "unchecked": Verdict("unchecked", "the device is busy"),
}


@pytest.fixture
def answers(monkeypatch):
    """Verdicts by op and backend instead of children, right where none is set; and what was asked for."""
    given, asked = {}, []

    def verdicts(checks, limit_s=None, timed=False, anew=False):
        asked.append((checks, timed, anew))
        return {check: given.get((check.op, check.backend), RIGHT) for check in checks}

    monkeypatch.setattr(doctor, "verdicts", verdicts)
    monkeypatch.setattr(
        backends, "_without_triton", lambda tensor: "its kernels need a GPU"
    )  # as outside of these tests
    return given, asked


def test_table(answers, capsys):
    given, asked = answers
    for op, state in zip(("selective_scan", "ssd"), STATES, strict=False):
        given[op, "reference"] = STATES[state]
    assert doctor.diagnose() == 0
    table = capsys.readouterr().out
    lines = table.splitlines()
    assert all(len(line) <= 100 for line in lines)
    begins = [line.split("  ")[0] for line in lines]
    for name in ("device", "memory", "Python", "CUDA", "recbole-ssm", "recbole", "torch", "triton", "numba"):
        assert name in begins
    for name in ("mamba-ssm", "causal-conv1d"):
        assert name in begins
    for op, sizes in (
        ("causal_conv", "D 128 K 4"),
        ("causal_conv", "D 640 K 4"),
        ("selective_scan", "D 128 N 32"),
        ("selective_scan", "D 128 N 1"),
        ("ssd", "H 32 P 16 G 1 N 64"),
        ("preference_attention", "H 8 P 8 M 8 E 64"),
    ):
        assert f"{op:<21}{sizes:<20}reference" in table
    assert "cpu       bfloat16 right (off by 2e-07), 12 times as fast" in table
    assert "triton    all      its kernels need a GPU" in table
    if not self_check.importlib.util.find_spec("mamba_ssm"):
        assert "mamba_ssm is not installed; run: pip" in table
    assert "gradient of A: off by 4e+03" in table
    assert lines[-2].startswith("The main job (STARRec) runs here: causal_conv on cpu, selective_scan on cpu,")
    ((checks, timed, anew),) = asked
    assert timed
    assert not anew
    assert len(checks) == len(set(checks)) == (6 * 2 + 2 * 1) * 2  # a CPU runs two ops as their reference alone


@pytest.mark.parametrize("state", STATES)
def test_the_main_job_cannot_run(state, answers, capsys):
    answers[0]["selective_scan", "cpu"] = STATES[state]
    assert doctor.diagnose() == 1
    out = capsys.readouterr().out
    assert STATES[state].detail in " ".join(out.split())
    assert "The main job (STARRec) cannot run here: selective_scan has no backend that is right." in out


def test_another_backend_takes_over_where_auto_checks(answers, capsys, monkeypatch):
    monkeypatch.setattr(backends, "CHECKED_DEVICES", ("cpu",))
    answers[0]["selective_scan", "cpu"] = STATES["crashes"]
    assert doctor.diagnose() == 0
    assert "selective_scan on reference" in capsys.readouterr().out
    answers[0]["selective_scan", "reference"] = STATES["crashes"]
    assert doctor.diagnose() == 1


def test_what_other_models_need_does_not_count(answers, capsys):
    answers[0]["ssd", "cpu"] = STATES["crashes"]
    assert doctor.diagnose() == 0


def test_a_gpu(answers, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (100 << 30, 140 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(self_check, "driver_version", lambda: "570.86.15")
    monkeypatch.setattr(doctor, "probe", lambda device, dtype="float32": torch.empty(0, dtype=getattr(torch, dtype)))
    monkeypatch.setattr(backends, "_without_triton", lambda tensor: "")
    self_check.hardware.cache_clear()
    answers[0]["selective_scan", "triton"] = STATES["hangs"]
    assert doctor.diagnose() == 0
    self_check.hardware.cache_clear()
    out = capsys.readouterr().out
    for line in (
        "device               NVIDIA H200",
        "compute capability   9.0",
        "driver               570.86.15",
        "memory               140.0 GiB, 100.0 free",
    ):
        assert line in out.splitlines()
    assert "hangs (no result in 20 s)" in out
    words = " ".join(out.split())
    assert "causal_conv on triton, selective_scan on reference, preference_features on triton" in words
    assert {check.device for checks, *_ in answers[1] for check in checks} == {"cuda:0"}


@pytest.mark.parametrize("words", [["--doctor"], ["--doctor", "--force"]])
def test_command(words, answers, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_recbole", *words])
    assert main() == 0
    assert answers[1][0][2] == ("--force" in words)
    assert "The main job" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--force"], ["--doctor", "--model=SSD4Rec"], ["--doctor", "--epochs=1"]])
def test_command_with_other_words(words, answers, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_recbole", *words])
    assert main() == 2
    assert "--doctor goes alone, or with --force" in capsys.readouterr().err
    assert not answers[1]


# Small sizes and plain torch behind the name cpu, so that nothing compiles; the scan may die.
HARMLESS = """
import os, sys, types

def instead(op, function):
    module = types.ModuleType(f"recbole_ssm.ops.{op}.cpu")
    setattr(module, f"{op}_cpu", function)
    sys.modules[module.__name__] = module

def convolve(*arguments, **more):
    from recbole_ssm.ops.causal_conv.reference import causal_conv_reference
    return causal_conv_reference(*arguments, **more)

instead("causal_conv", convolve)
instead("selective_scan", lambda *_, **__: os.abort())
"""


def test_from_the_command_to_the_children(tmp_path):
    """``python -m recbole_ssm --doctor`` in an empty folder, and then a part of it anew."""
    (tmp_path / "sitecustomize.py").write_text(HARMLESS)
    script = (
        "import sys; from recbole_ssm import doctor; doctor.DTYPES = ('float32',); "
        "conv, scan = ('causal_conv', (('D', 4), ('K', 4))), ('selective_scan', (('D', 4), ('N', 2))); "
        "needed = [conv, scan] if 'scan' in sys.argv else [conv]; sys.argv[1:] = ['--doctor', *sys.argv[2:]]; "
        "doctor.default_needs = lambda model: [doctor.Need(*need) for need in needed]; "
        "import runpy; runpy.run_module('recbole_ssm', run_name='__main__')"
    )
    root = Path(doctor.__file__).parent.parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join((str(tmp_path), str(root))), "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }  # fmt: skip

    def command(*words):
        return subprocess.run(
            [sys.executable, "-c", script, *words], capture_output=True, text=True, env=environment, check=False
        )

    done = command("scan")
    assert done.returncode == 1, done.stderr
    assert "cpu       float32  crashes (SIGABRT" in done.stdout
    assert "selective_scan has no backend that is right" in done.stdout
    kept = sorted((tmp_path / "cache" / "recbole_ssm" / "checks").iterdir())
    assert len(kept) == 4

    written = [file.stat().st_mtime_ns for file in kept]
    done = command("conv", "--force")
    assert done.returncode == 0, done.stderr
    assert sum(a != file.stat().st_mtime_ns for a, file in zip(written, kept, strict=True)) == 2


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        *((model, {}) for model in MODELS),
        ("STARRec", {"use_similarity": False, "attention_window": 5}),
        ("STARRec", {"use_ssm": False}),
        ("STARRec", {"use_pma": False}),
        ("STARRec", {"ssm_block": "mamba2"}),
        ("STARRec", {"filter_share": 0.5}),
        ("Mamba4Rec", {"ssm_block": "mamba3"}),
        ("Mamba4Rec", {"filter_share": 0.5}),
        ("SSD4Rec", {"train_mode": "sequence", "num_layers": 1}),
        ("SSD4Rec", {"train_mode": "sequence", "num_layers": 1, "backward_stream": "aligned"}),
        ("SSD4Rec", {"train_mode": "sequence", "bidirectional": False}),
    ],
)
def test_needs_are_what_models_call(model, settings, monkeypatch):
    config, network, (train_data, valid_data, _) = build(model, **settings)
    called = set()
    automatic = backends._automatic

    def record(op, device, dtype, sizes, *rest):
        called.add((op, sizes, dtype == torch.float32))
        return automatic(op, device, dtype, sizes, *rest)

    monkeypatch.setattr(backends, "_automatic", record)
    with torch.autocast("cpu", torch.bfloat16):
        loss = network.calculate_loss(next(iter(train_data)))
    sum(loss).backward() if isinstance(loss, tuple) else loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        network.eval().full_sort_predict(next(iter(valid_data))[0])
    assert called == set(doctor.needs(model, config))


def test_a_run_asks_for_all_at_once(answers, monkeypatch):
    """What is checked beforehand is what ``auto`` asks for afterwards."""
    monkeypatch.setattr(backends, "CHECKED_DEVICES", ("cpu",))
    asked = []
    monkeypatch.setattr(self_check, "verdict", lambda check: asked.append(check) or RIGHT)
    backends._automatic.cache_clear()
    _, network, (train_data, *_) = build("STARRec")
    network.calculate_loss(next(iter(train_data)))
    backends._automatic.cache_clear()
    (checks, *_), *more = answers[1]
    assert not more
    assert set(checks) == set(asked)
    assert len(checks) == 3


def test_a_backend_asked_for_by_name_is_not_checked_beforehand(answers, monkeypatch):
    """``ssm_backend`` is not for the attention."""
    monkeypatch.setattr(backends, "CHECKED_DEVICES", ("cpu",))
    build("STARRec", ssm_backend="reference")
    ((checks, *_),) = answers[1]
    assert [check.op for check in checks] == ["preference_attention"]


def test_on_a_cpu_a_run_asks_for_nothing(answers):
    build("STARRec")
    assert not answers[1]
