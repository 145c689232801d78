"""A diagonal recurrence whose decays are complex, by the selective scan, which knows real ones."""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_ssm.ops.decaying_scan import scan_arguments_of
from recbole_ssm.ops.packing import check_packed, flip_rows, positions
from recbole_ssm.ops.selective_scan import selective_scan

# Less than any decay that changes a float, and enough to divide by.
LEAST_DECAY = 1e-20


def rotating_scan(x: Tensor, log_decay: Tensor, *, cu_seqlens: Tensor, backend: str = "auto") -> Tensor:
    """Run ``h_t = exp(log_decay_t) h_{t-1} + x_t`` over each sequence, from 0; no state passes from one to the next.

    A complex decay turns a state and shrinks it, and the two commute. So with ``a_t``, the sum of the angles
    ``Im log_decay`` up to ``t``, ``exp(-i a_t) h_t`` is the recurrence of ``exp(-i a_t) x_t`` with the real decays
    ``exp(Re log_decay_t)``, of which real and imaginary parts are channels of :func:`recbole_ssm.ops.selective_scan`.

    Args:
        x: complex, ``[T, P]``.
        log_decay: complex with a real part that is nowhere positive, ``[T, P]``.
        cu_seqlens: borders of the sequences, int32 ``[S+1]``.
        backend: see :func:`recbole_ssm.ops.selective_scan`.

    Returns:
        ``h``, complex ``[T, P]``.

    Raises:
        ValueError: shapes that do not fit, or an unknown backend.
        BackendUnavailable: a backend that cannot run here.
    """
    check_packed(cu_seqlens, x=x)
    if x.shape != log_decay.shape or x.dim() != 2:
        raise ValueError(f"x {list(x.shape)} and log_decay {list(log_decay.shape)} do not fit [T, P], [T, P]")
    return _RotatingScan.apply(x, log_decay, cu_seqlens, backend)


class _RotatingScan(torch.autograd.Function):
    """Its gradients are those of the recurrence itself: by those of the angles, of which each row's is a sum over all
    later rows, a rounding error would count as often as the longest gap is long.
    """

    @staticmethod
    def forward(ctx, x, log_decay, cu_seqlens, backend):
        h = _scan(x, log_decay, cu_seqlens, backend)
        ctx.save_for_backward(log_decay, cu_seqlens, h)
        ctx.backend = backend
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        log_decay, cu_seqlens, h = ctx.saved_tensors
        # The adjoint is the same recurrence from the last row to the first, by the conjugate decay of the row after.
        order = flip_rows(cu_seqlens)
        following = log_decay.conj().index_select(0, order).roll(1, 0)
        adjoint = _scan(grad.index_select(0, order), following, cu_seqlens, ctx.backend).index_select(0, order)
        carried = torch.exp(log_decay) * h.roll(1, 0) * (positions(cu_seqlens) > 0)[:, None]
        return adjoint, adjoint * carried.conj(), None, None


@torch.no_grad()
def _scan(x: Tensor, log_decay: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
    """The recurrence; a sequence's first decay, which meets no state, may be anything."""
    dtype = log_decay.real.dtype
    # Angles grow with time, so their sums are taken in float64 and without whole turns; side by side, for a GPU takes
    # one thread a column otherwise.
    angle = log_decay.imag.double().remainder(2 * math.pi).mT.contiguous().cumsum(1).mT.remainder(2 * math.pi).to(dtype)
    turn = torch.polar(torch.ones_like(angle), angle)
    parts = torch.view_as_real(x * turn.conj()).flatten(1)
    decay = (-log_decay.real).clamp_min(LEAST_DECAY).repeat_interleave(2, 1)
    x, dt, A, one = scan_arguments_of(parts, decay)
    h = selective_scan(x, dt, A, one, one, cu_seqlens=cu_seqlens, backend=backend)
    return turn * torch.view_as_complex(h.unflatten(1, (-1, 2)))
