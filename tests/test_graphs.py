"""Training by recorded steps: on a CPU a graph that runs its function again stands for one that replays launches."""

import logging
import re
import threading
from contextlib import contextmanager

import pytest
import torch

from recbole_ssm.data.batch import SequenceBatch
from recbole_ssm.errors import UserError
from recbole_ssm.graphs import CudaGraph, GraphedSteps, made_ahead
from recbole_ssm.ops.packing import borders, single_rows
from recbole_ssm.trainer import SequenceTrainer

from .conftest import build


class Graph:
    """What it records is run again at each replay, by the numbers that are in the recorded batch's memory then.

    As of a real one, capturing runs nothing, and what a replay writes lies where the capture put it.
    """

    def __init__(self, pool=None):
        self.pool = pool or object()

    def capture(self, function):
        (trainer,) = (
            cell.cell_contents for cell in function.__closure__ if isinstance(cell.cell_contents, GraphedSteps)
        )
        self.function, self.parameters = function, trainer._parameters()
        (self.written,) = (cell.cell_contents for cell in function.__closure__ if isinstance(cell.cell_contents, list))
        before, random = [tensor.clone() for tensor in trainer._changed()], torch.get_rng_state()
        function()
        self.gradients = [p.grad for p in self.parameters]
        self.terms = self.written[-1]
        for tensor, old in zip(trainer._changed(), before, strict=True):
            tensor.copy_(old)
        torch.set_rng_state(random)

    def replay(self):
        self.function()
        self.terms.copy_(self.written[-1])
        for own, p in zip(self.gradients, self.parameters, strict=True):
            own.copy_(p.grad)


class OtherDropout(Graph):
    def replay(self):
        torch.rand(1)
        super().replay()


class Stale(Graph):
    def replay(self):
        pass


class Frozen(Graph):
    """The batch's numbers were read by the host while it was recorded, and stay what they were."""

    def capture(self, function):
        (place,) = (i for i, c in enumerate(function.__closure__) if isinstance(c.cell_contents, SequenceBatch))
        cell = function.__closure__[place]
        cell.cell_contents = cell.cell_contents.in_one_buffer(pinned=False)
        super().capture(function)


class Uncapturable(Graph):
    def capture(self, function):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def trainer_of(monkeypatch, graph, required=False, model="Mamba4Rec", **settings):
    """A trainer whose steps are graphed by ``graph``, or plain where there is none, and its loaders."""
    monkeypatch.setattr("recbole_ssm.graphs.WARM_UP_STEPS", 2 if graph else 10**9)
    monkeypatch.setattr(SequenceTrainer, "_wants_graphs", lambda *_: True)
    monkeypatch.setattr(
        SequenceTrainer,
        "_graphed_steps",
        lambda t: GraphedSteps(t._backward, t._update, t.optimizer, t.device, required=required, graph=graph),
    )
    settings = {"epochs": 3, "train_batch_size": 64, "dropout_prob": 0.3, "lr_scheduler_type": "linear", **settings}
    config, model, loaders = build(model, **settings)
    return SequenceTrainer(config, model), loaders


