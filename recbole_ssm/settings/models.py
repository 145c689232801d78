"""The settings of our models, of RecBole's that train on whole histories, and which class is whose."""

from typing import Any, Literal, get_args

from pydantic import BaseModel, model_validator

from recbole_ssm.settings.schema import MOST, Common, Cosine, Sequential, Whole, setting

LossType = Literal["CE", "BCE", "BPR", "gBCE", "SampledSoftmax"]
TrainMode = Literal["sequence", "prefix"]
TimeOrder = Literal["exact", "float32"]
Scheduler = Literal["constant", "linear", "cosine"]
CudaGraphs = Literal["auto", "on", "off"]
Backend = Literal["auto", "reference", "cpu", "triton", "mamba_ssm"]

# Whose scores are log-odds, of which the sigmoid is a probability.
LOGISTIC_LOSSES = ("BCE", "gBCE")

LOSS_TYPES: tuple[str, ...] = get_args(LossType)
BACKENDS: tuple[str, ...] = get_args(Backend)

# Models of RecBole whose output at a position depends on that position and those before it alone, which read it by
# SequentialRecommender.gather_indexes once a pass, and whose loss is a mean over rows.
CAUSAL_MODELS = ("SASRec", "GRU4Rec")


class Scheduled(BaseModel):
    """Settings of models that RecBole's own Trainer trains."""

    lr_scheduler_type: Scheduler = setting(
        "constant",
        "What becomes of the learning rate: the last two fall from learning_rate to 0 at the end of the last epoch.",
        section="Learning rate over a run of `epochs`",
    )
    warmup_ratio: float = setting(
        0.0, "Share of the run in which the learning rate rises from 0 to learning_rate.", ge=0, lt=1
    )


class OnePass(Scheduled, Sequential):
    """Settings of models that can be trained on whole histories."""

    train_mode: TrainMode = setting(
        "sequence",
        "'sequence': whole histories, the loss at every position, each target once an epoch. 'prefix': RecBole's rows, "
        "one target a row.",
        section="What a training step reads",
    )
    time_order: TimeOrder = setting(
        "exact",
        "Order of interactions. 'exact': by the timestamp as it stands in the file. 'float32': by the timestamp "
        "rounded to float32, which is RecBole's order. Ties keep file order in both.",
    )
    cuda_graphs: CudaGraphs = setting(
        "auto",
        "'auto' replays whole steps as CUDA graphs once one has given the plain step's loss and gradients, and takes "
        "plain steps where that fails, with a line in the log; 'on' raises there.",
        section="Training steps on a GPU",
    )
    exclude_history: bool = setting(
        False, "Whether full ranking leaves the items of the whole history out, but for a target that is among them.",
        section="Evaluation",
    )  # fmt: skip

    @model_validator(mode="after")
    def _one_pass(self):
        negatives = self.train_neg_sample_args
        if self.train_mode == "sequence" and negatives is not None and negatives.dynamic:
            raise ValueError("train_mode: sequence samples no dynamic negatives; set train_mode: prefix.")
        if self.exclude_history and self.eval_args.modes() != {"full"}:
            raise ValueError(
                "exclude_history ranks all items that are new to a user: leave the mode of eval_args at full."
            )
        return self


def _check_probabilities(settings: Any, loss_type: str | None) -> None:
    """Refuse metrics of probabilities where scores are none.

    Raises:
        ValueError: naming the metric.
    """
    metrics = [settings.metrics] if isinstance(settings.metrics, str) else settings.metrics
    for metric in metrics:
        if metric.lower() in ("logloss", "mae", "rmse") and loss_type not in LOGISTIC_LOSSES:
            raise ValueError(
                f"{metric} is of probabilities, which the scores of loss_type {loss_type} are not: choose AUC or a "
                f"metric of rankings{', or loss_type BCE or gBCE' if isinstance(settings, Ours) else ''}."
            )


