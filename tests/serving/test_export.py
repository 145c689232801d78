"""Exported models in ONNX Runtime against the models; what the folder holds, and what is refused."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_ssm import UserError
from recbole_ssm.cli import run_export
from recbole_ssm.data.context import column
from recbole_ssm.errors import CannotWrite
from recbole_ssm.serving import Recommender, export, padded
from recbole_ssm.serving.model_card import model_card

from .conftest import recommender

LENGTH = 9
CASES = {
    "STARRec, time gaps": ("STARRec", {"use_time_gaps": True}),
}
MORE = {
    "SSD4Rec, both ways": ("SSD4Rec", {}),
    "Mamba4Rec": ("Mamba4Rec", {}),
    "Mamba4Rec, mamba2": ("Mamba4Rec", {"ssm_block": "mamba2"}),
    "Mamba4Rec, mamba3": ("Mamba4Rec", {"ssm_block": "mamba3", "num_layers": 2, "d_state": 10}),
    "Mamba4Rec, two layers": ("Mamba4Rec", {"num_layers": 2, "temperature": 0.5, "d_conv": 1}),
    "Mamba4Rec, filter": ("Mamba4Rec", {"filter_share": 0.7}),
    "RecBLR": ("RecBLR", {}),
    "eSASRec": ("eSASRec", {}),
    "SSD4Rec": ("SSD4Rec", {"bidirectional": False, "num_layers": 2}),
    "SSD4Rec, aligned": ("SSD4Rec", {"backward_stream": "aligned", "num_layers": 2, "train_mode": "prefix"}),
    "SSD4Rec, two layers": ("SSD4Rec", {"num_layers": 2, "train_mode": "prefix", "norm_embedding": False}),
    "TiM4Rec": ("TiM4Rec", {}),
    "SS4Rec": ("SS4Rec", {}),
    "SS4Rec, two layers": ("SS4Rec", {"num_layers": 2, "time_aware": False}),
    "SS4Rec, the request's time": ("SS4Rec", {"request_time": "known"}),
    "BSARec": ("BSARec", {}),
    "BSARec, time gaps": ("BSARec", {"use_time_gaps": True}),
    "STARRec, filter": ("STARRec", {"filter_share": 0.7, "num_layers": 2, "feed_forward": True}),
    "STARRec, two layers": ("STARRec", {"num_layers": 2, "input_dependent_fusion": True}),
    "STARRec, window": ("STARRec", {"attention_window": 4, "use_similarity": False, "moe_level": "position"}),
    "STARRec, attention": ("STARRec", {"use_ssm": False, "similarity_threshold": 0.3, "use_position_embedding": False}),
    "STARRec, two experts": ("STARRec", {"experts_per_token": 2, "pma_residual": False}),
    "STARRec, state space": ("STARRec", {"use_pma": False, "use_moe": False}),
    "SASRec": ("SASRec", {"train_mode": "sequence", "valid_metric": "NDCG@10"}),
    "GRU4Rec": ("GRU4Rec", {"valid_metric": "NDCG@10"}),
}
KNOWN = {"use_time_gaps": True, "use_clock": True, "request_time": "known"}
# Three items, and the request where it is read, of whose times the card's example has the columns: 0, 5 and 9.
TIMES = {
    ("gap_bucket",): {"times": [[0, 2**4 - 1, 2**4 + 2**8 - 2]]},
    ("gap",): {"times": [[0, 5, 14]]},
    ("next_gap",): {"times": [[0, 0, 5]], "at": 14},
}
PADDED = {**CASES, **MORE, "Mamba4Rec, the request's time": ("Mamba4Rec", KNOWN)}
SHAPES = [(1, 1), (1, 7), (5, 1), (3, LENGTH), (4, 5)]

# Runs what an export holds where this package cannot be imported.
ELSEWHERE = """
import json, re, sys
import numpy as np
import onnxruntime

sys.modules.update(dict.fromkeys(["recbole_ssm", "recbole", "torch"]))  # which makes importing them an error
about = json.load(open("config.json"))
scoring = onnxruntime.InferenceSession("scoring.onnx")
step = onnxruntime.InferenceSession("step.onnx") if about["state"] else None
for case in sys.argv[1:]:
    inputs = dict(np.load(case))
    expected = inputs.pop("scores")
    close = dict(rtol=1e-4, atol=1e-4 * np.abs(expected).max(), err_msg=case)
    found = scoring.run(["scores"], inputs)[0]
    assert (found[:, 0] == -np.inf).all()
    np.testing.assert_allclose(found[:, 1:], expected[:, 1:], **close)
    if step is not None:
        lengths = inputs.pop("lengths")
        state = {name: np.zeros((len(lengths), *of["shape"]), of["dtype"]) for name, of in about["state"].items()}
        for place in range(lengths.max()):
            scores, *after = step.run(None, {**state, **{name: value[:, place] for name, value in inputs.items()}})
            state = dict(zip(state, after))
            ended = lengths == place + 1
            np.testing.assert_allclose(scores[ended, 1:], expected[ended, 1:], **close)
