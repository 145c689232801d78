"""Checkpoints: safe to load, whole or absent, and resumed bit for bit."""

import os
import pickle
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import recbole
import scipy.sparse
import torch

from recbole_ssm import Config, UserError, load_data_and_model, run_recbole
from recbole_ssm.checkpoint import load_checkpoint, random_state, save_checkpoint, set_random_state
from recbole_ssm.errors import CannotWrite
from recbole_ssm.quick_start import config_of, evaluate, train_and_test
from recbole_ssm.registry import MODELS
from recbole_ssm.trainer import get_trainer

from .conftest import Trap, random_rows, small_config, small_settings, write_dataset


def test_round_trip():
    state = {
        "tensor": torch.arange(3), "array": np.arange(4.0), "nested": {"pair": (1, "two"), "none": None},
        "matrix": scipy.sparse.csr_matrix([[0, 2.5], [1, 0]]), "scalar": np.float64(0.5), 7: [True],
        "module": torch.nn.Linear(2, 2),
    }  # fmt: skip
    save_checkpoint("x.pth", state)
    loaded = load_checkpoint("x.pth")
    assert torch.equal(loaded["tensor"], state["tensor"])
    assert (loaded["array"] == state["array"]).all()
    assert loaded["nested"] == state["nested"]
    assert loaded["matrix"].format == "csr"
    assert (loaded["matrix"] != state["matrix"]).nnz == 0
    assert loaded["scalar"] == 0.5
    assert loaded[7] == [True]
    assert "module" not in loaded


def test_a_strangers_checkpoint_runs_no_code():
    torch.save({"format": "recbole_ssm checkpoint 1", "config": Trap()}, "trap.pth")
    with pytest.raises(UserError, match="could run code"):
        load_checkpoint("trap.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError):
        load_checkpoint("plain.pth")
    assert not Path("trap").exists()


def test_files_that_are_no_checkpoint():
    save_checkpoint("x.pth", {"tensor": torch.arange(1000)})
    whole = Path("x.pth").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        Path("cut.pth").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.pth is damaged or no checkpoint at all"):
            load_checkpoint("cut.pth")
    Path("page.pth").write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"page\.pth is damaged or no checkpoint at all"):
        load_checkpoint("page.pth")
    torch.save({"state_dict": {}}, "foreign.pth")
    with pytest.raises(UserError, match="no checkpoint of this version"):
        load_checkpoint("foreign.pth")
    with pytest.raises(UserError, match=r"nowhere\.pth not found"):
        load_checkpoint("nowhere.pth")


def test_a_failed_write_leaves_the_last_good_file(monkeypatch):
    save_checkpoint("x.pth", {"epoch": 1})

    def dying(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", dying)
    with pytest.raises(CannotWrite, match=r"x\.pth cannot be written \(disk full\): make room there"):
        save_checkpoint("x.pth", {"epoch": 2})
    assert load_checkpoint("x.pth")["epoch"] == 1
    assert [path.name for path in Path().iterdir()] == ["x.pth"]


def test_random_state_round_trip():
    save_checkpoint("x.pth", random_state())
    drawn = (random.random(), np.random.rand(), torch.rand(1).item())
    set_random_state(load_checkpoint("x.pth"))
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())


@pytest.mark.parametrize("name", [*MODELS, "SASRec", "BPR"])
def test_resume_is_bit_for_bit(name):
    """Four epochs in one go, and two, then two more from the checkpoint: the same weights, scores and file."""
    write_dataset("tiny", random_rows())
    loss = {"loss_type": "BPR"} if name in MODELS else {}
    settings = {"checkpoint_dir": "whole", "epochs": 4, **loss}
    whole = train_and_test(make_config(name, settings))
    parts = train_and_test(make_config(name, {**settings, "checkpoint_dir": "parts", "epochs": 2}))
    config = config_of(parts.checkpoint, {"epochs": 4})
    resumed = train_and_test(config, resume_file=parts.checkpoint)
    assert resumed.checkpoint == parts.checkpoint
    assert resumed.best_epoch == whole.best_epoch
    assert resumed.result == whole.result
    one, two = load_checkpoint(whole.checkpoint), load_checkpoint(resumed.checkpoint)
    for key in ("epoch", "best_valid_score", "best_valid_result"):
        assert one[key] == two[key]
    assert one["resume"]["epoch"] == two["resume"]["epoch"] == 3
    assert one["resume"]["cur_step"] == two["resume"]["cur_step"]
    for part in (lambda state: state["state_dict"], lambda state: state["resume"]["state_dict"]):
        for parameter, value in part(one).items():
            assert torch.equal(value, part(two)[parameter]), parameter
    moments = [state["resume"]["optimizer"]["state"] for state in (one, two)]
    for index, moment in moments[0].items():
        for key, value in moment.items():
            assert torch.equal(value, moments[1][index][key])


