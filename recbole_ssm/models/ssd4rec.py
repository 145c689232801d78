"""SSD4Rec: A Structured State Space Duality Model for Efficient Sequential Recommendation (arXiv 2409.01192).

Input construction (section 3.2): the sequences of a batch are laid end to end with a register that marks whose row is
whose; in training a share ``rho`` of the input items is masked. Bi-SSD layer (section 3.3):
``y = SSD(x) + beta SSD(flip(x)) + x`` with one set of weights for both directions, then LayerNorm, dropout and a
position-wise feed-forward network. The last position's state scores the items (section 3.4).
"""

from functools import lru_cache
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from recbole_ssm.errors import UserError
from recbole_ssm.layers import FeedForward, Mamba2
from recbole_ssm.models.base import init_weights
from recbole_ssm.models.stepping import CarryingRecommender, of_layers
from recbole_ssm.ops.both_ways import both_ways
from recbole_ssm.ops.packing import Borders, flip_rows, know, last_rows, pad, select_rows, single_rows
from recbole_ssm.registry import register_model
from recbole_ssm.settings import LossType, ModelSettings, TrainMode, Whole, divides, setting

MASK_ITEM = 0


@lru_cache(maxsize=None)  # never let go: a CUDA graph goes on reading what it was captured with
@torch.inference_mode(False)
def equal_lengths(count: int, length: int, device: torch.device) -> Tensor:
    """Borders of ``count`` sequences of ``length`` rows each, int32 ``[count+1]``; not to be written to."""
    cu_seqlens = length * torch.arange(count + 1, dtype=torch.int32, device=device)
    know(cu_seqlens, Borders(torch.full((count,), length), device))
    return cu_seqlens


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
        self, x: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False,
        streams: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """See :meth:`recbole_ssm.layers.Mamba.forward` for shapes.

        ``streams`` are the rows as :func:`~recbole_ssm.ops.both_ways.both_ways` lays them out. Without, a bidirectional
        layer gives each row what the last row of its prefix would get: of what comes after it, nothing.
        """
        residual = select_rows(x, read)
        if self.bidirectional and streams is not None:
            ahead, back = self._both_ways(x, cu_seqlens, streams, read, last)
            # The projection is linear, so that one serves both.
            hidden = self.mamba.out_proj(torch.add(ahead, back, alpha=self.beta)) + residual
        else:
            hidden = self.mamba(x, cu_seqlens, read, last) + residual
            if self.bidirectional:
                hidden = hidden + self.beta * self._backward_of_prefixes(x, cu_seqlens, read)
        return self.feed_forward(self.dropout(self.norm(hidden)))

    def _both_ways(
        self, x: Tensor, cu_seqlens: Tensor, streams: tuple[Tensor, Tensor], read: Tensor | None, last: bool
    ) -> tuple[Tensor, ...]:
        """What each direction gives the rows ``read``, before the projection; ``[R, H P]`` both."""
        if self.flip_back and last:  # a last row comes first in reverse, and sees itself alone
            alone = select_rows(x, read)
            ahead = self.mamba.inner(x, cu_seqlens, read, last)
            return ahead, self.mamba.inner(alone, single_rows(len(alone), x.device))
        order, both = streams
        if self.flip_back:
            ahead, back = self.mamba.inner(x, both, order=order).chunk(2)
            return select_rows(ahead, read), back.index_select(0, select_rows(order[len(x) :], read))
        read = None if read is None else torch.cat([read, read + len(x)])
        return self.mamba.inner(x, both, read, last, order).chunk(2)

    def _backward_of_prefixes(self, x: Tensor, cu_seqlens: Tensor, read: Tensor | None) -> Tensor:
        if not self.flip_back:
            return self.mamba.read_prefixes_in_reverse(x, cu_seqlens, read)
        alone = select_rows(x, read)
        return self.mamba(alone, single_rows(len(alone), x.device))


