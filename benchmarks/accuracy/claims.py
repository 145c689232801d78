"""What the papers and this package's own aims say of the study's numbers, each held against them."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

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


@cache
def published() -> list[dict[str, Any]]:
    """What others publish, by set, candidates and model: the content of ``published.yaml``."""
    return yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())


def _reaches(model: str, other: str, dataset: str, protocol: str, metric: str) -> Claim:
    """That a model has what is published of another one, or of itself."""
    which = (dataset, protocol, other)
    (one,) = (one for one in published() if (one["dataset"], one["protocol"], one["model"]) == which)
    name = metric.replace("ndcg", "NDCG").replace("recall", "Recall")
    text = f"{model}, {protocol}: {other}'s published {name}, {f'{one[metric]:.4f}'[1:]}"
    return Claim(dataset, text, model, one[metric], metric=metric, protocol=protocol)


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
    _reaches("STARRec", "gSASRec", "ml-1m", UNSEEN, "ndcg@10"),
    _reaches("STARRec", "gSASRec", "ml-1m", UNSEEN, "recall@10"),
    # This package's own aims.
    Claim("ml-1m", f"STARRec, {FULL}: an NDCG@10 of .165", "STARRec", 0.165),
    Claim("ml-1m", f"STARRec, {UNSEEN}: an NDCG@10 of .21", "STARRec", 0.21, protocol=UNSEEN),
    _reaches("Mamba4Rec", "Mamba4Rec", "amazon-beauty", FULL, "ndcg@10"),
    _reaches("STARRec", "WEARec", "amazon-beauty", UNSEEN, "ndcg@10"),
    _reaches("STARRec", "LightSANs", "amazon-beauty", FULL, "ndcg@10"),
    _reaches("STARRec", "WEARec", "ml-1m", UNSEEN, "ndcg@10"),
]