names = [output.name for output in step.get_outputs()] if step else []
assert names == (["scores", *("next." + name for name in about["state"])] if step else [])
for code in re.findall("```python\\n(.*?)```", open("README.md").read(), re.DOTALL):
    exec(code)
"""


def padded_cases(served: Recommender) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Padded histories, and the scores that the model gives them."""
    generator, model = np.random.default_rng(1), served.model
    cases = []
    for count, length in SHAPES:
        lengths = generator.integers(1, length, count, endpoint=True)
        lengths[0] = length
        real = np.arange(length) < lengths[:, None]
        inputs = {"items": generator.integers(1, served.vocabulary.item_num, real.shape) * real, "lengths": lengths}
        rows = torch.from_numpy(inputs["items"])
        if names := served.time_columns:
            kinds = [column(name).kinds or 10**6 for name in names]  # none of gaps
            inputs["columns"] = generator.integers(0, kinds, (*real.shape, len(names))) * real[..., None]
            rows = torch.cat([rows[..., None], torch.from_numpy(inputs["columns"])], -1)
        with torch.no_grad():
            hidden, table = model(rows, torch.from_numpy(lengths)), model.item_embedding.weight
            if served.packs:
                hidden, table = model.score_factors(hidden, table)
            cases.append((inputs, (hidden @ table.T).numpy()))
    return cases


def loop(advance, state, columns):
    """torch's scan, which outside of an export would compile what it is given."""
    found = []
    for row in zip(*columns, strict=True):
        state, one = advance(state, row)
        found.append(one)
    return state, torch.stack(found)


@pytest.mark.parametrize("case", PADDED)
def test_padded_blocks_give_the_models_scores(case, monkeypatch):
    name, settings = PADDED[case]
    monkeypatch.setattr(padded, "scan", loop)
    served = recommender(name, MAX_ITEM_LIST_LENGTH=LENGTH, **settings)
    about = export.describe(served)
    scoring = export.Scoring(padded.padded(served.model), served.packs, served.vocabulary.item_num)
    step = export.Step(scoring, list(about["state"]))
    for inputs, expected in padded_cases(served):
        given = {name: torch.from_numpy(value) for name, value in inputs.items()}
        close = {"rtol": 1e-4, "atol": 1e-4 * np.abs(expected).max()}
        with torch.no_grad():
            np.testing.assert_allclose(scoring(**given)[:, 1:], expected[:, 1:], **close)
            lengths = given.pop("lengths")
            state = [
                torch.zeros(len(lengths), *of["shape"], dtype=getattr(torch, of["dtype"]))
                for of in about["state"].values()
            ]
            for place in range(lengths.max() if state else 0):
                scores, *state = step(state, *(value[:, place] for value in given.values()))
                ended = lengths.numpy() == place + 1
                np.testing.assert_allclose(scores[ended, 1:], expected[ended, 1:], **close)


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)])
def test_onnx_runtime_gives_the_models_scores(case):
    name, settings = (CASES | MORE)[case]
    served = recommender(name, MAX_ITEM_LIST_LENGTH=LENGTH, **settings)
    served.export("shipped")
    files = ["README.md", "config.json", "example.npz", "scoring.onnx", "vocabulary.json"]
    steps = served.packs and served.model.steps
    assert sorted(path.name for path in Path("shipped").iterdir()) == sorted([*files, *["step.onnx"] * steps])
    assert [path.name for path in Path().iterdir() if path.name.startswith(".")] == []
    cases = []
    for inputs, scores in padded_cases(served):
        cases.append(str(Path(f"case-{len(cases)}.npz").absolute()))
        np.savez(cases[-1], scores=scores, **inputs)
    run = [sys.executable, "-c", ELSEWHERE, *cases]
    done = subprocess.run(run, cwd="shipped", capture_output=True, text=True, check=False, env={"PATH": ""})
    assert done.returncode == 0, done.stderr
    # The card's code recommends what the recommender does, in one go and step by step.
    history = [served.vocabulary.items[1:4].tolist()]
    given = {columns: how for columns, how in TIMES.items() if set(columns) <= set(served.time_columns)}
    expected = served.recommend(history, 10, **next(iter(given.values()), {})).items[0]
    assert done.stdout.splitlines() == [str(expected)] * (1 + steps)


@pytest.fixture
def without_graphs(monkeypatch):
    """Exports that take no time, for what is not about graphs."""
    monkeypatch.setattr(export, "_write_graphs", lambda recommender, about, folder: None)
    monkeypatch.setattr(export, "check", lambda folder, about, example: None)