def trained(monkeypatch, graph, **settings):
    trainer, (train_data, *_) = trainer_of(monkeypatch, graph, **settings)
    torch.manual_seed(5)
    trainer.fit(train_data, saved=False)
    return trainer, {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("model", ["Mamba4Rec", "STARRec"])
def test_replayed_steps_train_as_plain_ones(monkeypatch, model):
    """The same weights to the bit: batches of one shape share a graph, dropout draws anew, the rate falls."""
    _, plain = trained(monkeypatch, None, model=model)
    trainer, replayed = trained(monkeypatch, Graph, model=model)
    assert trainer.graphs.active
    assert trainer.graphs.replays > len(trainer.graphs._recorded) > 0
    torch.testing.assert_close(replayed, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("graph", "dropout_prob", "reason"),
    [
        (OtherDropout, 0.3, "plain step's|is off by"),
        (Stale, 0.0, "a replayed step's loss is"),
        (Frozen, 0.0, "a replayed step's loss is"),
        (Uncapturable, 0.0, r"cannot be captured \(operation not permitted when stream is capturing\)"),
    ],
)
def test_a_graph_that_is_wrong_is_left_out(monkeypatch, caplog, graph, dropout_prob, reason):
    _, plain = trained(monkeypatch, None, dropout_prob=dropout_prob)
    with caplog.at_level(logging.WARNING):
        trainer, weights = trained(monkeypatch, graph, dropout_prob=dropout_prob)
    (line,) = [record.message for record in caplog.records if "CUDA graph" in record.message]
    assert line.startswith("Training goes on without CUDA graphs")
    assert re.search(reason, line)
    assert not trainer.graphs.active
    assert trainer.graphs.replays <= 1
    if not dropout_prob:  # batches are filled up no longer, and dropout would draw other numbers
        torch.testing.assert_close(weights, plain, rtol=1e-4, atol=1e-5)


def test_where_graphs_are_required_a_wrong_one_raises(monkeypatch):
    with pytest.raises(UserError, match="cuda_graphs: auto"):
        trained(monkeypatch, Uncapturable, required=True)


def test_a_nan_is_noticed_by_replays_too(monkeypatch):
    trainer, (train_data, *_) = trainer_of(monkeypatch, Graph)
    trainer.fit(train_data, saved=False)
    assert trainer.graphs.replays
    with torch.no_grad():
        trainer.model.item_embedding.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN"):
        trainer._train_epoch(train_data, 2)


def test_a_resumed_run_goes_on_as_an_uninterrupted_one(monkeypatch):
    trainer, (train_data, valid_data, _) = trainer_of(monkeypatch, Graph, epochs=4)
    trainer.fit(train_data, valid_data)
    whole = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    def stop(epoch, score):
        if epoch == 1:
            raise InterruptedError

    trainer, (train_data, valid_data, _) = trainer_of(monkeypatch, Graph, epochs=4)
    with pytest.raises(InterruptedError):
        trainer.fit(train_data, valid_data, callback_fn=stop)
    file = trainer.saved_model_file
    trainer, (train_data, valid_data, _) = trainer_of(monkeypatch, Graph, epochs=4)
    trainer.resume_checkpoint(file)
    trainer.fit(train_data, valid_data)
    assert trainer.graphs.replays
    torch.testing.assert_close(dict(trainer.model.state_dict()), whole, rtol=0, atol=0)


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch):
    """torch's own context stays on its side stream where ending the capture raises."""
    now = ["own"]

    @contextmanager
    def graph(*_, **__):
        now[0] = "side"
        yield
        raise RuntimeError("capture invalidated")

    for name, fake in {
        "graph": graph,
        "CUDAGraph": object,
        "graph_pool_handle": object,
        "current_stream": lambda: now[0],
        "set_stream": lambda stream: now.__setitem__(0, stream),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    with pytest.raises(RuntimeError, match="invalidated"):
        CudaGraph().capture(lambda: None)
    assert now == ["own"]


def test_a_graph_keeps_the_tables_that_it_may_read(monkeypatch):
    trainer, (train_data, *_) = trainer_of(monkeypatch, Graph)
    rows = single_rows(3, torch.device("cpu"))
    table = borders(rows).table("positions")
    trainer.fit(train_data, saved=False)
    (recorded, *_) = trainer.graphs._recorded.values()
    assert any(kept.table("positions") is table for kept in recorded.borders)


def test_what_has_shapes_of_numbers_on_the_device_is_not_recorded():
    config, model, _ = build("STARRec", experts_per_token=2, cuda_graphs="on")
    with pytest.raises(UserError, match=r"shapes in STARRec, as it is set|there is no GPU"):
        SequenceTrainer(config, model)
    assert model.reads_device
    assert not build("STARRec")[1].reads_device


def test_on_is_refused_where_there_is_no_gpu():
    config, model, _ = build("Mamba4Rec", cuda_graphs="on")
    with pytest.raises(UserError, match="there is no GPU"):
        SequenceTrainer(config, model)


def test_on_and_off_as_yaml_reads_them():
    config, model, _ = build("Mamba4Rec", cuda_graphs=False)
    assert config["cuda_graphs"] == "off"
    assert SequenceTrainer(config, model).graphs is None
    with pytest.raises(UserError, match="cuda_graphs is 'always'"):
        build("Mamba4Rec", cuda_graphs="always")


def test_the_next_batch_is_made_while_one_is_worked_on():
    made, main = [], threading.current_thread()

    def prepare(batch):
        assert threading.current_thread() is not main
        made.append(batch)
        return 10 * batch

    batches = made_ahead([1, 2, 3], prepare, torch.device("cpu"))
    assert next(batches) == 10
    assert list(batches) == [20, 30]
    assert made == [1, 2, 3]


DYNAMIC = {"distribution": "uniform", "sample_num": 1, "dynamic": True, "candidate_num": 3}


@pytest.mark.parametrize(
    ("name", "settings", "ahead"),
    [
        ("Mamba4Rec", {}, True),
        ("Mamba4Rec", {"train_mode": "prefix", "loss_type": "BPR"}, True),
        ("Mamba4Rec", {"train_mode": "prefix", "loss_type": "BPR", "train_neg_sample_args": DYNAMIC}, False),
        ("SASRec", {"train_mode": "sequence"}, True),
        ("SASRec", {"train_mode": "prefix"}, False),
    ],
)
def test_no_thread_makes_batches_that_the_model_itself_scores(name, settings, ahead):
    config, model, _ = build(name, **settings)
    assert SequenceTrainer(config, model)._can_make_ahead() == ahead


def test_what_goes_wrong_with_a_batch_is_raised_where_it_is_asked_for():
    def prepare(batch):
        if batch == 2:
            raise UserError("a row has an empty history")
        return batch

    batches = made_ahead([1, 2, 3], prepare, torch.device("cpu"))
    assert next(batches) == 1
    with pytest.raises(UserError, match="empty history"):
        next(batches)
