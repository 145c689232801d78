"""Training steps that replay as CUDA graphs, each compared with the plain step before it is trusted."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recbole_ssm.data.batch import SequenceBatch
from recbole_ssm.errors import UserError
from recbole_ssm.ops.packing import Borders, known_borders

# Plain steps of each shape before its graph is captured: autotune and the optimizer's first step do not belong in it.
WARM_UP_STEPS = 2
# Each keeps its activations. A batch of yet another shape takes plain steps.
MOST_GRAPHS = 16
# How far gradients may be from the plain step's, relative to their norm: the same kernels on the same numbers, but for
# the order of sums that torch itself leaves open.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


class CudaGraph:
    """A recorded sequence of launches (:class:`torch.cuda.CUDAGraph`)."""

    def __init__(self, pool: Any = None):
        self._graph, self.pool = torch.cuda.CUDAGraph(), pool or torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], None]) -> None:
        """Record what ``function`` launches, without running it."""
        stream = torch.cuda.current_stream()
        try:
            # Of other threads' calls (the next batch is being made meanwhile) nothing is recorded.
            with torch.cuda.graph(self._graph, pool=self.pool, capture_error_mode="thread_local"):
                function()
        finally:
            torch.cuda.set_stream(stream)  # torch does not come back from a capture that failed

    def replay(self) -> None:
        """Launch it all again."""
        self._graph.replay()


@dataclass
class _Recorded:
    """One shape's graph, the bytes of its batch, and what it writes: the loss's terms and the gradients.

    ``borders`` hold tables that it may read, which nothing else might keep.
    """

    graph: Any
    buffer: Tensor
    terms: Tensor
    gradients: list[Tensor | None]
    borders: list[Borders]
    trusted: bool = False


class GraphedSteps:
    """Training steps, plain until a graph of the batch's shape has been captured and found right.

    A step is ``backward(batch)``, which leaves the gradients in the parameters and returns the loss's terms, and
    ``update()``, which changes parameters and the optimizer's state in place. The first replay is of another batch than
    the one that was captured, so that a number of the batch that has got into the graph from the host shows.

    Args:
        backward: see above; may not read the device.
        update: see above.
        optimizer: its parameters and state are put back where a graph turns out wrong.
        device: where the parameters are.
        precision: dtype of the step's products.
        required: raise where a graph cannot be captured or differs, instead of going on without.
        graph: makes an empty graph.

    Attributes:
        active: whether graphs are captured and replayed.
        replays: how many steps were.
    """

    def __init__(
        self,
        backward: Callable[[SequenceBatch], Tensor],
        update: Callable[[], None],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        precision: torch.dtype = torch.float32,
        required: bool = False,
        graph: Callable[..., Any] = CudaGraph,
    ):
        self._backward, self._update, self._optimizer = backward, update, optimizer
        self._device, self._tolerance, self._required = device, TOLERANCE[precision], required
        self._new_graph = graph
        self._recorded: dict[Any, _Recorded] = {}
        self._steps: Counter[Any] = Counter()
        self._pool: Any = None
        self.active = True
        self.replays = 0

    def __call__(self, batch: SequenceBatch) -> Tensor:
        """Take a step by a batch that lies on the host in one buffer; returns the terms of its loss, ``[n]``."""
        if not self.active:
            return self._plain(batch.to(self._device))
        shape = batch.shape
        if shape in self._recorded:
            recorded = self._recorded[shape]
            return self._replay(recorded, batch) if recorded.trusted else self._compare(recorded, batch)
        self._steps[shape] += 1
        if self._steps[shape] > WARM_UP_STEPS and len(self._recorded) < MOST_GRAPHS:
            self._capture(shape, batch)
        return self._plain(batch.to(self._device))

    def _plain(self, batch: SequenceBatch) -> Tensor:
        terms = self._backward(batch)
        self._update()
        return terms

    def _replay(self, recorded: _Recorded, batch: SequenceBatch) -> Tensor:
        recorded.buffer.copy_(batch.bytes, non_blocking=True)
        recorded.graph.replay()
        self.replays += 1
        return recorded.terms

    def _capture(self, shape: Any, batch: SequenceBatch) -> None:
        buffer = batch.bytes.to(self._device, copy=True)
        on_device = batch.within(buffer)
        graph = self._new_graph(self._pool)
        written: list[Tensor] = []

        def step() -> None:
            written.append(self._plain(on_device))

        try:
            graph.capture(step)
        except RuntimeError as error:
            self._give_up(f"a step cannot be captured ({str(error).splitlines()[0]})")
            return
        gradients = [parameter.grad for parameter in self._parameters()]
        self._recorded[shape] = _Recorded(graph, buffer, written[-1], gradients, known_borders())
        self._pool = graph.pool

    def _compare(self, recorded: _Recorded, batch: SequenceBatch) -> Tensor:
        """Take a step by the graph if that gives what the plain step gives."""
        random = _random_state(self._device)
        on_device = batch.to(self._device)
        expected = self._backward(on_device)
        gradients = [None if p.grad is None else p.grad.clone() for p in self._parameters()]
        before = [tensor.clone() for tensor in self._changed()]
        _set_random_state(self._device, random)
        terms = self._replay(recorded, batch)
        wrong = self._difference(terms, expected, recorded.gradients, gradients)
        if not wrong:
            recorded.trusted = True
            return terms
        for tensor, old in zip(self._changed(), before, strict=True):
            tensor.copy_(old)
        _set_random_state(self._device, random)
        self._give_up(wrong)
        return self._plain(on_device)

    def _give_up(self, reason: str) -> None:
        if self._required:
            raise UserError(f"CUDA graphs are of no use here: {reason}; set cuda_graphs: auto.")
        self.active = False
        self._recorded.clear()
        logging.getLogger().warning(f"Training goes on without CUDA graphs: {reason}")

    def _difference(self, terms: Tensor, expected: Tensor, found: list, gradients: list) -> str:
        """In which respect the replay differs from the plain step; empty where it does not."""
        if not torch.allclose(terms, expected, rtol=self._tolerance, atol=1e-6, equal_nan=True):
            return f"a replayed step's loss is {terms.tolist()}, the plain step's {expected.tolist()}"
        for number, (own, gradient) in enumerate(zip(found, gradients, strict=True)):
            if own is None or gradient is None:
                if own is not gradient:
                    return f"only one of replayed and plain step gives parameter {number} a gradient"
                continue
            off, norm = float((own - gradient).norm()), float(gradient.norm())
            if math.isfinite(norm) and not off <= self._tolerance * norm + 1e-7:
                return f"parameter {number}'s gradient is off by {off:.3g} at a norm of {norm:.3g}"
        return ""

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _changed(self) -> list[Tensor]:
        """What a step changes in place."""
        state = [v for p in self._parameters() for v in self._optimizer.state[p].values() if isinstance(v, Tensor)]
        return [p.data for p in self._parameters()] + state


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def made_ahead(batches: Any, prepare: Callable[[Any], Any], device: torch.device) -> Iterator[Any]:
    """``prepare(batch)`` of each batch, made by another thread while the one before it is worked on.

    Nothing else may draw from NumPy's random numbers meanwhile, if the batches do.

    Args:
        batches: a loader.
        prepare: see above.
        device: whose page-locked memory the thread takes.
    """
    iterator, end = iter(batches), object()

    def make() -> Any:
        batch = next(iterator, end)
        return batch if batch is end else prepare(batch)

    def begin() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a thread starts with the first

    with ThreadPoolExecutor(1, "batches", begin) as worker:
        coming = worker.submit(make)
        while (batch := coming.result()) is not end:
            coming = worker.submit(make)
            yield batch
