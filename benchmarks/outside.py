"""Others' kernels for the same work, in the layout that they want, so that no conversion is timed."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.cases import Case, results
from recbole_ssm.ops.packing import borders, pad, positions, sequence_ids

Tensors = dict[str, Tensor]

# How far another's result may be from float64, ‖found - true‖ / ‖true‖: its rounding is its own affair.
AGREES = {torch.float32: 3e-3, torch.bfloat16: 3e-2}


@dataclass
class Outside:
    """One way in which others compute a case.

    Attributes:
        lay_out: the case's inputs in the form that ``function`` takes; differentiable.
        function: the work itself.
        rows: its output as rows ``[T, ...]``, in the order of the case's own.
        bytes: about what it holds at once beside its inputs.
    """

    lay_out: Callable[[Tensors], Tensors]
    function: Callable[..., Tensor]
    rows: Callable[[Tensor], Tensor]
    bytes: float = 0.0

    def leaves(self, case: Case) -> Tensors:
        """What it is timed with."""
        laid_out = self.lay_out({name: t.detach() for name, t in case.inputs.items()})
        return {name: t.contiguous().requires_grad_() for name, t in laid_out.items()}

    def disagrees(self, case: Case, truth: Tensors) -> dict[str, float]:
        """Which of its outputs and gradients are too far from ``truth``, and by how many times what may be."""
        inputs = {name: t.detach().requires_grad_() for name, t in case.inputs.items()}
        found = results(case, (self.rows(self.function(**self.lay_out(inputs))),), inputs)
        allowed = AGREES[next(iter(inputs.values())).dtype]
        off = {
            name: float((found[name].detach().double() - t.detach()).norm() / t.detach().norm().clamp_min(1e-9))
            / allowed
            for name, t in truth.items()
        }
        return {name: value for name, value in off.items() if not value <= 1}


def outside(case: Case, compiled: bool = False) -> dict[str, Outside]:
    """What is installed here and fits the case's device, by name.

    Args:
        case: inputs without ``D``, ``z`` and states; no sequence may be empty.
        compiled: also what torch compiles for each new shape, which takes long.
    """
    found: dict[str, Outside] = {}
    cuda = case.fixed["cu_seqlens"].is_cuda
    if case.op == "preference_attention":
        found["torch sdpa with bias, padded"] = _biased(case, _sdpa)
        if compiled:
            found["FlexAttention with bias, padded"] = _biased(case, _flex)
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


def _padded(case: Case, inputs: Tensors, *names: str) -> Tensors:
    return {name: pad(inputs[name], case.fixed["cu_seqlens"]) for name in names}


def _rows(case: Case, padded: Tensor) -> Tensor:
    """``[S, L, ...]`` to ``[T, ...]``."""
    cu_seqlens = case.fixed["cu_seqlens"]
    return padded[sequence_ids(cu_seqlens), positions(cu_seqlens)]


def _biased(case: Case, attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Outside:
    """Attention with the same similarity, as a bias written out: ``attend(q, k, v, bias)``, ``[S, H, L, P]``."""
    width, heads = case.inputs["q"].shape[2], case.inputs["q"].shape[1]
    threshold = case.fixed["threshold"][:, None, None]
    known = borders(case.fixed["cu_seqlens"])

    def lay_out(inputs: Tensors) -> Tensors:
        rows = {name: t.transpose(1, 2) for name, t in _padded(case, inputs, "q", "k", "v").items()}
        if attend is _flex:  # it has no heads of less than 16
            rows = {name: F.pad(t, (0, max(0, 16 - width))) for name, t in rows.items()}
        weights = {name: inputs[name] for name in ("score_weight", "similarity_weight")}
        feature = F.normalize(inputs["feature"].float(), dim=-1)
        return {**rows, **weights, "direction": pad(feature, case.fixed["cu_seqlens"]).transpose(1, 2)}

    def run(q, k, v, score_weight, similarity_weight, direction):
        cosine = direction @ direction.mT
        bias = similarity_weight[:, None, None] * torch.where(cosine > threshold, cosine, 0.0)
        q = q * (score_weight[:, None, None] / width**0.5).to(q.dtype)
        return attend(q, k, v, bias.expand(-1, heads, -1, -1).to(q.dtype))[..., :width].transpose(1, 2)

    scores = len(known.lengths) * heads * known.longest**2
    return Outside(lay_out, run, partial(_rows, case), 6.0 * 4 * scores)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    later = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).triu(1)
    return F.scaled_dot_product_attention(q, k, v, bias.masked_fill(later, -torch.inf), scale=1.0)


def _flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    def score(score, b, h, i, j):
        return score + bias[b, h, i, j]

    flex, causal = _compiled_flex(), _causal(q.shape[2], str(q.device))
    return flex(q, k, v, score_mod=score, block_mask=causal, scale=1.0)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@cache
def _causal(length: int, device: str):
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: j <= i, None, None, length, length, device=device)


def _conv1d(case: Case) -> Outside:
    taps = case.inputs["weight"].shape[1]

    def lay_out(inputs: Tensors) -> Tensors:
        x = _padded(case, inputs, "x")["x"].mT
        return {"x": x, "weight": inputs["weight"][:, None], "bias": inputs["bias"]}

    def run(x, weight, bias):
        return F.silu(F.conv1d(F.pad(x, (taps - 1, 0)), weight, bias, groups=len(weight)))

    return Outside(lay_out, run, lambda out: _rows(case, out.mT))


def _causal_conv1d(case: Case) -> Outside:
    from causal_conv1d import causal_conv1d_fn

    register = sequence_ids(case.fixed["cu_seqlens"])[None]

    def lay_out(inputs: Tensors) -> Tensors:
        return {name: inputs[name] for name in ("x", "weight", "bias")}

    def run(x, weight, bias):
        return causal_conv1d_fn(x.T[None], weight, bias, seq_idx=register, activation="silu")

    return Outside(lay_out, run, lambda out: out[0].T)


def _selective_scan(case: Case) -> Outside:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def lay_out(inputs: Tensors) -> Tensors:
        rows = {name: t.mT for name, t in _padded(case, inputs, "x", "dt", "B", "C").items()}
        return {**rows, "A": inputs["A"].float(), "dt_bias": inputs["dt_bias"].float()}

    def run(x, dt, B, C, A, dt_bias):
        return selective_scan_fn(x, dt, A, B, C, delta_bias=dt_bias, delta_softplus=True)

    return Outside(lay_out, run, lambda out: _rows(case, out.mT))


def _ssd(case: Case, packed: bool) -> Outside:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    names = ("x", "dt", "B", "C")
    register = sequence_ids(case.fixed["cu_seqlens"])[None] if packed else None

    def lay_out(inputs: Tensors) -> Tensors:
        rows = {name: inputs[name][None] for name in names} if packed else _padded(case, inputs, *names)
        return {**rows, **{name: inputs[name].float() for name in ("A", "dt_bias")}}

    def run(x, dt, B, C, A, dt_bias):
        return mamba_chunk_scan_combined(
            x, dt, A, B, C, chunk_size=256, dt_bias=dt_bias, seq_idx=register, dt_softplus=True
        )

    return Outside(lay_out, run, (lambda out: out[0]) if packed else partial(_rows, case))
