"""Every op and backend against float64 loops: outputs, final states and all gradients."""

import functools
import importlib.util
import sys

import pytest
import torch

from recbole_ssm import ops
from recbole_ssm.ops import causal_conv, preference_attention, selective_scan
from recbole_ssm.ops.backend import why_not
from recbole_ssm.ops.cases import ALLOWED, OPS, errors, excess, make, results
from recbole_ssm.ops.packing import Borders, cu_seqlens_from_lengths, know, single_rows

from . import loops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"  # then Triton's kernels run in its interpreter, a thousand times as slow

LENGTHS = {
    "one": [1],
    "two": [2],
    "mixed few": [1, 0, 17, 16, 3],
    "63": [63],
    "mixed": [3, 1, 33, 0, 2, 17, 16],
    "empty ends": [0, 5, 0],
    "long": [1, 2, 3, 63, 64, 0, 65, 300],
}
# Off the powers of two.
SIZES = {
    "selective_scan": {"several": {"D": 17, "N": 3}, "one": {"D": 1, "N": 1}},
    "ssd": {"grouped": {"H": 4, "P": 3, "G": 2, "N": 5}, "wide": {"H": 3, "P": 17, "G": 1, "N": 20}},
    "causal_conv": {f"{k} taps": {"D": 5, "K": k} for k in (1, 2, 4, 8)},
    "preference_attention": {
        "one metric": {"H": 3, "P": 5, "M": 1, "E": 4},
        "metric a head": {"H": 2, "P": 17, "M": 2, "E": 20},
    },
}
OPTIONS: dict[str, dict] = {
    "ssd": {"whole": {}, "short chunks": {"chunk_size": 24}},
    "preference_attention": {
        "all": {},
        "window": {"window": 4},
        "last": {"queries": "last"},
        "last in window": {"window": 4, "queries": "last"},
    },
}


# The models' own, and wider, at lengths that cross borders of blocks; few, for the interpreter is slow.
WIDE = {
    "selective_scan": [({"D": 24, "N": 32}, {})],
    "ssd": [({"H": 4, "P": 16, "G": 1, "N": 64}, {}), ({"H": 1, "P": 64, "G": 1, "N": 16}, {})],
    "causal_conv": [({"D": 128, "K": 4}, {})],
    "preference_attention": [
        ({"H": 2, "P": 8, "M": 2, "E": 64}, {}),
        ({"H": 2, "P": 8, "M": 2, "E": 64}, {"queries": "last"}),
        ({"H": 1, "P": 16, "M": 1, "E": 128}, {"window": 20}),
        ({"H": 1, "P": 16, "M": 1, "E": 128}, {"queries": "last"}),
    ],
}


# Sums that torch itself has only in an undetermined order on a GPU are not what is tested.
pytestmark = [pytest.mark.filterwarnings("ignore:.*deterministic"), pytest.mark.usefixtures("poisoned_memory")]


@functools.lru_cache(maxsize=256)
def case_and_truth(op, lengths, sizes, dtype, device, options):
    case = make(op, list(lengths), dict(sizes), dtype, device, **dict(options))
    exact = case.exact()
    on_cpu = {name: t.cpu() if isinstance(t, torch.Tensor) else t for name, t in case.fixed.items()}
    on_cpu.pop("dt_softplus", None), on_cpu.pop("return_final_state", None), on_cpu.pop("activation", None)
    outputs = getattr(loops, op)(**{name: t.cpu() for name, t in exact.items()}, **on_cpu)
    return case, results(case, tuple(t.to(device) for t in outputs), exact)


def every_case():
    for op, sizes in SIZES.items():
        for size, letters in sizes.items():
            for option, settings in OPTIONS.get(op, {"": {}}).items():
                for name, lengths in LENGTHS.items():
                    if "last" in option and 0 in lengths:
                        lengths = [length for length in lengths if length]
                    values = (op, tuple(lengths), tuple(letters.items()), tuple(settings.items()))
                    # Loops over pairs of so many rows take minutes.
                    marks = [pytest.mark.slow] if (op, name) == ("preference_attention", "long") else []
                    yield pytest.param(*values, id=" ".join(filter(None, (op, size, option, name))), marks=marks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["cpu", "triton", *(["mamba_ssm"] if not INTERPRETED else [])])
