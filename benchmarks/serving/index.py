"""The approximate index of a large catalogue against the exact top items: speed, and what is missed."""

import argparse
import time
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.serving.contenders import histories, in_turns, served
from recbole_ssm.serving.approximate import ApproximateIndex, overlap
from recbole_ssm.serving.recommender import Recommender

K, USERS, EVENTS = 20, 256, 50
LISTS = (16, 64, 256)
ITEMS_OF_A_CLUSTER = 250
ROUNDS = 7
KINDS = {
    "clustered": f"vectors around centres, one of {ITEMS_OF_A_CLUSTER} items, noise half as large as a centre; a "
    "user's is an item's, and noise half as large as it",
    "random": "normal vectors, and users' as well: nothing to find lists by, the hardest case",
}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """A row a kind of catalogue and number of lists searched."""
    items = arguments.index_items
    rows, recalls, taken = [], {}, {}
    for kind in KINDS:
        recommender = _recommender(items, kind)
        begin = time.perf_counter()
        index = ApproximateIndex(recommender, recommender.candidate_ids(), LISTS[0])
        built = time.perf_counter() - begin
        asked = histories(USERS, EVENTS, items)
        exact = recommender.top(asked, K)[0]

        def by_index(lists: int, index: ApproximateIndex = index, asked: Any = asked) -> np.ndarray:
            index.lists_searched = lists
            return index.top(asked, K)[0]

        found = {"exact": (1, 1)}
        cases: dict[str, Any] = {"exact": lambda recommender=recommender, asked=asked: recommender.top(asked, K)}
        for lists in LISTS:
            name = f"faiss, {lists} of {index.lists:,} lists"
            found[name] = overlap(by_index(lists), exact)
            cases[name] = lambda lists=lists, call=by_index: call(lists)
        taken[kind] = in_turns(cases, min(arguments.rounds, ROUNDS), arguments.seconds, warm=1)
        recalls[kind] = {name: part / of for name, (part, of) in found.items()}
        slowest = median(taken[kind]["exact"])
        for name, seconds in taken[kind].items():
            print(f"faiss, {kind}, {name}: {USERS / median(seconds):,.0f} users/s", flush=True)
            rows.append(
                {
                    "items": kind,
                    "top items": name,
                    f"recall@{K}": f"{recalls[kind][name]:.4f}",
                    "users a second": f"{USERS / median(seconds):,.0f}",
                    "times as fast": f"{slowest / median(seconds):.3g}",
                    "s to build": "" if name == "exact" else f"{built:.3g}",
                }
            )
    return {
        "title": "An approximate index of a large catalogue",
        "settings": f"{items:,} items, hidden_size 64, {K} items a user, seen ones left out, {USERS} users at a time, "
        f"each of {EVENTS} events, float32",
        "rows": rows,
        "recall": recalls,
        "seconds": taken,
        "protocol": {
            **KINDS,
            "users a second": "top items alone: users' vectors are given, the model's forward pass is left out",
            "recall": "the part of the exact answer's items that the index finds",
            "timing": "medians of rounds in which all of a kind take turns",
        },
    }


def _recommender(items: int, kind: str) -> Recommender:
    """One whose items have vectors of a kind, and whose users too, instead of what the model makes of histories."""
    recommender = served("Mamba4Rec", items)
    generator = torch.Generator().manual_seed(0)
    table = recommender.model.item_embedding.weight.detach()
    table.normal_(generator=generator)
    if kind == "clustered":
        centres = torch.randn(max(1, len(table) // ITEMS_OF_A_CLUSTER), table.shape[1], generator=generator)
        table.mul_(0.5).add_(centres[torch.randint(len(centres), (len(table),), generator=generator)])

    noise = torch.randn(4096, table.shape[1], generator=generator)

    def represent(asked: Any) -> torch.Tensor:
        """By the last item, so that a user's is the same in any order of users."""
        last = torch.from_numpy(asked.items[np.cumsum(asked.lengths) - 1])
        own = noise[last % len(noise)]
        return table[last] + 0.5 * own if kind == "clustered" else own

    recommender.represent = represent  # type: ignore[method-assign, assignment]
    return recommender
