"""Every op and backend against float64 loops: outputs, final states and all gradients."""

import functools

import pytest
import torch

from recbole_ssm.ops import causal_conv, preference_attention, selective_scan, ssd
from recbole_ssm.ops.packing import cu_seqlens_from_lengths

from . import loops

LENGTHS = {
    "one": [1],
    "two": [2],
    "odd": [63],
    "long": [200],
    "mixed": [3, 1, 63, 0, 2, 64, 65, 1, 17],
    "empty ends": [0, 5, 0],
}
DTYPES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised memory is NaN, so that a row which a kernel forgets to write shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(deterministic)


def leaves(dtype, **shapes):
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    for name in ("dt", "A"):
        if name in drawn:
            drawn[name] = drawn[name].abs() * (1 if name == "dt" else -1)
    return {name: t.to(dtype).requires_grad_() for name, t in drawn.items()}


def check(outputs, inputs, truth_function, dtype, tolerance):
    """Compare outputs and gradients with those of ``truth_function`` on the same (rounded) inputs in float64."""
    exact = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    truth = truth_function(exact)
    assert len(outputs) == len(truth)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in truth]
    gradients = torch.autograd.grad(
        sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True)), list(inputs.values())
    )
    expected = torch.autograd.grad(
        sum((o * w).sum() for o, w in zip(truth, weights, strict=True)), list(exact.values())
    )
    named = [("output", outputs[0], truth[0])]
    named += [("final state", outputs[i], truth[i]) for i in range(1, len(outputs))]
    named += [(f"gradient of {n}", g, e) for n, g, e in zip(inputs, gradients, expected, strict=True)]
    for name, got, want in named:
        scale = want.abs().max().clamp_min(1.0) if want.numel() else 1.0
        torch.testing.assert_close(
            got.double() / scale, want / scale, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", dtype) for dtype in DTYPES] + [("cpu", torch.float32), ("cpu", torch.bfloat16)],
    ids=str,
)
def test_selective_scan(lengths, dtype, backend):
    total, sequences, channels, states = sum(lengths), len(lengths), 5, 7
    cu_seqlens = cu_seqlens_from_lengths(torch.tensor(lengths))
    inputs = leaves(
        dtype,
        x=(total, channels), dt=(total, channels), A=(channels, states), B=(total, states), C=(total, states),
        D=(channels,), z=(total, channels), dt_bias=(channels,), initial_state=(sequences, channels, states),
    )  # fmt: skip

    def truth(i):
        step = torch.nn.functional.softplus(i["dt"] + i["dt_bias"])
        y, state = loops.selective_scan_loop(i["x"], step, i["A"], i["B"], i["C"], i["initial_state"], cu_seqlens)
        return (y + i["D"] * i["x"]) * torch.nn.functional.silu(i["z"]), state

    outputs = selective_scan(
        **inputs, dt_softplus=True, cu_seqlens=cu_seqlens, return_final_state=True, backend=backend
    )
    assert outputs[0].dtype == dtype
    check(outputs, inputs, truth, dtype, DTYPES[dtype])


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2])
def test_ssd(lengths, dtype, groups):
    total, sequences, heads, width, states = sum(lengths), len(lengths), 4, 3, 5
    cu_seqlens = cu_seqlens_from_lengths(torch.tensor(lengths))
    inputs = leaves(
        dtype,
        x=(total, heads, width), dt=(total, heads), A=(heads,), B=(total, groups, states), C=(total, groups, states),
        D=(heads,), dt_bias=(heads,), initial_state=(sequences, heads, width, states),
    )  # fmt: skip

    def truth(i):
        step = torch.nn.functional.softplus(i["dt"] + i["dt_bias"])
        y, state = loops.ssd_loop(i["x"], step, i["A"], i["B"], i["C"], i["initial_state"], cu_seqlens)
        return y + i["D"][:, None] * i["x"], state

    outputs = ssd(**inputs, dt_softplus=True, cu_seqlens=cu_seqlens, return_final_state=True, chunk_size=16)
    assert outputs[0].dtype == dtype
    check(outputs, inputs, truth, dtype, DTYPES[dtype])


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", [1, 2, 4, 8])
def test_causal_conv(lengths, dtype, taps):
    cu_seqlens = cu_seqlens_from_lengths(torch.tensor(lengths))
    inputs = leaves(dtype, x=(sum(lengths), 5), weight=(5, taps), bias=(5,), initial_state=(len(lengths), 5, taps - 1))

    def truth(i):
        y, state = loops.causal_conv_loop(i["x"], i["weight"], i["initial_state"], cu_seqlens)
        return torch.nn.functional.silu(y + i["bias"]), state

    outputs = causal_conv(**inputs, activation="silu", cu_seqlens=cu_seqlens, return_final_state=True)
    assert outputs[0].dtype == dtype
    check(outputs, inputs, truth, dtype, DTYPES[dtype])


