"""``python -m benchmarks speed``: every part on tiny data, and a result file that grows by parts."""

import json
import sys
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks import __main__, plots, speed
from benchmarks.environment import environment, slug
from benchmarks.peers.client import Package, write_histories
from benchmarks.speed import accuracy, batches, catalogue, contenders, evaluation, models, training
from benchmarks.speed.data import write_interactions
from recbole_ssm.errors import UserError
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


@pytest.fixture
def quick_search(monkeypatch):
    monkeypatch.setattr(batches, "SECONDS_A_TRIAL", 0.01)
    monkeypatch.setattr(training, "SECONDS_A_ROUND", 0.01)
    monkeypatch.setitem(batches.LADDERS, "rows", [16, 32])
    monkeypatch.setitem(batches.LADDERS, "targets", [32, 64])


def test_training(monkeypatch, quick_search):
    found = run(monkeypatch, "--parts", "training", "--models", "SASRec", "STARRec", "Mamba4Rec", "SSD4Rec")
    part = found["parts"]["training"]
    assert {"commit", "date", "settings", "protocol"} <= part.keys()
    rows = {row["contender"]: row for row in part["rows"]}
    shipped = f"{contenders.RECBOLE}, anomaly detection on"
    ours = [contenders.SEQUENCE_MODE, "STARRec", "Mamba4Rec", "SSD4Rec, prefix rows"]
    assert list(rows) == [contenders.RECBOLE, shipped, *ours]
    assert rows[contenders.RECBOLE]["ratio"] == {contenders.RECBOLE: {"median": 1, "least": 1, "largest": 1}}
    assert all(row["targets_per_s"]["median"] > 0 for row in rows.values())
    assert all(row["ratio"][contenders.RECBOLE]["median"] > 0 for row in rows.values())
    assert not any(row["search"] for row in rows.values())  # one that is set is searched by none
    assert all(row["train_batch_size"] == 64 and row["hidden_size"] == 16 for row in rows.values())
    assert part["settings"]["MAX_ITEM_LIST_LENGTH"] == 10
    assert "SASRec, RecBole" in image("training").read_text()
    assert not Path("saved").exists()  # what RecBole writes does not lie about
    assert not torch.is_anomaly_enabled()


def test_models(monkeypatch):
    monkeypatch.setattr(models, "SECONDS_A_ROUND", 0.01)
    monkeypatch.setattr(models, "CONTENDERS", {name: models.CONTENDERS[name] for name in ("Mamba4Rec", "BSARec")})
    # A setting that one of CONTENDERS varies gives way to it.
    monkeypatch.setitem(models.CONTENDERS, "BSARec", ("BSARec", {"eval_batch_size": 32}))
    found = run(monkeypatch, "--parts", "models", "--model_datasets", "tiny", settings=("eval_batch_size=64",))
    rows = {row["contender"]: row for row in found["parts"]["models"]["rows"]}
    assert list(rows) == ["Mamba4Rec", "BSARec"]
    assert rows["Mamba4Rec"]["times_as_long"] == 1
    assert [row["train_batch_size"] for row in rows.values()] == [2048, 256]
    assert all(row["dataset"] == "tiny" and row["epoch_s"] > 0 for row in rows.values())
    assert "| BSARec | tiny | 2 |" in Path("page.md").read_text()


def test_every_contender_trains_at_its_own_best_batch(monkeypatch, quick_search):
    for name in ("RECTOOLS", "REPLAY"):
        package = getattr(training, name)
        monkeypatch.setattr(training, name, Package("tests.fake_peer", package.contender))
    words = ("--parts", "training", "--models", "Mamba4Rec", "--rectools", sys.executable, "--replay", sys.executable)
    part = run(monkeypatch, *words, settings=SMALL[:2])["parts"]["training"]
    rows = {row["contender"]: row for row in part["rows"]}
    shipped = f"{contenders.RECBOLE}, anomaly detection on"
    assert list(rows) == ["SASRec, RecTools", "SASRec, RePlay", contenders.RECBOLE, shipped, "Mamba4Rec"]
    for row in rows.values():
        assert row["ratio"].keys() == {"SASRec, RecTools", "SASRec, RePlay", contenders.RECBOLE}
        assert row["targets_per_s"]["median"] > 0
        tried = {at["batch"]: at["targets_per_s"] for at in row["search"]}
        assert row["contender"] == shipped or row["train_batch_size"] == max(tried, key=tried.__getitem__)
    assert rows[shipped]["train_batch_size"] == rows[contenders.RECBOLE]["train_batch_size"]
    for name in ("SASRec, RecTools", "SASRec, RePlay"):
        assert rows[name]["ratio"][name]["median"] == 1
        assert [at["batch"] for at in rows[name]["search"]] == [4, 8, 16]
        assert (rows[name]["batch_of"], rows[name]["train_batch_size"], rows[name]["parameters"]) == (
            "sequences",
            16,
            34,
        )
        assert part["settings"][name].startswith(version("torch"))
    assert [at["batch"] for at in rows["Mamba4Rec"]["search"]] == [32, 64]
    page = Path("page.md").read_text()
    assert "| times RecTools | times RePlay | times RecBole's rows |" in page
    assert "| contender | in | 4 | 8 | 16 | 32 | 64 |" in page


