"""SSD4Rec and Mamba4Rec as their authors released them, run beside ours from checkouts of their repositories.

On github these are ZhangYifeng1995/SSD4Rec and chengkai-liu/Mamba4Rec; both need mamba_ssm.
"""

import importlib
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import recbole.trainer
import torch
from recbole.data import data_preparation as recbole_data_preparation
from recbole.data.dataset import SequentialDataset
from torch import Tensor, nn

from benchmarks.speed.contenders import COMMON, RELEASED, Contender, config_of
from recbole_ssm.ops.packing import cu_seqlens_from_lengths, flip_rows, pack, sequence_ids
from recbole_ssm.quick_start import load_data

# Where a parameter of ours is found in theirs: the parts of its name that are called otherwise there.
SSD4REC_NAMES = {
    "layers": "BiSSD_layers", "mamba": "forward_ssd", "conv": "conv1d", "feed_forward": "ffn", "expand": "w_1",
    "contract": "w_2", "norm": "LayerNorm",
}  # fmt: skip
MAMBA4REC_NAMES = {"conv": "conv1d", "expand": "w_1", "contract": "w_2", "norm": "LayerNorm"}


def released_ssd4rec(arguments: Namespace, folder: Path, **fixed: Any) -> Contender:
    """The authors' model, untouched, trained by RecBole's loop on our loader's rows, at the same settings as ours.

    Their loader lays rows end to end one by one in Python; here that is done on the device, in favour of their model.

    Raises:
        ImportError: where ``folder`` holds no ``ssd4rec.py``, or mamba_ssm is not installed.
    """
    released = _released(folder, "ssd4rec", "SSD4Rec")

    class Released(released):  # type: ignore[misc, valid-type]
        def calculate_loss(self, interaction):
            items, *borders = self._laid_out(interaction)
            kept = torch.rand(items.shape, device=items.device) > mask_ratio
            return super().calculate_loss(interaction[self.POS_ITEM_ID], items * kept, *borders)

        def full_sort_predict(self, interaction):
            return super().full_sort_predict(*self._laid_out(interaction))

        def _laid_out(self, interaction):
            items, cu_seqlens = pack(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
            register = sequence_ids(cu_seqlens)
            ends = cu_seqlens_from_lengths(interaction[self.ITEM_SEQ_LEN])[1:].long()
            return items, ends, register, flip_rows(cu_seqlens)

    config = config_of(arguments, "SSD4Rec", fixed, {**COMMON, **RELEASED})
    mask_ratio = config["mask_ratio"]
    _, (train_data, valid_data, _) = load_data(config)
    torch.manual_seed(config["seed"])
    model = Released(config, train_data._dataset).to(config["device"])
    trainer = recbole.trainer.Trainer(config, model)
    return Contender("SSD4Rec, the authors' code", config, train_data, valid_data, model, trainer)


def released_mamba4rec(arguments: Namespace, folder: Path, **fixed: Any) -> Contender:
    """The authors' model, untouched, on RecBole's padded rows by RecBole's loop, at the same settings as ours.

    Raises:
        ImportError: where ``folder`` holds no ``mamba4rec.py``, or mamba_ssm is not installed.
    """
    config = config_of(arguments, "Mamba4Rec", {"train_mode": "prefix", **fixed})
    train_data, valid_data, _ = recbole_data_preparation(config, SequentialDataset(config))
    torch.manual_seed(config["seed"])
    model = _released(folder, "mamba4rec", "Mamba4Rec")(config, train_data._dataset).to(config["device"])
    trainer = recbole.trainer.Trainer(config, model)
    return Contender("Mamba4Rec, the authors' code", config, train_data, valid_data, model, trainer)


def _released(folder: Path, module: str, name: str) -> type:
    sys.path.insert(0, str(folder))
    try:
        return getattr(importlib.import_module(module), name)
    finally:
        sys.path.remove(str(folder))


def copy_weights(ours: nn.Module, theirs: nn.Module, names: dict[str, str]) -> None:
    """Give the authors' model our weights.

    Args:
        ours: any of our models.
        theirs: the same model, of the authors' code.
        names: :data:`SSD4REC_NAMES` or :data:`MAMBA4REC_NAMES`.

    Raises:
        KeyError: where theirs has no such parameter, or another that ours has not.
    """
    state = {}
    for name, value in ours.state_dict().items():
        parts = name.split(".")
        if parts[0] == "feed_forwards":  # Mamba4Rec's; theirs lie within the layers
            parts = ["mamba_layers", parts[1], "ffn", *parts[2:]]
        # A block's own RMSNorm keeps its name.
        state[".".join(p if p == "norm" and "mamba" in parts[:-1] else names.get(p, p) for p in parts)] = value
    wanted = theirs.state_dict()
    # Theirs makes this one even where norm_embedding is off, and then leaves it out.
    unused = {f"LayerNorm.{p}": wanted[f"LayerNorm.{p}"] for p in ("weight", "bias") if f"LayerNorm.{p}" in wanted}
    state = unused | state
    if state.keys() != wanted.keys():
        raise KeyError(f"other parameters: {sorted(state.keys() ^ wanted.keys())}")
    theirs.load_state_dict(state)


@torch.no_grad()
def deviation(ours: Contender, theirs: Contender) -> float:
    """How far scores of all items are apart for the first batch of users, relative to the largest."""
    interaction = _first_rows(theirs.valid_data)
    found: list[Tensor] = []
    for contender in (ours, theirs):
        contender.model.eval()
        found.append(contender.model.full_sort_predict(interaction.to(contender.config["device"]))[:, 1:].double())
        contender.model.train()
    return float((found[0] - found[1]).abs().max() / found[1].abs().max())


def _first_rows(data: Any) -> Any:
    return next(iter(data))[0]
