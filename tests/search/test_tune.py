import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml

from recbole_ssm import UserError, run_recbole
from recbole_ssm.cli.run_hyper import main
from recbole_ssm.data import create_dataset
from recbole_ssm.distributed.ray_cluster import start_ray
from recbole_ssm.search import Search, tune

from ..conftest import listening, markov_rows, small_settings, write_dataset

ray = pytest.importorskip("ray")

ROOT = Path(__file__).parents[2]
SETTINGS = {"data_path": "dataset", "epochs": 3, "train_batch_size": 64, "show_progress": False, "state": "ERROR"}


@pytest.fixture(autouse=True)
def markov():
    write_dataset("markov", markov_rows(30, 20, 12, 0.1))


@pytest.fixture(scope="module")
def local_ray():
    start_ray()
    yield
    ray.shutdown()


def settings(model: str = "STARRec", **more) -> dict:
    return {**SETTINGS, **small_settings(model), **more}


def run_hyper(*words: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "recbole_ssm.cli.run_hyper", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_search_ends_with_its_best_and_names_what_failed(local_ray, capsys, monkeypatch):
    def load_once(config):
        dataset = create_dataset(config)
        shutil.move("dataset", "elsewhere")  # so that a trial that loaded it itself would fail
        return dataset

    monkeypatch.setattr("recbole_ssm.search.tuner.create_dataset", load_once)
    space = {"learning_rate": [1e-4, 0.03], "dropout_prob": [0.1, 7.0]}
    results = tune("STARRec", "markov", None, settings(), space=space, algorithm="grid", name="one")
    from recbole_ssm.search.report import write_report

    shutil.copytree("elsewhere", "dataset")
    folder, search = Path("search/one"), Search.read(Path("search/one"))
    winner = write_report(results, search, folder)

    table = pd.read_csv(folder / "trials.csv")
    assert sorted(table["status"]) == ["failed", "failed", "finished", "finished"]
    failed = table[table["status"] == "failed"]
    assert set(failed["dropout_prob"]) == {7.0}
    assert all("dropout_prob is 7.0: choose a number" in reason for reason in failed["reason"])
    assert table["best_valid_score"][0] == table["best_valid_score"].max() == winner["best_valid_score"]
    assert winner["params"] == {"learning_rate": 0.03, "dropout_prob": 0.1}
    told = capsys.readouterr().out
    assert "failed: UserError: dropout_prob is 7.0" in told
    assert {f"({done} of 4 done)" for done in (1, 2, 3, 4)} == set(re.findall(r"\(.* done\)", told))
    assert "epoch 3: valid MRR@10" in told or "epoch 3: valid NDCG@10" in told
    assert (folder / "trials.html").stat().st_size > 1_000_000

    again = run_recbole(config_file_list=[str(folder / "best.yaml")])
    assert again["best_valid_score"] == pytest.approx(winner["best_valid_score"], abs=5e-4)
    assert again["test_result"] == pytest.approx(winner["test_result"], abs=5e-4)
    assert yaml.safe_load((folder / "best.yaml").read_text())["model"] == "STARRec"


@pytest.mark.slow
def test_a_killed_trial_is_named_and_the_search_goes_on(local_ray):
    def kill_one() -> None:
        while not any(file.stat().st_size for file in Path("search/two").glob("trial_*/result.json")):
            time.sleep(0.02)  # until the first of 20 reports
        process = next(p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::ImplicitFunc"))
        process.suspend()  # it must not end before it is killed
        waiting.update(listening(psutil.Process()))
        process.kill()

    waiting: dict[str, list[str]] = {}
    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    space = {"learning_rate": [0.001, 0.01]}
    results = tune("Mamba4Rec", "markov", None, settings("Mamba4Rec", epochs=20), space=space, algorithm="grid",
                   scheduler="none", name="two")  # fmt: skip
    killer.join()
    from recbole_ssm.search.report import trials

    table = trials(results, Search.read(Path("search/two")))
    assert sorted(table["status"]) == ["failed", "finished"]
    assert "died" in table[table["status"] == "failed"]["reason"].item()
    assert {"gcs_server", "raylet"} < waiting.keys()
    assert any("ImplicitFunc" in name for name in waiting)
    assert not any(waiting.values()), waiting  # nobody else's machine can reach them


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on_and_loses_nothing():
    Path("base.yaml").write_text(yaml.safe_dump(settings()))
    Path("space.yaml").write_text("learning_rate: [0.001, 0.002, 0.003, 0.004]\n")
    words = ["--model=STARRec", "--dataset=markov", "--config_files=base.yaml", "--params_file=space.yaml"]
    words += ["--search_alg=grid", "--scheduler=none", "--name=three", "--max_concurrent=1"]
    process = run_hyper(*words)
    assert process.stdout is not None
    told = 0
    for line in process.stdout:
        told += "has ended" in line
        if line.count("epoch 1:") and told == 2:
            break
    process.kill()
    process.wait()
    folder = Path("search/three")
    before = {file: file.read_text() for file in folder.glob("trial_*/result.json")}

    resumed = run_hyper("--resume", str(folder), "--output_file=all.txt", "--display_file=all.html")
    told, _ = resumed.communicate()

    assert resumed.returncode == 0, told
    table = pd.read_csv(folder / "trials.csv")
    assert list(table["status"]) == ["finished"] * 4, told + table.to_string()
    assert sorted(table["learning_rate"]) == [0.001, 0.002, 0.003, 0.004]
    assert set(table["evaluations"]) == {3}
    text = Path("all.txt").read_text()
    assert (text.count("Valid result:"), text.count("Test result:")) == (4, 1)
    assert Path("all.html").read_text() == (folder / "trials.html").read_text()
    whole = [file for file, text in before.items() if text.count("\n") == 3]
    assert len(whole) >= 2
    assert all(file.read_text() == before[file] for file in whole)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"space": {"learning_rat": [1]}}, r"no setting 'learning_rat' to search, did you mean 'learning_rate'"),
        ({"scheduler": "asah", "space": {"learning_rate": [1]}}, r"no scheduler 'asah': choose one of asha"),
        ({"algorithm": "grid", "space": {"learning_rate": {"type": "uniform", "low": 0, "high": 1}}}, r"write choice"),
        ({"num_samples": 0, "space": {"learning_rate": [1]}}, r"num_samples is 0: give a number above 0"),
        ({"cpus_per_trial": -1, "space": {"learning_rate": [1]}}, r"cpus_per_trial is -1: give a number above 0"),
        ({"gpus_per_trial": -1, "space": {"learning_rate": [1]}}, r"gpus_per_trial is -1: give 0 or a number"),
    ],
)
def test_what_cannot_be_searched_is_said_before_anything_runs(given, message):
    with pytest.raises(UserError, match=message):
        tune("STARRec", "markov", None, settings(), **given)


