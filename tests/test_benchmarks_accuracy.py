"""``python -m benchmarks accuracy`` and ``experiments`` on tiny data: runs, tuning, statistics and pages."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from scipy.stats import ttest_rel

import benchmarks
from benchmarks import __main__, plots
from benchmarks.accuracy import report, runs, study, tuning
from benchmarks.accuracy.claims import Claim, Measured
from benchmarks.accuracy.parts import NEW, RAREST, TAIL, by_popularity
from benchmarks.accuracy.results import Results, gain_cell, same_seeds
from benchmarks.accuracy.runs import Spec, Store
from benchmarks.accuracy.statistics import Comparison, compare
from benchmarks.accuracy.study import Study
from benchmarks.accuracy.summary import write_summary
from benchmarks.accuracy.worker import FULL, PROTOCOLS, UNSEEN
from benchmarks.experiments import plan as experiments_plan
from benchmarks.experiments import report as experiments_report
from benchmarks.experiments import sets
from benchmarks.pages import Page
from recbole_ssm import UserError
from recbole_ssm.analysis import Ranks
from recbole_ssm.quick_start import train_and_test
from recbole_ssm.search.definition import METRIC
from recbole_ssm.search.space import space_of

from .conftest import SMALL, random_rows, write_dataset

PLAN = {
    "models": ["STARRec", "SASRec"],
    "datasets": ["tiny"],
    "seeds": [1, 2],
    "common": {"train_mode": "sequence", "hidden_size": 16, "valid_metric": "NDCG@10"},
    "own": {"STARRec": {key: SMALL[key] for key in ("d_state", "n_heads", "n_experts")}, "SASRec": {"inner_size": 16}},
    "search": {"algorithm": "random", "scheduler": "none", "num_samples": 2, "seed": 0},
    "space": {"learning_rate": [0.0001, 0.03], "train_batch_size": [64], "dropout": [0.2]},
    "own_space": {"STARRec": {"pma_residual": [False]}, "SASRec": {"n_layers": [1]}},
    "dropout": {"SASRec": ["hidden_dropout_prob", "attn_dropout_prob"], "default": ["dropout_prob"]},
    "smaller": [],
    "notes": {},
    "epochs": {"tiny": 2},
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A study of one tiny set, and property files of its own to write what tuning finds to."""
    pytest.importorskip("matplotlib")
    write_dataset("tiny", random_rows())
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(PLAN))
    monkeypatch.setattr(Study.read.__func__, "__defaults__", (tmp_path / "study.yaml",))
    return tmp_path


def run(monkeypatch, *words):
    words = (*words, "--data_path", "dataset", "--work", "work", "--results", "results", "--page", "docs/page.md")
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    __main__.main()
    return Path("docs/page.md").read_text(), Path("docs/page.html").read_text()


SETTINGS = {**PLAN["common"], **PLAN["own"]["STARRec"], "epochs": 2}


def spec(model="Mamba4Rec", seed=1, **settings):
    own = PLAN["own"].get(model, {})
    return Spec(model, "tiny", seed, {**PLAN["common"], **own, "epochs": 2, **settings})


def test_a_run_is_that_of_run_recbole(tiny, capfd):
    store = Store(Path("results/runs.jsonl"))
    runs.run_all([spec()], store, Path("work").resolve(), str(Path("dataset").resolve()), jobs=2)
    (row,) = store.rows.values()
    again = train_and_test(spec().config("dataset"))
    assert row["recbole_test_result"] == again.result["test_result"]
    assert row["test"]["all items"]["ndcg@10"] == pytest.approx(again.result["test_result"]["ndcg@10"], abs=5e-5)
    assert row["test"]["history excluded"]["recall@50"] >= row["test"]["all items"]["recall@50"] > 0
    assert row["epochs_to_best"] == again.best_epoch + 1
    assert {"commit", "versions", "device"} <= row["environment"].keys()
    assert row["command"].startswith("run_recbole --model=Mamba4Rec --dataset=tiny --seed=1 ")
    ranks = store.read_ranks(row["id"], "all items")
    assert ranks.metrics([5, 50]).items() <= row["test"]["all items"].items()
    assert 0 < row["popularity"]["the 10% rarest items"]["number"] < len(ranks.users)
    assert "epoch 2 of 2" in capfd.readouterr().out
    runs.run_all([spec()], Store(store.file), Path("nowhere").resolve(), str(Path("dataset").resolve()), jobs=2)
    assert "1 runs, 1 of them made before" in capfd.readouterr().out
    assert not Path("nowhere").exists()


def test_runs_are_told_apart_by_their_settings():
    assert spec().identity() == Spec("Mamba4Rec", "tiny", 1, dict(reversed(spec().settings.items()))).identity()
    names = {s.identity() for s in (spec(), spec(seed=2), spec(epochs=3), spec("STARRec"))}
    assert len(names) == 4


