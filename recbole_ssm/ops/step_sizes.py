"""Step sizes of the state-space ops, for the backends that take them as they are."""

import torch
import torch.nn.functional as F
from torch import Tensor


def step_sizes(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dtype: torch.dtype) -> Tensor:
    """``softplus(dt + dt_bias)`` where ``dt_softplus``, else ``dt + dt_bias``, in ``dtype``; ``dt [T, ...]``."""
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    return F.softplus(dt) if dt_softplus else dt
