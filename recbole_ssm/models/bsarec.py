"""BSARec: An Attentive Inductive Bias for Sequential Recommendation beyond the Self-Attention (arXiv 2312.10325).

Section 4.1: item and position embedding, LayerNorm, dropout. Section 4.2: a layer mixes ``alpha`` parts of a frequency
filter and ``1 - alpha`` parts of causal self-attention, then a feed-forward network. Section 4.3: scores are inner
products with the item embeddings.
"""

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from recbole_ssm.layers import FeedForward
from recbole_ssm.models.base import PackedRecommender, init_weights
from recbole_ssm.ops.packing import positions, select_rows, sequence_ids
from recbole_ssm.registry import register_model
from recbole_ssm.settings import LossType, ModelSettings, TrainMode, Whole, divides, setting


def low_pass(length: int, c: int) -> Tensor:
    """What keeps of a row its mean and its ``c // 2`` lowest frequencies, as a matrix ``[length, length]``.

    Fourier transform, zeros above these frequencies and back are one linear map of the row's places, and of a row this
    short the product with its matrix is the faster way; one place of the result is the product with one of its rows.
    """
    spectrum = torch.fft.rfft(torch.eye(length, dtype=torch.float64), dim=0)
    spectrum[c // 2 + 1 :] = 0
    return torch.fft.irfft(spectrum, n=length, dim=0).float()


class BSARecLayer(nn.Module):
    """Frequency filter and self-attention side by side, then a feed-forward network.

    ::

        filtered = LayerNorm(x + dropout(low(x) + beta^2 (x - low(x))))           beta: a number a feature
        attended = LayerNorm(x + dropout(W_o softmax(Q K^T / sqrt(D_k)) V))
        out      = FeedForward(alpha filtered + (1 - alpha) attended)
    """

    def __init__(self, config):
        super().__init__()
        size, dropout_prob = config["hidden_size"], config["dropout_prob"]
        self.alpha, self.n_heads = config["alpha"], config["n_heads"]
        self.sqrt_beta = nn.Parameter(torch.randn(size))
        self.filter_norm = nn.LayerNorm(size, eps=1e-12)
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size, bias=False)  # which would add the same to all scores of a query
        self.value = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)
        self.attn_dropout_prob = config["attn_dropout_prob"]
        self.attention_norm = nn.LayerNorm(size, eps=1e-12)
        self.dropout = nn.Dropout(dropout_prob)
        self.feed_forward = FeedForward(size, dropout_prob, inner_dropout=False)

    def forward(self, x: Tensor, low: Tensor, seen: Tensor) -> Tensor:
        """The last ``n`` places of the layer's output.

        Args:
            x: ``[S, L, d]``.
            low: the last rows of :func:`low_pass`, ``[n, L]``.
            seen: which places each of the last ``n`` attends to, bool ``[S, 1, n, L]``.

        Returns:
            ``[S, n, d]``.
        """
        asked = x[:, -len(low) :]
        passed = low @ x
        filtered = self.filter_norm(asked + self.dropout(passed + self.sqrt_beta**2 * (asked - passed)))
        attended = self.attention_norm(asked + self.dropout(self._attention(asked, x, seen)))
        return self.feed_forward(torch.lerp(attended, filtered, self.alpha))

    def _attention(self, asked: Tensor, x: Tensor, seen: Tensor) -> Tensor:
        query, key, value = (
            rows.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for rows in (self.query(asked), self.key(x), self.value(x))
        )
        dropout = self.attn_dropout_prob if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, dropout_p=dropout)
        return self.out_proj(context.transpose(1, 2).flatten(2))


