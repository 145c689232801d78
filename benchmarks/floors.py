"""The least time that a part of a training step could take: its arithmetic and its traffic at this machine's rates."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import copy_rate, rounds
from recbole_ssm.ops.packing import borders

# Operations a state and row of the recurrence, forward and backward; a multiplication, an addition and an exponential
# count one each. Selective scan, forward: decay exp(dt A), input dt x B, update and output, two each. Backward: decay,
# input and update anew, the state's gradient carried on (4), and what it gives to A, B, C, dt and x.
SELECTIVE_SCAN = (8, 20)
# For the last row alone: what is left of each input (decay, 2) and its sum (2); backward the same for each gradient.
SELECTIVE_SCAN_LAST = (4, 10)
# State-space duality: one decay a head, so input 1 (rounded up with the decay's share to 2), update and output 2 each.
SSD = (6, 15)
# Attention's backward pass makes its scores anew, then two products for each of the forward's two.
ATTENTION_BACKWARD = 2.5
# A convolution's gradients are one more convolution for the input and one for the filter.
CONVOLUTION_BACKWARD = 2
# Scores make one product forward and two backward, for the hidden states and for the item table.
LOSS_PRODUCTS = 3
# Numbers a parameter that an update moves: parameter, gradient and state read, parameter and state written.
NUMBERS_PER_PARAMETER = {"adam": 7, "adamw": 7, "sgd": 3, "adagrad": 5, "rmsprop": 5}

# What each part's floor counts; the larger of arithmetic and traffic is the floor.
FLOORS = {
    "loading": "bytes of a batch, read and written once",
    "embedding": "rows read and written, forward and backward",
    "scan": f"T D N states, {SELECTIVE_SCAN[0]} operations each forward and {SELECTIVE_SCAN[1]} backward "
    f"(SSD: T H P N, {SSD[0]} and {SSD[1]}; for the last row alone see benchmarks/floors.py); inputs, outputs and "
    "gradients moved once",
    "convolution": f"2 K T D operations forward and {CONVOLUTION_BACKWARD} times that backward; inputs, outputs and "
    "gradients moved once",
    "attention": f"2 (P + P) H + 2 E M operations a visible pair forward and {ATTENTION_BACKWARD} times that backward, "
    "and the matrix products of its projections; inputs, outputs and gradients moved once",
    "experts": "their matrix products as they ran, operands and results moved once; nothing for what is done to single "
    "numbers between them",
    "layers": "the same",
    "loss": f"2 M n d operations for the scores and {LOSS_PRODUCTS - 1} times that for their gradients; hidden states, "
    "item table and gradients moved once, scores never",
    "optimizer": f"{NUMBERS_PER_PARAMETER['adam']} numbers a parameter (Adam: 4 read, 3 written)",
    "evaluation": "the forward pass's arithmetic and matrix products, scores of all items among them; operands and "
    "results moved once, scores read once more",
}


@dataclass
class Cost:
    """Arithmetic operations and bytes moved."""

    operations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.operations + other.operations, self.bytes + other.bytes)

    def __mul__(self, factor: float) -> "Cost":
        return Cost(self.operations * factor, self.bytes * factor)


@dataclass(frozen=True)
class Rates:
    """What a machine does a second at best: operations of a large matrix product, bytes read and written by a copy."""

    operations_per_s: float
    bytes_per_s: float

    def floor(self, cost: Cost) -> tuple[float, str]:
        """Seconds that a cost takes at least, and what decides them: ``arithmetic`` or ``bytes``."""
        arithmetic, moved = cost.operations / self.operations_per_s, cost.bytes / self.bytes_per_s
        return (arithmetic, "arithmetic") if arithmetic > moved else (moved, "bytes")


def measure_rates(device: str, dtype: torch.dtype) -> Rates:
    """This machine's rates, with all threads that torch may use."""
    size = 4096 if device == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    taken = rounds({"product": lambda: torch.mm(a, b, out=out)}, 8, device == "cuda")["product"]
    return Rates(2 * size**3 / min(taken), copy_rate(device))


def matrix_product(left: list[int], right: list[int], itemsize: int) -> Cost:
    """``[..., m, k]`` times ``[..., k, n]``."""
    *batch, m, k = left
    n, count = right[-1], prod(batch)
    return Cost(2.0 * count * m * k * n, float(itemsize * count * (m * k + k * n + m * n)))


