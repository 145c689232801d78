"""The low-pass filter against its recurrence, packed, in parts and backwards."""

import pytest
import torch

from recbole_ssm.layers import MambaLayer, MovingAverage
from recbole_ssm.ops.packing import cu_seqlens_from_lengths

LENGTHS = [5, 1, 0, 64, 3, 127]


def made(dtype=torch.float64, size=6):
    torch.manual_seed(0)
    layer = MovingAverage(size, 0.0).to(dtype)
    rows = torch.randn(sum(LENGTHS), size, dtype=dtype, requires_grad=True)
    return layer, rows, cu_seqlens_from_lengths(torch.tensor(LENGTHS))


def by_recurrence(layer, rows):
    """The layer's output for the packed rows, as its equations have it."""
    outputs, kept = [], torch.exp(-torch.nn.functional.softplus(layer.Lambda))
    for sequence in rows.split(LENGTHS):
        low = torch.zeros_like(kept)
        for x in sequence:
            low = kept * low + (1 - kept) * x
            outputs.append(layer.norm(x + low + layer.beta**2 * (x - low)))
    return torch.stack(outputs)


def test_outputs_and_gradients_are_those_of_the_recurrence():
    layer, rows, cu_seqlens = made()
    wanted = by_recurrence(layer, rows)
    found = layer(rows, cu_seqlens)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn_like(wanted)
    of = [rows, *layer.parameters()]
    for one, other in zip(*(torch.autograd.grad((y * weights).sum(), of) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_lower_precision_is_near(dtype, tolerance):
    exact, rows, cu_seqlens = made()
    layer = MovingAverage(6, 0.0).to(dtype)
    layer.load_state_dict(exact.state_dict())
    found = layer(rows.to(dtype), cu_seqlens)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact(rows, cu_seqlens), rtol=tolerance, atol=tolerance)


def test_some_rows_or_the_last_ones_alone():
    layer, rows, cu_seqlens = made()
    every = layer(rows, cu_seqlens)
    read = torch.tensor([0, 4, 70, 199])
    torch.testing.assert_close(layer(rows, cu_seqlens, read), every[read])
    lengths = torch.tensor([length for length in LENGTHS if length])
    last = lengths.cumsum(0) - 1
    torch.testing.assert_close(layer(rows, cu_seqlens_from_lengths(lengths), last, last=True), every[last])
    assert layer(rows[:0], cu_seqlens_from_lengths(torch.tensor([], dtype=torch.int64))).shape == (0, 6)


@torch.no_grad()
def test_a_history_in_parts_is_the_whole():
    layer, rows, cu_seqlens = made()
    wanted, state = layer.carry(rows, cu_seqlens, layer.initial_state(len(LENGTHS)))
    torch.testing.assert_close(wanted, layer(rows, cu_seqlens))
    one = rows[6:70]  # the sequence of 64
    now = layer.initial_state(1)
    for row, expected in zip(one, wanted[6:70], strict=True):
        found, now = layer.carry(row[None], None, now)
        torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(now["low"][0], state["low"][3])


@torch.no_grad()
def test_a_layers_share_of_it():
    torch.manual_seed(1)
    layer = MambaLayer(6, 4, 3, 2, 0.0, stacked=False, filter_share=0.25).double()
    plain = MambaLayer(6, 4, 3, 2, 0.0, stacked=False).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    _, rows, cu_seqlens = made()
    wanted = 0.75 * plain(rows, cu_seqlens) + 0.25 * layer.filter(rows, cu_seqlens)
    torch.testing.assert_close(layer(rows, cu_seqlens), wanted)
    found, state = layer.carry(rows, cu_seqlens, layer.initial_state(len(LENGTHS)))
    torch.testing.assert_close(found, wanted)
    assert state.keys() == {"conv", "ssm", "low"}
