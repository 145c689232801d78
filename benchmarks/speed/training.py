"""Training: targets a second, through each trainer's own code path, loading included."""

from argparse import Namespace
from collections.abc import Iterator
from itertools import chain
from typing import Any

from benchmarks.measure import peak_bytes
from benchmarks.speed.authors import released_ssd4rec
from benchmarks.speed.contenders import RECBOLE, Steps, build, on_cuda, ratios, recorded, spread, wall_rounds

AS_SHIPPED = f"{RECBOLE}, anomaly detection on"
SECONDS_A_ROUND = 1.0
MOST_STEPS = 50


def measure(arguments: Namespace, earlier: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rates of all contenders, who take turns in every round."""
    cuda = on_cuda(arguments)
    steps: dict[str, Steps] = {}
    contenders = build(arguments)
    if arguments.authors_ssd4rec:
        contenders = chain(contenders, [released_ssd4rec(arguments, arguments.authors_ssd4rec)])
    for contender in contenders:
        steps[contender.name] = Steps(contender)
        if contender.name == RECBOLE:
            # RecBole's look-up of any sequential model imports all, and SINE switches anomaly detection on.
            steps[AS_SHIPPED] = Steps(contender, anomaly_detection=True)
    for name, step in steps.items():
        step.take()  # compile, tune, warm up
        taken = wall_rounds({name: step.take}, 1)[name][0]
        step.steps = max(1, min(MOST_STEPS, round(SECONDS_A_ROUND / taken)))
        print(f"training, {name}: {taken:.3g} s a step, {step.steps} a round", flush=True)
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, times in wall_rounds({name: step.take for name, step in steps.items()}, 1).items():
            rates[name].append(steps[name].num_targets / times[0])
    compared = ratios(rates, RECBOLE)
    rows = []
    for name, step in steps.items():
        taken_steps, step.steps = step.steps, 1
        targets = getattr(step.contender.train_data, "num_targets", None) or len(step.contender.train_data._dataset)
        rows.append({
            "contender": name,
            **step.contender.settings(),
            "targets_per_s": spread(rates[name]),
            "ratio": compared[name],
            "epoch_s": targets / spread(rates[name])["median"],
            "steps_a_round": taken_steps,
            "peak_bytes": peak_bytes(step.take, cuda),
        })  # fmt: skip
        print(f"training, {name}: {rows[-1]['targets_per_s']['median']:.4g} targets a second", flush=True)
    yield {
        "settings": recorded(steps[RECBOLE].contender.config, arguments.dataset),
        "protocol": {
            "timing": f"median of {arguments.rounds} rounds, every contender once a round for about "
            f"{SECONDS_A_ROUND:g} s or one step if that takes longer; ratios are medians over rounds",
            "step": "the trainer's own _train_epoch on the loader's next batches: loading, forward, backward, Adam",
            "memory": "one step's peak above what was held before it: the allocator's on a GPU, the process's on a CPU",
            "anomaly detection": "off for all but the row that names it; RecBole's own get_model switches it on",
            "batch": "in targets; RecBole's rows on a CPU take a smaller one, for memory",
        },
        "rows": rows,
    }