@pytest.mark.parametrize("lengths", [[1], [2], [63], [3, 1, 17, 10, 0, 2]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metrics", [1, 3], ids=["one metric", "metric a head"])
@pytest.mark.parametrize("window", [None, 4])
def test_preference_attention(lengths, dtype, metrics, window):
    cu_seqlens = cu_seqlens_from_lengths(torch.tensor(lengths))
    heads, width, total = 3, 5, sum(lengths)
    inputs = leaves(
        dtype,
        q=(total, heads, width), k=(total, heads, width), v=(total, heads, width), feature=(total, metrics, 4),
        score_weight=(heads,), similarity_weight=(heads,),
    )  # fmt: skip
    threshold = torch.tensor([-0.5, 0.0, 0.3], dtype=torch.float64)

    def truth(i):
        return (loops.preference_attention_loop(*i.values(), threshold, cu_seqlens, window),)

    out = preference_attention(*inputs.values(), threshold, cu_seqlens=cu_seqlens, window=window)
    assert out.dtype == dtype
    # A cosine that bfloat16 rounding moves over the threshold is another function; float32 cosines do not do so here.
    check((out,), inputs, truth, dtype, DTYPES[dtype])


@pytest.mark.parametrize("lengths", [[1], [5, 0, 70, 3]], ids=str)
def test_a_state_left_out_is_zero(lengths):
    """Without an initial state, and with or without asking for the final one, outputs are the same."""
    cu_seqlens, total, count = cu_seqlens_from_lengths(torch.tensor(lengths)), sum(lengths), len(lengths)
    scan = leaves(torch.float32, x=(total, 3), dt=(total, 3), A=(3, 2), B=(total, 2), C=(total, 2))
    dual = leaves(torch.float32, x=(total, 2, 3), dt=(total, 2), A=(2,), B=(total, 1, 2), C=(total, 1, 2))
    conv = leaves(torch.float32, x=(total, 3), weight=(3, 4))
    for op, inputs, shape in (
        (functools.partial(selective_scan, backend="reference"), scan, (count, 3, 2)),
        (functools.partial(selective_scan, backend="cpu"), scan, (count, 3, 2)),
        (functools.partial(ssd, chunk_size=16), dual, (count, 2, 3, 2)),
        (ssd, dual, (count, 2, 3, 2)),
        (causal_conv, conv, (count, 3, 3)),
    ):
        y, state = op(**inputs, cu_seqlens=cu_seqlens, initial_state=torch.zeros(shape), return_final_state=True)
        again, final = op(**inputs, cu_seqlens=cu_seqlens, return_final_state=True)
        torch.testing.assert_close(again, y)
        torch.testing.assert_close(final, state)
        torch.testing.assert_close(op(**inputs, cu_seqlens=cu_seqlens), y)


@pytest.mark.parametrize("window", [None, 4])
def test_last_queries_equal_the_last_of_all(window):
    cu_seqlens = cu_seqlens_from_lengths(torch.tensor([3, 1, 40, 7]))
    inputs = leaves(
        torch.float64,
        q=(51, 2, 3), k=(51, 2, 3), v=(51, 2, 3), feature=(51, 2, 4), score_weight=(2,), similarity_weight=(2,),
    )  # fmt: skip
    threshold = torch.zeros(2, dtype=torch.float64)
    every = preference_attention(*inputs.values(), threshold, cu_seqlens=cu_seqlens, window=window)
    last = preference_attention(*inputs.values(), threshold, cu_seqlens=cu_seqlens, window=window, queries="last")
    torch.testing.assert_close(last, every[cu_seqlens[1:].long() - 1])


def test_attention_without_similarity_is_torch_attention():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(9, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    ones, zeros = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 9], dtype=torch.int32)
    ours = preference_attention(q, k, v, torch.randn(9, 1, 3).double(), ones, zeros, zeros, cu_seqlens=cu_seqlens)
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ours, theirs.transpose(0, 1))


def test_cpu_scan_does_not_depend_on_the_number_of_threads():
    import numba

    cu_seqlens = cu_seqlens_from_lengths(torch.tensor([7, 1, 30, 4, 90, 2] * 8))
    inputs = leaves(
        torch.float32, x=(1072, 6), dt=(1072, 6), A=(6, 4), B=(1072, 4), C=(1072, 4)
    )  # fmt: skip
    results = []
    threads = numba.get_num_threads()
    for count in (1, threads):
        numba.set_num_threads(count)
        y = selective_scan(**inputs, cu_seqlens=cu_seqlens, backend="cpu")
        results.append([y, *torch.autograd.grad(y.square().sum(), list(inputs.values()))])
    numba.set_num_threads(threads)
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


def test_compiled_exponential_holds_its_stated_error():
    """The whole range that a decay can take, far below the smallest that matters included."""
    steps = torch.cat([torch.linspace(0, 20, 2001), torch.tensor([63.9, 64.0, 1e3, 1e6])])
    count = len(steps)
    cu_seqlens = torch.arange(count + 1, dtype=torch.int32)
    zeros, ones = torch.zeros(count, 1), torch.ones(count, 1)
    decay = selective_scan(
        zeros, steps[:, None], -torch.ones(1, 1), ones, ones,
        cu_seqlens=cu_seqlens, initial_state=torch.ones(count, 1, 1), backend="cpu",
    )[:, 0]  # fmt: skip
    truth = torch.exp(-steps.double())
    assert (decay - truth).abs().max() < 2e-7


def test_refusals():
    cu_seqlens = torch.tensor([0, 2], dtype=torch.int32)
    x, state = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    A = torch.zeros(3, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float32"):
        selective_scan(x, x, A, state, state, cu_seqlens=cu_seqlens, backend="cpu")
    with pytest.raises(ValueError, match="unknown ssm_backend 'gpu'"):
        selective_scan(x, x, A, state, state, cu_seqlens=cu_seqlens, backend="gpu")
    with pytest.raises(ValueError, match="x has 2 rows, but cu_seqlens ends at 3"):
        selective_scan(x, x, A, state, state, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32))
    with pytest.raises(ValueError, match="never decrease"):
        causal_conv(x, torch.zeros(3, 2), cu_seqlens=torch.tensor([0, 3, 2], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="has only reference"):
        causal_conv(x, torch.zeros(3, 2).double(), cu_seqlens=cu_seqlens, backend="cpu")
    with pytest.raises(ValueError, match="do not fit"):
        selective_scan(x, x, A.T, state, state, cu_seqlens=cu_seqlens)