class Causal(OnePass):
    """What SASRec and GRU4Rec of RecBole read beside RecBole's common settings."""

    loss_type: Literal["CE", "BPR"] = setting("CE", "The loss; BPR draws negatives.")
    hidden_size: int = setting(64, "Number of features in the hidden state.", ge=1, le=2**16, fixed=True)
    train_mode: TrainMode = setting("prefix", OnePass.model_fields["train_mode"].description or "")

    @model_validator(mode="after")
    def _order(self):
        if self.train_mode == "prefix" and "time_order" in self.model_fields_set and self.time_order == "exact":
            raise ValueError("time_order: exact goes with train_mode: sequence; RecBole's rows have its own order.")
        if self.train_mode == "prefix" and self.exclude_history:
            raise ValueError("exclude_history needs whole histories: set train_mode: sequence.")
        _check_probabilities(self, self.loss_type)
        return self


class SASRec(Causal):
    """RecBole's own settings of SASRec."""

    n_layers: int = setting(2, "Number of transformer layers.", ge=1, le=1024, fixed=True)
    n_heads: int = setting(2, "Number of attention heads; must divide hidden_size.", ge=1, le=2**16, fixed=True)
    inner_size: int = setting(256, "Inner width of the feed-forward layers.", ge=1, le=2**18, fixed=True)
    hidden_dropout_prob: float = setting(0.5, "Dropout rate of the hidden states.", ge=0, lt=1)
    attn_dropout_prob: float = setting(0.5, "Dropout rate of the attention weights.", ge=0, lt=1)
    hidden_act: Literal["gelu", "relu", "swish", "tanh", "sigmoid"] = setting(
        "gelu", "Activation of the feed-forward layers.", fixed=True
    )
    layer_norm_eps: float = setting(1e-12, "Added to a variance before its root is taken.", gt=0, le=1, fixed=True)
    initializer_range: float = setting(0.02, "Standard deviation of initial weights.", ge=1e-8, le=100)

    @model_validator(mode="after")
    def _heads(self):
        return _divides(self, "n_heads", "hidden_size", self.hidden_size)


class GRU4Rec(Causal):
    """RecBole's own settings of GRU4Rec."""

    hidden_size: int = setting(128, "Number of features in the hidden state.", ge=1, le=2**16, fixed=True)
    embedding_size: int = setting(64, "Width of an item's embedding.", ge=1, le=2**16, fixed=True)
    num_layers: int = setting(1, "Number of GRU layers.", ge=1, le=1024, fixed=True)
    dropout_prob: float = setting(0.3, "Dropout rate.", ge=0, lt=1)


def _divides(settings: Any, name: str, of: str, whole: int) -> Any:
    if whole % getattr(settings, name):
        raise ValueError(f"{name} {getattr(settings, name)} does not divide {of} {whole}: choose one that does.")
    return settings


class Ours(OnePass):
    """Settings that all models of recbole-ssm share."""

    temperature: float | None = setting(
        None, "Scores are cosines over this temperature; inner products when empty, as in the papers.",
        section="Scores and the loss over all items", ge=1e-6, le=1e6, fixed=True,
    )  # fmt: skip
    label_smoothing: float = setting(0.0, "Share of a target that loss_type CE spreads over all items.", ge=0, lt=1)
    gbce_t: float = setting(
        0.75,
        "Calibration of loss_type gBCE, from 0 (plain BCE) to 1 (as if all items were negatives).",
        "gSASRec (arXiv 2308.07192).",
        section="Losses that sample, which have 256 negatives a target (gBCE, SampledSoftmax) or 1",
        ge=0,
        le=1,
    )
    ssm_backend: Backend = setting(
        "auto",
        "'auto' takes cpu on a CPU, and on a GPU the first of triton and mamba_ssm that is found right there; the "
        "log says which.",
        section="Implementation of the state-space ops",
    )
    valid_metric: str = setting(
        "NDCG@10", "By which the best epoch is chosen and training stops.", "As in the papers; RecBole's default is "
        "MRR@10.",
        section="Choice of the best epoch",
    )  # fmt: skip
    loss_type: LossType = setting("CE", "The loss; all but CE draw negatives.")
    hidden_size: int = setting(64, "Number of features in the hidden state.", ge=1, le=2**16, fixed=True)

    @model_validator(mode="after")
    def _loss(self):
        if self.label_smoothing and self.loss_type != "CE":
            raise ValueError(
                f"label_smoothing is {self.label_smoothing} with loss_type {self.loss_type}: choose loss_type CE, and "
                "0 for other losses than CE."
            )
        negatives = self.train_neg_sample_args
        if self.loss_type == "SampledSoftmax" and negatives is not None and negatives.distribution != "uniform":
            raise ValueError(
                "loss_type SampledSoftmax corrects for negatives drawn uniformly: set the distribution of "
                f"train_neg_sample_args ({negatives.distribution}) to uniform."
            )
        _check_probabilities(self, self.loss_type)
        return self


