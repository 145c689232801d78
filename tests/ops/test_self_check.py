"""Backends that crash, hang, run out of memory or err: found out beside the run, said in a line, and remembered."""

import json
import logging
import subprocess
import sys
import threading
import time

import pytest
import torch

from recbole_ssm import run_recbole
from recbole_ssm.errors import BackendUnavailable
from recbole_ssm.ops import backend as backends
from recbole_ssm.ops import causal_conv, self_check, self_check_child
from recbole_ssm.ops.cases import make
from recbole_ssm.ops.self_check import Check, Verdict, verdict, verdicts
from recbole_ssm.ops.self_check_child import examine

from ..conftest import random_rows, small_settings, write_dataset

# The children import this before anything else: backends that stand for kernels which a compiler got wrong.
SABOTAGE = """
import os, sys, time, types

def instead(op, function):
    module = types.ModuleType(f"recbole_ssm.ops.{op}.cpu")
    setattr(module, f"{op}_cpu", function)
    sys.modules[module.__name__] = module

def out_of_memory(*_):
    import torch
    raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")

def convolve(x, weight, bias, activation, cu_seqlens):
    from recbole_ssm.ops.causal_conv.reference import causal_conv_reference
    if weight.shape[1] == 2:
        raise RuntimeError("an illegal memory access was encountered")
    return causal_conv_reference(x, weight, bias, activation, cu_seqlens) * (1.01 if weight.shape[1] == 3 else 1)

instead("ssd", lambda **_: os.abort())
instead("selective_scan", lambda **_: time.sleep(1000))
instead("preference_attention", out_of_memory)
instead("causal_conv", convolve)
"""


def on_cpu(op, **sizes):
    return Check(op, "cpu", "cpu", "float32", tuple(sizes.items()))


CRASHES = on_cpu("ssd", H=2, P=3, G=1, N=4)
HANGS = on_cpu("selective_scan", D=5, N=3)
LACKS_MEMORY = on_cpu("preference_attention", H=2, P=3, M=1, E=4)
RAISES = on_cpu("causal_conv", D=4, K=2)
ERRS = on_cpu("causal_conv", D=4, K=3)
RIGHT = on_cpu("causal_conv", D=4, K=4)
EVERY = [CRASHES, ERRS, HANGS, RIGHT, RAISES, LACKS_MEMORY]


KEPT = (
    self_check.kernels_digest, self_check.hardware, self_check.environment, backends._automatic, backends._announce,
)  # fmt: skip


def forget():
    """As another process would begin."""
    self_check._known.clear()
    for kept in KEPT:
        kept.cache_clear()


@pytest.fixture(scope="module")
def sabotaged(tmp_path_factory):
    """The folders of the sabotage and of the cache, filled with verdicts on all of the above."""
    folder, cache = tmp_path_factory.mktemp("sabotage"), tmp_path_factory.mktemp("cache")
    (folder / "sitecustomize.py").write_text(SABOTAGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("XDG_CACHE_HOME", str(cache))
        forget()
        found = verdicts(EVERY, limit_s=5)
    forget()
    return folder, cache, found


@pytest.fixture
def cache(sabotaged, monkeypatch, tmp_path):
    """A copy of that cache, and nothing in this process's memory."""
    folder = tmp_path / "cache"
    for file in sabotaged[1].rglob("*.json"):
        copy = folder / file.relative_to(sabotaged[1])
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text())
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    forget()
    yield folder
    forget()


@pytest.fixture
def no_child(monkeypatch):
    """Processes cannot be started; how often it was tried is counted."""
    tried = []

    def popen(*_, **__):
        tried.append(1)
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", popen)
    return tried


def test_one_that_fails_does_not_condemn_the_others(sabotaged):
    found = {check: sabotaged[2][check] for check in EVERY}
    assert [found[check].state for check in EVERY] == [
        "crashes", "wrong", "hangs", "right", "crashes", "out of memory",
    ]  # fmt: skip
    assert found[CRASHES].detail.startswith("SIGABRT")
    assert found[RAISES].detail == "RuntimeError: an illegal memory access was encountered"
    assert found[LACKS_MEMORY].detail == "Tried to allocate 20.00 GiB"
    assert found[HANGS].detail == "no result in 5 s"
    assert "times what is allowed" in found[ERRS].detail
    assert 1e-3 < found[ERRS].error < 0.1
    assert found[RIGHT].error < 1e-5
    assert len(list(sabotaged[1].rglob("*.json"))) == len(EVERY)