def test_what_was_tuned_is_part_of_a_runs_identity(monkeypatch):
    plain = Spec("STARRec", "tiny", 1)
    before = plain.identity()
    monkeypatch.setattr(runs, "tuned_settings", lambda *_: {"dropout_prob": 0.3})
    assert plain.identity() != before
    assert plain.identity() == Spec("STARRec", "tiny", 1, {"dropout_prob": 0.3, "tuned": False}).identity()
    assert Spec("STARRec", "tiny", 1, {"tuned": False}).identity() == before
    assert Spec("STARRec", "tiny", 1, {"dropout_prob": 0.1}).resolved().settings["dropout_prob"] == 0.1
    assert plain.command() == "run_recbole --model=STARRec --dataset=tiny --seed=1"


@pytest.mark.slow
def test_a_killed_study_goes_on(tiny, capfd):
    """SIGKILL of a run in mid-training; the next call takes its checkpoint up, and ends like one never killed."""
    chosen = spec(epochs=60, stopping_step=1000, learning_rate=1e-5)
    folder = runs.write_task(Path("work").resolve(), chosen, str(Path("dataset").resolve()))
    command = [sys.executable, "-m", "benchmarks.accuracy.worker", str(folder)]
    process = subprocess.Popen(command, cwd=runs.ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "epoch 3 of" in line:
            break
    process.kill()
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    store = Store(Path("results/runs.jsonl"))
    runs.run_all([chosen], store, folder.parent, str(Path("dataset").resolve()), jobs=2)
    told = capfd.readouterr().out
    assert "epoch 60 of 60" in told
    assert "epoch 1 of 60" not in told
    (row,) = store.rows.values()
    whole = train_and_test(chosen.config("dataset"))
    assert row["recbole_test_result"] == whole.result["test_result"]
    assert row["epochs_to_best"] == whole.best_epoch + 1


@pytest.mark.slow
def test_another_commits_checkpoint_is_not_gone_on_from(tiny, capfd):
    store, work = Store(Path("results/runs.jsonl")), Path("work").resolve()
    runs.run_all([spec()], store, work, str(Path("dataset").resolve()), jobs=2)
    begun = work / spec().identity() / "environment.json"
    begun.write_text(json.dumps({**json.loads(begun.read_text()), "commit": "another"}))
    Path("results/runs.jsonl").unlink()
    capfd.readouterr()
    runs.run_all([spec()], Store(Path("results/runs.jsonl")), work, str(Path("dataset").resolve()), jobs=2)
    told = capfd.readouterr().out
    assert "begun by another commit, machine or settings; it starts anew" in told
    assert "epoch 1 of 2" in told


def test_a_store_keeps_what_others_add(tmp_path):
    one, two = Store(tmp_path / "runs.jsonl"), Store(tmp_path / "runs.jsonl")
    one.add({"id": "a"}, None)
    two.add({"id": "b"}, None)
    assert Store(tmp_path / "runs.jsonl").rows.keys() == {"a", "b"}
    with pytest.raises(UserError, match=r"a\.npz is missing"):
        two.read_ranks("a", FULL)


def test_a_failed_run_is_told_and_left_out(tiny, capsys):
    store = Store(Path("results/runs.jsonl"))
    runs.run_all(
        [spec(loss_type="none"), spec()],
        store,
        Path("work").resolve(),
        str(Path("dataset").resolve()),
        jobs=2,
    )
    assert [row["settings"] for row in store.rows.values()] == [spec().settings]
    told = capsys.readouterr().out
    assert "failed: Mamba4Rec tiny seed 1" in told
    assert "loss_type is 'none'" in told
    assert "1 runs failed; the same command tries them again" in told


def test_a_broken_result_file_is_told():
    Path("runs.jsonl").write_text('{"id": "a"}\n{"id"\n')
    with pytest.raises(UserError, match=r"runs\.jsonl, line 2 is no JSON"):
        Store(Path("runs.jsonl"))


@pytest.mark.slow
def test_tuning_then_study_then_experiments(tiny, monkeypatch):
    tuned = tiny / "tuned"
    with pytest.raises(SystemExit, match=r"for STARRec on tiny, SASRec on tiny \(all items\): .* --tune"):
        run(monkeypatch, "accuracy")

    def file_of(model, dataset, exclude_history=False):
        return tuned / f"{dataset}-{'history_excluded-' * exclude_history}{model}.yaml"

    def found_settings(*which):
        file = file_of(*which)
        return yaml.safe_load(file.read_text()) if file.exists() else {}

    monkeypatch.setattr(study, "tuned_file", file_of)
    monkeypatch.setattr(runs, "tuned_settings", found_settings)
    page, html = run(monkeypatch, "accuracy", "--tune", "--jobs", "2")

    for model, excluded in product(PLAN["models"], (False, True)):
        file = file_of(model, "tiny", excluded)
        found = json.loads((Path("results/tuning") / f"{file.stem}.json").read_text())
        assert len(found["trials"]) == 2
        settings, best = found_settings(model, "tiny", excluded), max(t["best_valid_score"] for t in found["trials"])
        assert found["trials"][0]["best_valid_score"] == best
        assert settings.items() >= {key: found["trials"][0][key] for key in found["space"]}.items()
        assert settings.get("exclude_history", False) is excluded
        for key in ("hidden_dropout_prob", "attn_dropout_prob") if model == "SASRec" else ("dropout_prob",):
            assert settings[key] == 0.2
        assert "# (float) Learning rate." in file.read_text()
    monkeypatch.setattr(tuning, "tune", lambda *_: pytest.fail("what was kept is searched again"))
    run(monkeypatch, "accuracy", "--tune", "--jobs", "2")

    rows = [json.loads(line) for line in Path("results/runs.jsonl").read_text().splitlines()]
    for row in rows:
        excluded = row["settings"].get("exclude_history", False)
        assert row["settings"] == ({"exclude_history": True} if excluded else {})
        assert row["config"]["learning_rate"] == found_settings(row["model"], "tiny", excluded)["learning_rate"]
        assert [epoch for epoch, _ in row["curve"]] == [0, 1]
        assert max(score for _, score in row["curve"]) == row["best_valid_score"]
    grid = product(PLAN["models"], (1, 2), (False, True))
    assert {(row["model"], row["seed"], bool(row["settings"])) for row in rows} == set(grid)
    for protocol, excluded in (("all items", False), ("history excluded", True)):
        own = [row for row in rows if row["model"] == "STARRec" and bool(row["settings"]) is excluded]
        mean = np.mean([row["test"][protocol]["ndcg@10"] for row in own])
        assert all(f"{mean:.4f}"[1:] in text for text in (page, html))
    assert r"\*" not in page  # each model was chosen by the candidates of its table
    assert "validation by steps of training" in page
    for text in (page, html):
        for row in rows:
            assert row["command"] in text.replace("&quot;", '"')
    assert "**" in page
    assert "<strong>" in html
    assert "<svg" in html
    assert not re.search(r"(src|href)=.?https?:", html.replace('xlink:href="#', ""))  # it opens without a network

    small = {name: experiments_plan.EXPERIMENTS[name] for name in ("fusion", "experts")}
    for module in (experiments_plan, experiments_report, benchmarks.experiments):
        monkeypatch.setattr(module, "EXPERIMENTS", small)
    monkeypatch.setitem(experiments_plan.SHORTER, "tiny", SETTINGS)
    some = ["learned", "input-dependent", "diversity and balance", "w/o diversity", "w/o balance"]
    common = ("--datasets", "tiny", "--seeds", "1", "--jobs", "2")
    run(monkeypatch, "experiments", "fusion", "experts", "--variants", *some, *common)
    with pytest.raises(SystemExit, match=r"no variant wrong: choose of learned, input-dependent$"):
        run(monkeypatch, "experiments", "fusion", "--variants", "wrong")
    page = Path("docs/page.md").read_text()
    assert "attention, gamma_1" in page
    assert "w/o diversity" in page
    assert "w/o both" not in page
    assert "by length of the history" in page
    assert re.search(r"^\| tiny \| 0\.\d{3} \| 0\.\d{3} \|$", page, re.MULTILINE)  # the study's own fusion weights


def test_paired_comparison():
    generator = np.random.default_rng(0)
    other = generator.random((2, 200))
    own = other + generator.normal(0.02, 0.1, (2, 200))
    found = compare(own, other, tests=3)
    assert found.change == pytest.approx(own.mean() / other.mean() - 1)
    assert found.p == pytest.approx(min(1, 3 * ttest_rel(own.mean(0), other.mean(0)).pvalue))
    assert (found.seeds, found.agree) == (2, True)
    assert compare(own, own).p == 1
    assert compare(own + 1, other, tests=4).p < 0.001
    assert not compare(own + np.array([[1.0], [-0.5]]), other).agree
    assert gain_cell(compare(own[:1] + 1, own[:1])).endswith("(p < .001, 1 seed)")
    assert gain_cell(Comparison(-0.021, 0.05, 3, agree=False)) == "-2.1% (p .050, seeds differ)"


def test_pages_say_the_same_twice(tmp_path):
    page = Page("A & B")
    page.text("**Bold** `a < b` and [a link](b.md).")
    page.bullets(["one", "two"])
    page.table(["name", "x"], [["a", "**.5**"]])
    plots.dots(tmp_path / "images" / "dots.svg", "Dots", {"a": (0.5, 0.1), "b": (0.2, None)}, "x")
    page.figure(tmp_path / "images" / "dots.svg", tmp_path / "page.md", "Dots")
    page.write(tmp_path / "page.md")
    text, html = (tmp_path / "page.md").read_text(), (tmp_path / "page.html").read_text()
    assert "| name | x |\n| --- | ---: |\n| a | **.5** |" in text
    assert "![Dots](images/dots.svg)" in text
    assert "<h1>A &amp; B</h1>" in html
    assert "<strong>Bold</strong> <code>a &lt; b</code>" in html
    assert '<td style="text-align:right"><strong>.5</strong></td>' in html
    assert "<li>two</li>" in html
    assert html.count("<svg") == 1
    assert '<a href="b.md">a link</a>' in html


def test_hours_of_searches_are_their_epochs_as_runs_take_them():
    run = {"model": "A", "dataset": "x", "seconds_to_best": 20.0, "epochs_to_best": 10}
    searches = [
        {"model": model, "dataset": "x", "trials": [{"evaluations": 1000}, {"evaluations": 800}]} for model in "AB"
    ]
    assert report._hours_of_searches(searches, [run]) == 1.0


def test_names_are_text_in_pages(tmp_path):
    script = "<script>alert(1)</script>"
    page = Page(script)
    page.heading(script)
    page.text(f'{script} [x](javascript:alert(1)) [x](a" onclick="alert(1))')
    page.bullets([script])
    page.table([script], [[script]])
    plots.dots(tmp_path / "dots.svg", script, {script: (0.5, 0.1), "b": (0.2, None)}, script)
    page.figure(tmp_path / "dots.svg", tmp_path / "page.md", script)
    page.write(tmp_path / "page.md")
    html = (tmp_path / "page.html").read_text()
    assert "<script" not in html
    assert "<a " not in html
    assert html.count("&lt;script&gt;alert(1)") > 8


def test_the_study_as_shipped_is_the_same_for_all_models():
    shipped = Study.read(study.FILE)
    assert shipped.grid(["SSD4Rec-released", "SASRec"], ["ml-100k-float32"], [1]) == [
        Spec("SSD4Rec", "ml-100k", 1, {"time_order": "float32", "tuned": False, "stopping_step": 5}),
        Spec("SASRec", "ml-100k", 1, {"time_order": "float32"}),
    ]
    for dataset in (name for name in shipped.plan["datasets"] if name not in shipped.also):
        assert shipped.plan["notes"][dataset]
        for model, protocol in product(shipped.plan["models"], PROTOCOLS):
            Spec(model, dataset, 0, {"tuned": False, **shipped.base(model, dataset, protocol)}).config()
    for model in shipped.plan["models"]:
        space = space_of(shipped.space(model))
        for end in (0, -1):
            chosen = {key: p.low if p.grid() is None else p.grid()[end] for key, p in space.items()}
            Spec(model, "ml-1m", 0, {"tuned": False, **shipped.base(model, "ml-1m", FULL), **chosen}).config()


def test_a_search_of_another_commit_or_plan_is_put_aside(tmp_path, capsys):
    folder, begun = tmp_path / "work" / "tiny-SASRec", {"commit": "a", "search": {"num_samples": 2}}
    assert not tuning._can_resume(folder, begun)
    for changed in ({"commit": "b"}, {"search": {"num_samples": 3}}):
        folder.mkdir()
        (folder / "search.json").write_text("{}")
        assert tuning._can_resume(folder, begun)
        begun = {**begun, **changed}
        assert not tuning._can_resume(folder, begun)
        assert "it starts anew" in capsys.readouterr().out
        assert not folder.exists()
    assert [file.read_text() for file in tmp_path.glob("work/*/search.json")] == ["{}"] * 2


def test_what_a_search_found_is_kept_with_its_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "tuned_file", lambda model, dataset, _: tmp_path / f"{dataset}-{model}.yaml")
    shipped, which = Study.read(study.FILE), ("STARRec", "ml-100k", UNSEEN)
    plan = tuning._plan(shipped, *which)
    trial = {**{key: p.grid()[0] if p.grid() else p.low for key, p in space_of(plan["space"]).items()}, METRIC: 0.5}
    found = {**dict(zip(("model", "dataset", "protocol"), which, strict=True)), **plan, "trials": [trial]}
    assert not tuning.is_kept(shipped, *which, tmp_path)
    file = tuning.write(found, shipped, tmp_path)
    assert tuning.is_kept(shipped, *which, tmp_path)
    settings = yaml.safe_load(file.read_text())
    assert settings["exclude_history"] is True
    assert settings.items() >= {key: trial[key] for key in plan["space"]}.items()
    longer = Study({**shipped.plan, "search": {**shipped.plan["search"], "num_samples": 24}})
    assert not tuning.is_kept(longer, *which, tmp_path)
    file.unlink()  # as where a kill came before it was written
    assert not tuning.is_kept(shipped, *which, tmp_path)


