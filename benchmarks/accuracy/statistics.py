"""What a table of means can and cannot tell."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np
from scipy.stats import rankdata, studentized_range, ttest_rel


@dataclass(frozen=True)
class Comparison:
    """One model against another on the same users.

    Attributes:
        change: relative change of the mean, 0.02 for 2% more.
        p: two-sided probability of a difference at least as large by chance, adjusted for ``tests`` (Bonferroni).
    """

    change: float
    p: float


def compare(own: np.ndarray, other: np.ndarray, tests: int = 1) -> Comparison:
    """Paired t-test over users of a metric that was averaged over seeds.

    Args:
        own: the metric of each user, mean over seeds, ``[N]``.
        other: the other model's, of the same users in the same order, ``[N]``.
        tests: how many comparisons are looked at together.
    """
    change = own.mean() / other.mean() - 1
    p = 1.0 if np.array_equal(own, other) else float(ttest_rel(own, other).pvalue)
    return Comparison(float(change), min(1.0, tests * p))


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation over seeds; no deviation of a single one."""
    return mean(values), stdev(values) if len(values) > 1 else None


def mean_ranks(scores: np.ndarray) -> np.ndarray:
    """Mean rank of each model over sets, 1 the best, ties shared; ``[sets, models]`` to ``[models]``."""
    return np.mean([rankdata(-row) for row in scores], axis=0)


def critical_difference(models: int, sets: int, alpha: float = 0.05) -> float:
    """How far apart two mean ranks must be to differ by Nemenyi's test (Demsar, JMLR 7, 2006, section 3.2.2)."""
    q = studentized_range.ppf(1 - alpha, models, np.inf) / np.sqrt(2)
    return float(q * np.sqrt(models * (models + 1) / (6 * sets)))
