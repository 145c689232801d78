"""RecBole's common settings: type, bounds, choices, default and meaning; what depends on several is in validators.

Those of our models are in :mod:`recbole_ssm.settings.models`. The class that a setting stands in says which models read
it. Our property files, ``--help`` and the tables of docs/configuration.md are written from these classes
(:mod:`recbole_ssm.settings.text`).
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from recbole_ssm.settings.parts import (
    LIST_METRICS,
    NEGATIVES,
    SCORE_METRICS,
    SEPARATOR,
    SMALLER,
    TOP_METRICS,
    UNSUPPORTED,
    ClipGradNorm,
    Count,
    EvalArgs,
    Name,
    NegativeSampling,
    Strict,
    Whole,
    check_gpus,
    check_intervals,
    lower,
    no_number,
    none,
    setting,
)


class Common(Strict):
    """Settings of RecBole that all models read."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    gpu_id: str | int | tuple[int, ...] = setting(
        "0",
        "Numbers of the GPUs, separated by commas; the CPU where it is empty.",
        section="Environment",
        allowed="numbers such as 0 or 0,1",
    )
    use_gpu: bool = setting(True, "Whether to use a GPU where there is one.")
    worker: int = setting(0, "Processes that load batches, beside the one that trains.", ge=0, le=1024)
    seed: int = setting(2020, "Seed of Python's, NumPy's and torch's random numbers.", ge=0, lt=2**32)
    state: Annotated[Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(lower)] = setting(
        "INFO", "From which level on the log is written."
    )
    reproducibility: bool = setting(True, "Whether torch takes deterministic algorithms alone.")
    data_path: Name = setting("dataset/", "Folder that holds a folder of each dataset.")
    checkpoint_dir: Name = setting("saved", "Folder of checkpoints.")
    show_progress: bool = setting(True, "Whether each epoch has a progress bar.")
    save_dataset: bool = setting(False, "Whether to keep the filtered dataset in checkpoint_dir.")
    dataset_save_path: Name | None = setting(None, "File of a filtered dataset to start from.")
    save_dataloaders: Annotated[Literal[False], BeforeValidator(no_number)] = setting(
        False, UNSUPPORTED,
        allowed="False, for saved loaders are pickles, which could run code: leave save_dataloaders out; save_dataset "
        "saves most of the time",
    )  # fmt: skip
    dataloaders_save_path: None = setting(
        None, UNSUPPORTED, allowed="~, for saved loaders are pickles, which could run code: leave it out"
    )
    tuned: bool = setting(
        True, "Whether a sequential model takes what tuning found for it and the dataset, if anything."
    )
    log_wandb: bool = setting(False, "Whether to report to Weights & Biases.")
    wandb_project: Name = setting("recbole", "Project there.")
    shuffle: bool = setting(True, "Whether training data are drawn in a new order each epoch.")

    epochs: Whole = setting(300, "Training epochs, at most.", section="Training")
    train_batch_size: Whole = setting(2048, "Targets a step.")
    learner: Annotated[Literal["adam", "adamw", "sgd", "adagrad", "rmsprop"], BeforeValidator(lower)] = setting(
        "adam", "The optimizer."
    )
    learning_rate: float = setting(0.001, "Learning rate.", ge=1e-12)
    train_neg_sample_args: Annotated[NegativeSampling | None, BeforeValidator(none)] = setting(
        NegativeSampling(), "Negatives of a training target, for losses that sample.",
        allowed="a dict such as {'distribution': 'uniform', 'sample_num': 1}, or ~ for none",
    )  # fmt: skip
    eval_step: Count = setting(1, "Epochs from one evaluation on the validation set to the next; 0 for none.")
    stopping_step: Count = setting(10, "Evaluations in a row that may be worse than the best; one more ends training.")
    clip_grad_norm: ClipGradNorm | None = setting(
        None, "Arguments of torch's clip_grad_norm_.", allowed="a dict such as {'max_norm': 5}, or ~ for none"
    )
    weight_decay: float = setting(0.0, "L2 penalty; with adamw the decay of weights.", ge=0, le=1000)
    loss_decimal_place: int = setting(4, "Decimals of the loss in the log.", ge=0, le=20)
    require_pow: bool = setting(False, "Whether RecBole's embedding loss takes powers.")
    enable_amp: bool = setting(
        False,
        "Automatic mixed precision: training, and evaluation of this package's models, in bfloat16, or in float16 on a "
        "GPU without it.",
    )
    enable_scaler: bool = setting(False, "Whether the loss is scaled (torch's GradScaler), which float16 wants.")
    transform: Literal["mask_itemseq", "inverse_itemseq", "crop_itemseq", "reorder_itemseq", "user_defined"] | None = (
        setting(None, "What is made of each batch; for the models whose property file names one.")
    )

    eval_args: EvalArgs = setting(
        EvalArgs(),
        "How data are split and which items are ranked; a part of it changes that part alone. Sequential models take "
        "each user's last two interactions, {'split': {'LS': 'valid_and_test'}, 'order': 'TO', 'mode': 'full'}.",
        section="Evaluation",
        allowed="a dict such as {'split': {'LS': 'valid_and_test'}, 'order': 'TO', 'mode': 'full'}",
    )
    repeatable: bool = setting(False, "Whether items of the history are ranked too; always so for sequential models.")
    metrics: list[str] | str = setting(
        ["Recall", "MRR", "NDCG", "Hit", "Precision"], "What is measured.", allowed="a list of metrics"
    )
    topk: list[Whole] | Whole = setting(
        [10], "How many of a ranked list count.", allowed="a whole number from 1, or a list of such numbers"
    )
    valid_metric: str = setting("MRR@10", "By which the best epoch is chosen and training stops.")
    valid_metric_bigger: bool = setting(True, "Whether more of it is better, which follows from it.")
    eval_batch_size: Whole = setting(4096, "Rows, or scores of sampled items, of an evaluation's batch.")
    metric_decimal_place: int = setting(4, "Decimals of results.", ge=0, le=20)

    field_separator: str = setting(
        "\t", "Between columns of atomic files.", section="Data", allowed=SEPARATOR, min_length=1
    )
    seq_separator: str = setting(" ", "Inside a column of sequences.", allowed=SEPARATOR, min_length=1)
    encoding: Name | None = setting("utf-8", "Of atomic files.")
    USER_ID_FIELD: Name = setting("user_id", "Name of the column of users.")
    ITEM_ID_FIELD: Name = setting("item_id", "Name of the column of items.")
    RATING_FIELD: Name = setting("rating", "Name of the column of ratings.")
    TIME_FIELD: Name = setting("timestamp", "Name of the column of times.")
    LABEL_FIELD: Name = setting("label", "Name of the column of labels.")
    seq_len: dict[str, Whole] | None = setting(
        None,
        "Most entries that are read of columns of sequences.",
        allowed="a dict {'a column': a whole number}, or ~ for none",
    )
    threshold: Annotated[dict[str, float], Field(min_length=1, max_length=1)] | None = setting(
        None,
        "Column and value from which on an interaction has label 1.",
        allowed="a dict of one column such as {'rating': 3}, or ~ for none",
    )
    NEG_PREFIX: Name = setting("neg_", "Prefix of a sampled negative's column, as in neg_item_id.")
    numerical_features: list[str] = setting([], "Columns of numbers that are embedded.")
    load_col: dict[str, list[str] | Literal["*"]] | None = setting(
        {"inter": ["user_id", "item_id"]},
        "Columns that are read, by the file's suffix; all where empty. Sequential models take TIME_FIELD, too.",
        allowed="a dict such as {'inter': ['user_id', 'item_id', 'timestamp']}, or ~ for all",
    )
    unload_col: dict[str, list[str]] | None = setting(None, "Columns that are not read, by the file's suffix.")
    unused_col: dict[str, list[str]] | None = setting(
        None, "Columns that are read and dropped after filtering, by the file's suffix."
    )
    additional_feat_suffix: list[str] | str | None = setting(None, "Suffixes of more files to read.")
    rm_dup_inter: Literal["first", "last"] | None = setting(
        None, "Which of several interactions of a user with an item stays."
    )
    val_interval: dict[str, Any] | None = setting(
        None, "Values of columns that stay.", allowed="{'a column': 'an interval, or a list of tokens'}, or ~ for none"
    )
    filter_inter_by_user_or_item: bool = setting(True, "Whether interactions of left-out users or items are left out.")
    user_inter_num_interval: str | None = setting("[0,inf)", "How many interactions a user must have to stay.")
    item_inter_num_interval: str | None = setting("[0,inf)", "How many interactions an item must have to stay.")
    alias_of_user_id: list[str] | str | None = setting(None, "Columns numbered as users.")
    alias_of_item_id: list[str] | str | None = setting(None, "Columns numbered as items.")
    alias_of_entity_id: list[str] | str | None = setting(None, "Columns numbered as entities.")
    alias_of_relation_id: list[str] | str | None = setting(None, "Columns numbered as relations.")
    preload_weight: dict[str, str] | None = setting(None, "Columns of ids, with those of their vectors.")
    normalize_field: list[str] | None = setting(None, "Columns of numbers that are normalised.")
    normalize_all: bool | None = setting(None, "Whether all columns of numbers are normalised.")
    discretization: dict[str, dict] | None = setting(None, "How columns of numbers are made discrete.")
    ITEM_LIST_LENGTH_FIELD: Name = setting("item_length", "Name of the column of histories' lengths.")
    LIST_SUFFIX: Name = setting("_list", "Suffix of a history's column, as in item_id_list.")
    MAX_ITEM_LIST_LENGTH: int = setting(50, "Most items of a history that a model reads.", ge=1, le=2**20)
    POSITION_FIELD: Name = setting("position_id", "Name of the column of positions.")
    benchmark_filename: list[str] | None = setting(
        None, "Suffixes of files that are split beforehand, for training, validation and test."
    )

    _gpus = field_validator("gpu_id", mode="after")(check_gpus)
    _interval = field_validator("user_inter_num_interval", "item_inter_num_interval", mode="before")(check_intervals)

    @field_validator("metrics", mode="after")
    @classmethod
    def _metrics(cls, metrics: list[str] | str) -> list[str] | str:
        known = [*TOP_METRICS, *LIST_METRICS, *SCORE_METRICS]
        names = [metrics] if isinstance(metrics, str) else metrics
        for name in names:
            if name.lower() not in map(str.lower, known):
                raise ValueError(f"metrics: there is no metric named {name!r}, choose among {', '.join(known)}.")
        if not names or len({_holds(name, SCORE_METRICS) for name in names}) > 1:
            raise ValueError(
                f"metrics is {names}: choose at least one, and either of rankings "
                f"({', '.join(TOP_METRICS + LIST_METRICS)}) or of single scores ({', '.join(SCORE_METRICS)})."
            )
        return metrics

    @field_validator("topk", mode="after")
    @classmethod
    def _topk(cls, topk: list[int] | int) -> list[int] | int:
        if topk == []:
            raise ValueError("topk is []: choose a whole number from 1, or a list of such numbers.")
        return topk

    @model_validator(mode="after")
    def _evaluation(self):
        metrics = [self.metrics] if isinstance(self.metrics, str) else self.metrics
        topk = [self.topk] if isinstance(self.topk, int) else self.topk
        results = [name if not _holds(name, TOP_METRICS) else f"{name}@{k}" for name in metrics for k in topk]
        if self.valid_metric.lower() not in map(str.lower, results):
            raise ValueError(
                f"valid_metric {self.valid_metric!r} is not among the metrics {metrics} at topk {topk}: set "
                f"--valid_metric to one of {', '.join(dict.fromkeys(results))}."
            )
        if not self.valid_metric_bigger and not _holds(self.valid_metric.split("@")[0], SMALLER):
            raise ValueError(f"valid_metric_bigger is False, but more of {self.valid_metric} is better: leave it out.")
        of_scores, modes = _holds(metrics[0], SCORE_METRICS), self.eval_args.modes()
        if of_scores and "full" in modes:
            raise ValueError(
                f"metrics: {metrics[0]} is of labelled or sampled items: set the mode of eval_args to labeled, or to "
                "uniN or popN."
            )
        if not of_scores and "labeled" in modes:
            raise ValueError(
                f"metrics: {metrics[0]} is of rankings, and mode labeled of eval_args ranks nothing: choose full, "
                "uniN or popN."
            )
        sampled = [int(mode[3:]) for mode in modes if mode not in ("full", "labeled")]
        if sampled and max(topk) > min(sampled) and any(_holds(name, TOP_METRICS) for name in metrics):
            raise ValueError(
                f"topk is {topk}, but the mode of eval_args ranks a target among {min(sampled)} sampled items: choose "
                "at most as many, or sample more."
            )
        return self

    @model_validator(mode="after")
    def _columns(self):
        named: dict[str, str] = {}
        columns = {
            **{key: getattr(self, key) for key in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD", "LABEL_FIELD")},
            "NEG_PREFIX + ITEM_ID_FIELD": self.NEG_PREFIX + self.ITEM_ID_FIELD,
            "ITEM_ID_FIELD + LIST_SUFFIX": self.ITEM_ID_FIELD + self.LIST_SUFFIX,
            "ITEM_LIST_LENGTH_FIELD": self.ITEM_LIST_LENGTH_FIELD,
        }
        for key, name in columns.items():
            if name in named:
                raise ValueError(f"{key} and {named[name]} are both {name}: give each column a name of its own.")
            named[name] = key
        return self


def _holds(name: str, names: tuple[str, ...]) -> bool:
    return name.lower() in map(str.lower, names)


class Sequential(Common):
    """What is asked of sequential models of RecBole, too."""

    reads_negatives: ClassVar[bool] = False  # whatever the loss

    loss_type: str | None = setting(None, "The loss.")

    @model_validator(mode="after")
    def _sequential(self):
        if self.eval_args.order != "TO":
            raise ValueError(
                f"order of eval_args is {self.eval_args.order}: sequential models need TO, the order of time."
            )
        if not self.repeatable:
            raise ValueError("repeatable is False: sequential models rank items of the history too, set it to True.")
        draws = self.train_neg_sample_args is not None and self.train_neg_sample_args.draws
        if self.loss_type == "CE" and draws and not self.reads_negatives:
            raise ValueError(
                "train_neg_sample_args should be None with loss_type CE, which samples nothing: leave it out."
            )
        if NEGATIVES.get(self.loss_type or "") and not draws:
            raise ValueError(
                f"loss_type {self.loss_type} needs negatives: leave train_neg_sample_args out, or give it a "
                "distribution."
            )
        return self
