"""Senseless settings are refused before anything is loaded, each in one sentence; and none is ignored silently."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from recbole.model.general_recommender import BPR

from recbole_ssm import Config, UserError
from recbole_ssm.cli.run_recbole import main
from recbole_ssm.data import create_dataset
from recbole_ssm.ops.causal_conv import LONGEST_FILTER
from recbole_ssm.quick_start import config_of, evaluate, load_data, train_and_test
from recbole_ssm.registry import MODELS
from recbole_ssm.settings.text import allowed, ours

from ..conftest import build, random_rows, small_config, write_dataset

REFUSED = {
    "no candidates": (
        "STARRec",
        {"eval_args": {"mode": "uni0"}},
        "mode of eval_args is 'uni0': choose full, uniN or popN",
    ),
    "mode of a phase": ("STARRec", {"eval_args": {"mode": {"test": "all"}}}, "mode of eval_args is 'all': choose full"),
    "phase": ("STARRec", {"eval_args": {"mode": {"train": "full"}}}, "choose one for 'valid' and one for 'test'"),
    "misspelt mode": ("STARRec", {"eval_args": {"modes": "full"}}, "eval_args has no 'modes', did you mean 'mode'"),
    "two parts": (
        "STARRec",
        {"eval_args": {"split": {"RS": [0.8, 0.2]}}},
        "give the shares of training, validation and",
    ),
    "no training": ("STARRec", {"eval_args": {"split": {"RS": [0, 0.5, 0.5]}}}, "the first of which is not 0"),
    "split": ("STARRec", {"eval_args": {"split": {"LS": "last"}}}, "LS of split of eval_args is 'last': choose one of"),
    "two splits": ("STARRec", {"eval_args": {"split": {"RS": [8, 1, 1], "LS": "valid_only"}}}, "should be either"),
    "group": (
        "STARRec",
        {"eval_args": {"group_by": None}},
        "group_by of eval_args is None, which goes with a split by RS",
    ),
    "order": ("STARRec", {"eval_args": {"order": "RO"}}, "sequential models need TO"),
    "labels": ("STARRec", {"eval_args": {"mode": "labeled"}}, "mode labeled of eval_args ranks nothing"),
    "scores": ("STARRec", {"metrics": ["AUC"], "valid_metric": "AUC"}, "AUC is of labelled or sampled items"),
    "scores of CE": (
        "STARRec",
        {"metrics": ["LogLoss"], "valid_metric": "LogLoss", "eval_args": {"mode": "uni5"}},
        "LogLoss is of probabilities, which the scores of loss_type CE are not: choose AUC or a metric of rankings, or",
    ),
    "SASRec's scores": (
        "SASRec",
        {"metrics": ["AUC", "RMSE"], "valid_metric": "AUC", "eval_args": {"mode": "uni5"}},
        "RMSE is of probabilities, which the scores of loss_type CE are not: choose AUC or a metric of rankings.",
    ),
    "kinds of metrics": ("STARRec", {"metrics": ["AUC", "NDCG"]}, "either of rankings"),
    "no metric": ("STARRec", {"metrics": []}, "choose at least one"),
    "metric without k": ("STARRec", {"valid_metric": "NDCG"}, "set --valid_metric to one of Recall@10"),
    "no k": ("STARRec", {"topk": []}, r"topk is \[\]"),
    "k": ("STARRec", {"topk": [10, 0]}, r"topk is \[10, 0\]: choose a whole number from 1"),
    "layers": ("Mamba4Rec", {"num_layers": -1}, "num_layers is -1: choose a whole number from 1"),
    "no layers": ("SSD4Rec", {"num_layers": 0}, "num_layers is 0: choose a whole number from 1"),
    "a word for a switch": ("STARRec", {"use_moe": "no"}, "use_moe is 'no': choose True or False"),
    "dropout": ("Mamba4Rec", {"dropout_prob": 2}, "dropout_prob is 2: choose a number from 0 to below 1"),
    "no batch": ("BPR", {"train_batch_size": 0}, "train_batch_size is 0: choose a whole number from 1"),
    "half a batch": ("BPR", {"train_batch_size": 0.5}, "train_batch_size is 0.5: choose a whole number from 1"),
    "epochs": ("FM", {"epochs": -1}, "epochs is -1: choose a whole number from 1"),
    "filter": ("Mamba4Rec", {"d_conv": 100}, "d_conv is 100: choose a whole number from 1 to 8"),
    "no experts": ("STARRec", {"n_experts": 0}, "n_experts is 0: choose a whole number from 1"),
    "experts": ("STARRec", {"experts_per_token": 9}, r"choose a whole number from 1 to n_experts \(8\)"),
    "mask": ("SSD4Rec", {"mask_ratio": 2}, "mask_ratio is 2: choose a number from 0 to below 1"),
    "headdim": ("SSD4Rec", {"headdim": 7}, "headdim 7 does not divide expand"),
    "headdim of a block": ("STARRec", {"ssm_block": "mamba2", "headdim": 7}, "headdim 7 does not divide expand"),
    "states to rotate": ("Mamba4Rec", {"ssm_block": "mamba3", "d_state": 3}, "d_state is 3: choose 4 or more for"),
    "stream": ("SSD4Rec", {"backward_stream": "x"}, "backward_stream is 'x': choose one of final, aligned"),
    "padded": ("SSD4Rec", {"var_len": False, "num_layers": 1, "train_mode": "sequence"}, "set train_mode: prefix"),
    "both ways": ("SSD4Rec", {"train_mode": "sequence"}, "cannot learn from every position at once"),
    "paths": ("STARRec", {"use_ssm": False, "use_pma": False}, "both off"),
    "thresholds": ("STARRec", {"similarity_threshold": [0.1, 0.2]}, "has 2 values for n_heads 8"),
    "heads of SASRec": ("SASRec", {"n_heads": 3}, "n_heads 3 does not divide hidden_size 64"),
    "optimizer": ("BPR", {"learner": "bogus"}, "learner is 'bogus': choose one of adam, adamw, sgd"),
    "NaN": ("STARRec", {"learning_rate": float("nan")}, "learning_rate is nan: choose a number from 1e-12"),
    "infinity": ("STARRec", {"weight_decay": float("inf")}, "weight_decay is inf: choose a number from 0"),
    "learning rate": ("STARRec", {"learning_rate": -1}, "learning_rate is -1: choose a number from 1e-12"),
    "seed": ("BPR", {"seed": -1}, "seed is -1: choose a whole number from 0"),
    "log": ("BPR", {"state": "loud"}, "state is 'loud': choose one of debug, info"),
    "clipping": ("STARRec", {"clip_grad_norm": {"norm": 5}}, "clip_grad_norm"),
    "misspelt negatives": (
        "STARRec",
        {"loss_type": "BPR", "train_neg_sample_args": {"distribution": "uniform", "sample_nums": 3}},
        "train_neg_sample_args has no 'sample_nums', did you mean 'sample_num'",
    ),
    "no negatives": (
        "STARRec",
        {"loss_type": "BPR", "train_neg_sample_args": {"distribution": "uniform", "sample_num": 0}},
        "sample_num of train_neg_sample_args is 0: choose a whole number from 1",
    ),
    "negatives left out": (
        "SASRec",
        {"loss_type": "BPR", "train_neg_sample_args": None},
        "loss_type BPR needs negatives",
    ),
    "candidates": (
        "STARRec",
        {"loss_type": "BPR", "train_mode": "prefix", "train_neg_sample_args": {"candidate_num": 3}},
        "candidate_num of train_neg_sample_args is 3 with dynamic: False",
    ),
    "power": ("BPR", {"train_neg_sample_args": {"distribution": "uniform", "alpha": 0.5}}, "popularity alone reads it"),
    "dynamic": (
        "STARRec",
        {"loss_type": "BPR", "train_neg_sample_args": {"dynamic": True, "candidate_num": 3}},
        "train_mode: sequence samples no dynamic negatives",
    ),
    "interval": ("BPR", {"user_inter_num_interval": "[5,"}, "user_inter_num_interval has '.5,', which is no interval"),
    "empty interval": ("BPR", {"item_inter_num_interval": "[7,3]"}, "item_inter_num_interval has"),
    "tuned": ("STARRec", {"tuned": "no"}, "tuned is 'no': choose True or False"),
    "column": ("BPR", {"TIME_FIELD": 3}, "TIME_FIELD is 3: choose a word"),
    "memory": ("STARRec", {"hidden_size": 10**9}, "hidden_size is 1000000000: choose a whole number from 1 to 65536"),
    "huge": ("BPR", {"train_batch_size": 10**30}, "choose a whole number from 1"),
    "loss of SASRec": ("SASRec", {"loss_type": "gBCE"}, "loss_type is 'gBCE': choose one of CE, BPR"),
    "saved loaders": ("STARRec", {"save_dataloaders": True}, "leave save_dataloaders out"),
    "saved loaders to read": ("STARRec", {"dataloaders_save_path": "x.pth"}, "dataloaders_save_path is 'x.pth'"),
    "fewer candidates than a list": ("STARRec", {"eval_args": {"mode": "uni5"}}, r"topk is \[10\], but the mode of"),
    "bigger is better": ("BPR", {"valid_metric_bigger": False}, "more of MRR@10 is better"),
    "one name for two": ("STARRec", {"LABEL_FIELD": "item_id"}, "LABEL_FIELD and ITEM_ID_FIELD are both item_id"),
    "no name": ("BPR", {"USER_ID_FIELD": " "}, "USER_ID_FIELD is ' ': choose a word"),
    "no folder": ("BPR", {"checkpoint_dir": ""}, "checkpoint_dir is '': choose a word"),
    "no separator": ("BPR", {"seq_separator": ""}, "seq_separator is '': choose what stands between"),
    "saved loaders by number": ("BPR", {"save_dataloaders": 0}, "save_dataloaders is 0: choose False"),
    "GPU of that number": ("BPR", {"gpu_id": 2**31}, "gpu_id is 2147483648: choose numbers such as"),
    "GPUs": ("BPR", {"gpu_id": "0;1"}, "gpu_id is '0;1': choose numbers such as"),
    "no features": ("BPR", {"numerical_features": None}, "numerical_features is None: choose a list"),
    "no threshold": ("BPR", {"threshold": {}}, "threshold is {}: choose a dict of one column"),
    "no epsilon": ("SASRec", {"layer_norm_eps": 0}, "layer_norm_eps is 0: choose a number above 0 to 1"),
    "none of them": (
        "BPR",
        {"train_neg_sample_args": {"sample_num": "none"}},
        "sample_num of train_neg_sample_args is none",
    ),
    "pairs": ("BPR", {"train_neg_sample_args": None}, "BPR compares items with negatives"),
    "huge and of no schema": ("BPR", {"depth": 10**400}, "depth is an integer of more than 64 bits"),
    "layers of NARM": ("NARM", {"n_layers": 0}, "n_layers is 0: choose a whole number from 1"),
    "size of BPR": ("BPR", {"embedding_size": "a b"}, "embedding_size is 'a b': choose a whole number from 1"),
    "dropout of BERT4Rec": ("BERT4Rec", {"hidden_dropout_prob": 1}, "hidden_dropout_prob is 1: choose a number from 0"),
    "initial weights": ("SASRec", {"initializer_range": 1e-320}, "initializer_range is 1e-320: choose a number from"),
    "decay": ("BPR", {"weight_decay": 1e308}, "weight_decay is 1e\\+308: choose a number from 0 to 1000"),
    "loss of NARM": ("NARM", {"loss_type": "softmax"}, "loss_type is 'softmax': choose one of CE, BPR"),
    "a list for a loss": ("GRU4Rec", {"loss_type": [None]}, r"loss_type is \[None\]: choose one of CE, BPR"),
    # What nobody would look at.
    "transform": ("STARRec", {"transform": "crop_itemseq"}, "STARRec reads no transform: leave it out"),
    "transform of rows": (
        "STARRec",
        {"transform": "mask_itemseq", "train_mode": "prefix"},
        "STARRec reads no transform",
    ),
    "transform of BERT4Rec": ("BERT4Rec", {"transform": "crop_itemseq"}, "BERT4Rec reads transform mask_itemseq alone"),
    "loss of BPR": ("BPR", {"loss_type": "CE"}, "BPR reads no loss_type: leave it out"),
    "a number for a switch": ("BPR", {"exclude_history": 0}, "BPR reads no exclude_history: leave it out"),
    "smoothing": ("SASRec", {"label_smoothing": 0.1}, "SASRec reads no label_smoothing: leave it out"),
    "temperature": ("BPR", {"temperature": 0.1}, "BPR reads no temperature: leave it out"),
    "time gaps": ("SASRec", {"use_time_gaps": True}, "SASRec reads no use_time_gaps: leave it out"),
    "time of the request": ("SASRec", {"request_time": "known"}, "SASRec reads no request_time: leave it out"),
    "time that nobody reads": ("Mamba4Rec", {"request_time": "known"}, "Mamba4Rec, as it is set, does not read it"),
    "schedule": ("S3Rec", {"lr_scheduler_type": "cosine"}, "S3Rec reads no lr_scheduler_type: leave it out"),
    "time order": ("SASRec", {"time_order": "exact"}, "time_order: exact goes with train_mode: sequence"),
    "classes of BPR": ("STARRec", {"allow_repeats": False, "loss_type": "BPR"}, "choose loss_type CE .it is BPR"),
    "repeats": ("SASRec", {"allow_repeats": False}, "SASRec reads no allow_repeats: leave it out"),
    "smoothing with BPR": ("STARRec", {"label_smoothing": 0.1, "loss_type": "BPR"}, "0 for other losses than CE"),
}


@pytest.mark.parametrize(("model", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_loaded(model, settings, message):
    with pytest.raises(UserError, match=message) as refusal:
        Config(model, "mine", config_dict=settings)  # of which there are no data
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).endswith(".") or str(refusal.value).endswith("?")


ACCEPTED = {
    "numbers of NumPy": (
        "STARRec",
        {"hidden_size": np.int64(16), "dropout_prob": np.float64(0.1), "topk": [np.int64(10)]},
    ),
    "a path": ("STARRec", {"data_path": Path("dataset")}),
    "whole number for a number": ("STARRec", {"dropout_prob": 0, "learning_rate": 1}),
    "capitals": ("BPR", {"learner": "Adam", "state": "Warning", "metrics": ["ndcg"], "valid_metric": "NDCG@10"}),
    "GPUs": ("BPR", {"gpu_id": (0, 1)}),
    "GPUs by name": ("BPR", {"gpu_id": "0, GPU-3a-4f"}),
    "no GPU": ("BPR", {"gpu_id": -1}),
    "less is better": (
        "BPR",
        {
            "metrics": ["LogLoss"],
            "valid_metric": "LogLoss",
            "valid_metric_bigger": False,
            "eval_args": {"mode": "uni9"},
        },
    ),
    "one metric": ("STARRec", {"metrics": "NDCG", "topk": 10}),
    "of a whole list": ("STARRec", {"metrics": ["GAUC"], "valid_metric": "gauc"}),
    "of scores": ("SASRec", {"metrics": ["AUC"], "valid_metric": "AUC", "eval_args": {"mode": "uni100"}}),
    "neutral": ("BPR", {"label_smoothing": 0.0, "temperature": None, "lr_scheduler_type": "cosine"}),
    "own temperature": ("CORE", {"temperature": 0.1}),
    "own transform": ("BERT4Rec", {"transform": "mask_itemseq"}),
    "split by time": ("STARRec", {"eval_args": {"split": {"RS": [8, 1, 1]}, "group_by": "none"}}),
    "graphs": ("STARRec", {"cuda_graphs": False}),
}


@pytest.mark.parametrize(("model", "settings"), ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(model, settings):
    Config(model, "mine", config_dict=settings)


@pytest.mark.parametrize("model", ["BPR", type("Mine", (BPR,), {})])
def test_settings_of_other_models_stay_free_and_are_told_of(model, caplog):
    assert Config(model, "mine", config_dict={"depth": -1})["depth"] == -1
    assert "depth stands in no property file" in caplog.text


READ_BY_OTHERS = {
    "histories": ("BPR", {"MAX_ITEM_LIST_LENGTH": 5}),
    "graphs": ("STARRec", {"alias_of_entity_id": ["x"]}),
    "powers": ("SASRec", {"require_pow": True}),
    "nobody": ("SASRec", {"POSITION_FIELD": "place"}),
}


@pytest.mark.parametrize(("model", "settings"), READ_BY_OTHERS.values(), ids=READ_BY_OTHERS)
def test_common_settings_that_a_model_does_not_read_are_told_of(model, settings, caplog):
    Config(model, "mine", config_dict=settings)
    assert f"{next(iter(settings))} is " in caplog.text
    assert f"which {model} does not read" in caplog.text


def test_common_settings_that_a_model_reads_are_not_told_of(caplog):
    Config("LightGCN", "mine", config_dict={"require_pow": True})
    Config("SASRec", "mine", config_dict={"MAX_ITEM_LIST_LENGTH": 5})
    assert not caplog.text


COLUMNS = {
    "unused table": ({"unused_col": {"item": ["x"]}}, "unused_col names the suffix 'item', of which no file is read"),
    "features": ({"additional_feat_suffix": ["x"]}, r"additional_feat_suffix: \['x'\]"),
    "saved": ({"dataset_save_path": "x.pth"}, "dataset_save_path is x.pth, and there is no such file"),
    "parts": ({"benchmark_filename": ["a", "b", "c"]}, "or change benchmark_filename"),
    "separator": ({"field_separator": "::"}, r"separated by '::' \(field_separator\)"),
    "time": ({"threshold": {"timestamp": 3}}, "threshold: {'timestamp': 3}"),
}


@pytest.mark.parametrize(("settings", "message"), COLUMNS.values(), ids=COLUMNS)
def test_settings_that_do_not_fit_the_files_are_named(settings, message):
    write_dataset("tiny", random_rows())
    with pytest.raises(UserError, match=message) as refusal:
        build("Mamba4Rec", **settings)
    assert "\n" not in str(refusal.value)


def test_columns_that_are_not_there_are_told_of(caplog):
    write_dataset("tiny", random_rows())
    names = {"inter": ["user_id", "item_id", "timestamp", "x"], "item": "*"}
    create_dataset(small_config("Mamba4Rec", load_col=names, seq_len={"item_id": 3}, state="WARNING"))
    for words in (
        "load_col names x, which the .inter",
        "suffix 'item', of which",
        "seq_len names item_id, which is no",
    ):
        assert words in caplog.text


@pytest.mark.parametrize("settings", [{"n_experts": 1}, {"experts_per_token": 1}], ids=str)
def test_a_single_expert_trains(settings):
    """It is like no other, so that the diversity term is a constant, which has no gradient."""
    write_dataset("tiny", random_rows())
    assert train_and_test(small_config("STARRec", epochs=1, **settings)).result["test_result"]


@pytest.mark.parametrize("dataset", ["ml-100k", "mine"])
@pytest.mark.parametrize("loss_type", ["BPR", "CE"])
def test_negatives_follow_the_final_loss(dataset, loss_type, monkeypatch):
    """A property file's may have been written for another loss, as those that SASRec was tuned to are."""
    monkeypatch.setattr(sys, "argv", ["run_recbole", f"--loss_type={loss_type}"])
    negatives = Config("SASRec", dataset)["train_neg_sample_args"]
    assert negatives["distribution"] == ("uniform" if loss_type == "BPR" else "none")


