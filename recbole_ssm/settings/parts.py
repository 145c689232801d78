"""What settings are made of: kinds of values, and those that are mappings themselves."""

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

UNSUPPORTED = "Not supported."
SEPARATOR = "what stands between, such as ','"

# What fits the integers of the libraries below.
MOST = 2**31 - 1

# As RecBole's; both ends of an interval, and whether they belong to it.
NUMBER = r"\s*([+-]?(?:\d+\.?\d*(?:e[+-]?\d+)?|\.\d+|inf))\s*"
INTERVAL = re.compile(rf"\s*([\[(]){NUMBER},{NUMBER}([\])])\s*", re.IGNORECASE)

# What each loss samples where nothing else is asked for; gSASRec's number (arXiv 2308.07192) for the last two.
NEGATIVES: dict[str, dict[str, Any] | None] = {
    "CE": None,
    "BCE": {"distribution": "uniform", "sample_num": 1},
    "BPR": {"distribution": "uniform", "sample_num": 1},
    "gBCE": {"distribution": "uniform", "sample_num": 256},
    "SampledSoftmax": {"distribution": "uniform", "sample_num": 256},
}

# RecBole's metrics of a ranked list's first k, of a whole list, and of single scores.
TOP_METRICS = (
    "Recall", "MRR", "NDCG", "Hit", "Precision", "MAP", "ItemCoverage", "AveragePopularity", "GiniIndex",
    "ShannonEntropy", "TailPercentage",
)  # fmt: skip
LIST_METRICS = ("GAUC",)
SCORE_METRICS = ("AUC", "LogLoss", "MAE", "RMSE")

# Those of which less is better.
SMALLER = ("LogLoss", "MAE", "RMSE", "AveragePopularity", "GiniIndex")


def setting(
    default: Any, meaning: str, source: str = "", *, section: str = "", allowed: str = "", fixed: bool = False, **bounds
) -> Any:
    """A setting of one of the classes of settings.

    Args:
        default: its value where none is given.
        meaning: what it is, a sentence or two.
        source: where our default comes from.
        section: title of the settings from here on.
        allowed: how its values are named where its type and ``bounds`` do not say it, as the end of "choose ...".
        fixed: whether it decides what a trained model computes, so that it cannot be changed afterwards.
        bounds: pydantic's, such as ``ge``, ``gt``, ``le`` and ``lt``.
    """
    extra: Any = {"source": source, "section": section, "allowed": allowed, "fixed": fixed}
    return Field(default, description=meaning, json_schema_extra=extra, **bounds)


def lower(value: Any) -> Any:
    """A word in small letters."""
    return value.lower() if isinstance(value, str) else value


def none(value: Any) -> Any:
    """Nothing for RecBole's word for it."""
    return None if value == "None" else value


def no_number(value: Any) -> Any:
    """Text of what is no truth value."""
    return value if isinstance(value, bool) else str(value)  # to a Literal, 0 is False


def near(word: Any, known: list[str]) -> str:
    """How a sentence about an unknown word ends: with the known one next to it, where there is one."""
    folded = {name.lower(): name for name in known}
    found = difflib.get_close_matches(str(word).lower(), folded, n=1)
    return f", did you mean {folded[found[0]]!r}?" if found else "."


def _check_name(value: str, info: ValidationInfo) -> str:
    if not value.strip() or not value.isprintable():
        raise ValueError(f"{info.field_name} is {value!r}: choose a word.")
    return value


