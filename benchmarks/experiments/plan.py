"""The papers' experiments as runs: what each varies, on which models and sets."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.accuracy.runs import Spec
from benchmarks.accuracy.study import Study

Settings = dict[str, Any]

# Where a run as searched takes too long for dozens of them: the same for all variants.
SHORTER: dict[str, Settings] = {"ml-1m": {"epochs": 6}}


GENRE_AND_YEAR: Settings = {"item_features": ["genre", "release_year"]}
READING_TIME: Settings = {"use_time_gaps": True, "use_clock": True}

# For the sets of Amazon, whose histories are short. Targets a step and dropout are those of BSARec's and WEARec's
# released code, whose numbers on amazon-beauty are the largest published ones; their rate is half of this.
SPARSE_TRAINING: Settings = {
    "tuned": False, "train_mode": "sequence", "train_batch_size": 256, "learning_rate": 0.001, "ema_decay": 0.999,
    "epochs": 100, "stopping_step": 8, "valid_metric": "NDCG@10", "exclude_history": True,
}  # fmt: skip
FILTERED: Settings = {"num_layers": 2, "filter_share": 0.7, "temperature": 0.07, "dropout_prob": 0.5}
SPARSE_VARIANTS: dict[str, Settings] = {
    "whole model": {},
    "w/o seen items": {"allow_repeats": False},
    "hidden size 128": {"hidden_size": 128},
    "dropout 0.35": {"dropout_prob": 0.35},
    "temperature 0.05": {"temperature": 0.05},
    "one layer": {"num_layers": 1},
    "w/o feed-forward": {"feed_forward": False},
    "w/o filter": {"filter_share": 0.0},
    "w/o cosine scores": {"temperature": None},
    "w/o average of weights": {"ema_decay": 0.0},
    "w/o state space": {"use_ssm": False},
    "w/o attention": {"use_pma": False},
    "w/o experts": {"use_moe": False},
    "none of it": {"num_layers": 1, "filter_share": 0.0, "temperature": None, "ema_decay": 0.0},
}

# For ml-1m, whose histories are long: a rate that falls to 0 makes the best of few, large steps.
DENSE_TRAINING: Settings = {
    "tuned": False, "train_mode": "sequence", "train_batch_size": 2048, "learning_rate": 0.002,
    "lr_scheduler_type": "cosine", "ema_decay": 0.999, "epochs": 20, "stopping_step": 8, "valid_metric": "NDCG@10",
    "exclude_history": True,
}  # fmt: skip
DEEP: Settings = {"num_layers": 2, "temperature": 0.07, "dropout_prob": 0.2}
DENSE_VARIANTS: dict[str, Settings] = {
    "whole model": {},
    "w/o seen items": {"allow_repeats": False},
    "hidden size 128": {"hidden_size": 128},
    "attention window 10": {"attention_window": 10},
    "with filter": {"filter_share": 0.3},
    "one layer": {"num_layers": 1},
    "w/o feed-forward": {"feed_forward": False},
    "w/o cosine scores": {"temperature": None},
    "w/o average of weights": {"ema_decay": 0.0},
}
SMALL_VARIANTS: dict[str, Settings] = {
    **DENSE_VARIANTS,
    "dropout 0.2": {"dropout_prob": 0.2},
    "w/o seen items, dropout 0.2": {"allow_repeats": False, "dropout_prob": 0.2},
}

# Beside them; a model that has its own loss, or negatives, does not know which items were seen.
REFERENCES = {"Mamba4Rec": ("whole model", "w/o seen items"), "SASRec": ("whole model",), "eSASRec": ("whole model",)}


@dataclass(frozen=True)
class Experiment:
    """Variants of some models, each a setting or two away from one that is the same for all.

    That is the paper's model after the study's equal searches, or where there is ``training`` what this and
    ``model_settings`` say.

    Attributes:
        title: what is asked.
        source: where the paper asks it.
        models: models that are varied alike.
        variants: settings by the variant's name, in the order of the table; ``{}`` is the model as searched.
        xlabel: what the variants are numbers of, where they are; a line is drawn then, else bars.
        datasets: the only sets on which it makes sense; all where absent.
        model_settings: settings of all variants of a model.
        reference_models: models beside them, and in which variants they are run.
        training: what all runs are trained by where no search counts, below what a model or a variant sets.
        shorter: whether :data:`SHORTER` holds.
    """

    title: str
    source: str
    models: tuple[str, ...]
    variants: dict[str, Settings]
    xlabel: str | None = None
    datasets: tuple[str, ...] | None = None
    model_settings: dict[str, Settings] = field(default_factory=dict)
    reference_models: dict[str, tuple[str, ...]] = field(default_factory=dict)
    training: Settings = field(default_factory=dict)
    shorter: bool = True

    @property
    def all_models(self) -> tuple[str, ...]:
        """Those that are varied, and those beside them."""
        return *self.models, *self.reference_models

    def specs(self, study: Study, dataset: str, seeds: Iterable[int]) -> dict[tuple[str, str], list[Spec]]:
        """Runs on a set by model and variant, one a seed; none where the set is not among ``datasets``."""
        if self.datasets is not None and dataset not in self.datasets:
            return {}
        shorter, seeds = SHORTER.get(dataset, {}) if self.shorter else {}, list(seeds)
        found = {}
        for model in self.all_models:
            base = study.grid([model], [dataset], seeds) if self.training else study.searched(model, dataset, seeds)
            for name in self.reference_models.get(model, self.variants):
                settings = {**shorter, **self.training, **self.model_settings.get(model, {}), **self.variants[name]}
                found[model, name] = [replace(spec, settings={**spec.settings, **settings}) for spec in base]
        return found


def _values(key: str, values: Iterable[Any]) -> dict[str, Settings]:
    return {str(value): {key: value} for value in values}


EXPERIMENTS: dict[str, Experiment] = {
    "max_length": Experiment(
        "How much of a history does a model need?",
        "STAR-Rec, table 3; SSD4Rec, figure 5",
        ("STARRec", "Mamba4Rec", "SASRec", "SSD4Rec"),
        {**_values("MAX_ITEM_LIST_LENGTH", (5, 10, 20)), "full": {}},
        "maximum length",
        shorter=False,
    ),
    "layers": Experiment(
        "Is one layer enough?",
        "STAR-Rec, table 4",
        ("STARRec", "Mamba4Rec"),
        _values("num_layers", (1, 2, 3, 4)),
        "layers",
    ),
    "ssm_block": Experiment(
        "Does a newer state-space block do better?",
        "not in the papers: Mamba-2 (arXiv 2405.21060) and Mamba-3 (arXiv 2603.15569) in the place of Mamba, with what "
        "was tuned for it",
        ("Mamba4Rec", "STARRec"),
        {"Mamba": {}, "Mamba-2": {"ssm_block": "mamba2"}, "Mamba-3": {"ssm_block": "mamba3"}},
    ),
    "sparse": Experiment(
        "What lifts STAR-Rec where histories are short?",
        "not in the paper: two layers with a feed-forward network between them, BSARec's filter (arXiv 2312.10325) as "
        "a moving average beside both paths, cosine scores over 0.07, no position embedding, and a running average of "
        "weights. Nothing is tuned: all models have 256 targets a step, Adam at 0.001, dropout 0.5 and that average, "
        "until validation with the history excluded has not improved for 9 epochs. Mamba4Rec has layers, filter and "
        "scores as STARRec; BSARec is as released, but for rate and average",
        ("STARRec",),
        SPARSE_VARIANTS,
        datasets=("amazon-beauty", "amazon-video-games"),
        training=SPARSE_TRAINING,
        model_settings={
            "STARRec": {**FILTERED, "feed_forward": True, "use_position_embedding": False},
            "Mamba4Rec": FILTERED,
            "BSARec": {"train_mode": "prefix"},
            "eSASRec": {"dropout_prob": 0.5},
            "SASRec": {"hidden_dropout_prob": 0.5, "attn_dropout_prob": 0.5},
        },
        reference_models=dict.fromkeys((*REFERENCES, "BSARec"), ("whole model", "hidden size 128")),
    ),
    "dense": Experiment(
        "What lifts STAR-Rec where histories are long?",
        "not in the paper: two layers with a feed-forward network between them, cosine scores over 0.07, and a running "
        "average of weights. Nothing is tuned: all models have 2,048 targets a step, Adam at 0.002 falling to 0 as a "
        "cosine within 20 epochs, dropout 0.2 and that average. Mamba4Rec has layers and scores as STARRec, SASRec an "
        "epoch of warm-up, without which the validation of one seed of three was .02 still after nine epochs",
        ("STARRec",),
        DENSE_VARIANTS,
        datasets=("ml-1m",),
        training=DENSE_TRAINING,
        model_settings={
            "STARRec": {**DEEP, "feed_forward": True},
            "Mamba4Rec": DEEP,
            "eSASRec": {"dropout_prob": 0.2},
            "SASRec": {"hidden_dropout_prob": 0.2, "attn_dropout_prob": 0.2, "warmup_ratio": 0.05},
        },
        reference_models=REFERENCES,
    ),
    "small": Experiment(
        "What lifts STAR-Rec where there are few users?",
        "not in the paper: as where histories are long, with dropout 0.4, and 256 targets a step for 25 epochs, which "
        "is as many steps. Mamba4Rec has layers and scores as STARRec, SSD4Rec one layer and the scores",
        ("STARRec",),
        SMALL_VARIANTS,
        datasets=("ml-100k",),
        training={**DENSE_TRAINING, "train_batch_size": 256, "epochs": 25},
        model_settings={
            "STARRec": {**DEEP, "dropout_prob": 0.4, "feed_forward": True},
            "Mamba4Rec": {**DEEP, "dropout_prob": 0.4},
            "SSD4Rec": {"temperature": 0.07, "dropout_prob": 0.4},
            "eSASRec": {"dropout_prob": 0.4},
            "SASRec": {"hidden_dropout_prob": 0.4, "attn_dropout_prob": 0.4},
        },
        reference_models={**REFERENCES, "SSD4Rec": ("whole model", "w/o seen items", "w/o seen items, dropout 0.2")},
    ),
    "ablations": Experiment(
        "What does each part of STAR-Rec give?",
        "STAR-Rec, ablations of section 4",
        ("STARRec",),
        {
            "STAR-Rec": {},
            "w/o SSM": {"use_ssm": False},
            "w/o PMA": {"use_pma": False},
            "w/o similarity": {"use_similarity": False},
            "with residual of PMA": {"pma_residual": True},
            "w/o residual of PMA": {"pma_residual": False},
            "w/o MoE": {"use_moe": False},
            "w/o position embedding": {"use_position_embedding": False},
            "with position embedding": {"use_position_embedding": True},
            "w/o filter": {"filter_share": 0.0},
        },
    ),
    "experts": Experiment(
        "Are all experts used, and is it the diversity term that keeps them so?",
        "STAR-Rec, section 3.1.5",
        ("STARRec",),
        {
            "diversity and balance": {},
            "w/o diversity": {"diversity_weight": 0.0},
            "w/o balance": {"balance_weight": 0.0},
            "w/o both": {"diversity_weight": 0.0, "balance_weight": 0.0},
        },
    ),
    "fusion": Experiment(
        "Does attention weigh more for short histories, and state space for long ones?",
        "STAR-Rec, eq. 3",
        ("STARRec",),
        {"learned": {}, "input-dependent": {"input_dependent_fusion": True}},
    ),
    "routing": Experiment(
        "Should experts be chosen for the whole history, or for each position?",
        "STAR-Rec, open question",
        ("STARRec",),
        {"per sequence": {}, "per position": {"moe_level": "position"}},
    ),
    "time": Experiment(
        "What does time give, the request's too, and what does a clock of float32 cost?",
        "STAR-Rec, open question; the clock is RecBole's. Models are not tuned: as shipped, but for 6 epochs, a rate "
        "that falls as a cosine, and 1,024 targets a step (on yelp-2019-clock and amazon-sports-clock 512, and at most "
        "50 items). TiM4Rec and SS4Rec read gaps as shipped",
        ("Mamba4Rec", "STARRec", "TiM4Rec", "SS4Rec", "RecBLR", "eSASRec", "BSARec"),
        {
            "as shipped": {},
            "gaps, hours, weekdays": READING_TIME,
            "the request's too": {**READING_TIME, "request_time": "known"},
            "ordered in float32": {"time_order": "float32"},
        },
        datasets=("ml-1m-clock", "ml-1m-clock-known", "ml-1m-clock-shuffled", "yelp-2019-clock", "amazon-sports-clock"),
    ),
    "features": Experiment(
        "What do genres and years of items give, above all to items that are rare, or new?",
        "STAR-Rec, open question; ml-1m-new-items is ml-1m without 5% of its items in training",
        ("Mamba4Rec", "STARRec"),
        {
            "ids alone": {},
            "genre, year": GENRE_AND_YEAR,
            "genre, year, side by side": {**GENRE_AND_YEAR, "feature_fusion": "concat"},
            "genre, year, scored too": {**GENRE_AND_YEAR, "score_features": True},
        },
        datasets=("ml-1m", "ml-1m-new-items"),
    ),
    "window": Experiment(
        "How far back must attention look?",
        "STAR-Rec, open question",
        ("STARRec",),
        {**_values("attention_window", (5, 10, 20, 50)), "all": {}},
        "attention window",
    ),
    "training": Experiment(
        "What else does training hang on?",
        "not in the papers: what was tried beside learning rate and dropout",
        ("STARRec", "Mamba4Rec"),
        {
            "as searched": {},
            "constant learning rate": {"lr_scheduler_type": "constant"},
            "learning rate falling as a cosine": {"lr_scheduler_type": "cosine"},
            "1,024 targets a step": {"train_batch_size": 1024},
            "2,048 targets a step": {"train_batch_size": 2048},
            "no dropout": {"dropout_prob": 0.0},
            "hidden size 128": {"hidden_size": 128},
            "weight decay 0.01": {"learner": "adamw", "weight_decay": 0.01},
            "label smoothing 0.1": {"label_smoothing": 0.1},
            "cosine scores over 0.07": {"temperature": 0.07},
            "gBCE, 256 negatives": {"loss_type": "gBCE"},
            "sampled softmax, 256 negatives": {"loss_type": "SampledSoftmax"},
        },
    ),
    "beta": Experiment(
        "What does reading backwards give?",
        "SSD4Rec, figure 3",
        ("SSD4Rec",),
        _values("beta", (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)),
        "weight of the backward stream, beta",
    ),
    "mask_ratio": Experiment(
        "How much of the input should be masked in training?",
        "SSD4Rec, figure 4",
        ("SSD4Rec",),
        _values("mask_ratio", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)),
        "share of masked items, rho",
    ),
}
