"""Adapter to Mamba-1's CUDA kernel in the mamba_ssm package."""

import torch
from torch import Tensor

from recbole_ssm.ops.packing import pad, positions, sequence_ids, sequence_lengths
from recbole_ssm.ops.scan_arguments import ScanArguments

NO_STEP = -1e4  # its softplus is 0, with any bias


def selective_scan_external(scan: ScanArguments) -> tuple[Tensor, Tensor]:
    """As :func:`recbole_ssm.ops.selective_scan` from a zero state; its final state has no gradient.

    The kernel knows no packed sequences, so they are padded to the longest; padded rows take no step.
    """
    x, A, C, D, dt_bias, cu_seqlens = scan.x, scan.A, scan.C, scan.D, scan.dt_bias, scan.cu_seqlens
    assert C is not None
    if not len(x):
        return x.new_empty(x.shape), A.new_zeros(len(cu_seqlens) - 1, *A.shape, dtype=torch.float32)
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    places = (sequence_ids(cu_seqlens), positions(cu_seqlens))
    x_, dt_, B_, C_ = (pad(t.to(x.dtype), cu_seqlens) for t in (x, scan.dt, scan.B, C))
    z_ = None if scan.z is None else pad(scan.z.to(x.dtype), cu_seqlens).mT.contiguous()
    real = torch.zeros(x_.shape[:2], dtype=torch.bool, device=x.device).index_put(
        places, x.new_ones((), dtype=torch.bool)
    )
    bias = None if dt_bias is None else dt_bias.float()
    if bias is not None and not scan.dt_softplus:
        dt_, bias = dt_ + bias.to(x.dtype), None
    dt_ = torch.where(real[..., None], dt_, NO_STEP if scan.dt_softplus else 0.0)
    x_, dt_, B_, C_ = (t.mT.contiguous() for t in (x_, dt_, B_, C_))
    D = None if D is None else D.float()
    y, final_state = selective_scan_fn(
        x_, dt_, A.float(), B_, C_, D, z_, delta_bias=bias, delta_softplus=scan.dt_softplus, return_last_state=True
    )
    final_state = final_state.float() * (sequence_lengths(cu_seqlens) > 0)[:, None, None]
    return y.mT[places], final_state
