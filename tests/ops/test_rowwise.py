"""The ops over single rows, ``preference_features`` and ``expert_diversity``, against their reference in float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recbole_ssm.errors import BackendUnavailable
from recbole_ssm.ops import expert_diversity, preference_features

from ..launches import count_launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# As in test_parity.py: times what the reference errs at the same dtype, or that dtype's rounding.
ALLOWED = 8.0

# Sums that torch itself has only in an undetermined order on a GPU are not what is tested.
pytestmark = [pytest.mark.filterwarnings("ignore:.*deterministic"), pytest.mark.usefixtures("poisoned_memory")]


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def features_of(T, d, H, dtype=torch.float32):
    """Inputs of ``preference_features``."""
    return [drawn(T, d, dtype=dtype), drawn(T, d, seed=1, dtype=dtype), drawn(H, d, seed=2).abs() + 0.5]


def experts_of(E, M, d, dtype=torch.float32):
    experts = drawn(E, M, d, dtype=dtype) + drawn(1, M, d, seed=1, dtype=dtype)
    experts[0, 1::4] = 0
    experts[-1, 2::4] *= 1e-14
    return experts


def results(op, inputs, backend):
    """Output and the gradients of one random function of it."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    output = op(*inputs, backend=backend)
    towards = drawn(*output.shape, seed=3).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, towards)]


def assert_as_exact_as_the_reference(op, inputs):
    truth = results(op, [t.double() for t in inputs], "reference")
    reference, found = results(op, inputs, "reference"), results(op, inputs, "triton")
    for i, (want, other, ours) in enumerate(zip(truth, reference, found, strict=True)):
        assert ours.dtype == other.dtype
        assert ours.shape == want.shape
        if not want.numel():
            continue
        # Row by row: where a vector is as good as 0 its gradient is that of its direction times 1e12.
        size = want.abs().amax(-1, keepdim=True).clamp_min(1e-6) if want.dim() else want.abs()
        by_reference, by_us = (((t.double() - want).abs() / size).max() for t in (other, ours))
        assert by_us <= ALLOWED * max(by_reference, torch.finfo(inputs[0].dtype).eps), f"result {i}"


@DTYPES
@pytest.mark.parametrize(
    ("T", "d", "H"), [(0, 8, 2), (1, 1, 1), (1, 64, 8), (37, 64, 8), (23, 128, 8), (19, 33, 3), (5, 512, 2)], ids=str
)
def test_features_are_as_exact_as_the_reference(T, d, H, dtype):
    assert_as_exact_as_the_reference(preference_features, features_of(T, d, H, dtype))


@DTYPES
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("E", "M", "d"), [(2, 1, 1), (8, 1, 64), (8, 9, 64), (8, 6, 128), (5, 7, 33), (3, 5, 512), (64, 3, 32)], ids=str
)
def test_diversity_is_as_exact_as_the_reference(E, M, d, weighted, dtype):
    weights = drawn(M, seed=2).abs()
    weights[1::3] = 0  # as of representations that fill a batch up
    weights = weights / weights.sum() if weighted else None

    def op(experts, backend):
        return expert_diversity(experts, weights, 0.3, backend=backend)

    assert_as_exact_as_the_reference(op, [experts_of(E, M, d, dtype)])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_diversity_of_nothing(backend):
    nothing = torch.zeros(3, 0, 4, device=DEVICE, requires_grad=True)
    assert expert_diversity(nothing, backend=backend).isnan()
    found = expert_diversity(nothing, torch.zeros(0, device=DEVICE), backend=backend)
    assert found == 0
    assert torch.autograd.grad(found, nothing)[0].shape == nothing.shape


def test_views_are_read_in_place():
    inputs = features_of(6, 20, 2)
    views = [torch.cat([t, t + 1], -1)[..., : t.shape[-1]] for t in inputs]
    for dense, view in zip(*(results(preference_features, each, "triton") for each in (inputs, views)), strict=True):
        assert torch.equal(view, dense)
    experts = experts_of(4, 6, 20)
    chosen = experts.transpose(0, 1).contiguous().transpose(0, 1)  # as where few take part
    spread = torch.stack([experts, experts + 1], -1)[..., 0]
    wanted = results(expert_diversity, [experts], "triton")
    for other in (chosen, spread):
        for dense, view in zip(wanted, results(expert_diversity, [other], "triton"), strict=True):
            assert torch.equal(view, dense)


def test_a_gradient_that_is_a_view():
    """Such as that of a sum, whose rows all are the same memory."""
    for backend in ("reference", "triton"):
        inputs = [t.requires_grad_() for t in features_of(3, 16, 2)]
        output = preference_features(*inputs, backend=backend)
        found = torch.autograd.grad(output.sum(), inputs)
        if backend == "reference":
            wanted = found
    for ours, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, want)


