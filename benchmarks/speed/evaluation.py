"""Evaluation: all validation users ranked over all items."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.measure import peak_bytes
from benchmarks.speed.contenders import (
    RECBOLE,
    SEQUENCE_MODE,
    Steps,
    build,
    on_cuda,
    ratios,
    recorded,
    spread,
    wall_rounds,
)

# Enough that the two SASRecs do not compare noise.
TRAINED_STEPS = 30
AGREE = 5e-5


def measure(arguments: Namespace, earlier: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Time of an evaluation, and whether SASRec's equal weights get equal metrics both ways."""
    cuda = on_cuda(arguments)
    # RecBole's order of interactions for all, so that all rank the same rows.
    contenders = {each.name: each for each in build(arguments, time_order="float32", metric_decimal_place=8)}
    twin = contenders.get(SEQUENCE_MODE)
    if twin is not None:
        training = Steps(twin)
        training.steps = TRAINED_STEPS
        training.take()
        contenders[RECBOLE].model.load_state_dict(twin.model.state_dict())
    evaluations: dict[str, Callable[[], Any]] = {}
    metrics: dict[str, dict[str, float]] = {}
    for name, each in contenders.items():
        each.trainer.eval_collector.data_collect(each.train_data)
        evaluations[name] = partial(each.trainer.evaluate, each.valid_data, load_best_model=False)
        metrics[name] = {metric: float(value) for metric, value in evaluations[name]().items()}  # warms up, too
        print(f"evaluation, {name}: {metrics[name]}", flush=True)
    equal = None
    if twin is not None:
        largest = max(abs(value - metrics[RECBOLE][metric]) for metric, value in metrics[twin.name].items())
        equal = {
            "metrics": {name: metrics[name] for name in (RECBOLE, twin.name)},
            "largest_difference": largest,
            "agree_to_4_places": largest < AGREE,
        }
        if not equal["agree_to_4_places"]:
            print(f"evaluation, {twin.name}: FAILS, its metrics are off by {largest:.2g}, so it is not timed")
            del evaluations[twin.name]
    times = wall_rounds({**evaluations}, arguments.rounds)
    users = len(contenders[RECBOLE].valid_data._dataset)
    speeds = {name: [users / taken for taken in own] for name, own in times.items()}
    compared = ratios(speeds, RECBOLE)
    rows: list[dict[str, Any]] = []
    for name, each in contenders.items():
        row = {"contender": name, **each.settings(), "eval_batch_size": each.valid_data.step}
        if name in times:
            row |= {
                "seconds": spread(times[name]),
                "users_per_s": spread(speeds[name]),
                "ratio": compared[name],
                "peak_bytes": peak_bytes(evaluations[name], cuda),
            }
            print(f"evaluation, {name}: {row['seconds']['median']:.3g} s", flush=True)
        else:
            row["left out"] = "its metrics differ from RecBole's"
        rows.append(row)
    yield {
        "settings": recorded(contenders[RECBOLE].config, arguments.dataset)
        | {
            "time_order": "float32",
            "users": users,
            "items": contenders[RECBOLE].model.n_items - 1,
        },
        "protocol": {
            "timing": f"median of {arguments.rounds} rounds, every contender once a round; ratios are medians over "
            "rounds",
            "candidates": "all items, the history's included; the last but one item of each user is the target",
            "RecBole": "recbole.trainer.Trainer on RecBole's own dataset and loader",
            "weights": f"SASRec in sequence mode after {TRAINED_STEPS} steps, copied to RecBole's; the others' fresh",
            "memory": "peak above what was held before: torch's allocator on a GPU, resident set on a CPU",
        },
        "equal_weights": equal,
        "rows": rows,
    }