def test_what_is_unset_in_the_best_trial_stays_so(tmp_path, monkeypatch):
    shared = {"trial": "a", "status": "finished", "reason": "", "seconds": 1.0}
    scores = [(0.5, None, 2), (0.4, 0.07, 1), (None, 0.07, 1)]  # the last one failed
    table = pd.DataFrame([{**shared, METRIC: s, "temperature": t, "num_layers": n} for s, t, n in scores])
    monkeypatch.setattr(study, "tuned_file", lambda *_: tmp_path / "tuned.yaml")
    space = {"temperature": [None, 0.07], "num_layers": [1, 2]}
    which = {"model": "STARRec", "dataset": "ml-100k", "protocol": FULL}
    found = {**which, "settings": {"valid_metric": "NDCG@10"}, "space": space, "trials": tuning._rows(table)}
    tuning.write(found, Study.read(study.FILE), tmp_path)
    assert (
        yaml.safe_load((tmp_path / "tuned.yaml").read_text()).items() >= {"temperature": None, "num_layers": 2}.items()
    )
    kept = json.loads((tmp_path / "tuning" / "tuned.json").read_text())["trials"]
    assert [(trial[METRIC], trial["temperature"], trial["num_layers"]) for trial in kept] == scores[:2]


@pytest.mark.slow
def test_a_search_whose_trials_all_fail_is_one_sentence(tiny, monkeypatch):
    plan = {**PLAN, "space": {**PLAN["space"], "learning_rate": [-1.0]}}
    with pytest.raises(UserError, match="no trial came to an evaluation"):
        tuning.tune(Study(plan), "SASRec", "tiny", FULL, "dataset", Path("work").resolve(), 1)
    assert not Path("results").exists()


