"""``python -m benchmarks speed``: every part on tiny data, and a result file that grows by parts."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__, plots, speed
from benchmarks.environment import slug
from benchmarks.speed import accuracy, catalogue, contenders, evaluation
from benchmarks.speed.data import write_interactions
from tests.conftest import random_rows, write_dataset

SMALL = ("hidden_size=16", "MAX_ITEM_LIST_LENGTH=10", "train_batch_size=64", "eval_batch_size=64")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(catalogue, "TARGETS", 64)
    write_dataset("tiny", random_rows())


def run(monkeypatch, *words, settings=SMALL):
    words = ("--dataset", "tiny", "--accuracy_dataset", "tiny", "--rounds", "2", *words, "--settings", *settings)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "speed", *words, "--output", "r.json", "--page", "page.md"])
    __main__.main()
    return json.loads(Path("r.json").read_text())


def image(part: str) -> Path:
    path = Path("images", f"speed-{part}-{slug()}.svg")
    assert "<svg" in path.read_text()
    assert f"](images/{path.name})" in Path("page.md").read_text()
    return path


def test_training(monkeypatch):
    found = run(monkeypatch, "--parts", "training", "--models", "SASRec", "STARRec", "Mamba4Rec", "SSD4Rec")
    part = found["parts"]["training"]
    assert {"commit", "date", "settings", "protocol"} <= part.keys()
    rows = {row["contender"]: row for row in part["rows"]}
    shipped = f"{contenders.RECBOLE}, anomaly detection on"
    ours = [contenders.SEQUENCE_MODE, "STARRec", "Mamba4Rec", "SSD4Rec, prefix rows"]
    assert list(rows) == [contenders.RECBOLE, shipped, *ours]
    assert rows[contenders.RECBOLE]["ratio"] == {"median": 1, "least": 1, "largest": 1}
    assert all(row["targets_per_s"]["median"] > 0 and row["ratio"]["median"] > 0 for row in rows.values())
    assert all(row["train_batch_size"] == 64 and row["hidden_size"] == 16 for row in rows.values())
    assert part["settings"]["MAX_ITEM_LIST_LENGTH"] == 10
    assert "SASRec, RecBole" in image("training").read_text()
    assert not Path("saved").exists()  # what RecBole writes does not lie about
    assert not torch.is_anomaly_enabled()


def test_rows_on_a_cpu_are_fewer_unless_they_are_set(monkeypatch):
    arguments = Namespace(dataset="tiny", data_path=str(Path("dataset").resolve()), settings={"use_gpu": "False"})
    assert contenders.recboles_sasrec(arguments).config["train_batch_size"] == contenders.RECBOLE_ROWS_ON_A_CPU
    arguments.settings["train_batch_size"] = "64"
    assert contenders.recboles_sasrec(arguments).config["train_batch_size"] == 64


def test_steps_go_on_over_the_end_of_an_epoch():
    settings = dict(setting.split("=") for setting in SMALL)
    arguments = Namespace(dataset="tiny", data_path=str(Path("dataset").resolve()), settings=settings)
    each = contenders.contender(arguments, "Mamba4Rec")
    steps = contenders.Steps(each)
    targets = []
    for _ in range(len(each.train_data)):
        steps.take()
        targets.append(steps.num_targets)
    assert sum(targets) == each.train_data.num_targets
    steps.steps = len(each.train_data) + 1
    before = each.model.item_embedding.weight.clone()
    steps.take()
    assert steps.num_targets > each.train_data.num_targets
    assert not torch.equal(before, each.model.item_embedding.weight)


def test_evaluation(monkeypatch):
    monkeypatch.setattr(evaluation, "TRAINED_STEPS", 3)
    part = run(monkeypatch, "--parts", "evaluation")["parts"]["evaluation"]
    rows = {row["contender"]: row for row in part["rows"]}
    assert {contenders.RECBOLE, contenders.SEQUENCE_MODE, "STARRec", "Mamba4Rec"} <= rows.keys()
    assert rows[contenders.RECBOLE]["ratio"]["median"] == 1
    assert all(row["seconds"]["median"] > 0 for row in rows.values())
    assert part["settings"]["users"] == 40
    assert part["equal_weights"]["agree_to_4_places"]
    assert part["equal_weights"]["largest_difference"] < 1e-6
    assert "ndcg@10" in part["equal_weights"]["metrics"][contenders.RECBOLE]
    assert "SASRec with equal weights" in Path("page.md").read_text()


def test_no_time_is_told_of_an_evaluation_whose_metrics_are_wrong(monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "AGREE", -1.0)
    part = run(monkeypatch, "--parts", "evaluation", "--models", "SASRec")["parts"]["evaluation"]
    row = next(row for row in part["rows"] if row["contender"] == contenders.SEQUENCE_MODE)
    assert "left out" in row
    assert "seconds" not in row
    assert "FAILS" in capsys.readouterr().out
    assert "left out: its metrics differ" in Path("page.md").read_text()


def test_data(monkeypatch):
    words = ("--parts", "data", "--interactions", "3000", "--train_steps", "2")
    part = run(monkeypatch, *words, settings=(*SMALL, "item_inter_num_interval=[1,inf)"))["parts"]["data"]
    assert [row["way"] for row in part["rows"]] == ["RecBole", "recbole_ssm"]
    assert part["rows"][0]["ratio"]["median"] == 1
    assert len({row["targets"] for row in part["rows"]}) == 1  # the same work
    for row in part["rows"]:
        assert row["rows_s"]["median"] > 0
        assert row["read_and_filter_s"]["median"] > 0
        assert 50e6 < row["before_bytes"] < row["peak_bytes"] < 4e9
    made = part["generated"]
    assert made["rows"] == 3000 - made["settings"]["users"]
    assert made["recbole_estimate"]["row_bytes"] == made["rows"] * 10 * 8
    assert made["training"]["steps"] == 2
    assert made["training"]["targets_per_s"] > 0
    assert "3,000 generated interactions" in Path("page.md").read_text()


def test_generated_interactions(tmp_path):
    path = write_interactions(tmp_path, interactions=20_000, users=200, items=500)
    rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    users, items, times = (list(column) for column in zip(*rows, strict=True))
    assert len(rows) == 20_000
    lengths = sorted(users.count(user) for user in set(users))
    assert len(lengths) == 200
    assert 3 <= lengths[0] < 100 < lengths[-1]
    popular = sorted((items.count(item) for item in set(items)), reverse=True)
    assert popular[0] > 10 * popular[len(popular) // 2]
    assert times == sorted(times, key=int)
    assert len(set(times)) == 20_000


def test_lengths(monkeypatch):
    words = ("--parts", "lengths", "--lengths", "20", "50", "100", "--tokens", "400")
    part = run(monkeypatch, *words)["parts"]["lengths"]
    assert [row["model"] for row in part["rows"]] == [
        "STARRec, window 128",
        "STARRec",
        "Mamba4Rec",
        "SSD4Rec, one direction",
    ]
    for row in part["rows"]:
        assert [at["length"] for at in row["lengths"]] == [20, 50, 100]
        assert row["ratio_to"] == 50
        assert row["lengths"][1]["ratio"]["median"] == 1
        assert all(at["ns_a_token"]["median"] > 0 for at in row["lengths"])
    assert "Mamba4Rec" in image("lengths").read_text()


def test_lengths_that_would_take_too_long_are_left_out(monkeypatch):
    words = ("--models", "STARRec", "--lengths", "20", "100", "--tokens", "400")
    part = run(monkeypatch, "--parts", "lengths", *words, "--limit", "1e-9")["parts"]["lengths"]
    assert [row["model"] for row in part["rows"]] == ["STARRec, window 128", "STARRec"]
    assert all("left out" in row["lengths"][1] for row in part["rows"])
    assert "| left out: may take" in Path("page.md").read_text()


def test_catalogue(monkeypatch):
    part = run(monkeypatch, "--parts", "catalogue", "--catalogue", "300", "3000")["parts"]["catalogue"]
    assert [(at["items"], at["table_bytes"]) for at in part["rows"]] == [(300, 300 * 128), (3000, 3000 * 128)]
    for at in part["rows"]:
        assert at["losses"].keys() == catalogue.LOSSES.keys()
        assert at["losses"]["dense"]["ratio"]["median"] == 1
        assert all(loss["seconds"]["median"] > 0 for loss in at["losses"].values())
    assert "the table and its gradient" in image("catalogue").read_text()


def test_dense_scores_that_do_not_fit_are_left_out(monkeypatch):
    monkeypatch.setattr(catalogue, "SHARE_OF_FREE_MEMORY", 0.0)
    part = run(monkeypatch, "--parts", "catalogue", "--catalogue", "300")["parts"]["catalogue"]
    assert "GiB" in part["rows"][0]["losses"]["dense"]["left out"]
    assert "ratio" not in part["rows"][0]["losses"]["full_cross_entropy"]


def test_no_time_is_told_of_a_loss_that_is_wrong(monkeypatch):
    wrong = catalogue.full_cross_entropy
    monkeypatch.setattr(catalogue, "full_cross_entropy", lambda *inputs: 1.001 * wrong(*inputs))
    with pytest.raises(AssertionError, match="nothing is timed"):
        run(monkeypatch, "--parts", "catalogue", "--catalogue", "300")


def test_accuracy(monkeypatch):
    words = ("--parts", "accuracy", "--epochs", "1", "--seeds", "1", "--models", "Mamba4Rec")
    part = run(monkeypatch, *words)["parts"]["accuracy"]
    assert [(row["model"], row["train_mode"], row["seeds"]) for row in part["rows"]] == [
        ("Mamba4Rec", "sequence", 1),
        ("Mamba4Rec", "prefix", 1),
    ]
    assert all(0 <= row["ndcg@10"] <= 1 and row["sd"] is None and row["epoch_s"] > 0 for row in part["rows"])
    assert {"commit", "date", "seed", "epochs", "dataset", "settings"} <= part["runs"][0].keys()


def test_accuracy_goes_on_where_it_was_interrupted(monkeypatch):
    words = ("--parts", "accuracy", "--epochs", "1", "--seeds", "2", "--models", "Mamba4Rec")
    ran: list[tuple[str, int]] = []
    most = 3

    def interrupted(config, saved):
        if len(ran) == most:
            raise InterruptedError
        ran.append((config["train_mode"], config["seed"]))
        score = 0.1 if config["seed"] == accuracy.FIRST_SEED else 0.2
        return Namespace(result={"best_valid_result": {"ndcg@10": score}}, timings={"train_seconds_per_epoch": 1.0})

    monkeypatch.setattr(accuracy, "train_and_test", interrupted)
    with pytest.raises(InterruptedError):
        run(monkeypatch, *words)
    assert len(json.loads(Path("r.json").read_text())["parts"]["accuracy"]["runs"]) == 3
    ran.clear()
    part = run(monkeypatch, *words)["parts"]["accuracy"]
    assert ran == [("prefix", accuracy.FIRST_SEED + 1)]
    for row in part["rows"]:
        assert (row["seeds"], row["ndcg@10"], row["sd"]) == pytest.approx((2, 0.15, 0.1 / 2**0.5))
    ran.clear()
    assert run(monkeypatch, *words)["parts"]["accuracy"]["runs"] == part["runs"]
    assert ran == []
    most = 100
    run(monkeypatch, *words, settings=(*SMALL, "d_state=4"))
    assert len(ran) == 4  # other settings are another experiment


def test_a_part_measured_anew_replaces_itself_alone(monkeypatch):
    lengths = ("--parts", "lengths", "--models", "Mamba4Rec", "--lengths", "20", "50", "--tokens", "200")
    first = run(monkeypatch, *lengths)
    run(monkeypatch, "--parts", "catalogue", "--catalogue", "300")
    both = run(monkeypatch, *lengths)
    assert list(both["parts"]) == ["lengths", "catalogue"]
    assert both["parts"]["lengths"]["rows"] != first["parts"]["lengths"]["rows"]
    page = Path("page.md").read_text()
    assert page.count("### Speed and memory on") == 1
    assert "#### Longer sequences" in page
    monkeypatch.setattr(speed, "environment", lambda: {**both["environment"], "device": "another"})
    assert list(run(monkeypatch, *lengths)["parts"]) == ["lengths"]  # others' figures would not be comparable


@pytest.mark.parametrize("log", [True, False])
def test_plots(tmp_path, log):
    series = {"a": [(10.0, 2.0), (100.0, 30.0)], "b": [(10.0, 5.0)], "none": []}
    plots.lines(tmp_path / "lines.svg", "title", series, "x", "y", logx=log, logy=log, dashed=("b",))
    plots.bars(tmp_path / "bars.svg", "title", {"one": 1.0, "two": 2000.0}, "rate", log=log)
    for name in ("lines", "bars"):
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
    again = tmp_path / "again.svg"
    plots.bars(again, "title", {"one": 1.0, "two": 2000.0}, "rate", log=log)
    assert again.read_text() == (tmp_path / "bars.svg").read_text()
