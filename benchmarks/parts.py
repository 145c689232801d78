"""Which part of a training step each event of a profile belongs to."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import record_function

from benchmarks import floors
from benchmarks.floors import Cost
from recbole_ssm.layers import (
    MixtureOfExperts,
    PreferenceAwareAttention,
    causal_conv,
    mamba,
    mamba2,
    mamba3,
    moving_average,
    preference_attention,
)
from recbole_ssm.models import recblr
from recbole_ssm.models.base import PackedRecommender
from recbole_ssm.ops import rotating_scan

# A range's name is one of these words and a part. An op's or the loss's arithmetic is a formula (floors.py), whatever
# its backend does for it; that of the other ranges is the matrix products that run in them.
COUNTED, BY_FORMULA = "counted", "formula"
BACKWARD = "autograd::engine::evaluate_function"

# Where the layers find their ops. With all of an op in one range, its backends can be compared.
LAYERS = (causal_conv, mamba, mamba2, mamba3, moving_average, preference_attention, recblr, rotating_scan)
OP_PARTS = {
    "selective_scan": "scan",
    "selective_scan_last": "scan",
    "ssd": "scan",
    "ssd_last": "scan",
    "causal_conv": "convolution",
    "preference_attention": "attention",
}

# Position of the left one of the two matrices among the arguments of torch's products.
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1, "aten::baddbmm_": 1}


class FirstBatches:
    """A loader's first batches, each fetched inside a range; everything else is the loader's own.

    Attributes:
        seconds: from the first batch being asked for to the end of the last one's step.
        bytes: of all batches.
    """

    def __init__(self, loader: Any, count: int):
        self._loader, self._count = loader, count
        self.seconds, self.bytes = 0.0, 0

    def __getattr__(self, name: str):
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return self._count

    def __iter__(self):
        begin = perf_counter()
        batches: Iterator[Any] | None = None
        for _ in range(self._count):
            with record_function(f"{COUNTED} loading"):
                batches = batches or iter(self._loader)
                batch = next(batches)
            self.bytes += _bytes(batch)
            yield batch
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = perf_counter() - begin


def _bytes(batch: Any) -> int:
    """Of the tensors in a SequenceBatch or in RecBole's Interaction."""
    tensors = getattr(batch, "interaction", None) or vars(batch)
    return sum(t.numel() * t.element_size() for t in tensors.values() if isinstance(t, Tensor))


@contextmanager
def ranges(model: PackedRecommender, costs: dict[str, Cost]) -> Iterator[None]:
    """Put each part of ``model`` inside a profiler range for as long as the context lasts.

    Args:
        model: what is trained or evaluated.
        costs: takes up what the ops, look-ups and losses cost that run meanwhile, by part.
    """
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    all_items = model.n_items if model.loss_type == "CE" else None
    ranking_loss = partial(floors.ranking_loss, all_items)
    with ExitStack() as stack:

        def put(owner: Any, name: str, part: str, cost: Callable[..., Cost] | None = None, kind: str = COUNTED) -> None:
            wrapped = _ranged(getattr(owner, name), f"{kind} {part}", part, cost, costs)
            stack.enter_context(mock.patch.object(owner, name, wrapped))

        for layer in LAYERS:
            for name in OP_PARTS.keys() & vars(layer):
                put(layer, name, OP_PARTS[name], floors.OP_COSTS[name], BY_FORMULA)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                put(module, "forward", "embedding", floors.embedding)
            elif isinstance(module, PreferenceAwareAttention):
                put(module, "forward", "attention")
        for mixture in mixtures:
            put(mixture, "forward", "experts")
        put(model, "calculate_loss", "layers")  # what lies in none of the ranges inside it
        put(model, "loss", "experts" if mixtures else "loss")  # beside the ranking loss, the terms for the experts
        put(model, "ranking_loss", "loss", ranking_loss, BY_FORMULA)
        put(model, "full_sort_predict", "evaluation", floors.scores_read)
        yield


def _ranged(function: Callable, label: str, part: str, cost: Callable[..., Cost] | None, costs: dict[str, Cost]):
    def ranged(*args, **kwargs):
        with record_function(label):
            result = function(*args, **kwargs)
        # What the backward pass computes again, to save memory, is no part of the least that is needed.
        if cost is not None and torch._C._current_graph_task_id() == -1:
            costs[part] += cost(torch.is_grad_enabled(), result, *args, **kwargs)
        return result

    return ranged


@dataclass
class Share:
    """What a profile says of one part.

    Attributes:
        host: seconds of the process that runs the model; on a CPU these are the part's time.
        device: seconds of the GPU.
        products: cost of its matrix products.
    """

    host: float = 0.0
    device: float = 0.0
    products: Cost = field(default_factory=Cost)


def attribute(events: list[FunctionEvent], itemsize: int) -> dict[str, Share]:
    """Give each event's own time to the part whose range it ran in, or whose gradient it computes.

    A backward event carries the number of the forward op that it differentiates. What neither lies in a range nor
    has such a number belongs to ``other``, as the GPU's time does that no event of the host accounts for.

    Args:
        events: of profiles with ``record_shapes``, in the order in which they began.
        itemsize: bytes a number that matrix products work on.
    """
    host_events = [e for e in events if e.device_type == DeviceType.CPU]
    # Numbered are ops that autograd might record, by the next number that it will give: of all that carry the same
    # one, the last to begin has got it.
    forward: dict[tuple[int, int | None], str | None] = {}
    for event in host_events:
        if event.sequence_nr >= 0 and not any(a.name.startswith(BACKWARD) for a in _with_ancestors(event)):
            forward[event.sequence_nr, event.thread] = _label(event, {})[0]
    shares: dict[str, Share] = defaultdict(Share)
    for event in host_events:
        label, again = _label(event, forward)
        kind, part = label.split() if label else (COUNTED, "other")
        share = shares[part]
        share.host += event.self_cpu_time_total / 1e6
        share.device += sum(kernel.duration for kernel in event.kernels) / 1e6
        if kind == COUNTED and not again:
            share.products += _product(event, itemsize)
    on_device = (e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation)
    busy = sum(e.time_range.elapsed_us() for e in on_device) / 1e6
    shares["other"].device += max(0.0, busy - sum(share.device for share in shares.values()))
    return dict(shares)


def _with_ancestors(event: FunctionEvent | None) -> Iterator[FunctionEvent]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _label(event: FunctionEvent, forward: dict[tuple[int, int | None], str | None]) -> tuple[str | None, bool]:
    """The range that an event belongs to, and whether it is forward work that the backward pass does again."""
    label = None
    for ancestor in _with_ancestors(event):
        if ancestor.name.startswith(BACKWARD):
            again = label is not None
            return label or forward.get((ancestor.sequence_nr, ancestor.fwd_thread)), again
        if label is None:
            label = _range(ancestor.name)
    return label, False


def _range(name: str) -> str | None:
    if name.startswith((f"{COUNTED} ", f"{BY_FORMULA} ")):
        return name
    return f"{BY_FORMULA} optimizer" if name.startswith("Optimizer.") else None


def _product(event: FunctionEvent, itemsize: int) -> Cost:
    """Cost of a matrix product, nothing for any other event."""
    first = PRODUCTS.get(event.name)
    if first is None or any(a.name in PRODUCTS for a in _with_ancestors(event.cpu_parent)):
        return Cost()
    shapes: Any = event.input_shapes  # a list for each tensor, whatever torch's annotation says
    return floors.matrix_product(shapes[first], shapes[first + 1], itemsize)
