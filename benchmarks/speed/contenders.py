"""The models that are compared, each with its loaders and its trainer, and what is measured of all of them."""

import copy
import importlib.util
import logging
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from statistics import median
from typing import Any

import recbole.trainer
import torch
from recbole.data import data_preparation as recbole_data_preparation
from recbole.data.dataset import SequentialDataset
from recbole.model.sequential_recommender.sasrec import SASRec

from benchmarks.measure import peak_bytes, rounds
from recbole_ssm import Config
from recbole_ssm.data import create_dataset
from recbole_ssm.quick_start import build_model, load_data
from recbole_ssm.trainer import get_trainer

# Whose rate is the unit of every ratio.
RECBOLE = "SASRec, RecBole's rows"
SEQUENCE_MODE = "SASRec, sequence mode"

QUIET: dict[str, Any] = {"state": "ERROR", "show_progress": False}
# What all comparisons of speed have in common; --settings goes above it.
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "MAX_ITEM_LIST_LENGTH": 200,
    "loss_type": "CE",
    "train_neg_sample_args": None,
    "train_batch_size": 2048,
}

# SSD4Rec is run as its authors' code is for ml-1m.
RELEASED: dict[str, Any] = {
    "hidden_size": 256, "num_layers": 2, "dropout_prob": 0.2, "norm_embedding": True, "mask_ratio": 0.1, "beta": 0.1,
    "d_state": 64, "d_conv": 4, "expand": 2, "headdim": 16, "train_batch_size": 1024, "train_mode": "prefix",
}  # fmt: skip

RECORDED = (
    "MAX_ITEM_LIST_LENGTH", "hidden_size", "loss_type", "seed", "user_inter_num_interval", "item_inter_num_interval",
)  # fmt: skip


def hush() -> None:
    """Keep RecBole's log and its own deprecated calls off the screen."""
    logging.getLogger().setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"recbole\.")


def config_of(
    arguments: Namespace, model: str, fixed: dict[str, Any], defaults: dict[str, Any] = COMMON
) -> Config:  # fmt: skip
    """A configuration with ``defaults``, above them the user's ``--settings``, above these what is ``fixed``."""
    # Untuned, so that figures of today and of before are of the same settings.
    quiet = {**QUIET, "data_path": arguments.data_path, "tuned": False}
    return Config(model, arguments.dataset, config_dict={**quiet, **defaults, **arguments.settings, **fixed})


def on_cuda(arguments: Namespace) -> bool:
    """Whether these settings compute on a GPU."""
    return config_of(arguments, "Mamba4Rec", {})["device"].type == "cuda"


@dataclass
class Contender:
    """A model that is ready to be trained and evaluated.

    Attributes:
        name: what the tables call it.
        config: its configuration.
        train_data: loader of training batches.
        valid_data: loader of the validation set.
        model: freshly initialised.
        trainer: of that model.
    """

    name: str
    config: Config
    train_data: Any
    valid_data: Any
    model: Any
    trainer: Any

    @property
    def unit(self) -> str:
        """What ``train_batch_size`` counts: ``targets`` of whole histories, or ``rows`` of one target each."""
        return "targets" if hasattr(self.train_data, "num_targets") else "rows"

    @property
    def num_targets(self) -> int:
        """How many an epoch."""
        return getattr(self.train_data, "num_targets", None) or len(self.train_data._dataset)

    def set_batch(self, size: int) -> None:
        """Make the training loader anew, with another ``train_batch_size``."""
        self.config["train_batch_size"] = size
        old = self.train_data
        self.train_data = type(old)(self.config, old._dataset, old._sampler, shuffle=old.shuffle)

    def settings(self) -> dict[str, Any]:
        """What sets it apart, for its row of a result file."""
        layers = self.config["num_layers"] or self.config["n_layers"]
        return {
            "model": self.config["model"],
            "layers": layers,
            "hidden_size": self.config["hidden_size"],
            "train_batch_size": self.config["train_batch_size"],
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
        }


def recboles_sasrec(arguments: Namespace, **fixed: Any) -> Contender:
    """SASRec as RecBole has it: its model, its dataset of copied prefixes, its loaders and its trainer."""
    config = config_of(arguments, "SASRec", fixed)
    train_data, valid_data, _ = recbole_data_preparation(config, SequentialDataset(config))
    torch.manual_seed(config["seed"])
    model = SASRec(config, train_data._dataset).to(config["device"])
    return Contender(RECBOLE, config, train_data, valid_data, model, recbole.trainer.Trainer(config, model))


