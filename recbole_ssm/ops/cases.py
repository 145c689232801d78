"""Inputs for each op, and the measure of a backend's error: for the self-check, tests and benchmarks alike."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops import (
    causal_conv,
    expert_diversity,
    preference_attention,
    preference_features,
    selective_scan,
    selective_scan_last,
    ssd,
    ssd_last,
)
from recbole_ssm.ops.packing import Borders, cu_seqlens_from_lengths, know

# A backend may err this many times as much as the reference does at the same dtype, or as that dtype rounds: another
# order of summation, and products of rounded intermediate results as tensor cores take them, stay below it.
ALLOWED = 8.0


@dataclass
class Case:
    """One op on packed sequences.

    Attributes:
        op: one of :data:`FUNCTIONS`.
        inputs: what it is differentiated for, by argument name.
        fixed: its other arguments.
    """

    op: str
    inputs: dict[str, Tensor]
    fixed: dict[str, Any]

    def run(self, backend: str, inputs: dict[str, Tensor] | None = None) -> tuple[Tensor, ...]:
        """The op's outputs: the output and, where the case asks for it, the final state."""
        result = FUNCTIONS[self.op](**(inputs or self.inputs), **self.fixed, backend=backend)
        return result if isinstance(result, tuple) else (result,)

    def exact(self) -> dict[str, Tensor]:
        """The same (rounded) inputs in float64."""
        return {name: t.detach().double().requires_grad_() for name, t in self.inputs.items()}


OPS: dict[str, Callable] = {
    "selective_scan": selective_scan,
    "ssd": ssd,
    "causal_conv": causal_conv,
    "preference_attention": preference_attention,
}
# Those over single rows, which know of no sequences.
ROWWISE: dict[str, Callable] = {"preference_features": preference_features, "expert_diversity": expert_diversity}
# And the forms for the last rows alone.
FUNCTIONS: dict[str, Callable] = {**OPS, **ROWWISE, "selective_scan_last": selective_scan_last, "ssd_last": ssd_last}

# Inputs that have no rows: a model's weights, which stay float32 where autocast rounds the activations.
WEIGHTS = {"A", "D", "dt_bias", "weight", "bias", "score_weight", "similarity_weight", "metric"}

# Inputs that are made of embeddings, which autocast leaves float32, too.
OF_EMBEDDINGS = {"feature"}

Sizes = dict[str, int]


def _scan_shapes(total: int, sequences: int, D: int, N: int) -> dict[str, tuple[int, ...]]:
    return {
        "x": (total, D), "dt": (total, D), "A": (D, N), "B": (total, N), "C": (total, N), "D": (D,), "z": (total, D),
        "dt_bias": (D,), "initial_state": (sequences, D, N),
    }  # fmt: skip


def _scan_last_shapes(total: int, sequences: int, D: int, N: int) -> dict[str, tuple[int, ...]]:
    return {
        "x": (total, D), "dt": (total, D), "A": (D, N), "B": (total, N), "C": (sequences, N), "dt_bias": (D,),
    }  # fmt: skip


def _ssd_shapes(total: int, sequences: int, H: int, P: int, G: int, N: int) -> dict[str, tuple[int, ...]]:
    return {
        "x": (total, H, P), "dt": (total, H), "A": (H,), "B": (total, G, N), "C": (total, G, N), "D": (H,),
        "dt_bias": (H,), "initial_state": (sequences, H, P, N),
    }  # fmt: skip


def _ssd_last_shapes(total: int, sequences: int, H: int, P: int, G: int, N: int) -> dict[str, tuple[int, ...]]:
    return {
        "x": (total, H, P), "dt": (total, H), "A": (H,), "B": (total, G, N), "C": (sequences, G, N), "dt_bias": (H,),
        "D": (H,),
    }  # fmt: skip


def _conv_shapes(total: int, sequences: int, D: int, K: int) -> dict[str, tuple[int, ...]]:
    return {"x": (total, D), "weight": (D, K), "bias": (D,), "initial_state": (sequences, D, K - 1)}


def _attention_shapes(total: int, sequences: int, H: int, P: int, M: int, E: int) -> dict[str, tuple[int, ...]]:
    row = (total, H, P)
    return {"q": row, "k": row, "v": row, "feature": (total, M, E), "score_weight": (H,), "similarity_weight": (H,)}


def _features_shapes(total: int, sequences: int, H: int, E: int) -> dict[str, tuple[int, ...]]:
    return {"embedding": (total, E), "gate_logits": (total, E), "metric": (H, E)}


def _diversity_shapes(total: int, sequences: int, K: int, E: int) -> dict[str, tuple[int, ...]]:
    return {"experts": (K, total, E)}


SHAPES: dict[str, Callable[..., dict[str, tuple[int, ...]]]] = {
    "selective_scan": _scan_shapes,
    "selective_scan_last": _scan_last_shapes,
    "ssd": _ssd_shapes,
    "ssd_last": _ssd_last_shapes,
    "causal_conv": _conv_shapes,
    "preference_attention": _attention_shapes,
    "preference_features": _features_shapes,
    "expert_diversity": _diversity_shapes,
}


