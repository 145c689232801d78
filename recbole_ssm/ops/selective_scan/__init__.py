"""Selective scan of Mamba-1 (arXiv 2312.00752, eq. 2 and algorithm 2) over packed sequences."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.backend import choose
from recbole_ssm.ops.packing import check_packed
from recbole_ssm.ops.selective_scan.reference import selective_scan_reference


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Any:
    """Run a selective state-space model over each sequence; no state passes from one to the next.

    Per channel ``d`` and state ``n``, with ``dt = softplus(dt + dt_bias)`` where ``dt_softplus``::

        h_t[d, n] = exp(dt_t[d] A[d, n]) h_{t-1}[d, n] + dt_t[d] B_t[n] x_t[d]     (eq. 2a, discretised)
        y_t[d]    = sum_n C_t[n] h_t[d, n] + D[d] x_t[d]                           (eq. 2b)
        out_t[d]  = y_t[d] silu(z_t[d])

    Args:
        x: input, ``[T, D]``.
        dt: step sizes before bias and softplus, ``[T, D]``.
        A: state matrix (negative), ``[D, N]``.
        B: input matrix, ``[T, N]``.
        C: output matrix, ``[T, N]``.
        D: skip weight, ``[D]``.
        z: gate, ``[T, D]``.
        dt_bias: ``[D]``.
        dt_softplus: whether ``dt`` passes a softplus.
        cu_seqlens: borders of the sequences, int32 ``[S+1]``.
        initial_state: state before each sequence's first row, ``[S, D, N]``; zeros where absent.
        return_final_state: also return the state after each sequence's last row.
        backend: ``auto``, ``reference`` or ``cpu``.

    Returns:
        ``[T, D]`` in ``x``'s dtype and, where asked for, the final state ``[S, D, N]`` in at least float32. An empty
        sequence's final state is its initial state.

    Raises:
        ValueError: shapes that do not fit, or an unknown backend.
        BackendUnavailable: a backend that cannot run here.
    """
    check_packed(cu_seqlens, x=x, dt=dt, B=B, C=C, z=z)
    if A.shape != (x.shape[1], B.shape[1]) or C.shape != B.shape or dt.shape != x.shape:
        raise ValueError(
            f"x {list(x.shape)}, dt {list(dt.shape)}, A {list(A.shape)}, B {list(B.shape)} and C {list(C.shape)} "
            "do not fit [T, D], [T, D], [D, N], [T, N], [T, N]"
        )
    state_shape = (len(cu_seqlens) - 1, *A.shape)
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(f"initial_state is {list(initial_state.shape)}, not {list(state_shape)}")

    # The recurrence sums hundreds of terms, so it runs in float32 whatever the dtype of the activations.
    compute = torch.promote_types(x.dtype, torch.float32)
    chosen = choose("selective_scan", backend, ("reference", "cpu"), x)
    dt = dt.to(compute)
    if dt_bias is not None:
        dt = dt + dt_bias.to(compute)
    if dt_softplus:
        dt = F.softplus(dt)
    if initial_state is None:
        initial_state = x.new_zeros(state_shape, dtype=compute)
    u, dt, A, B, C, initial_state = (tensor.to(compute) for tensor in (x, dt, A, B, C, initial_state))
    if chosen == "cpu":
        from recbole_ssm.ops.selective_scan.cpu import selective_scan_cpu

        y, final_state = selective_scan_cpu(u, dt, A, B, C, initial_state, cu_seqlens)
    else:
        y, final_state = selective_scan_reference(u, dt, A, B, C, initial_state, cu_seqlens)
    if D is not None:
        y = y + D.to(compute) * u
    if z is not None:
        y = y * F.silu(z.to(compute))
    y = y.to(x.dtype)
    return (y, final_state) if return_final_state else y
