"""Losses over a catalogue: exact cross-entropy without its logits, and scores of sampled items.

Both work through their rows in blocks, so that beside the item table and its gradient no memory grows with the
catalogue, and none with the number of negatives times the embedding size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Scores, or gathered embeddings, that exist at a time. On a CPU small enough to stay in its caches, and to be memory
# that the allocator reuses where it would fetch larger pieces anew from the system; on a GPU large enough to fill it.
BLOCK_BYTES = {"cpu": 4 << 20}
BLOCK_BYTES_ELSEWHERE = 256 << 20


def _rows_per_block(device: torch.device, bytes_per_row: int, at_least: int = 1) -> int:
    return max(at_least, BLOCK_BYTES.get(device.type, BLOCK_BYTES_ELSEWHERE) // max(1, bytes_per_row))


def _product_dtype(*tensors: Tensor) -> torch.dtype:
    """What torch would multiply these in: autocast's dtype where it is on."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(tensors[0].dtype, tensors[1].dtype)


class _FullCrossEntropy(torch.autograd.Function):
    """The gradients are taken in the forward pass, while a block's scores are at hand: they are made once."""

    @staticmethod
    def forward(ctx, hidden, weight, positives, dtype, smoothing):
        count, width = hidden.shape
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        exact = torch.promote_types(dtype, torch.float32)
        rows, table = hidden.detach().to(dtype), weight.detach().to(dtype)
        total = torch.zeros((), dtype=torch.float64 if exact == torch.float64 else torch.float32, device=hidden.device)
        into_hidden = torch.empty(count, width, dtype=exact, device=hidden.device) if needs_hidden else None
        into_weight = torch.zeros(table.shape, dtype=exact, device=hidden.device) if needs_weight else None
        # Never fewer rows than an embedding has places: a block is then no larger than the table itself, and reading
        # the table once a block costs no more than reading the scores.
        size = _rows_per_block(hidden.device, exact.itemsize * len(table), at_least=width)
        scores_of_block = torch.empty(min(size, count), len(table), dtype=dtype, device=hidden.device)
        for begin in range(0, count, size):
            block, wanted = rows[begin : begin + size], positives[begin : begin + size, None]
            scores = torch.mm(block, table.T, out=scores_of_block[: len(block)]).to(exact)
            chosen, top = scores.gather(1, wanted), scores.amax(1, keepdim=True)
            if smoothing:
                chosen = (1 - smoothing) * chosen + smoothing * scores.mean(1, keepdim=True)
            # In its place on a CPU, whose kernel is done with a row before it writes it; a GPU's may not be.
            probability = torch.softmax(scores, 1, out=scores if scores.is_cpu else None)
            # The largest probability is exp(top) over the sum of all, and never rounds to 0.
            total += (top - probability.amax(1, keepdim=True).log() - chosen).sum()
            if not (needs_hidden or needs_weight):
                continue
            slope = probability.scatter_(1, wanted, probability.gather(1, wanted) - (1 - smoothing))
            slope = (slope.sub_(smoothing / len(table)) if smoothing else slope).to(dtype)
            if into_hidden is not None:
                into_hidden[begin : begin + size] = slope @ table
            if into_weight is not None:
                _add_product(into_weight, slope.T, block)
        ctx.into = [None if t is None else t.div_(max(1, count)) for t in (into_hidden, into_weight)]
        ctx.dtypes = hidden.dtype, weight.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.into is None:
            raise RuntimeError("full_cross_entropy keeps its gradients for one backward pass, and this is the second")
        # Multiplied in place: a copy of the table's gradient is as large as the table.
        into = [
            t if t is None else t.mul_(grad).to(dtype) for t, dtype in zip(ctx.into, ctx.dtypes, strict=True)
        ]  # fmt: skip
        ctx.into = None
        return *into, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, which torch fuses where all have one dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def full_cross_entropy(hidden: Tensor, weight: Tensor, positives: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """``F.cross_entropy(hidden @ weight.T, positives, label_smoothing=...)`` without the scores of all rows at once.

    The product is taken in autocast's dtype where that is on, everything else in at least float32.

    Args:
        hidden: ``[M, d]``.
        weight: embeddings of all items, ``[n, d]``.
        positives: int64 ``[M]``.
        label_smoothing: share of the target that is spread evenly over all items (arXiv 1512.00567, section 7).

    Returns:
        The mean over rows, a scalar; NaN where there are none, as torch's.

    Raises:
        RuntimeError: by a second backward pass through the same result.
    """
    dtype = _product_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        return _FullCrossEntropy.apply(hidden, weight, positives, dtype, label_smoothing)


class _ItemScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, items):
        rows, table = hidden.detach(), weight.detach()
        scores = torch.empty(items.shape, dtype=rows.dtype, device=rows.device)
        for part in _blocks(rows, items):
            torch.bmm(table[items[part]], rows[part, :, None], out=scores[part, :, None])
        ctx.save_for_backward(rows, table, items)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, table, items = ctx.saved_tensors
        into_rows, into_table = torch.empty_like(rows), torch.zeros_like(table)
        for part in _blocks(rows, items):
            into_rows[part] = torch.bmm(grad[part, None, :], table[items[part]])[:, 0]
            into_items = grad[part, :, None] * rows[part, None, :]
            into_table.index_add_(0, items[part].flatten(), into_items.flatten(0, 1))
        return into_rows, into_table, None


