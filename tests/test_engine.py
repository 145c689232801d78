"""Training on a Ray cluster."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from .conftest import listening, random_rows, write_dataset

pytest.importorskip("ray")

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_run_goes_on_after_a_process_died():
    write_dataset("tiny", random_rows())
    words = ["--model=Mamba4Rec", "--dataset=tiny", "--data_path=dataset", "--epochs=12"]
    command = [sys.executable, "-m", "recbole_ssm", *words, "--engine=ray", "--nproc=2", "--show_progress=False"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    told, killed = [], False
    try:
        assert job.stdout is not None
        for line in job.stdout:
            told.append(line)
            if "epoch 3 evaluating" in line and not killed:
                workers = [p for p in psutil.Process(job.pid).children(recursive=True) if "TrainWorker" in p.name()]
                workers[-1].suspend()  # it must not end before it is killed
                waiting = listening(psutil.Process(job.pid))
                workers[-1].kill()
                killed = True
        job.wait(timeout=60)
    finally:
        job.kill()
    assert job.returncode == 0, "".join(told)
    assert killed
    assert {"gcs_server", "raylet"} < waiting.keys()
    assert sum("TrainWorker" in name for name in waiting) >= 1
    assert not any(waiting.values()), waiting
    begun = [line for line in told if "Resume training from epoch" in line]
    assert begun, "".join(told)
    assert int(begun[-1].split("epoch")[-1]) > 0  # Ray may not have kept the latest yet
    assert any("epoch 11 evaluating" in line for line in told)
    assert any("test result" in line for line in told)