def test_models_beside_an_experiment_are_run_in_its_variants_of_them():
    shipped = Study.read(study.FILE)
    found = experiments_plan.EXPERIMENTS["sparse"].specs(shipped, "amazon-beauty", [1])
    variants = {model: [name for own, name in found if own == model] for model, _ in found}
    assert variants.pop("STARRec") == list(experiments_plan.SPARSE_VARIANTS)
    sizes = ["whole model", "hidden size 128"]
    assert variants == dict.fromkeys(("Mamba4Rec", "SASRec", "eSASRec", "BSARec"), sizes)
    dense = experiments_plan.EXPERIMENTS["dense"].specs(shipped, "ml-1m", [1])
    assert [name for model, name in dense if model == "Mamba4Rec"] == ["whole model", "w/o seen items"]
    for (spec,) in found.values():
        spec.config()
        assert not spec.settings["tuned"]
    assert found["STARRec", "whole model"][0].settings["filter_share"] == 0.7
    assert found["STARRec", "w/o filter"][0].settings["filter_share"] == 0.0
    assert found["SASRec", "whole model"][0].settings["hidden_dropout_prob"] == 0.5
    assert not experiments_plan.EXPERIMENTS["sparse"].specs(shipped, "ml-1m", [1])


@pytest.mark.parametrize(
    ("experiment", "variant", "dataset", "tuned_by", "models"),
    [
        ("sparse", "hidden size 128", "amazon-beauty", UNSEEN, ["STARRec", "Mamba4Rec"]),
        ("sparse", "whole model", "amazon-beauty", UNSEEN, ["SASRec", "BSARec"]),
        ("sparse", "whole model", "amazon-video-games", UNSEEN, ["STARRec", "Mamba4Rec", "SASRec"]),
        ("dense", "whole model", "ml-1m", FULL, ["STARRec"]),
        ("dense", "w/o seen items", "ml-1m", UNSEEN, ["STARRec", "Mamba4Rec"]),
        ("dense", "whole model", "ml-1m", UNSEEN, ["SASRec"]),
        ("small", "w/o seen items", "ml-100k", UNSEEN, ["STARRec", "Mamba4Rec"]),
        ("small", "whole model", "ml-100k", UNSEEN, ["SASRec"]),
    ],
)
def test_what_an_experiment_found_is_what_is_tuned(experiment, variant, dataset, tuned_by, models):
    shipped = Study.read(study.FILE)
    found = experiments_plan.EXPERIMENTS[experiment].specs(shipped, dataset, [1])
    for model, own in zip(models, shipped.grid(models, [dataset], [1], UNSEEN, tuned_by), strict=True):
        assert own.identity() == found[model, variant][0].identity()