@pytest.mark.parametrize("learner", ["adam", "adamw", "sgd", "adagrad", "rmsprop"])
def test_every_learner_resumes(learner):
    write_dataset("tiny", random_rows())
    settings = {"learner": learner, "weight_decay": 0.01, "clip_grad_norm": {"max_norm": 1.0}}
    whole = train_and_test(small_config("Mamba4Rec", epochs=2, checkpoint_dir="whole", **settings))
    first = train_and_test(small_config("Mamba4Rec", epochs=1, checkpoint_dir="parts", **settings))
    resumed = train_and_test(config_of(first.checkpoint, {"epochs": 2}), resume_file=first.checkpoint)
    assert resumed.result == whole.result


def make_config(name, settings):
    if name in MODELS:
        return small_config(name, **settings)
    quiet = {"state": "ERROR", "show_progress": False, "data_path": "dataset", "hidden_size": 16}
    return Config(name, "tiny", config_dict={**quiet, **settings})


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_file_holds_the_best_epochs_own_result(epochs):
    write_dataset("tiny", random_rows())
    # A metric that needs statistics of the training set; RecBole 1.2.1 cannot compute these (it calls int.cpu()).
    metrics = ["NDCG", "ItemCoverage"] if recbole.__version__ == "1.2.0" else ["NDCG"]
    settings = {"epochs": epochs, "metrics": metrics, "learning_rate": 0.01}
    run = train_and_test(small_config("Mamba4Rec", **settings))
    state = load_checkpoint(run.checkpoint)
    assert state["best_valid_result"] == run.result["best_valid_result"]
    assert state["best_valid_score"] == state["best_valid_result"]["ndcg@10"]
    again = train_and_test(config_of(run.checkpoint), resume_file=run.checkpoint)
    assert again.result == run.result


def test_files_without_a_run_to_continue():
    write_dataset("tiny", random_rows())
    run = train_and_test(small_config("Mamba4Rec", epochs=1))
    state = load_checkpoint(run.checkpoint)
    del state["resume"], state["format"]
    save_checkpoint("model.pth", state)
    with pytest.raises(UserError, match="holds a model, but no run that could be continued"):
        train_and_test(config_of("model.pth"), resume_file="model.pth")
    save_checkpoint("bare.pth", {"state_dict": state["state_dict"]})
    with pytest.raises(UserError, match="does not say what it was trained with"):
        config_of("bare.pth")


def test_trainers_that_keep_more_state_refuse_to_resume():
    write_dataset("tiny", random_rows())
    settings = {"state": "ERROR", "show_progress": False, "data_path": "dataset", "epochs": 1}
    run = train_and_test(Config("RecVAE", "tiny", config_dict=settings))
    with pytest.raises(UserError, match="RecVAETrainer of RecVAE keeps state that a checkpoint does not hold"):
        train_and_test(config_of(run.checkpoint, {"epochs": 2}), resume_file=run.checkpoint)


def test_a_checkpoints_configuration_is_its_own(monkeypatch):
    """A script's flags, and a dataset whose name reads like a number, change nothing."""
    write_dataset("2019", random_rows())
    run = train_and_test(small_config("Mamba4Rec", "2019", epochs=1))
    monkeypatch.setattr(sys, "argv", ["serve.py", "--num_layers=2", "--hidden_size=99"])
    config, model, *_ = load_data_and_model(run.checkpoint)
    assert (config["dataset"], config["hidden_size"], len(model.mamba_layers)) == ("2019", 16, 1)


def test_a_file_is_as_readable_as_any_other():
    save_checkpoint("x.pth", {})
    Path("plain").touch()
    assert Path("x.pth").stat().st_mode == Path("plain").stat().st_mode


def test_a_run_that_had_ended_is_not_trained_further():
    write_dataset("tiny", random_rows())
    first = train_and_test(small_config("Mamba4Rec", epochs=2))
    before = Path(first.checkpoint).read_bytes()
    again = train_and_test(config_of(first.checkpoint), resume_file=first.checkpoint)
    assert again.result == first.result
    assert Path(first.checkpoint).read_bytes() == before


