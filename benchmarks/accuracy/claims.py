"""What the papers and this package's own aims say of the study's numbers, each held against them."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from benchmarks.accuracy.statistics import Comparison
from benchmarks.accuracy.worker import FULL, PROTOCOLS, UNSEEN

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
        of_paper: whether it is about the papers' models, searched alike, and not about what this package makes of them.
        measured_elsewhere: whether ``least`` is a published result, which has an error of its own.
    """

    dataset: str
    text: str
    model: str
    least: float = 0.0
    over: str | None = None
    metric: str = "ndcg@10"
    protocol: str = FULL
    of_paper: bool = False
    measured_elsewhere: bool = False

    def verdict(self, measured: "Measured | Comparison") -> tuple[str, str]:
        """What was measured (a comparison where there is ``over``) and whether the claim holds, as a table shows it."""
        if isinstance(measured, Comparison):
            text = f"{measured.change:+.1%}" + ", 1 seed" * (measured.seeds == 1)
            if measured.p > LEVEL or not measured.agree:
                return text, "**may be chance**"
            return text, "holds" if measured.change >= self.least else "**fails**"
        text = f"{measured.mean:.4f}".removeprefix("0")
        if self.measured_elsewhere and abs(measured.mean - self.least) < measured.error:
            return text, "**level**"
        return text, "holds" if measured.mean >= self.least else "**fails**"


@dataclass(frozen=True)
class Measured:
    """A metric of one model.

    Attributes:
        mean: over seeds and users.
        error: the mean's standard error over users.
    """

    mean: float
    error: float


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
    return Claim(dataset, text, model, one[metric], metric=metric, protocol=protocol, measured_elsewhere=True)


SETS = ("ml-1m", "amazon-beauty", "amazon-video-games", "ml-100k")

CLAIMS = [
    *(
        Claim(dataset, f"the paper's {model} is above {other}, as it says", model, over=other, of_paper=True)
        for model in ("STARRec", "SSD4Rec")
        for dataset in SETS
        for other in ("SASRec", "Mamba4Rec")
    ),
    # This package's own aims.
    *(
        Claim(dataset, f"STARRec as tuned here is above {other}, {protocol}", "STARRec", over=other, protocol=protocol)
        for dataset in SETS
        for protocol in PROTOCOLS
        for other in ("SASRec", "Mamba4Rec", "BSARec")
    ),
    _reaches("STARRec", "gSASRec", "ml-1m", UNSEEN, "ndcg@10"),
    _reaches("STARRec", "gSASRec", "ml-1m", UNSEEN, "recall@10"),
    Claim("ml-1m", f"STARRec, {FULL}: an NDCG@10 of .165", "STARRec", 0.165),
    Claim("ml-1m", f"STARRec, {UNSEEN}: an NDCG@10 of .21", "STARRec", 0.21, protocol=UNSEEN),
    _reaches("Mamba4Rec", "Mamba4Rec", "amazon-beauty", FULL, "ndcg@10"),
    _reaches("STARRec", "WEARec", "amazon-beauty", UNSEEN, "ndcg@10"),
    _reaches("STARRec", "LightSANs", "amazon-beauty", FULL, "ndcg@10"),
    _reaches("STARRec", "WEARec", "ml-1m", UNSEEN, "ndcg@10"),
]
