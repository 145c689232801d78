"""The study's first page: who leads on each set, beside the best published number, and which claims hold."""

import numpy as np

from benchmarks.accuracy.claims import CLAIMS, LEVEL, Claim, Measured, published
from benchmarks.accuracy.results import BASELINES, K, Results, compared, gain_cell, mark, score_cell, tests_of
from benchmarks.accuracy.statistics import Comparison, spread
from benchmarks.accuracy.worker import PROTOCOLS
from benchmarks.pages import Page


def write_summary(page: Page, found: Results) -> None:
    """Put the page's first table, and what fails."""
    models = list(dict.fromkeys(m for sets in found.rows.values() for rows in sets.values() for m in rows))
    lines = []
    for dataset, protocols in found.rows.items():
        for protocol, rows in protocols.items():
            means = {m: spread([row["test"][protocol][f"ndcg@{K}"] for row in own])[0] for m, own in rows.items()}
            best = max(means.values())
            cells = [
                score_cell(means[m], None, means[m] == best) + mark(rows[m][0], protocol) if m in means else ""
                for m in models
            ]
            lines.append([f"{dataset}, {protocol}", *cells, _published_cell(dataset, protocol)])
    page.text(
        f"Test NDCG@{K}, mean over seeds; the best in bold. All models are tuned alike, but where a set's section says "
        "otherwise, by the validation set and the row's candidates, or with '*' by the other row's, if no other runs "
        "are there or these do better on the row's own validation."
    )
    page.table(["set, candidates", *models, "best published"], lines)
    failing = [f"{text}: {verdict}" for text, _, verdict in _verdicts(found) if verdict.startswith("**")]
    if failing:
        page.text("What fails, is level or may be chance (measured under 'Do the claims hold?'):")
        page.bullets(failing)


def _published_cell(dataset: str, protocol: str) -> str:
    known = [one for one in published() if (one["dataset"], one["protocol"]) == (dataset, protocol)]
    if not known:
        return ""
    best = max(known, key=lambda one: one[f"ndcg@{K}"])
    note = f" ({best['note']})" if "note" in best else ""
    return f"{score_cell(best[f'ndcg@{K}'], None)} {best['model']}{note}"


def write_published(page: Page) -> None:
    """Put all published numbers, with where they stand."""
    page.heading("What others publish")
    page.text(f"Full ranking on the same sets, leave-one-out, as their sources say. NDCG@{K} and Recall@{K}.")
    page.table(
        ["set, candidates", "model", f"NDCG@{K}", f"Recall@{K}", "source"],
        [
            [
                f"{one['dataset']}, {one['protocol']}",
                one["model"],
                score_cell(one[f"ndcg@{K}"], None),
                score_cell(one[f"recall@{K}"], None),
                "; ".join([one["source"], *[one[key] for key in ("note",) if key in one]]),
            ]
            for one in published()
        ],
    )


def write_searched(page: Page, found: Results) -> None:
    """Put what the papers' models reach after searches of equal budget."""
    page.heading("The papers' models, searched alike")
    page.text(
        "STAR-Rec and Mamba4Rec with one layer, as their papers have them, without anything that this package adds "
        "(filter, cosine scores, feed-forward network, average of the weights). Each has the best of five trials, "
        "chosen among all items, and the same number of epochs for all: 15 on ml-1m, 10 on Amazon's sets, 20 on "
        "ml-100k, which ends most runs before validation stops improving. Where the tables above hold no other runs of "
        "a model, these stand there, too."
    )
    models = list(dict.fromkeys(model for own in found.searched.values() for model in own))
    baselines = [model for model in BASELINES if model in models]
    lines = []
    for dataset, own in found.searched.items():
        for protocol in PROTOCOLS:
            means = {m: spread([row["test"][protocol][f"ndcg@{K}"] for row in rows])[0] for m, rows in own.items()}
            cells = [score_cell(means[m], None, means[m] == max(means.values())) if m in means else "" for m in models]
            gains = [
                gain_cell(compared(found.store, own, "STARRec", other, protocol, tests_of(own)))
                if {other, "STARRec"} <= own.keys()
                else ""
                for other in baselines
            ]
            lines.append([f"{dataset}, {protocol}", *cells, *gains])
    page.table(["set, candidates", *models, *(f"STARRec over {other}" for other in baselines)], lines)


def write_claims(page: Page, found: Results) -> None:
    """Put every claim with what was measured."""
    page.heading("Do the claims hold?")
    page.text(
        f"Means over seeds of NDCG@{K}, all items where nothing else is said; the papers' models are those of the "
        f"section before. A difference may be chance, whatever its sign, where p is over {LEVEL} or seeds differ in "
        "it. Within a standard error (over users) of what others publish a mean is level with it."
    )
    page.table(["claim", "measured", "verdict"], _verdicts(found))


def _verdicts(found: Results) -> list[tuple[str, str, str]]:
    measured = ((claim, _measured(found, claim)) for claim in CLAIMS)
    return [(f"{claim.dataset}: {claim.text}", *claim.verdict(m)) for claim, m in measured if m is not None]


def _measured(found: Results, claim: Claim) -> Measured | Comparison | None:
    """What a claim is held against; None where one of its models was not run."""
    if claim.of_paper:
        models = found.searched.get(claim.dataset, {})
    else:
        models = found.rows.get(claim.dataset, {}).get(claim.protocol, {})
    if claim.model not in models or claim.over not in {None, *models}:
        return None
    if claim.over:
        return compared(found.store, models, claim.model, claim.over, claim.protocol, tests_of(models))
    users = found.store.user_scores(models[claim.model], claim.protocol, claim.metric).mean(0)
    return Measured(float(users.mean()), float(users.std(ddof=1) / np.sqrt(len(users))))
