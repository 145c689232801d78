"""RecBole's own quick start, once ``recbole_ssm`` is imported, and users whom it is asked for."""

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import recbole
import recbole.utils.case_study
import torch

from recbole_ssm import UserError, quick_start, registry

from .conftest import build, random_rows, small_settings, write_dataset

QUIET = {"epochs": 1, "show_progress": False, "state": "ERROR", "data_path": "dataset", "train_batch_size": 64}


@pytest.fixture
def settings():
    write_dataset("tiny", random_rows(users=12))
    return {**QUIET, **small_settings("Mamba4Rec")}


def test_recboles_quick_start_trains_and_loads_our_models(settings):
    from recbole.quick_start import load_data_and_model, objective_function, run

    result = run("Mamba4Rec", "tiny", config_dict=settings)
    (file,) = Path("saved").iterdir()
    _, model, dataset, _, _, test_data = load_data_and_model(str(file))
    assert type(model).__name__ == "Mamba4Rec"
    _, items = recbole.utils.case_study.full_sort_topk(np.arange(1, dataset.user_num), model, test_data, k=10)
    hits = (items == torch.as_tensor(test_data._dataset.inter_feat["item_id"])[:, None]).any(1).double().mean()
    assert result["test_result"]["hit@10"] == pytest.approx(hits.item(), abs=1e-4)
    trial = objective_function({**settings, "model": "Mamba4Rec", "dataset": "tiny"}, saved=False)
    assert trial["model"] == "Mamba4Rec"
    assert trial.keys() == {"model", *result} - {"checkpoint"}
    assert result["checkpoint"] == str(file)


def test_functions_taken_from_recbole_before_train_our_models(settings, monkeypatch):
    pytest.importorskip("ray")
    name = "recbole.quick_start.quick_start"
    spec = importlib.util.spec_from_file_location(name, Path(recbole.__file__).parent / "quick_start/quick_start.py")
    theirs = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, theirs)
    spec.loader.exec_module(theirs)
    taken = theirs.run_recbole, theirs.run
    registry._take_quick_start()
    assert sys.modules[name] is quick_start
    assert theirs.load_data_and_model is quick_start.load_data_and_model
    one, two, ours = [
        {**function("Mamba4Rec", "tiny", config_dict=settings), "checkpoint": ""}  # each has its own, or tells none
        for function in (*taken, quick_start.run_recbole)
    ]
    assert one == two == ours


def test_quick_start_comes_without_ray():
    script = (
        "import sys, recbole_ssm; from recbole.quick_start import run_recbole as one; "
        "import recbole.quick_start.quick_start as two; "
        "print(one is two.run_recbole is recbole_ssm.run_recbole, 'ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_processes_that_a_script_starts_itself(settings):
    from recbole.quick_start import run_recboles

    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    places = {"nproc": 1, "world_size": 1, "offset": 0, "ip": "localhost", "port": port}
    given = {"config_dict": {**settings, **places}, "queue": queue, "saved": False}
    run_recboles(0, "Mamba4Rec", "tiny", None, given)
    assert 0 <= queue.get()["test_result"]["ndcg@10"] <= 1
    assert not Path("saved").exists() or not list(Path("saved").iterdir())
    assert not torch.distributed.is_initialized()
    with pytest.raises(UserError, match="lacks nproc, world_size, offset, ip, port"):
        run_recboles(0, "Mamba4Rec", "tiny", None, {"config_dict": settings})


def test_users_without_one_row_are_named():
    rows = [f"u{user}\ti{(user * item) % 11}\t{item}" for user in range(8) for item in range(6 if user else 2)]
    write_dataset("tiny", rows)
    _, model, (train_data, _, test_data) = build("Mamba4Rec")
    number = train_data._dataset.token2id("user_id", [f"u{user}" for user in range(8)])
    topk = recbole.utils.case_study.full_sort_topk
    scores, _ = topk(number[[3, 1, 3]], model, test_data, k=2)
    assert torch.equal(scores[0], scores[2])
    assert not torch.equal(scores[0], scores[1])
    torch.testing.assert_close(topk(number[[1]], model, test_data, k=2)[0][0], scores[1])
    with pytest.raises(UserError, match="there is no row of user u0: ask"):
        topk(number[[3, 0]], model, test_data, k=2)
    with pytest.raises(UserError, match="no row of user number 99, who is not in the dataset, number 0, who"):
        topk([99, 0], model, test_data, k=2)


def test_users_with_several_rows_are_named():
    write_dataset("tiny", random_rows(users=12))
    _, model, (_, _, test_data) = build("SASRec", eval_args={"split": {"RS": [6, 2, 2]}, "group_by": "user"})
    with pytest.raises(UserError, match=r"several rows of user u\d+"):
        recbole.utils.case_study.full_sort_scores(np.arange(1, 13), model, test_data)
