"""Causal depthwise convolution, tap by tap in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.packing import positions


def causal_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, cu_seqlens: Tensor
) -> Tensor:
    """The sum of :func:`recbole_ssm.ops.causal_conv` over sequences that start from zeros: ``[T, D]``."""
    position = positions(cu_seqlens)[:, None]
    total = torch.zeros_like(x)
    for back in range(min(weight.shape[1], len(x))):
        earlier = F.pad(x[: len(x) - back], (0, 0, back, 0))
        total = total + weight[:, -1 - back] * torch.where(position >= back, earlier, 0.0)
    if bias is not None:
        total = total + bias
    return F.silu(total) if activation == "silu" else total
