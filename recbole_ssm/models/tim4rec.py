"""TiM4Rec: An Efficient Sequential Recommendation Model Based on Time-Aware Structured State Space Duality Model
(arXiv 2409.16182).

Item embedding, dropout, LayerNorm; layers of state-space duality whose step sizes are scaled by the time before each
interaction (the time-aware structured mask), each followed by a feed-forward network. docs/models.md gives the
equations and says where this differs from the released code, which reads the time of a whole row at once.
"""

from typing import Any

import torch
from pydantic import model_validator
from torch import Tensor, nn

from recbole_ssm.layers import FeedForward, Mamba2
from recbole_ssm.layers.causal_conv import CausalConv1d
from recbole_ssm.models.base import init_weights
from recbole_ssm.models.stepping import CarryingRecommender, by_layer, of_layers
from recbole_ssm.ops.packing import select_rows, single_rows
from recbole_ssm.registry import register_model
from recbole_ssm.settings import LossType, ModelSettings, divides, setting

# What the logarithm of a gap is divided by, to be of the order of 1: about that of a day of seconds.
LOG_OF_A_DAY = 10.0


class TiM4RecSettings(ModelSettings):
    """TiM4Rec (arXiv 2409.16182). 'released': the settings in the authors' code for ml-1m; for amazon-beauty these are
    dropout_prob 0.4 and time_dropout_prob 0.
    """

    hidden_size: int = setting(
        64, "Number of features in the hidden state.", "Released.", section="Size", ge=1, le=2**16, fixed=True
    )
    num_layers: int = setting(
        2, "Number of time-aware SSD layers; with more than one they get residual connections.", "Released.",
        ge=1, le=1024, fixed=True,
    )  # fmt: skip
    dropout_prob: float = setting(0.2, "Dropout rate.", "Released.", ge=0, lt=1)
    d_state: int = setting(
        32, "SSM state expansion factor.", "Released.", section="State-space duality", ge=1, le=4096, fixed=True
    )
    d_conv: int = setting(4, "Local convolution width, of items and of times.", "Released.", ge=1, le=8, fixed=True)
    expand: int = setting(2, "Block expansion factor.", "Released.", ge=1, le=64, fixed=True)
    headdim: int = setting(
        32, "Width of an SSD head; must divide expand * hidden_size.", "Released.", ge=1, le=2**16, fixed=True
    )
    time_aware: bool = setting(
        True,
        "Whether step sizes are scaled by the time before each interaction; ablation 'w/o time' when False.",
        "Released.", section="Time", fixed=True,
    )  # fmt: skip
    time_dropout_prob: float = setting(0.2, "Dropout rate of the times.", "Released.", ge=0, lt=1)
    loss_type: LossType = setting("CE", "The loss; all but CE draw negatives.", "Released.", section="Training")

    @model_validator(mode="after")
    def _sizes(self):
        return divides(self, "headdim", "expand * hidden_size =", self.expand * self.hidden_size)


