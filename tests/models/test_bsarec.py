"""BSARec's equations on rows with their padding in front, and its scores beside the released code's."""

import importlib
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recbole_ssm.models.bsarec import low_pass
from recbole_ssm.ops.packing import cu_seqlens_from_lengths

from ..conftest import build

LENGTH = 10
LENGTHS = [1, 10, 7, 3]


def built(**settings):
    """A model in float64 whose weights are far from where they start, its loaders, and sequences."""
    _, model, loaders = build("BSARec", MAX_ITEM_LIST_LENGTH=LENGTH, **settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    items = torch.randint(1, model.n_items, (sum(LENGTHS),))
    return model.double().eval(), loaders, items, cu_seqlens_from_lengths(torch.tensor(LENGTHS))


@pytest.mark.parametrize("length", [1, 2, 9, 10])
@pytest.mark.parametrize("c", [0, 3, 5, 40])
def test_low_pass_keeps_the_mean_and_the_lowest_frequencies(length, c):
    row = torch.randn(length, 3)
    spectrum = torch.fft.rfft(row, dim=0, norm="ortho")
    spectrum[c // 2 + 1 :] = 0
    expected = torch.fft.irfft(spectrum, n=length, dim=0, norm="ortho")
    torch.testing.assert_close(low_pass(length, c) @ row, expected, rtol=1e-5, atol=1e-6)


def by_equations(model, items):
    """The paper's layers on one row, ``[L, d]``; padding sees all that there is, as in the released code."""
    begin = LENGTH - len(items)
    row = torch.cat([items.new_zeros(begin), items])
    x = model.norm(model.item_embedding.weight[row] + model.position_embedding.weight)
    place = torch.arange(LENGTH)
    hidden = (place > place[:, None]) | (place < begin)
    hidden &= place[:, None] >= begin
    for layer in model.layers:
        spectrum = torch.fft.rfft(x, dim=0, norm="ortho")
        spectrum = torch.cat([spectrum[:3], torch.zeros_like(spectrum[3:])])  # c = 5
        low = torch.fft.irfft(spectrum, n=LENGTH, dim=0, norm="ortho")
        filtered = layer.filter_norm(x + low + layer.sqrt_beta**2 * (x - low))
        contexts = []
        for q, k, v in zip(*(p(x).chunk(2, -1) for p in (layer.query, layer.key, layer.value)), strict=True):
            scores = (q @ k.T / q.shape[1] ** 0.5).masked_fill(hidden, -torch.inf)
            contexts.append(scores.softmax(-1) @ v)
        attended = layer.attention_norm(x + layer.out_proj(torch.cat(contexts, -1)))
        y, network = 0.7 * filtered + 0.3 * attended, layer.feed_forward
        x = network.norm(y + network.contract(F.gelu(network.expand(y))))
    return x[begin:]


@pytest.mark.parametrize("last", [False, True])
def test_the_model_is_the_papers_equations(last):
    """Outputs and gradients, of all items of a row or its last alone; in float64 up to the filter's float32."""
    model, _, items, cu_seqlens = built(n_heads=2)
    read = cu_seqlens[1:].long() - 1
    expected = torch.cat([by_equations(model, row) for row in items.split(LENGTHS)])
    expected = expected[read] if last else expected
    found = model.encode(items, cu_seqlens, read if last else None, last)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    # The padding's embedding has no gradient but that of its score.
    gradients = [
        torch.autograd.grad((hidden * weights).sum(), list(model.parameters())) for hidden in (found, expected)
    ]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for (name, _), ours, theirs in zip(model.named_parameters(), *gradients, strict=True):
        if name == "item_embedding.weight":
            assert (ours[0] == 0).all()
            ours, theirs = ours[1:], theirs[1:]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_the_history_is_left_out_of_the_ranking_of_rows():
    _, _, (_, _, test_data) = build("BSARec", exclude_history=True, MAX_ITEM_LIST_LENGTH=3)
    dataset = test_data._dataset
    for rows, (row, item), _, targets in test_data:
        for i, target in enumerate(rows["target_position"].tolist()):
            history = dataset.sorted_items[int(dataset.user_start[target]) : target].tolist()
            assert set(item[row == i].tolist()) == set(history) - {int(targets[i])}


NAMES = {
    "item_embedding": "item_embeddings", "position_embedding": "position_embeddings", "norm": "LayerNorm",
    "layers": "item_encoder.blocks", "filter_norm": "layer.filter_layer.LayerNorm",
    "query": "layer.attention_layer.query",
    "sqrt_beta": "layer.filter_layer.sqrt_beta", "key": "layer.attention_layer.key",
    "value": "layer.attention_layer.value", "out_proj": "layer.attention_layer.dense",
    "attention_norm": "layer.attention_layer.LayerNorm", "expand": "dense_1", "contract": "dense_2",
}  # fmt: skip


@pytest.mark.skipif("BSAREC" not in os.environ, reason="BSAREC names no checkout of yehjin-shin/BSARec")
def test_scores_are_those_of_the_released_code(monkeypatch):
    """It hides places by adding -10000 to scores, which float32 rounds by up to 0.0005; float64 hides nothing."""
    model, (_, _, test_data), *_ = built(n_heads=2)
    package = types.ModuleType("model")  # without its other models
    package.__path__ = [str(Path(os.environ["BSAREC"], "src", "model"))]
    monkeypatch.setitem(sys.modules, "model", package)
    released = importlib.import_module("model.bsarec")
    sizes = {
        "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "max_seq_length": LENGTH, "c": 5,
        "alpha": 0.7, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02, "item_size": model.n_items, "batch_size": 4,
    }  # fmt: skip
    theirs = released.BSARecModel(types.SimpleNamespace(**sizes)).double().eval()
    weights = {}
    for name, value in model.state_dict().items():
        name = ".".join(NAMES.get(part, part) for part in name.split("."))
        weights[name] = value.expand(1, 1, -1) if name.endswith("sqrt_beta") else value
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert all(name.endswith("key.bias") for name in missing), missing
    assert not unexpected
    rows = test_data._dataset[np.arange(len(test_data._dataset))]
    lengths = rows["item_length"]
    lists = torch.stack(
        [
            torch.cat([row.new_zeros(LENGTH - n), row[:n]])
            for row, n in zip(rows["item_id_list"], lengths.tolist(), strict=True)
        ]
    )
    with torch.no_grad():
        expected = theirs(lists)[:, -1] @ theirs.item_embeddings.weight.T
        torch.testing.assert_close(model.full_sort_predict(rows), expected, rtol=1e-5, atol=1e-5)
