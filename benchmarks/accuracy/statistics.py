"""What a table of means can and cannot tell."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np
from scipy.stats import ttest_rel


@dataclass(frozen=True)
class Comparison:
    """One model against another on the same users.

    Attributes:
        change: relative change of the mean, 0.02 for 2% more.
        p: two-sided probability of a difference at least as large by chance, adjusted for ``tests`` (Bonferroni). It is
            of these trained models and other users; of other seeds it says nothing.
        seeds: how many runs of each model there are.
        agree: whether every seed's change has the same sign.
    """

    change: float
    p: float
    seeds: int = 1
    agree: bool = True


def compare(own: np.ndarray, other: np.ndarray, tests: int = 1) -> Comparison:
    """Paired t-test over users of a metric that was averaged over seeds.

    Args:
        own: the metric of each user by each seed's run, ``[S, N]``.
        other: the other model's, of the same seeds, and users in the same order, ``[S, N]``.
        tests: how many comparisons are looked at together.
    """
    change = float(own.mean() / other.mean() - 1)
    means = own.mean(0), other.mean(0)
    p = 1.0 if np.array_equal(*means) else float(ttest_rel(*means).pvalue)
    agree = bool(np.all((own.mean(1) > other.mean(1)) == (change > 0)))
    return Comparison(change, min(1.0, tests * p), len(own), agree)


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation over seeds; no deviation of a single one."""
    return mean(values), stdev(values) if len(values) > 1 else None
