"""Each contender's own best batch, found by trying."""

from typing import Any, Protocol

import psutil
import torch

from benchmarks.speed.contenders import wall_rounds
from recbole_ssm.errors import UserError

# Steps' sizes that are tried, smallest first.
LADDERS = {
    "rows": [2**power for power in range(4, 12)],
    "targets": [2**power for power in range(8, 16)],
    "sequences": [2**power for power in range(2, 10)],
}
SECONDS_A_TRIAL = 1.5
MOST_STEPS = 50
# The search ends after two sizes in succession at which the rate is below this share of the best.
FALLEN = 0.7
TRIED_AGAIN = 3
SHARE_OF_FREE_MEMORY = 0.6
PROTOCOL = (
    f"each contender's fastest, found before the rounds: sizes are doubled, each tried for about {SECONDS_A_TRIAL:g} s "
    f"after a step of warm-up, until two in succession are below {FALLEN:.0%} of the best or the next might not fit "
    f"into memory; the {TRIED_AGAIN} fastest are tried twice and the better trial counts. What a batch does to "
    "accuracy is not asked here"
)


class Trained(Protocol):
    """What can be searched: :class:`benchmarks.speed.contenders.Steps` and :class:`benchmarks.peers.client.Peer`."""

    steps: int
    num_targets: int

    @property
    def unit(self) -> str:
        """What a batch is counted in, a key of :data:`LADDERS`."""

    def set_batch(self, batch: int) -> None:
        """Take this batch from now on."""

    def take(self) -> None:
        """Train ``steps`` steps."""

    def peak(self) -> int | None:
        """The same; their peak of memory."""


def best_batch(of: Trained, ladder: list[int], cuda: bool) -> dict[int, float]:
    """Try the sizes of ``ladder`` and leave ``of`` at the fastest, warm.

    Returns:
        Targets a second of every size that was tried; none where there is but one.

    Raises:
        UserError: where the GPU has no room for the smallest.
    """
    if len(ladder) == 1:
        _prepare(of, ladder[0], cuda)
        return {}
    rates: dict[int, float] = {}
    for batch in ladder:
        try:
            peak = _prepare(of, batch, cuda)
            rates[batch] = _rate(of)
        except torch.OutOfMemoryError:
            break
        fallen = [rate < FALLEN * max(rates.values()) for rate in list(rates.values())[-2:]]
        if fallen == [True, True] or (not cuda and not _twice_fits(peak)):
            break
    if not rates:
        raise UserError(f"The smallest step that is tried, {ladder[0]} {of.unit}, does not fit into the GPU's memory.")
    for batch in sorted(rates, key=lambda batch: -rates[batch])[:TRIED_AGAIN]:
        _prepare(of, batch, cuda)
        rates[batch] = max(rates[batch], _rate(of))
    _prepare(of, max(rates, key=lambda batch: rates[batch]), cuda)
    return rates


def _prepare(of: Trained, batch: int, cuda: bool) -> int | None:
    """Compile, tune, capture, warm up; a step's peak memory."""
    of.set_batch(batch)
    of.steps = 1
    if cuda:  # a graph is captured after several steps
        for _ in range(10):
            of.take()
    return of.peak()


def _twice_fits(peak: int | None) -> bool:
    return peak is None or 2 * peak < SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available


def _rate(of: Trained) -> float:
    of_one_step = choose_steps(of, SECONDS_A_TRIAL)
    return of_one_step if of.steps == 1 else of_round(of)


def choose_steps(of: Trained, seconds: float) -> float:
    """Let a call take about so long, or one step if that takes longer; the targets a second of a step alone."""
    of.steps = 1
    rate = of_round(of)
    of.steps = max(1, min(MOST_STEPS, round(seconds * rate / of.num_targets)))
    return rate


def of_round(of: Trained) -> float:
    """Targets a second of one call."""
    taken = wall_rounds({"": of.take}, 1)[""][0]
    return of.num_targets / taken


def searched(rates: dict[int, float]) -> list[dict[str, Any]]:
    """As a result file has it."""
    return [{"batch": batch, "targets_per_s": rate} for batch, rate in sorted(rates.items())]