Name = Annotated[str, AfterValidator(_check_name)]
Whole = Annotated[int, Field(ge=1, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Cosine = Annotated[float, Field(ge=-1, le=1)]


class Strict(BaseModel):
    """Takes values as they are: no text for a number, no number for a truth value, no NaN, no unknown key."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Split(Strict):
    """``split`` of ``eval_args``."""

    RS: list[float] | None = setting(None, "Shares of training, validation and test.")
    LS: Literal["valid_and_test", "valid_only", "test_only"] | None = setting(None, "What is left out of a history.")

    @model_validator(mode="after")
    def _is_one(self):
        if (self.RS is None) == (self.LS is None):
            raise ValueError("split of eval_args should be either {'RS': [0.8, 0.1, 0.1]} or {'LS': 'valid_and_test'}.")
        if self.RS is not None and (len(self.RS) != 3 or min(self.RS) < 0 or self.RS[0] <= 0):
            raise ValueError(
                f"RS in split of eval_args is {self.RS}: give the shares of training, validation and test, three "
                "numbers none of which is negative, and the first of which is not 0."
            )
        return self


def _check_mode(mode: Any) -> Any:
    if not isinstance(mode, str) or not re.fullmatch(r"full|labeled|(uni|pop)[1-9]\d{0,8}", mode):
        raise ValueError(
            f"mode of eval_args is {mode!r}: choose full, uniN or popN (N sampled items, such as uni100), or labeled."
        )
    return mode


class EvalArgs(Strict):
    """``eval_args``."""

    split: Split = setting(
        Split(RS=[0.8, 0.1, 0.1]),
        "How interactions are split.",
        allowed="{'RS': [0.8, 0.1, 0.1]} or {'LS': 'valid_and_test'}",
    )
    group_by: Literal["user", "none", "None"] | None = setting("user", "Whether each user's are split.")
    order: Literal["TO", "RO"] = setting("RO", "By time or random.")
    mode: Any = setting("full", "Which items are ranked.")

    @field_validator("mode", mode="after")
    @classmethod
    def _mode(cls, mode: Any) -> Any:
        if not isinstance(mode, dict):
            return _check_mode(mode)
        if not mode or set(mode) - {"valid", "test"}:
            raise ValueError(f"mode of eval_args is {mode}: choose one for 'valid' and one for 'test'.")
        return {phase: _check_mode(value) for phase, value in mode.items()}

    @model_validator(mode="after")
    def _groups(self):
        if self.split.LS and self.group_by != "user":
            raise ValueError(
                f"group_by of eval_args is {self.group_by}, which goes with a split by RS: LS takes each user's last."
            )
        return self

    def modes(self) -> set[str]:
        """The modes of both phases."""
        return set(self.mode.values()) if isinstance(self.mode, dict) else {self.mode}


class NegativeSampling(Strict):
    """``train_neg_sample_args``."""

    distribution: Literal["uniform", "popularity", "none", "None"] | None = setting(
        "uniform", "What negative items are drawn by.", allowed="uniform, popularity or none"
    )
    sample_num: Whole | Literal["none"] = setting(1, "Negatives of a target.", allowed="a whole number from 1")
    alpha: float | Literal["none"] = setting(1.0, "Power of the popularity.", allowed="a number")
    dynamic: bool = setting(False, "Whether the hardest of several candidates are taken.")
    candidate_num: Count = setting(0, "How many candidates.")

    @model_validator(mode="after")
    def _candidates(self):
        if self.dynamic != bool(self.candidate_num):
            raise ValueError(
                f"candidate_num of train_neg_sample_args is {self.candidate_num} with dynamic: {self.dynamic}: dynamic "
                "sampling needs candidates, and nothing else reads them."
            )
        for part in ("sample_num", "alpha"):
            if self.draws and getattr(self, part) == "none":
                raise ValueError(
                    f"{part} of train_neg_sample_args is none, which draws nothing from distribution "
                    f"{self.distribution}: choose a number, or leave it out."
                )
        if self.distribution == "uniform" and self.alpha != 1:
            raise ValueError(
                f"alpha of train_neg_sample_args is {self.alpha} with distribution uniform: popularity alone reads it."
            )
        return self

    @property
    def draws(self) -> bool:
        """Whether there are negatives at all."""
        return self.distribution not in (None, "none", "None")


class ClipGradNorm(Strict):
    """``clip_grad_norm``."""

    max_norm: float = setting(..., "Largest norm.", gt=0)
    norm_type: float = setting(2, "Which norm.", gt=0, allow_inf_nan=True)
    error_if_nonfinite: bool = setting(False, "Whether gradients that are no numbers end the run.")


def check_gpus(value: Any) -> Any:
    """GPUs as CUDA_VISIBLE_DEVICES names them; raises ``ValueError`` for anything else."""
    one = r"\s*(-?\d+|(GPU|MIG)-[\w/-]+)\s*"  # as CUDA_VISIBLE_DEVICES has them
    fits = re.fullmatch(f"({one}(,{one})*)?", value) if isinstance(value, str) else True
    if not fits or (isinstance(value, int) and not -1 <= value <= MOST):
        raise ValueError(f"gpu_id is {value!r}: choose numbers such as 0 or 0,1.")
    return value


def intervals_of(text: Any, name: str | None) -> list[tuple[str, float, float, str]]:
    """Intervals as RecBole writes them, such as ``[5,inf)``, by ``;``: each with its brackets around its ends.

    Args:
        text: what is to be read.
        name: the setting whose value that is.

    Raises:
        ValueError: for anything else.
    """
    found = [INTERVAL.fullmatch(part) for part in str(text).split(";")]
    intervals = [(match[1], float(match[2]), float(match[3]), match[4]) for match in found if match]
    if len(intervals) < len(found) or any(low > high for _, low, high, _ in intervals):
        raise ValueError(
            f"{name} has {text!r}, which is no interval: write it as '[5,inf)' or '[5,20]', several as "
            "'[5,20];[30,40)'."
        )
    return intervals


def check_intervals(value: Any, info: ValidationInfo) -> Any:
    """Raises ``ValueError`` for what :func:`intervals_of` does not read."""
    if value is not None:
        intervals_of(value, info.field_name)
    return value
