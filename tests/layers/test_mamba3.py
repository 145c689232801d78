"""The Mamba-3 block against its recurrence, row by row: outputs, final states and all gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from recbole_ssm.layers import Mamba3
from recbole_ssm.ops.packing import cu_seqlens_from_lengths

LENGTHS = [1, 0, 7, 3, 2]
D_MODEL = 8


def block(dtype=torch.float32, backend="auto", seed=0, d_state=10):
    """One whose every weight counts: rates, angles and step sizes far from where they start."""
    torch.manual_seed(seed)
    made = Mamba3(D_MODEL, d_state, 2, 4, backend)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.5)
    return made.to(dtype)


def by_rows(block, x, lengths):
    """The paper's recurrence with a state that rotates: pairs of states are complex numbers.

    Returns:
        Outputs ``[T, d]`` and the states after the last rows, each ``[S, ...]``, of which an empty sequence has zeros.
    """
    heads, pairs, width = len(block.D), block.n_angles, block.headdim
    sizes = [block.d_inner, block.d_state, block.d_inner, block.d_state, heads, heads, heads, pairs]
    outputs, states = [], []
    rows = iter(x)
    for length in lengths:
        turning = x.new_zeros(heads, width, pairs, dtype=torch.complex128)
        fixed = x.new_zeros(heads, width, block.d_state - 2 * pairs)
        before, angle = None, x.new_zeros(heads, pairs)
        for _ in range(length):
            z, C, u, B, dt, rate, trapezoid, omega = (block.in_proj.weight @ next(rows)).split(sizes)
            u = u.view(heads, width)
            dt = F.softplus(dt + block.dt_bias)
            alpha = torch.exp(-dt * F.softplus(rate).clamp_min(1e-4))
            share = torch.sigmoid(trapezoid)
            turn = math.pi * dt[:, None] * torch.tanh(omega)
            B = F.rms_norm(B, B.shape, block.B_norm.weight, 1e-5) + block.B_bias
            C = F.rms_norm(C, C.shape, block.C_norm.weight, 1e-5) + block.C_bias
            now = [m[:, : 2 * pairs].unflatten(-1, (-1, 2)).contiguous() for m in (B, C)]
            b, c = (torch.view_as_complex(m) for m in now)
            new = (u[..., None] * b[:, None], u[..., None] * B[:, None, 2 * pairs :])
            if before is not None:
                late = ((1 - share) * dt)[:, None, None]
                turning, fixed = turning + late * before[0], fixed + late * before[1]
            rotation = torch.polar(torch.ones_like(turn), -turn)
            gain = (share * dt)[:, None, None]
            turning = alpha[:, None, None] * rotation[:, None] * turning + gain * new[0]
            fixed = alpha[:, None, None] * fixed + gain * new[1]
            y = (turning * c[:, None].conj()).real.sum(-1) + (fixed * C[:, None, 2 * pairs :]).sum(-1)
            outputs.append(block.out_proj((y + block.D[:, None] * u).flatten() * F.silu(z)))
            before, angle = new, angle + turn
        # The block keeps its state unrotated: what the rows' angles have turned it by, turned back.
        back = torch.polar(torch.ones_like(angle), angle)[:, None]
        states.append(torch.cat([torch.view_as_real(turning * back).flatten(-2), fixed], -1))
    return torch.stack(outputs), torch.stack(states)


def results(block, x, outputs):
    """Outputs and the gradients of one function of them."""
    weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(i)) for i, o in enumerate(outputs)]
    total = sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True))
    names, parameters = zip(*block.named_parameters(), strict=True)
    gradients = torch.autograd.grad(total, [x, *parameters])
    return dict(zip(["output", "state"], outputs, strict=False)) | dict(zip(["x", *names], gradients, strict=True))


def assert_equal(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        largest = max(1.0, float(value.detach().abs().max()))
        off = float((found[name].detach().double() - value.detach()).abs().max()) / largest
        assert off < tolerance, f"{name}: {off}"


def truth(backend="auto", states=False):
    exact = block(torch.float64)
    x = torch.randn(sum(LENGTHS), D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outputs = by_rows(exact, x.requires_grad_(), LENGTHS)
    return x.detach(), results(exact, x, outputs if states else outputs[:1])


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("reference", torch.float64, 1e-10), ("cpu", torch.float32, 3e-5), ("triton", torch.float32, 3e-5)],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_the_recurrence(backend, dtype, tolerance):
    x, expected = truth()
    tested = block(dtype, backend)
    x = x.to(dtype).requires_grad_()
    assert_equal(results(tested, x, [tested(x, cu_seqlens_from_lengths(torch.tensor(LENGTHS)))]), expected, tolerance)


def test_final_states_and_their_gradients_are_those_of_the_recurrence():
    x, expected = truth(states=True)
    tested = block(torch.float64, "reference")
    x.requires_grad_()
    y, state = tested.carry(x, cu_seqlens_from_lengths(torch.tensor(LENGTHS)), tested.initial_state(len(LENGTHS)))
    assert_equal(results(tested, x, [y, state["ssm"]]), expected, 1e-10)


@pytest.mark.parametrize("decay", [1e-3, 1e-6, 1e-12, 0.0])
def test_gradients_hold_where_nearly_nothing_decays(decay):
    """Inputs are divided by the decay there, and their gradients through it cancel."""
    found = {}
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "cpu")):
        tested = block(dtype, backend)
        with torch.no_grad():
            tested.dt_bias.fill_(math.log(math.expm1(decay)) if decay else -200.0)
        x = torch.randn(20, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)
        x.requires_grad_()
        found[dtype] = results(tested, x, [tested(x, torch.tensor([0, 13, 20], dtype=torch.int32))])
    assert all(value.isfinite().all() for value in found[torch.float32].values())
    assert_equal(found[torch.float32], found[torch.float64], 3e-5)


def test_last_rows_alone():
    tested, lengths = block(), torch.tensor([1, 17, 3, 2])
    cu_seqlens = cu_seqlens_from_lengths(lengths)
    x = torch.randn(23, D_MODEL)
    read = cu_seqlens[1:].long() - 1
    torch.testing.assert_close(tested(x, cu_seqlens, read, last=True), tested(x, cu_seqlens)[read])
    some = torch.tensor([4, 0, 22])
    torch.testing.assert_close(tested(x, cu_seqlens, some), tested(x, cu_seqlens)[some])


def test_rows_one_by_one_and_in_pieces_are_the_whole():
    tested, x = block(), torch.randn(3, 9, D_MODEL)
    with torch.no_grad():
        expected = tested(x.flatten(0, 1), torch.tensor([0, 9, 18, 27], dtype=torch.int32)).view(3, 9, D_MODEL)
        state = tested.initial_state(3)
        for t in range(4):
            y, state = tested.carry(x[:, t], None, state)
            torch.testing.assert_close(y, expected[:, t], rtol=1e-4, atol=1e-5)
        # The second goes on by three rows, the third by five; of the first there is nothing new.
        before = state
        pieces = torch.cat([x[1, 4:7], x[2, 4:]])
        y, state = tested.carry(pieces, torch.tensor([0, 0, 3, 8], dtype=torch.int32), state)
        torch.testing.assert_close(y, torch.cat([expected[1, 4:7], expected[2, 4:]]), rtol=1e-4, atol=1e-5)
        for name, value in state.items():
            torch.testing.assert_close(value[0], before[name][0])
        assert ((state["angle"] >= 0) & (state["angle"] < 2 * math.pi)).all()


def test_bfloat16_autocast_is_near():
    tested, cu_seqlens = block(), torch.tensor([0, 5, 21], dtype=torch.int32)
    x = torch.randn(21, D_MODEL, generator=torch.Generator().manual_seed(3)).requires_grad_()
    expected = results(tested, x, [tested(x, cu_seqlens)])
    with torch.autocast("cpu", torch.bfloat16):
        y = tested(x, cu_seqlens)
    assert y.dtype == torch.bfloat16
    assert_equal(results(tested, x, [y]), {n: v.double() for n, v in expected.items()}, 0.05)


@pytest.mark.parametrize("sequences", [0, 2])
def test_no_rows_at_all(sequences):
    tested, cu_seqlens = block(), torch.zeros(sequences + 1, dtype=torch.int32)
    x = torch.zeros(0, D_MODEL, requires_grad=True)
    y = tested(x, cu_seqlens)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, D_MODEL)
    state = tested.initial_state(sequences)
    _, after = tested.carry(x, cu_seqlens, state)
    assert all(torch.equal(after[name], value) for name, value in state.items())


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="headdim 5 does not divide expand \\* hidden_size = 16"):
        Mamba3(8, 8, 2, 5)
    with pytest.raises(ValueError, match="d_state 3 leaves no pair of states to rotate"):
        Mamba3(8, 3, 2, 4)
