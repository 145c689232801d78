"""What becomes of targets by how often training had them, and what a trained STAR-Rec's parts do, on the test set:
small enough for a row of the result file.
"""

from pathlib import Path
from typing import Any

import numpy as np

from recbole_ssm.analysis import Ranks, expert_gates, fusion_weights, gate_entropy, history_categories
from recbole_ssm.analysis.ranking import length_buckets
from recbole_ssm.models.starrec import STARRec

LENGTHS = (1, 5, 10, 20, 50, 100, 200)

# Where a set has kinds of items: the column of its .item file.
CATEGORIES = {"ml-1m": "genre", "ml-100k": "class"}

# By how often training had a test user's target.
NEW, RAREST, TAIL = "never in training", "the 10% rarest items", "rarest items of 10% of interactions"


def by_popularity(ranks: Ranks, train_data: Any, test_data: Any, topk: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """Metrics of the users whose target is a rare item, or one that training never had; none where there are none.

    Beside them stands their ``number`` and the ``auc``: the part of the other items that are ranked behind, by chance a
    half.

    Args:
        ranks: among all items.
        train_data: loader of training.
        test_data: loader of the ranked rows.
        topk: of the metrics.
    """
    dataset = test_data._dataset
    own = dataset.inter_feat
    order = own[dataset.uid_field].argsort(stable=True)  # that of the ranks
    target = dataset.sorted_items[own[dataset.TARGET_POSITION][order]].numpy()
    counts = np.bincount(train_data._dataset.inter_matrix().col, minlength=dataset.item_num)
    rarest = counts.argsort(kind="stable")
    rarest = rarest[counts[rarest] > 0]
    groups = {
        NEW: np.flatnonzero(counts == 0),
        RAREST: rarest[: len(rarest) // 10],
        TAIL: rarest[counts[rarest].cumsum() <= counts.sum() / 10],
    }
    found: dict[str, dict[str, Any]] = {}
    for name, items in groups.items():
        rows = np.flatnonzero(np.isin(target, items))
        if len(rows):
            auc = 1 - (ranks.ranks[rows] - 1).mean() / (dataset.item_num - 2)
            found[name] = {"number": len(rows), "auc": float(auc), **ranks.metrics(topk, rows)}
    return found


def summary_of_parts(model: STARRec, test_data, folder: Path) -> dict[str, Any]:
    """Fusion weights by length of the history, and the experts' use, by genre where the set has them.

    Args:
        model: the trained model.
        test_data: its test loader.
        folder: the dataset's folder.
    """
    dataset = test_data._dataset
    target = dataset.inter_feat[dataset.TARGET_POSITION]
    lengths = (target - dataset.user_start[target]).numpy()
    buckets = length_buckets(lengths, LENGTHS)
    found: dict[str, Any] = {}
    if model.layers[-1].use_pma and model.layers[-1].use_ssm:
        gamma = fusion_weights(model, test_data)
        found["fusion"] = _means(gamma, buckets) | {"all": gamma.mean(0).tolist()}
    if model.mixture is None or model.routes_positions:
        return found
    gates = expert_gates(model, test_data)
    busiest = np.bincount(gates.argmax(1), minlength=gates.shape[1]) / len(gates)
    found["experts"] = {
        "share": gates.mean(0).tolist(),
        "busiest": busiest.tolist(),
        "entropy": float(gate_entropy(gates).mean()),
        "entropy_deciles": np.quantile(gate_entropy(gates), np.linspace(0, 1, 11)).tolist(),
        "by_length": _means(gates, buckets),
    }
    file = folder / f"{dataset.dataset_name}.item"
    if dataset.dataset_name in CATEGORIES and file.is_file():
        names, shares = history_categories(test_data, file, CATEGORIES[dataset.dataset_name])
        by_category = shares.T @ gates / np.maximum(shares.sum(0), 1e-12)[:, None]
        found["experts"]["by_category"] = dict(zip(names, by_category.tolist(), strict=True))
    return found


def _means(values: np.ndarray, buckets: dict[str, np.ndarray]) -> dict[str, list[float]]:
    return {name: values[rows].mean(0).tolist() for name, rows in buckets.items()}
