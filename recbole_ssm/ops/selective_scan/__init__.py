"""Selective scan of Mamba-1 (arXiv 2312.00752, eq. 2 and algorithm 2) over packed sequences."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.backend import choose
from recbole_ssm.ops.packing import check_packed, last_rows, sequence_ids, sequence_lengths
from recbole_ssm.ops.scan_arguments import ScanArguments
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
        backend: see :mod:`recbole_ssm.ops.backend`.

    Returns:
        ``[T, D]`` in ``x``'s dtype and, where asked for, the final state ``[S, D, N]`` in at least float32. An empty
        sequence's final state is its initial state.

    Raises:
        ValueError: shapes that do not fit, or an unknown backend.
        BackendUnavailable: a backend that cannot run here.
    """
    _check(cu_seqlens, x, dt, A, B, C=C, z=z)
    state_shape = (len(cu_seqlens) - 1, *A.shape)
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(f"initial_state is {list(initial_state.shape)}, not {list(state_shape)}")

    lacks = "initial_state" if initial_state is not None else ""
    if return_final_state and torch.is_grad_enabled():
        lacks = "gradient of the final state"
    states = initial_state is not None or return_final_state
    chosen = choose("selective_scan", backend, x, {"D": A.shape[0], "N": A.shape[1]}, lacks, states)
    scan = ScanArguments(
        x, dt, A, B, C, cu_seqlens, D, z, dt_bias, dt_softplus, initial_state, return_final_state
    )  # fmt: skip
    y, final_state = _run(chosen, scan)
    return (y, final_state) if return_final_state else y


def _check(cu_seqlens, x, dt, A, B, **more):
    check_packed(cu_seqlens, x=x, dt=dt, B=B, **more)
    C = more.get("C", B)
    if A.shape != (x.shape[1], B.shape[1]) or C.shape != B.shape or dt.shape != x.shape:
        raise ValueError(
            f"x {list(x.shape)}, dt {list(dt.shape)}, A {list(A.shape)}, B {list(B.shape)} and C {list(C.shape)} "
            "do not fit [T, D], [T, D], [D, N], [T, N], [T, N]"
        )


def _run(chosen: str, scan: ScanArguments) -> Any:
    if chosen == "triton":
        from recbole_ssm.ops.selective_scan.triton import selective_scan_triton

        return selective_scan_triton(scan)
    if chosen == "mamba_ssm":
        from recbole_ssm.ops.selective_scan.external import selective_scan_external

        return selective_scan_external(scan)
    return _on_torch(chosen, scan)


def _on_torch(chosen: str, scan: ScanArguments) -> Any:
    """The backends that compute the recurrence alone; torch does what comes before and after it."""
    dtype, scan = scan.x.dtype, scan.with_step_sizes()
    recurrence: dict[str, Any] = {
        "x": scan.x, "dt": scan.dt, "A": scan.A, "B": scan.B, "C": scan.C, "initial_state": scan.initial_state,
        "cu_seqlens": scan.cu_seqlens,
    }  # fmt: skip
    if chosen == "cpu":
        from recbole_ssm.ops.selective_scan.cpu import selective_scan_cpu

        y, final_state = selective_scan_cpu(**recurrence, return_final_state=scan.return_final_state)
    else:
        y, final_state = selective_scan_reference(**recurrence)
    if scan.D is not None:
        y = y + scan.D * scan.x
    if scan.z is not None:
        y = y * F.silu(scan.z)
    return y.to(dtype), final_state


def selective_scan_last(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    cu_seqlens: Tensor,
    backend: str = "auto",
) -> Tensor:
    """:func:`selective_scan` (without skip and gate) at the last row of each sequence alone: ``[S, D]``.

    Args:
        x: ``[T, D]``.
        dt: ``[T, D]``.
        A: ``[D, N]``.
        B: ``[T, N]``.
        C: output matrix of the last rows, ``[S, N]``.
        dt_bias: ``[D]``.
        dt_softplus: whether ``dt`` passes a softplus.
        cu_seqlens: borders of the sequences, int32 ``[S+1]``; an empty sequence's output is 0.
        backend: as :func:`selective_scan`.

    Raises:
        ValueError: shapes that do not fit, or an unknown backend.
        BackendUnavailable: a backend that cannot run here.
    """
    _check(cu_seqlens, x, dt, A, B)
    sequences = len(cu_seqlens) - 1
    if C.shape != (sequences, B.shape[1]):
        raise ValueError(f"C is {list(C.shape)}, not {[sequences, B.shape[1]]}")
    chosen = choose("selective_scan", backend, x, {"D": A.shape[0], "N": A.shape[1]})
    scan = ScanArguments(x, dt, A, B, None, cu_seqlens, dt_bias=dt_bias, dt_softplus=dt_softplus)
    if chosen == "mamba_ssm":  # whose final state has no gradient
        # Each row takes its sequence's C, so that an empty sequence, which has no last row, disturbs no other.
        full, _ = _run(chosen, replace(scan, C=C.index_select(0, sequence_ids(cu_seqlens)).to(B.dtype)))
        some = sequence_lengths(cu_seqlens) > 0
        return x.new_zeros(sequences, x.shape[1]).index_put((some,), full[last_rows(cu_seqlens)[some]])
    # How each backend is told that no outputs are wanted; the reference has no such way.
    if chosen == "triton":
        no_outputs = None
    else:
        no_outputs = B.new_empty(0, B.shape[1]) if chosen == "cpu" else B.new_zeros(B.shape)
    _, state = _run(chosen, replace(scan, C=no_outputs, return_final_state=True))
    with torch.autocast(x.device.type, enabled=False):
        return torch.einsum("sdn,sn->sd", state, C.to(state.dtype)).to(x.dtype)
