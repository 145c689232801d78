"""The command, and RecBole's own models through it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import recbole.trainer

from recbole_ssm import run_recbole
from recbole_ssm.cli.run_recbole import main
from recbole_ssm.quick_start import run
from recbole_ssm.registry import MODELS

from .conftest import random_rows, small_settings, write_dataset

QUICK = ["--epochs=1", "--show_progress=False", "--state=ERROR"]


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["run_recbole", *words])
    return main()


def small_words(model):
    return [f"--{key}={value}" for key, value in small_settings(model).items()]


@pytest.mark.parametrize("model", MODELS)
def test_result_file(model, monkeypatch):
    write_dataset("tiny", random_rows())
    words = [f"--model={model}", "--dataset=tiny", *QUICK, *small_words(model), "--result_file=out/result.json"]
    assert command(monkeypatch, *words) == 0
    report = json.loads(Path("out/result.json").read_text())
    assert report["best_valid_result"].keys() == report["test_result"].keys()
    assert 0 <= report["test_result"]["ndcg@10"] <= 1
    assert report["config"]["model"] == model
    assert report["config"]["epochs"] == 1
    assert {"recbole", "torch", "numpy", "python"} <= report["versions"].keys()
    for timing in ("train_seconds_per_epoch", "train_targets_per_second", "eval_seconds"):
        assert report[timing] > 0
    assert report["peak_memory_bytes"] > 50_000_000
    assert Path(report["checkpoint"]).is_file()


def test_evaluate_and_resume(monkeypatch):
    write_dataset("tiny", random_rows())
    first = ["-m", "Mamba4Rec", "-d", "tiny", *QUICK, *small_words("Mamba4Rec"), "--result_file=a.json"]
    assert command(monkeypatch, *first) == 0
    trained = json.loads(Path("a.json").read_text())
    evaluate = ["--checkpoint", trained["checkpoint"], "--mode", "evaluate", "--result_file=b.json"]
    assert command(monkeypatch, *evaluate) == 0
    evaluated = json.loads(Path("b.json").read_text())
    assert evaluated["test_result"] == trained["test_result"]
    assert evaluated["best_valid_result"] == trained["best_valid_result"]
    assert command(monkeypatch, "--resume", trained["checkpoint"], "--epochs=2", "--result_file=c.json") == 0
    assert json.loads(Path("c.json").read_text())["config"]["epochs"] == 2


def test_closing_lines(monkeypatch):
    write_dataset("tiny", random_rows())
    words = ["-m", "Mamba4Rec", "-d", "tiny", "--epochs=1", *small_words("Mamba4Rec")]
    done = subprocess.run([sys.executable, "-m", "recbole_ssm", *words], capture_output=True, text=True, check=True)
    valid, test, checkpoint = done.stderr.splitlines()[-3:]
    assert "best valid" in valid
    assert "ndcg@10" in valid
    assert "test result" in test
    assert "ndcg@10" in test
    assert Path(checkpoint.split()[-1]).is_file()
    assert "Train     0" in done.stderr  # RecBole's progress bars
    assert "selective_scan runs on the cpu backend" in done.stderr
    assert "Warning" not in done.stderr


def test_config_files(monkeypatch, tmp_path):
    write_dataset("tiny", random_rows())
    for name, text in (("a.yaml", "epochs: 1\nhidden_size: 8\n"), ("b b.yaml", "hidden_size: 16\nd_state: 4\n")):
        Path(name).write_text(text)
    words = ["-m", "Mamba4Rec", "-d", "tiny", "--config_files", "a.yaml 'b b.yaml'", *QUICK[2:], "--result_file=r.json"]
    assert command(monkeypatch, *words) == 0
    config = json.loads(Path("r.json").read_text())["config"]
    assert (config["epochs"], config["hidden_size"], config["d_state"]) == (1, 16, 4)


def test_help_and_list_models(monkeypatch, capsys):
    assert command(monkeypatch, "--list_models") == 0
    assert capsys.readouterr().out.splitlines()[: len(MODELS)] == list(MODELS)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "--help")
    assert stop.value.code == 0
    assert "run_recbole --model=STARRec --dataset=ml-100k" in capsys.readouterr().out


SAID = {
    "unknown model": (["-m", "STARec"], "unknown model 'STARec', did you mean 'STARRec'? --list_models names all."),
    "unknown key": (["--n_expert=4"], "unknown setting 'n_expert', did you mean 'n_experts'?"),
    "no value": (["--epochs", "3"], "'--epochs' is not of the form --key=value; see run_recbole --help."),
    "unknown dataset": (["-d", "nowhere"], "dataset nowhere not found: there is no folder"),
    "evaluate what": (["--mode", "evaluate"], "--mode evaluate needs --checkpoint FILE."),
    "checkpoint to train": (["--checkpoint", "x.pth"], "to train on, use --resume FILE."),
    "no checkpoint": (["--resume", "x.pth"], "checkpoint x.pth not found."),
    "model of a checkpoint": (["--resume", "x.pth", "-m", "BPR"], "are those of the checkpoint: leave them out."),
    "evaluate by many": (["--mode=evaluate", "--checkpoint=x.pth", "--nproc=2"], "evaluate runs in one process"),
    "no cluster": (["--address=auto"], "--address is that of a Ray cluster: add --engine ray."),
    "heads": (
        ["--n_heads=7"],
        "n_heads 7 does not divide hidden_size 64: choose one that does.",
    ),
    "window": (["--attention_window=0"], "attention_window is 0: choose a whole number from 1"),
    "backend": (
        ["-m", "SSD4Rec", "--ssm_backend=mamba_ssm", *QUICK],
        "the mamba_ssm backend of causal_conv cannot run here: causal_conv1d is not installed; run: pip install",
    ),
    "no config file": (["--config_files", "x.yaml"], "config file x.yaml not found."),
}


@pytest.mark.parametrize(("words", "sentence"), SAID.values(), ids=SAID)
def test_one_clear_sentence(words, sentence, monkeypatch, capsys):
    assert command(monkeypatch, *words, "--state=ERROR") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("run_recbole: ")
    assert sentence in said[0]


def test_bad_data_and_nan_end_in_one_sentence(monkeypatch, capsys):
    write_dataset("tiny", ["u\ti"], "user_id:token\titem_id:token")
    assert command(monkeypatch, "-d", "tiny", *QUICK) == 2
    assert "has no column timestamp" in capsys.readouterr().err
    write_dataset("tiny", random_rows())
    words = ["-m", "Mamba4Rec", "-d", "tiny", *QUICK, "--epochs=9", "--learner=sgd", "--learning_rate=1e30"]
    assert command(monkeypatch, *[w for w in words if w != "--epochs=1"], *small_words("Mamba4Rec")) == 2
    assert "NaN in epoch 0; nothing was saved yet. Lower the learning rate" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec", "BERT4Rec", "BPR", "ItemKNN", "FM", "GRU4RecF", "Pop"])
def test_recboles_own_models_run_unchanged(model, monkeypatch):
    write_dataset("tiny", random_rows())
    Path("dataset/tiny/tiny.item").write_text(
        "item_id:token\tclass:token_seq\n" + "".join(f"i{k}\ta {'bc'[k % 2]}\n" for k in range(30))
    )
    words = [f"--model={model}", "--dataset=tiny", *QUICK, "--result_file=r.json"]
    if model == "GRU4RecF":
        words.append("--load_col={'inter': ['user_id', 'item_id', 'timestamp'], 'item': ['item_id', 'class']}")
    if model == "FM":
        words += ["--load_col=None", "--threshold={'timestamp': 1000001000}"]
    assert command(monkeypatch, *words) == 0
    report = json.loads(Path("r.json").read_text())
    assert 0 <= report["test_result"]["auc" if model == "FM" else "ndcg@10"] <= 1
    assert command(monkeypatch, "--checkpoint", report["checkpoint"], "--mode", "evaluate", "--result_file=e.json") == 0
    assert json.loads(Path("e.json").read_text())["test_result"] == report["test_result"]


def test_same_results_as_recbole_alone():
    """SASRec through RecBole's own trainer, step by step, and through ours."""
    from recbole.config import Config as RecBoleConfig
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, init_seed

    from recbole_ssm import Config

    write_dataset("tiny", random_rows())
    settings = {
        "epochs": 2, "state": "ERROR", "show_progress": False, "data_path": "dataset", "train_neg_sample_args": None,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "reproducibility": True,
    }  # fmt: skip
    ours = run_recbole("SASRec", "tiny", config_dict=settings, saved=False)

    class NumPy2Config(RecBoleConfig):
        compatibility_settings = Config.compatibility_settings

    config = NumPy2Config("SASRec", "tiny", config_dict=dict(settings))
    init_seed(config["seed"], True)
    train_data, valid_data, test_data = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], True)
    model = get_model("SASRec")(config, train_data._dataset)
    trainer = recbole.trainer.Trainer(config, model)
    _, valid_result = trainer.fit(train_data, valid_data, saved=False, show_progress=False)
    assert ours["best_valid_result"] == dict(valid_result)
    assert ours["test_result"] == dict(trainer.evaluate(test_data, load_best_model=False))


