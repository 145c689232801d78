"""Disks that are full, and files and folders that cannot be written.

A folder below a regular file, and one of another kind in the way, cannot be written by root either. A disk is full
where the process may write no more than so many bytes to a file.
"""

import json
import logging
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numba
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from recbole_ssm import UserError, quick_start
from recbole_ssm.checkpoint import load_checkpoint, save_checkpoint
from recbole_ssm.cli import run_hyper, run_recbole
from recbole_ssm.curves import Curves, disk_errors_told_once
from recbole_ssm.errors import CannotWrite
from recbole_ssm.logs import _end_quietly
from recbole_ssm.ops.compiled import compiled
from recbole_ssm.places import check_file
from recbole_ssm.quick_start import config_of, train_and_test

from .conftest import random_rows, small_config, small_settings, write_dataset

resource = pytest.importorskip("resource", reason="Windows limits no file's size")

TINY = [f"--{key}={value}" for key, value in small_settings("Mamba4Rec").items()]
TINY += ["--model=Mamba4Rec", "--dataset=tiny", "--epochs=1", "--show_progress=False"]


@contextmanager
def disk_full_after(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def command(monkeypatch, main, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["command", *words])
    return main()


IN_THE_WAY = [
    ("log", "log/Mamba4Rec", []),
    ("log_tensorboard", "log_tensorboard", []),
    ("saved", "saved", []),
    ("file", "file/below", ["--checkpoint_dir=file/below"]),
    ("file", "file/below", ["--result_file=file/below/result.json"]),
    (None, "folder", ["--result_file=folder"]),
]


@pytest.mark.parametrize(("file", "named", "words"), IN_THE_WAY)
def test_what_cannot_be_written_is_known_before_data_are_loaded(file, named, words, monkeypatch, capsys):
    monkeypatch.setattr(quick_start, "create_dataset", lambda config: pytest.fail("data were loaded"))
    Path("folder").mkdir()
    if file is not None:
        Path(file).write_text("mine")
    assert command(monkeypatch, run_recbole.main, *TINY, "--state=ERROR", *words) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"run_recbole: {named} cannot be written (")
    assert told.count("\n") == 1
    if file is not None:
        assert Path(file).read_text() == "mine"


@pytest.mark.parametrize("option", ["output_file", "display_file", "storage_path"])
def test_a_search_knows_it_before_its_first_trial(option, monkeypatch, capsys):
    monkeypatch.setattr("recbole_ssm.search.tuner.start_ray", lambda address: pytest.fail("Ray was started"))
    write_dataset("tiny", random_rows())
    Path("file").touch()
    assert command(monkeypatch, run_hyper.main, *TINY, "--state=ERROR", f"--{option}=file/x/y") == 1
    told = capsys.readouterr().err
    assert told.startswith(
        "run_hyper: file/x" if option != "storage_path" else f"run_hyper: {Path('file/x').resolve()}"
    )
    assert f"--{option}" in told
    assert told.count("\n") == 1


def test_a_look_at_a_file_leaves_it_as_it_was():
    Path("old.json").write_text("old")
    check_file("old.json", "")
    check_file("new/new.json", "")
    assert Path("old.json").read_text() == "old"
    assert list(Path("new").iterdir()) == []


@pytest.mark.parametrize(
    "there", [b"user_id:token\titem_id:token\n", b"PK\x03\x04\0best_valid_result", b'{"another": 1}']
)
def test_what_is_no_earlier_result_is_never_replaced(there, monkeypatch, capsys):
    Path("result.json").write_bytes(there)
    assert command(monkeypatch, run_recbole.main, *TINY, "--result_file=result.json") == 2
    assert Path("result.json").read_bytes() == there
    assert capsys.readouterr().err == (
        "run_recbole: result.json is there, and is no earlier file of this kind: name another --result_file.\n"
    )
    for option in ("output_file", "display_file"):
        assert command(monkeypatch, run_hyper.main, *TINY, f"--{option}=result.json") == 2
        assert f"name another --{option}" in capsys.readouterr().err
        assert Path("result.json").read_bytes() == there


def test_an_earlier_result_is_replaced(monkeypatch):
    write_dataset("tiny", random_rows())
    for seed in (1, 2):
        assert command(monkeypatch, run_recbole.main, *TINY, f"--seed={seed}", "--result_file=result.json") == 0
        assert json.loads(Path("result.json").read_text())["config"]["seed"] == seed