class TimeScale(nn.Module):
    """What a layer's step sizes are multiplied by, of the time before each interaction.

    ``scale = SiLU(conv(SiLU(conv(time * W_2 SiLU(W_1 time)))))``, and what the next layer reads as its time is
    ``LayerNorm(g time + (1 - g) scale)`` with ``g = sigmoid(w time)``.

    Args:
        heads: numbers a row, one for each head, ``H``.
        d_conv: width of the causal convolutions.
        dropout_prob: dropout rate of the times.
        passes_on: whether there is a next layer.
        backend: see :func:`recbole_ssm.ops.causal_conv`.
    """

    def __init__(self, heads: int, d_conv: int, dropout_prob: float, passes_on: bool, backend: str = "auto"):
        super().__init__()
        self.own = nn.Sequential(
            nn.Dropout(dropout_prob), nn.Linear(heads, heads), nn.SiLU(), nn.Linear(heads, heads)
        )  # fmt: skip
        self.convs = nn.ModuleList(CausalConv1d(heads, d_conv, backend) for _ in range(2))
        self.gate = nn.Sequential(nn.Dropout(dropout_prob), nn.Linear(heads, 1), nn.Sigmoid()) if passes_on else None
        self.norm = nn.LayerNorm(heads, eps=1e-12) if passes_on else None

    def forward(
        self, time: Tensor, cu_seqlens: Tensor | None, state: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Run over packed sequences.

        Args:
            time: ``[T, H]``.
            cu_seqlens: borders of the sequences, int32 ``[S+1]``; one row of each sequence where absent.
            state: the rows before for each convolution, ``[S, H, d_conv-1]`` each, where more rows of sequences go on;
                for inference.

        Returns:
            The scale ``[T, H]``, the next layer's time ``[T, H]``, and the state after these rows where there was one.
        """
        cu_seqlens = single_rows(len(time), time.device) if cu_seqlens is None else cu_seqlens
        scale, after = time * self.own(time), {}
        convs: Any = self.convs
        for i, conv in enumerate(convs):
            if state is None:
                scale = conv.packed(scale, cu_seqlens)
            else:
                scale, after[f"conv{i}"] = conv.carry(scale, cu_seqlens, state[f"conv{i}"])
        if self.gate is not None and self.norm is not None:
            gate = self.gate(time)
            time = self.norm(gate * time + (1 - gate) * scale)
        return scale, time, after

    def initial_state(self, count: int) -> dict[str, Tensor]:
        """What :meth:`forward` starts ``count`` sequences with: all zeros."""
        convs: Any = self.convs
        return {f"conv{i}": conv.initial_state(count) for i, conv in enumerate(convs)}


class TimeAwareSSDLayer(nn.Module):
    """``FeedForward(LayerNorm(x + dropout(SSD(x, scale))))``, with the residual where layers are stacked."""

    def __init__(self, config, heads: int, passes_on: bool):
        super().__init__()
        size, dropout_prob, backend = config["hidden_size"], config["dropout_prob"], config["ssm_backend"]
        self.mamba = Mamba2(
            size, config["d_state"], config["d_conv"], config["expand"], config["headdim"], backend
        )  # fmt: skip
        self.time = None
        if config["time_aware"]:
            self.time = TimeScale(heads, config["d_conv"], config["time_dropout_prob"], passes_on, backend)
        self.dropout = nn.Dropout(dropout_prob)
        self.norm = nn.LayerNorm(size, eps=1e-12)
        self.feed_forward = FeedForward(size, dropout_prob)
        self.stacked = config["num_layers"] > 1

    def forward(
        self, x: Tensor, time: Tensor | None, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """See :meth:`recbole_ssm.layers.Mamba.forward`; with times ``[T, H]`` in and out, where they are read."""
        scale = None
        if self.time is not None and time is not None:
            scale, time, _ = self.time(time, cu_seqlens)
        return self._out(self.mamba(x, cu_seqlens, read, last, scale), select_rows(x, read)), time

    def initial_state(self, count: int) -> dict[str, Tensor]:
        """See :meth:`recbole_ssm.layers.Mamba.initial_state`."""
        states = {"mamba": self.mamba.initial_state(count)}
        return of_layers(states if self.time is None else {**states, "time": self.time.initial_state(count)})

    def carry(
        self, x: Tensor, time: Tensor | None, cu_seqlens: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """See :meth:`recbole_ssm.layers.Mamba.carry`."""
        scale, after = None, {}
        if self.time is not None and time is not None:
            scale, time, after["time"] = self.time(time, cu_seqlens, by_layer(state, "time"))
        scanned, after["mamba"] = self.mamba.carry(x, cu_seqlens, by_layer(state, "mamba"), scale)
        return self._out(scanned, x), time, of_layers(after)

    def _out(self, scanned: Tensor, x: Tensor) -> Tensor:
        hidden = self.dropout(scanned)
        return self.feed_forward(self.norm(hidden + x if self.stacked else hidden))


@register_model(TiM4RecSettings)
class TiM4Rec(CarryingRecommender):
    """Stacked SSD layers that read the time between interactions, and feed-forward layers."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        size, n_layers = self.hidden_size, config["num_layers"]
        heads = config["expand"] * size // config["headdim"]
        self.item_embedding = nn.Embedding(self.n_items, size)
        self.make_time_embeddings()
        self.dropout = nn.Dropout(config["dropout_prob"])
        self.norm = nn.LayerNorm(size, eps=1e-12)
        self.into_time = nn.Linear(1, heads) if config["time_aware"] else None
        self.layers = nn.ModuleList(TimeAwareSSDLayer(config, heads, i + 1 < n_layers) for i in range(n_layers))
        self.apply(init_weights)
        self._begin_times()

    def _begin_times(self) -> None:
        """Start the maps of times as torch does: a product of three with deviations of 0.02 would say nothing."""
        layers: Any = self.layers
        for part in (self.into_time, *(layer.time for layer in layers)):
            for module in () if part is None else part.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()

    @classmethod
    def time_columns(cls, config) -> tuple[str, ...]:
        """See :meth:`PackedRecommender.time_columns`."""
        return (*super().time_columns(config), *(("gap",) if config["time_aware"] else ()))

    def encode(self, items: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False) -> Tensor:
        """See :meth:`PackedRecommender.encode`."""
        hidden, time = self._start(items)
        for layer in self.layers[:-1]:
            hidden, time = layer(hidden, time, cu_seqlens)
        return self.layers[-1](hidden, time, cu_seqlens, read, last)[0]

    def _start(self, items: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the first layer reads: items ``[T, d]`` and, where it reads them, their times ``[T, H]``."""
        hidden = self.norm(self.dropout(self.embed(items)))
        if self.into_time is None:
            return hidden, None
        gap = self.column(items, "gap").to(self.norm.weight.dtype)
        return hidden, self.into_time(torch.log1p(gap)[:, None] / LOG_OF_A_DAY)

    def carrying(self) -> list[Any]:
        """See :meth:`CarryingRecommender.carrying`."""
        return list(self.layers)

    def carry(
        self, items: Tensor, cu_seqlens: Tensor | None, states: list[dict[str, Tensor]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`CarryingRecommender.carry`."""
        hidden, time = self._start(items)
        after: dict[int, dict[str, Tensor]] = {}
        layers: Any = self.layers
        for i, layer in enumerate(layers):
            hidden, time, after[i] = layer.carry(hidden, time, cu_seqlens, states[i])
        return hidden, of_layers(after)
