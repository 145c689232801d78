"""What the papers and this package's own aims say of the study's numbers, each held against them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.accuracy.worker import FULL, UNSEEN

# A difference that chance makes more often than this is none.
LEVEL = 0.05

# By what chance one model is no other than another, of the same set.
Chance = Callable[[str, str], float]

# Of a set: the mean of a model's metric under a protocol, over the seeds that another model has, too; None where one of
# the two was not run.
Score = Callable[[str, str, str, str], float | None]


@dataclass(frozen=True)
class Claim:
    """One statement about one set.

    Attributes:
        dataset: dataset name.
        text: the statement.
        value: what is measured, of that set's scores; None where a model is missing.
        least: the least value at which the statement holds.
        over: the two models whose relative change the value is, where it is one.
    """

    dataset: str
    text: str
    value: Callable[[Score], float | None]
    least: float
    over: tuple[str, str] | None = None

    def verdict(self, score: Score, chance: Chance) -> tuple[str, str] | None:
        """The measured value and whether it holds, as a table shows them."""
        value = self.value(score)
        if value is None or np.isnan(value):
            return None
        text = f"{value:+.1%}" if self.over else f"{value:.4f}".removeprefix("0")
        if value < self.least:
            return text, "**fails**"
        if self.over and chance(*self.over) > LEVEL:
            return text, "**may be chance**"
        return text, "holds"


def _above(dataset: str, text: str, model: str, other: str, least: float = 0.0) -> Claim:
    def change(score: Score) -> float | None:
        own, others = score(model, "ndcg@10", FULL, other), score(other, "ndcg@10", FULL, model)
        return None if own is None or others is None else own / others - 1

    return Claim(dataset, text, change, least, (model, other))


def _score(model: str, metric: str, protocol: str) -> Callable[[Score], float | None]:
    return lambda score: score(model, metric, protocol, model)


SETS = ("ml-1m", "amazon-beauty", "amazon-video-games", "ml-100k")

CLAIMS = [
    *(
        _above(dataset, f"{model} is above {other}, as its paper says", model, other)
        for model in ("STARRec", "SSD4Rec")
        for dataset in SETS
        for other in ("SASRec", "Mamba4Rec")
    ),
    _above("ml-1m", "STARRec is at least 2% above Mamba4Rec", "STARRec", "Mamba4Rec", 0.02),
    _above("ml-1m", "STARRec is at least 5% above SASRec", "STARRec", "SASRec", 0.05),
    # README of asash/gSASRec-pytorch, on this very sequence data; the aim is this package's own.
    Claim("ml-1m", f"STARRec, {UNSEEN}: gSASRec's NDCG@10, .1726", _score("STARRec", "ndcg@10", UNSEEN), 0.1726),
    Claim("ml-1m", f"STARRec, {UNSEEN}: gSASRec's Recall@10, .3003", _score("STARRec", "recall@10", UNSEEN), 0.3003),
    Claim("ml-1m", f"STARRec, {UNSEEN}: an NDCG@10 of .205", _score("STARRec", "ndcg@10", UNSEEN), 0.205),
    # A user's run of its authors' code, chengkai-liu/Mamba4Rec issue 8.
    Claim("amazon-beauty", "Mamba4Rec: an NDCG@10 of .0431", _score("Mamba4Rec", "ndcg@10", FULL), 0.0431),
]
