"""The models that the parts train, each by its trainer's own code path."""

import logging
from argparse import Namespace
from typing import Any

import torch

from benchmarks.speed.contenders import Contender, config_of, contender, hush
from recbole_ssm.data import create_dataset

MODELS = ("STARRec", "Mamba4Rec", "SASRec", "SSD4Rec")
PRECISIONS = ("float32", "bfloat16")

# Of each model what makes a step random.
WITHOUT_DROPOUT: dict[str, dict[str, Any]] = {
    "SASRec": {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0},
    "SSD4Rec": {"dropout_prob": 0.0, "mask_ratio": 0.0},
}

_datasets: dict[str, Any] = {}


def built(about: dict[str, Any], model: str, precision: str = "float32", **fixed: Any) -> Contender:
    """A freshly initialised model; its data are loaded once a process.

    Args:
        about: see :func:`benchmarks.gpu.measure`.
        model: one of :data:`MODELS`.
        precision: ``bfloat16`` is ``enable_amp``.
        fixed: further settings.
    """
    hush()
    logging.getLogger().setLevel(logging.WARNING)  # what is not used here, and why
    amp: dict[str, Any] = {"enable_amp": precision == "bfloat16"}
    return contender(arguments_of(about), model, _datasets, **amp, **fixed)


def load(about: dict[str, Any], model: str) -> None:
    """Load a model's data, for :func:`built` to find."""
    hush()
    _datasets[model] = create_dataset(config_of(arguments_of(about), model, {}))


def arguments_of(about: dict[str, Any]) -> Namespace:
    """As :func:`benchmarks.speed.contenders.contender` wants them."""
    device = {"use_gpu": False} if about["device"] == "cpu" else {}
    return Namespace(data_path=about["data_path"], dataset=about["dataset"], settings={**about["settings"], **device})


def without_dropout(model: str) -> dict[str, Any]:
    """Settings with which a step is the same function of its batch each time."""
    return WITHOUT_DROPOUT.get(model, {"dropout_prob": 0.0})


def chosen(about: dict[str, Any]) -> tuple[str, ...]:
    """The models that ``--models`` names, all else."""
    return tuple(about["models"] or MODELS)


def wait(about: dict[str, Any]) -> None:
    """For the GPU."""
    if about["device"] == "cuda":
        torch.cuda.synchronize()
