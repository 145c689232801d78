"""What settings our models share, those of RecBole's that train on whole histories, and which class is whose.

Our models' own stand beside each, and :func:`recbole_ssm.registry.register_model` adds them to :data:`SCHEMAS`.
"""

from typing import Any, Literal, get_args

from pydantic import BaseModel, model_validator

from recbole_ssm.settings.parts import setting
from recbole_ssm.settings.schema import Common, Sequential

LossType = Literal["CE", "BCE", "BPR", "gBCE", "SampledSoftmax"]
TrainMode = Literal["sequence", "prefix"]
TimeOrder = Literal["exact", "float32"]
Scheduler = Literal["constant", "linear", "cosine"]
RequestTime = Literal["unknown", "known"]
CudaGraphs = Literal["auto", "on", "off"]
Backend = Literal["auto", "reference", "cpu", "triton", "mamba_ssm"]

# Whose scores are log-odds, of which the sigmoid is a probability.
LOGISTIC_LOSSES = ("BCE", "gBCE")

LOSS_TYPES: tuple[str, ...] = get_args(LossType)
BACKENDS: tuple[str, ...] = get_args(Backend)

# Models of RecBole that train on whole histories: those in which benchmarks.models.causality finds nothing against it.
CAUSAL_MODELS = ("SASRec", "GRU4Rec", "SASRecF", "GRU4RecF", "FDSA")


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
    lr_restarts: int = setting(
        0, "How often a learning rate that falls begins anew, in equal parts of the run (SGDR).", ge=0, le=10_000
    )
    ema_decay: float = setting(
        0.0,
        "Decay, a step, of a running average of the weights, which is evaluated and kept in their place; 0 leaves it "
        "out.",
        ge=0, lt=1,
    )  # fmt: skip

    @model_validator(mode="after")
    def _restarts(self):
        if self.lr_restarts and self.lr_scheduler_type == "constant":
            raise ValueError(
                f"lr_restarts is {self.lr_restarts}, but a learning rate that is constant never falls: set "
                "lr_scheduler_type: cosine or linear."
            )
        return self


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
                f"metric of rankings{', or loss_type BCE or gBCE' if isinstance(settings, ModelSettings) else ''}."
            )


class Causal(OnePass):
    """What :data:`CAUSAL_MODELS` read beside RecBole's common settings."""

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
        return divides(self, "n_heads", "hidden_size", self.hidden_size)


class GRU4Rec(Causal):
    """RecBole's own settings of GRU4Rec."""

    hidden_size: int = setting(128, "Number of features in the hidden state.", ge=1, le=2**16, fixed=True)
    embedding_size: int = setting(64, "Width of an item's embedding.", ge=1, le=2**16, fixed=True)
    num_layers: int = setting(1, "Number of GRU layers.", ge=1, le=1024, fixed=True)
    dropout_prob: float = setting(0.3, "Dropout rate.", ge=0, lt=1)


class WithFeatures(Common):
    """What the models read that know of an item's features."""

    selected_features: list[str] = setting(["class"], "Columns of the .item file to read.", fixed=True)
    pooling_mode: Literal["max", "mean", "sum"] = setting("sum", "What becomes of a list in one column.", fixed=True)


class SASRecF(WithFeatures, SASRec):
    """RecBole's own settings of SASRecF."""


class GRU4RecF(WithFeatures, GRU4Rec):
    """RecBole's own settings of GRU4RecF."""


class FDSA(WithFeatures, SASRec):
    """RecBole's own settings of FDSA."""

    pooling_mode: Literal["max", "mean", "sum"] = setting("mean", "What becomes of a list in one column.", fixed=True)


def divides(settings: Any, name: str, of: str, whole: int) -> Any:
    """``settings``, whose ``name`` divides ``whole``, which is called ``of``; for a validator's last line.

    Raises:
        ValueError: where it does not.
    """
    if whole % getattr(settings, name):
        raise ValueError(f"{name} {getattr(settings, name)} does not divide {of} {whole}: choose one that does.")
    return settings


class ModelSettings(OnePass):
    """Settings that all models of recbole-ssm share."""

    temperature: float | None = setting(
        None, "Scores are cosines over this temperature; inner products when empty, as in the papers.",
        section="Scores and the loss over all items", ge=1e-6, le=1e6, fixed=True,
    )  # fmt: skip
    label_smoothing: float = setting(0.0, "Share of a target that loss_type CE spreads over all items.", ge=0, lt=1)
    allow_repeats: bool = setting(
        True,
        "Whether an item of the history can come next. False: what is read of the history is left out of loss_type CE, "
        "and ranked last.",
        fixed=True,
    )
    gbce_t: float = setting(
        0.75,
        "Calibration of loss_type gBCE, from 0 (plain BCE) to 1 (as if all items were negatives).",
        "gSASRec (arXiv 2308.07192).",
        section="Losses that sample, which have 256 negatives a target (gBCE, SampledSoftmax) or 1",
        ge=0,
        le=1,
    )
    use_time_gaps: bool = setting(
        False,
        "Whether to add to an item's embedding one of the time since the interaction before, by powers of 2. Needs a "
        "real clock.",
        section="Time (all are sums of learned embeddings)",
        fixed=True,
    )
    use_clock: bool = setting(
        False, "Whether to add embeddings of the hour and the weekday (UTC) of the interaction. Needs timestamps in "
        "seconds since 1970.", fixed=True,
    )  # fmt: skip
    request_time: RequestTime = setting(
        "unknown",
        "Whether the model knows at what time it is asked. 'known': it reads the same of the time of the next "
        "interaction as of that of each: in training and evaluation the target's, in serving the request's. 'unknown': "
        "it reads the past alone, as most published results do.",
        fixed=True,
    )
    item_features: list[str] | None = setting(
        None,
        "Columns of the .item file, of tokens or a number, that are read beside the item's id; none when empty.",
        section="Features of items",
        fixed=True,
    )
    feature_fusion: Literal["sum", "concat"] = setting(
        "sum",
        "How item_features join the item's embedding. 'sum': their embeddings are added. 'concat': a linear map of all "
        "side by side.",
        fixed=True,
    )
    score_features: bool = setting(
        False,
        "Whether item_features are part of what scores are inner products with, too, so that an item without "
        "interactions can be ranked.",
        fixed=True,
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
        if not self.allow_repeats and (self.loss_type != "CE" or self.label_smoothing):
            raise ValueError(
                "allow_repeats: False leaves items out of the softmax over all items: choose loss_type CE (it is "
                f"{self.loss_type}) and label_smoothing 0 (it is {self.label_smoothing})."
            )
        negatives = self.train_neg_sample_args
        if self.score_features and not self.item_features:
            raise ValueError("score_features is True without item_features: name columns of the .item file there.")
        if self.loss_type == "SampledSoftmax" and negatives is not None and negatives.distribution != "uniform":
            raise ValueError(
                "loss_type SampledSoftmax corrects for negatives drawn uniformly: set the distribution of "
                f"train_neg_sample_args ({negatives.distribution}) to uniform."
            )
        _check_probabilities(self, self.loss_type)
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


class SINE(RecbolesSequential):
    """What RecBole gives negatives with its loss over all items, too."""

    reads_negatives = True


SCHEMAS: dict[str, type[Common]] = {
    schema.__name__: schema for schema in (SASRec, GRU4Rec, SASRecF, GRU4RecF, FDSA, SINE, KD_DAGFM)
}


def fixed() -> set[str]:
    """Names of what decides what a trained model computes, in any model."""
    return {
        name
        for schema in SCHEMAS.values()
        for name, field in schema.model_fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra["fixed"]
    }
