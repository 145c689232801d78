"""Losses over a catalogue: exact cross-entropy without its logits, and scores of sampled items.

Both work through their rows in blocks, so that beside the item table and its gradient no memory grows with the
catalogue, and none with the number of negatives times the embedding size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_ssm.data.batch import SeenItems

# Scores, or gathered embeddings, that exist at a time. On a CPU small enough to stay in its caches, and to be memory
# that the allocator reuses where it would fetch larger pieces anew from the system; on a GPU large enough to fill it.
BLOCK_BYTES = {"cpu": 4 << 20}
BLOCK_BYTES_ELSEWHERE = 256 << 20

# On a CPU the scores of all items are a product of matrices, and cheaper than gathering the embeddings of K items a row
# as long as there are no more items than this many times K.
ALL_SCORES = 64


def _rows_per_block(device: torch.device, bytes_per_row: int, at_least: int = 1) -> int:
    return max(at_least, BLOCK_BYTES.get(device.type, BLOCK_BYTES_ELSEWHERE) // max(1, bytes_per_row))


def mean_over_targets(values: Tensor, target_weights: Tensor | None) -> Tensor:
    """The mean of ``[M, ...]``; with ``target_weights [M]``, which sum to 1, each target by its own."""
    if target_weights is None:
        return values.mean()
    return torch.dot(values.flatten(1).mean(1) if values.dim() > 1 else values, target_weights.to(values.dtype))


def _product_dtype(*tensors: Tensor) -> torch.dtype:
    """What torch would multiply these in: autocast's dtype where it is on."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(tensors[0].dtype, tensors[1].dtype)


class _FullCrossEntropy(torch.autograd.Function):
    """The gradients are taken in the forward pass, while a block's scores are at hand: they are made once."""

    @staticmethod
    def forward(ctx, hidden, weight, positives, dtype, smoothing, target_weights, seen):
        count, width = hidden.shape
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        exact = torch.promote_types(dtype, torch.float32)
        rows, table = hidden.detach().to(dtype), weight.detach().to(dtype)
        total = None
        into_hidden = torch.empty(count, width, dtype=exact, device=hidden.device) if needs_hidden else None
        make = torch.empty if count else torch.zeros
        into_weight = make(table.shape, dtype=exact, device=hidden.device) if needs_weight else None
        # Never fewer rows than an embedding has places: a block is then no larger than the table itself, and reading
        # the table once a block costs no more than reading the scores.
        size = _rows_per_block(hidden.device, exact.itemsize * len(table), at_least=width)
        scores_of_block = torch.empty(min(size, count), len(table), dtype=dtype, device=hidden.device)
        loss_and_slope = _loss_and_slope_on_cpu if hidden.is_cpu else _loss_and_slope
        for begin in range(0, count, size):
            part = slice(begin, begin + size)
            block = rows[part]
            scores = torch.mm(block, table.T, out=scores_of_block[: len(block)]).to(exact)
            wanted = positives[part, None]
            if seen is not None:
                leave_out(scores, seen.of(part), wanted)
            losses, slope = loss_and_slope(scores, wanted, smoothing, needs_hidden or needs_weight)
            loss = losses.sum() if target_weights is None else torch.dot(losses, target_weights[part].to(exact))
            total = loss if total is None else total + loss
            if slope is None:
                continue
            slope = (slope if target_weights is None else slope.mul_(target_weights[part, None])).to(dtype)
            if into_hidden is not None:
                _into(into_hidden[part], slope, table)
            if into_weight is not None:
                _into(into_weight, slope.T, block, add=begin > 0)
        ctx.into = [into_hidden, into_weight]
        if target_weights is None:
            for into in filter(lambda t: t is not None, ctx.into):
                into.div_(max(1, count))
            total = (hidden.new_zeros((), dtype=exact) if total is None else total) / count
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.into is None:
            raise RuntimeError("full_cross_entropy keeps its gradients for one backward pass, and this is the second")
        # Multiplied in place: a copy of the table's gradient is as large as the table.
        torch._foreach_mul_([t for t in ctx.into if t is not None], grad)
        into = [t if t is None else t.to(dtype) for t, dtype in zip(ctx.into, ctx.dtypes, strict=True)]
        ctx.into = None
        return *into, None, None, None, None, None


