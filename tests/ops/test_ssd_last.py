"""State-space duality at the last rows alone: every backend against the whole op in float64, and what compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recbole_ssm.ops import ssd, ssd_last
from recbole_ssm.ops.cases import ALLOWED, errors, make, results

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "cpu", "triton"]
# The released model's own, and off the powers of two with several heads a group and several groups.
SIZES = {
    "released": {"H": 32, "P": 16, "G": 1, "N": 64},
    "grouped": {"H": 6, "P": 3, "G": 2, "N": 5},
    "wide": {"H": 3, "P": 17, "G": 1, "N": 20},
}
LENGTHS = {"one": [1], "mixed": [0, 17, 1, 8, 0, 33, 2, 0], "long": [300, 261]}

pytestmark = [pytest.mark.filterwarnings("ignore:.*deterministic"), pytest.mark.usefixtures("poisoned_memory")]


def case_of(lengths, sizes, dtype, device="cpu", without=()):
    """A case whose C is that of the last rows."""
    case = make("ssd", lengths, sizes, dtype, device, states=False)
    case.inputs["C"] = case.inputs["C"].detach()[: len(lengths)].clone()
    if len(case.inputs["C"]) < len(lengths):  # more sequences than rows
        case.inputs["C"] = torch.ones(len(lengths), *case.inputs["C"].shape[1:], dtype=dtype, device=device)
    case.inputs["C"].requires_grad_()
    for name in without:
        del case.inputs[name]
    return case


def whole(case, inputs):
    """The last rows of all rows' output."""
    cu_seqlens = case.fixed["cu_seqlens"]
    C = inputs["C"].repeat_interleave(cu_seqlens.diff(), 0)
    y = ssd(**{**inputs, "C": C}, **case.fixed, backend="reference")
    some = cu_seqlens.diff() > 0
    return y.new_zeros(len(some), *y.shape[1:]).index_put((some,), y[cu_seqlens[1:][some].long() - 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("without", [(), ("D", "dt_bias")], ids=["all", "without D and dt_bias"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_are_as_exact_as_the_whole_op(backend, without, sizes, lengths, dtype):
    if lengths == "long" and sizes == "released" and backend == "triton" and DEVICE == "cpu":
        pytest.skip("too long for the interpreter")
    device = "cpu" if backend == "cpu" else DEVICE
    case = case_of(LENGTHS[lengths], SIZES[sizes], dtype, device, without)
    exact = case.exact()
    truth = results(case, (whole(case, exact),), exact)
    allowed = errors(results(case, (whole(case, case.inputs),), case.inputs), truth)
    y = ssd_last(**case.inputs, **case.fixed, backend=backend)
    assert y.dtype == dtype
    for name, off in errors(results(case, (y,), case.inputs), truth).items():
        assert off <= ALLOWED * max(allowed[name], torch.finfo(dtype).eps), f"{name}: {off} beside {allowed[name]}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_no_sequences_and_no_rows(lengths, backend):
    case = case_of(torch.tensor(lengths, dtype=torch.int64), SIZES["wide"], torch.float32)
    y = ssd_last(**case.inputs, **case.fixed, backend=backend)
    assert y.shape == (len(lengths), 3, 17)
    found = results(case, (y,), case.inputs)
    assert not any(bool(t.any()) for t in found.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_read_in_place(backend):
    device = "cpu" if backend == "cpu" else DEVICE
    case = case_of([5, 2], SIZES["grouped"], torch.float32, device)
    spread = {n: torch.cat([t, t + 1], -1)[..., : t.shape[-1]] for n, t in case.inputs.items()}
    expected = ssd_last(**case.inputs, **case.fixed, backend=backend)
    torch.testing.assert_close(ssd_last(**spread, **case.fixed, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decay_does_not_leak_between_sequences(backend):
    """Where what came before is long and decays fast, a float32 running sum would have lost the step sizes."""
    lengths = [20_000, 3] if backend != "triton" else [700, 3]
    case = case_of(lengths, {"H": 2, "P": 3, "G": 1, "N": 4}, torch.float32)
    inputs = {name: t.detach() for name, t in case.inputs.items()}
    inputs["dt"] = inputs["dt"] + 6
    y = ssd_last(**inputs, **case.fixed, backend=backend)
    tail = {name: t[-3:] if name in ("x", "dt", "B") else t[-1:] if name == "C" else t for name, t in inputs.items()}
    border = {**case.fixed, "cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}
    torch.testing.assert_close(y[1:], ssd_last(**tail, **border, backend="reference"))


def test_mamba_ssm_computes_all_rows(monkeypatch):
    """Its way, on the reference: whole outputs, of which the last rows are taken; empty sequences give 0."""
    module = sys.modules["recbole_ssm.ops.ssd"]
    case = case_of(LENGTHS["mixed"], SIZES["grouped"], torch.float32)
    expected = ssd_last(**case.inputs, **case.fixed, backend="reference")
    monkeypatch.setattr(module, "choose", lambda op, backend, *_: "mamba_ssm" if backend == "auto" else backend)
    monkeypatch.setattr(module, "ssd", lambda *args, **named: ssd(*args, **{**named, "backend": "reference"}))
    torch.testing.assert_close(ssd_last(**case.inputs, **case.fixed), expected)


SCRIPT = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from recbole_ssm.ops.ssd import last_triton

LIKE_INPUT = "x dt B C y grad_y grad_x grad_dt".split()
for dtype, absent, blocks in (("fp32", [], [(32, 8)]), ("bf16", ["D", "dt_bias", "decay_to_end"], [(8, 32), (32, 8)])):
    for rows, heads in blocks:
        for kernel in (last_triton._forward, last_triton._backward):
            constants = {"P": 16, "N": 64, "BLOCK_P": 16, "BLOCK_N": 64, "ROWS": rows, "HEADS": heads}
            constants |= {"BLOCK_HEADS": heads, "SOFTPLUS": True}
            if kernel is last_triton._backward:
                absent = absent[:2]
            constants |= {name: None for name in absent}
            signature, aligned = {}, {}
            for place, name in enumerate(kernel.arg_names):
                if name in constants:
                    signature[name] = "constexpr"
                elif name.startswith("n_") or name.endswith(("_stride", "_group")):
                    signature[name] = "i32"
                else:
                    aligned[(place,)] = [["tt.divisibility", 16]]
                    signature[name] = "*i32" if name == "cu_seqlens" else f"*{dtype if name in LIKE_INPUT else 'fp32'}"
            source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
            options = {"num_warps": last_triton.WARPS}
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            assert "wgmma" not in compiled.asm["ptx"]
            assert compiled.metadata.shared < 99 * 1024
            print("compiled")
"""


def test_both_kernels_compile_at_the_models_size(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("compiled") == 6