@pytest.mark.parametrize("name", MODELS)
def test_load_data_and_model_and_evaluate(name):
    write_dataset("tiny", random_rows())
    run = train_and_test(small_config(name, epochs=2))
    config, model, dataset, train_data, _, test_data = load_data_and_model(run.checkpoint)
    assert config["model"] == name
    assert dataset.item_num == model.n_items
    assert len(train_data) > 0
    best = load_checkpoint(run.checkpoint)["state_dict"]
    for parameter, value in model.state_dict().items():
        assert torch.equal(value, best[parameter])
    again = evaluate(run.checkpoint)
    assert again.result["test_result"] == run.result["test_result"]
    assert again.result["best_valid_result"] == run.result["best_valid_result"]
    assert test_data is not None


def test_items_that_training_did_not_see_are_named():
    write_dataset("tiny", random_rows(items=20))
    run = train_and_test(small_config("Mamba4Rec", epochs=1))
    write_dataset("tiny", random_rows(items=23))
    with pytest.raises(UserError, match=r"does not know 3 item_id of the files, such as 'i2[012]'"):
        load_data_and_model(run.checkpoint)
    with pytest.raises(UserError, match=r"does not know 3 item_id of the files, such as 'i2[012]'"):
        train_and_test(config_of(run.checkpoint, {"epochs": 2}), resume_file=run.checkpoint)


def test_recbole_checkpoints_are_refused_in_words():
    config = small_config("Mamba4Rec")
    torch.save({"config": config, "state_dict": {}}, "recbole.pth")
    with pytest.raises(UserError, match="RecBole's own checkpoints do"):
        load_data_and_model("recbole.pth")
    torch.save({"config": config, "state_dict": {}}, "as_recbole_does.pth", pickle_protocol=4)
    with pytest.raises(UserError, match="RecBole's own checkpoints do"):
        load_data_and_model("as_recbole_does.pth")


def test_nan_loss_keeps_the_last_epoch():
    write_dataset("tiny", random_rows())
    first = train_and_test(small_config("Mamba4Rec", epochs=1))
    message = (
        r"became infinite or NaN in epoch \d; epochs up to \d are kept in .*Lower the learning rate \(now 1e\+30\)"
    )
    with pytest.raises(UserError, match=message):
        train_and_test(config_of(first.checkpoint, {"epochs": 9, "learning_rate": 1e30}), resume_file=first.checkpoint)
    for value in load_checkpoint(first.checkpoint)["state_dict"].values():
        assert value.isfinite().all()


def test_resume_follows_new_settings():
    write_dataset("tiny", random_rows())
    first = train_and_test(small_config("Mamba4Rec", epochs=1))
    config = config_of(first.checkpoint, {"epochs": 2, "learning_rate": 0.5})
    again = train_and_test(config, resume_file=first.checkpoint)
    (group,) = load_checkpoint(again.checkpoint)["resume"]["optimizer"]["param_groups"]
    assert group["lr"] == 0.5
    with pytest.raises(UserError, match="was trained with learner adam, whose state sgd cannot take over"):
        train_and_test(config_of(first.checkpoint, {"learner": "sgd"}), resume_file=first.checkpoint)
    with pytest.raises(UserError, match=r"was trained with weight_decay 0.*: leave --weight_decay out"):
        train_and_test(config_of(first.checkpoint, {"weight_decay": 0.1}), resume_file=first.checkpoint)


@pytest.mark.parametrize(("before", "after"), [(0, 0.5), (0.5, 0)])
def test_an_average_can_begin_or_end_where_a_run_is_resumed(before, after):
    write_dataset("tiny", random_rows())
    first = train_and_test(small_config("Mamba4Rec", epochs=1, ema_decay=before))
    again = train_and_test(config_of(first.checkpoint, {"epochs": 2, "ema_decay": after}), resume_file=first.checkpoint)
    assert ("average" in load_checkpoint(again.checkpoint)["resume"]) == bool(after)


