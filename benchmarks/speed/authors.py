"""SSD4Rec as its authors released it, run beside ours from a checkout of their repository (github, ZhangYifeng1995)."""

import importlib
import sys
from argparse import Namespace
from pathlib import Path

import recbole.trainer
import torch

from benchmarks.speed.contenders import COMMON, RELEASED, Contender, config_of
from recbole_ssm.ops.packing import cu_seqlens_from_lengths, flip_rows, pack, sequence_ids
from recbole_ssm.quick_start import load_data


def released_ssd4rec(arguments: Namespace, folder: Path) -> Contender:
    """The authors' model, untouched, trained by RecBole's loop on our loader's rows, at the same settings as ours.

    Their loader lays rows end to end one by one in Python; here that is done on the device, in favour of their model.

    Raises:
        ImportError: where ``folder`` holds no ``ssd4rec.py``, or mamba_ssm is not installed.
    """
    sys.path.insert(0, str(folder))
    try:
        released = importlib.import_module("ssd4rec").SSD4Rec
    finally:
        sys.path.remove(str(folder))

    class Released(released):  # type: ignore[misc, valid-type]
        def calculate_loss(self, interaction):
            items, cu_seqlens = pack(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
            kept = torch.rand(items.shape, device=items.device) > mask_ratio
            register = sequence_ids(cu_seqlens).to(torch.int32)
            ends = cu_seqlens_from_lengths(interaction[self.ITEM_SEQ_LEN])[1:].long()
            return super().calculate_loss(
                interaction[self.POS_ITEM_ID], items * kept, ends, register, flip_rows(cu_seqlens)
            )

    config = config_of(arguments, "SSD4Rec", {}, {**COMMON, **RELEASED})
    mask_ratio = config["mask_ratio"]
    _, (train_data, valid_data, _) = load_data(config)
    torch.manual_seed(config["seed"])
    model = Released(config, train_data._dataset).to(config["device"])
    trainer = recbole.trainer.Trainer(config, model)
    return Contender("SSD4Rec, the authors' code", config, train_data, valid_data, model, trainer)