def test_the_runs_that_are_best_in_validation_stand_for_a_model_with_a_mark_where_chosen_otherwise(tmp_path):
    plan = Study({"models": ["SASRec"], "datasets": ["tiny"], "smaller": []})

    def row_of(chosen_among, full, unseen, seed=1):
        (spec,) = plan.grid(["SASRec"], ["tiny"], [seed], chosen_among)
        valid = {FULL: {"ndcg@10": full}, UNSEEN: {"ndcg@10": unseen}}
        about = {"id": spec.identity(), "model": "SASRec", "dataset": "tiny", "seed": seed, "valid": valid}
        return {**about, "config": {"exclude_history": chosen_among == UNSEEN}}

    def found(*rows):
        store = Store(tmp_path / "runs.jsonl")
        for row in rows:
            store.add(row, None)
        (tmp_path / "runs.jsonl").unlink()
        return Results(store, plan)

    own = row_of(FULL, 0.3, 0.4)
    alone = found(own).rows["tiny"]
    assert alone == {FULL: {"SASRec": [own]}, UNSEEN: {"SASRec": [own]}}
    for where in PROTOCOLS:
        assert (r"\*" in report._title("SASRec", alone[where]["SASRec"], where)) is (where == UNSEEN)
    each = row_of(UNSEEN, 0.2, 0.5)
    assert found(each).rows["tiny"] == {FULL: {"SASRec": [each]}, UNSEEN: {"SASRec": [each]}}
    both = found(own, each)
    assert both.rows["tiny"] == {FULL: {"SASRec": [own]}, UNSEEN: {"SASRec": [each]}}
    assert len(both.all_rows()) == 2
    better = row_of(UNSEEN, 0.31, 0.5)
    assert found(own, better).rows["tiny"] == {FULL: {"SASRec": [better]}, UNSEEN: {"SASRec": [better]}}
    several = [own, row_of(FULL, 0.5, 0.9, seed=2)]
    assert found(*several, better).rows["tiny"] == {FULL: {"SASRec": [better]}, UNSEEN: {"SASRec": [better]}}
    assert found(*several, row_of(UNSEEN, 0.2, 0.3)).rows["tiny"][UNSEEN] == {"SASRec": several}
    without_seen = {**better, "config": {"exclude_history": True, "allow_repeats": False}}
    assert found(own, without_seen).rows["tiny"] == {FULL: {"SASRec": [own]}, UNSEEN: {"SASRec": [without_seen]}}
    assert found(without_seen).rows["tiny"] == {UNSEEN: {"SASRec": [without_seen]}}


