"""The recurrence with complex decays, against its definition as a loop."""

import pytest
import torch

from recbole_ssm.ops.packing import cu_seqlens_from_lengths
from recbole_ssm.ops.rotating_scan import rotating_scan

from .loops import sequences

LENGTHS = {"one": [1], "mixed": [3, 1, 33, 0, 2, 17, 16], "empty ends": [0, 5, 0], "long": [63, 300], "none": [0, 0]}


def loop(x, log_decay, cu_seqlens):
    outputs = []
    for _, begin, end in sequences(cu_seqlens):
        h = torch.zeros_like(x[0]) if end > begin else None
        for t in range(begin, end):
            h = torch.exp(log_decay[t]) * h + x[t]
            outputs.append(h)
    return torch.stack(outputs)


def inputs(lengths, widest=1.0):
    """Steps from 0.01 to ``10 ** widest``, some of 0, of states that turn hundreds of times as fast as they fade."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    total, states = sum(lengths), 5
    rates = torch.complex(-normal(states).abs() - 0.1, 100 * normal(states))
    steps = 10 ** (torch.rand(total, 1, generator=generator, dtype=torch.float64) * (widest + 2) - 2)
    steps[::7] = 0.0
    x = torch.complex(normal(total, states), normal(total, states))
    # Rounded once, so that all dtypes are given the same numbers.
    return x.to(torch.complex64).to(torch.complex128), (rates * steps).to(torch.complex64).to(torch.complex128)


def results(function, x, log_decay, lengths, dtype=torch.complex128, **settings):
    x, log_decay = (tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in (x, log_decay))
    h = function(x, log_decay, cu_seqlens=cu_seqlens_from_lengths(torch.tensor(lengths)), **settings)
    weights = torch.linspace(-1, 1, h.numel(), dtype=h.real.dtype).view(h.shape)
    ((h.real**2 + h.imag * h.real) * weights).sum().backward()
    return h.detach(), x.grad, log_decay.grad


@pytest.mark.parametrize("widest", [0.0, 7.0], ids=["short gaps", "gaps of all lengths"])
@pytest.mark.parametrize("lengths", [v for k, v in LENGTHS.items() if k != "none"], ids=str)
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("reference", torch.complex128, 1e-9), ("reference", torch.complex64, 3e-5), ("cpu", torch.complex64, 3e-5)],
    ids=["float64", "float32", "compiled"],
)
def test_it_is_the_recurrence(lengths, widest, backend, dtype, tolerance):
    x, log_decay = inputs(lengths, widest)
    expected = results(loop, x, log_decay, lengths)
    found = results(rotating_scan, x, log_decay, lengths, dtype, backend=backend)
    for name, ours, true in zip(("h", "x.grad", "log_decay.grad"), found, expected, strict=True):
        assert ours.dtype == dtype
        error = (ours - true).abs().max() / true.abs().max().clamp_min(1e-3)
        assert error <= tolerance, f"{name}: {error}"


def test_a_long_gap_costs_its_rate_no_accuracy():
    """What a rate's gradient sums over steps of up to 10 million is as exact as the recurrence itself."""
    lengths = [100, 100]
    x, log_decay = inputs(lengths, widest=7.0)
    steps = log_decay.real / log_decay.real[1]
    true = (steps * results(loop, x, log_decay, lengths)[2]).sum(0)
    ours = (steps * results(rotating_scan, x, log_decay, lengths, torch.complex64)[2]).sum(0)
    assert (ours - true).abs().max() < 1e-4 * true.abs().max()


def test_nothing_at_all():
    lengths = LENGTHS["none"]
    x, log_decay = inputs(lengths)
    assert results(rotating_scan, x, log_decay, lengths)[0].shape == (0, 5)


def test_shapes_that_do_not_fit_are_refused():
    x, log_decay = inputs([4])
    cu_seqlens = cu_seqlens_from_lengths(torch.tensor([4]))
    with pytest.raises(ValueError, match=r"x \[4, 5\] and log_decay \[4, 4\] do not fit"):
        rotating_scan(x, log_decay[:, :-1], cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="x has 4 rows, but cu_seqlens ends at 3"):
        rotating_scan(x, log_decay, cu_seqlens=cu_seqlens_from_lengths(torch.tensor([3])))