def test_another_loss_trains():
    write_dataset("tiny", random_rows())
    settings = {"loss_type": "BPR", "train_mode": "sequence", "epochs": 1, "n_layers": 1, "hidden_size": 8}
    config = Config(
        "SASRec", "tiny", config_dict={"data_path": "dataset", "state": "ERROR", "show_progress": False, **settings}
    )
    assert train_and_test(config).result["test_result"]


def test_a_list_longer_than_the_catalogue_is_refused_before_the_first_epoch():
    write_dataset("tiny", random_rows(items=30))
    config = small_config("Mamba4Rec", topk=[5, 32], valid_metric="NDCG@5")
    dataset = create_dataset(config)
    with pytest.raises(UserError, match=r"topk is \[5, 32\], but tiny has 30 items"):
        load_data(config, dataset)
    build("Mamba4Rec", topk=[5, 30], valid_metric="NDCG@5")


def test_without_gpu_means_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = Config("BPR", "mine", config_dict={"use_gpu": False})
    assert config["device"].type == "cpu"
    assert Config("BPR", "mine")["device"].type == "cuda"


@pytest.fixture
def checkpoint():
    write_dataset("tiny", random_rows())
    return train_and_test(small_config("STARRec", epochs=1)).checkpoint


def test_what_a_trained_model_is_cannot_be_changed(checkpoint, monkeypatch, capsys):
    for key, value in {"hidden_size": 32, "n_heads": 1, "temperature": 0.1, "use_moe": False}.items():
        with pytest.raises(UserError, match=f"{key} is .* in the checkpoint's model"):
            config_of(checkpoint, {key: value})
    monkeypatch.setattr(sys, "argv", ["run_recbole", "--mode=evaluate", "--checkpoint", checkpoint, "--hidden_size=32"])
    assert main() == 2
    assert "hidden_size is 16 in the checkpoint's model" in capsys.readouterr().err
    with pytest.raises(UserError, match="eval_batch_size is 0"):
        config_of(checkpoint, {"eval_batch_size": 0})
    run = evaluate(checkpoint, {"hidden_size": 16, "eval_batch_size": 7, "topk": [10, 5]})
    assert run.result["test_result"]