def make(
    op: str,
    lengths: list[int] | Tensor,
    sizes: Sizes,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    states: bool = True,
    weights: torch.dtype | None = None,
    filled: bool = False,
    **fixed: Any,
) -> Case:
    """A case with random inputs, the same at every call.

    Args:
        op: one of :data:`FUNCTIONS`.
        lengths: length of each sequence.
        sizes: the letters of the op's docstring.
        dtype: of the inputs.
        device: where they lie.
        states: give an initial state and ask for the final one, where the op has them.
        weights: dtype of those that have no rows, or are made of embeddings, where it is another.
        filled: give tables of fixed shapes, with surplus chunks, as training steps by CUDA graphs have them.
        fixed: further arguments.
    """
    lengths = torch.as_tensor(lengths)
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.randn(shape, generator=generator, dtype=torch.float32)
        for name, shape in SHAPES[op](int(lengths.sum()), len(lengths), **sizes).items()
    }
    if op not in ROWWISE:
        fixed["cu_seqlens"] = cu_seqlens_from_lengths(lengths).to(device)
        if filled:
            know(fixed["cu_seqlens"], Borders(lengths, device, room=max(1, int(lengths.max()))))
    if "A" in drawn:
        drawn["A"] = -drawn["A"].abs()
        # Steps of 0.01 to 1, as trained models take them, so that states live for many rows.
        drawn["dt"] = drawn["dt"] - 2
        fixed["dt_softplus"] = True
    if op == "causal_conv":
        fixed["activation"] = "silu"
    if op == "preference_attention":
        fixed["threshold"] = torch.tensor([-0.5, 0.0, 0.3, 0.1]).repeat(sizes["H"])[: sizes["H"]].to(device)
        drawn["feature"] = _features(drawn["feature"].shape, generator)
    if "initial_state" in drawn and states:
        fixed["return_final_state"] = True
    else:
        drawn.pop("initial_state", None)
    dtypes = {name: weights or dtype if name in WEIGHTS | OF_EMBEDDINGS else dtype for name in drawn}
    inputs = {name: t.to(device, dtypes[name]).requires_grad_() for name, t in drawn.items()}
    return Case(op, inputs, fixed)


def _features(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Vectors of a few items, none of whose cosines rounding could move over a threshold."""
    total, metrics, size = shape
    while True:
        items = torch.randn(24, size, generator=generator).bfloat16().float()
        direction = F.normalize(items, dim=-1)
        if ((direction @ direction.T)[..., None] - torch.tensor([-0.5, 0.0, 0.3, 0.1])).abs().min() > 1e-4:
            return items[torch.randint(24, (total, metrics), generator=generator)]


def results(case: Case, outputs: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and the gradients of one random function of them, by name."""
    generator = torch.Generator().manual_seed(1)
    named = dict(zip(("output", "final state"), outputs, strict=False))
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device) for t in outputs]
    terms = [(t.double() * w).sum() for t, w in zip(outputs, weights, strict=True)]
    terms += [(t * 0).double().sum() for t in inputs.values()]  # where there are no rows, nothing else hangs together
    total = torch.stack(terms).sum()
    gradients = torch.autograd.grad(total, list(inputs.values()))
    return named | {f"gradient of {name}": g for name, g in zip(inputs, gradients, strict=True)}


# Gradients that are sums over rows of another result: what they sum may nearly cancel, and then says how far they can
# be off.
SUMS = {"gradient of dt_bias": "gradient of dt"}


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Largest deviation of each result over the truth's largest value, or 1 if that is less; NaN counts as infinite.

    Of :data:`SUMS`, over the largest sum of absolute values.
    """
    off = {}
    for name, want in truth.items():
        if not want.numel():
            continue
        summed = truth[SUMS[name]].detach().abs().sum(0) if name in SUMS else want.detach().abs()
        deviation = float((found[name].detach().double() - want.detach()).abs().max() / summed.max().clamp_min(1.0))
        off[name] = deviation if deviation == deviation else float("inf")
    return off


def compared(case: Case, backend: str, truth: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Of each result of ``backend``: how far it is off (:func:`errors`), and how far it may be."""
    dtype, n_rows = (first := next(iter(case.inputs.values()))).dtype, len(first)
    reference = errors(results(case, case.run("reference"), case.inputs), truth)
    own = errors(results(case, case.run(backend), case.inputs), truth)
    # The reference may be lucky. A weight's gradient in float32 sums over the rows, each of which rounds.
    rounds = {f"gradient of {name}": n_rows**0.5 for name in case.inputs if name in WEIGHTS and dtype == torch.float32}
    return {
        name: (own[name], ALLOWED * max(reference[name], torch.finfo(dtype).eps * rounds.get(name, 1.0)))
        for name in reference
    }


def excess(case: Case, backend: str, truth: dict[str, Tensor]) -> dict[str, float]:
    """What of ``backend`` errs more than is :data:`ALLOWED`, as a multiple of that; empty where it is right."""
    return {name: off / allowed for name, (off, allowed) in compared(case, backend, truth).items() if off > allowed}


def true_results(case: Case) -> dict[str, Tensor]:
    """What the reference gives in float64."""
    exact = case.exact()
    return results(case, case.run("reference", exact), exact)


def right(case: Case, backend: str) -> dict[str, float]:
    """As :func:`excess`, with :func:`true_results` for the truth."""
    return excess(case, backend, true_results(case))
