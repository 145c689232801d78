"""RePlay's SASRec, run by the Python of an environment that has RePlay: ``python -m benchmarks.peers.replay``."""

from pathlib import Path

import lightning
import pandas as pd
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import ParquetModule, TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.nn.lightning import LightningModule
from replay.nn.lightning.optimizer import OptimizerFactory
from replay.nn.sequential import SasRec
from replay.nn.transform.template import make_default_sasrec_transforms

from benchmarks.peers.serving import TRAINER, Serving, read_job

ITEM = "item_id"


class Steps(Serving, lightning.Callback):
    """Steps of a fit as RePlay's documentation has it."""


def main() -> None:
    """Train as is asked for on stdin."""
    job = read_job()
    table = pd.read_csv(job["data"])
    table[ITEM] = table["item"] - 1  # RePlay pads with the number of items
    histories = str(Path(job["data"]).with_suffix(".parquet"))
    table.groupby("user", sort=False)[ITEM].agg(list).reset_index(drop=True).to_frame().to_parquet(histories)
    item = TensorFeatureInfo(
        ITEM, FeatureType.CATEGORICAL, is_seq=True, feature_hint=FeatureHint.ITEM_ID, cardinality=job["items"],
        padding_value=job["items"], embedding_dim=job["hidden_size"],
        feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, ITEM)],
    )  # fmt: skip
    schema = TensorSchema([item])
    # One more than the length: the first is read only, the last predicted only.
    metadata = {"train": {ITEM: {"shape": job["length"] + 1, "padding": job["items"]}}}
    steps = Steps(lambda batch: batch["target_padding_mask"].sum(), job["cuda"])

    def fit(batch: int) -> None:
        model = SasRec.from_params(
            schema, embedding_dim=job["hidden_size"], num_heads=job["n_heads"], num_blocks=job["n_layers"],
            max_sequence_length=job["length"], dropout=job["dropout"], hidden_dim=job["inner_size"],
        )  # fmt: skip
        module = LightningModule(model, OptimizerFactory(learning_rate=job["learning_rate"]))
        data = ParquetModule(batch, metadata, make_default_sasrec_transforms(schema), train_path=histories)
        trainer = lightning.Trainer(**TRAINER, accelerator="gpu" if job["cuda"] else "cpu", callbacks=[steps])
        trainer.fit(module, data)

    steps.run("replay-rec", fit)


if __name__ == "__main__":
    main()