def contender(
    arguments: Namespace, model: str, datasets: dict[str, Any] | None = None,
    defaults: dict[str, Any] | None = None, **fixed: Any
) -> Contender:  # fmt: skip
    """A model as ``recbole_ssm.run_recbole`` would build it, trained as it is by default, SASRec in sequence mode.

    Args:
        arguments: ``data_path``, ``dataset`` and ``settings``.
        model: its name.
        datasets: keeps the filtered data of each model, for configurations that differ in nothing of them.
        defaults: settings below all others; what all comparisons have in common where absent.
        fixed: settings above all others.
    """
    own = {"SASRec": {"train_mode": "sequence"}, "SSD4Rec": RELEASED}.get(model, {})
    config = config_of(arguments, model, fixed, {**COMMON, **own} if defaults is None else defaults)
    dataset = None
    if datasets is not None:
        if model not in datasets:
            datasets[model] = create_dataset(config)
        dataset = copy.deepcopy(datasets[model])  # which is split once
        dataset.config = config
    _, (train_data, valid_data, _) = load_data(config, dataset)
    built = build_model(config, train_data)
    trainer = get_trainer(config["MODEL_TYPE"], model)(config, built)
    name = SEQUENCE_MODE if model == "SASRec" else model
    if config["train_mode"] == "prefix":
        name += ", prefix rows"
    return Contender(name, config, train_data, valid_data, built, trainer)


def build(arguments: Namespace, **fixed: Any) -> Iterator[Contender]:
    """All contenders that ``--models`` names, RecBole's own first; by default SSD4Rec on a GPU alone."""
    print(f"building {RECBOLE}", flush=True)
    yield recboles_sasrec(arguments, **fixed)
    for model in arguments.models or ("SASRec", "STARRec", "Mamba4Rec", *(["SSD4Rec"] * on_cuda(arguments))):
        print(f"building {model}", flush=True)
        yield contender(arguments, model, **fixed)
        if model == "Mamba4Rec" and on_cuda(arguments) and importlib.util.find_spec("selective_scan_cuda"):
            others = contender(arguments, model, ssm_backend="mamba_ssm", **fixed)
            yield replace(others, name="Mamba4Rec, mamba_ssm's kernels")


class Steps:
    """The next optimizer steps of a contender, through its trainer's own code path, at every call.

    It stands in for the training loader and yields that loader's next batches, over the ends of epochs, so that every
    call sees new ones.

    Attributes:
        steps: how many a call.
        num_targets: how many targets the latest call has trained on.
    """

    def __init__(self, of: Contender, anomaly_detection: bool = False):
        self.contender, self.anomaly_detection = of, anomaly_detection
        self.steps, self.num_targets = 1, 0
        self._batches = _endless(of.train_data)

    @property
    def unit(self) -> str:
        """What a batch is counted in."""
        return self.contender.unit

    def __len__(self) -> int:
        return self.steps

    def __iter__(self):
        for batch in islice(self._batches, self.steps):
            self.num_targets += len(batch)
            yield batch

    def set_batch(self, batch: int) -> None:
        """Go on with this ``train_batch_size``."""
        self.contender.set_batch(batch)
        self._batches = _endless(self.contender.train_data)

    def peak(self) -> int | None:
        """Take them, and tell their peak memory."""
        return peak_bytes(self.take, self.contender.config["device"].type == "cuda")

    def take(self) -> None:
        """Take them."""
        self.num_targets = 0
        with torch.autograd.set_detect_anomaly(self.anomaly_detection):
            self.contender.trainer._train_epoch(self, 0)
        synchronise()


def _endless(train_data: Any) -> Iterator[Any]:
    epoch = 0
    while True:
        if hasattr(train_data, "set_epoch"):
            train_data.set_epoch(epoch)
        yield from train_data
        epoch += 1


def synchronise() -> None:
    """Wait for the GPU, where there is one, so that a clock on the wall tells the truth."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def wall_rounds(functions: dict[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """As :func:`benchmarks.measure.rounds`, by the clock on the wall: for what a GPU and a CPU do in turns."""

    def waited(function: Callable[[], object]) -> Callable[[], None]:
        def call() -> None:
            function()
            synchronise()

        return call

    synchronise()
    return rounds({name: waited(function) for name, function in functions.items()}, count, cuda=False)


def spread(values: list[float]) -> dict[str, float]:
    """Median of the rounds, and the least and the largest."""
    return {"median": median(values), "least": min(values), "largest": max(values)}


def ratios(values: dict[str, list[float]], unit: str) -> dict[str, dict[str, float]]:
    """Each one's values over those of ``unit`` in the same round."""
    return {
        name: spread([value / other for value, other in zip(own, values[unit], strict=True)])
        for name, own in values.items()
    }


def recorded(config: Config, dataset: str) -> dict[str, Any]:
    """The settings that a part's figures hang on."""
    known = {key: config[key] for key in RECORDED}
    return {"dataset": dataset, "split": config["eval_args"]["split"], **known, "dtype": "float32"}
