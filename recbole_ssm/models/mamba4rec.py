"""Mamba4Rec: Towards Efficient Sequential Recommendation with Selective State Space Models (arXiv 2403.03900).

Section 3.2: item embedding, dropout, LayerNorm. Section 3.3: Mamba layers (residual only where stacked), each followed
by a feed-forward network. Section 3.4: scores are inner products with the item embeddings.
"""

from typing import Any

from torch import Tensor, nn

from recbole_ssm.layers import FeedForward, MambaLayer
from recbole_ssm.layers.blocks import BlockSettings
from recbole_ssm.models.base import init_weights
from recbole_ssm.models.stepping import CarryingRecommender, of_layers
from recbole_ssm.registry import register_model
from recbole_ssm.settings import LossType, setting


class Mamba4RecSettings(BlockSettings):
    """Mamba4Rec (arXiv 2403.03900). All values are the paper's settings for ml-1m."""

    hidden_size: int = setting(64, "Number of features in the hidden state.", ge=1, le=2**16, fixed=True)
    num_layers: int = setting(
        1, "Number of Mamba layers; with more than one they get residual connections.", ge=1, le=1024, fixed=True
    )
    dropout_prob: float = setting(0.2, "Dropout rate.", "Paper: 0.2 on ml-1m, 0.4 on the Amazon sets.", ge=0, lt=1)
    d_state: int = setting(32, "SSM state expansion factor.", ge=1, le=4096, fixed=True)
    d_conv: int = setting(4, "Local convolution width.", ge=1, le=8, fixed=True)
    expand: int = setting(2, "Block expansion factor.", ge=1, le=64, fixed=True)
    loss_type: LossType = setting("CE", "The loss; all but CE draw negatives.")


@register_model(Mamba4RecSettings)
class Mamba4Rec(CarryingRecommender):
    """Stacked Mamba and feed-forward layers over item embeddings."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        size, dropout_prob, n_layers = self.hidden_size, config["dropout_prob"], config["num_layers"]
        self.item_embedding = nn.Embedding(self.n_items, size)
        self.make_time_embeddings()
        self.dropout = nn.Dropout(dropout_prob)
        self.norm = nn.LayerNorm(size, eps=1e-12)
        self.mamba_layers = nn.ModuleList(
            MambaLayer(
                size, config["d_state"], config["d_conv"], config["expand"], dropout_prob, n_layers > 1,
                config["ssm_backend"], config["ssm_block"], config["headdim"], config["filter_share"],
            )
            for _ in range(n_layers)
        )  # fmt: skip
        self.feed_forwards = nn.ModuleList(FeedForward(size, dropout_prob) for _ in range(n_layers))
        self.apply(init_weights)

    def encode(self, items: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False) -> Tensor:
        """See :meth:`PackedRecommender.encode`."""
        hidden = self.norm(self.dropout(self.embed(items)))
        final = len(self.mamba_layers) - 1
        for i, (mamba, feed_forward) in enumerate(zip(self.mamba_layers, self.feed_forwards, strict=True)):
            hidden = feed_forward(mamba(hidden, cu_seqlens, *((read, last) if i == final else ())))
        return hidden

    def carrying(self) -> list[Any]:
        """See :meth:`CarryingRecommender.carrying`."""
        return list(self.mamba_layers)

    def carry(
        self, items: Tensor, cu_seqlens: Tensor | None, states: list[dict[str, Tensor]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`CarryingRecommender.carry`."""
        hidden = self.norm(self.embed(items))
        after: dict[int, dict[str, Tensor]] = {}
        blocks: Any = zip(self.mamba_layers, self.feed_forwards, strict=True)
        for i, (mamba, feed_forward) in enumerate(blocks):
            hidden, after[i] = mamba.carry(hidden, cu_seqlens, states[i])
            hidden = feed_forward(hidden)
        return hidden, of_layers(after)
