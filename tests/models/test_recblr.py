"""RecBLR's recurrence row by row, and its scores beside the released code's."""

import importlib.util
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recbole_ssm.models.recblr import GatedRecurrence
from recbole_ssm.ops.packing import cu_seqlens_from_lengths

from ..conftest import build

LENGTHS = [1, 0, 7, 3, 2]
WIDTH = 6


def unit(dtype, backend, Lambda=None):
    """One whose gates are far from where they start."""
    torch.manual_seed(0)
    made = GatedRecurrence(WIDTH, 3, 2, backend)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.5)
        if Lambda is not None:
            made.Lambda.fill_(Lambda)
    return made.to(dtype)


def by_rows(unit, x):
    """Outputs and last states of the paper's recurrence, as it stands there."""
    outputs, states, rows = [], [], iter(x)
    taps = unit.conv.weight.shape[2]
    for length in LENGTHS:
        h = x.new_zeros(unit.Lambda.shape)
        before = [torch.zeros_like(h)] * taps
        for _ in range(length):
            u, z = (unit.in_proj.weight @ next(rows)).chunk(2)
            before = [*before[1:], u]
            u = F.silu((torch.stack(before, -1) * unit.conv.weight[:, 0]).sum(-1) + unit.conv.bias)
            r, i = torch.sigmoid(unit.gates(u)).chunk(2)
            alpha = torch.exp(-F.softplus(unit.Lambda) * r)
            h = alpha * h + torch.sqrt(1 - alpha**2) * i * u
            outputs.append(unit.out_proj(F.silu(z) * h))
        states.append(h)
    return torch.stack(outputs), torch.stack(states)


def results(unit, x, outputs):
    names, parameters = zip(*unit.named_parameters(), strict=True)
    weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(i)) for i, o in enumerate(outputs)]
    total = sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True))
    gradients = torch.autograd.grad(total, [x, *parameters])
    return dict(zip(["output", "state"], outputs, strict=False)) | dict(zip(["x", *names], gradients, strict=True))


@pytest.mark.parametrize("Lambda", [None, -15.0, 5.0])
@pytest.mark.parametrize(
    ("dtype", "backend", "tolerance"),
    [(torch.float64, "reference", 1e-9), (torch.float32, "cpu", 1e-4), (torch.float32, "triton", 1e-4)],
    ids=str,
)
def test_the_scan_is_the_recurrence(dtype, backend, tolerance, Lambda):
    """Outputs, last states and all gradients; with units that forget nothing, too, whose decay is divided by."""
    x = torch.randn(sum(LENGTHS), WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    exact = unit(torch.float64, "reference", Lambda)
    expected = results(exact, x, by_rows(exact, x))
    tested, x = unit(dtype, backend, Lambda), x.detach().to(dtype).requires_grad_()
    y, state = tested.carry(x, cu_seqlens_from_lengths(torch.tensor(LENGTHS)), tested.initial_state(len(LENGTHS)))
    found = results(tested, x, [y, state["h"][..., 0]])
    for name, value in expected.items():
        off = (found[name].double() - value).abs().max() / value.abs().max().clamp_min(1.0)
        assert off < tolerance, f"{name}: {off}"


def test_units_begin_with_the_papers_range():
    unit = GatedRecurrence(WIDTH, 4, 2)
    alpha = torch.exp(-F.softplus(unit.Lambda))
    torch.testing.assert_close(alpha[[0, -1]], torch.tensor([0.9, 0.999]))
    assert (alpha.diff() > 0).all()


NAMES = {
    "norm": "layer_norm", "recurrence.conv": "behavior_modeling.conv1d", "recurrence": "behavior_modeling",
    "in_proj": "input", "out_proj": "output", "expand": "w_1", "contract": "w_2", "feed_forward": "ffn",
    "layers": "recurrent_layers",
}  # fmt: skip


@pytest.mark.skipif("RECBLR" not in os.environ, reason="RECBLR names no checkout of chengkai-liu/RecBLR")
def test_scores_are_those_of_the_released_code(monkeypatch):
    """Of rows as long as a power of two; others it scans from what its padding leaves in the states."""
    config, model, (_, _, test_data) = build("RecBLR", MAX_ITEM_LIST_LENGTH=16)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.4)

    def parallel_scan(gates, tokens):  # its own is of a GPU
        states = [torch.zeros_like(tokens[..., 0])]
        for alpha, entering in zip(gates.unbind(-1), tokens.unbind(-1), strict=True):
            states.append(alpha * states[-1] + entering)
        return torch.stack(states[1:], -1)

    monkeypatch.setitem(sys.modules, "parallel_scan", types.SimpleNamespace(parallel_scan=parallel_scan))
    if importlib.util.find_spec("einops") is None:
        monkeypatch.setitem(sys.modules, "einops", types.SimpleNamespace(rearrange=None))
    spec = importlib.util.spec_from_file_location("released_recblr", Path(os.environ["RECBLR"], "RecBLR.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs = module.RecBLR(config, test_data._dataset)
    weights = {}
    for name, value in model.state_dict().items():
        for ours, released in NAMES.items():
            name = f".{name}".replace(f".{ours}.", f".{released}.").removeprefix(".")
        weights[name] = value
    theirs.load_state_dict(weights)
    rows = test_data._dataset[np.arange(len(test_data._dataset))]
    with torch.no_grad():
        scores, expected = (one.eval().full_sort_predict(rows) for one in (model, theirs))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
