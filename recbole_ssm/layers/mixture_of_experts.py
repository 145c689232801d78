"""Sequence-level mixture of experts, the prediction layer of STAR-Rec (arXiv 2505.03484, section 3.1.5)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MixtureOfExperts(nn.Module):
    """``LayerNorm(y + dropout(sum_i G_i(y) expert_i(y)))`` with ``G = softmax(W_g y)``.

    Each expert is a two-layer network with GELU and an inner width of ``4 d``. ``y`` represents a whole sequence (or
    prefix), so the gate routes sequences, not items. All experts run as one batched product.

    Args:
        hidden_size: width ``d``.
        n_experts: number of experts ``E``.
        dropout_prob: dropout rate.
    """

    def __init__(self, hidden_size: int, n_experts: int, dropout_prob: float):
        super().__init__()
        inner = 4 * hidden_size
        self.gate = nn.Linear(hidden_size, n_experts)
        self.expand_weight = nn.Parameter(torch.empty(n_experts, hidden_size, inner))
        self.expand_bias = nn.Parameter(torch.zeros(n_experts, 1, inner))
        self.contract_weight = nn.Parameter(torch.empty(n_experts, inner, hidden_size))
        self.contract_bias = nn.Parameter(torch.zeros(n_experts, 1, hidden_size))
        self.dropout = nn.Dropout(dropout_prob)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-12)
        nn.init.normal_(self.expand_weight, std=0.02)
        nn.init.normal_(self.contract_weight, std=0.02)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[M, d]`` to the mixture ``[M, d]``, the gate ``[M, E]`` and each expert's output ``[E, M, d]``."""
        gate = self.gate(y).softmax(-1)
        inner = F.gelu(torch.baddbmm(self.expand_bias, y.expand(gate.shape[1], -1, -1), self.expand_weight))
        experts = torch.baddbmm(self.contract_bias, inner, self.contract_weight)
        mixture = torch.einsum("me,emd->md", gate, experts)
        return self.norm(y + self.dropout(mixture)), gate, experts


def expert_diversity(experts: Tensor) -> Tensor:
    """How alike the experts answer: the mean over sequences and pairs ``i != j`` of ``cos(expert_i, expert_j)^2``.

    0 where all experts' outputs are orthogonal, 1 where they are parallel. The paper names a diversity regulariser
    (``L_div``) without giving its form; this is ours.

    Args:
        experts: outputs, ``[E, M, d]``.
    """
    count = experts.shape[0]
    if count < 2:
        return experts.new_zeros(())
    direction = F.normalize(experts.to(torch.promote_types(experts.dtype, torch.float32)), dim=-1)
    cosine = torch.einsum("imd,jmd->mij", direction, direction)
    off_diagonal = cosine.square().sum((1, 2)) - cosine.diagonal(dim1=1, dim2=2).square().sum(1)
    return off_diagonal.mean() / (count * (count - 1))


def load_balance(gate: Tensor) -> Tensor:
    """How unevenly the experts are used: the squared coefficient of variation of their shares of the gate's mass.

    ``E sum_i P_i^2 - 1`` with ``P_i`` the mean gate of expert ``i``: 0 where all are used alike, ``E - 1`` where one
    takes everything (the importance loss of arXiv 1701.06538, eq. 6 and 7).

    Args:
        gate: ``[M, E]``, rows summing to 1.
    """
    share = gate.mean(0, dtype=torch.promote_types(gate.dtype, torch.float32))
    return gate.shape[1] * share.square().sum() - 1
