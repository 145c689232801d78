"""SSD4Rec: A Structured State Space Duality Model for Efficient Sequential Recommendation (arXiv 2409.01192).

Input construction (section 3.2): the sequences of a batch are laid end to end with a register that marks whose row is
whose; in training a share ``rho`` of the input items is masked. Bi-SSD layer (section 3.3):
``y = SSD(x) + beta SSD(flip(x)) + x`` with one set of weights for both directions, then LayerNorm, dropout and a
position-wise feed-forward network. The last position's state scores the items (section 3.4).
"""

import torch
from torch import Tensor, nn

from recbole_ssm.errors import UserError
from recbole_ssm.layers import FeedForward, Mamba2
from recbole_ssm.models.base import PackedRecommender, init_weights
from recbole_ssm.ops.packing import cu_seqlens_from_lengths, flip_rows, last_rows, pad, rows, single_rows

MASK_ITEM = 0
BACKWARD_STREAMS = ("final", "aligned")


class BiSSDLayer(nn.Module):
    """Bidirectional state-space-duality layer with weights shared between the directions.

    ``backward_stream`` says what a position receives from the backward scan. ``final``, as the authors' released code
    reads it: the scan's states stay in reading order, so the last position receives the state after the whole
    sequence read in reverse. ``aligned``: they are flipped back, so each position receives what lies after it, and
    the last position receives a scan of itself alone.
    """

    def __init__(self, config):
        super().__init__()
        size, dropout_prob = config["hidden_size"], config["dropout_prob"]
        self.mamba = Mamba2(
            size, config["d_state"], config["d_conv"], config["expand"], config["headdim"], config["ssm_backend"]
        )
        self.beta = config["beta"]
        self.bidirectional = config["bidirectional"]
        self.flip_back = config["backward_stream"] == "aligned"
        self.norm = nn.LayerNorm(size, eps=1e-12)
        self.dropout = nn.Dropout(dropout_prob)
        self.feed_forward = FeedForward(size, dropout_prob, dropout_last=True)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False, each_prefix: bool = False
    ) -> Tensor:
        """See :meth:`recbole_ssm.layers.Mamba.forward` for shapes.

        With ``each_prefix`` a row gets what the last row of its prefix would get: of what comes after it, nothing.
        """
        hidden = self.mamba(x, cu_seqlens, read, last) + rows(x, read)
        if self.bidirectional and each_prefix:
            hidden = hidden + self.beta * self._backward_of_prefixes(x, cu_seqlens, read)
        elif self.bidirectional:
            hidden = hidden + self.beta * self._backward(x, cu_seqlens, read, last)
        return self.feed_forward(self.dropout(self.norm(hidden)))

    def _backward(self, x: Tensor, cu_seqlens: Tensor, read: Tensor | None, last: bool) -> Tensor:
        flip = flip_rows(cu_seqlens)
        if self.flip_back:
            read, last = rows(flip, read), False
        return self.mamba(rows(x, flip), cu_seqlens, read, last)

    def _backward_of_prefixes(self, x: Tensor, cu_seqlens: Tensor, read: Tensor | None) -> Tensor:
        if not self.flip_back:
            return self.mamba.read_prefixes_in_reverse(x, cu_seqlens, read)
        alone = rows(x, read)
        return self.mamba(alone, single_rows(len(alone), x.device))


class SSD4Rec(PackedRecommender):
    """Bi-SSD layers over masked, variable-length item sequences.

    A position of a bidirectional stack sees later ones, so it trains on one target a row (``train_mode: prefix``). Of a
    single layer one pass gives what each prefix alone would, so it can train on every position at once, too; the mask
    is drawn once a window then, and shared by its prefixes.
    """

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        if config["backward_stream"] not in BACKWARD_STREAMS:
            raise UserError(
                f"backward_stream is {config['backward_stream']!r}: choose one of {', '.join(BACKWARD_STREAMS)}."
            )
        self.var_len, self.mask_ratio = config["var_len"], config["mask_ratio"]
        self.one_pass = self.var_len and (config["num_layers"] == 1 or not config["bidirectional"])
        self.item_embedding = nn.Embedding(self.n_items, self.hidden_size)  # row 0 embeds the mask
        self.dropout = nn.Dropout(config["dropout_prob"])
        self.norm = nn.LayerNorm(self.hidden_size, eps=1e-12) if config["norm_embedding"] else None
        self.layers = nn.ModuleList(BiSSDLayer(config) for _ in range(config["num_layers"]))
        self.apply(init_weights)

    def encode(self, items: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False) -> Tensor:
        """See :meth:`PackedRecommender.encode`; with ``var_len`` off only the last rows can be read."""
        if not self.var_len:
            if not last:
                raise UserError("var_len: False pads every sequence, whose last row alone can be read then.")
            items, cu_seqlens = self._fix_length(items, cu_seqlens)
            read = last_rows(cu_seqlens)
        if self.training and self.mask_ratio:
            items = items.masked_fill(torch.rand(items.shape, device=items.device) < self.mask_ratio, MASK_ITEM)
        hidden = self.item_embedding(items)
        if self.norm is not None:
            hidden = self.norm(self.dropout(hidden))
        for layer in self.layers[:-1]:
            hidden = layer(hidden, cu_seqlens)
        return self.layers[-1](hidden, cu_seqlens, read, last, each_prefix=self.one_pass and not last)

    def items_read(self, item_seq_len: Tensor) -> Tensor:
        """See :meth:`PackedRecommender.items_read`; with ``var_len`` off each row has the maximum length."""
        return item_seq_len if self.var_len else torch.full_like(item_seq_len, self.max_seq_length)

    def _fix_length(self, items: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """The fixed-length input that the paper compares with: masks in front, up to the maximum length."""
        reversed_items = pad(items[flip_rows(cu_seqlens)], cu_seqlens)
        missing = self.max_seq_length - reversed_items.shape[1]
        fixed = nn.functional.pad(reversed_items, (0, max(0, missing)), value=MASK_ITEM).flip(1)
        lengths = torch.full((len(fixed),), fixed.shape[1], device=items.device)
        return fixed.flatten(), cu_seqlens_from_lengths(lengths)
