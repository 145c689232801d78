"""Inert rows and targets, by which steps get a few fixed shapes, leave loss and gradients as they are."""

import pytest
import torch

from recbole_ssm.models.base import PackedRecommender

from ..conftest import build

LOSSES = ["CE", "BCE", "BPR", "gBCE", "SampledSoftmax"]


def loss_and_gradients(model, batch):
    model.zero_grad()
    losses = model.calculate_loss(batch)
    losses = losses if isinstance(losses, tuple) else (losses,)
    sum(losses).backward()
    return torch.stack(losses).detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same_when_filled(name, mode, batches=2, **settings):
    config, model, (train_data, *_) = build(name, **{"train_mode": mode, "train_batch_size": 40, **settings})
    for batch in list(train_data)[:batches]:
        batch = model.packed(batch) if isinstance(model, PackedRecommender) else batch
        filled = batch.filled(config["MAX_ITEM_LIST_LENGTH"])
        assert len(filled) > len(batch)
        loss, gradients = loss_and_gradients(model, batch)
        for as_made in (filled, filled.in_one_buffer(pinned=False)):
            again, found = loss_and_gradients(model, as_made)
            torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
            for parameter, gradient in gradients.items():
                torch.testing.assert_close(
                    found[parameter], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=parameter: f"{n}: {m}"
                )


@pytest.mark.parametrize("mode", ["sequence", "prefix"])
@pytest.mark.parametrize("name", ["Mamba4Rec", "STARRec", "SSD4Rec", "TiM4Rec", "SS4Rec"])
def test_our_models(name, mode):
    layers = {"num_layers": 1 if mode == "sequence" else 2} if name == "SSD4Rec" else {}
    masks = {"mask_ratio": 0.0} if name == "SSD4Rec" else {}
    times = {"time_dropout_prob": 0.0} if name == "TiM4Rec" else {}
    assert_same_when_filled(name, mode, dropout_prob=0.0, **layers, **masks, **times)


@pytest.mark.parametrize(
    ("name", "mode", "settings"),
    [("eSASRec", "sequence", {}), ("eSASRec", "prefix", {}), ("BSARec", "prefix", {"attn_dropout_prob": 0.0})],
)
def test_attention_alone(name, mode, settings):
    assert_same_when_filled(name, mode, dropout_prob=0.0, MAX_ITEM_LIST_LENGTH=30, **settings)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss(loss_type):
    settings = {} if loss_type == "CE" else {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 3}}
    assert_same_when_filled("Mamba4Rec", "sequence", dropout_prob=0.0, loss_type=loss_type, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing": 0.1},
        {"temperature": 0.1},
        {"allow_repeats": False},
        {"experts_per_token": 1},
        {"use_time_gaps": True},
    ],
    ids=str,
)
def test_settings_of_starrec(settings):
    assert_same_when_filled("STARRec", "sequence", **{"dropout_prob": 0.0, **settings})


def test_with_kernels():
    few = {"train_batch_size": 4, "MAX_ITEM_LIST_LENGTH": 6, "hidden_size": 8, "n_heads": 1}
    assert_same_when_filled("STARRec", "sequence", 1, dropout_prob=0.0, ssm_backend="triton", **few)


def test_a_loss_over_rows_is_not_filled():
    assert not build("STARRec", moe_level="position")[1].fillable
