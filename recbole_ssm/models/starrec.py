"""STAR-Rec: Making Peace with Length Variance and Pattern Diversity in Sequential Recommendation (arXiv 2505.03484).

Section 3.1.1: item and position embedding. Sections 3.1.2 and 3.1.3: a preference-aware attention path and a
state-space path in parallel. Eq. 3: adaptive fusion. Section 3.1.5: a sequence-level mixture of experts predicts.
docs/models.md gives the equations and says where this differs from the paper's released code.
"""

from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from recbole_ssm.data.batch import SeenItems
from recbole_ssm.layers import MambaLayer, MixtureOfExperts, MovingAverage, PreferenceAwareAttention
from recbole_ssm.layers.blocks import BlockSettings
from recbole_ssm.layers.feed_forward import FeedForward
from recbole_ssm.layers.mixture_of_experts import Mixture, expert_diversity, load_balance
from recbole_ssm.layers.moving_average import with_filter
from recbole_ssm.models.base import init_weights
from recbole_ssm.models.stepping import MOST_CARRIED, AttendingRecommender, by_layer, of_layers
from recbole_ssm.ops.packing import positions, select_rows
from recbole_ssm.registry import register_model
from recbole_ssm.settings import MOST, Cosine, LossType, divides, setting


class DualPathLayer(nn.Module):
    """``gamma_1 PMA(x) + gamma_2 SSM(x)`` (eq. 3); either path can be left out.

    ``gamma`` is a softmax over two learned logits, which keeps the two weights comparable. With
    ``input_dependent_fusion`` the logits are a linear map of both paths' outputs, so each position has its own. With a
    ``filter_share`` ``s`` the output is ``1 - s`` parts of this and ``s`` parts of :class:`MovingAverage`. A
    feed-forward network follows if another layer does and ``feed_forward`` is set.

    Args:
        config: the model's settings.
        last: whether no layer follows.
    """

    def __init__(self, config, last: bool):
        super().__init__()
        stacked = config["num_layers"] > 1
        size, dropout_prob = config["hidden_size"], config["dropout_prob"]
        self.use_pma, self.use_ssm = config["use_pma"], config["use_ssm"]
        if self.use_pma:
            self.attention = PreferenceAwareAttention(
                size, config["n_heads"], dropout_prob, config["similarity_threshold"], config["use_similarity"],
                config["attention_window"], config["pma_residual"],
            )  # fmt: skip
        if self.use_ssm:
            self.ssm = MambaLayer(
                size, config["d_state"], config["d_conv"], config["expand"], dropout_prob, stacked,
                config["ssm_backend"], config["ssm_block"], config["headdim"],
            )  # fmt: skip
        self.fusion_gate = None
        if self.use_pma and self.use_ssm and config["input_dependent_fusion"]:
            self.fusion_gate = nn.Linear(2 * size, 2)
        elif self.use_pma and self.use_ssm:
            self.fusion_logits = nn.Parameter(torch.zeros(2))
        self.filter_share = config["filter_share"]
        self.filter = MovingAverage(size, dropout_prob, config["ssm_backend"]) if self.filter_share else None
        self.feed_forward = FeedForward(size, dropout_prob) if config["feed_forward"] and not last else None

    def forward(
        self, x: Tensor, item_embedding: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False
    ) -> Tensor:
        """See :meth:`PreferenceAwareAttention.forward` for shapes."""
        output = self._paths(x, item_embedding, cu_seqlens, read, last)
        filtered = None if self.filter is None else self.filter(x, cu_seqlens, read, last)
        return self._output(output, filtered)

    def _output(self, output: Tensor, filtered: Tensor | None) -> Tensor:
        output = with_filter(output, filtered, self.filter_share)
        return output if self.feed_forward is None else self.feed_forward(output)

    def _paths(self, x: Tensor, item_embedding: Tensor, cu_seqlens: Tensor, read: Tensor | None, last: bool) -> Tensor:
        """Eq. 3 of as many paths as there are."""
        if not self.use_ssm:
            return self.attention(x, item_embedding, cu_seqlens, read, last)
        if not self.use_pma:
            return self.ssm(x, cu_seqlens, read, last)
        if not last and not x.is_cpu:  # once, at the end: fewer launches count more there than rows that nobody reads
            fused = self.fused(self.attention(x, item_embedding, cu_seqlens), self.ssm(x, cu_seqlens))
            return select_rows(fused, read)
        return self.fused(
            self.attention(x, item_embedding, cu_seqlens, read, last), self.ssm(x, cu_seqlens, read, last)
        )

    def prefill(
        self, x: Tensor, item_embedding: Tensor, cu_seqlens: Tensor, length: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`PreferenceAwareAttention.prefill`."""
        attended, states = [], {}
        if self.use_pma:
            output, states["attention"] = self.attention.prefill(x, item_embedding, cu_seqlens, length)
            attended.append(output)
        start = {name: layer.initial_state(len(cu_seqlens) - 1) for name, layer in self._carrying().items()}
        return self._carried(x, cu_seqlens, of_layers(start), attended, states)

    def step(
        self, x: Tensor, item_embedding: Tensor, position: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`PreferenceAwareAttention.step`."""
        attended, states = [], {}
        if self.use_pma:
            kept = by_layer(state, "attention")
            output, states["attention"] = self.attention.step(x, item_embedding, position, kept)
            attended.append(output)
        return self._carried(x, None, state, attended, states)

    def _carrying(self) -> dict[str, Any]:
        """What carries a state of its own, by the state's name."""
        layers = {"ssm": self.ssm if self.use_ssm else None, "filter": self.filter}
        return {name: layer for name, layer in layers.items() if layer is not None}

    def _carried(
        self, x: Tensor, cu_seqlens: Tensor | None, state: dict[str, Tensor], attended: list[Tensor], states: dict
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The layer's output after what attention gave, and all states, which are put to those of it."""
        outputs = {}
        for name, layer in self._carrying().items():
            outputs[name], states[name] = layer.carry(x, cu_seqlens, by_layer(state, name))
        paths = attended + ([outputs["ssm"]] if self.use_ssm else [])
        output = self.fused(*paths) if len(paths) == 2 else paths[0]
        return self._output(output, outputs.get("filter")), of_layers(states)

    def fused(self, attended: Tensor, scanned: Tensor) -> Tensor:
        """Eq. 3: ``[R, d]`` of outputs ``[R, d]`` of the two paths, weighted by gamma_1 (attention) and gamma_2."""
        if self.fusion_gate is None:
            # One product with both, laid side by side.
            both = torch.stack([attended, scanned])
            return torch.mv(both.flatten(1).T, self.fusion_logits.softmax(0).to(both.dtype)).view_as(attended)
        gamma = self.fusion_gate(torch.cat([attended, scanned], -1)).softmax(-1)
        return gamma[:, :1] * attended + gamma[:, 1:] * scanned


class STARRecSettings(BlockSettings):
    """STAR-Rec (arXiv 2505.03484). 'paper': its published settings. Where no source is named, the choice is ours."""

    hidden_size: int = setting(
        64, "Number of features in the hidden state.", "Paper: 128; 64 is what its baselines use.",
        section="Size", ge=1, le=2**16, fixed=True,
    )  # fmt: skip
    num_layers: int = setting(
        1, "Number of dual-path layers.", "Paper, table 4: one layer is best.", ge=1, le=1024, fixed=True
    )
    feed_forward: bool = setting(
        False, "Whether a position-wise feed-forward network stands between two layers.", fixed=True
    )
    dropout_prob: float = setting(0.2, "Dropout rate.", "Paper.", ge=0, lt=1)
    use_position_embedding: bool = setting(
        True,
        "Whether to add a learned embedding of the position.",
        "Paper, section 3.1.1; its released code has none.",
        fixed=True,
    )
    use_ssm: bool = setting(
        True, "Ablation 'w/o SSM' when False.", section="State-space path (section 3.1.3)", fixed=True
    )
    d_state: int = setting(32, "SSM state expansion factor.", "Paper.", ge=1, le=4096, fixed=True)
    d_conv: int = setting(4, "Local convolution width.", "Paper.", ge=1, le=8, fixed=True)
    expand: int = setting(2, "Block expansion factor.", "Paper.", ge=1, le=64, fixed=True)
    use_pma: bool = setting(
        True, "Ablation 'w/o PMA' when False.", section="Preference-aware attention path (section 3.1.2)", fixed=True
    )
    n_heads: int = setting(
        8, "Number of attention heads; must divide hidden_size.", "Paper.", ge=1, le=2**16, fixed=True
    )
    use_similarity: bool = setting(True, "Ablation 'w/o similarity' when False: plain attention scores.", fixed=True)
    similarity_threshold: Cosine | list[Cosine] = setting(
        0.0, "Cosine below which two items count as unlike, for all heads or one a head.", "The released code's.",
        allowed="a number from -1 to 1, or a list of one a head", fixed=True,
    )  # fmt: skip
    pma_residual: bool = setting(
        True,
        "Whether the path adds its input, as the released code does. With one layer that is the last item itself, "
        "which then scores high.",
        fixed=True,
    )
    attention_window: int | None = setting(
        None, "Attend to at most this many latest positions; all when empty.", ge=1, le=MOST, fixed=True
    )
    input_dependent_fusion: bool = setting(
        False,
        "Whether each position has fusion weights of its own, from both paths' outputs; else two learned numbers a "
        "layer, as in the paper.",
        section="Fusion of the paths (eq. 3)", fixed=True,
    )  # fmt: skip
    use_moe: bool = setting(
        True, "Ablation 'w/o MoE' when False.", section="Mixture of experts (section 3.1.5)", fixed=True
    )
    moe_level: Literal["sequence", "position"] = setting(
        "sequence",
        "What is routed. 'sequence': the fused representation of the history, as in the paper. 'position': each "
        "position's embedding, before the paths.",
        fixed=True,
    )
    n_experts: int = setting(8, "Number of experts.", "Paper.", ge=1, le=4096, fixed=True)
    experts_per_token: int | None = setting(
        None,
        "How many experts a representation is routed to, those with the largest gate; all when empty, as in the paper.",
        ge=1, le=4096, fixed=True,
    )  # fmt: skip
    diversity_weight: float = setting(
        0.01, "Weight of the expert-diversity term; 0 is the ablation 'w/o diversity'.", ge=0, le=1000
    )
    balance_weight: float = setting(0.01, "Weight of the load-balance term; 0 leaves it out.", ge=0, le=1000)
    loss_type: LossType = setting(
        "CE", "The loss; all but CE draw negatives.", "Paper: BCE; released code: CE.", section="Training"
    )

    @model_validator(mode="after")
    def _paths(self):
        if not (self.use_ssm or self.use_pma):
            raise ValueError("use_ssm and use_pma are both off: STARRec needs at least one of its two paths.")
        if self.use_pma:
            divides(self, "n_heads", "hidden_size", self.hidden_size)
        threshold = self.similarity_threshold
        if isinstance(threshold, list) and len(threshold) != self.n_heads:
            raise ValueError(
                f"similarity_threshold has {len(threshold)} values for n_heads {self.n_heads}: give one a head."
            )
        if self.experts_per_token is not None and self.experts_per_token > self.n_experts:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}: choose a whole number from 1 to n_experts "
                f"({self.n_experts}), or ~ for all."
            )
        if self.moe_level == "position" and self.train_mode == "prefix":
            raise ValueError("moe_level: position learns from whole histories alone: set train_mode: sequence.")
        return self


