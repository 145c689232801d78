"""RecBLR: Behavior-Dependent Linear Recurrent Units for Efficient Sequential Recommendation (arXiv 2406.12580).

Item embedding, dropout, LayerNorm; layers of a gated recurrence, each followed by a feed-forward network, both with a
residual connection. The recurrent unit (BD-LRU) is linear in its state, with gates of the current item alone.
docs/models.md gives the equations and says where this differs from the released code.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_ssm.layers import FeedForward
from recbole_ssm.layers.causal_conv import CausalConv1d
from recbole_ssm.layers.mamba import inverse_softplus, keep_from_weight_decay
from recbole_ssm.models.base import init_weights
from recbole_ssm.models.stepping import CarryingRecommender, of_layers
from recbole_ssm.ops import selective_scan, selective_scan_last
from recbole_ssm.ops.decaying_scan import scan_arguments_of
from recbole_ssm.ops.packing import select_rows, single_rows
from recbole_ssm.registry import register_model
from recbole_ssm.settings import LossType, ModelSettings, setting

# Of a row's decay, which is divided by; less is no decay at all in float32.
LEAST_DECAY = 1e-10


class GatedRecurrence(nn.Module):
    """A gated block around behaviour-dependent linear recurrent units, one a channel.

    With ``u`` and ``z`` linear maps of the input, of which ``u`` passes a causal convolution and SiLU::

        r_t, i_t = sigmoid(W u_t + b)
        alpha_t  = exp(-softplus(Lambda) r_t)
        h_t      = alpha_t h_{t-1} + sqrt(1 - alpha_t^2) i_t u_t
        out_t    = W_out (h_t SiLU(z_t))

    Args:
        hidden_size: width of the input and the output.
        d_conv: width of the causal convolution.
        expand: number of units as a multiple of ``hidden_size``.
        backend: see :func:`recbole_ssm.ops.selective_scan`.
    """

    def __init__(self, hidden_size: int, d_conv: int, expand: int, backend: str = "auto"):
        super().__init__()
        units, self.backend = expand * hidden_size, backend
        self.in_proj = nn.Linear(hidden_size, 2 * units, bias=False)
        self.conv = CausalConv1d(units, d_conv, backend)
        self.gates = nn.Linear(units, 2 * units)
        # With r = 1, alpha is 0.9 in the first unit and 0.999 in the last.
        first, last = inverse_softplus(-torch.tensor([0.9, 0.999]).log()).tolist()
        self.Lambda = nn.Parameter(torch.linspace(first, last, units))
        keep_from_weight_decay(self.Lambda)
        self.out_proj = nn.Linear(units, hidden_size, bias=False)

    def forward(self, x: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False) -> Tensor:
        """See :meth:`recbole_ssm.layers.Mamba.forward`."""
        into_units, into_gate = self.in_proj.weight.chunk(2)
        z = F.linear(select_rows(x, read), into_gate)
        u = self.conv.packed(F.linear(x, into_units), cu_seqlens)
        settings: dict[str, Any] = {"cu_seqlens": cu_seqlens, "backend": self.backend}
        if last:
            x, dt, A, one = scan_arguments_of(*self.gated(u))
            h = selective_scan_last(x, dt, A, one, one.new_ones(len(z), 1), **settings)
        else:
            h = select_rows(self._scan(u, **settings), read)
        return self.out_proj(h.to(z.dtype) * F.silu(z))

    def initial_state(self, count: int) -> dict[str, Tensor]:
        """What :meth:`carry` starts ``count`` sequences with: all zeros."""
        h = self.Lambda.new_zeros(count, len(self.Lambda), 1)
        return {"conv": self.conv.initial_state(count), "h": h}

    def carry(self, x: Tensor, cu_seqlens: Tensor | None, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`recbole_ssm.layers.Mamba.carry`.

        The state is ``conv [S, units, d_conv-1]``, the rows before for the convolution, and ``h [S, units, 1]``.
        """
        cu_seqlens = single_rows(len(x), x.device) if cu_seqlens is None else cu_seqlens
        settings: dict[str, Any] = {"cu_seqlens": cu_seqlens, "return_final_state": True, "backend": self.backend}
        u, z = self.in_proj(x).chunk(2, -1)
        u, conv = self.conv.carry(u, cu_seqlens, state["conv"])
        h, after = self._scan(u, initial_state=state["h"], **settings)
        return self.out_proj(h.to(z.dtype) * F.silu(z)), {"conv": conv, "h": after}

    def gated(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """``sqrt(1 - alpha^2) i u`` and ``-log alpha`` of rows ``u [..., units]``, both in at least float32."""
        exact = torch.promote_types(u.dtype, torch.float32)
        r, i = torch.sigmoid(self.gates(u).to(exact)).chunk(2, -1)
        decay = (F.softplus(self.Lambda) * r).clamp_min(LEAST_DECAY)
        return torch.sqrt(-torch.expm1(-2 * decay)) * i * u, decay

    def _scan(self, u: Tensor, **settings: Any) -> Any:
        x, dt, A, one = scan_arguments_of(*self.gated(u))
        return selective_scan(x, dt, A, one, one, **settings)


class RecurrentLayer(nn.Module):
    """Gated recurrence and feed-forward network, each with dropout, a residual connection and LayerNorm."""

    def __init__(self, config):
        super().__init__()
        size, dropout_prob = config["hidden_size"], config["dropout_prob"]
        self.recurrence = GatedRecurrence(size, config["d_conv"], config["expand"], config["ssm_backend"])
        self.dropout = nn.Dropout(dropout_prob)
        self.norm = nn.LayerNorm(size, eps=1e-12)
        self.feed_forward = FeedForward(size, dropout_prob, activation=F.silu)

    def forward(self, x: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False) -> Tensor:
        """See :meth:`GatedRecurrence.forward`."""
        hidden = self.dropout(self.recurrence(x, cu_seqlens, read, last))
        return self.feed_forward(self.norm(hidden + select_rows(x, read)))

    def carry(self, x: Tensor, cu_seqlens: Tensor | None, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`GatedRecurrence.carry`."""
        hidden, state = self.recurrence.carry(x, cu_seqlens, state)
        return self.feed_forward(self.norm(hidden + x)), state


class RecBLRSettings(ModelSettings):
    """RecBLR (arXiv 2406.12580). All values are those of the released code for ml-1m."""

    hidden_size: int = setting(64, "Number of features in the hidden state.", ge=1, le=2**16, fixed=True)
    num_layers: int = setting(2, "Number of recurrent layers.", ge=1, le=1024, fixed=True)
    dropout_prob: float = setting(0.2, "Dropout rate.", ge=0, lt=1)
    d_conv: int = setting(4, "Local convolution width.", ge=1, le=8, fixed=True)
    expand: int = setting(2, "Number of recurrent units as a multiple of hidden_size.", ge=1, le=64, fixed=True)
    loss_type: LossType = setting("CE", "The loss; all but CE draw negatives.")


@register_model(RecBLRSettings)
class RecBLR(CarryingRecommender):
    """Stacked recurrent layers over item embeddings."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.item_embedding = nn.Embedding(self.n_items, self.hidden_size)
        self.make_time_embeddings()
        self.dropout = nn.Dropout(config["dropout_prob"])
        self.norm = nn.LayerNorm(self.hidden_size, eps=1e-12)
        self.layers = nn.ModuleList(RecurrentLayer(config) for _ in range(config["num_layers"]))
        self.apply(init_weights)

    def encode(self, items: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False) -> Tensor:
        """See :meth:`PackedRecommender.encode`."""
        hidden = self.norm(self.dropout(self.embed(items)))
        for layer in self.layers[:-1]:
            hidden = layer(hidden, cu_seqlens)
        return self.layers[-1](hidden, cu_seqlens, read, last)

    def carrying(self) -> list[Any]:
        """See :meth:`CarryingRecommender.carrying`."""
        layers: Any = self.layers
        return [layer.recurrence for layer in layers]

    def carry(
        self, items: Tensor, cu_seqlens: Tensor | None, states: list[dict[str, Tensor]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`CarryingRecommender.carry`."""
        hidden = self.norm(self.embed(items))
        after: dict[int, dict[str, Tensor]] = {}
        layers: Any = self.layers
        for i, layer in enumerate(layers):
            hidden, after[i] = layer.carry(hidden, cu_seqlens, states[i])
        return hidden, of_layers(after)
