"""eSASRec: Enhancing Transformer-based Recommendations in a Modular Fashion (arXiv 2508.06450).

SASRec's training, the next item at every position, with the layers of LiGR (arXiv 2502.03417) and a sampled softmax.
docs/models.md gives the equations and says where this differs from the authors' code.
"""

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from recbole_ssm.models.sequence_mode import PLACES_PER_BLOCK
from recbole_ssm.models.stepping import MOST_CARRIED, AttendingRecommender
from recbole_ssm.ops.packing import (
    block_rows,
    borders,
    length_blocks,
    pad,
    positions,
    ring_places,
    select_rows,
    sequence_ids,
    sequence_lengths,
)
from recbole_ssm.registry import register_model
from recbole_ssm.settings import LossType, ModelSettings, divides, setting


class CausalAttention(nn.Module):
    """``W_o softmax(Q K^T / sqrt(D_k)) V`` within each sequence, by torch's fused kernel on padded blocks.

    Args:
        hidden_size: width ``d``.
        n_heads: heads; must divide ``d``.
        dropout_prob: dropout rate of the attention weights.
    """

    def __init__(self, hidden_size: int, n_heads: int, dropout_prob: float):
        super().__init__()
        self.n_heads, self.dropout_prob = n_heads, dropout_prob
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.query_key_value.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False) -> Tensor:
        """See :meth:`recbole_ssm.layers.Mamba.forward` for shapes."""
        size = x.shape[1]
        if last:
            weight, bias = (part.split([size, 2 * size]) for part in self.query_key_value.parameters())
            query = F.linear(select_rows(x, read), weight[0], bias[0])
            context = self._context(query, F.linear(x, weight[1], bias[1]), cu_seqlens, last=True)
        else:
            query, key_value = self.query_key_value(x).split([size, 2 * size], -1)
            context = select_rows(self._context(query, key_value, cu_seqlens), read)
        return self.out_proj(context)

    def prefill(self, x: Tensor, cu_seqlens: Tensor, length: int) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`forward` where a row attends to the ``length`` latest, and what :meth:`step` goes on from.

        Returns:
            ``[T, d]``, and keys beside values, ``[S, length, 2 d]``. Row ``p`` of a sequence stands in place ``p``
            modulo ``length``.
        """
        query, key_value = self.query_key_value(x).split([x.shape[1], 2 * x.shape[1]], -1)
        context = self._context(query, key_value, cu_seqlens, window=length)
        kept, at = ring_places(cu_seqlens, length)
        ring = x.new_zeros(len(cu_seqlens) - 1, length, key_value.shape[1]).index_put(at, key_value[kept])
        return self.out_proj(context), {"key_value": ring}

    def step(self, x: Tensor, position: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """One more row ``[S, d]`` of each sequence, which had ``position [S]`` before; see :meth:`prefill`."""
        query, key_value = self.query_key_value(x).split([x.shape[1], 2 * x.shape[1]], -1)
        count, places = state["key_value"].shape[:2]
        ring = state["key_value"].index_put((torch.arange(count, device=x.device), position % places), key_value)
        seen = torch.arange(places, device=x.device) <= position[:, None]
        return self.out_proj(self._attend(query[:, None], ring, seen[:, None])[:, 0]), {"key_value": ring}

    def _context(
        self, query: Tensor, key_value: Tensor, cu_seqlens: Tensor, last: bool = False, window: int | None = None
    ) -> Tensor:
        """What queries get: those of all rows, ``[T, d]``, or with ``last`` those of the last rows, ``[S, d]``."""
        lengths = sequence_lengths(cu_seqlens)
        if not query.is_cpu:  # few launches count more there than places that nobody reads
            longest = borders(cu_seqlens).longest
            padded = pad(key_value, cu_seqlens)
            if last:
                real = torch.arange(longest, device=query.device) < lengths[:, None]
                return self._attend(query[:, None], padded, real[:, None])[:, 0]
            place = torch.add(positions(cu_seqlens), sequence_ids(cu_seqlens), alpha=longest)
            context = self._attend(pad(query, cu_seqlens), padded, self._window(longest, window, query.device))
            return context.flatten(0, 1).index_select(0, place)
        contexts, order = [], []
        for sequences in length_blocks(lengths, PLACES_PER_BLOCK):
            rows, real = block_rows(cu_seqlens, sequences)
            padded = key_value.index_select(0, rows.flatten()).unflatten(0, rows.shape)
            if last:
                contexts.append(self._attend(query.index_select(0, sequences)[:, None], padded, real[:, None])[:, 0])
                order.append(sequences)
            else:
                asked = query.index_select(0, rows.flatten()).unflatten(0, rows.shape)
                context = self._attend(asked, padded, self._window(rows.shape[1], window, query.device))
                contexts.append(context.flatten(0, 1).index_select(0, real.flatten().nonzero()[:, 0]))
                order.append(rows[real])
        return torch.cat(contexts).index_select(0, torch.cat(order).argsort())

    @staticmethod
    def _window(length: int, window: int | None, device: torch.device) -> Tensor | None:
        """Which of ``length`` places each attends to, bool ``[length, length]``; absent where all up to itself."""
        if window is None or window >= length:
            return None
        place = torch.arange(length, device=device)
        distance = place[:, None] - place
        return (distance >= 0) & (distance < window)

    def _attend(self, query: Tensor, key_value: Tensor, seen: Tensor | None) -> Tensor:
        """What queries ``[n, Q, d]`` get of values beside their keys, ``[n, L, 2 d]``: ``[n, Q, d]``.

        ``seen`` says of which, bool ``[n, Q, L]`` or ``[Q, L]``; absent, of all up to the query's own place.
        """
        q, k, v = (rows.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for rows in (query, *key_value.chunk(2, -1)))
        if seen is not None and seen.dim() == 3:
            seen = seen[:, None]
        dropout = self.dropout_prob if self.training else 0.0
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, is_causal=seen is None)
        return context.transpose(1, 2).flatten(2)


class LiGRLayer(nn.Module):
    """Attention and a feed-forward network, whose normed outputs pass a gate of the input.

    ::

        y   = x + sigmoid(W_1 x + b_1) * dropout(Attention(LayerNorm(x)))
        z   = LayerNorm(y)
        out = y + sigmoid(W_2 y + b_2) * dropout(W_5 dropout(SiLU(W_3 z) * W_4 z))
    """

    def __init__(self, config):
        super().__init__()
        size, inner_size, dropout_prob = config["hidden_size"], config["inner_size"], config["dropout_prob"]
        self.attention_norm = nn.LayerNorm(size)
        self.attention = CausalAttention(size, config["n_heads"], dropout_prob)
        self.attention_gate = nn.Linear(size, size)
        self.feed_forward_norm = nn.LayerNorm(size)
        self.expand = nn.Linear(size, 2 * inner_size, bias=False)
        self.contract = nn.Linear(inner_size, size, bias=False)
        self.feed_forward_gate = nn.Linear(size, size)
        self.dropout = nn.Dropout(dropout_prob)

    def forward(self, x: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False) -> Tensor:
        """See :meth:`recbole_ssm.layers.Mamba.forward` for shapes."""
        return self._output(select_rows(x, read), self.attention(self.attention_norm(x), cu_seqlens, read, last))

    def prefill(self, x: Tensor, cu_seqlens: Tensor, length: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`CausalAttention.prefill`."""
        attended, state = self.attention.prefill(self.attention_norm(x), cu_seqlens, length)
        return self._output(x, attended), state

    def step(self, x: Tensor, position: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`CausalAttention.step`."""
        attended, state = self.attention.step(self.attention_norm(x), position, state)
        return self._output(x, attended), state

    def _output(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + torch.sigmoid(self.attention_gate(x)) * self.dropout(attended)
        activated, linear = self.expand(self.feed_forward_norm(x)).chunk(2, -1)
        hidden = self.contract(self.dropout(F.silu(activated) * linear))
        return x + torch.sigmoid(self.feed_forward_gate(x)) * self.dropout(hidden)


class eSASRecSettings(ModelSettings):
    """eSASRec (arXiv 2508.06450). 'released': the authors' settings for ml-1m; for amazon-beauty these are num_layers 1
    and dropout_prob 0.2.
    """

    hidden_size: int = setting(64, "Number of features in the hidden state.", "Released.", ge=1, le=2**16, fixed=True)
    num_layers: int = setting(2, "Number of LiGR layers.", "Released.", ge=1, le=1024, fixed=True)
    n_heads: int = setting(
        1, "Number of attention heads; must divide hidden_size.", "Released.", ge=1, le=2**16, fixed=True
    )
    inner_size: int = setting(
        256, "Inner width of the feed-forward networks.", "Released: 4 times hidden_size.", ge=1, le=2**18, fixed=True
    )
    dropout_prob: float = setting(0.1, "Dropout rate, of the attention weights, too.", "Released.", ge=0, lt=1)
    loss_type: LossType = setting(
        "SampledSoftmax", "The loss; all but CE draw negatives.", "Released, with 256 negatives.", section="Training"
    )
    sampling_correction: bool = setting(
        False,
        "Whether loss_type SampledSoftmax corrects for how few negatives are drawn, as it does for the other models.",
        "Released: without.",
    )

    @model_validator(mode="after")
    def _heads(self):
        return divides(self, "n_heads", "hidden_size", self.hidden_size)


@register_model(eSASRecSettings)
class eSASRec(AttendingRecommender):
    """LiGR layers over item and position embeddings."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.steps = self.max_seq_length <= MOST_CARRIED
        self.corrects_samples = config["sampling_correction"]
        self.item_embedding = nn.Embedding(self.n_items, self.hidden_size)
        self.position_embedding = nn.Embedding(self.max_seq_length, self.hidden_size)
        self.make_time_embeddings()
        self.dropout = nn.Dropout(config["dropout_prob"])
        self.layers = nn.ModuleList(LiGRLayer(config) for _ in range(config["num_layers"]))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_normal_(parameter)

    def encode(self, items: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False) -> Tensor:
        """See :meth:`PackedRecommender.encode`."""
        (hidden,) = self.start(items, positions(cu_seqlens))
        for layer in self.layers[:-1]:
            hidden = layer(hidden, cu_seqlens)
        return self.layers[-1](hidden, cu_seqlens, read, last)

    def start(self, items: Tensor, position: Tensor) -> tuple[Tensor]:
        """See :meth:`AttendingRecommender.start`."""
        return (self.dropout(self.embed(items) + self.position_embedding(position)),)