class BSARecSettings(ModelSettings):
    """BSARec (arXiv 2312.10325). 'released': the settings in the authors' code for amazon-beauty."""

    hidden_size: int = setting(64, "Number of features in the hidden state.", "Released.", ge=1, le=2**16, fixed=True)
    num_layers: int = setting(2, "Number of layers.", "Released.", ge=1, le=1024, fixed=True)
    n_heads: int = setting(
        1, "Number of attention heads; must divide hidden_size.", "Released.", ge=1, le=2**16, fixed=True
    )
    alpha: float = setting(
        0.7, "Share of the frequency filter in a layer's output; the rest is attention's.", "Released.",
        ge=0, le=1, fixed=True,
    )  # fmt: skip
    c: int = setting(
        5, "Which frequencies count as low: that of the mean and the c // 2 above it.", "Released.",
        ge=0, le=2**16, fixed=True,
    )  # fmt: skip
    dropout_prob: float = setting(0.5, "Dropout rate of the hidden states.", "Released.", ge=0, lt=1)
    attn_dropout_prob: float = setting(0.5, "Dropout rate of the attention weights.", "Released.", ge=0, lt=1)
    train_mode: TrainMode = setting(
        "prefix",
        "'prefix': a row for each target, the only one that there is: a filter reads its whole row.",
        section="Training",
    )
    train_batch_size: Whole = setting(256, "Targets a step.", "Released.")
    learning_rate: float = setting(0.0005, "Learning rate.", "Released.", ge=1e-12)
    loss_type: LossType = setting("CE", "The loss; all but CE draw negatives.", "Released.")

    @model_validator(mode="after")
    def _rows(self):
        if self.train_mode == "sequence":
            raise ValueError("BSARec's filter reads the whole of a target's row: set train_mode: prefix.")
        return divides(self, "n_heads", "hidden_size", self.hidden_size)


@register_model(BSARecSettings)
class BSARec(PackedRecommender):
    """Self-attention with a frequency filter beside it, on rows with their padding in front.

    The filter reads all places of a row, its padding and what comes later among them; so sequences are laid out again
    to ``MAX_ITEM_LIST_LENGTH`` places, whatever they came in, and the model trains on a row for each target.
    """

    one_pass = False

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        size = self.hidden_size
        # The padding, which is embedded as well, learns by its place among all items' scores alone.
        self.item_embedding = nn.Embedding(self.n_items, size, padding_idx=0)
        self.position_embedding = nn.Embedding(self.max_seq_length, size)
        self.make_time_embeddings()
        self.norm = nn.LayerNorm(size, eps=1e-12)
        self.dropout = nn.Dropout(config["dropout_prob"])
        self.layers = nn.ModuleList(BSARecLayer(config) for _ in range(config["num_layers"]))
        self.register_buffer("low_pass", low_pass(self.max_seq_length, config["c"]), persistent=False)
        self.apply(init_weights)

    def encode(self, items: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False) -> Tensor:
        """See :meth:`PackedRecommender.encode`."""
        sequence, first = sequence_ids(cu_seqlens), self.max_seq_length - cu_seqlens.diff()
        place = positions(cu_seqlens) + first.index_select(0, sequence)
        padded = items.new_zeros(len(first), self.max_seq_length, *items.shape[1:])
        hidden = self.of_rows(padded.index_put((sequence, place), items), first, last)
        return hidden[:, 0] if last else select_rows(hidden[sequence, place], read)

    def of_rows(self, items: Tensor, first: Tensor, last: bool) -> Tensor:
        """Hidden states of rows ``[S, L]`` (with columns ``[S, L, 1 + C]``) whose items begin at the places ``first``.

        Returns:
            ``[S, L, d]``, with ``last`` that of the last place alone, ``[S, 1, d]``.
        """
        hidden = self.embed(items) + self.position_embedding.weight
        hidden = self.dropout(self.norm(hidden))
        seen = self._seen(first)
        for layer in self.layers[:-1]:
            hidden = layer(hidden, self.low_pass, seen)
        asking = slice(-1, None) if last else slice(None)
        return self.layers[-1](hidden, self.low_pass[asking], seen[:, :, asking])

    def _seen(self, first: Tensor) -> Tensor:
        """Which places each place attends to, bool ``[S, 1, L, L]``, where items begin at the places ``first [S]``.

        An item attends to those up to itself; padding, as in the released code, to all there is: its own and what
        comes later is hidden from it no more than the rest.
        """
        place = torch.arange(self.max_seq_length, device=first.device)
        real = place >= first[:, None]
        causal = place <= place[:, None]
        return ((causal & real[:, None]) | ~real[:, :, None])[:, None]

    def items_read(self, item_seq_len: Tensor) -> Tensor:
        """See :meth:`PackedRecommender.items_read`; each row has the maximum length."""
        return torch.full_like(item_seq_len, self.max_seq_length)
