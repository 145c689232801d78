"""What a training step of each model asks of a GPU, counted without one: launches, and no look at the device."""

import pytest
import torch

from recbole_ssm import Config
from recbole_ssm.data import create_dataset, data_preparation
from recbole_ssm.models.base import PackedRecommender
from recbole_ssm.quick_start import build_model
from recbole_ssm.trainer import SequenceTrainer

from .conftest import random_rows, write_dataset
from .launches import _autocast_on_meta, count_launches, optimizers_fused

# As the models' papers have them, or RecBole; SSD4Rec as released.
MOST = {
    "STARRec": 150, "Mamba4Rec": 80, "Mamba4Rec, mamba3": 240, "RecBLR": 230, "SSD4Rec": 250, "TiM4Rec": 300,
    "SS4Rec": 400, "eSASRec": 200, "SASRec": 150,
}  # fmt: skip
SETTINGS = {
    "SSD4Rec": {"num_layers": 2, "hidden_size": 256}, "SASRec": {"train_mode": "sequence"},
    "Mamba4Rec, mamba3": {"ssm_block": "mamba3"},
}  # fmt: skip


def prepared(name, **settings):
    """A trainer on the meta device, and its loaders."""
    write_dataset("tiny", random_rows(users=60))
    settings = {"state": "ERROR", "show_progress": False, "data_path": "dataset", "train_batch_size": 256, **settings}
    if name == "SASRec":
        settings["train_neg_sample_args"] = None
    config = Config(name.partition(",")[0], "tiny", config_dict={**settings, **SETTINGS.get(name, {})})
    loaders = data_preparation(config, create_dataset(config))
    model = build_model(config, loaders[0]).to("meta")
    config["device"] = torch.device("meta")
    with optimizers_fused():
        trainer = SequenceTrainer(config, model)
    return trainer, loaders


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("name", MOST)
def test_a_training_step_is_a_few_launches_and_reads_nothing_back(name, filled):
    trainer, (train_data, *_) = prepared(name)
    trainer._loss_of = trainer.model.calculate_loss
    trainer.model.train()
    batches = []
    for batch in train_data:
        batch = trainer._prepared(batch)
        batches.append(batch.filled(50).in_one_buffer(pinned=False) if filled else batch)

    def step():
        trainer._backward(batches[-1].to("meta"))
        trainer._update()

    count_launches(step)  # makes the optimizer's state
    launches = count_launches(step)
    assert launches.total() <= MOST[name], sorted(launches.items(), key=lambda item: -item[1])
    assert any("triton" in kernel for kernel in launches) == (name not in ("SASRec", "eSASRec"))


@pytest.mark.parametrize("name", MOST)
def test_scoring_reads_nothing_back(name):
    trainer, (_, valid_data, _) = prepared(name)
    trainer.model.eval()
    trainer.tot_item_num = valid_data._dataset.item_num
    ours = isinstance(trainer.model, PackedRecommender)

    def score():
        with torch.no_grad():
            for interaction, _, positive_u, positive_i in valid_data:
                rows = interaction if ours else interaction.to("meta")
                trainer._full_sort_batch_eval((rows, None, positive_u, positive_i))

    assert count_launches(score).total() > 0


def test_a_look_at_the_device_is_noticed():
    trainer, (train_data, *_) = prepared("Mamba4Rec")
    trainer._loss_of = trainer.model.calculate_loss
    batch = trainer._prepared(next(iter(train_data))).to("meta")
    with pytest.raises(RuntimeError), _autocast_on_meta():
        count_launches(lambda: trainer._check_nan(trainer._backward(batch)))
