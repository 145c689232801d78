"""How alike experts answer, by all of their cosines, in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def expert_diversity_reference(experts: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of :func:`recbole_ssm.ops.expert_diversity` for two experts or more."""
    count = len(experts)
    direction = F.normalize(experts.to(torch.promote_types(experts.dtype, torch.float32)), dim=-1)
    cosine = torch.einsum("imd,jmd->mij", direction, direction)
    off_diagonal = cosine.square().sum((1, 2)) - cosine.diagonal(dim1=1, dim2=2).square().sum(1)
    mean = off_diagonal.mean() if weights is None else torch.dot(off_diagonal, weights.to(off_diagonal.dtype))
    return mean / (count * (count - 1))
