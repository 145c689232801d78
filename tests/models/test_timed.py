"""TiM4Rec and SS4Rec: their layers against loops over single rows, and what they know of time."""

import pytest
import torch
import torch.nn.functional as F

from recbole_ssm.layers import Mamba2
from recbole_ssm.models.ss4rec import TimeAwareSSM
from recbole_ssm.models.tim4rec import TimeScale
from recbole_ssm.ops.packing import cu_seqlens_from_lengths

from ..conftest import build
from ..ops.loops import sequences

LENGTHS = {"one": [1], "mixed": [3, 1, 0, 7, 33], "empty ends": [0, 5, 0]}
TIMED = [
    ("TiM4Rec", {}),
    ("TiM4Rec", {"num_layers": 1}),
    ("SS4Rec", {}),
    ("SS4Rec", {"num_layers": 1}),
    ("SS4Rec", {"request_time": "known"}),
]


def held_system(ssm, u, gap, cu_seqlens):
    """The continuous system of :class:`TimeAwareSSM`, followed from event to event."""
    rates = torch.complex(-torch.exp(ssm.A_log), ssm.A_imag)
    into, out = ssm.into_state.weight, ssm.out_of_state.weight
    B = torch.complex(into[0::2], into[1::2])
    C = torch.complex(out[:, 0::2], -out[:, 1::2])
    outputs = []
    for _, begin, end in sequences(cu_seqlens):
        x = held = torch.zeros_like(rates)
        for t in range(begin, end):
            held = B @ u[t].to(B.dtype) if ssm.reads_ahead else held
            passed = rates * torch.exp(ssm.log_dt) * gap[t]
            x = torch.exp(passed) * x + (torch.exp(passed) - 1) / rates * held
            held = B @ u[t].to(B.dtype)
            outputs.append((C @ x).real + ssm.D * u[t])
    return torch.stack(outputs)


def time_by_rows(scale, time, cu_seqlens):
    """:class:`TimeScale`, one row of one sequence after another."""
    outputs, passed_on = [], []
    for _, begin, end in sequences(cu_seqlens):
        rows = [time[t] * scale.own(time[t]) for t in range(begin, end)]
        for conv in scale.convs:
            taps = conv.weight.squeeze(1)
            rows = [
                F.silu(
                    conv.bias + sum(taps[:, -1 - back] * rows[t - back] for back in range(min(t + 1, taps.shape[1])))
                )
                for t in range(len(rows))
            ]
        for row, t in zip(rows, range(begin, end), strict=True):
            gate = scale.gate(time[t])
            passed_on.append(scale.norm(gate * time[t] + (1 - gate) * row))
        outputs += rows
    return torch.stack(outputs), torch.stack(passed_on)


def outputs_and_gradients(module, function, *inputs):
    """What ``function`` gives, and the gradients of the inputs and of ``module``'s parameters."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    module.zero_grad()
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum((y.square() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() for y in outputs).backward()
    gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in (*inputs, *module.parameters())]
    return [*(y.detach() for y in outputs), *gradients]


def assert_close(found, expected, tolerance):
    for ours, true in zip(found, expected, strict=True):
        error = ((ours - true).abs().max() / true.abs().max().clamp_min(1e-2)).item()
        assert error <= tolerance


def timed_rows(lengths, width, dtype):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(lengths), width, generator=generator, dtype=torch.float64).to(dtype)
    gaps = 10 ** (8 * torch.rand(sum(lengths), generator=generator, dtype=torch.float64) - 1)
    gaps[::5] = 0
    return rows, gaps.round().to(dtype), cu_seqlens_from_lengths(torch.tensor(lengths))


@pytest.mark.parametrize("reads_ahead", [False, True], ids=["unknown", "known"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "autocast"),
    [(torch.float64, 1e-9, False), (torch.float32, 2e-3, False), (torch.float32, 0.1, True)],
    ids=["float64", "float32", "bfloat16"],
)
def test_the_time_aware_model_is_the_continuous_system(reads_ahead, lengths, dtype, tolerance, autocast):
    """Gaps from none to years of seconds; angles of thousands of turns are what float32 costs, in the loop as well."""
    torch.manual_seed(0)
    ssm = TimeAwareSSM(6, 5, reads_ahead).to(dtype)
    u, gap, cu_seqlens = timed_rows(lengths, 6, dtype)

    def ours(u):
        with torch.autocast("cpu", enabled=autocast):
            return ssm(u, gap, cu_seqlens).to(dtype)

    found = outputs_and_gradients(ssm, ours, u)
    ssm.double()
    expected = outputs_and_gradients(
        ssm, lambda u: held_system(ssm, u, gap.double(), cu_seqlens), u.double()
    )  # fmt: skip
    assert_close(found, expected, tolerance)


def test_it_starts_as_s5_does():
    """Its rates are the eigenvalues of HiPPO-LegS' normal part, its states those of the real system that this is."""
    torch.manual_seed(0)
    ssm = TimeAwareSSM(4, 8, reads_ahead=False).double()
    order = torch.arange(8, dtype=torch.float64)
    root = (2 * order + 1).sqrt()
    legs = -(root[:, None] * root).tril(-1) - torch.diag(order + 1)
    normal = legs + (order[:, None] + 0.5).sqrt() * (order + 0.5).sqrt()
    expected = torch.linalg.eigvals(normal)
    torch.testing.assert_close(ssm.A_imag.sort().values, expected.imag.sort().values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(-ssm.A_log.exp(), expected.real)
    B = torch.view_as_complex(ssm.into_state.weight.T.unflatten(-1, (-1, 2)).contiguous())
    basis = torch.linalg.eigh(-1j * (normal + 0.5 * torch.eye(8, dtype=torch.float64)))[1]
    basis = basis / basis[0].sgn()  # eigenvectors have any phase: these begin with a positive number, on every machine
    assert (basis @ B.T).imag.abs().max() < 1e-6


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "autocast"),
    [(torch.float64, 1e-9, False), (torch.float32, 1e-4, False), (torch.float32, 0.1, True)],
    ids=["float64", "float32", "bfloat16"],
)
def test_the_scale_of_step_sizes_row_by_row(lengths, dtype, tolerance, autocast):
    torch.manual_seed(0)
    scale = TimeScale(heads=3, d_conv=4, dropout_prob=0.0, passes_on=True).to(dtype)
    time, _, cu_seqlens = timed_rows(lengths, 3, dtype)

    def ours(time):
        with torch.autocast("cpu", enabled=autocast):
            return tuple(y.to(dtype) for y in scale(time, cu_seqlens)[:2])

    found = outputs_and_gradients(scale, ours, time)
    scale.double()
    assert_close(
        found, outputs_and_gradients(scale, lambda t: time_by_rows(scale, t, cu_seqlens), time.double()), tolerance
    )