def test_runs_by_the_settings_of_one_evaluation_whose_epoch_is_chosen_by_the_other(tmp_path, monkeypatch):
    shipped = Study.read(study.FILE)
    files = {FULL: tmp_path / "a.yaml", UNSEEN: tmp_path / "b.yaml"}
    files[FULL].write_text("learning_rate: 0.1")
    monkeypatch.setattr(Study, "tuned_file", lambda self, model, dataset, protocol: files[protocol])

    def settings_of(*protocols):
        (one,) = shipped.grid(["STARRec"], ["ml-1m"], [1], *protocols)
        return one.settings

    assert settings_of(UNSEEN, FULL) == {"tuned": False, "learning_rate": 0.1, "exclude_history": True}
    assert settings_of(UNSEEN, UNSEEN) == settings_of(UNSEEN) == settings_of(FULL, UNSEEN) | PROTOCOLS[UNSEEN]


def test_the_first_table_says_by_what_a_model_was_chosen(tmp_path):
    def rows_of(score, **config):
        return [{"test": {protocol: {"ndcg@10": score} for protocol in PROTOCOLS}, "config": config}]

    found = SimpleNamespace(
        store=None,
        searched={},
        rows={
            "amazon-beauty": {
                FULL: {"A": rows_of(0.25), "B": rows_of(0.5, exclude_history=True)},
                UNSEEN: {"A": rows_of(0.75), "B": rows_of(0.5, exclude_history=True)},
            }
        },
    )
    page = Page("")
    write_summary(page, found)
    page.write(tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert r"| amazon-beauty, all items | .2500 | **.5000**\* | .0444 LightSANs |" in text
    assert r"| amazon-beauty, history excluded | **.7500**\* | .5000 | .0614 WEARec (best of 88 by test) |" in text
    assert "What fails" not in text


def test_claims_are_held_against_the_numbers():
    above = Claim("ml-1m", "STARRec is at least 2% above Mamba4Rec", "STARRec", 0.02, "Mamba4Rec")
    assert above.verdict(Comparison(0.021, p=0.01, seeds=3)) == ("+2.1%", "holds")
    assert above.verdict(Comparison(0.021, p=0.06, seeds=3)) == ("+2.1%", "**may be chance**")
    assert above.verdict(Comparison(0.019, p=0.01, seeds=3)) == ("+1.9%", "**fails**")
    assert above.verdict(Comparison(-0.03, p=0.39, seeds=3)) == ("-3.0%", "**may be chance**")
    assert above.verdict(Comparison(0.021, p=0.01, seeds=3, agree=False)) == ("+2.1%", "**may be chance**")
    reached = Claim("ml-1m", "an NDCG@10 of .205", "STARRec", 0.205)
    assert reached.verdict(Measured(0.1, 0.003)) == (".1000", "**fails**")
    assert reached.verdict(Measured(0.205, 0.003)) == (".2050", "holds")
    elsewhere = replace(reached, measured_elsewhere=True)
    assert elsewhere.verdict(Measured(0.207, 0.003)) == (".2070", "**level**")
    assert elsewhere.verdict(Measured(0.209, 0.003)) == (".2090", "holds")
    assert elsewhere.verdict(Measured(0.201, 0.003)) == (".2010", "**fails**")


def test_the_papers_claims_are_held_against_equal_searches():
    shipped = Study.read(study.FILE)
    store = Store(runs.ROOT / "benchmarks" / "results" / "runs.jsonl")
    found = Results(store, shipped)
    for dataset in (name for name in shipped.plan["datasets"] if name not in shipped.also):
        own = found.searched[dataset]
        assert own.keys() >= {"STARRec", "Mamba4Rec", "SASRec"}
        for model in ("STARRec", "Mamba4Rec"):
            assert len(own[model]) == 3
            for row in own[model]:
                assert row["config"]["num_layers"] == 1
                assert not row["config"].get("filter_share")
                assert not row["config"].get("temperature")
        budgets = {(r["config"]["epochs"], r["config"].get("ema_decay") or 0.0) for rows in own.values() for r in rows}
        assert len(budgets) == 1


def test_sampled_candidates_are_evaluated_afterwards(tiny, monkeypatch):
    monkeypatch.setattr(
        Study, "grid", lambda *words: [spec(epochs=1, **PROTOCOLS[words[4] if len(words) > 4 else FULL])]
    )
    monkeypatch.setattr(Study, "untuned", lambda *_: [])
    page, _ = run(monkeypatch, "accuracy", "--models", "Mamba4Rec", "--jobs", "2", "--sampled")
    rows = [json.loads(line) for line in Path("results/runs.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if not row["config"]["exclude_history"]]
    assert ["sampled" in row for row in rows] == [not row["config"]["exclude_history"] for row in rows]
    assert set(row["sampled"]) == {"uni100", "pop100"}
    assert row["sampled"]["uni100"]["ndcg@10"] > row["test"][FULL]["ndcg@10"]
    assert "these are no full ranking" in page


def test_rare_and_new_targets_are_told_apart():
    """Of items 1 to 20 the first is new, the second has one interaction of training, and so on."""
    counts = np.arange(20).repeat(np.arange(20)) + 1
    train = SimpleNamespace(inter_matrix=lambda: SimpleNamespace(col=counts))
    inter_feat = {"user_id": torch.tensor([3, 1, 2]), "place": torch.tensor([0, 1, 2])}
    test = SimpleNamespace(
        uid_field="user_id", TARGET_POSITION="place", item_num=21, inter_feat=inter_feat,
        sorted_items=torch.tensor([20, 2, 1]),  # of users 3, 1, 2
    )  # fmt: skip
    ranks = Ranks(np.array([1, 2, 3]), np.ones(3), np.array([20, 11, 1]))
    found = by_popularity(ranks, SimpleNamespace(_dataset=train), SimpleNamespace(_dataset=test), (10,))
    assert {name: one["number"] for name, one in found.items()} == {NEW: 1, RAREST: 1, TAIL: 1}
    assert found[NEW]["auc"] == pytest.approx(9 / 19)
    assert found[RAREST]["auc"] == found[TAIL]["auc"] == 0.0
    assert found[NEW]["ndcg@10"] == 0.0


def test_rare_and_new_targets_stand_on_the_page(tmp_path):
    page, rows = Page(""), [{"popularity": {NEW: {"number": 1234, "auc": 0.25, "ndcg@10": 0.125}}}]
    experiments_report.PARTS["features"](page, tmp_path / "page.md", None, {"tiny": {("M", "ids alone"): rows}})
    page.write(tmp_path / "page.md")
    assert f"| {NEW} | M, ids alone | 1,234 | .1250 | 0.250 |" in (tmp_path / "page.md").read_text()


def test_new_items_are_in_no_training(tmp_path):
    events = product(range(40), range(40))  # the last of user u is of item u - 1
    rows = [f"{user}\t{(user + place) % 40}\t{time}" for time, (user, place) in enumerate(events)]
    (tmp_path / "ml-1m").mkdir()
    lines = ["user_id:token\titem_id:token\ttimestamp:float", *rows]
    (tmp_path / "ml-1m" / "ml-1m.inter").write_text("\n".join(lines) + "\n")
    (tmp_path / "ml-1m" / "ml-1m.item").write_text("item_id:token\n0\n")
    sets.write(tmp_path, "ml-1m-new-items", seed=3)
    kept = (tmp_path / "ml-1m-new-items" / "ml-1m-new-items.inter").read_text().splitlines()
    assert set(kept) < set(lines)
    new = {row.split("\t")[1] for row in lines if row not in kept}
    assert len(new) == 2
    left = [row.split("\t") for row in kept if row.split("\t")[1] in new]
    assert sorted(((int(item) + 1) % 40, item) for item in new) == sorted((int(user), item) for user, item, _ in left)


def test_sets_with_known_seconds_hold_the_same_rows(tmp_path):
    rows = [f"{user}\t{item}\t{user * 10 + item // 2}" for user in (7, 2999, 3000) for item in range(20)]
    (tmp_path / "ml-1m-clock").mkdir()
    header = "user_id:token\titem_id:token\ttimestamp:float"
    (tmp_path / "ml-1m-clock" / "ml-1m-clock.inter").write_text("\n".join([header, *rows]) + "\n")
    found = {}
    for name in ("ml-1m-clock-known", "ml-1m-clock-shuffled"):
        sets.write(tmp_path, name)
        found[name] = (tmp_path / name / f"{name}.inter").read_text().splitlines()
    assert found["ml-1m-clock-known"] == [header, *rows[:40]]
    assert found["ml-1m-clock-shuffled"] != found["ml-1m-clock-known"]
    assert sorted(found["ml-1m-clock-shuffled"][1:]) == sorted(rows[:40])


def test_each_model_of_an_experiment_has_its_own_dots(tmp_path, monkeypatch):
    rows = [{"test": {FULL: {"ndcg@10": 0.1}}, "config": {}}]
    found = {("STARRec", "as tuned"): rows, ("Mamba4Rec", "as tuned"): rows}
    experiment = experiments_plan.EXPERIMENTS["training"]
    experiments_report._picture(Page(""), tmp_path / "page.md", "training", experiment, "tiny", found)
    picture = (tmp_path / "images" / "page-training-tiny.svg").read_text()
    assert {f"{model}, as tuned" for model in ("STARRec", "Mamba4Rec")} <= set(re.findall(">(.*)</text>", picture))


def test_a_set_without_runs_that_rank_all_items_has_no_parts(tmp_path):
    page, results = Page("title"), SimpleNamespace(rows={"tiny": {UNSEEN: {"STARRec": [{}]}}})
    experiments_report._parts_of_the_study(page, tmp_path / "page.md", results)
    experiments_report._by_length_of_the_user(page, tmp_path / "page.md", results)
    page.write(tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == "# title\n"


def test_a_variant_that_tuning_chose_stands_once():
    runs = {("M", "as tuned"): ["a"], ("M", "w/o x"): ["a"], ("M", "w/o y"): ["b"], ("N", "as tuned"): ["c"]}
    experiment = SimpleNamespace(specs=lambda *_: runs, datasets=None)
    store = SimpleNamespace(seeds=lambda: [1], of=lambda names: [{"id": name, "seed": 1} for name in names])
    found = experiments_report._rows(store, None, experiment, "tiny")
    assert list(found) == [("M", "as tuned"), ("M", "w/o y"), ("N", "as tuned")]
    assert experiments_report._compares(experiment, found)
    del found["M", "w/o y"]
    assert not experiments_report._compares(experiment, found)
    experiment.datasets = ("tiny",)  # whose models the study does not compare
    assert experiments_report._compares(experiment, found)


def test_means_are_compared_over_the_same_seeds():
    rows = {"a": [{"seed": 1}, {"seed": 2}, {"seed": 3}], "b": [{"seed": 2}], "c": [{"seed": 2}, {"seed": 3}]}
    assert same_seeds(rows) == {"a": [{"seed": 2}], "b": [{"seed": 2}], "c": [{"seed": 2}]}
    assert same_seeds({"a": [{"seed": 1}], "b": [{"seed": 2}]}) == {"a": [{"seed": 1}], "b": [{"seed": 2}]}
    assert same_seeds({}) == {}
