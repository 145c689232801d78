"""Features of gated embeddings, operation by operation in plain torch."""

import torch
from torch import Tensor


def preference_features_reference(embedding: Tensor, gate_logits: Tensor, metric: Tensor) -> Tensor:
    """The vectors of :func:`recbole_ssm.ops.preference_features`: ``[T, H, d]``."""
    gated = embedding * torch.sigmoid(gate_logits)
    return gated[:, None] * metric