def test_a_grid_is_tried_once():
    space = {"learning_rate": [0.1, 0.2], "dropout_prob": [0.1, 0.2]}
    assert [Search({}, space, algorithm=one).trial_count() for one in ("grid", "random")] == [4, 10]
    assert Search({}, space, algorithm="grid", num_samples=3).trial_count() == 12


def test_recboles_exhaustive_search_has_no_other_algorithm(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run_hyper", "--tool=Hyperopt", "--search_alg=optuna"])
    assert main() == 2
    assert "leave --search_alg=optuna out" in capsys.readouterr().err


def test_a_ray_that_others_could_reach_is_not_started(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeManagerAddress": "127.0.0.1"}, {"NodeManagerAddress": "10.0.0.1"}])
    stopped = []
    monkeypatch.setattr(ray, "shutdown", lambda: stopped.append(True))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=r"cannot be kept from listening on all interfaces: install another version"):
        start_ray()
    assert stopped
    start_ray("auto")  # what someone else started is theirs
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    start_ray()


@pytest.mark.slow
def test_two_nodes_share_the_trials_of_a_search():
    from ray.cluster_utils import Cluster

    if ray.is_initialized():
        ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        results = tune(
            "Mamba4Rec", "markov", None, settings("Mamba4Rec"), space={"learning_rate": [0.001, 0.01]}, name="four",
            algorithm="grid", scheduler="none", address=cluster.address,
        )  # fmt: skip
        assert len({result.metrics["node"] for result in results}) == 2
        assert all(result.metrics["ended"] for result in results)
    finally:
        ray.shutdown()
        cluster.shutdown()
