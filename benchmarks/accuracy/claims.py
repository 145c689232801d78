"""What the papers and this package's own aims say of the study's numbers, each held against them."""

from dataclasses import dataclass

from benchmarks.accuracy.statistics import Comparison
from benchmarks.accuracy.worker import FULL, UNSEEN

# A difference that chance makes more often than this is none.
LEVEL = 0.05


@dataclass(frozen=True)
class Claim:
    """One statement about one model on one set.

    Attributes:
        dataset: dataset name.
        text: the statement.
        model: the model that it is about.
        least: the least value at which the statement holds: of the metric's mean over seeds, or with ``over`` of its
            relative change.
        over: the model that it is held against, where it is.
        metric: the metric's key in a row of the result file.
        protocol: the key of the candidates it is measured among.
    """

    dataset: str
    text: str
    model: str
    least: float = 0.0
    over: str | None = None
    metric: str = "ndcg@10"
    protocol: str = FULL

    def verdict(self, measured: float | Comparison) -> tuple[str, str]:
        """What was measured (a comparison where there is ``over``) and whether the claim holds, as a table shows it."""
        if not isinstance(measured, Comparison):
            return f"{measured:.4f}".removeprefix("0"), "holds" if measured >= self.least else "**fails**"
        if measured.change < self.least:
            return f"{measured.change:+.1%}", "**fails**"
        return f"{measured.change:+.1%}", "holds" if measured.p <= LEVEL else "**may be chance**"


SETS = ("ml-1m", "amazon-beauty", "amazon-video-games", "ml-100k")

CLAIMS = [
    *(
        Claim(dataset, f"{model} is above {other}, as its paper says", model, over=other)
        for model in ("STARRec", "SSD4Rec")
        for dataset in SETS
        for other in ("SASRec", "Mamba4Rec")
    ),
    Claim("ml-1m", "STARRec is at least 2% above Mamba4Rec", "STARRec", 0.02, "Mamba4Rec"),
    Claim("ml-1m", "STARRec is at least 5% above SASRec", "STARRec", 0.05, "SASRec"),
    # README of asash/gSASRec-pytorch, on this very sequence data; the aim is this package's own.
    Claim("ml-1m", f"STARRec, {UNSEEN}: gSASRec's NDCG@10, .1726", "STARRec", 0.1726, protocol=UNSEEN),
    Claim("ml-1m", f"STARRec, {UNSEEN}: gSASRec's Recall@10, .3003", "STARRec", 0.3003, None, "recall@10", UNSEEN),
    Claim("ml-1m", f"STARRec, {UNSEEN}: an NDCG@10 of .205", "STARRec", 0.205, protocol=UNSEEN),
    # A user's run of its authors' code, chengkai-liu/Mamba4Rec issue 8.
    Claim("amazon-beauty", "Mamba4Rec: an NDCG@10 of .0431", "Mamba4Rec", 0.0431),
]