def _traffic(trained: bool, y: Tensor, *inputs: Any) -> float:
    """Each input, output and gradient moved once, as in :func:`benchmarks.ops.floor_bytes`."""
    tensors = (t for t in inputs if isinstance(t, Tensor) and t.is_floating_point())
    read, written = sum(t.numel() * t.element_size() for t in tensors), y.numel() * y.element_size()
    return float(3 * read + 2 * written if trained else read + written)


def _selective_scan(
    per_state: tuple[int, int], trained: bool, y: Tensor, x: Tensor, dt: Tensor, A: Tensor, *others: Any, **named: Any
) -> Cost:  # fmt: skip
    operations = len(x) * A.numel() * (sum(per_state) if trained else per_state[0])
    return Cost(operations, _traffic(trained, y, x, dt, A, *others, *named.values()))


def _ssd(
    trained: bool, y: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *others: Any, **named: Any
) -> Cost:  # fmt: skip
    per_state = sum(SSD) if trained else SSD[0]
    return Cost(per_state * x.numel() * B.shape[-1], _traffic(trained, y, x, dt, A, B, *others, *named.values()))


def _ssd_last(
    trained: bool, y: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *others: Any, **named: Any
) -> Cost:  # fmt: skip
    # Its dual form has no states: each row's C . B, and a weighted sum of rows; two such products a gradient.
    operations = 2 * (B.numel() + x.numel()) * (3 if trained else 1)
    return Cost(operations, _traffic(trained, y, x, dt, A, B, *others, *named.values()))


def _causal_conv(trained: bool, y: Tensor, x: Tensor, weight: Tensor, *others: Any, **named: Any) -> Cost:
    operations = 2 * weight.shape[1] * x.numel() * (1 + CONVOLUTION_BACKWARD if trained else 1)
    return Cost(operations, _traffic(trained, y, x, weight, *others, *named.values()))


def _preference_attention(
    trained: bool, y: Tensor, q: Tensor, k: Tensor, v: Tensor, feature: Tensor, *others: Any, cu_seqlens: Tensor,
    window: int | None = None, queries: str = "all", **named: Any,
) -> Cost:  # fmt: skip
    lengths = borders(cu_seqlens).lengths.double()
    seen = lengths if window is None else lengths.clamp_max(window)
    pairs = seen if queries == "last" else seen * (seen + 1) / 2 + (lengths - seen) * seen
    per_pair = 4 * q[0].numel() + 2 * feature[0].numel() if len(q) else 0
    operations = float(pairs.sum()) * per_pair * (1 + ATTENTION_BACKWARD if trained else 1)
    return Cost(operations, _traffic(trained, y, q, k, v, feature, *others))


def embedding(trained: bool, rows: Tensor, *_: Any) -> Cost:
    """Of looking ``rows`` up."""
    return Cost(0.0, float(rows.numel() * rows.element_size() * (4 if trained else 2)))


def scores_read(trained: bool, scores: Tensor, *_: Any) -> Cost:
    """Of choosing the best among ``scores``."""
    return Cost(0.0, float(scores.numel() * scores.element_size()))


def ranking_loss(
    all_items: int | None, trained: bool, value: Tensor, hidden: Tensor, positives: Tensor, negatives: Tensor | None,
    *_: Any,
) -> Cost:  # fmt: skip
    """Of scoring each of ``hidden [M, d]`` with all items' embeddings, or where that is None with its own ``1 + K``."""
    sampled = 1 if negatives is None else 1 + negatives.shape[1]
    scores = len(hidden) * (all_items or sampled)
    table = all_items or scores
    products = LOSS_PRODUCTS if trained else 1
    moved = products * (len(hidden) + table) * hidden.shape[1] * hidden.element_size()
    return Cost(2.0 * products * scores * hidden.shape[1], float(moved))


def optimizer(model: torch.nn.Module, learner: str) -> Cost:
    """Of one update of all parameters."""
    numbers = NUMBERS_PER_PARAMETER.get(learner.lower(), NUMBERS_PER_PARAMETER["adam"])  # RecBole's choice
    return Cost(0.0, float(numbers * sum(p.numel() * p.element_size() for p in model.parameters())))


# Cost of one call of an op, by its name in the layers: of whether gradients follow, its output and its arguments.
OP_COSTS: dict[str, Callable[..., Cost]] = {
    "selective_scan": partial(_selective_scan, SELECTIVE_SCAN),
    "selective_scan_last": partial(_selective_scan, SELECTIVE_SCAN_LAST),
    "ssd": _ssd,
    "ssd_last": _ssd_last,
    "causal_conv": _causal_conv,
    "preference_attention": _preference_attention,
}
