"""An epoch of each of our models beside Mamba4Rec's, as its property file has it, at the rate of its steps."""

import argparse
from collections.abc import Iterator
from typing import Any

from benchmarks.speed.batches import choose_steps, of_round
from benchmarks.speed.contenders import Steps, contender, ratios, spread

UNIT = "Mamba4Rec"
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    UNIT: (UNIT, {}),
    "Mamba4Rec, Mamba-2": (UNIT, {"ssm_block": "mamba2"}),
    "Mamba4Rec, Mamba-3": (UNIT, {"ssm_block": "mamba3"}),
    **{name: (name, {}) for name in ("STARRec", "TiM4Rec", "SS4Rec", "RecBLR", "eSASRec", "BSARec")},
}

# Items of a history at most: the papers' for sets of films, and for those of shops.
LONGEST = {"ml-1m": 200}
LONGEST_ELSEWHERE = 50

SECONDS_A_ROUND = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument("--model_datasets", nargs="+", default=["ml-1m", "amazon-beauty"], help="of models")


def measure(arguments: argparse.Namespace, earlier: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rates of all of our models on each set, who take turns in every round."""
    rows: list[dict[str, Any]] = []
    for dataset in arguments.model_datasets:
        own = argparse.Namespace(**{**vars(arguments), "dataset": dataset})
        fixed = {"MAX_ITEM_LIST_LENGTH": LONGEST.get(dataset, LONGEST_ELSEWHERE)} | arguments.settings
        steps = {
            name: Steps(contender(own, model, defaults={}, **(fixed | settings)))
            for name, (model, settings) in CONTENDERS.items()
        }
        for step in steps.values():
            step.take()
            choose_steps(step, SECONDS_A_ROUND)
        rates: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(arguments.rounds):
            for name, step in steps.items():
                rates[name].append(of_round(step))
        compared = ratios(rates, UNIT)
        targets = steps[UNIT].contender.num_targets
        for name, step in steps.items():
            rate = spread(rates[name])
            rows.append({
                "contender": name,
                "dataset": dataset,
                **step.contender.settings(),
                "loss_type": step.contender.config["loss_type"],
                "targets_per_s": rate,
                "epoch_s": targets / rate["median"],
                "times_as_long": 1 / compared[name]["median"],
            })  # fmt: skip
            print(f"models, {dataset}, {name}: an epoch in {rows[-1]['epoch_s']:.3g} s", flush=True)
        yield {
            "settings": {"seed": steps[UNIT].contender.config["seed"]},
            "protocol": {
                "settings": "each as its property file has it, with histories of at most "
                f"{', '.join(f'{length} items on {name}' for name, length in LONGEST.items())} and {LONGEST_ELSEWHERE} "
                "elsewhere",
                "timing": f"median of {arguments.rounds} rounds, every model once a round for about "
                f"{SECONDS_A_ROUND:g} s or one step if that takes longer",
                "epoch": "all targets of the training set at that rate; BSARec has a row of its own for each target, "
                "the others read each history once",
            },
            "rows": rows,
        }