@register_model(STARRecSettings)
class STARRec(AttendingRecommender):
    """Attention and state-space paths, fused, then a mixture of experts.

    With ``moe_level: position`` the mixture stands before the paths instead, and routes each position's embedding.
    """

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        attended = min(self.max_seq_length, config["attention_window"] or self.max_seq_length)
        self.steps = not config["use_pma"] or attended <= MOST_CARRIED
        dropout_prob = config["dropout_prob"]
        self.item_embedding = nn.Embedding(self.n_items, self.hidden_size)
        self.position_embedding = (
            nn.Embedding(self.max_seq_length, self.hidden_size) if config["use_position_embedding"] else None
        )
        self.make_time_embeddings()
        self.dropout = nn.Dropout(dropout_prob)
        self.norm = nn.LayerNorm(self.hidden_size, eps=1e-12)
        n_layers = config["num_layers"]
        self.layers = nn.ModuleList(DualPathLayer(config, i == n_layers - 1) for i in range(n_layers))
        self.mixture = (
            MixtureOfExperts(self.hidden_size, config["n_experts"], dropout_prob, config["experts_per_token"])
            if config["use_moe"]
            else None
        )
        self.routes_positions = config["moe_level"] == "position"
        self.fillable = not self.routes_positions  # whose losses count rows, not targets
        # The rows of the busiest expert are a shape.
        self.reads_device = config["use_moe"] and config["experts_per_token"] is not None
        self.diversity_weight, self.balance_weight = config["diversity_weight"], config["balance_weight"]
        self._mixed: Mixture | None = None  # with routes_positions, of a training step between encode and loss
        self.apply(init_weights)

    def encode(self, items: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False) -> Tensor:
        """See :meth:`PackedRecommender.encode`."""
        hidden, item_embedding = self.start(items, positions(cu_seqlens))
        for layer in self.layers[:-1]:
            hidden = layer(hidden, item_embedding, cu_seqlens)
        return self.layers[-1](hidden, item_embedding, cu_seqlens, read, last)

    def start(self, items: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """What the first layer reads (section 3.1.1) and the items' embeddings, ``[T, d]`` both."""
        hidden = item_embedding = self.item_vectors(self.ids(items))
        if self.position_embedding is not None:
            hidden = hidden + self.position_embedding(position)
        hidden = self.norm(self.dropout(self.with_times(hidden, items)))
        if self.mixture is not None and self.routes_positions:
            mixed = self.mixture(hidden)
            hidden, self._mixed = mixed.output, mixed if self.training else None
        return hidden, item_embedding

    def read_out(self, hidden: Tensor) -> Tensor:
        """The mixture of experts, or ``hidden`` itself where there is none here."""
        return hidden if self.mixture is None or self.routes_positions else self.mixture(hidden).output

    def loss(
        self,
        hidden: Tensor,
        positives: Tensor,
        negatives: Tensor | None,
        target_weights: Tensor | None = None,
        process_weight: float = 1.0,
        seen: SeenItems | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Ranking loss, and with a mixture the weighted diversity and load-balance terms where their weight is set."""
        if self.mixture is None:
            return self.ranking_loss(hidden, positives, negatives, target_weights, seen)
        if self.routes_positions:
            mixed, self._mixed = self._mixed, None
        else:
            mixed = self.mixture(hidden)
            hidden = mixed.output
        terms = [self.ranking_loss(hidden, positives, negatives, target_weights, seen)]
        if self.diversity_weight and mixed is not None and len(mixed.experts) > 1:
            terms.append(expert_diversity(mixed.experts, target_weights, self.diversity_weight))
        if self.balance_weight and mixed is not None:
            terms.append(load_balance(mixed.gate, mixed.chosen, target_weights, self.balance_weight, process_weight))
        return tuple(terms) if len(terms) > 1 else terms[0]