def test_a_peer_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(training, "RECTOOLS", Package("tests.no_such_peer", "SASRec, RecTools"))
    with pytest.raises(
        SystemExit, match=r"(?s)RecTools ended by itself; .* must have it.*No module named tests.no_such"
    ):
        run(monkeypatch, "--parts", "training", "--models", "Mamba4Rec", "--rectools", sys.executable)
    with pytest.raises(SystemExit, match="nowhere/python is no Python that can be run"):
        run(monkeypatch, "--parts", "training", "--replay", "nowhere/python")


def test_peers_are_given_the_histories_that_ours_reads():
    settings = dict(setting.split("=") for setting in SMALL)
    arguments = Namespace(dataset="tiny", data_path=str(Path("dataset").resolve()), settings=settings)
    train_data = contenders.contender(arguments, "SASRec").train_data
    write_histories(train_data, Path("histories.csv"))
    found = pd.read_csv("histories.csv")
    assert len(found) - found["user"].nunique() == train_data.num_targets
    tokens = train_data._dataset.field2id_token["item_id"]
    ours = {tuple(tokens[rows["item"]]) for _, rows in found.groupby("user")}
    lines = [row.split("\t") for row in random_rows()]
    written = {}
    for user, item, _ in sorted(lines, key=lambda line: int(line[2])):
        written.setdefault(user, []).append(item)
    assert ours == {tuple(items[:-2]) for items in written.values()}  # but the last two, which leave-one-out holds back
    assert all(list(rows["timestamp"]) == list(range(len(rows))) for _, rows in found.groupby("user"))


class Toy:
    """A contender whose rate is told by its batch; each trial's rate is the next of those given for it."""

    unit, steps, num_targets = "rows", 1, 0

    def __init__(self, rates, peak=None):
        self.rates, self.bytes, self.batch, self.tried = rates, peak, 0, []

    def set_batch(self, batch):
        if batch not in self.rates:
            raise torch.OutOfMemoryError
        self.batch = batch
        self.tried.append(batch)

    def take(self):
        self.num_targets = self.steps * self.batch

    def peak(self):
        self.take()
        return self.bytes and self.bytes * self.batch

    def rate(self):
        self.take()
        rates = self.rates[self.batch]
        if self.steps > 1 and len(rates) > 1:
            return rates.pop(0)
        return rates[0]


@pytest.mark.parametrize(
    ("rates", "peak", "best", "tried"),
    [
        ({2: [50], 4: [100], 8: [90], 16: [60], 32: [40], 64: [999]}, None, 4, [2, 4, 8, 16, 32]),
        ({2: [50], 4: [100], 8: [60], 16: [95], 32: [120], 64: [110]}, None, 32, [2, 4, 8, 16, 32, 64]),
        ({2: [50], 4: [95], 8: [100, 80], 16: [90, 120], 32: [70], 64: [60]}, None, 16, [2, 4, 8, 16, 32, 64]),
        ({2: [50], 4: [60]}, None, 4, [2, 4]),  # the next is out of memory
        ({2: [50], 4: [60], 8: [70], 16: [80]}, 2**30, 8, [2, 4, 8]),  # 16 would need 16 GiB of 20
    ],
)
def test_the_best_batch(monkeypatch, rates, peak, best, tried):
    monkeypatch.setattr(batches, "of_round", lambda toy: toy.rate())
    monkeypatch.setattr(batches.psutil, "virtual_memory", lambda: Namespace(available=20 * 2**30))
    toy = Toy(rates, peak)
    found = batches.best_batch(toy, [2, 4, 8, 16, 32, 64], cuda=False)
    assert toy.batch == best == max(found, key=found.__getitem__)
    assert list(found) == tried


def test_no_batch_that_fits(monkeypatch):
    with pytest.raises(UserError, match="2 rows, does not fit"):
        batches.best_batch(Toy({}), [2, 4], cuda=False)


def test_a_batch_that_is_set_is_taken():
    settings = dict(setting.split("=") for setting in SMALL)
    arguments = Namespace(dataset="tiny", data_path=str(Path("dataset").resolve()), settings=settings)
    for each in (contenders.recboles_sasrec(arguments), contenders.contender(arguments, "SASRec")):
        steps = contenders.Steps(each)
        steps.set_batch(32)
        steps.take()
        assert 32 <= steps.num_targets < 32 + 10
        assert each.settings()["train_batch_size"] == 32
        assert sum(len(batch) for batch in each.train_data) == each.num_targets


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


@pytest.mark.slow
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
    ran.clear()
    monkeypatch.setattr(speed, "environment", lambda: {**environment(), "device": "another"})
    run(monkeypatch, *words, settings=(*SMALL, "d_state=4"))
    assert len(ran) == 4  # and so is another device


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
    assert ", on " not in page
    monkeypatch.setattr(speed, "environment", lambda: {**both["environment"], "device": "another"})
    parts = run(monkeypatch, *lengths)["parts"]
    devices = ["another", both["environment"]["device"]]
    assert [(name, part["device"]) for name, part in parts.items()] == list(zip(both["parts"], devices, strict=True))
    page = Path("page.md").read_text()
    assert page.count(f", on {devices[1]} with torch") == 1
    assert f"targets, {devices[1]}" in image("catalogue").read_text()
    assert "tokens, another" in image("lengths").read_text()


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