def test_a_folder_is_written_whole_or_not_at_all(without_graphs, monkeypatch):
    served = recommender("Mamba4Rec")
    served.export("a/b/shipped")
    folder = Path("a/b/shipped")
    with pytest.raises(UserError, match="is there already: name a new folder, or overwrite it"):
        served.export(folder)
    (folder / "old").touch()

    def fail(*_):
        raise UserError("no")

    with monkeypatch.context() as broken:
        broken.setattr(export, "check", fail)
        with pytest.raises(UserError, match="no"):
            served.export(folder, overwrite=True)
    assert (folder / "old").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["shipped"]
    served.export(folder, overwrite=True)
    assert not (folder / "old").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["shipped"]
    for other in ("mine", "link"):
        if other == "mine":
            Path(other).mkdir()
        else:
            Path(other).symlink_to(folder)
        with pytest.raises(UserError, match="is no export of a recommender, and is left as it is"):
            served.export(other, overwrite=True)
    Path("file").touch()
    with pytest.raises(CannotWrite, match="choose another folder"):
        served.export("file/shipped")
    assert json.loads((folder / "vocabulary.json").read_text()) == served.vocabulary.items.tolist()
    settings = json.loads((folder / "config.json").read_text())["settings"]
    assert settings["hidden_size"] == 16
    assert not settings.keys() & {"data_path", "checkpoint_dir"}  # of the machine that trained it


def test_the_card_tells_of_data_metrics_and_protocol():
    served = recommender("STARRec", MAX_ITEM_LIST_LENGTH=LENGTH)
    served.results = {"epoch": 6, "best_valid_score": 0.25, "best_valid_result": {"ndcg@10": 0.25}}
    card = model_card(served, export.describe(served))
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]*) \|$", card, re.MULTILINE))
    data = served.config.identity["data"]
    assert rows["ndcg@10"] == "0.25"
    assert "Of epoch 7, the best" in card
    assert (rows["dataset"], rows["users"]) == ("tiny", "40")
    assert int(rows["items"]) == served.vocabulary.item_num - 1
    assert rows["interactions"] == str(data["interactions"])
    assert rows["digest of the interactions"] == data["digest"]
    assert rows["longest history that is read"] == str(LENGTH)
    assert "'mode': {'valid': 'full', 'test': 'full'}" in rows["eval_args"]
    assert rows["torch"] == version("torch")
    assert served.digest in card
    assert "were\nnever trained" not in card


def test_the_card_tells_which_scores_were_never_trained():
    served = recommender("Mamba4Rec", MAX_ITEM_LIST_LENGTH=LENGTH, allow_repeats=False)
    assert "were\nnever trained" in model_card(served, export.describe(served))


def test_the_cards_history_is_no_longer_than_the_model_reads():
    served = recommender("STARRec", MAX_ITEM_LIST_LENGTH=2)
    (history,) = re.findall(r"for item in (\[.*?\])\]", model_card(served, export.describe(served)))
    assert len(json.loads(history)) == 2


@pytest.mark.parametrize("what", ["package", "fixed length", "no table", "operator", "other scores"])
def test_what_cannot_be_exported_is_one_sentence(what, monkeypatch):
    def scores(one: Recommender) -> np.ndarray:
        return export.examples(one)["scores"]

    settings = {"var_len": False, "train_mode": "prefix"} if what == "fixed length" else {}
    served = recommender("SSD4Rec" if what == "fixed length" else "Mamba4Rec", MAX_ITEM_LIST_LENGTH=LENGTH, **settings)
    if what == "package":
        monkeypatch.setattr(export, "PACKAGES", ("numpy", "no_such_package"))
        message = r"an export needs no_such_package: pip install 'recbole-ssm\[onnx\]'"
    elif what == "fixed length":
        message = "SSD4Rec with var_len: False is not exported"
    elif what == "no table":
        served.packs, served.model.item_embedding = False, None
        message = "Mamba4Rec has no table of item embeddings"
    elif what == "operator":
        monkeypatch.setattr(
            type(served.model), "encode", lambda _, items, *__, **___: items.new_zeros(int(items.sum()))
        )
        monkeypatch.setattr(export, "examples", lambda _: {})
        message = r"Mamba4Rec, as it is set, is not exported: torch \S+ cannot write it as ONNX \(\w+: .*\)\.$"
    else:
        monkeypatch.setattr(export, "_write_graphs", lambda recommender, about, folder: None)
        other = recommender("Mamba4Rec", MAX_ITEM_LIST_LENGTH=LENGTH, temperature=0.9)
        monkeypatch.setattr(export, "check", lambda *_: export._compare("Mamba4Rec", *map(scores, (other, served))))
        message = "ONNX Runtime gives other scores than the model"
    with pytest.raises(UserError, match=message):
        served.export("shipped")
    assert not Path("shipped").exists()


def test_the_command(without_graphs, monkeypatch, capsys):
    served = recommender("Mamba4Rec")
    asked = []
    monkeypatch.setattr(Recommender, "load", lambda *given: asked.append(given) or served)
    monkeypatch.setattr(sys, "argv", ["run_export", "--checkpoint", "a.pth", "--output", "shipped"])
    assert run_export.main() == 0
    assert asked == [("a.pth", "cpu", False)]
    assert "shipped: Mamba4Rec for ONNX Runtime" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["run_export", "--checkpoint", "a.pth", "--output", "shipped"])
    assert run_export.main() == 2
    assert "run_export: " in capsys.readouterr().err