class Mamba4Rec(Ours):
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


class SSD4Rec(Ours):
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
        _divides(self, "headdim", "expand * hidden_size =", self.expand * self.hidden_size)
        if self.train_mode == "sequence" and self.bidirectional and self.num_layers > 1:
            raise ValueError(
                "SSD4Rec with several layers that read both ways cannot learn from every position at once: set "
                "num_layers: 1, bidirectional: False or train_mode: prefix."
            )
        if self.train_mode == "sequence" and not self.var_len:
            raise ValueError("var_len: False pads a row for each target: set train_mode: prefix.")
        return self


class STARRec(Ours):
    """STAR-Rec (arXiv 2505.03484). 'paper': its published settings. Where no source is named, the choice is ours."""

    hidden_size: int = setting(
        64, "Number of features in the hidden state.", "Paper: 128; 64 is what its baselines use.",
        section="Size", ge=1, le=2**16, fixed=True,
    )  # fmt: skip
    num_layers: int = setting(
        1, "Number of dual-path layers.", "Paper, table 4: one layer is best.", ge=1, le=1024, fixed=True
    )
    dropout_prob: float = setting(0.2, "Dropout rate.", "Paper.", ge=0, lt=1)
    use_time_gaps: bool = setting(
        False,
        "Whether to add a learned embedding of the time since the interaction before, by powers of 2. Needs a real "
        "clock; an open question of the paper.",
        fixed=True,
    )
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
            _divides(self, "n_heads", "hidden_size", self.hidden_size)
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


class Named(BaseModel):
    """What settings of these names are in all of RecBole's models; their property files say which has which."""

    embedding_size: int = setting(64, "Width of an embedding.", ge=1, le=2**16)
    hidden_size: int = setting(64, "Number of features in the hidden state.", ge=1, le=2**16)
    inner_size: int = setting(256, "Inner width of the feed-forward layers.", ge=1, le=2**18)
    n_layers: int = setting(2, "Number of layers.", ge=1, le=1024)
    num_layers: int = setting(1, "Number of layers.", ge=1, le=1024)
    n_heads: int = setting(2, "Number of attention heads.", ge=1, le=2**16)
    dropout_prob: float = setting(0.0, "Dropout rate.", ge=0, lt=1)
    hidden_dropout_prob: float = setting(0.5, "Dropout rate of the hidden states.", ge=0, lt=1)
    attn_dropout_prob: float = setting(0.5, "Dropout rate of the attention weights.", ge=0, lt=1)


class Recboles(Named, Scheduled, Common):
    """RecBole's models that its own Trainer trains."""


class RecbolesSequential(Named, Scheduled, Sequential):
    """RecBole's sequential models that its own Trainer trains."""


class KD_DAGFM(Recboles):
    """What RecBole evaluates as Python."""

    teacher: Literal["CrossNet", "CIN"] = setting("CrossNet", "Network to learn from.")


OUR_MODELS: dict[str, type[Ours]] = {"STARRec": STARRec, "SSD4Rec": SSD4Rec, "Mamba4Rec": Mamba4Rec}
SCHEMAS: dict[str, type[Common]] = {**OUR_MODELS, "SASRec": SASRec, "GRU4Rec": GRU4Rec, "KD_DAGFM": KD_DAGFM}

# Names of what decides what a trained model computes, in any model.
FIXED = {
    name
    for schema in SCHEMAS.values()
    for name, field in schema.model_fields.items()
    if isinstance(field.json_schema_extra, dict) and field.json_schema_extra["fixed"]
}
