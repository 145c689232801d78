"""Losses over a catalogue: held to their dense forms, in value, gradient and memory."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import peak_bytes
from recbole_ssm import UserError
from recbole_ssm.data.batch import SeenItems
from recbole_ssm.layers import losses
from recbole_ssm.layers.losses import bce, full_cross_entropy, gbce, item_scores, sampled_softmax

from .conftest import build, small_config


def rows_and_table(count, items, width=8, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, width, generator=generator, dtype=torch.float64) * scale
    table = torch.randn(items, width, generator=generator, dtype=torch.float64)
    positives = torch.randint(items, (count,), generator=generator)
    return hidden.to(dtype).requires_grad_(), table.to(dtype).requires_grad_(), positives


@pytest.mark.parametrize("count", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("scale", [1.0, 300.0])  # at 300 a positive's probability underflows float32
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_full_cross_entropy_is_that_of_torch(count, scale, smoothing, monkeypatch):
    monkeypatch.setitem(losses.BLOCK_BYTES, "cpu", 1)  # blocks of as few rows as there may be, 8
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        hidden, table, positives = rows_and_table(count, 50, dtype=dtype, scale=scale)
        exact_hidden, exact_table = (t.detach().double().requires_grad_() for t in (hidden, table))
        loss, expected = (
            full_cross_entropy(hidden, table, positives, smoothing),
            F.cross_entropy(exact_hidden @ exact_table.T, positives, label_smoothing=smoothing),
        )
        torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
        gradients = torch.autograd.grad(3 * loss, (hidden, table))
        wanted = torch.autograd.grad(3 * expected, (exact_hidden, exact_table))
        for gradient, want in zip(gradients, wanted, strict=True):
            assert (gradient.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_was_seen_is_no_class(dtype, monkeypatch):
    """Held to torch's cross-entropy of scores without it; a positive that was seen stays a class."""
    monkeypatch.setitem(losses.BLOCK_BYTES, "cpu", 1)
    hidden, table, positives = rows_and_table(20, 30, dtype=dtype)
    items = torch.randint(1, 30, (40,), generator=torch.Generator().manual_seed(1))
    last = torch.arange(0, 40, 2)
    seen = SeenItems(items, (last - 6).clamp(min=0), last, 7)
    items[last[3]] = positives[3]
    exact_hidden, exact_table = (t.detach().double().requires_grad_() for t in (hidden, table))
    scores = exact_hidden @ exact_table.T
    out = torch.zeros(20, 30, dtype=torch.bool)
    for row, end in enumerate(last.tolist()):
        out[row, items[max(0, end - 6) : end + 1]] = True
    out[torch.arange(20), positives] = False
    assert out.sum() > 60
    expected = F.cross_entropy(scores.masked_fill(out, -torch.inf), positives)
    loss = full_cross_entropy(hidden, table, positives, seen=seen)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    wanted = torch.autograd.grad(expected, (exact_hidden, exact_table))
    for gradient, want in zip(torch.autograd.grad(loss, (hidden, table)), wanted, strict=True):
        assert (gradient.double() - want).abs().max() <= tolerance * want.abs().max()


def test_full_cross_entropy_under_autocast_errs_no_more_than_torch():
    hidden, table, positives = rows_and_table(64, 50, dtype=torch.float32)
    truth = torch.autograd.grad(F.cross_entropy(hidden @ table.T, positives), (hidden, table))
    with torch.autocast("cpu"):
        ours, torchs = full_cross_entropy(hidden, table, positives), F.cross_entropy(hidden @ table.T, positives)
    assert ours.dtype == torch.float32
    found, plain = (torch.autograd.grad(loss, (hidden, table)) for loss in (ours, torchs))
    for got, other, want in zip(found, plain, truth, strict=True):
        assert (got - want).abs().max() <= 2 * (other - want).abs().max()


def test_full_cross_entropy_of_no_rows_and_of_half_precision():
    hidden, table, positives = rows_and_table(0, 5)
    assert full_cross_entropy(hidden, table, positives).isnan()
    hidden, table, positives = rows_and_table(4, 5, dtype=torch.bfloat16)
    full_cross_entropy(hidden, table, positives).backward()
    assert hidden.grad.dtype == table.grad.dtype == torch.bfloat16


def test_gradients_serve_one_backward_pass_and_say_so():
    hidden, table, positives = rows_and_table(4, 5)
    loss = full_cross_entropy(hidden, table, positives)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="this is the second"):
        loss.backward()