def _loss_and_slope_on_cpu(scores: Tensor, wanted: Tensor, smoothing: float, differentiate: bool):
    """Cross-entropy of each row of ``scores [m, n]``, ``[m]``, and its gradient, which takes the scores' place."""
    chosen, top = scores.gather(1, wanted), scores.amax(1, keepdim=True)
    if smoothing:
        chosen = (1 - smoothing) * chosen + smoothing * scores.mean(1, keepdim=True)
    # In its place: the kernel is done with a row before it writes it.
    probability = torch.softmax(scores, 1, out=scores)
    # The largest probability is exp(top) over the sum of all, and never rounds to 0.
    losses = (top - probability.amax(1, keepdim=True).log() - chosen)[:, 0]
    if not differentiate:
        return losses, None
    slope = probability.scatter_(1, wanted, probability.gather(1, wanted) - (1 - smoothing))
    return losses, slope.sub_(smoothing / scores.shape[1]) if smoothing else slope


def _loss_and_slope(scores: Tensor, wanted: Tensor, smoothing: float, differentiate: bool):
    """As :func:`_loss_and_slope_on_cpu`, in as few launches as it takes."""
    log_probability = scores.log_softmax(1)
    losses = F.nll_loss(log_probability, wanted[:, 0], reduction="none")
    if smoothing:
        losses = (1 - smoothing) * losses - smoothing * log_probability.mean(1)
    if not differentiate:
        return losses, None
    slope = log_probability.exp_().scatter_(1, wanted, smoothing - 1, reduce="add")
    return losses, slope.sub_(smoothing / scores.shape[1]) if smoothing else slope


def _into(total: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """``total = a @ b``, or ``total += a @ b``, in place where all have one dtype."""
    if total.dtype != a.dtype:
        total.copy_(total + a @ b if add else a @ b)
    elif add:
        total.addmm_(a, b)
    else:
        torch.mm(a, b, out=total)


def leave_out(scores: Tensor, seen: Tensor, wanted: Tensor) -> None:
    """Give the items ``seen [m, L]`` the score -inf in ``scores [m, n]``, but for those that are ``wanted [m, 1]``."""
    chosen = scores.gather(1, wanted)
    scores.scatter_(1, seen, -torch.inf).scatter_(1, wanted, chosen)


def full_cross_entropy(
    hidden: Tensor,
    table: Tensor,
    positives: Tensor,
    label_smoothing: float = 0.0,
    target_weights: Tensor | None = None,
    seen: SeenItems | None = None,
) -> Tensor:
    """``F.cross_entropy(hidden @ table.T, positives, label_smoothing=...)`` without the scores of all rows at once.

    The product is taken in autocast's dtype where that is on, everything else in at least float32.

    Args:
        hidden: ``[M, d]``.
        table: embeddings of all items, ``[n, d]``.
        positives: int64 ``[M]``.
        label_smoothing: share of the target that is spread evenly over all items (arXiv 1512.00567, section 7).
        target_weights: what each row counts, ``[M]``, summing to 1; all alike where absent.
        seen: the items that are no classes of a row, but for its positive; without ``label_smoothing``, which would
            give them a share.

    Returns:
        The mean over rows, a scalar; NaN where there are none, as torch's.

    Raises:
        RuntimeError: by a second backward pass through the same result.
    """
    dtype = _product_dtype(hidden, table)
    with torch.autocast(hidden.device.type, enabled=False):
        return _FullCrossEntropy.apply(hidden, table, positives, dtype, label_smoothing, target_weights, seen)


class _ItemScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, table, items):
        rows, table = hidden.detach(), table.detach()
        scores = torch.empty(items.shape, dtype=rows.dtype, device=rows.device)
        ctx.of_all = rows.is_cpu and len(table) <= ALL_SCORES * items.shape[1]
        ctx.blocks = _blocks(rows, len(table) if ctx.of_all else items.shape[1] * rows.shape[1])
        for part in ctx.blocks:
            if ctx.of_all:
                torch.gather(rows[part] @ table.T, 1, items[part], out=scores[part])
            else:
                torch.bmm(table[items[part]], rows[part, :, None], out=scores[part, :, None])
        ctx.save_for_backward(rows, table, items)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, table, items = ctx.saved_tensors
        into_rows, into_table = torch.empty_like(rows), torch.zeros_like(table)
        for part in ctx.blocks:
            if ctx.of_all:
                into_all = rows.new_zeros(len(rows[part]), len(table)).scatter_add_(1, items[part], grad[part])
                torch.mm(into_all, table, out=into_rows[part])
                into_table.addmm_(into_all.T, rows[part])
            else:
                into_rows[part] = torch.bmm(grad[part, None, :], table[items[part]])[:, 0]
                into_items = grad[part, :, None] * rows[part, None, :]
                into_table.index_add_(0, items[part].flatten(), into_items.flatten(0, 1))
        return into_rows, into_table, None