def test_verdicts_are_kept(sabotaged, cache, no_child):
    assert verdicts(EVERY) == sabotaged[2]
    assert not no_child
    assert {file.parent for file in cache.rglob("*.json")} == {cache / "recbole_ssm" / "checks"}


def versions_but(name, version):
    return lambda package: version if package == name else "1"


@pytest.mark.parametrize("change", ["triton", "torch", "driver", "device", "compute capability", "kernels"])
def test_another_machine_or_version_asks_anew(change, cache, no_child, monkeypatch):
    gpu = {"device": "NVIDIA H100", "compute capability": "9.0", "driver": "570.86"}
    monkeypatch.setattr(self_check, "hardware", lambda device: gpu)
    monkeypatch.setattr(self_check, "package_version", versions_but("none", "1"))
    self_check._write(RIGHT, Verdict("right"))
    assert verdict(RIGHT).state == "right"
    assert not no_child
    forget()
    if change in ("triton", "torch"):
        monkeypatch.setattr(self_check, "package_version", versions_but(change, "2"))
    elif change == "kernels":
        monkeypatch.setattr(self_check, "kernels_digest", lambda: "another")
    else:
        monkeypatch.setattr(self_check, "hardware", lambda device: gpu | {change: "another"})
    assert verdict(RIGHT).state == "unchecked"
    assert no_child


@pytest.mark.parametrize("asked", [{"dtype": "bfloat16"}, {"sizes": (("D", 8), ("K", 4))}, {"states": True}])
def test_another_call_asks_anew(asked, cache, no_child):
    assert verdict(RIGHT).state == "right"
    assert verdict(Check(**{**vars(RIGHT), **asked})).state == "unchecked"
    assert no_child


def test_kernels_digest_is_of_all_their_source(monkeypatch, tmp_path):
    (tmp_path / "ssd").mkdir()
    (tmp_path / "ssd" / "triton.py").write_text("a = 1")
    monkeypatch.setattr(self_check, "__file__", str(tmp_path / "self_check.py"))
    forget()
    before = self_check.kernels_digest()
    forget()
    assert self_check.kernels_digest() == before
    (tmp_path / "ssd" / "triton.py").write_text("a = 2")
    forget()
    assert self_check.kernels_digest() != before
    forget()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": {}, "verdict": {"state": "right"}}', "other state"])
def test_a_damaged_file_is_asked_anew(content, cache, no_child):
    for file in cache.rglob("*.json"):
        kept = json.loads(file.read_text())
        kept["verdict"]["state"] = "fine"
        file.write_text(json.dumps(kept) if content == "other state" else content)
    assert verdict(RIGHT).state == "unchecked"
    assert no_child


def test_what_could_not_be_checked_is_not_kept(cache, no_child):
    other = on_cpu("causal_conv", D=9, K=4)
    before = len(list(cache.rglob("*")))
    assert verdict(other) == Verdict("unchecked", "no process can be started: no more processes")
    assert len(list(cache.rglob("*"))) == before
    assert verdict(other).state == "unchecked"
    assert len(no_child) == 1


def test_a_device_out_of_reach_condemns_no_kernel(cache):
    absent = Check("causal_conv", "cpu", "cuda:7", "float32", RIGHT.sizes)
    found = self_check._judge([absent], 5, False)[absent]
    assert found.state == "unchecked"
    assert found.detail.startswith("exit status 1: ")


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(self_check, "_judge", lambda checks, *_: {check: Verdict("right") for check in checks})
    forget()
    assert verdict(RIGHT).state == "right"
    assert "the verdict cannot be kept" in caplog.text
    forget()


