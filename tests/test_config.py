"""Precedence, strictness, and every shipped property file."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import recbole.utils
import yaml

import recbole_ssm.config
from recbole_ssm import Config, UserError, list_models
from recbole_ssm.config import properties_dir
from recbole_ssm.logs import start_logging
from recbole_ssm.registry import MODELS

from .conftest import small_settings

SHIPPED = sorted(properties_dir().rglob("*.yaml"))
DATASETS = [path.stem for path in SHIPPED if path.parent.name == "dataset"]


@pytest.mark.parametrize("model", MODELS)
def test_known_to_recbole_by_name(model):
    assert recbole.utils.get_model(model).__name__ == model
    config = Config(model, "ml-100k")
    assert recbole.utils.get_trainer(config["MODEL_TYPE"], model).__name__ == "SequenceTrainer"
    assert getattr(sys.modules["recbole.data.dataset"], model + "Dataset").__name__ == "SequenceDataset"


@pytest.mark.parametrize("before", ["", "import recbole.model.sequential_recommender; "])
def test_anomaly_detection_stays_off(before):
    """RecBole's SINE switches it on when it is imported, for every model in the process."""
    script = (
        f"{before}import torch, recbole_ssm, recbole.utils as u; "
        "u.get_model('SINE'); u.get_model('STARRec'); print(torch.is_anomaly_enabled())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_list_models():
    names = list_models()
    assert names[: len(MODELS)] == list(MODELS)
    assert {"SASRec", "GRU4Rec", "BERT4Rec", "BPR", "FM", "KGAT", "xgboost"} <= set(names)
    for name in names[:-2]:
        assert recbole.utils.get_model(name).__name__ == name


def test_precedence(monkeypatch, tmp_path):
    """overall < model < dataset < config files < dict < command line."""
    config = Config("STARRec", "ml-1m", config_dict={"tuned": False})
    assert config["stopping_step"] == 10  # RecBole's overall.yaml
    assert config["valid_metric"] == "NDCG@10"  # ours
    assert config["n_heads"] == 8  # model
    assert config["MAX_ITEM_LIST_LENGTH"] == 200  # dataset
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("MAX_ITEM_LIST_LENGTH: 10\nn_heads: 1\nseed: 1\nepochs: 1\n")
    two.write_text("n_heads: 2\nseed: 2\nepochs: 2\n")
    monkeypatch.setattr(sys, "argv", ["script.py", "--epochs=4"])
    config = Config("STARRec", "ml-1m", [str(one), str(two)], {"seed": 3, "epochs": 3})
    settings = ("MAX_ITEM_LIST_LENGTH", "n_heads", "seed", "epochs")
    assert [config[key] for key in settings] == [10, 2, 3, 4]


@pytest.mark.parametrize("model", ["STARRec", "SASRec", "GRU4Rec"])
def test_any_sequential_dataset_works_without_settings(model):
    config = Config(model, "mine", config_dict={"TIME_FIELD": "when"})
    assert config["load_col"] == {"inter": ["user_id", "item_id", "when"]}
    assert config["train_neg_sample_args"]["distribution"] == "none"
    assert config["eval_args"]["order"] == "TO"
    assert Config(model, "mine", config_dict={"load_col": None})["load_col"] is None


def test_negatives_follow_the_loss():
    for loss_type, distribution in (("CE", "none"), ("BCE", "uniform"), ("BPR", "uniform")):
        config = Config("STARRec", "mine", config_dict={"loss_type": loss_type})
        assert config["train_neg_sample_args"]["distribution"] == distribution


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Property files with one more, of Mamba4Rec on ml-1m."""
    shutil.copytree(properties_dir(), tmp_path / "properties")
    file = tmp_path / "properties" / "tuned" / "ml-1m-Mamba4Rec.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text("dropout_prob: 0.33\nMAX_ITEM_LIST_LENGTH: 77\n")
    monkeypatch.setattr(recbole_ssm.config, "properties_dir", lambda: tmp_path / "properties")
    return file


def test_tuned_settings_stand_above_the_datasets(tuned):
    config = Config("Mamba4Rec", "ml-1m")
    assert (config["dropout_prob"], config["MAX_ITEM_LIST_LENGTH"]) == (0.33, 77)
    assert config.property_files[-1] == tuned
    assert Config("Mamba4Rec", "ml-1m", config_dict={"dropout_prob": 0.1})["dropout_prob"] == 0.1
    plain = Config("Mamba4Rec", "ml-1m", config_dict={"tuned": False})
    assert (plain["dropout_prob"], plain["MAX_ITEM_LIST_LENGTH"]) == (0.2, 200)
    assert tuned not in Config("Mamba4Rec", "ml-100k").property_files


def test_what_was_tuned_for_the_excluded_history_is_read_for_that_alone(tuned):
    excluding = {"exclude_history": "True"}
    other = tuned.with_name("ml-1m-history_excluded-Mamba4Rec.yaml")
    other.unlink()  # the shipped one
    assert Config("Mamba4Rec", "ml-1m", config_dict=excluding).property_files[-1] == tuned
    other.write_text("dropout_prob: 0.44\nexclude_history: True\n")
    assert Config("Mamba4Rec", "ml-1m", config_dict=excluding)["dropout_prob"] == 0.44
    assert Config("Mamba4Rec", "ml-1m", config_dict=excluding).property_files[-1] == other
    for asked in ({}, {"exclude_history": False}):
        config = Config("Mamba4Rec", "ml-1m", config_dict=asked)
        assert (config["dropout_prob"], config["exclude_history"]) == (0.33, False)


@pytest.mark.parametrize("asked", [{"loss_type": "BPR"}, {"label_smoothing": 0.1}])
def test_what_was_tuned_leaves_nothing_out_of_a_loss_that_cannot(asked):
    excluding = {"exclude_history": True}
    assert Config("Mamba4Rec", "ml-100k", config_dict=excluding)["allow_repeats"] is False
    assert Config("Mamba4Rec", "ml-100k", config_dict={**excluding, **asked})["allow_repeats"] is True


def test_a_runs_settings_outlive_what_is_tuned_later(tuned):
    given = Config("Mamba4Rec", "ml-1m").given
    del given["label_smoothing"]  # as of a checkpoint from before this setting was there
    tuned.write_text("dropout_prob: 0.5\nlabel_smoothing: 0.2\n")
    again = Config.rebuild(given)
    assert (again["dropout_prob"], again["label_smoothing"]) == (0.33, 0.0)


def test_general_models_keep_recboles_settings():
    config = Config("BPR", "ml-100k")
    assert config["user_inter_num_interval"] is None
    assert config["valid_metric"] == "MRR@10"
    assert config["train_mode"] is None


REFUSED = {
    "unknown key": ({"num_layer": 2}, "unknown setting 'num_layer', did you mean 'num_layers'"),
    "RecBole's word": ({"n_layers": 2}, "unknown setting 'n_layers', did you mean 'num_layers'"),
    "loss": ({"loss_type": "MSE"}, "loss_type is 'MSE': choose one of CE, BCE, BPR"),
    "mode": ({"train_mode": "rows"}, "train_mode is 'rows': choose one of sequence, prefix"),
    "time": ({"time_order": "int"}, "time_order is 'int': choose one of exact, float32"),
    "metric": ({"metrics": ["NDGC"]}, "no metric named 'NDGC'"),
    "backend": ({"ssm_backend": "gpu"}, "ssm_backend is 'gpu': choose one of auto, reference, cpu, triton, mamba_ssm"),
    "cut-off": ({"topk": 20}, r"valid_metric 'NDCG@10' is not among the metrics .* at topk \[20\]"),
    "no cut-off": ({"valid_metric": "NDCG"}, "valid_metric 'NDCG' is not among the metrics"),
    "a word for it": ({"valid_metric": "NDCG@x"}, "valid_metric 'NDCG@x' is not among the metrics"),
    "measure": ({"metrics": "Hit"}, "valid_metric 'NDCG@10' is not among the metrics"),
    "loaders": ({"save_dataloaders": True}, "leave save_dataloaders"),
    "schedule": ({"lr_scheduler_type": "step"}, "lr_scheduler_type is 'step': choose one of constant, linear, cosine"),
    "warm-up": ({"warmup_ratio": 1}, "warmup_ratio is 1: choose a number from 0 to below 1"),
    "restarts": ({"lr_restarts": 3, "lr_scheduler_type": "constant"}, "lr_restarts is 3, but .* constant never falls"),
    "smoothing": ({"label_smoothing": 1.0}, "label_smoothing is 1.0: choose a number from 0 to below 1"),
    "smoothed BPR": ({"label_smoothing": 0.1, "loss_type": "BPR"}, "with loss_type BPR: choose .* and 0 for other"),
    "temperature": ({"temperature": 0}, "temperature is 0: choose a number from 1e-06 to"),
    "evaluation": ({"eval_args": "uni100"}, "eval_args is 'uni100': choose a dict such as"),
    "duplicates": ({"rm_dup_inter": "x"}, "rm_dup_inter is 'x': choose one of first, last, or ~"),
    "negatives with CE": ({"train_neg_sample_args": {"distribution": "uniform"}}, "should be None"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Config("STARRec", "ml-100k", config_dict=settings)


def test_unknown_key_in_a_file_is_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("dropout: 0.1\n")
    with pytest.raises(UserError, match="unknown setting 'dropout', did you mean 'dropout_prob'"):
        Config("STARRec", "ml-100k", [str(file)])
    with pytest.raises(UserError, match=r"config file nowhere\.yaml not found"):
        Config("STARRec", "ml-100k", ["nowhere.yaml"])


@pytest.mark.parametrize("model", ["STARRec", "SASRec"])
def test_names_that_nothing_reads_any_more_are_refused(model):
    with pytest.raises(UserError, match="nothing reads config_file: write --config_files"):
        Config(model, "ml-100k", config_dict={"config_file": "mine.yaml"})
    with pytest.raises(UserError, match="nothing reads neg_sampling: write train_neg_sample_args"):
        Config(model, "ml-100k", config_dict={"neg_sampling": 5})
    with pytest.raises(UserError, match=r"config_file_list is 'a\.yaml': give a list of files"):
        Config(model, "ml-100k", "a.yaml")


def test_what_perhaps_nothing_reads_is_told_again_when_the_run_begins(caplog):
    config = Config("SASRec", "ml-100k", config_dict={"hiden_size": 32})
    told = "hiden_size stands in no property file of SASRec: perhaps nothing reads it, did you mean 'hidden_size'?"
    assert told in caplog.text
    caplog.clear()
    start_logging(config)
    assert told in caplog.text


def test_a_scripts_own_flags_are_left_to_it(monkeypatch, caplog):
    monkeypatch.setattr(sys, "argv", ["script.py", "--depth=3", "-v", "--epochs=7", "--result_file=x"])
    config = Config("STARRec", "ml-100k")
    assert config["epochs"] == 7
    assert "depth" not in config
    assert "--depth is no setting of this model" in caplog.text
    assert "result_file" not in caplog.text


def test_a_script_can_name_model_and_dataset(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--model=STARRec", "--dataset=ml-1m"])
    config = Config()
    assert (config["model"], config["dataset"], config["MAX_ITEM_LIST_LENGTH"]) == ("STARRec", "ml-1m", 200)


@pytest.mark.parametrize("model", ["GRU4RecF", "DIN", "GRU4RecKG"])
def test_what_recbole_loads_for_its_own_models_stays(model):
    config = Config(model, "ml-100k")
    assert set(config["load_col"]) > {"inter"}
    assert config["MAX_ITEM_LIST_LENGTH"] == 200


def test_unknown_model_names_the_nearest():
    with pytest.raises(UserError, match="unknown model 'StarRec', did you mean 'STARRec'"):
        Config("StarRec", "ml-100k")


def test_settings_are_never_evaluated():
    trap = "__import__('pathlib').Path('trap').touch()"
    config = Config("STARRec", "ml-100k", config_dict={"checkpoint_dir": trap})
    assert config["checkpoint_dir"] == trap
    assert not Path("trap").exists()


def test_given_rebuilds_the_configuration():
    first = Config(
        "SSD4Rec", "ml-1m", config_dict={"gpu_id": "0", "topk": 5, "metrics": "NDCG", "valid_metric": "NDCG@5"}
    )
    again = Config.rebuild(first.given)
    assert again.final_config_dict == first.final_config_dict


def test_names_that_numpy_2_removed():
    Config("STARRec", "ml-100k")
    assert np.float is np.float64  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_line_says_type_and_meaning(path):
    for line in path.read_text().splitlines():
        if re.match(r"\w+:", line):
            assert re.search(r"# \(\w[\w ]*\) \S", line), line


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_no_key_twice(path):
    keys = re.findall(r"^(\w+):", path.read_text(), re.MULTILINE)
    assert len(keys) == len(set(keys)) == len(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_every_pair_of_shipped_files_makes_a_configuration(model, dataset):
    config = Config(model, dataset)
    assert config["user_inter_num_interval"] == config["item_inter_num_interval"] == "[5,inf)"
    assert config["MAX_ITEM_LIST_LENGTH"] == (200 if dataset.startswith("ml-") else 50)
    assert config["load_col"]["inter"] == ["user_id", "item_id", "timestamp"]


@pytest.mark.parametrize("model", MODELS)
def test_model_files_hold_no_dataset_keys(model):
    """A dataset's file would be above them only by luck otherwise."""
    own = yaml.safe_load((properties_dir() / "model" / f"{model}.yaml").read_text())
    assert not own.keys() & set(recbole.utils.dataset_arguments)
    assert small_settings(model)
