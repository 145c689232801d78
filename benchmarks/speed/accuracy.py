"""Accuracy: one pass over whole histories against RecBole's rows, trained to the same number of epochs."""

from argparse import Namespace
from collections.abc import Iterator
from statistics import mean, stdev
from typing import Any

from benchmarks.environment import environment
from benchmarks.speed.contenders import config_of, recorded
from recbole_ssm.quick_start import train_and_test

MODELS = ("STARRec", "Mamba4Rec")
MODES = ("sequence", "prefix")
FIRST_SEED = 2020
CHOSEN = ("model", "train_mode", "seed")
COMMON = ("epochs", "dataset", "settings")


def measure(arguments: Namespace, earlier: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each run's best validation result, told as soon as it is there; what an earlier call told is not run again."""
    local = Namespace(**{**vars(arguments), "dataset": arguments.accuracy_dataset})
    common = {"epochs": arguments.epochs, "dataset": local.dataset, "settings": local.settings}
    runs = [run for run in earlier.get("runs", []) if {key: run[key] for key in COMMON} == common]
    config = config_of(local, MODELS[0], {}, {})
    part = {
        "settings": recorded(config, local.dataset)
        | {"layers": 1, "train_batch_size": config["train_batch_size"], "epochs": arguments.epochs}
        | {"seed": f"{FIRST_SEED} and on"},
        "protocol": {
            "run": "recbole_ssm.run_recbole with saved=False and the package's own settings for the set",
            "result": "the best epoch's NDCG@10 on the validation set; mean and standard deviation over seeds",
            "candidates": "all items, the history's included",
            "epoch": "training alone, mean over epochs; the modes do not take turns, so read it as a rough time",
        },
    }
    for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds):
        for model in MODELS:
            for mode in MODES:
                chosen = {"model": model, "train_mode": mode, "seed": seed}
                if arguments.models and model not in arguments.models:
                    continue
                if not any({key: run[key] for key in CHOSEN} == chosen for run in runs):
                    runs.append({**chosen, **common, **_run(local, chosen)})
                    yield {**part, "rows": _rows(runs), "runs": runs}
    yield {**part, "rows": _rows(runs), "runs": runs}


def _run(arguments: Namespace, chosen: dict[str, Any]) -> dict[str, Any]:
    # What run_recbole calls; it tells the time, too.
    fixed = {"train_mode": chosen["train_mode"], "seed": chosen["seed"], "epochs": arguments.epochs}
    finished = train_and_test(config_of(arguments, chosen["model"], fixed, {}), saved=False)
    score, epoch_s = finished.result["best_valid_result"]["ndcg@10"], finished.timings["train_seconds_per_epoch"]
    print(f"accuracy, {' '.join(map(str, chosen.values()))}: {score:.4f}, {epoch_s:.1f} s an epoch", flush=True)
    about = environment()
    return {"ndcg@10": float(score), "epoch_s": epoch_s, "commit": about["commit"], "date": about["date"]}


def _rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for model, mode in dict.fromkeys((run["model"], run["train_mode"]) for run in runs):
        own = [run for run in runs if (run["model"], run["train_mode"]) == (model, mode)]
        values = [run["ndcg@10"] for run in own]
        rows.append({
            "model": model,
            "train_mode": mode,
            "seeds": len(own),
            "ndcg@10": mean(values),
            "sd": stdev(values) if len(values) > 1 else None,
            "epoch_s": mean(run["epoch_s"] for run in own),
        })  # fmt: skip
    return rows
