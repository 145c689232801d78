"""Lengths: a training step on the same number of tokens, cut into ever longer sequences."""

import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.measure import peak_bytes, rounds, seconds
from benchmarks.ops import sequences
from benchmarks.speed.contenders import config_of, on_cuda, ratios, spread
from recbole_ssm.data.batch import SequenceBatch
from recbole_ssm.ops.packing import cu_seqlens_from_lengths
from recbole_ssm.quick_start import build_model

ITEMS = 3_500
TARGETS = 2_048
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "STARRec, window 128": ("STARRec", {"attention_window": 128}),
    "STARRec": ("STARRec", {}),
    "Mamba4Rec": ("Mamba4Rec", {}),
    "SSD4Rec, one direction": ("SSD4Rec", {"bidirectional": False}),
}
SECONDS_A_MODEL = 60.0
LEAST_ROUNDS = 3


def measure(arguments: Namespace, earlier: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Time a token and memory of each model at each length."""
    cuda = on_cuda(arguments)
    found = []
    for name, (model, own) in MODELS.items():
        if arguments.models and model not in arguments.models:
            continue
        found.append({"model": name, **_of_model(arguments, name, model, own, cuda)})
    config = config_of(arguments, "Mamba4Rec", {})
    yield {
        "settings": {
            "tokens": arguments.tokens,
            "targets": _targets(arguments),
            "items": ITEMS,
            "layers": 1,
            "hidden_size": config["hidden_size"],
            "loss_type": config["loss_type"],
            "seed": config["seed"],
            "dtype": "float32",
        },
        "protocol": {
            "timing": f"median of up to {arguments.rounds} rounds, in each of which a model meets every length once; "
            "ratios are medians over rounds; models do not take turns, so compare lengths",
            "step": "calculate_loss of random items in training mode (dropout), forward and backward, no optimizer",
            "targets": "the same few at all lengths, so that the loss does not hide the layers",
            "memory": "peak above what was held before: torch's allocator on a GPU, resident set on a CPU",
        },
        "rows": found,
    }


def _of_model(arguments: Namespace, name: str, model: str, own: dict[str, Any], cuda: bool) -> dict[str, Any]:
    steps = {length: _step(arguments, model, own, length) for length in sorted(arguments.lengths)}
    taken: dict[int, float] = {}
    left_out: dict[int, str] = {}
    for length, step in steps.items():
        # Attention over all positions grows with the length, and nothing grows faster.
        longest = max(taken, default=length)
        expected = taken.get(longest, 0.0) * length / longest
        if expected > arguments.limit:
            left_out[length] = f"may take {expected:.0f} s a call"
            continue
        step()  # compile, tune, warm up
        taken[length] = seconds(step, cuda)
        print(f"lengths, {name}, {length}: {taken[length] / arguments.tokens * 1e9:.4g} ns a token", flush=True)
    timed: dict[str, Callable[[], object]] = {str(length): steps[length] for length in taken}
    count = min(arguments.rounds, max(LEAST_ROUNDS, math.ceil(SECONDS_A_MODEL / sum(taken.values()))))
    per_token = {
        length: [1e9 * s / arguments.tokens for s in own] for length, own in rounds(timed, count, cuda).items()
    }
    unit = str(sorted(taken)[min(1, len(taken) - 1)])
    compared = ratios(per_token, unit)
    rows: list[dict[str, Any]] = [
        {
            "length": int(length),
            "ns_a_token": spread(own),
            "ratio": compared[length],
            "peak_bytes": peak_bytes(timed[length], cuda),
        }
        for length, own in per_token.items()
    ]
    rows += [{"length": length, "left out": why} for length, why in left_out.items()]
    return {"rounds": count, "ratio_to": int(unit), "lengths": rows}


def _step(arguments: Namespace, model: str, own: dict[str, Any], length: int) -> Callable[[], None]:
    """Forward and backward of a fresh model on random sequences of one length."""
    fixed = {**own, "train_mode": "sequence", "num_layers": 1, "MAX_ITEM_LIST_LENGTH": length}
    config = config_of(arguments, model, fixed)
    dataset = SimpleNamespace(num=lambda field: ITEMS)  # all that a model asks of it
    built = build_model(config, SimpleNamespace(_dataset=dataset)).train()
    generator = torch.Generator().manual_seed(config["seed"])
    targets = _targets(arguments)
    batch = SequenceBatch(
        items=torch.randint(1, ITEMS, (arguments.tokens,), generator=generator),
        cu_seqlens=cu_seqlens_from_lengths(torch.tensor(sequences(str(length), arguments.tokens))),
        target_rows=torch.randperm(arguments.tokens, generator=generator)[:targets].sort().values,
        targets=torch.randint(1, ITEMS, (targets,), generator=generator),
    ).to(config["device"])

    def step() -> None:
        built.zero_grad()
        losses = built.calculate_loss(batch)
        torch.stack(losses if isinstance(losses, tuple) else (losses,)).sum().backward()

    return step


def _targets(arguments: Namespace) -> int:
    return min(TARGETS, arguments.tokens)
