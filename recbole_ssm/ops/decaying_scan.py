"""A diagonal recurrence with decays of its own, by the selective scan."""

from torch import Tensor


def scan_arguments_of(entering: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What :func:`recbole_ssm.ops.selective_scan` runs ``h_t = exp(-decay_t) h_{t-1} + entering_t`` with.

    A state a channel, whose step is the decay, and multiplies what enters; so that is divided by it first, which loses
    nothing: gradients through quotient and product cancel to within rounding of one of them, twice as large as what is
    left.

    Args:
        entering: ``[T, D]``.
        decay: above 0, ``[T, D]``.

    Returns:
        ``x``, ``dt``, ``A`` and ``B``; ``C`` is the same as ``B``, ones ``[T, 1]``.
    """
    return entering / decay, decay, -decay.new_ones(decay.shape[1], 1), decay.new_ones(len(decay), 1)
