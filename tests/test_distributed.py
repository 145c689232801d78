"""Two processes train what one does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from recbole_ssm import UserError
from recbole_ssm.checkpoint import load_checkpoint
from recbole_ssm.distributed import processes as together
from recbole_ssm.distributed.launch import launch
from recbole_ssm.quick_start import config_of, run, train_and_test

from .conftest import listening, random_rows, small_config, write_dataset

NO_CHANCE = {"dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "mask_ratio": 0.0}
# SGD, for Adam makes a rounding error of a gradient near 0 into a whole step.
# Of the last batch of 21 users one is left, of which the second process has none.
TRAINING = {"learner": "sgd", "learning_rate": 0.5, "epochs": 2, "train_batch_size": 64, "eval_batch_size": 20}

# Histories of the same set in batches that leave the second process without a row now and then.
CASES = {
    "STARRec": ("STARRec", {"balance_weight": 1.0}),
    "STARRec, experts chosen": ("STARRec", {"experts_per_token": 2, "balance_weight": 1.0}),
    "Mamba4Rec, a history a batch": ("Mamba4Rec", {"train_batch_size": 1}),
    "Mamba4Rec, rows": ("Mamba4Rec", {"train_mode": "prefix", "lr_scheduler_type": "cosine"}),
    "SSD4Rec, rows": ("SSD4Rec", {}),
    "SASRec": ("SASRec", {"train_mode": "sequence"}),
    "SASRec, RecBole's rows": ("SASRec", {"train_neg_sample_args": None}),
    "GRU4Rec, RecBole's rows, one left": ("GRU4Rec", {"train_neg_sample_args": None, "train_batch_size": 3}),
    "history excluded": ("Mamba4Rec", {"exclude_history": True}),
    "sampled candidates": ("Mamba4Rec", {"eval_args": {"mode": "uni10"}, "repeatable": True}),
}
METRICS = ["Recall", "NDCG", "ItemCoverage", "GiniIndex"]


def settings(name: str) -> tuple[str, dict]:
    model, more = CASES[name]
    known = small_config(model)
    chance = {key: value for key, value in NO_CHANCE.items() if key in known}
    return model, {
        **TRAINING,
        **chance,
        "metrics": METRICS,
        "valid_metric": "NDCG@10",
        "checkpoint_dir": name.replace(" ", "-"),
        **more,
    }


def train(name: str, **more):
    model, own = settings(name)
    torch.set_num_threads(1)
    return train_and_test(small_config(model, **own, **more))


def processes(rank: int, name: str) -> dict:
    """The settings by which one of two processes finds the other."""
    where = {"rendezvous": str(Path(f"{name}.meet").resolve()), "local_rank": rank}
    return {"nproc": 2, "world_size": 2, "offset": 0, **where}


def train_all(rank: int) -> None:
    for name in CASES:
        ended = train(name, **processes(rank, name))
        if rank == 0:
            torch.save((ended.result, ended.checkpoint), f"{name}.pt")
        torch.distributed.destroy_process_group()
    for name, resumed in (("whole", False), ("interrupted", False), ("interrupted", True)):
        # With dropout, of which each process draws its own.
        more = {
            "dropout_prob": 0.3,
            "checkpoint_dir": name,
            "epochs": 2 if name == "interrupted" and not resumed else 4,
        }
        if resumed:
            (file,) = map(str, Path(name).glob("*.pth"))
            config = config_of(file, {"epochs": 4, **processes(rank, "resumed")})
            train_and_test(config, resume_file=file)
        else:
            train_and_test(small_config("Mamba4Rec", **more, **processes(rank, name)))
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes make of each case, by its name."""
    folder, before = tmp_path_factory.mktemp("two"), Path.cwd()
    os.chdir(folder)
    try:
        write_dataset("tiny", random_rows(users=21))
        torch.multiprocessing.spawn(train_all, nprocs=2)
        files = {name: next(Path(name).glob("*.pth")) for name in ("whole", "interrupted")}
        return {name: (None, load_checkpoint(file)) for name, file in files.items()} | {
            name: (result, load_checkpoint(folder / checkpoint))
            for name in CASES
            for result, checkpoint in [torch.load(f"{name}.pt", weights_only=False)]
        }
    finally:
        os.chdir(before)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_and_rank_as_one(name, two_processes):
    write_dataset("tiny", random_rows(users=21))
    alone = train(name)
    result, checkpoint = two_processes[name]
    expected = load_checkpoint(alone.checkpoint)["resume"]["state_dict"]
    moved = 0.0
    for key, value in checkpoint["resume"]["state_dict"].items():
        torch.testing.assert_close(
            value, expected[key], rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
        moved = max(moved, value.abs().max().item())
    assert moved > 0
    for part in ("best_valid_result", "test_result"):
        if name != "sampled candidates":  # each process draws its own
            assert result[part] == pytest.approx(alone.result[part], abs=1e-4)
        assert result[part].keys() == alone.result[part].keys()


def test_two_processes_go_on_as_if_they_had_not_ended(two_processes):
    (_, whole), (_, resumed) = two_processes["whole"], two_processes["interrupted"]
    assert len(resumed["resume"]["random"]) == 2
    assert resumed["best_valid_result"] == whole["best_valid_result"]
    for key, value in whole["resume"]["state_dict"].items():
        assert torch.equal(value, resumed["resume"]["state_dict"][key]), key


@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_shards_are_disjoint_and_whole(count, monkeypatch):
    rows, taken = list(range(count)), []
    monkeypatch.setattr(together, "world_size", lambda: 3)
    for number in range(3):
        monkeypatch.setattr(together, "rank", lambda number=number: number)
        own = together.shard(rows)
        assert own  # a process without a row could not take part
        taken += own[: together.own_rows(count)]
    assert sorted(taken) == rows


def workers_of(process: psutil.Process, count: int) -> list[psutil.Process]:
    """The processes that train, once there are ``count`` of them."""
    for _ in range(600):
        children = [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]
        if len(children) == count:
            return children
        time.sleep(0.1)
    raise AssertionError("the processes never started")


def start(*words: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "recbole_ssm", *words, "--nproc=2", "--show_progress=False"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_dead_process_ends_the_job_with_its_reason_and_the_job_can_go_on():
    write_dataset("tiny", random_rows())
    job = start(
        "--model=Mamba4Rec", "--dataset=tiny", "--data_path=dataset", "--epochs=100000", "--stopping_step=100000"
    )  # fmt: skip
    try:
        workers = workers_of(psutil.Process(job.pid), 2)
        assert job.stdout is not None
        for line in job.stdout:
            if "Saving current" in line:
                break
        while not list(Path("saved").glob("*.pth")):  # written a moment later
            time.sleep(0.01)
        waiting = [listening(worker) for worker in workers]
        os.kill(workers[1].pid, signal.SIGKILL)
        told, _ = job.communicate(timeout=60)
    finally:
        job.kill()
    # gloo waits in each; no other machine can reach it.
    assert [list(found.values()) for found in waiting] == [[[]], [[]]]
    assert job.returncode == 2
    assert "process 1 of 2 died (SIGKILL) and the others were stopped" in told
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)

    (file,) = Path("saved").glob("*.pth")
    done = load_checkpoint(file)["resume"]["epoch"]
    told, _ = start("--resume", str(file), f"--epochs={done + 3}", "--result_file=result.json").communicate()
    assert f"Resume training from epoch {done + 1}" in told
    assert json.loads(Path("result.json").read_text())["test_result"]["ndcg@10"] > 0


def test_an_error_of_a_process_is_that_of_the_job():
    write_dataset("tiny", random_rows())
    with pytest.raises(UserError, match=r"process \d: .* became (infinite or )?NaN in epoch"):
        run("Mamba4Rec", "tiny", None, {"data_path": "dataset", "learning_rate": 1e38}, nproc=2)


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(
        UserError, match=r"--nproc=64 needs as many GPUs; gpu_id names 2 and \d+ can be used: name more"
    ):
        launch(print, {"device": torch.device("cuda"), "gpu_id": "0,1"}, {}, nproc=64)  # type: ignore[arg-type]


def test_processes_on_this_machine_use_the_loopback_interface_whatever_else_is_set(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    together.meet_on_this_machine("gloo", str(Path("meeting").resolve()), 0, 1)
    try:
        loopback = os.environ["GLOO_SOCKET_IFNAME"]
        assert "127.0.0.1" in {found.address for found in psutil.net_if_addrs()[loopback]}
        assert os.environ["NCCL_SOCKET_IFNAME"] == f"={loopback}"
    finally:
        torch.distributed.destroy_process_group()

    monkeypatch.setattr(psutil, "net_if_addrs", dict)
    with pytest.raises(UserError, match=r"need the loopback interface \(127\.0\.0\.1\), which is off"):
        together.meet_on_this_machine("gloo", "meeting", 0, 1)
