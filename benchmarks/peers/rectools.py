"""RecTools' SASRec, run by the Python of an environment that has RecTools: ``python -m benchmarks.peers.rectools``."""

from typing import Any

import pandas as pd
from pytorch_lightning import Callback, Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

from benchmarks.peers.serving import TRAINER, Serving, read_job


class Steps(Serving, Callback):
    """Steps of RecTools' own fit."""


def main() -> None:
    """Train as is asked for on stdin."""
    job = read_job()
    table = pd.read_csv(job["data"])
    table[Columns.Datetime] = pd.to_datetime(table.pop("timestamp"), unit="s")
    table[Columns.Weight] = 1.0
    data = Dataset.construct(table.rename(columns={"user": Columns.User, "item": Columns.Item}))
    steps = Steps(lambda batch: (batch["y"] != 0).sum(), job["cuda"])

    def trainer() -> Any:
        return Trainer(**TRAINER, accelerator="gpu" if job["cuda"] else "cpu", callbacks=[steps])

    def fit(batch: int) -> None:
        # Its feed-forward layers are as wide as the model, which no setting changes.
        model = SASRecModel(
            n_factors=job["hidden_size"], n_blocks=job["n_layers"], n_heads=job["n_heads"], loss="softmax",
            dropout_rate=job["dropout"], session_max_len=job["length"], lr=job["learning_rate"], batch_size=batch,
            get_trainer_func=trainer,
        )  # fmt: skip
        model.fit(data)

    steps.run("rectools", fit)


if __name__ == "__main__":
    main()