@pytest.mark.slow
def test_pretrained_files_of_recboles_models_load():
    """S3Rec loads with torch.load what its pre-training stage saved."""
    write_dataset("tiny", random_rows())
    Path("dataset/tiny/tiny.item").write_text(
        "item_id:token\tclass:token_seq\n" + "".join(f"i{k}\ta {'bc'[k % 2]}\n" for k in range(30))
    )
    settings = {
        "state": "ERROR", "show_progress": False, "data_path": "dataset", "epochs": 1, "pretrain_epochs": 1,
        "save_step": 1, "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "class"]},
    }  # fmt: skip
    run_recbole("S3Rec", "tiny", config_dict={**settings, "train_stage": "pretrain"})
    (file,) = Path("saved").glob("S3Rec-tiny-1.pth")
    result = run_recbole(
        "S3Rec", "tiny", config_dict={**settings, "train_stage": "finetune", "pre_model_path": str(file)}
    )
    assert 0 <= result["test_result"]["ndcg@10"] <= 1


def test_run_takes_recboles_arguments():
    write_dataset("tiny", random_rows())
    settings = {**small_settings("Mamba4Rec"), "epochs": 1, "state": "ERROR", "show_progress": False}
    result = run("Mamba4Rec", "tiny", None, settings, True, 1, -1, "localhost", "5678", 0)
    assert result.keys() == {"best_valid_score", "valid_score_bigger", "best_valid_result", "test_result", "checkpoint"}
    assert Path(result["checkpoint"]).is_file()
