"""Adapter to Mamba-2's Triton kernels in the mamba_ssm package."""

import torch
from torch import Tensor

from recbole_ssm.ops.packing import sequence_ids
from recbole_ssm.ops.scan_arguments import ScanArguments


def ssd_external(scan: ScanArguments, chunk_size: int) -> tuple[Tensor, Tensor | None]:
    """As :func:`recbole_ssm.ops.ssd` from zero states; final states have no gradient."""
    x, B, C = scan.x, scan.B, scan.C
    cu_seqlens, return_final_state = scan.cu_seqlens, scan.return_final_state
    assert C is not None
    if not len(x):
        return x.new_empty(x.shape), x.new_zeros(len(cu_seqlens) - 1, *x.shape[1:], B.shape[2], dtype=torch.float32)
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    result = mamba_chunk_scan_combined(
        x[None], scan.dt[None], scan.A.float(), B[None].to(x.dtype), C[None].to(x.dtype), chunk_size,
        D=scan.D, dt_bias=scan.dt_bias, seq_idx=sequence_ids(cu_seqlens)[None], dt_softplus=scan.dt_softplus,
        cu_seqlens=cu_seqlens if return_final_state else None, return_varlen_states=return_final_state,
    )  # fmt: skip
    if not return_final_state:
        return result[0], None
    y, final_state = result
    return y[0], final_state.float()
