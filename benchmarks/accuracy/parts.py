"""What a trained STAR-Rec's parts do on the test set, small enough for a row of the result file."""

from pathlib import Path
from typing import Any

import numpy as np

from recbole_ssm.analysis import expert_gates, fusion_weights, gate_entropy, history_categories
from recbole_ssm.analysis.ranking import length_buckets
from recbole_ssm.models.starrec import STARRec

LENGTHS = (1, 5, 10, 20, 50, 100, 200)

# Where a set has kinds of items: the column of its .item file.
CATEGORIES = {"ml-1m": "genre", "ml-100k": "class"}


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
