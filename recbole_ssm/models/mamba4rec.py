"""Mamba4Rec: Towards Efficient Sequential Recommendation with Selective State Space Models (arXiv 2403.03900).

Section 3.2: item embedding, dropout, LayerNorm. Section 3.3: Mamba layers (residual only where stacked), each followed
by a feed-forward network. Section 3.4: scores are inner products with the item embeddings.
"""

from torch import Tensor, nn

from recbole_ssm.layers import FeedForward, MambaLayer
from recbole_ssm.models.base import PackedRecommender, init_weights


class Mamba4Rec(PackedRecommender):
    """Stacked Mamba and feed-forward layers over item embeddings."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        size, dropout_prob, n_layers = self.hidden_size, config["dropout_prob"], config["num_layers"]
        self.item_embedding = nn.Embedding(self.n_items, size)
        self.dropout = nn.Dropout(dropout_prob)
        self.norm = nn.LayerNorm(size, eps=1e-12)
        self.mamba_layers = nn.ModuleList(
            MambaLayer(
                size, config["d_state"], config["d_conv"], config["expand"], dropout_prob, n_layers > 1,
                config["ssm_backend"],
            )
            for _ in range(n_layers)
        )  # fmt: skip
        self.feed_forwards = nn.ModuleList(FeedForward(size, dropout_prob) for _ in range(n_layers))
        self.apply(init_weights)

    def encode(self, items: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False) -> Tensor:
        """See :meth:`PackedRecommender.encode`."""
        hidden = self.norm(self.dropout(self.item_embedding(items)))
        final = len(self.mamba_layers) - 1
        for i, (mamba, feed_forward) in enumerate(zip(self.mamba_layers, self.feed_forwards, strict=True)):
            hidden = feed_forward(mamba(hidden, cu_seqlens, *((read, last) if i == final else ())))
        return hidden
