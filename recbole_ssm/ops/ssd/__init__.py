"""State-space duality (Mamba-2, arXiv 2405.21060) over packed sequences."""

from typing import Any

import torch
from torch import Tensor

from recbole_ssm.ops.backend import choose
from recbole_ssm.ops.packing import check_packed, last_rows, sequence_ids
from recbole_ssm.ops.scan_arguments import ScanArguments
from recbole_ssm.ops.ssd.reference import ssd_last_reference, ssd_reference


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
        backend: see :mod:`recbole_ssm.ops.backend`.

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

    lacks = "initial_state a sequence" if initial_state is not None else ""
    if return_final_state and torch.is_grad_enabled():
        lacks = "gradient of packed sequences' final states"
    sizes = {"H": heads, "P": width, "G": B.shape[1], "N": B.shape[2]}
    chosen = choose("ssd", backend, x, sizes, lacks, initial_state is not None or return_final_state)
    scan = ScanArguments(
        x, dt, A, B, C, cu_seqlens, D, None, dt_bias, dt_softplus, initial_state, return_final_state
    )  # fmt: skip
    if chosen == "triton":
        from recbole_ssm.ops.ssd.triton import ssd_triton

        y, final_state = ssd_triton(scan, chunk_size)
    elif chosen == "mamba_ssm":
        from recbole_ssm.ops.ssd.external import ssd_external

        y, final_state = ssd_external(scan, chunk_size)
    else:
        y, final_state = _on_torch(chosen, scan, chunk_size)
    return (y, final_state) if return_final_state else y


def _on_torch(chosen: str, scan: ScanArguments, chunk_size: int) -> Any:
    """The backends that compute the recurrence alone; torch does what comes before and after it."""
    dtype, scan = scan.x.dtype, scan.with_step_sizes()
    recurrence: dict[str, Any] = {
        "x": scan.x, "dt": scan.dt, "A": scan.A, "B": scan.B, "C": scan.C, "initial_state": scan.initial_state,
        "cu_seqlens": scan.cu_seqlens,
    }  # fmt: skip
    with torch.autocast(scan.x.device.type, enabled=False):
        if chosen == "cpu":
            from recbole_ssm.ops.ssd.cpu import ssd_cpu

            y, final_state = ssd_cpu(**recurrence, return_final_state=scan.return_final_state)
        else:
            y, final_state = ssd_reference(
                **recurrence, chunk_size=chunk_size, return_final_state=scan.return_final_state
            )  # fmt: skip
    if scan.D is not None:
        y = y + scan.D[:, None] * scan.x
    return y.to(dtype), final_state


def ssd_last(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    cu_seqlens: Tensor,
    D: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`ssd` at the last row of each sequence alone: ``[S, H, P]`` in ``x``'s dtype.

    A head's decay is a scalar, so the dual, attention-like form (arXiv 2405.21060, section 3) is a weighted sum of the
    inputs: ``y = sum_j dt_j exp(A sum_{i>j} dt_i) (C . B_j) x_j + D x_last``. It has no states.

    Args:
        x: ``[T, H, P]``.
        dt: ``[T, H]``.
        A: ``[H]``.
        B: ``[T, G, N]``.
        C: output matrix of the last rows, ``[S, G, N]``.
        dt_bias: ``[H]``.
        dt_softplus: whether ``dt`` passes a softplus.
        cu_seqlens: borders of the sequences, int32 ``[S+1]``; an empty sequence's output is 0.
        D: skip weight, ``[H]``.
        backend: as :func:`ssd`.

    Raises:
        ValueError: shapes that do not fit, or an unknown backend.
        BackendUnavailable: a backend that cannot run here.
    """
    check_packed(cu_seqlens, x=x, dt=dt, B=B)
    if C.shape != (len(cu_seqlens) - 1, *B.shape[1:]):
        raise ValueError(f"C is {list(C.shape)}, not {[len(cu_seqlens) - 1, *B.shape[1:]]}")
    sizes = {"H": x.shape[1], "P": x.shape[2], "G": B.shape[1], "N": B.shape[2]}
    chosen = choose("ssd", backend, x, sizes)
    scan = ScanArguments(x, dt, A, B, C, cu_seqlens, D, dt_bias=dt_bias, dt_softplus=dt_softplus)
    if chosen == "triton":
        from recbole_ssm.ops.ssd.last_triton import ssd_last_triton

        return ssd_last_triton(scan)
    if not len(x):  # and so no last row either
        return x.new_zeros(len(C), *x.shape[1:])
    last, some = last_rows(cu_seqlens).clamp_min(0), (cu_seqlens.diff() > 0)[:, None, None]
    if chosen == "mamba_ssm":  # which computes all rows, and each with a C of its own
        C = C.index_select(0, sequence_ids(cu_seqlens)).to(B.dtype)
        y = ssd(x, dt, A, B, C, D, dt_bias, dt_softplus, cu_seqlens=cu_seqlens, backend=chosen)
        return some * y.index_select(0, last)
    with torch.autocast(x.device.type, enabled=False):
        scan = scan.with_step_sizes()
        assert scan.C is not None
        if chosen == "cpu":
            from recbole_ssm.ops.ssd.last_cpu import ssd_last_cpu as recurrence
        else:
            recurrence = ssd_last_reference
        y = recurrence(scan.x, scan.dt, scan.A, scan.B, scan.C, cu_seqlens)
        if scan.D is not None:
            y = y + some * (scan.D[:, None] * scan.x.index_select(0, last))
    return y.to(x.dtype)