def test_a_killed_run_resumes(tmp_path):
    """SIGKILL while it trains: the file is whole, and the resumed run ends like one that was never killed."""
    write_dataset("tiny", random_rows())
    settings = [f"--{key}={value}" for key, value in small_settings("Mamba4Rec").items()]
    command = [sys.executable, "-m", "recbole_ssm", "--model=Mamba4Rec", "--dataset=tiny", "--show_progress=False"]
    command += [*settings, "--stopping_step=1000"]
    process = subprocess.Popen(
        [*command, "--epochs=100000"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=tmp_path
    )
    for line in process.stderr:
        if "epoch 5 training" in line:
            process.kill()
            break
    process.stderr.read()
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL
    (killed,) = Path("saved").glob("*.pth")
    epochs = load_checkpoint(killed)["resume"]["epoch"] + 4
    resumed = train_and_test(config_of(str(killed), {"epochs": epochs}), resume_file=str(killed))
    whole = train_and_test(config_of(str(killed), {"epochs": epochs, "checkpoint_dir": "whole"}))
    assert resumed.result == whole.result


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_says_how_to_go_on(tmp_path):
    write_dataset("tiny", random_rows())
    settings = [f"--{key}={value}" for key, value in small_settings("Mamba4Rec").items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "recbole_ssm", "-m", "Mamba4Rec", "-d", "tiny", "--show_progress=False", *settings,
         "--epochs=100000", "--stopping_step=100000"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=tmp_path,
        # Where these tests are a background job, whatever they start ignores SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    for line in process.stderr:
        if "epoch 3 training" in line:
            process.send_signal(signal.SIGINT)
            break
    *_, last = process.stderr.read().splitlines()
    process.stderr.close()
    assert process.wait() == 130
    said = re.fullmatch(
        r"run_recbole: interrupted in epoch \d+; epochs up to \d+ are kept in (\S+); "
        r"continue with: run_recbole --resume (\S+)", last,
    )  # fmt: skip
    assert said, last
    assert Path(said[1]).is_file()


def test_saved_false_writes_nothing():
    write_dataset("tiny", random_rows())
    settings = {**small_settings("Mamba4Rec"), "epochs": 1, "state": "ERROR", "show_progress": False}
    result = run_recbole("Mamba4Rec", "tiny", config_dict=settings, saved=False)
    assert result["test_result"]["ndcg@10"] >= 0
    assert not list(Path("saved").glob("*"))


@pytest.mark.parametrize("more", [{"lr_scheduler_type": "cosine", "warmup_ratio": 0.3}, {"ema_decay": 0.9}])
def test_a_run_goes_on_where_it_was(more):
    """Interrupted after two of four epochs, of a cosine or an average: the same weights as in one go."""
    write_dataset("tiny", random_rows())
    settings = {"epochs": 4, "learning_rate": 0.01, **more}
    whole = train_and_test(small_config("Mamba4Rec", checkpoint_dir="whole", **settings))

    def interrupt(epoch, _score):
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_and_test(small_config("Mamba4Rec", checkpoint_dir="parts", **settings), callback_fn=interrupt)
    (file,) = map(str, Path("parts").glob("*.pth"))
    resumed = train_and_test(config_of(file), resume_file=file)
    assert resumed.result == whole.result
    ended, again = load_checkpoint(whole.checkpoint), load_checkpoint(file)
    for parts in ((ended["resume"], again["resume"]), (ended, again)):
        for parameter, value in parts[0]["state_dict"].items():
            assert torch.equal(value, parts[1]["state_dict"][parameter])


def test_an_average_is_judged_anew_by_a_model_that_keeps_what_it_made_of_its_weights():
    """LightGCN, which propagates its embeddings once and keeps them until it trains again."""
    write_dataset("tiny", random_rows())
    settings = {"epochs": 3, "learning_rate": 0.05, "ema_decay": 0.5, "show_progress": False, "state": "ERROR"}
    run = train_and_test(Config("LightGCN", "tiny", config_dict=settings))
    assert run.best_epoch > 0
    config, model, _, _, valid_data, _ = load_data_and_model(run.checkpoint)
    model.restore_user_e = model.restore_item_e = None  # made of these weights now
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    assert trainer.evaluate(valid_data, load_best_model=False) == run.result["best_valid_result"]


def test_a_part_of_eval_args_keeps_the_checkpoints_split():
    write_dataset("tiny", random_rows())
    split = {"split": {"RS": [0.6, 0.2, 0.2]}, "order": "TO", "mode": "full"}
    run = train_and_test(small_config("Mamba4Rec", epochs=1, eval_args=split))
    config = config_of(run.checkpoint, {"eval_args": {"mode": "uni10"}})
    assert config["eval_args"]["split"] == {"RS": [0.6, 0.2, 0.2]}
    assert config["eval_args"]["mode"] == {"valid": "uni10", "test": "uni10"}
