"""Others' kernels for the same work, in the layout that they want, so that no conversion is timed."""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.cases import Case
from recbole_ssm.ops.packing import pad, sequence_ids

# A function of the inputs beside it, which are leaves to differentiate for.
Outside = tuple[Callable[..., Tensor], dict[str, Tensor]]


def outside(case: Case) -> dict[str, Outside]:
    """What is installed here and fits the case's device, by name."""
    found: dict[str, Outside] = {}
    cuda = case.fixed["cu_seqlens"].is_cuda
    if case.op == "preference_attention":
        found["torch sdpa, padded, w2 = 0"] = _sdpa(case)
    if case.op == "causal_conv":
        found["torch conv1d, padded"] = _conv1d(case)
    if case.op == "selective_scan" and cuda and importlib.util.find_spec("selective_scan_cuda"):
        found["mamba_ssm CUDA, padded"] = _selective_scan(case)
    if case.op == "ssd" and cuda and importlib.util.find_spec("mamba_ssm"):
        found["mamba_ssm Triton, packed"] = _ssd(case, packed=True)
        found["mamba_ssm Triton, padded"] = _ssd(case, packed=False)
    if case.op == "causal_conv" and cuda and importlib.util.find_spec("causal_conv1d"):
        found["causal_conv1d, packed"] = _causal_conv1d(case)
    return found


def _leaves(**tensors: Tensor) -> dict[str, Tensor]:
    return {name: t.detach().contiguous().requires_grad_() for name, t in tensors.items()}


def _padded(case: Case, *names: str) -> dict[str, Tensor]:
    return {name: pad(case.inputs[name].detach(), case.fixed["cu_seqlens"]) for name in names}


def _sdpa(case: Case) -> Outside:
    rows = {name: t.transpose(1, 2) for name, t in _padded(case, "q", "k", "v").items()}
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), _leaves(**rows)


def _conv1d(case: Case) -> Outside:
    weight, taps = case.inputs["weight"], case.inputs["weight"].shape[1]
    inputs = _leaves(x=_padded(case, "x")["x"].mT, weight=weight[:, None], bias=case.inputs["bias"])

    def run(x, weight, bias):
        return F.silu(F.conv1d(F.pad(x, (taps - 1, 0)), weight, bias, groups=len(weight)))

    return run, inputs


def _causal_conv1d(case: Case) -> Outside:
    from causal_conv1d import causal_conv1d_fn

    register = sequence_ids(case.fixed["cu_seqlens"]).to(torch.int32)[None]

    def run(x, weight, bias):
        return causal_conv1d_fn(x.T[None], weight, bias, seq_idx=register, activation="silu")

    return run, _leaves(**{name: case.inputs[name] for name in ("x", "weight", "bias")})


def _selective_scan(case: Case) -> Outside:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    rows = {name: t.mT for name, t in _padded(case, "x", "dt", "B", "C").items()}
    inputs = _leaves(**rows, A=case.inputs["A"].float(), dt_bias=case.inputs["dt_bias"].float())

    def run(x, dt, B, C, A, dt_bias):
        return selective_scan_fn(x, dt, A, B, C, delta_bias=dt_bias, delta_softplus=True)

    return run, inputs


def _ssd(case: Case, packed: bool) -> Outside:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    names = ("x", "dt", "B", "C")
    rows = {name: case.inputs[name][None] for name in names} if packed else _padded(case, *names)
    inputs = _leaves(**rows, **{name: case.inputs[name].float() for name in ("A", "dt_bias")})
    register = sequence_ids(case.fixed["cu_seqlens"]).to(torch.int32)[None] if packed else None

    def run(x, dt, B, C, A, dt_bias):
        return mamba_chunk_scan_combined(
            x, dt, A, B, C, chunk_size=256, dt_bias=dt_bias, seq_idx=register, dt_softplus=True
        )

    return run, inputs
