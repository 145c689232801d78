"""Adapter to Mamba-2's Triton kernels in the mamba_ssm package."""

import torch
from torch import Tensor

from recbole_ssm.ops.packing import sequence_ids


def ssd_external(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    cu_seqlens: Tensor,
    return_final_state: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`recbole_ssm.ops.ssd` from zero states; final states have no gradient."""
    if not len(x):
        return x.new_empty(x.shape), x.new_zeros(len(cu_seqlens) - 1, *x.shape[1:], B.shape[2], dtype=torch.float32)
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    register = sequence_ids(cu_seqlens).to(torch.int32)[None]
    result = mamba_chunk_scan_combined(
        x[None], dt[None], A.float(), B[None].to(x.dtype), C[None].to(x.dtype), chunk_size,
        D=D, dt_bias=dt_bias, seq_idx=register, dt_softplus=dt_softplus,
        cu_seqlens=cu_seqlens if return_final_state else None, return_varlen_states=return_final_state,
    )  # fmt: skip
    if not return_final_state:
        return result[0], None
    y, final_state = result
    return y[0], final_state.float()
