"""Catalogue: the loss alone, over ever more items."""

import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import peak_bytes, rounds, seconds
from benchmarks.speed.contenders import config_of, on_cuda, ratios, spread
from recbole_ssm.layers.losses import full_cross_entropy, item_scores, sampled_softmax

DENSE = "dense"
TARGETS = 2_048
NEGATIVES = 256
SECONDS_A_SIZE = 20.0
LEAST_ROUNDS = 3
SHARE_OF_FREE_MEMORY = 0.6
# Largest deviation from dense of a loss that should equal it, and of its gradients, over the largest value.
ALLOWED = 1e-4

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def dense(hidden: Tensor, weight: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """Cross-entropy over all items with all their scores at once, as RecBole computes it."""
    return F.cross_entropy(hidden @ weight.T, positives)


def full(hidden: Tensor, weight: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """The same without the scores."""
    return full_cross_entropy(hidden, weight, positives)


def sampled(hidden: Tensor, weight: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """Softmax over each row's positive and its own sampled negatives."""
    scores = item_scores(hidden, weight, torch.cat([positives[:, None], negatives], 1))
    return sampled_softmax(scores[:, :1], scores[:, 1:], len(weight))


LOSSES: dict[str, Loss] = {
    DENSE: dense,
    "full_cross_entropy": full,
    f"sampled_softmax, {NEGATIVES} negatives": sampled,
}


def measure(arguments: Namespace, earlier: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Time and memory of each loss, forward and backward, at each number of items."""
    config = config_of(arguments, "Mamba4Rec", {})
    device, size, cuda = str(config["device"]), config["hidden_size"], on_cuda(arguments)
    sizes = sorted(arguments.catalogue)
    wrong = deviation(*_inputs(sizes[0], size, device))
    if wrong > ALLOWED:
        raise AssertionError(f"full_cross_entropy is off from dense cross-entropy by {wrong:.2g}: nothing is timed")
    rows = []
    for items in sizes:
        rows.append(
            {"items": items, "table_bytes": 2 * 4 * items * size, "losses": _at(items, size, device, arguments)}
        )
        print(f"catalogue, {items} items: {_line(rows[-1]['losses'])}", flush=True)
    yield {
        "settings": {
            "targets": TARGETS,
            "hidden_size": size,
            "negatives": NEGATIVES,
            "dtype": "float32",
            "seed": 0,
        },
        "protocol": {
            "timing": f"median of up to {arguments.rounds} rounds, every loss once a round; ratios are medians over "
            "rounds",
            "step": "forward and backward, gradients of the hidden states and of the item table",
            "parity": f"full_cross_entropy against dense, loss and gradients, before anything is timed: {wrong:.1g}",
            "memory": "peak above what was held before (which is the table), the table's gradient within: torch's "
            "allocator on a GPU, resident set on a CPU",
            "table_bytes": "the item embeddings and their gradient",
            "dense": f"left out where it needs over {SHARE_OF_FREE_MEMORY:.0%} of the free memory",
        },
        "cuda": cuda,
        "rows": rows,
    }


def _inputs(items: int, size: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TARGETS, size, generator=generator).to(device).requires_grad_()
    weight = (torch.randn(items, size, generator=generator) * 0.02).to(device).requires_grad_()
    positives = torch.randint(1, items, (TARGETS,), generator=generator).to(device)
    negatives = torch.randint(1, items, (TARGETS, NEGATIVES), generator=generator).to(device)
    return hidden, weight, positives, negatives


def deviation(hidden: Tensor, weight: Tensor, positives: Tensor, negatives: Tensor) -> float:
    """Largest deviation of :func:`full` and its gradients from :func:`dense`, each over the largest value."""
    results = []
    for loss in (dense, full):
        value = loss(hidden, weight, positives, negatives)
        results.append([value.detach(), *torch.autograd.grad(value, (hidden, weight))])
    return max(float((own - true).abs().max() / true.abs().max()) for true, own in zip(*results, strict=True))


def _both(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    torch.autograd.grad(loss(*inputs), inputs[:2])


def _at(items: int, size: int, device: str, arguments: Namespace) -> dict[str, Any]:
    inputs = _inputs(items, size, device)
    cuda = device.startswith("cuda")
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    # Logits, their log-softmax, and the gradient of either.
    needed = 3 * 4 * TARGETS * items
    found: dict[str, Any] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name, loss in LOSSES.items():
        if name == DENSE and needed > SHARE_OF_FREE_MEMORY * free:
            found[name] = {"left out": f"needs about {needed / 2**30:.0f} GiB"}
        else:
            calls[name] = partial(_both, loss, inputs)
    for call in calls.values():
        call()  # warm up
    taken = sum(seconds(call, cuda) for call in calls.values())
    times = rounds(calls, min(arguments.rounds, max(LEAST_ROUNDS, math.ceil(SECONDS_A_SIZE / taken))), cuda)
    for name, call in calls.items():
        found[name] = {"rounds": len(times[name]), "seconds": spread(times[name]), "peak_bytes": peak_bytes(call, cuda)}
    if DENSE in times:
        speeds = {name: [1 / s for s in own] for name, own in times.items()}
        for name, ratio in ratios(speeds, DENSE).items():
            found[name]["ratio"] = ratio
    return found


def _line(losses: dict[str, Any]) -> str:
    return "; ".join(
        f"{name} left out: {loss['left out']}"
        if "left out" in loss
        else f"{name} {loss['seconds']['median']:.3g} s, {(loss['peak_bytes'] or 0) / 2**20:.0f} MiB"
        for name, loss in losses.items()
    )
