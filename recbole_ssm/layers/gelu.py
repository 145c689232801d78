"""GELU for batches of which each has another number of rows."""

import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """``F.gelu(x)``, ``[..., d]``."""
    # Of what is contiguous torch on a CPU hands GELU to oneDNN, which compiles a kernel for each shape, forward and
    # backward, and keeps 1,024 of them: for packed batches a new one each step, between whose pieces memory fragments.
    return F.gelu(x.transpose(0, -1)).transpose(0, -1)