def test_a_result_that_cannot_be_written_any_more_is_printed(monkeypatch, capsys):
    write_dataset("tiny", random_rows())
    monkeypatch.setattr(quick_start, "log_results", lambda *_: Path("result.json").mkdir())
    assert command(monkeypatch, run_recbole.main, *TINY, "--state=ERROR", "--result_file=result.json") == 1
    told = capsys.readouterr()
    report = json.loads(told.out)
    assert 0 <= report["test_result"]["ndcg@10"] <= 1
    assert load_checkpoint(report["checkpoint"])["state_dict"]
    assert told.err.count("\n") == 1
    assert "the result is printed instead" in told.err
    assert report["checkpoint"] in told.err


def test_a_full_disk_leaves_the_last_good_file():
    save_checkpoint("x.pth", {"epoch": 1})
    for size in (0, 1000, 20_000):
        with disk_full_after(size), pytest.raises(CannotWrite, match=r"x\.pth cannot be written \(File too large\)"):
            save_checkpoint("x.pth", {"epoch": 2, "tensor": torch.zeros(10_000)})
    assert load_checkpoint("x.pth") == {"epoch": 1, "format": load_checkpoint("x.pth")["format"]}
    assert [path.name for path in Path().iterdir()] == ["x.pth"]


def test_a_disk_that_fills_up_in_training_leaves_a_run_that_goes_on(monkeypatch):
    write_dataset("tiny", random_rows(users=12))
    settings = {"epochs": 3, "train_batch_size": 64}
    whole = train_and_test(small_config("Mamba4Rec", checkpoint_dir="whole", **settings))
    save, written = torch.save, []

    def full_after_two(state, file):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(save(state, file))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_after_two)
        with pytest.raises(
            CannotWrite, match=r"No space left on device.* ended in epoch 2; epochs up to 1 are kept in"
        ):
            train_and_test(small_config("Mamba4Rec", **settings))
    (file,) = Path("saved").iterdir()
    assert train_and_test(config_of(str(file)), resume_file=str(file)).result == whole.result


def test_a_log_that_cannot_be_written_any_more_says_so_once(capsys):
    write, root = disk_full_after(10), logging.getLogger()
    handler = logging.FileHandler("x.log", delay=False)
    _end_quietly(handler)
    root.addHandler(handler)
    with write:
        root.error("a line that is longer than what there is room for")
        root.error("another")
    assert handler not in root.handlers
    told = [line for line in capsys.readouterr().err.splitlines() if "x.log" in line or "Traceback" in line]
    assert len(told) == 1
    assert told[0].endswith("cannot be written (File too large): this log ends here.")


def test_curves_that_cannot_be_written_any_more_end(caplog, monkeypatch):
    raised = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    curves = Curves(SummaryWriter("curves"))
    with disk_full_after(200), disk_errors_told_once():
        for step in range(100):
            curves.add_scalar("loss", 1.0, step)
        curves.flush()
        curves.close()
    assert caplog.text.count("log_tensorboard cannot be written") == 1
    assert raised == []


def add_one(numbers):
    for place in numba.prange(len(numbers)):
        numbers[place] += 1


def test_a_kernel_whose_compiled_form_finds_no_room_runs(monkeypatch, caplog):
    monkeypatch.setattr(numba.config, "CACHE_DIR", "kernels")
    kernel, numbers = compiled(add_one), torch.zeros(3).numpy()
    with disk_full_after(100):
        kernel(numbers)
    assert numbers.tolist() == [1, 1, 1]
    assert "cannot be written" in caplog.text
    kernel(numbers.astype("float64"))
    assert list(Path("kernels").rglob("*.nbc"))


def test_a_saved_dataset_with_a_folder_in_the_way():
    write_dataset("tiny", random_rows())
    Path("saved/tiny-SequenceDataset.pth").mkdir(parents=True)
    with pytest.raises(UserError, match=r"saved/tiny-SequenceDataset\.pth cannot be written"):
        train_and_test(small_config("Mamba4Rec", save_dataset=True))


@pytest.mark.slow
def test_the_command_on_a_full_disk():
    write_dataset("tiny", random_rows())
    words = ["-m", "recbole_ssm", *TINY]
    job = subprocess.run(
        ["bash", "-c", 'ulimit -f 5; exec "$0" "$@"', sys.executable, *words], capture_output=True, text=True
    )
    assert job.returncode == 1
    assert "Traceback" not in job.stderr
    assert job.stderr.splitlines()[-1].startswith("run_recbole: saved/Mamba4Rec-tiny-")
