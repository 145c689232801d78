"""Models of other packages, found by their entry points."""

import sys
from pathlib import Path

import pytest
import recbole.data.dataset
import recbole.trainer
from torch import nn

from recbole_ssm import Config, UserError, list_models, registry, run_recbole
from recbole_ssm.models.base import PackedRecommender
from recbole_ssm.registry import register_model
from recbole_ssm.settings import SCHEMAS, ModelSettings

from .conftest import random_rows, small_config, write_dataset

PACKAGE = '''
"""All of another package with a model of its own."""

from torch import nn

from recbole_ssm.models.base import PackedRecommender
from recbole_ssm.ops.packing import select_rows
from recbole_ssm.registry import register_model
from recbole_ssm.settings import ModelSettings, setting


class LastItemSettings(ModelSettings):
    """What LastItem reads."""

    hidden_size: int = setting(16, "Number of features in the hidden state.", ge=1, fixed=True)
    slope: float = setting(0.5, "Slope of the activation below 0.", ge=0, lt=1)


@register_model(LastItemSettings)
class LastItem(PackedRecommender):
    """A linear map of the latest item."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.item_embedding = nn.Embedding(self.n_items, self.hidden_size)
        self.map = nn.Sequential(nn.Linear(self.hidden_size, self.hidden_size), nn.LeakyReLU(config["slope"]))

    def encode(self, items, cu_seqlens, read=None, last=False):
        return self.map(self.item_embedding(select_rows(items, read)))
'''


@pytest.fixture
def another_package(monkeypatch, tmp_path):
    """It, and one that cannot be imported, installed as pip does."""
    names = [
        (sys.modules, "recbole.model.sequential_recommender.lastitem"),
        (sys.modules, "lastitem"),
        (registry.MODELS, "LastItem"),
        (SCHEMAS, "LastItem"),
        (vars(recbole.data.dataset), "LastItemDataset"),
        (vars(recbole.trainer), "LastItemTrainer"),
    ]
    Path(tmp_path, "lastitem.py").write_text(PACKAGE)
    Path(tmp_path, "broken.py").write_text("import a_module_that_is_not_there")
    for name in ("lastitem", "broken"):
        about = tmp_path / f"{name}-1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (about / "entry_points.txt").write_text(f"[recbole_ssm.models]\n{name} = {name}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match=r"^the models of broken are left out, .*No module named 'a_module_that"):
        registry.register()
    yield
    for where, name in names:
        where.pop(name, None)


def test_another_packages_model_runs_by_its_name(another_package):
    write_dataset("tiny", random_rows())
    assert "LastItem" in list_models()
    config = small_config("LastItem", hidden_size=8)
    assert (config["slope"], config["hidden_size"], config["train_mode"]) == (0.5, 8, "sequence")
    settings = {"data_path": "dataset", "epochs": 1, "state": "ERROR", "show_progress": False, "slope": 0.25}
    result = run_recbole("LastItem", "tiny", config_dict=settings)
    assert 0 <= result["test_result"]["ndcg@10"] <= 1


def test_another_packages_settings_are_held_to_its_schema(another_package):
    with pytest.raises(UserError, match=r"^slope is 2: choose a number from 0 to below 1\.$"):
        Config("LastItem", "tiny", config_dict={"slope": 2})
    with pytest.raises(UserError, match=r"^unknown setting 'slop', did you mean 'slope'\?"):
        Config("LastItem", "tiny", config_dict={"slop": 0.1})


@pytest.mark.parametrize(("name", "by"), [("Mamba4Rec", r"recbole_ssm\.models\.mamba4rec"), ("BPR", "RecBole")])
def test_a_name_that_is_taken_is_refused(name, by):
    model = type(name, (PackedRecommender, nn.Module), {"__module__": "theirs"})
    with pytest.raises(UserError, match=rf"^the name of the model {name} of theirs is taken by {by}: choose another"):
        register_model(ModelSettings)(model)