def test_the_gradient_of_diversity_is_kept_for_one_pass():
    experts = experts_of(3, 4, 16).requires_grad_()
    found = expert_diversity(experts, backend="triton")
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="this is the second"):
        found.backward()


def test_scaled_losses_keep_float16s_small_gradients():
    experts = experts_of(4, 300, 16)[:, 3::4].half().requires_grad_()
    weights = torch.full((75,), 1e-7, device=DEVICE)
    (found,) = torch.autograd.grad(2.0**20 * expert_diversity(experts, weights, backend="triton"), experts)
    exact = experts.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(2.0**20 * expert_diversity(exact, weights), exact)
    assert found.dtype == torch.float16
    assert (found - want).abs().max() < 2e-3 * want.abs().max()


def test_launches():
    inputs = [t.to("meta").requires_grad_() for t in features_of(5, 16, 2)]
    towards = torch.empty(5, 2, 16, device="meta")

    made = []
    forward = count_launches(lambda: made.append(preference_features(*inputs)))
    assert forward == {"preference_features.triton._forward": 1}
    found = count_launches(lambda: torch.autograd.grad(made[0], inputs, towards))
    assert found == {"preference_features.triton._backward": 1, "sum": 1}

    experts, weights = torch.empty(3, 5, 16, device="meta", requires_grad=True), torch.empty(5, device="meta")
    forward = count_launches(lambda: made.append(expert_diversity(experts, weights)))
    assert forward == {"expert_diversity.triton._loss_and_gradient": 1, "sum": 1}
    one = torch.empty((), device="meta")
    assert count_launches(lambda: torch.autograd.grad(made[1], experts, one)) == {"mul_": 1}


def test_refusals():
    x, metric = torch.zeros(3, 4), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="do not fit"):
        preference_features(x, x[:2], metric)
    with pytest.raises(ValueError, match="do not fit"):
        preference_features(x, x, metric[:, :3])
    with pytest.raises(ValueError, match="do not fit"):
        expert_diversity(torch.zeros(2, 3, 4), torch.zeros(2))
    with pytest.raises(BackendUnavailable, match="no such kernel"):
        preference_features(x, x, metric, backend="cpu")
    with pytest.raises(BackendUnavailable, match="no such kernel"):
        expert_diversity(torch.zeros(2, 3, 4), backend="mamba_ssm")
    with pytest.raises(BackendUnavailable, match="float64"):
        expert_diversity(torch.zeros(2, 3, 4).double(), backend="triton")


# Launches become compilations: the kernels are made as the ops ask for them, at the models' sizes and, in float32,
# which takes most registers, at the largest.
COMPILE = """
import contextlib, io, json, re, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from recbole_ssm.ops.expert_diversity.triton import expert_diversity_triton
from recbole_ssm.ops.preference_features.triton import preference_features_triton


class NoGPU:
    def get_current_target(self):
        return GPUTarget("cuda", capability, 32)

    def get_current_device(self):
        return capability

    def get_current_stream(self, device=None):
        return 0


def launch(kernel, *args, grid, warmup, **settings):
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        made = compile(kernel, *args, grid=grid, warmup=True, **settings)
    found = {"kernel": kernel.__name__, "gpu": capability, "sizes": sizes, "dtype": str(dtype)}
    found |= {"shared": made.metadata.shared, "warps": made.metadata.num_warps}
    found["registers"] = max(map(int, re.findall(r"Used (\\d+) registers", log.getvalue())))
    found["spilled"] = sum(map(int, re.findall(r"(\\d+) bytes spill stores", log.getvalue())))
    print(json.dumps(found), flush=True)


compile, JITFunction.run = JITFunction.run, launch
driver.set_active(NoGPU())
for capability in map(int, sys.argv[1:]):
    for dtype, largest in ((torch.float32, True), (torch.bfloat16, False)):
        for d in (64, 512)[: 1 + largest]:
            x, metric = torch.empty(40, d, dtype=dtype, requires_grad=True), torch.empty(8, d, requires_grad=True)
            sizes = [8, d]
            preference_features_triton(x, x, metric).sum().backward()
        for sizes in ([8, 64], [64, 512])[: 1 + largest]:
            experts = torch.empty(sizes[0], 5, sizes[1], dtype=dtype, requires_grad=True)
            expert_diversity_triton(experts, torch.empty(5) if sizes[1] == 64 else None, 0.5)
"""


def test_kernels_compile(tmp_path):
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_DUMP_PTXAS_LOG": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, "90"],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in found} == {"_forward", "_backward", "_loss_and_gradient"}
    # 64 experts of 512 take all registers that 16 warps may have, and a few numbers more.
    allowed = {True: 64, False: 0}
    faults = [k for k in found if k["spilled"] > allowed[k["sizes"] == [64, 512]] or k["shared"] > 48 * 1024]
    assert faults == []
