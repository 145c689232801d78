"""eSASRec's equations position by position, and its scores beside the released code's."""

import importlib
import os
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recbole_ssm.models import esasrec
from recbole_ssm.ops.packing import cu_seqlens_from_lengths

from ..conftest import build

LENGTHS = [1, 0, 10, 7, 3]


def built(**settings):
    """A model in float64 whose weights are far from where they start, and sequences."""
    _, model, loaders = build("eSASRec", MAX_ITEM_LIST_LENGTH=10, **settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    items = torch.randint(1, model.n_items, (sum(LENGTHS),))
    return model.double().eval(), items, cu_seqlens_from_lengths(torch.tensor(LENGTHS)), loaders


def by_equations(model, items):
    """LiGR's layers over one history, ``[n, d]``."""
    x = model.item_embedding(items) + model.position_embedding.weight[: len(items)]
    later = torch.ones(len(items), len(items)).triu(1).bool()
    for layer in model.layers:
        contexts, size = [], x.shape[1]
        projected = layer.attention.query_key_value(layer.attention_norm(x)).split(size, -1)
        for q, k, v in zip(*(part.chunk(2, -1) for part in projected), strict=True):
            contexts.append((q @ k.T / q.shape[1] ** 0.5).masked_fill(later, -torch.inf).softmax(-1) @ v)
        attended = layer.attention.out_proj(torch.cat(contexts, -1))
        x = x + torch.sigmoid(layer.attention_gate(x)) * attended
        z = layer.feed_forward_norm(x)
        activated, linear = layer.expand.weight.chunk(2)
        hidden = layer.contract(F.silu(z @ activated.T) * (z @ linear.T))
        x = x + torch.sigmoid(layer.feed_forward_gate(x)) * hidden
    return x


def on_one_block(monkeypatch):
    """What a GPU takes, on a CPU: all sequences padded to the longest."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)


@pytest.mark.parametrize("padded", [True, False])
def test_the_model_is_the_papers_equations(padded, monkeypatch):
    """Outputs and gradients of all positions, and of those that are read."""
    model, items, cu_seqlens, _ = built(n_heads=2)
    expected = torch.cat([by_equations(model, row) for row in items.split(LENGTHS)])
    weights = torch.randn(expected.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    if padded:
        on_one_block(monkeypatch)
    else:
        monkeypatch.setattr(esasrec, "PLACES_PER_BLOCK", 8)
    found = model.encode(items, cu_seqlens)
    torch.testing.assert_close(found, expected)
    for own, theirs in zip(
        torch.autograd.grad((found * weights).sum(), list(model.parameters())), gradients, strict=True
    ):
        torch.testing.assert_close(own, theirs)
    read = torch.tensor([0, 4, 20])
    torch.testing.assert_close(model.encode(items, cu_seqlens, read), expected[read])
    some = cu_seqlens_from_lengths(torch.tensor([length for length in LENGTHS if length]))
    last = some[1:].long() - 1
    torch.testing.assert_close(model.encode(items, some, last, last=True), expected[last])


@pytest.mark.parametrize("corrected", [False, True])
def test_sampled_softmax_is_the_released_codes_or_corrected(corrected):
    model, items, cu_seqlens, _ = built(sampling_correction=corrected, train_neg_sample_args={"sample_num": 4})
    hidden = model.encode(items, cu_seqlens)[:3].detach()
    positives, negatives = torch.tensor([1, 2, 3]), torch.randint(4, model.n_items, (3, 4))
    scores = torch.einsum("md,mkd->mk", hidden, model.item_embedding(torch.cat([positives[:, None], negatives], 1)))
    if corrected:
        scores[:, 1:] += np.log((model.n_items - 2) / 4)
    expected = F.cross_entropy(scores, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(model.loss(hidden, positives, negatives), expected)


@pytest.mark.skipif("RECTOOLS" not in os.environ, reason="RECTOOLS names no checkout of MobileTeleSystems/RecTools")
def test_scores_are_those_of_the_released_code(monkeypatch):
    """RecTools' layers over the same sums of embeddings, for its positions count from the end of a row."""
    model, _, _, (_, _, test_data) = built(n_heads=2)
    for name in ("rectools", "rectools.models", "rectools.models.nn", "rectools.models.nn.transformers"):
        package = types.ModuleType(name)  # without what they import
        package.__path__ = [os.path.join(os.environ["RECTOOLS"], *name.split("."))]
        monkeypatch.setitem(sys.modules, name, package)
    released = importlib.import_module("rectools.models.nn.transformers.ligr")
    theirs = released.LiGRLayers(len(model.layers), 16, 2, 0.0, ff_factors_multiplier=2).double().eval()
    for ours, block in zip(model.layers, theirs.transformer_blocks, strict=True):
        weights = {
            "multi_head_attn.in_proj": ours.attention.query_key_value,
            "multi_head_attn.out_proj": ours.attention.out_proj,
            "layer_norm_1": ours.attention_norm,
            "layer_norm_2": ours.feed_forward_norm,
            "gating_linear_1": ours.attention_gate,
            "gating_linear_2": ours.feed_forward_gate,
            "feed_forward.ff_linear_2": ours.contract,
        }
        named = {
            f"{name}{'_' if name.endswith('in_proj') else '.'}{part}": value
            for name, module in weights.items()
            for part, value in module.named_parameters()
        }
        named["feed_forward.ff_linear_1.weight"], named["feed_forward.ff_linear_3.weight"] = ours.expand.weight.chunk(2)
        block.load_state_dict(named)
    rows = test_data._dataset[np.arange(8)]
    scores = model.full_sort_predict(rows)
    later = torch.ones(10, 10).triu(1).bool()
    for items, length, found in zip(rows["item_id_list"], rows["item_length"].tolist(), scores, strict=True):
        x = model.item_embedding(items[:length]) + model.position_embedding.weight[:length]
        hidden = theirs(x[None], torch.ones(1, length, 1), later[:length, :length], None)[0, -1]
        torch.testing.assert_close(found, model.item_embedding.weight @ hidden)
