"""Runs one after the other in one process, and processes whose launcher dies."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from recbole_ssm import UserError
from recbole_ssm.distributed.launch import launch

from .conftest import random_rows, small_config, small_settings, write_dataset

ROOT = Path(__file__).parents[1]

RUNS = """
import json, sys, threading
from pathlib import Path
from recbole_ssm import run_recbole
settings = json.loads(sys.argv[1])
sys.argv = ["x"]
told = []
for seed in range(3):
    run_recbole("Mamba4Rec", "tiny", config_dict={**settings, "seed": seed})
    depth, stream = 0, sys.stdout
    while hasattr(stream, "_StreamWrapper__wrapped"):
        depth, stream = depth + 1, stream._StreamWrapper__wrapped
    told.append([threading.active_count(), depth])
print(json.dumps(told))
"""


def test_each_run_of_a_process_has_its_log_and_leaves_nothing():
    write_dataset("tiny", random_rows())
    settings = {**small_settings("Mamba4Rec"), "epochs": 1, "data_path": "dataset", "show_progress": False}
    command = [sys.executable, "-c", RUNS, json.dumps(settings)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    job = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    told = json.loads(job.stdout.splitlines()[-1])
    assert told[0] == told[1] == told[2]
    assert told[0][1] <= 1
    logs = sorted(Path("log/Mamba4Rec").glob("*.log"))
    assert len(logs) == 3
    for log in logs:
        assert log.read_text().count("test result") == 1
    events = [path for path in Path("log_tensorboard").rglob("events*") if path.stat().st_size < 100]
    assert not events  # of which RecBole begins one more a trainer


@pytest.mark.parametrize("count", [0, -1])
def test_no_processes_are_refused(count):
    with pytest.raises(UserError, match=f"--nproc is {count}: at least one process is needed"):
        launch(print, small_config("Mamba4Rec"), {}, nproc=count)


@pytest.mark.parametrize(("world_size", "offset"), [(-1, 2), (4, 3), (4, -1)])
def test_ranks_that_cannot_be_are_refused(world_size, offset):
    with pytest.raises(UserError, match=rf"--group_offset={offset} and --nproc=2 make ranks .*--world_size is"):
        launch(print, small_config("Mamba4Rec"), {}, nproc=2, world_size=world_size, group_offset=offset)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_processes_end_with_their_launcher():
    write_dataset("tiny", random_rows())
    words = [f"--{key}={value}" for key, value in small_settings("Mamba4Rec").items()]
    # As a shell starts what a script puts into the background; else torch sends SIGINT to processes that lose theirs.
    command = ["sh", "-c", 'trap "" INT; exec "$0" "$@"', sys.executable, "-m", "recbole_ssm", "-m", "Mamba4Rec"]
    command += [
        "-d",
        "tiny",
        "--data_path=dataset",
        *words,
        "--nproc=2",
        "--epochs=100000",
        "--stopping_step=100000",
        "--show_progress=False",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    assert job.stderr is not None
    for line in job.stderr:
        if "epoch 2 training" in line:
            break
    workers = [process for process in psutil.Process(job.pid).children(recursive=True) if process.is_running()]
    assert len(workers) >= 2
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    job.stderr.close()
    _, alive = psutil.wait_procs(workers, timeout=20)
    left = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    for process in left:
        process.kill()
    assert left == []
    begun = len(list(Path("log_tensorboard").rglob("events*")))
    assert begun == 1  # the first process's alone