def _blocks(rows: Tensor, width: int):
    """Slices of rows, each of which needs ``width`` numbers."""
    size = _rows_per_block(rows.device, width * rows.element_size())
    return [slice(begin, begin + size) for begin in range(0, len(rows), size)]


def item_scores(hidden: Tensor, table: Tensor, items: Tensor) -> Tensor:
    """Inner products of each row with the embeddings of its own items, ``[M, K]``.

    Args:
        hidden: ``[M, d]``.
        table: embeddings of all items, ``[n, d]``.
        items: int64 ``[M, K]``.
    """
    dtype = torch.promote_types(hidden.dtype, table.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return _ItemScores.apply(hidden.to(dtype), table.to(dtype), items)


def bce(positive: Tensor, negative: Tensor, target_weights: Tensor | None = None) -> Tensor:
    """``-log sigmoid(r+) - log(1 - sigmoid(r-))``, the mean over negatives and rows; ``[M, 1]`` and ``[M, K]``.

    ``target_weights``, here and below: see :func:`mean_over_targets`.
    """
    return -mean_over_targets(F.logsigmoid(positive), target_weights) - mean_over_targets(
        F.logsigmoid(-negative), target_weights
    )


def bpr(positive: Tensor, negative: Tensor, target_weights: Tensor | None = None) -> Tensor:
    """``-log sigmoid(r+ - r-)``, the mean over negatives and rows (arXiv 1205.2618); ``[M, 1]`` and ``[M, K]``."""
    return -mean_over_targets(F.logsigmoid(positive - negative), target_weights)


def gbce(
    positive: Tensor, negative: Tensor, others: int, calibration: float, target_weights: Tensor | None = None
) -> Tensor:
    """Generalised binary cross-entropy ``-(beta log sigmoid(r+) + sum_k log(1 - sigmoid(r-_k))) / (K + 1)``.

    gSASRec (arXiv 2308.07192, section 5): ``beta = alpha (t (1 - 1/alpha) + 1/alpha)`` with the sampling rate
    ``alpha = K / others``; ``t`` goes from 0 (binary cross-entropy) to 1 (scores calibrated as of all negatives).

    Args:
        positive: ``[M, 1]``.
        negative: ``[M, K]``.
        others: how many items negatives are drawn from.
        calibration: ``t``.
        target_weights: ``[M]``.
    """
    alpha = negative.shape[1] / others
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    terms = torch.cat([beta * F.logsigmoid(positive), F.logsigmoid(-negative)], 1)
    return -mean_over_targets(terms, target_weights)


def sampled_softmax(positive: Tensor, negative: Tensor, others: int, target_weights: Tensor | None = None) -> Tensor:
    """``-log exp(r+) / (exp(r+) + others / K sum_k exp(r-_k))``, negatives drawn uniformly from the other items.

    Each negative's score is corrected by the logarithm of how often it is expected in the sample (arXiv 1412.2007,
    section 3.3), so that the sum estimates that of full cross-entropy, and equals it where each item is drawn once.

    Args:
        positive: ``[M, 1]``.
        negative: ``[M, K]``.
        others: how many items negatives are drawn from.
        target_weights: ``[M]``.
    """
    correction = math.log(others / negative.shape[1])
    scores = torch.cat([positive, negative + correction], 1)
    return mean_over_targets(scores.logsumexp(1) - positive[:, 0], target_weights)