def test_a_resumed_run_can_take_another_loss(checkpoint):
    assert config_of(checkpoint, {"loss_type": "BPR"})["train_neg_sample_args"]["sample_num"] == 1


def test_flags_given_twice(monkeypatch, capsys):
    """Of one value they are no error, nor where they are a script's own."""
    monkeypatch.setattr(sys, "argv", ["script.py", "--epochs=3", "--epochs=3", "--tag=a", "--tag=b", "--x", "1", "-v"])
    assert Config("STARRec", "mine")["epochs"] == 3
    assert Config("BPR", "mine")["epochs"] == 3
    monkeypatch.setattr(sys, "argv", ["script.py", "--epochs=3", "--epochs=4"])
    for model in ("STARRec", "BPR"):
        with pytest.raises(UserError, match="--epochs is given twice, as 3 and as 4"):
            Config(model, "mine")
    monkeypatch.setattr(sys, "argv", ["run_recbole", "--resume", "x.pth", "--epochs=3", "--epochs=4"])
    assert main() == 2
    assert "--epochs is given twice, as 3 and as 4." in capsys.readouterr().err


BROKEN = {
    "unclosed": b"epochs: [1\n",
    "not UTF-8": "user: größe\n".encode("latin-1"),
    "UTF-16": "epochs: 3\n".encode("utf-16"),
    "a list": b"- epochs\n",
    "a number as key": b"3: 4\n",
    "deep": b"a: " + b"[" * 5000,
    "a control character": b"a: \x00\n",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_config_file_is_one_sentence(content, monkeypatch, capsys):
    Path("x.yaml").write_bytes(content)
    for model in ("STARRec", "BPR"):
        with pytest.raises(UserError, match=r"^config file x\.yaml (cannot be read|should hold lines of key: value)"):
            Config(model, "mine", ["x.yaml"])
    monkeypatch.setattr(sys, "argv", ["run_recbole", "--config_files=x.yaml"])
    assert main() == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_bounds_are_those_of_the_ops():
    fields = (schema.model_fields.get("d_conv") for schema in ours().values())
    assert {allowed(field) for field in fields if field is not None} == {f"a whole number from 1 to {LONGEST_FILTER}"}


def test_every_model_of_ours_has_a_schema():
    assert list(ours()) == list(MODELS)


def test_defaults_are_recboles():
    """The schema says what RecBole's own property files do."""
    import recbole

    from recbole_ssm.settings.models import GRU4Rec, SASRec
    from recbole_ssm.settings.parts import EvalArgs, NegativeSampling
    from recbole_ssm.settings.schema import Common

    folder = Path(recbole.__file__).parent / "properties"
    loader = Config("BPR", "mine").yaml_loader

    def read(file):
        return yaml.load((folder / file).read_text(), Loader=loader)

    for schema, files in (
        (Common, ["overall.yaml", "dataset/sample.yaml"]),
        (SASRec, ["model/SASRec.yaml"]),
        (GRU4Rec, ["model/GRU4Rec.yaml"]),
    ):
        for file in files:
            for key, value in read(file).items():
                if key in schema.model_fields:
                    default = schema.model_fields[key].default
                    if isinstance(default, EvalArgs | NegativeSampling):
                        default = default.model_dump(exclude_none=True)
                    assert default == value, key
