"""Files that a stranger made: none of them runs code, corrupts memory, is followed elsewhere or writes into a log."""

import os
import pickle
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_ssm import Config, UserError
from recbole_ssm import checkpoint as checkpoint_module
from recbole_ssm.checkpoint import load_checkpoint, save_checkpoint, set_random_state
from recbole_ssm.cli.run_recbole import main
from recbole_ssm.quick_start import config_of, evaluate, train_and_test
from recbole_ssm.trainer import SequenceTrainer

from .conftest import Trap, random_rows, small_config, write_dataset

CODE = "__import__('pathlib').Path('trap').touch()"


@pytest.fixture
def checkpoint():
    """The file of a small run, with an own digest whatever is changed in it."""
    write_dataset("tiny", random_rows())
    return train_and_test(small_config("Mamba4Rec", epochs=1)).checkpoint


def changed(file, change):
    state = load_checkpoint(file)
    change(state)
    save_checkpoint("changed.pth", state)
    return "changed.pth"


@pytest.mark.parametrize("source", ["dict", "yaml", "checkpoint"])
def test_a_model_of_recboles_evaluates_no_setting(source, checkpoint):
    settings = {"model": "KD_DAGFM", "dataset": "tiny", "teacher": CODE, "data_path": "dataset", "state": "ERROR"}
    Path("x.yaml").write_text("".join(f'{key}: "{value}"\n' for key, value in settings.items()))
    ways = {
        "dict": lambda: Config(config_dict=settings),
        "yaml": lambda: Config(config_file_list=["x.yaml"]),
        "checkpoint": lambda: evaluate(changed(checkpoint, lambda state: state.update(config=settings))),
    }
    with pytest.raises(UserError, match="choose one of CrossNet, CIN"):
        ways[source]()
    assert not Path("trap").exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [trap]", "!!python/name:os.mkdir ''", "{"])
def test_a_yaml_file_makes_no_objects(tag, monkeypatch, capsys):
    Path("x.yaml").write_text(f"model: Mamba4Rec\nseed: {tag}\n")
    with pytest.raises(UserError, match=r"config file x\.yaml cannot be read: "):
        Config("Mamba4Rec", "tiny", ["x.yaml"])
    monkeypatch.setattr(sys, "argv", ["run_recbole", "--config_files=x.yaml"])
    assert main() == 2
    assert capsys.readouterr().err.startswith("run_recbole: config file x.yaml cannot be read")
    assert not Path("trap").exists()


def test_files_that_a_checkpoint_names_are_not_followed(checkpoint):
    Path("elsewhere").mkdir()
    Path("elsewhere/x.pth").write_bytes(pickle.dumps(Trap()))
    names = {"checkpoint_dir": "elsewhere/deep", "save_dataset": True, "gpu_id": "7"}
    names |= dict.fromkeys(("dataset_save_path", "dataloaders_save_path", "pre_model_path"), "elsewhere/x.pth")
    file = changed(checkpoint, lambda state: state["config"].update(names))
    config = config_of(file)
    assert not {key for key, value in names.items() if config[key] == value}
    assert evaluate(file).result["test_result"] == evaluate(checkpoint).result["test_result"]
    assert [path.name for path in Path("elsewhere").iterdir()] == ["x.pth"]
    assert not Path("trap").exists()


def test_an_array_of_objects_beside_the_data_is_refused():
    write_dataset("tiny", random_rows())
    np.save("dataset/tiny/item_emb.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    settings = {"data_path": "dataset", "state": "ERROR", "show_progress": False, "n_cate": 2, "epochs": 1}
    with pytest.raises(UserError, match=r"item_emb\.npy is no array of plain numbers"):
        train_and_test(Config("LDiffRec", "tiny", config_dict=settings))
    assert not Path("trap").exists()


def resume(file):
    return train_and_test(config_of(file, {"epochs": 2}), resume_file=file)


def moments(state):
    return state["resume"]["optimizer"]["state"][0]


STATES = {
    "three elements for many": lambda s: moments(s).update(exp_avg_sq=torch.zeros(3)),
    "another type": lambda s: moments(s).update(exp_avg=moments(s)["exp_avg"].double()),
    "no tensor": lambda s: moments(s).update(step="many"),
    "a sparse one": lambda s: moments(s).update(exp_avg=moments(s)["exp_avg"].to_sparse()),
    "one too many": lambda s: moments(s).update(max_exp_avg_sq=moments(s)["exp_avg"]),
    "one too few": lambda s: moments(s).pop("exp_avg"),
    "infinite": lambda s: moments(s)["exp_avg_sq"].fill_(torch.inf),
    "an unknown parameter": lambda s: s["resume"]["optimizer"]["state"].update({99: moments(s)}),
    "other groups": lambda s: s["resume"]["optimizer"]["param_groups"][0].update(params=[0]),
    "no groups": lambda s: s["resume"]["optimizer"].update(param_groups=[]),
    "no optimizer": lambda s: s["resume"].update(optimizer=None),
    "weights of another shape": lambda s: s["resume"]["state_dict"].update({"item_embedding.weight": torch.ones(2, 2)}),
    "best weights that are NaN": lambda s: s["state_dict"]["item_embedding.weight"].fill_(torch.nan),
    "weights of another type": lambda s: s["state_dict"].update(
        {"item_embedding.weight": s["state_dict"]["item_embedding.weight"].half()}
    ),
    "weights that are none": lambda s: s["state_dict"].update({"item_embedding.weight": [1.0]}),
    "a weight too many": lambda s: s["state_dict"].update(more=torch.ones(1)),
    "more beside the weights": lambda s: s.update(other_parameter={"forward": 1}),
    "NumPy's place": lambda s: s["resume"]["random"][0].update(
        numpy=("MT19937", s["resume"]["random"][0]["numpy"][1], 10**6, 0, 0.0)
    ),
    "no random state": lambda s: s["resume"]["random"][0].update(torch=torch.zeros(7, dtype=torch.uint8)),
    "another loader": lambda s: s["resume"].update(loader=torch.zeros(7, dtype=torch.uint8)),
    "an epoch that is a word": lambda s: s["resume"].update(epoch="one"),
    "other timings": lambda s: s["resume"].update(timings={"train_seconds": 3}),
    "timings of words": lambda s: s["resume"]["timings"].update(train_seconds=["long"]),
    "timings of several": lambda s: s["resume"]["timings"].update(train_targets=[(1, 2)]),
    "no best score": lambda s: s.pop("best_valid_score"),
    "a vocabulary that repeats": lambda s: s["vocabulary"].update(item_id="i1\ni1"),
    "a vocabulary of numbers": lambda s: s["vocabulary"].update(item_id=7),
    "no vocabulary": lambda s: s.update(vocabulary=None),
    "settings that are tensors": lambda s: s["config"].update(field_separator=[torch.ones(2, 2)]),
    "a seed that is none": lambda s: s["config"].update(seed=[1]),
    "settings that are none": lambda s: s["config"].update(hidden_size=[{"x": None}]),
}


@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
def test_what_is_resumed_is_checked_first(change, checkpoint):
    with pytest.raises(UserError, match=r"changed\.pth") as error:
        resume(changed(checkpoint, change))
    assert "\n" not in str(error.value)
    assert "cannot be used as it is" not in str(error.value), "which is said of what nobody has thought of"


@pytest.mark.parametrize(
    ("epoch", "failure", "raised", "sentence"),
    [
        (1, AttributeError("of nobody's"), UserError, "saved.*cannot be used as it is .*--state=DEBUG shows where"),
        (1, torch.OutOfMemoryError("CUDA out of memory"), UserError, "saved.*takes more memory than there is"),
        (2, AttributeError("of nobody's"), AttributeError, "of nobody's"),
        (2, torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "CUDA out of memory"),
    ],
)
def test_a_file_is_blamed_until_an_epoch_has_been_trained_by_it(
    epoch, failure, raised, sentence, checkpoint, monkeypatch
):
    optimize = SequenceTrainer._optimize

    def failing(self, train_data, epoch_idx, *others):
        if epoch_idx == epoch:
            raise failure
        return optimize(self, train_data, epoch_idx, *others)

    monkeypatch.setattr(SequenceTrainer, "_optimize", failing)
    with pytest.raises(raised, match=sentence):
        train_and_test(config_of(checkpoint, {"epochs": 3}), resume_file=checkpoint)


def test_numpys_generator_reads_no_memory_but_its_own():
    with pytest.raises(UserError, match="no state of the random generators"):
        set_random_state({"python": None, "numpy": ("MT19937", np.zeros(624), 625), "torch": None})


def test_every_flipped_bit_is_noticed(checkpoint):
    whole = Path(checkpoint).read_bytes()
    generator = np.random.default_rng(0)
    for place in [*generator.integers(len(whole), size=300), 0, len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(generator.integers(8))
        Path("flipped.pth").write_bytes(damaged)
        with pytest.raises(UserError, match=r"flipped\.pth"):
            load_checkpoint("flipped.pth")


def test_a_small_file_does_not_grow():
    """A tensor that claims more than it is stored in, and an archive that is compressed."""
    save_checkpoint("x.pth", {"tensor": torch.zeros(1).expand(1 << 40)})
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint("x.pth")


def test_a_tensor_ends_where_its_storage_does():
    """Fused Adam crashed on moments that are all one number, the last of many."""
    stored = torch.arange(100.0)
    save_checkpoint("x.pth", {"turned": stored.reshape(20, 5).T, "column": stored.reshape(20, 5)[:, 4]})
    assert load_checkpoint("x.pth")["turned"].stride() == (1, 5)
    save_checkpoint("x.pth", {"tensor": stored.as_strided((8, 8), (0, 0), 99)})
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint("x.pth")


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc", "a\nb", "a\\b", "C:x"])
def test_names_are_names(name, monkeypatch, capsys):
    with pytest.raises(UserError, match="is no name of a dataset"):
        Config("Mamba4Rec", name)
    monkeypatch.setattr(sys, "argv", ["run_recbole", f"--dataset={name}"])
    assert main() == 2
    assert "is no name of a dataset" in capsys.readouterr().err


def test_a_setting_cannot_write_a_line_of_the_log():
    config = small_config("BPR", note="x\nINFO forged\x1b[2J")
    assert "x\\nINFO forged\\x1b[2J" in str(config)
    assert "\nINFO forged" not in str(config)
    assert config["note"] == "x\nINFO forged\x1b[2J"


@pytest.mark.skipif(os.name == "nt", reason="Windows lets nobody remove an open file")
@pytest.mark.parametrize("written", [b"half", b""])
def test_what_a_killed_save_left_is_swept(written, monkeypatch):
    save_checkpoint("x.pth", {})
    pid = os.fork()
    if pid == 0:

        def die(state, file):
            file.write(written)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        torch.save = die
        save_checkpoint("y.pth", {})
    os.waitpid(pid, 0)
    assert len(list(Path().iterdir())) == 2
    monkeypatch.setattr(checkpoint_module, "SECONDS_TO_LOCK", 0.0)
    save_checkpoint("x.pth", {})
    assert [path.name for path in Path().iterdir()] == ["x.pth"]


def test_what_another_process_writes_is_not_swept():
    handle, name = tempfile.mkstemp(dir=".", prefix=".y.pth.saving-")
    with os.fdopen(handle, "wb") as file:
        assert checkpoint_module.lock(file)
        file.write(b"half")
        file.flush()
        save_checkpoint("x.pth", {})
        assert Path(name).is_file()
