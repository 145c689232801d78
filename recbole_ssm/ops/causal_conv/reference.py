"""Causal depthwise convolution, in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.packing import sequence_ids


def causal_conv_reference(
    x: Tensor, weight: Tensor, initial_state: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum of :func:`recbole_ssm.ops.causal_conv`, without bias and activation.

    Returns:
        Output ``[T, D]`` and final state ``[S, D, K-1]``.
    """
    before = initial_state.shape[2]  # K - 1
    # With the state's rows laid in front of each sequence, no tap reaches into the sequence before it.
    places = torch.arange(len(x), device=x.device) + before * (sequence_ids(cu_seqlens) + 1)
    fronts = cu_seqlens[:-1].long() + before * torch.arange(len(initial_state), device=x.device)
    extended = x.new_zeros(len(x) + before * len(initial_state), x.shape[1]).index_put((places,), x)
    for k in range(before):
        extended = extended.index_put((fronts + k,), initial_state[:, :, k].to(x.dtype))
    y = F.conv1d(extended.T[None], weight[:, None], groups=len(weight))[0].T[places - before]
    ends = cu_seqlens[1:].long() + before * torch.arange(1, len(initial_state) + 1, device=x.device)
    final_state = torch.stack([extended[ends - before + k] for k in range(before)], -1) if before else initial_state
    return y, final_state
