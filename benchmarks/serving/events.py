"""One more event after histories of several lengths: a state that is carried, against the history read again."""

import argparse
from statistics import median
from typing import Any

import torch

from benchmarks.serving.contenders import histories, in_turns, milliseconds, served
from recbole_ssm.serving.session import Sessions

ITEMS = 3416
CARRIED = {"Mamba4Rec": "Mamba4Rec, state carried", "STARRec": "STARRec, state carried"}
REPLAYED = "SASRec of RecBole, history read again"
CUT = "SASRec of RecBole, its latest 200 events read again"


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """A row a contender, a column a length."""
    taken: dict[str, dict[int, float]] = {}
    for length in arguments.histories:
        cases: dict[str, Any] = {}
        for model, name in CARRIED.items():
            sessions = Sessions(served(model, ITEMS), "endless")
            states = sessions.start(histories(1, length, ITEMS))
            cases[name] = lambda sessions=sessions, states=states: sessions.update(states, [7])
        for name, read in ((REPLAYED, length), (CUT, min(length, 200))):
            cases[name] = _replay(read)
        for name, seconds in in_turns(cases, arguments.rounds, arguments.seconds).items():
            taken.setdefault(name, {})[length] = median(seconds)
            print(f"events, history {length}, {name}: {milliseconds(median(seconds))} ms", flush=True)
    longest = max(arguments.histories)
    rows = [
        {
            "contender": name,
            **{f"{length:,} events before, ms": milliseconds(value) for length, value in own.items()},
            f"times as fast as reading all again, at {longest:,}": f"{taken[REPLAYED][longest] / own[longest]:.3g}",
        }
        for name, own in taken.items()
    ]
    return {
        "title": "One more event",
        "settings": f"hidden_size 64, MAX_ITEM_LIST_LENGTH 200, {ITEMS} items, as shipped otherwise, float32, new",
        "rows": rows,
        "seconds": taken,
        "protocol": {
            "event": "the representation of one user's history after one more item, without scores of items",
            "carried": "Sessions.update by the rule endless, on a state of that many events",
            "read again": "RecBole's SASRec.forward of 2 layers on one row as long as the history, unpadded",
            "timing": "medians of rounds in which all take turns",
        },
    }


def _replay(length: int) -> Any:
    model = served("SASRec", ITEMS, MAX_ITEM_LIST_LENGTH=length, train_mode="prefix").model
    items = torch.from_numpy(histories(1, length, ITEMS).items)[None]
    count = torch.tensor([length])

    def call() -> Any:
        with torch.inference_mode():
            return model.forward(items, count)

    return call
