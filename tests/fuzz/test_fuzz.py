"""A few files and settings of each kind in continuous integration; 10,000 of each behind the marker ``fuzz``."""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from recbole.evaluator.base_metric import TopkMetric

from recbole_ssm import checkpoint, config
from recbole_ssm.data.reading import AtomicFile
from recbole_ssm.settings import SCHEMAS

from . import campaign, checkpoints, interactions, watch
from . import settings as given_settings
from .values import SETTINGS

KINDS = {"checkpoint": checkpoints, "inter": interactions, "settings": given_settings}
FEW = {"settings": 60}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoints, and the folder that holds what they need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("made"))
        patch.setattr("sys.argv", ["fuzz"])
        patch.setattr(psutil, "cpu_percent", lambda *_, **__: 0.0)  # which RecBole waits a second for after each run
        return checkpoints.Bases(), Path.cwd()


@pytest.fixture
def bases(made, monkeypatch):
    bases, folder = made
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(psutil, "cpu_percent", lambda *_, **__: 0.0)
    return {"checkpoint": bases, "inter": interactions.Bases(bases), "settings": given_settings.Bases()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_few(kind, bases):
    module: Any = KINDS[kind]
    words: Counter[str] = Counter()

    # The same ones each time, without a look for the smallest that fails: there is no time.
    @settings(
        max_examples=FEW.get(kind, 30), derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=HealthCheck,
    )  # fmt: skip
    @given(module.cases(bases[kind]))
    def one(case):
        outcome = module.check(case, bases[kind])
        assert outcome.word not in watch.BAD, (outcome, case)
        words[outcome.word] += 1

    one()
    assert min(words["refused"], words["equal"] + words["different"]) >= 5, words
    torch.autograd.set_detect_anomaly(False)  # which one of RecBole's models switches on


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_a_campaign(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    assert campaign.main([f"--kind={kind}", "--count=10000", f"--folder={tmp_path}"]) == 0


# Of the harness itself: each of these must not pass for a file that was read well.

BAD_CALLS = {
    "traceback": lambda: [][1],
    "code": lambda: __import__("subprocess").run(["true"], check=False),
    "hang": lambda: [None for _ in iter(int, 1)],
}


@pytest.mark.parametrize("word", BAD_CALLS)
def test_what_ought_not_to_be_is_noticed(word):
    assert watch.attempt(BAD_CALLS[word], patience=0.2).word == word


def test_writing_elsewhere_is_noticed(tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("x") / "file"
    assert watch.attempt(lambda: elsewhere.write_text("x")).word == "code"
    assert watch.attempt(lambda: Path("file").write_text("x")).word == "equal"


def test_a_lost_row_and_a_changed_weight_are_noticed(monkeypatch, bases):
    rows = "".join(f"u{user}\ti{item}\t{item}\n" for user in range(3) for item in range(9))
    case = interactions.Case("x", ("user_id:token\titem_id:token\ttimestamp:float\n" + rows).encode(), "Mamba4Rec")
    case.settings = {"topk": 5, "valid_metric": "NDCG@5"}
    assert interactions.check(case, bases["inter"]).word == "equal"
    read = AtomicFile.read
    with monkeypatch.context() as patch:
        patch.setattr(AtomicFile, "read", lambda *args: read(*args).iloc[:-1])
        assert interactions.check(case, bases["inter"]).word == "rows"

    data = bytearray(bases["checkpoint"].data["BPR"])
    weight = bases["checkpoint"].states["BPR"]["state_dict"]["item_embedding.weight"]
    data[data.index(weight.numpy().tobytes())] ^= 1
    changed = checkpoints.Case("bytes", "BPR", bytes(data))
    assert checkpoints.check(changed, bases["checkpoint"]).word == "refused"
    monkeypatch.setattr(checkpoint, "_is_whole", lambda file: True)
    assert checkpoints.check(changed, bases["checkpoint"]).word == "damage"


NOTICED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no layers": ("Mamba4Rec", {"num_layers": 0}, "senseless"),
    "a word for a switch": ("STARRec", {"use_moe": "no"}, "senseless"),
    "no choice": ("SASRec", {"eval_args": {"mode": "uni0"}}, "senseless"),
    "contradicting settings": ("NARM", {"USER_ID_FIELD": "user_id", "LABEL_FIELD": "timestamp"}, "senseless"),
    "a switch that is off": ("STARRec", {"train_mode": "prefix", "moe_level": "position", "use_moe": False}, "equal"),
    "what nobody reads": ("BPR", {"MAX_ITEM_LIST_LENGTH": 5}, "ignored"),
    "what is read": ("GRU4Rec", {"MAX_ITEM_LIST_LENGTH": 5}, "equal"),
    "a future that is foretold": ("STARRec", {"topk": [5], "valid_metric": "NDCG@5"}, "senseless"),
    "a model that does not learn": ("BPR", {"learning_rate": 1e-3}, "senseless"),
}


@pytest.mark.parametrize("name", NOTICED)
def test_senseless_settings_are_noticed_without_a_schema(name, bases, monkeypatch):
    model, given, word = NOTICED[name]
    monkeypatch.setattr(config, "check", lambda *_: None)
    if name == "a future that is foretold":
        monkeypatch.setattr(
            TopkMetric, "topk_result", lambda self, metric, _: {f"{metric}@{k}": 1.0 for k in self.topk}
        )
    if name == "a model that does not learn":
        monkeypatch.setattr(torch.optim.Adam, "step", lambda self, closure=None: None)
    outcome = given_settings.check(given_settings.Case("dict", model, given), bases["settings"])
    assert outcome.word == word, outcome


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        (b"user_id:token\titem_id:token\na\tb\n\n\"c\td\"\r\n", [("a", "b"), ('"c', 'd"')]),
        (b"user_id:token\titem_id:token\na\n", None),
        (b"user_id:token\titem_id:token\n\xff\ta\n", None),
    ],
)  # fmt: skip
def test_rows_are_counted_by_themselves(data, rows):
    found = interactions.rows_of(data, "utf-8", "\t")
    assert (found and [tuple(row.values()) for row in found]) == rows


def test_every_setting_of_the_schema_is_tried():
    known = {key for schema in SCHEMAS.values() for key in schema.model_fields}
    features = {"item_features", "feature_fusion", "score_features", "selected_features", "pooling_mode"}
    assert known - set(SETTINGS) == {"teacher", *features}  # of models and of a file that are not among those
