"""Directions of gated embeddings, operation by operation in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def preference_directions_reference(embedding: Tensor, gate_logits: Tensor, metric: Tensor) -> Tensor:
    """The vectors of :func:`recbole_ssm.ops.preference_directions`: ``[T, H, d]``."""
    gated = embedding * torch.sigmoid(gate_logits)
    feature = gated[:, None] * metric
    return F.normalize(feature.to(torch.promote_types(feature.dtype, torch.float32)), dim=-1)
