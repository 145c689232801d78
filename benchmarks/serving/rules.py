"""What the rules of sessions cost in accuracy: trained models on their test items, after each user's whole history."""

import argparse
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from benchmarks.accuracy.runs import Spec
from benchmarks.accuracy.statistics import compare
from benchmarks.speed.contenders import hush
from recbole_ssm import Recommender
from recbole_ssm.analysis import Ranks
from recbole_ssm.quick_start import load_data, train_and_test
from recbole_ssm.serving.histories import Histories
from recbole_ssm.serving.session import RULES, Sessions

MODELS = ("Mamba4Rec", "STARRec")
K = 10
METRICS = (f"ndcg@{K}", f"recall@{K}")

# Sessions held at a time: a state of STARRec's takes about 0.2 MB.
SESSIONS_AT_A_TIME = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument("--datasets", nargs="+", default=["ml-100k"], help="rules: to train on")
    parser.add_argument("--data_path", type=Path, default=Path("dataset"), help="rules: their folder, but for ml-100k")
    parser.add_argument("--max_lengths", nargs="+", type=int, default=[50, 200], help="rules: MAX_ITEM_LIST_LENGTH")
    parser.add_argument("--seeds", nargs="+", type=int, default=[2020, 2021, 2022], help="rules: of training")
    parser.add_argument("--epochs", type=int, help="rules: of training, at most; as tuned where absent")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rows of each dataset, maximum and model: one of all users, one of those whose history exceeds the maximum."""
    hush()
    fewer = {} if arguments.epochs is None else {"epochs": arguments.epochs}
    data_path = str(arguments.data_path.resolve())
    rows, runs = [], []
    for dataset in arguments.datasets:
        for longest in arguments.max_lengths:
            for model in MODELS:
                specs = [
                    Spec(model, dataset, seed, {"MAX_ITEM_LIST_LENGTH": longest, **fewer}) for seed in arguments.seeds
                ]
                ranks = [_ranks_by_rule(spec, data_path) for spec in specs]
                lengths = ranks[0][RULES[0]].lengths
                for users, which in (("all", lengths > 0), (f"of more than {longest} events", lengths > longest)):
                    if which.any():
                        about = {"dataset": dataset, "maximum": longest, "model": model, "users": users}
                        rows.append({**about, "number": int(which.sum()), **_cells(ranks, which)})
                        runs += [
                            {**about, "seed": spec.seed, "rule": rule, **found.metrics((K,), which)}
                            for spec, one in zip(specs, ranks, strict=True)
                            for rule, found in one.items()
                        ]
    return {
        "title": "What the rules of sessions cost in accuracy",
        "settings": f"properties/tuned, but for MAX_ITEM_LIST_LENGTH{''.join(f', {k} {v}' for k, v in fewer.items())}",
        "rows": rows,
        "runs": runs,
        "protocol": {
            "test": "the last event of each user, all items ranked, after a session of all events before it "
            "(Sessions.start and Sessions.top); by the rule window it is the run's own test result, which is checked",
            "figures": "means over seeds, and standard deviations",
            "change, p": "of endless against window: the users' NDCG, averaged over seeds, in a paired t-test",
        },
    }


def _ranks_by_rule(spec: Spec, data_path: str) -> dict[str, Ranks]:
    """Train a model, and rank each user's test item by both rules."""
    with tempfile.TemporaryDirectory() as folder:
        config = spec.config(data_path, checkpoint_dir=folder, metric_decimal_place=8)
        run = train_and_test(config)
        assert run.checkpoint is not None
        recommender = Recommender.load(run.checkpoint, "cpu")
    _, (*_, test_data) = load_data(spec.config(data_path))
    dataset = test_data._dataset
    target = dataset.inter_feat[dataset.TARGET_POSITION].numpy()
    items, begin = dataset.sorted_items.numpy(), dataset.user_start.numpy()[target]
    lengths = target - begin
    histories = Histories(np.concatenate([items[b:t] for b, t in zip(begin, target, strict=True)]), lengths)
    users = dataset.inter_feat[dataset.uid_field].numpy()
    found = {}
    for rule in RULES:
        ranks = np.concatenate(
            [
                _ranks(Sessions(recommender, rule), histories.take(part), items[target[part]])
                for part in np.split(np.arange(len(users)), range(SESSIONS_AT_A_TIME, len(users), SESSIONS_AT_A_TIME))
            ]
        )
        found[rule] = Ranks(users, lengths, ranks)
    own = found["window"].metrics((K,))
    for metric in METRICS:
        expected = run.result["test_result"][metric]
        assert abs(own[metric] - expected) < 1e-6, f"{spec}: {metric} is {own[metric]}, in the run {expected}"
    text = ", ".join(f"{rule} {ranks.metrics((K,))[METRICS[0]]:.4f}" for rule, ranks in found.items())
    print(f"rules, {spec}: {METRICS[0]} {text}", flush=True)
    return found


def _ranks(sessions: Sessions, histories: Histories, targets: np.ndarray) -> np.ndarray:
    """Ranks from 1; ``K + 1`` where the target is not among the first ``K``."""
    ids, _ = sessions.top(sessions.start(histories), K, exclude_seen=False)
    hits = ids == targets[:, None]
    return np.where(hits.any(1), hits.argmax(1) + 1, K + 1)


def _cells(ranks: list[dict[str, Ranks]], which: np.ndarray) -> dict[str, str]:
    cells = {}
    for metric in METRICS:
        for rule in RULES:
            values = [one[rule].metrics((K,), which)[metric] for one in ranks]
            spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
            cells[f"{metric}, {rule}"] = f"{mean(values):.4f}{spread}"
    window, endless = (np.mean([one[rule].ndcg(K)[which] for one in ranks], axis=0) for rule in RULES)
    found = compare(endless, window)
    return {**cells, "change": f"{found.change:+.1%}", "p": f"{found.p:.2g}"}
