"""A peer in the place of RecTools and RePlay: it serves steps as they do, and trains nothing."""

import time
from types import SimpleNamespace

import pandas as pd
import torch

from benchmarks.peers.serving import Serving, read_job

FITS = 16  # sequences a step; more are out of memory


def main():
    job = read_job()
    lengths = pd.read_csv(job["data"]).groupby("user").size()
    steps = Serving(lambda batch: batch.sum(), job["cuda"])
    print("what a library prints is no answer")

    def fit(batch):
        if batch > FITS:
            raise torch.OutOfMemoryError
        trainer, module = SimpleNamespace(should_stop=False), torch.nn.Linear(job["hidden_size"], 2)
        steps.on_train_start(trainer, module)
        while not trainer.should_stop:
            time.sleep(0.02)  # whatever the batch is: the larger, the faster
            steps.on_train_batch_end(trainer, module, None, torch.tensor(lengths[:batch] - 1), 0)

    steps.run("torch", fit)


if __name__ == "__main__":
    main()