class SSD4RecSettings(ModelSettings):
    """SSD4Rec (arXiv 2409.01192). 'released': the settings in the authors' code for ml-1m; for amazon-beauty and
    amazon-video-games these are num_layers 1, dropout_prob 0.4, norm_embedding False and mask_ratio 0.2 and 0.1; for
    kuairand num_layers 2, dropout_prob 0.2, norm_embedding True and mask_ratio 0.2.
    """

    hidden_size: int = setting(
        256, "Number of features in the hidden state.", "Released.", section="Size", ge=1, le=2**16, fixed=True
    )
    num_layers: int = setting(2, "Number of Bi-SSD layers.", "Released.", ge=1, le=1024, fixed=True)
    dropout_prob: float = setting(0.2, "Dropout rate.", "Released.", ge=0, lt=1)
    norm_embedding: bool = setting(
        True, "Whether embeddings pass dropout and LayerNorm first.", "Released.", fixed=True
    )
    var_len: bool = setting(
        True,
        "Variable-length sequences laid end to end; False pads each to MAX_ITEM_LIST_LENGTH with masks in front.",
        "Released.", section="Input construction (section 3.2)", fixed=True,
    )  # fmt: skip
    mask_ratio: float = setting(
        0.1, "rho, the share of input items masked in training; 0 is the ablation 'w/o mask'.", "Released.", ge=0, lt=1
    )
    d_state: int = setting(
        64, "SSM state expansion factor.", "Released.", section="Bi-SSD layer (section 3.3)", ge=1, le=4096, fixed=True
    )
    d_conv: int = setting(4, "Local convolution width.", "Released.", ge=1, le=8, fixed=True)
    expand: int = setting(2, "Block expansion factor.", "Released.", ge=1, le=64, fixed=True)
    headdim: int = setting(
        16, "Width of an SSD head; must divide expand * hidden_size.", "Released.", ge=1, le=2**16, fixed=True
    )
    bidirectional: bool = setting(True, "Ablation 'w/o bidirection' when False; the model is causal then.", fixed=True)
    beta: float = setting(0.1, "Weight of the backward stream.", "Released.", ge=0, le=1000, fixed=True)
    backward_stream: Literal["final", "aligned"] = setting(
        "final",
        "What a position receives from the backward scan. 'final': the last one receives the state after the whole "
        "sequence in reverse. 'aligned': each receives what lies after it.",
        "Released: 'final'.", fixed=True,
    )  # fmt: skip
    train_mode: TrainMode = setting(
        "prefix",
        "'prefix': a row for each target. 'sequence': whole histories, for num_layers: 1 or bidirectional: False; the "
        "prefixes of a window share one draw of the mask then.",
        section="Training",
    )
    train_batch_size: Whole = setting(1024, "Targets a step.", "Released.")
    loss_type: LossType = setting("CE", "The loss; all but CE draw negatives.", "Released.")

    @model_validator(mode="after")
    def _sizes(self):
        divides(self, "headdim", "expand * hidden_size =", self.expand * self.hidden_size)
        if self.train_mode == "sequence" and self.bidirectional and self.num_layers > 1:
            raise ValueError(
                "SSD4Rec with several layers that read both ways cannot learn from every position at once: set "
                "num_layers: 1, bidirectional: False or train_mode: prefix."
            )
        if self.train_mode == "sequence" and not self.var_len:
            raise ValueError("var_len: False pads a row for each target: set train_mode: prefix.")
        return self


@register_model(SSD4RecSettings)
class SSD4Rec(CarryingRecommender):
    """Bi-SSD layers over masked, variable-length item sequences.

    A position of a bidirectional stack sees later ones, so it trains on one target a row (``train_mode: prefix``). Of a
    single layer one pass gives what each prefix alone would, so it can train on every position at once, too; the mask
    is drawn once a window then, and shared by its prefixes.
    """

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.var_len, self.mask_ratio = config["var_len"], config["mask_ratio"]
        self.bidirectional = config["bidirectional"]
        self.steps = self.var_len and not self.bidirectional  # what comes later changes nothing that it has read
        self.one_pass = self.var_len and (config["num_layers"] == 1 or not self.bidirectional)
        self.item_embedding = nn.Embedding(self.n_items, self.hidden_size)  # row 0 embeds the mask
        self.make_time_embeddings()
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
            items = self._masked(items)
        hidden = self.embed(items)
        if self.norm is not None:
            hidden = self.norm(self.dropout(hidden))
        streams = both_ways(cu_seqlens) if self.bidirectional and (last or not self.one_pass) else None
        for layer in self.layers[:-1]:
            hidden = layer(hidden, cu_seqlens, streams=streams)
        return self.layers[-1](hidden, cu_seqlens, read, last, streams)

    def carrying(self) -> list[Any]:
        """See :meth:`CarryingRecommender.carrying`."""
        layers: Any = self.layers
        return [layer.mamba for layer in layers]

    def carry(
        self, items: Tensor, cu_seqlens: Tensor | None, states: list[dict[str, Tensor]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`CarryingRecommender.carry`."""
        hidden = self.embed(items)
        if self.norm is not None:
            hidden = self.norm(hidden)
        after: dict[int, dict[str, Tensor]] = {}
        layers: Any = self.layers
        for i, layer in enumerate(layers):
            scanned, after[i] = layer.mamba.carry(hidden, cu_seqlens, states[i])
            hidden = layer.feed_forward(layer.norm(scanned + hidden))
        return hidden, of_layers(after)

    def items_read(self, item_seq_len: Tensor) -> Tensor:
        """See :meth:`PackedRecommender.items_read`; with ``var_len`` off each row has the maximum length."""
        return item_seq_len if self.var_len else torch.full_like(item_seq_len, self.max_seq_length)

    def _masked(self, items: Tensor) -> Tensor:
        """A share ``rho`` of the items masked; their times stay."""
        ids = self.ids(items)
        masked = ids.masked_fill(torch.rand(ids.shape, device=ids.device) < self.mask_ratio, MASK_ITEM)
        return torch.cat([masked[:, None], items[:, 1:]], 1) if self.columns else masked

    def _fix_length(self, items: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """The fixed-length input that the paper compares with: masks in front, up to the maximum length."""
        reversed_items = pad(items[flip_rows(cu_seqlens)], cu_seqlens)
        missing = self.max_seq_length - reversed_items.shape[1]
        per_item = (0, 0) * (items.dim() - 1)
        fixed = nn.functional.pad(reversed_items, (*per_item, 0, max(0, missing)), value=MASK_ITEM).flip(1)
        return fixed.flatten(0, 1), equal_lengths(*fixed.shape[:2], items.device)