def _blocks(rows: Tensor, items: Tensor):
    size = _rows_per_block(rows.device, items.shape[1] * rows.shape[1] * rows.element_size())
    return [slice(begin, begin + size) for begin in range(0, len(rows), size)]


def item_scores(hidden: Tensor, weight: Tensor, items: Tensor) -> Tensor:
    """Inner products of each row with the embeddings of its own items, ``[M, K]``.

    Args:
        hidden: ``[M, d]``.
        weight: embeddings of all items, ``[n, d]``.
        items: int64 ``[M, K]``.
    """
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return _ItemScores.apply(hidden.to(dtype), weight.to(dtype), items)


def bce(positive: Tensor, negative: Tensor) -> Tensor:
    """``-log sigmoid(r+) - log(1 - sigmoid(r-))``, the mean over negatives and rows; ``[M, 1]`` and ``[M, K]``."""
    return -F.logsigmoid(positive).mean() - F.logsigmoid(-negative).mean()


def bpr(positive: Tensor, negative: Tensor) -> Tensor:
    """``-log sigmoid(r+ - r-)``, the mean over negatives and rows (arXiv 1205.2618); ``[M, 1]`` and ``[M, K]``."""
    return -F.logsigmoid(positive - negative).mean()


def gbce(positive: Tensor, negative: Tensor, others: int, calibration: float) -> Tensor:
    """Generalised binary cross-entropy ``-(beta log sigmoid(r+) + sum_k log(1 - sigmoid(r-_k))) / (K + 1)``.

    gSASRec (arXiv 2308.07192, section 5): ``beta = alpha (t (1 - 1/alpha) + 1/alpha)`` with the sampling rate
    ``alpha = K / others``; ``t`` goes from 0 (binary cross-entropy) to 1 (scores calibrated as of all negatives).

    Args:
        positive: ``[M, 1]``.
        negative: ``[M, K]``.
        others: how many items negatives are drawn from.
        calibration: ``t``.
    """
    alpha = negative.shape[1] / others
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    return -torch.cat([beta * F.logsigmoid(positive), F.logsigmoid(-negative)], 1).mean()


def sampled_softmax(positive: Tensor, negative: Tensor, others: int) -> Tensor:
    """``-log exp(r+) / (exp(r+) + others / K sum_k exp(r-_k))``, negatives drawn uniformly from the other items.

    Each negative's score is corrected by the logarithm of how often it is expected in the sample (arXiv 1412.2007,
    section 3.3), so that the sum estimates that of full cross-entropy, and equals it where each item is drawn once.

    Args:
        positive: ``[M, 1]``.
        negative: ``[M, K]``.
        others: how many items negatives are drawn from.
    """
    correction = math.log(others / negative.shape[1])
    return (torch.cat([positive, negative + correction], 1).logsumexp(1) - positive[:, 0]).mean()