@pytest.mark.parametrize("most", [0, 64])  # gathered, and chosen of the scores of all
def test_item_scores_are_inner_products(most, monkeypatch):
    monkeypatch.setattr(losses, "ALL_SCORES", most)
    hidden, table, _ = rows_and_table(11, 20)
    items = torch.randint(20, (11, 6), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(11, 6, dtype=torch.float64)
    expected = torch.einsum("md,mkd->mk", hidden, table[items])
    monkeypatch.setitem(losses.BLOCK_BYTES, "cpu", 2 * (20 if most else 6 * 8) * 8)  # two rows a block
    found = item_scores(hidden, table, items)
    torch.testing.assert_close(found, expected)
    for got, want in zip(
        torch.autograd.grad((found * weights).sum(), (hidden, table)),
        torch.autograd.grad((expected * weights).sum(), (hidden, table)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_sampled_softmax_of_every_other_item_is_full_cross_entropy():
    hidden, table, positives = rows_and_table(5, 9)
    others = torch.stack([torch.tensor([i for i in range(9) if i != p]) for p in positives])
    scores = item_scores(hidden, table, torch.cat([positives[:, None], others], 1))
    loss = sampled_softmax(scores[:, :1], scores[:, 1:], others=8)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ table.T, positives))
    # Twice the sample is twice the terms, each weighted by half.
    twice = sampled_softmax(scores[:, :1], scores[:, 1:].repeat(1, 2), others=8)
    torch.testing.assert_close(twice, loss)


def test_gbce_is_bce_at_t_0_and_calibrated_at_t_1():
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(6, 1, generator=generator), torch.randn(6, 4, generator=generator)
    ends = F.binary_cross_entropy_with_logits(torch.cat([positive, negative], 1), torch.eye(5)[:1].expand(6, -1))
    torch.testing.assert_close(gbce(positive, negative, others=100, calibration=0.0), ends)
    positive_power = 4 / 100  # beta is the sampling rate where t is 1
    expected = -(positive_power * F.logsigmoid(positive).sum() + F.logsigmoid(-negative).sum()) / 30
    torch.testing.assert_close(gbce(positive, negative, others=100, calibration=1.0), expected)
    assert not math.isclose(bce(positive, negative).item(), ends.item())  # BCE's sum of two means is another weighting


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_memory_grows_with_the_table_alone():
    hidden, table, positives = rows_and_table(2048, 200_000, dtype=torch.float32)  # dense scores: 1.6 GB

    def call():
        torch.autograd.grad(full_cross_entropy(hidden, table, positives), (hidden, table))

    call()
    peak = peak_bytes(call, cuda=False)
    assert peak is None or peak < 5 * table.numel() * 4 + (32 << 20)


@pytest.mark.parametrize("loss_type", ["BCE", "BPR", "gBCE", "SampledSoftmax"])
def test_both_modes_of_training_see_the_same_sampled_loss(loss_type):
    """RecBole lays its rows end to end once for each negative; ours has a column for each."""
    settings = {
        "loss_type": loss_type, "train_neg_sample_args": {"distribution": "uniform", "sample_num": 3},
        "train_batch_size": 10_000, "dropout_prob": 0.0,
    }  # fmt: skip
    _, model, (rows, _, _) = build("Mamba4Rec", train_mode="prefix", **settings)
    (batch,) = list(rows)
    count = len(batch) // 3
    loss = model.calculate_loss(batch)
    hidden = model(batch["item_id_list"][:count], batch["item_length"][:count])
    negatives = torch.stack([batch["neg_item_id"][k * count : (k + 1) * count] for k in range(3)], 1)
    torch.testing.assert_close(loss, model.ranking_loss(hidden, batch["item_id"][:count], negatives))
    positive = (hidden * model.item_embedding(batch["item_id"][:count])).sum(-1, keepdim=True)
    negative = torch.einsum("md,mkd->mk", hidden, model.item_embedding(negatives))
    if loss_type == "BPR":
        torch.testing.assert_close(loss, -F.logsigmoid(positive - negative).mean())
    if loss_type == "gBCE":
        torch.testing.assert_close(loss, gbce(positive, negative, model.n_items - 2, 0.75))


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_negatives_are_drawn_as_asked_and_never_the_target(distribution):
    negative = {"distribution": distribution, "sample_num": 200, "alpha": 0.5 if distribution == "popularity" else 1}
    _, _, (train_data, _, _) = build("Mamba4Rec", loss_type="BCE", train_neg_sample_args=negative)
    items = train_data._dataset.inter_feat["item_id"].numpy()
    seen = np.zeros(train_data._dataset.item_num)
    for batch in train_data:
        assert batch.negatives.shape == (len(batch), 200)
        assert batch.negatives.min() >= 1
        assert not (batch.negatives == batch.targets[:, None]).any()
        seen += np.bincount(batch.negatives.flatten().numpy(), minlength=len(seen))
    expected = np.ones(len(seen) - 1)
    if distribution == "popularity":
        sampled_from = train_data._sampler.dataset.inter_feat["item_id"].numpy()
        expected = np.sqrt(np.bincount(sampled_from, minlength=len(seen))[1:])
    # What is drawn for each target leaves that one out, so frequent targets are a little rarer.
    expected = expected * (1 - np.bincount(items, minlength=len(seen))[1:] / len(items))
    np.testing.assert_allclose(seen[1:] / seen.sum(), expected / expected.sum(), rtol=0.15)


def test_losses_that_sample_know_how_many():
    config = small_config("STARRec", loss_type="gBCE")
    assert config["train_neg_sample_args"]["sample_num"] == 256
    with pytest.raises(UserError, match="drawn uniformly"):
        small_config(
            "STARRec", loss_type="SampledSoftmax",
            train_neg_sample_args={"distribution": "popularity", "sample_num": 9},
        )  # fmt: skip
    with pytest.raises(UserError, match="gbce_t is 2"):
        small_config("STARRec", gbce_t=2)