def test_auto_takes_what_passes_and_says_why_not(cache, no_child, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(backends, "CHECKED_DEVICES", ("cpu",))
    x = torch.zeros(1)
    for _ in range(3):
        assert backends.choose("causal_conv", "auto", x, dict(RIGHT.sizes)) == "cpu"
        assert backends.choose("causal_conv", "auto", x, dict(ERRS.sizes)) == "reference"
        assert backends.choose("ssd", "auto", x, dict(CRASHES.sizes)) == "reference"
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 2
    assert said[0].startswith("not used here: causal_conv on cpu (D 4 K 3, float32): wrong (")
    assert said[1].startswith("not used here: ssd on cpu (H 2 P 3 G 1 N 4, float32): crashes (SIGABRT")
    assert all("--doctor" in line and "\n" not in line for line in said)
    assert not no_child


def test_auto_takes_the_next_that_passes(monkeypatch):
    """mamba_ssm before the reference, and only after a check of its own."""
    monkeypatch.setattr(backends, "CHECKED_DEVICES", ("meta",))
    monkeypatch.setattr(backends, "why_not", lambda op, backend, *_: "")
    fails = {"triton"}
    monkeypatch.setattr(
        self_check, "verdict", lambda check: Verdict("wrong" if check.backend in fails else "right", "far off")
    )
    x = torch.zeros(1, device="meta")

    def choice(**options):
        backends._automatic.cache_clear()
        return backends.choose("ssd", "auto", x, {"H": 1}, **options)

    assert choice() == "mamba_ssm"
    assert choice(states=True) == "reference"
    fails.add("mamba_ssm")
    assert choice() == "reference"
    fails.clear()
    assert choice() == "triton"
    forget()


def test_asked_for_by_name_it_is_not_checked(cache, no_child, monkeypatch):
    monkeypatch.setattr(backends, "CHECKED_DEVICES", ("cpu",))
    x = torch.zeros(1)
    assert backends.choose("ssd", "cpu", x, dict(CRASHES.sizes)) == "cpu"
    with pytest.raises(BackendUnavailable, match="cannot run here"):
        backends.choose("preference_attention", "mamba_ssm", x, {})
    assert not no_child


def test_a_cpu_is_not_checked(cache, no_child):
    case = make("causal_conv", [3], {"D": 4, "K": 3})
    causal_conv(**case.inputs, **case.fixed)
    assert not no_child


def test_the_run_goes_on(sabotaged, monkeypatch, tmp_path, caplog):
    """A model whose scan hangs and whose attention lacks memory trains on the reference, which it says."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(backends, "CHECKED_DEVICES", ("cpu",))
    monkeypatch.setattr(self_check, "LIMIT_S", 5.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    write_dataset("tiny", random_rows())
    settings = {"data_path": "dataset", "epochs": 1, "show_progress": False, **small_settings("STARRec")}
    forget()
    with monkeypatch.context() as patch:
        patch.syspath_prepend(sabotaged[0])
        result = run_recbole("STARRec", "tiny", config_dict=settings)
    assert 0 <= result["test_result"]["ndcg@10"] <= 1
    warned = [record.getMessage() for record in caplog.records if record.getMessage().startswith("not used here")]
    assert len(warned) == 2
    assert any("selective_scan on cpu (D 32 N 4, float32): hangs (no result in 5 s)" in line for line in warned)
    assert any("preference_attention on cpu" in line and "out of memory (Tried" in line for line in warned)
    assert "selective_scan runs on the reference backend" in caplog.text
    assert "causal_conv runs on the cpu backend" in caplog.text
    assert caplog.text.count("checking, once on this machine") == 1

    forget()  # a second run knows
    caplog.clear()
    again = run_recbole("STARRec", "tiny", config_dict=settings)
    assert again["test_result"] == result["test_result"]
    assert "checking, once on this machine" not in caplog.text
    assert caplog.text.count("not used here") == 2
    forget()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("states", [False, True], ids=["", "states"])
@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        ("selective_scan", {"D": 5, "N": 3}),
        ("ssd", {"H": 2, "P": 3, "G": 1, "N": 4}),
        ("causal_conv", {"D": 5, "K": 4}),
        ("preference_attention", {"H": 2, "P": 3, "M": 2, "E": 4}),
        ("preference_attention", {"H": 2, "P": 3, "M": 1, "E": 4, "window": 3}),
    ],
)
def test_our_backends_pass(op, sizes, states, dtype, backend, monkeypatch):
    if states and op in ("causal_conv", "preference_attention"):
        pytest.skip("its kernels know of no states")
    if backend == "triton" and not torch.cuda.is_available():
        monkeypatch.setattr(self_check_child, "LENGTHS", (1, 0, 17))  # the interpreter is slow
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    found = examine(Check(op, backend, device, dtype, tuple(sizes.items()), states))
    assert found.state == "right", found
    assert 0 < found.error < (1e-5 if dtype == "float32" else 5e-2)


@pytest.mark.parametrize("op", ["selective_scan_last", "ssd_last"])
def test_forms_for_the_last_rows_are_checked_with_their_op(op, monkeypatch):
    import recbole_ssm.ops.cases as cases

    whole = op.removesuffix("_last")
    sizes = {"selective_scan": {"D": 5, "N": 3}, "ssd": {"H": 2, "P": 3, "G": 1, "N": 4}}[whole]
    true = cases.FUNCTIONS[op]
    off = {"cpu": 1.01, "reference": 1.0}
    monkeypatch.setitem(
        cases.FUNCTIONS, op, lambda backend, **inputs: true(backend="reference", **inputs) * off[backend]
    )
    found = examine(Check(whole, "cpu", "cpu", "float32", tuple(sizes.items())))
    assert found.state == "wrong"
    assert "of last rows" in found.detail


@pytest.mark.parametrize(("factor", "state"), [(1 + 2e-6, "right"), (1 + 1e-4, "wrong")])
def test_rounding_is_not_wrong(factor, state, monkeypatch):
    import recbole_ssm.ops.cases as cases

    true = cases.FUNCTIONS["causal_conv"]
    monkeypatch.setitem(
        cases.FUNCTIONS,
        "causal_conv",
        lambda backend, **inputs: true(backend="reference", **inputs) * (factor if backend == "cpu" else 1),
    )
    assert examine(RIGHT).state == state


def test_not_a_number_is_wrong(monkeypatch):
    import recbole_ssm.ops.cases as cases

    true = cases.FUNCTIONS["causal_conv"]
    monkeypatch.setitem(
        cases.FUNCTIONS,
        "causal_conv",
        lambda backend, **inputs: true(backend="reference", **inputs) * (float("nan") if backend == "cpu" else 1),
    )
    found = examine(RIGHT)
    assert found.state == "wrong"
    assert found.error == float("inf")
    assert Verdict(**json.loads(json.dumps(vars(found)))) == found


def test_speed_is_told_where_it_is_right(monkeypatch):
    monkeypatch.setattr(self_check_child, "TIMED_LENGTHS", (20,) * 3)
    found = examine(Check("causal_conv", "cpu", "cpu", "float32", (("D", 4), ("K", 4))), timed=True)
    assert found.times_as_fast > 0
    assert examine(Check("causal_conv", "reference", "cpu", "float32", RIGHT.sizes), timed=True).times_as_fast == 1.0


def test_timed_asks_again_for_what_was_not_timed_and_shows_a_bar(cache, no_child, capsys):
    assert verdicts([RIGHT])[RIGHT].state == "right"
    assert not no_child
    assert not capsys.readouterr().err
    assert verdicts([RIGHT], timed=True)[RIGHT].state == "unchecked"
    assert "checking" in (bar := capsys.readouterr().err)
    assert "1/1" in bar
    assert no_child


def compiled_and_looked_at(compile_something):
    """Whether the stack looked like a compiler's at any time while ``compile_something`` ran."""
    seen, over = [], threading.Event()
    main = threading.get_ident()

    def look():
        while not over.is_set():
            seen.append(self_check_child.is_compiling(sys._current_frames()[main]))
            time.sleep(0.01)

    thread = threading.Thread(target=look)
    thread.start()
    compile_something()
    over.set()
    thread.join()
    return any(seen)


def test_compiling_is_not_hanging():
    import numba

    added = numba.njit(lambda x: x + 1)
    assert compiled_and_looked_at(lambda: added(1))
    assert not compiled_and_looked_at(lambda: [added(1), time.sleep(0.1)])


def test_triton_has_the_function_that_tells_of_compilation():
    compiler = pytest.importorskip("triton.compiler.compiler")
    assert ("triton.compiler.compiler", compiler.compile.__name__) in self_check_child.COMPILERS
