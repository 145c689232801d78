"""Adapter to the CUDA kernels of the causal-conv1d package."""

import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.packing import sequence_ids


def causal_conv_external(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, cu_seqlens: Tensor
) -> Tensor:
    """The sum of :func:`recbole_ssm.ops.causal_conv` over sequences that start from zeros: ``[T, D]``.

    Its kernels take multiples of 8 channels, so others are filled up with zeros, at the price of a copy.
    """
    if not len(x):
        return x.new_empty(x.shape)
    from causal_conv1d import causal_conv1d_fn

    channels = x.shape[1]
    missing = -channels % 8
    x, weight = F.pad(x, (0, missing)), F.pad(weight, (0, 0, 0, missing)).to(x.dtype)
    bias = None if bias is None else F.pad(bias, (0, missing)).to(x.dtype)
    register = sequence_ids(cu_seqlens)[None]
    y = causal_conv1d_fn(x.contiguous().T[None], weight, bias, seq_idx=register, activation=activation)
    return y.squeeze(0).T[:, :channels]
