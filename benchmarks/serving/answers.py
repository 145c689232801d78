"""An event and the recommendations after it, of one user and of many at a time, on small and large catalogues."""

import argparse
from typing import Any

import numpy as np

from benchmarks.serving.contenders import histories, in_turns, milliseconds, served
from recbole_ssm.serving.session import Sessions

MODELS = ("Mamba4Rec", "STARRec")
BEFORE = 100


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """A row a model, catalogue and number of users at a time."""
    rows = []
    for items in arguments.catalogues:
        for count in arguments.users:
            cases: dict[str, Any] = {}
            for model in MODELS:
                sessions = Sessions(served(model, items))
                states = sessions.start(histories(count, BEFORE, items))
                cases[model] = lambda sessions=sessions, states=states: sessions.top(
                    sessions.update(states, [7] * len(states)), 10
                )
            for model, seconds in in_turns(cases, arguments.rounds, arguments.seconds).items():
                p50, p99 = np.percentile(seconds, [50, 99])
                print(f"answers, {items} items, {count} at a time, {model}: {milliseconds(p50)} ms", flush=True)
                rows.append(
                    {
                        "model": model,
                        "items": f"{items:,}",
                        "users at a time": count,
                        "p50, ms": milliseconds(p50),
                        "p99, ms": milliseconds(p99),
                        "users a second": f"{count / p50:,.0f}",
                        "rounds": len(seconds),
                    }
                )
    return {
        "title": "An event and its recommendations",
        "settings": "hidden_size 64, the models' own settings, float32, untrained",
        "rows": rows,
        "protocol": {
            "answer": f"Sessions.update and Sessions.top of 10 items, seen ones left out, after {BEFORE} events",
            "timing": "percentiles over rounds in which both models take turns",
        },
    }
