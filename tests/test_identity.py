"""A checkpoint means what it meant: its numbers stand for the same tokens whatever became of the files."""

from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_ssm import Config, UserError, load_data_and_model
from recbole_ssm.checkpoint import FIRST_FORMAT, _encode, load_checkpoint
from recbole_ssm.quick_start import config_of, evaluate, train_and_test

from .conftest import random_rows, small_config, write_dataset


def cycle(users=range(80), items=20, length=15):
    """Users who go through a cycle of items, each from a place of its own: what follows can be learned wholly."""
    return [f"u{user}\ti{(user + step) % items}\t{100 * step}" for user in users for step in range(length)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint that knows the cycle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cycle"))
        write_dataset("tiny", cycle())
        run = train_and_test(small_config("Mamba4Rec", epochs=15, learning_rate=0.02, metrics=["Recall", "NDCG"]))
        assert run.result["test_result"]["recall@10"] == 1
        return Path(run.checkpoint).resolve(), run.result


@pytest.fixture
def checkpoint(trained):
    """A copy of it in the test's own folder."""
    copy = Path("copy.pth")
    copy.write_bytes(trained[0].read_bytes())
    return str(copy)


FILES = {
    "as it was": cycle(),
    "lines shuffled": list(np.random.default_rng(0).permutation(cycle())),
    "users the other way round": cycle(users=range(79, -1, -1)),
    "fewer users": cycle(users=range(7, 80, 3)),
    "fewer users and items": [f"u{user}\ti{5 + user + step}\t{step}" for user in range(2) for step in range(6)],
    "a user who was not there": [*(f"new\ti{step}\t{step}" for step in range(9)), *cycle()],
}


@pytest.mark.parametrize("lines", FILES.values(), ids=FILES)
def test_evaluation_maps_by_token(lines, checkpoint, trained, caplog):
    write_dataset("tiny", lines)
    result = evaluate(checkpoint).result
    assert result["test_result"]["recall@10"] == 1
    same = sorted(lines) == sorted(cycle())
    assert ("the data are not those that copy.pth was trained on" in caplog.text) != same
    if same:
        assert result["test_result"] == trained[1]["test_result"]


def test_ties_in_time_are_ordered_by_the_file(checkpoint, caplog):
    rows = [f"u{user}\ti{(user + step) % 20}\t{100 * (step // 2)}" for user in range(80) for step in range(15)]
    write_dataset("tiny", rows)
    run = train_and_test(small_config("Mamba4Rec", epochs=1))
    evaluate(run.checkpoint)
    assert "the data are not those" not in caplog.text
    write_dataset("tiny", rows[::-1])
    evaluate(run.checkpoint)
    assert "the data are not those" in caplog.text


@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_recboles_models_too(model):
    """Their splits, of the file's order, may change; what a user is recommended may not."""
    write_dataset("tiny", random_rows())
    quiet = {"state": "ERROR", "show_progress": False, "data_path": "dataset", "epochs": 1}

    run = train_and_test(Config(model, "tiny", config_dict=quiet))
    _, before, dataset, *_ = load_data_and_model(run.checkpoint)
    write_dataset("tiny", random_rows()[::-1])
    _, after, moved, *_ = load_data_and_model(run.checkpoint)
    assert list(moved.field2id_token["item_id"]) == list(dataset.field2id_token["item_id"])
    assert moved.field2token_id["user_id"] == dataset.field2token_id["user_id"]
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name])


def test_resuming_maps_by_token():
    """Two epochs, lines shuffled, two more: as four in one go."""
    rows = cycle(users=range(30))
    write_dataset("tiny", rows)
    whole = train_and_test(small_config("Mamba4Rec", epochs=4))
    first = train_and_test(small_config("Mamba4Rec", epochs=2))
    write_dataset("tiny", list(np.random.default_rng(0).permutation(rows)))
    again = train_and_test(config_of(first.checkpoint, {"epochs": 4}), resume_file=first.checkpoint)
    assert again.result == whole.result
    one, two = load_checkpoint(whole.checkpoint), load_checkpoint(first.checkpoint)
    assert one["vocabulary"] == two["vocabulary"]
    for name, value in one["resume"]["state_dict"].items():
        assert torch.equal(value, two["resume"]["state_dict"][name])


def test_a_knowledge_graph_of_other_numbers_is_refused():
    path = write_dataset("tiny", random_rows())
    items = [f"i{number}" for number in range(30)]
    path.with_suffix(".kg").write_text(
        "head_id:token\trelation_id:token\ttail_id:token\n" + "".join(f"e{item}\tmade_by\tm\n" for item in items)
    )
    path.with_suffix(".link").write_text("item_id:token\tentity_id:token\n" + "".join(f"{i}\te{i}\n" for i in items))

    quiet = {"state": "ERROR", "show_progress": False, "data_path": "dataset", "epochs": 1}
    run = train_and_test(Config("CFKG", "tiny", config_dict=quiet))
    evaluate(run.checkpoint)
    write_dataset("tiny", random_rows()[::-1])
    with pytest.raises(UserError, match=r"numbers the \w+ otherwise than the data here do \(first '\w+'\)"):
        evaluate(run.checkpoint)


def test_a_loaded_model_is_in_evaluation_mode(checkpoint):
    write_dataset("tiny", cycle())
    assert not load_data_and_model(checkpoint)[1].training


def test_the_gpu_of_another_machine_is_not_kept():
    write_dataset("tiny", random_rows())
    run = train_and_test(small_config("Mamba4Rec", epochs=1, gpu_id="3"))
    assert "gpu_id" not in load_checkpoint(run.checkpoint)["config"]


def test_a_checkpoint_of_the_first_format_says_what_it_lacks(checkpoint, caplog):
    write_dataset("tiny", cycle())
    expected = evaluate(checkpoint).result
    state = load_checkpoint(checkpoint)
    for key in ("vocabulary", "data"):
        del state[key]
    (state["resume"]["random"],) = state["resume"]["random"]

    torch.save(_encode({**state, "format": FIRST_FORMAT}), "old.pth")
    caplog.clear()
    assert evaluate("old.pth").result == expected
    assert "old.pth was written by an earlier version: it holds no ids" in caplog.text
    resumed = train_and_test(config_of("old.pth", {"epochs": 17}), resume_file="old.pth")
    again = train_and_test(config_of(checkpoint, {"epochs": 17}), resume_file=checkpoint)
    assert resumed.result == again.result
    caplog.clear()
    assert evaluate("old.pth").result["test_result"] == resumed.result["test_result"]
    assert "earlier version" not in caplog.text


def test_runs_of_one_second_have_files_of_their_own():
    write_dataset("tiny", random_rows(users=5))
    files = {train_and_test(small_config("Mamba4Rec", epochs=1)).checkpoint for _ in range(2)}
    assert len(files) == 2


@pytest.mark.parametrize("settings", [{"learning_rate": 1e38}, {"learning_rate": 1e38, "enable_amp": True}])
@pytest.mark.parametrize("name", ["SSD4Rec", "Mamba4Rec"])
def test_a_model_of_no_numbers_is_neither_saved_nor_reported(name, settings):
    write_dataset("tiny", random_rows())
    with pytest.raises(UserError, match=r"(infinite or NaN|NaN) in epoch 0; nothing was saved yet"):
        train_and_test(small_config(name, epochs=1, **settings))
    assert not list(Path("saved").glob("*.pth"))