@pytest.mark.parametrize("last", [False, True])
def test_scaled_step_sizes_are_those_of_a_scaled_projection(last):
    torch.manual_seed(0)
    block, scaled = Mamba2(8, 4, 4, 2, 4), Mamba2(8, 4, 4, 2, 4)
    scaled.load_state_dict(block.state_dict())
    factor = torch.tensor([0.0, 0.5, 1.0, 3.0])
    with torch.no_grad():
        scaled.in_proj.weight[-4:] *= factor[:, None]
    x, _, cu_seqlens = timed_rows([3, 1, 7], 8, torch.float32)
    read = cu_seqlens[1:].long() - 1 if last else None
    expected = scaled(x, cu_seqlens, read, last)
    torch.testing.assert_close(block(x, cu_seqlens, read, last, factor.expand(len(x), 4)), expected)
    assert not torch.allclose(block(x, cu_seqlens, read, last), expected, rtol=1e-3)


def lively(name, settings):
    """A model in float64 whose maps are as large as training makes them, so that nothing hides in rounding."""
    _, model, _ = build(name, **settings)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.3)
    return model.double().eval()


def with_columns(model, count, seed=0):
    """``count`` random items, with a time beside each where the model reads one."""
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(1, model.n_items, (count,), generator=generator)
    times = torch.randint(0, 100_000, (count, len(model.columns)), generator=generator)
    return torch.cat([items[:, None], times], 1) if model.columns else items


@pytest.mark.parametrize(("name", "settings"), TIMED, ids=str)
def test_what_follows_changes_nothing(name, settings):
    model = lively(name, settings)
    cu_seqlens = cu_seqlens_from_lengths(torch.tensor([9, 5]))
    items, other = with_columns(model, 14), with_columns(model, 14, seed=1)
    assert model.columns
    mixed = torch.cat([items[:6], other[6:9], items[9:12], other[12:]])
    with torch.no_grad():
        found, expected = model.encode(mixed, cu_seqlens), model.encode(items, cu_seqlens)
    before = [*range(6), *range(9, 12)]
    torch.testing.assert_close(found[before], expected[before])
    after = [6, 7, 8, 12, 13]
    assert ((found - expected)[after].abs().amax(1) > 1e-6).all()


@pytest.mark.parametrize(("name", "settings"), TIMED, ids=str)
def test_the_clock_alone_changes_what_comes_after_it(name, settings):
    """The gap before row 4 is read there; so is the one after it where that is known."""
    model = lively(name, settings)
    items, cu_seqlens = with_columns(model, 9), cu_seqlens_from_lengths(torch.tensor([9]))
    later = items.clone()
    later[4, 1] = 10**8
    with torch.no_grad():
        changed = (model.encode(later, cu_seqlens) - model.encode(items, cu_seqlens)).abs().amax(1)
    assert (changed[:4] == 0).all()
    assert (changed[4:] > 1e-9).all()


@pytest.mark.parametrize("name", ["TiM4Rec", "SS4Rec"])
def test_without_time_none_is_read(name):
    _, model, _ = build(name, time_aware=False)
    assert model.columns == ()


def test_a_request_at_the_time_of_the_last_event_tells_nothing():
    """A block that knows the request's time reads the same system, only later: after a gap of 0 the same."""
    torch.manual_seed(0)
    ahead, behind = TimeAwareSSM(6, 5, reads_ahead=True).double(), TimeAwareSSM(6, 5, reads_ahead=False).double()
    behind.load_state_dict(ahead.state_dict())
    u, gap, cu_seqlens = timed_rows([7], 6, torch.float64)
    until_next = torch.cat([gap[1:], gap.new_zeros(1)])
    torch.testing.assert_close(ahead(u, until_next, cu_seqlens)[-1], behind(u, gap, cu_seqlens)[-1])


def test_the_unit_of_time():
    _, seconds, _ = build("SS4Rec")
    _, days, _ = build("SS4Rec", time_unit=86400)
    days.load_state_dict(seconds.state_dict())
    items, cu_seqlens = with_columns(seconds, 9), cu_seqlens_from_lengths(torch.tensor([9]))
    in_days = items.clone()
    in_days[:, 1] *= 86400
    with torch.no_grad():
        found, expected = days.eval().encode(in_days, cu_seqlens), seconds.eval().encode(items, cu_seqlens)
    torch.testing.assert_close(found, expected)
