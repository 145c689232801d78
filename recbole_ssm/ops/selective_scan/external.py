"""Adapter to Mamba-1's CUDA kernel in the mamba_ssm package."""

import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.packing import pad, positions, sequence_ids, sequence_lengths


def selective_scan_external(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """As :func:`recbole_ssm.ops.selective_scan` from a zero state; its final state has no gradient.

    The kernel knows no packed sequences, so they are padded to the longest; padded rows take no step.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    if dt_softplus:
        dt = F.softplus(dt)
    x_, dt_, B_, C_ = (pad(t.to(x.dtype), cu_seqlens).mT.contiguous() for t in (x, dt, B, C))
    z_ = None if z is None else pad(z.to(x.dtype), cu_seqlens).mT.contiguous()
    D = None if D is None else D.float()
    y, final_state = selective_scan_fn(x_, dt_, A.float(), B_, C_, D, z_, return_last_state=True)
    final_state = final_state.float() * (sequence_lengths(cu_seqlens) > 0)[:, None, None]
    return y.mT[sequence_ids(cu_seqlens), positions(cu_seqlens)], final_state
