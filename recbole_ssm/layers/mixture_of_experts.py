"""Sequence-level mixture of experts, the prediction layer of STAR-Rec (arXiv 2505.03484, section 3.1.5)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from recbole_ssm.distributed import mean_over_processes
from recbole_ssm.layers.gelu import gelu
from recbole_ssm.ops import expert_diversity

__all__ = ["Mixture", "MixtureOfExperts", "expert_diversity", "load_balance"]


class Mixture(NamedTuple):
    """What :class:`MixtureOfExperts` computes for ``M`` representations.

    Attributes:
        output: ``[M, d]``.
        gate: probability of each expert, ``[M, E]``.
        chosen: the experts that took part, int64 ``[M, k]``; absent where all did.
        experts: their outputs, ``[k, M, d]`` (``[E, M, d]`` where all took part).
    """

    output: Tensor
    gate: Tensor
    chosen: Tensor | None
    experts: Tensor


class MixtureOfExperts(nn.Module):
    """``LayerNorm(y + dropout(sum_i G_i(y) expert_i(y)))`` with ``G = softmax(W_g y)``.

    Each expert is a two-layer network with GELU and an inner width of ``4 d``. ``y`` represents a whole sequence (or
    prefix), so the gate routes sequences, not items. All experts run as one batched product. With
    ``experts_per_token`` only so many experts with the largest ``G_i`` are computed and summed, by the same ``G_i``
    (as in arXiv 2101.03961, so that the gate learns from the output even where one is chosen).

    Args:
        hidden_size: width ``d``.
        n_experts: number of experts ``E``.
        dropout_prob: dropout rate.
        experts_per_token: ``k``; all where absent.

    Raises:
        ValueError: where ``experts_per_token`` is not from 1 to ``n_experts``.
    """

    def __init__(self, hidden_size: int, n_experts: int, dropout_prob: float, experts_per_token: int | None = None):
        super().__init__()
        if experts_per_token is not None and not 1 <= experts_per_token <= n_experts:
            raise ValueError(f"experts_per_token is {experts_per_token}, not from 1 to n_experts ({n_experts})")
        self.experts_per_token = experts_per_token
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

    def forward(self, y: Tensor) -> Mixture:
        """Mix the experts' outputs for representations ``[M, d]``."""
        gate = self.gate(y).softmax(-1)
        if self.experts_per_token is None:
            weights, chosen, experts = gate, None, self._experts(y.expand(gate.shape[1], -1, -1))
        else:
            weights, chosen = gate.topk(self.experts_per_token)
            experts = self._chosen_experts(y, chosen)
        mixture = torch.einsum("mk,kmd->md", weights, experts)
        return Mixture(self.norm(y + self.dropout(mixture)), gate, chosen, experts)

    def _experts(self, y: Tensor) -> Tensor:
        """Expert ``i`` of ``y[i]``: ``[E, C, d]`` to ``[E, C, d]``."""
        inner = gelu(torch.baddbmm(self.expand_bias, y, self.expand_weight))
        return torch.baddbmm(self.contract_bias, inner, self.contract_weight)

    def _chosen_experts(self, y: Tensor, chosen: Tensor) -> Tensor:
        """The experts ``chosen [M, k]`` of ``y [M, d]``, each expert's rows filled up to those of the busiest one."""
        (count, k), n_experts = chosen.shape, len(self.expand_weight)
        expert = chosen.flatten()
        load = torch.bincount(expert, minlength=n_experts)
        order = expert.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=y.device) - (load.cumsum(0) - load)[expert[order]]
        width = int(load.max()) if count else 0
        slot = expert * width + place
        row = slot.new_zeros(n_experts * width)  # slots that nobody fills read row 0, and nobody reads them
        row[slot] = torch.arange(len(order), device=y.device) // k
        out = self._experts(y.index_select(0, row).unflatten(0, (n_experts, width)))
        return out.flatten(0, 1).index_select(0, slot).unflatten(0, (count, k)).transpose(0, 1)


def load_balance(
    gate: Tensor,
    chosen: Tensor | None = None,
    target_weights: Tensor | None = None,
    scale: float = 1.0,
    process_weight: float = 1.0,
) -> Tensor:
    """How unevenly the experts are used: ``scale (E sum_i f_i P_i - 1)`` with ``P_i`` the mean gate of expert ``i``.

    Where all experts take part ``f = P``, and this is the squared coefficient of variation of their shares of the
    gate's mass (the importance loss of arXiv 1701.06538, eq. 6 and 7). Where some are chosen, ``f_i`` is the share of
    choices that fell on ``i`` (arXiv 2101.03961, eq. 4 to 6). 0 where all are used alike, up to ``E - 1`` where one
    takes everything.

    Args:
        gate: ``[M, E]``, rows summing to 1.
        chosen: int64 ``[M, k]``.
        target_weights: what each row counts, ``[M]``, summing to 1; all alike where absent.
        scale: a factor.
        process_weight: see :func:`recbole_ssm.distributed.weight_of`.
    """
    exact = torch.promote_types(gate.dtype, torch.float32)
    with torch.autocast(gate.device.type, enabled=False):
        share = gate.mean(0, dtype=exact) if target_weights is None else target_weights.to(exact) @ gate.to(exact)
    used = share = mean_over_processes(share, process_weight)
    if chosen is not None:
        (count, k), each = chosen.shape, share.new_ones(chosen.shape)
        each = each / max(1, count * k) if target_weights is None else each * (target_weights / k)[:, None]
        used = torch.zeros_like(share).index_add(0, chosen.flatten(), each.flatten())
        used = mean_over_processes(used, process_weight)
    return (scale * len(share)) * torch.dot(used, share) - scale