@pytest.mark.parametrize(("op", "lengths", "sizes", "options"), list(every_case()))
def test_backend_is_as_exact_as_the_reference(op, lengths, sizes, options, backend, dtype):
    device = "cpu" if backend == "cpu" else DEVICE
    if backend == "triton" and INTERPRETED and sum(lengths) > (40 if dtype == torch.bfloat16 else 63):
        pytest.skip("too long for the interpreter")
    case, truth = case_and_truth(op, lengths, sizes, dtype, device, options)
    x = next(iter(case.inputs.values()))
    if backend == "mamba_ssm":
        reason = why_not(op, backend, x, "" if 2 <= dict(sizes).get("K", 4) <= 4 else "filter of so many taps")
        if reason:
            pytest.skip(reason)
        case = make(op, list(lengths), dict(sizes), dtype, device, states=False, **dict(options))
        exact = case.exact()
        truth = results(case, case.run("reference", exact), exact)
    assert excess(case, backend, truth) == {}
    outputs = case.run(backend)
    assert outputs[0].dtype == dtype
    assert all(state.dtype == (dtype if op == "causal_conv" else torch.float32) for state in outputs[1:])


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    ("op", "sizes", "options"),
    [pytest.param(op, *case, id=f"{op} {case}") for op, wide in WIDE.items() for case in wide],
)
def test_triton_at_the_models_own_widths(op, sizes, options, dtype):
    longest = 17 if op == "selective_scan" else 33  # a row more than the longest block
    lengths = (longest, 3) if "queries" in options else (longest, 0, 3)
    case, truth = case_and_truth(op, lengths, tuple(sizes.items()), dtype, DEVICE, tuple(options.items()))
    assert excess(case, "triton", truth) == {}


@pytest.mark.parametrize("lengths", [[5, 0, 33], [33, 16], [20, 0]], ids=str)
@pytest.mark.parametrize(
    ("op", "options"),
    [("ssd", {}), ("selective_scan", {}), ("preference_attention", {}), ("preference_attention", {"queries": "last"})],
)
def test_tables_that_are_filled_up(op, options, lengths):
    """Filler chunks change nothing: every value is the same, and all are finite though unwritten memory is NaN."""
    if "queries" in options:
        lengths = [length for length in lengths if length]
    # Two blocks of the scan's channels are enough, of which the interpreter takes seconds.
    sizes = {"D": 9, "N": 3} if op == "selective_scan" else next(iter(SIZES[op].values()))
    case = make(op, lengths, sizes, device=DEVICE, **options)
    expected = results(case, case.run("triton"), case.inputs)
    know(case.fixed["cu_seqlens"], Borders(torch.tensor(lengths), DEVICE, room=40))
    for name, found in results(case, case.run("triton"), case.inputs).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_last_query_of_nothing():
    """A batch that is filled up has sequences without rows, whose output must be finite and ask for no gradient."""
    from recbole_ssm.ops.preference_attention.triton import preference_attention_triton

    case = make("preference_attention", [4, 3], {"H": 2, "P": 5, "M": 2, "E": 4}, device=DEVICE)
    outputs = []
    for lengths in ([4, 3], [0, 4, 0, 3, 0]):
        cu_seqlens = cu_seqlens_from_lengths(torch.tensor(lengths)).to(DEVICE)
        inputs = list(case.inputs.values())
        out = preference_attention_triton(*inputs, case.fixed["threshold"], cu_seqlens, None, True)
        real = torch.tensor(lengths, device=DEVICE) > 0
        assert not out[~real].any()
        outputs.append([out[real], *torch.autograd.grad(out.square().sum(), inputs)])
    for expected, found in zip(*outputs, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("op", "lengths", "sizes", "options"), list(every_case()))
