"""Training by recorded steps: on a CPU a graph that runs its function again stands for one that replays launches."""

import logging
import threading

import pytest
import torch

from recbole_ssm.data.batch import SequenceBatch, size_class
from recbole_ssm.errors import UserError
from recbole_ssm.graphs import MOST_GRAPHS, WARM_UP_STEPS, GraphedSteps, made_ahead
from recbole_ssm.ops.packing import borders
from recbole_ssm.registry import MODELS
from recbole_ssm.trainer import SequenceTrainer

from .conftest import build


class Graph:
    """What it records is run again at each replay, by the numbers that are in the recorded batch's memory then."""

    def __init__(self, pool=None):
        self.pool = pool or object()

    def capture(self, function):
        self.function = function

    def replay(self):
        self.function()


class WrongGraph(Graph):
    def replay(self):
        torch.rand(1)  # so that dropout draws other numbers
        super().replay()


class UncapturableGraph(Graph):
    def capture(self, function):
        function()  # half of what it did must be undone
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def batches_of(model, train_data, longest=50):
    return [model.packed(batch).filled(longest).in_one_buffer(pinned=False) for batch in train_data]


def train(monkeypatch, graph, epochs=3, required=False, model="Mamba4Rec", **settings):
    """Weights after training, and the steps; without a graph by the same filled batches."""

    def steps(trainer):
        made = GraphedSteps(
            trainer._backward,
            trainer._update,
            trainer.optimizer,
            trainer.device,
            required=required,
            graph=graph or Graph,
        )
        made.active = True
        if graph is None:
            made._steps = dict.fromkeys((), 0)
            monkeypatch.setattr("recbole_ssm.graphs.WARM_UP_STEPS", 10**9)
        return made

    monkeypatch.setattr("recbole_ssm.graphs.WARM_UP_STEPS", WARM_UP_STEPS)
    monkeypatch.setattr(SequenceTrainer, "_wants_graphs", lambda *_: True)
    monkeypatch.setattr(SequenceTrainer, "_graphed_steps", steps)
    config, model, loaders = build(model, epochs=epochs, train_batch_size=64, dropout_prob=0.3, **settings)
    trainer = SequenceTrainer(config, model)
    torch.manual_seed(5)
    trainer.fit(loaders[0], saved=False)
    return model.state_dict(), trainer.graphs
