"""State-space duality (Mamba-2, arXiv 2405.21060) over packed sequences."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.backend import choose
from recbole_ssm.ops.packing import check_packed
from recbole_ssm.ops.ssd.reference import ssd_reference


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    chunk_size: int = 64,
    backend: str = "auto",
) -> Any:
    """Run Mamba-2's state-space model over each sequence; no state passes from one to the next.

    Per head ``h``, with ``dt = softplus(dt + dt_bias)`` where ``dt_softplus``::

        state_t = exp(dt_t[h] A[h]) state_{t-1} + dt_t[h] x_t[h] B_t^T        ([P, N] a head)
        y_t[h]  = state_t C_t + D[h] x_t[h]

    computed by the chunked algorithm of the paper's section 6.

    Args:
        x: input, ``[T, H, P]``.
        dt: step sizes before bias and softplus, ``[T, H]``.
        A: decay rate of each head (negative), ``[H]``.
        B: input matrix, ``[T, G, N]``; ``G`` divides ``H``, head ``h`` reads group ``h // (H / G)``.
        C: output matrix, ``[T, G, N]``.
        D: skip weight, ``[H]``.
        dt_bias: ``[H]``.
        dt_softplus: whether ``dt`` passes a softplus.
        cu_seqlens: borders of the sequences, int32 ``[S+1]``.
        initial_state: state before each sequence's first row, ``[S, H, P, N]``; zeros where absent.
        return_final_state: also return the state after each sequence's last row.
        chunk_size: rows a chunk; it changes the cost, not the result.
        backend: ``auto`` or ``reference``.

    Returns:
        ``[T, H, P]`` in ``x``'s dtype and, where asked for, the final state ``[S, H, P, N]`` in at least float32. An
        empty sequence's final state is its initial state.

    Raises:
        ValueError: shapes that do not fit, or an unknown backend.
        BackendUnavailable: a backend that cannot run here.
    """
    check_packed(cu_seqlens, x=x, dt=dt, B=B, C=C)
    heads, width = x.shape[1:]
    if dt.shape != x.shape[:2] or A.shape != (heads,) or B.shape != C.shape or heads % B.shape[1]:
        raise ValueError(
            f"x {list(x.shape)}, dt {list(dt.shape)}, A {list(A.shape)}, B {list(B.shape)} and C {list(C.shape)} "
            "do not fit [T, H, P], [T, H], [H], [T, G, N], [T, G, N] with G a divisor of H"
        )
    state_shape = (len(cu_seqlens) - 1, heads, width, B.shape[2])
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(f"initial_state is {list(initial_state.shape)}, not {list(state_shape)}")

    choose("ssd", backend, ("reference",), x)
    compute = torch.promote_types(x.dtype, torch.float32)
    dt = dt.to(compute)
    if dt_bias is not None:
        dt = dt + dt_bias.to(compute)
    if dt_softplus:
        dt = F.softplus(dt)
    if initial_state is not None:
        initial_state = initial_state.to(compute)
    u, dt, A, B, C = (tensor.to(compute) for tensor in (x, dt, A, B, C))
    with torch.autocast(x.device.type, enabled=False):
        y, final_state = ssd_reference(u, dt, A, B, C, initial_state, cu_seqlens, chunk_size, return_final_state)
    if D is not None:
        y = y + D.to(compute)[:, None] * u
    y = y.to(x.dtype)
    return (y, final_state) if return_final_state else y
