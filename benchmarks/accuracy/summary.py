"""The study's first page: who leads on each set, beside the best published number, and which claims hold."""

from benchmarks.accuracy.claims import CLAIMS, LEVEL, Claim, published
from benchmarks.accuracy.results import K, Results, compared, mark, score_cell, tests_of
from benchmarks.accuracy.statistics import Comparison, spread
from benchmarks.accuracy.worker import FULL
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
    failing = [text for text, _, verdict in _verdicts(found) if verdict.startswith("**")]
    if failing:
        page.text(f"What fails, or may be chance (measured under 'Do the claims hold?'): {'; '.join(failing)}.")


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


def write_claims(page: Page, found: Results) -> None:
    """Put every claim with what was measured."""
    page.heading("Do the claims hold?")
    page.text(
        f"Means over seeds of NDCG@{K}, {FULL} where nothing else is said. A difference whose p is over {LEVEL} may be "
        "chance, whatever its sign."
    )
    page.table(["claim", "measured", "verdict"], _verdicts(found))


def _verdicts(found: Results) -> list[tuple[str, str, str]]:
    measured = ((claim, _measured(found, claim)) for claim in CLAIMS)
    return [(f"{claim.dataset}: {claim.text}", *claim.verdict(m)) for claim, m in measured if m is not None]


def _measured(found: Results, claim: Claim) -> float | Comparison | None:
    """What a claim is held against; None where one of its models was not run."""
    models = found.rows.get(claim.dataset, {}).get(claim.protocol, {})
    if claim.model not in models or claim.over not in {None, *models}:
        return None
    if claim.over:
        return compared(found.store, models, claim.model, claim.over, claim.protocol, tests_of(models))
    return spread([run["test"][claim.protocol][claim.metric] for run in models[claim.model]])[0]