def test_reference_is_exact(op, lengths, sizes, options):
    case, truth = case_and_truth(op, lengths, sizes, torch.float64, DEVICE, options)
    for name, found in results(case, case.run("reference"), case.inputs).items():
        torch.testing.assert_close(found, truth[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    for dtype, tolerance in ((torch.float32, 3e-5), (torch.bfloat16, 3e-2)):
        case, truth = case_and_truth(op, lengths, sizes, dtype, DEVICE, options)
        off = errors(results(case, case.run("reference"), case.inputs), truth)
        assert max(off.values()) < tolerance, off


BACKENDS = ["reference", "cpu", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[1], [5, 0, 70, 3]], ids=str)
@pytest.mark.parametrize("op", ["selective_scan", "ssd", "causal_conv"])
def test_a_state_left_out_is_zero(op, lengths, backend):
    """Without an initial state, and with or without asking for the final one, outputs are the same."""
    device = "cpu" if backend == "cpu" else DEVICE
    case = make(op, lengths, next(iter(SIZES[op].values())), device=device)
    inputs = {name: t for name, t in case.inputs.items() if name != "initial_state"}
    zeros = torch.zeros_like(case.inputs["initial_state"])
    y, state = OPS[op](**inputs, initial_state=zeros, **case.fixed, backend=backend)
    again, final = OPS[op](**inputs, **case.fixed, backend=backend)
    torch.testing.assert_close(again, y)
    torch.testing.assert_close(final, state)
    case.fixed["return_final_state"] = False
    torch.testing.assert_close(OPS[op](**inputs, **case.fixed, backend=backend), y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["selective_scan", "ssd", "causal_conv"])
def test_steps_equal_the_whole_sequence(op, backend):
    """A sequence fed row by row, its state carried, as live sessions are served."""
    device = "cpu" if backend == "cpu" else DEVICE
    lengths = [6, 6, 6]
    case = make(op, lengths, next(iter(SIZES[op].values())), device=device)
    rowwise = ("x", "dt", "B", "C", "z")
    settings = {**case.fixed, "cu_seqlens": single_rows(3, device), "return_final_state": True}
    with torch.no_grad():
        whole, final = case.run("reference")
        state = case.inputs["initial_state"]
        for t in range(6):
            now = {n: v[t::6] if n in rowwise else v for n, v in case.inputs.items() if n != "initial_state"}
            y, state = OPS[op](**now, **settings, initial_state=state, backend=backend)
            torch.testing.assert_close(y, whole[t::6], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["selective_scan", "ssd"])
@pytest.mark.parametrize("lengths", [[1], [5, 1, 17, 3], [2, 35]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_last_rows_alone(op, lengths, dtype, backend):
    device = "cpu" if backend == "cpu" else DEVICE
    case = make(op, lengths, next(iter(SIZES[op].values())), dtype, device, states=False)
    rows = case.fixed["cu_seqlens"][1:].long() - 1
    fixed = {"cu_seqlens": case.fixed["cu_seqlens"], "dt_softplus": True}

    def whole(inputs, backend):
        return OPS[op](**inputs, **fixed, backend=backend)[rows]

    def alone(inputs):
        return getattr(ops, f"{op}_last")(**{**inputs, "C": inputs["C"][rows]}, **fixed, backend=backend)

    inputs = {name: t for name, t in case.inputs.items() if name not in ("D", "z")}
    exact = {name: t for name, t in case.exact().items() if name not in ("D", "z")}
    truth = results(case, (whole(exact, "reference"),), exact)
    reference = errors(results(case, (whole(inputs, "reference"),), inputs), truth)
    found = errors(results(case, (alone(inputs),), inputs), truth)
    for name, off in found.items():
        assert off <= ALLOWED * max(reference[name], torch.finfo(dtype).eps), name


def test_the_last_row_of_nothing():
    cu_seqlens = torch.tensor([0, 0, 2], dtype=torch.int32)
    x, B, C = torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 4)
    assert not ops.selective_scan_last(x, x, -torch.ones(3, 4), B, C, cu_seqlens=cu_seqlens)[0].any()
    y = ops.ssd_last(x[..., None], x, -torch.ones(3), B[:, None], C[:, None], cu_seqlens=cu_seqlens)
    assert not y[0].any()
    assert y[1].all()
    with pytest.raises(ValueError, match=r"C is \[1, 4\], not \[2, 4\]"):
        ops.selective_scan_last(x, x, -torch.ones(3, 4), B, C[:1], cu_seqlens=cu_seqlens)


def test_last_rows_on_a_backend_without_gradients_of_states(monkeypatch):
    """mamba_ssm's way, on the reference: whole outputs, of which the last rows are taken; empty sequences give 0."""
    module = sys.modules["recbole_ssm.ops.selective_scan"]
    case = make("selective_scan", [3, 0, 1, 2, 0], {"D": 5, "N": 3}, states=False)
    inputs = {name: t for name, t in case.inputs.items() if name not in ("D", "z", "C")}
    fixed = {"cu_seqlens": case.fixed["cu_seqlens"], "dt_softplus": True}
    C = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    expected = ops.selective_scan_last(**inputs, C=C, **fixed, backend="reference")
    run = module._run
    monkeypatch.setattr(module, "choose", lambda *_: "mamba_ssm")
    monkeypatch.setattr(module, "_run", lambda chosen, *rest: run("reference", *rest))
    torch.testing.assert_close(ops.selective_scan_last(**inputs, C=C, **fixed), expected)
    with torch.autocast("cpu", torch.bfloat16):  # which would round the state
        assert torch.equal(ops.selective_scan_last(**inputs, C=C, **fixed, backend="reference"), expected)


def test_decay_of_the_last_rows_does_not_leak_between_sequences():
    """Where what came before is long and decays fast, a float32 running sum would have lost the step sizes."""
    lengths = torch.tensor([20_000, 3])
    case = make("ssd", lengths, {"H": 2, "P": 3, "G": 1, "N": 4}, states=False)
    case.inputs["dt"] = case.inputs["dt"].detach() + 6
    inputs = {name: t for name, t in case.inputs.items() if name != "D"}
    tail = {name: t[-3:] if len(t) > 3 else t for name, t in inputs.items()}
    fixed = {"dt_softplus": True}
    y = ops.ssd_last(**{**inputs, "C": inputs["C"][[-4, -1]]}, cu_seqlens=case.fixed["cu_seqlens"], **fixed)
    border = torch.tensor([0, 3], dtype=torch.int32)
    torch.testing.assert_close(y[1], OPS["ssd"](**tail, cu_seqlens=border, backend="reference", **fixed)[-1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sequences_and_no_rows(backend):
    device = "cpu" if backend == "cpu" else DEVICE
    for op in OPS:
        for lengths in ([], [0, 0]):
            case = make(op, torch.tensor(lengths, dtype=torch.int64), next(iter(SIZES[op].values())), device=device)
            found = results(case, case.run(backend), case.inputs)
            assert found["output"].shape[0] == 0
            assert all(bool(t.isfinite().all()) for t in found.values())
            if op != "preference_attention":
                torch.testing.assert_close(found["final state"], case.inputs["initial_state"].float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_read_in_place(backend):
    """Layers hand in slices of one projection; rows need not lie densely."""
    device = "cpu" if backend == "cpu" else DEVICE
    for op in OPS:
        case = make(op, [5, 2], next(iter(SIZES[op].values())), device=device)
        spread = {
            name: torch.cat([t, t + 1], -1)[..., : t.shape[-1]] if t.dim() > 1 else torch.stack([t, t + 1], -1)[:, 0]
            for name, t in case.inputs.items()
        }
        for dense, view in zip(case.run(backend), case.run(backend, spread), strict=True):
            torch.testing.assert_close(view, dense)


def test_attention_without_similarity_is_torch_attention():
    for backend, dtype in (("reference", torch.float64), ("cpu", torch.float32), ("triton", torch.float32)):
        device = "cpu" if backend == "cpu" else DEVICE
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(9, 2, 4, generator=generator).to(device, dtype) for _ in range(3))
        ones, zeros = torch.ones(2).to(q), torch.zeros(2).to(q)
        cu_seqlens = torch.tensor([0, 9], dtype=torch.int32, device=device)
        feature = torch.randn(9, 1, 3, generator=generator).to(q)
        ours = preference_attention(q, k, v, feature, ones, zeros, zeros, cu_seqlens=cu_seqlens, backend=backend)
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(ours, theirs.transpose(0, 1))


@pytest.mark.skipif(not importlib.util.find_spec("mamba_ssm"), reason="mamba_ssm is not installed")
def test_against_mamba_ssm_in_plain_torch():
    """The other authors' own references: ``selective_scan_ref`` of Mamba, listing 1 of Mamba-2's paper."""
    from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    case = make("selective_scan", [40], {"D": 6, "N": 5}, states=False)
    i = {name: t.detach() for name, t in case.inputs.items()}
    x, dt, B, C, z = (i[name].T[None] for name in ("x", "dt", "B", "C", "z"))
    theirs = selective_scan_ref(x, dt, i["A"], B, C, i["D"], z, i["dt_bias"], delta_softplus=True)[0].T
    torch.testing.assert_close(case.run("reference")[0], theirs, rtol=1e-4, atol=1e-5)

    case = make("ssd", [48], {"H": 4, "P": 3, "G": 1, "N": 5}, states=False)
    i = {name: t.detach() for name, t in case.inputs.items()}
    step = torch.nn.functional.softplus(i["dt"] + i["dt_bias"])
    B, C = (i[name].expand(-1, 4, -1)[None] for name in ("B", "C"))
    theirs, _ = ssd_minimal_discrete((i["x"] * step[..., None])[None], (step * i["A"])[None], B, C, 16)
    torch.testing.assert_close(
        case.run("reference")[0], theirs[0] + i["D"][:, None] * i["x"], rtol=1e-4, atol=1e-5
    )  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_cpu_does_not_depend_on_the_number_of_threads(op):
    import numba

    case = make(op, [7, 1, 30, 4, 90, 2] * 8, next(iter(SIZES[op].values())))
    threads = numba.get_num_threads()
    found = []
    for count in (1, threads):
        numba.set_num_threads(count)
        found.append(results(case, case.run("cpu"), case.inputs))
    numba.set_num_threads(threads)
    for name, one in found[0].items():
        assert torch.equal(one, found[1][name]), name


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


def test_triton_softplus_keeps_its_relative_error_where_it_is_tiny():
    raw = torch.linspace(-40, 20, 241)
    count = len(raw)
    ones = torch.ones(count, 1, device=DEVICE)
    step = selective_scan(
        ones, raw[:, None].to(DEVICE), -ones[:1], ones, ones,
        dt_softplus=True, cu_seqlens=torch.arange(count + 1, dtype=torch.int32, device=DEVICE), backend="triton",
    )[:, 0].cpu()  # fmt: skip
    truth = torch.nn.functional.softplus(raw.double())
    assert ((step - truth).abs() / truth).max() < 1e-6


def test_borders_are_looked_at_again_when_they_change():
    cu_seqlens = torch.tensor([0, 2, 4], dtype=torch.int32)
    x, weight = torch.ones(4, 1), torch.ones(1, 2)
    assert causal_conv(x, weight, cu_seqlens=cu_seqlens).flatten().tolist() == [1, 2, 1, 2]
    cu_seqlens[1] = 3
    assert causal_conv(x, weight, cu_seqlens=cu_seqlens).flatten().tolist() == [1, 2, 2, 1]
    with torch.inference_mode():
        inference = cu_seqlens.clone()
        assert causal_conv(x, weight, cu_seqlens=inference).flatten().tolist() == [1, 2, 2, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_after_serving_in_inference_mode(backend):
    """What is kept of a batch's borders must not stem from inference mode, whose tensors cannot be saved."""
    device = "cpu" if backend == "cpu" else DEVICE
    for op in OPS:
        case = make(op, [4, 7], next(iter(SIZES[op].values())), device=device)
        with torch.inference_mode():
            case.run(backend)
        assert all(bool(t.isfinite().all()) for t in results(case, case.run(backend), case.inputs).values())


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
    with pytest.raises(ValueError, match="K from 1 to 8"):
        causal_conv(x, torch.zeros(3, 9), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="do not fit"):
        selective_scan(x, x, A.T, state, state, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(
    ("op", "module", "install"),
    [
        ("selective_scan", "selective_scan_cuda", "MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm"),
        ("ssd", "mamba_ssm", "pip install 'mamba-ssm"),
        ("causal_conv", "causal_conv1d", "pip install causal-conv1d"),
    ],
)
def test_a_missing_package_is_named_with_its_install_line(op, module, install, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    case = make(op, [2], next(iter(SIZES[op].values())), states=False)
    with pytest.raises(RuntimeError, match=f"{module} is not installed; run: {install}"):
        case.run("mamba_ssm")


def test_what_a_backend_lacks_is_said(monkeypatch):
    x = torch.zeros(1, device="meta")
    assert "need a GPU" in why_not("ssd", "triton", x)
    assert "no such kernel" in why_not("preference_attention", "mamba_ssm", x)
    assert "numba" not in why_not("ssd", "cpu", x)
    monkeypatch.setattr("recbole_ssm.ops.backend._triton_version", lambda: (3, 3))
    assert "too old" in why_not("ssd", "triton", x)
    monkeypatch.setattr("recbole_ssm.ops.backend._triton_version", lambda: ())
    assert "pip install 'triton" in why_not("ssd", "triton", x)


def test_lengths_of_a_batch_are_kept_with_its_borders():
    from recbole_ssm.ops.packing import borders

    cu_seqlens = cu_seqlens_from_lengths(torch.tensor([3, 0, 5]))
    assert borders(cu_seqlens) is borders(cu_seqlens)
    assert borders(cu_seqlens).longest == 5
    sequence, first = borders(cu_seqlens).chunks(2)
    assert sequence.tolist() == [0, 0, 2, 2, 2]
    assert first.tolist() == [0, 2, 2, 5]
    boundaries, count = borders(cu_seqlens).chunk_boundaries(2)
    assert boundaries.tolist() == [0, 1, 1, 3]
    assert count == 3
