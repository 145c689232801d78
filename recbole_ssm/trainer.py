"""The trainer of this package's models: RecBole's steps, exact and quick on a GPU."""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import recbole.utils
import torch
from recbole.trainer import Trainer
from recbole.utils import EvaluatorType, get_gpu_usage, set_color
from torch import Tensor, nn, optim
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from recbole_ssm.averaging import WeightAverage
from recbole_ssm.checkpoint import expect, load_weights
from recbole_ssm.data.batch import SequenceBatch
from recbole_ssm.distributed import weight_of, world_size
from recbole_ssm.durable import DurableTraining
from recbole_ssm.errors import UserError
from recbole_ssm.graphs import GraphedSteps, made_ahead
from recbole_ssm.layers.precision import rounded_weights
from recbole_ssm.models.base import PackedRecommender
from recbole_ssm.models.sequence_mode import SequenceMode
from recbole_ssm.settings import LOGISTIC_LOSSES

# On a GPU each look at the loss waits for all work before it, so only every this many steps is it checked for NaN.
STEPS_PER_CHECK = 32

FUSED_OPTIMIZERS = (optim.Adam, optim.AdamW, optim.SGD)


def learning_rate_factor(scheduler: str, warmup_ratio: float, restarts: int, progress: float) -> float:
    """What ``learning_rate`` is multiplied by.

    It rises linearly from 0 to 1 over the first ``warmup_ratio`` of a run; then ``constant`` keeps it, ``linear`` and
    ``cosine`` let it fall to 0 at the run's end, or in each of ``restarts + 1`` equal parts of what is left of it
    (SGDR, arXiv 1608.03983, eq. 5).

    Args:
        scheduler: ``constant``, ``linear`` or ``cosine``.
        warmup_ratio: from 0 to 1, exclusively.
        restarts: how often a rate that falls begins anew.
        progress: share of the run that is done, from 0 to 1.
    """
    if progress < warmup_ratio:
        return progress / warmup_ratio
    done = (progress - warmup_ratio) / (1 - warmup_ratio) * (restarts + 1)
    rest = done - min(int(done), restarts)
    if scheduler == "linear":
        return 1 - rest
    return (1 + math.cos(math.pi * rest)) / 2 if scheduler == "cosine" else 1.0


def _with_targets(scores: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """The scores, in which a target without ``allow_repeats`` is last, but no longer -inf: what RecBole leaves out."""
    scores[rows, targets] = scores[rows, targets].clamp_min(torch.finfo(scores.dtype).min)
    return scores


class _Loss(nn.Module):
    """A model's loss as a module's forward pass, which DistributedDataParallel wants."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Any:
        return self.model.calculate_loss(batch)


class SequenceTrainer(DurableTraining):
    """Trainer of this package's models, and of those that RecBole's own ``Trainer`` trains.

    RecBole's steps, but for what costs it speed or exactness on a GPU. ``enable_amp`` takes bfloat16 wherever the
    device has it, in evaluation too (float16, whose range is small, only elsewhere, and then always scaled). One
    gradient scaler serves the whole run and its resumption; gradients are clipped by their true size. The loss is
    not waited for at each step, and the optimizer's step is one fused kernel. ``learning_rate`` follows
    ``lr_scheduler_type``, ``warmup_ratio`` and ``lr_restarts`` (:func:`learning_rate_factor`) over ``epochs``. With an
    ``ema_decay`` the running average of the weights (:class:`~recbole_ssm.averaging.WeightAverage`) is what is
    evaluated and kept.

    On a GPU batches are packed on the host by a thread of their own, and steps replay as CUDA graphs
    (``cuda_graphs``, :class:`~recbole_ssm.graphs.GraphedSteps`).
    """

    def __init__(self, config, model):
        super().__init__(config, model)
        half = self.device.type == "cuda" and not torch.cuda.is_bf16_supported()
        self.amp_dtype = torch.float16 if half else torch.bfloat16
        scaled = self.enable_scaler or (self.enable_amp and half)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.lr_schedule = (
            config["lr_scheduler_type"] or "constant", config["warmup_ratio"] or 0.0, config["lr_restarts"] or 0
        )  # fmt: skip
        self.average = WeightAverage(model, config["ema_decay"]) if config["ema_decay"] else None
        self._shared_loss = None
        self._loss_of: Any = None
        self._rate: float | None = None  # which the optimizer has
        self._one = torch.ones((), device=self.device)
        # With dynamic negatives the loader itself runs the model, which it switches to evaluation and back.
        self._loader_scores = bool((config["train_neg_sample_args"] or {}).get("dynamic"))
        self.graphs = self._graphed_steps() if self._wants_graphs(scaled) else None
        if world_size() > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self._shared_loss = DistributedDataParallel(
                _Loss(model),
                device_ids=devices,
                find_unused_parameters=not isinstance(model, PackedRecommender),
            )

    def _build_optimizer(self, **kwargs):
        """As RecBole's, fused where it can be; what is marked (``_no_weight_decay``) is kept from ``weight_decay``."""
        marked = [p for p in self.model.parameters() if getattr(p, "_no_weight_decay", False)]
        if self.weight_decay and marked and "params" not in kwargs:
            others = [p for p in self.model.parameters() if not getattr(p, "_no_weight_decay", False)]
            kwargs["params"] = [{"params": others}, {"params": marked, "weight_decay": 0.0}]
        optimizer = super()._build_optimizer(**kwargs)
        if type(optimizer) not in FUSED_OPTIMIZERS:
            return optimizer
        groups = [{key: group[key] for key in ("params", "weight_decay")} for group in optimizer.param_groups]
        settings: dict[str, Any] = {"lr": optimizer.defaults["lr"]}
        if self.device.type == "cuda":  # as a CUDA graph needs it
            settings["lr"] = torch.tensor(settings["lr"], device=self.device)
            settings |= {"capturable": True} if "capturable" in optimizer.defaults else {}
        return type(optimizer)(groups, **settings, fused=True)

    def _wants_graphs(self, scaled: bool) -> bool:
        """Whether steps shall replay as CUDA graphs.

        Raises:
            UserError: for ``cuda_graphs: on`` where they cannot, with the reason.
        """
        choice = self.config["cuda_graphs"] or "auto"
        reasons = {
            "there is no GPU": self.device.type != "cuda",
            "several processes train together": world_size() > 1,
            "gradients are scaled (enable_scaler, or a GPU without bfloat16)": scaled,
            f"learner {self.learner} has no fused optimizer": type(self.optimizer) not in FUSED_OPTIMIZERS,
            f"{self.config['model']} is not trained in sequence mode, or its loss cannot leave rows out": not getattr(
                self.model, "fillable", False
            ),
            "negatives are scored by the model (dynamic in train_neg_sample_args)": self._loader_scores,
            f"shapes in {self.config['model']}, as it is set, follow from numbers on the GPU": getattr(
                self.model, "reads_device", False
            ),
        }
        reason = next((reason for reason, holds in reasons.items() if holds), None)
        if choice == "on" and reason:
            raise UserError(f"cuda_graphs: on cannot be had: {reason}; set cuda_graphs: auto.")
        return choice != "off" and reason is None

    def _graphed_steps(self) -> GraphedSteps:
        precision = self.amp_dtype if self.enable_amp else torch.float32
        required = self.config["cuda_graphs"] == "on"
        return GraphedSteps(self._backward, self._update, self.optimizer, self.device, precision, required)

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.enable_amp)

    def _precision_of_evaluation(self) -> AbstractContextManager:
        # RecBole's models would rank by scores rounded to bfloat16, which tie; ours score in float32.
        return self._autocast() if isinstance(self.model, PackedRecommender) else nullcontext()

    def _rank_all(self, batched_data):
        if not isinstance(self.model, PackedRecommender):
            return super()._rank_all(batched_data)
        # Ours pack their rows on the host, for which these must not have left it.
        interaction, history_index, positive_u, positive_i = batched_data
        scores = self.model.full_sort_predict(interaction)
        scores[:, 0] = -math.inf
        if history_index is not None:
            scores[history_index] = -math.inf
        return interaction, _with_targets(scores, positive_u, positive_i), positive_u, positive_i

    def _neg_sample_batch_eval(self, batched_data):
        interaction, scores, positive_u, positive_i = super()._neg_sample_batch_eval(batched_data)
        if not isinstance(self.model, PackedRecommender):
            return interaction, scores, positive_u, positive_i
        if self.config["eval_type"] == EvaluatorType.RANKING:
            scores = _with_targets(scores, positive_u, positive_i)
        elif self.model.loss_type in LOGISTIC_LOSSES:
            scores = scores.double().sigmoid()  # what RecBole's metrics of single scores are of
        else:
            scores = scores.clamp_min(torch.finfo(scores.dtype).min)  # which tie, as -inf do not
        return interaction, scores, positive_u, positive_i

    def _optimize(self, train_data, epoch_idx, loss_func, show_progress):
        self.model.train()
        self._loss_of = self._shared_loss or loss_func or self._loss
        on_gpu = self.device.type != "cpu"
        description = set_color(f"Train {epoch_idx:>5}", "pink")
        batches = train_data
        if self.graphs is not None or (on_gpu and self._can_make_ahead()):
            batches = made_ahead(train_data, self._prepared, self.device)
        steps = tqdm(batches, total=len(train_data), ncols=100, desc=description, disable=not show_progress)
        total: Any = None
        for step, batch in enumerate(steps):
            # A function of what is done alone, so that a resumed run goes on exactly.
            progress = (epoch_idx + (step + 0.5) / len(train_data)) / self.epochs
            self._set_learning_rate(self.learning_rate * learning_rate_factor(*self.lr_schedule, progress))
            weight = weight_of(batch)
            if self.graphs is not None and isinstance(batch, SequenceBatch) and batch.target_weights is not None:
                terms = self.graphs(batch)
            else:
                # RecBole's rows for our models stay on the host, to be packed there.
                packs = isinstance(self.model, PackedRecommender)
                terms = self._backward(batch if packs else batch.to(self.device), weight)
                self._update()
            if self.average is not None:
                self.average.update()
            total = torch.zeros_like(terms, dtype=torch.float64) if total is None else total
            total.add_(terms, alpha=weight / world_size())
            if on_gpu and step % STEPS_PER_CHECK == 0:
                self._check_nan(total.sum())
            if show_progress and self.gpu_available:
                steps.set_postfix_str(set_color("GPU RAM: " + get_gpu_usage(self.device), "yellow"))
        if world_size() > 1:
            torch.distributed.all_reduce(total)
        self._check_nan(total.sum())
        sums = total.tolist()
        return tuple(sums) if len(sums) > 1 else sums[0]

    def _can_make_ahead(self) -> bool:
        """Whether a second thread may make batches while steps are taken.

        Some of RecBole's other models draw from NumPy's global generator in a step, as its loaders do: with a thread
        the order of the draws would be chance.
        """
        return isinstance(self.model, PackedRecommender | SequenceMode) and not self._loader_scores

    def _prepared(self, batch: Any) -> Any:
        """A batch as a GPU wants it: packed, in one of a few shapes where graphs replay, in one page-locked buffer."""
        if isinstance(self.model, PackedRecommender):
            batch = self.model.packed(batch)
        if not isinstance(batch, SequenceBatch):
            return batch
        if self.graphs is not None and self.graphs.active:
            filled = batch.filled(self.config["MAX_ITEM_LIST_LENGTH"])
            if not isinstance(self.model, PackedRecommender) or self.model.in_one_block(filled):
                batch = filled
        return batch.in_one_buffer(pinned=torch.cuda.is_available())

    def _backward(self, batch: Any, weight: float = 1.0) -> torch.Tensor:
        """Leave the gradients of a batch's loss in the parameters; returns the loss's terms, ``[n]``."""
        self.optimizer.zero_grad()
        with self._autocast():
            losses = self._loss_of(batch)
        # Of some of RecBole's models the loss is a vector of one number.
        losses = tuple(loss.squeeze() for loss in (losses if isinstance(losses, tuple) else (losses,)))
        terms = torch.stack([loss.detach() for loss in losses])
        if self.device.type == "cpu":
            self._check_nan(terms.sum())
        if weight == 1.0 and not self.scaler.is_enabled():
            torch.autograd.backward(losses, [self._one.to(loss.dtype) for loss in losses])
        else:
            self.scaler.scale(torch.stack(losses).sum() * weight).backward()
        if self.clip_grad_norm:
            self.scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.model.parameters(), **self.clip_grad_norm)
        return terms

    def _loss(self, batch: Any) -> Any:
        if not self.enable_amp or not isinstance(self.model, PackedRecommender):
            return self.model.calculate_loss(batch)
        module = _Loss(self.model)
        return functional_call(module, rounded_weights(module, self.amp_dtype), (batch,))

    def _update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _set_learning_rate(self, rate: float) -> None:
        if rate == self._rate:
            return
        self._rate = rate
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def fit(self, *args, **kwargs):
        """See :meth:`DurableTraining.fit`; what it leaves in the model is what its last epoch was judged by."""
        result = super().fit(*args, **kwargs)
        if self.average is not None:
            self.model.load_state_dict(self._kept_weights())
        return result

    def _evaluated_weights(self) -> AbstractContextManager:
        return nullcontext() if self.average is None else self.average.applied()

    def _more_state(self) -> dict[str, Any]:
        more: dict[str, Any] = {"scaler": self.scaler.state_dict()}
        if self.average is not None:
            more["average"] = {"steps": self.average.steps, "state_dict": self._kept_weights()}
        return more

    def _take_more_state(self, resume: dict[str, Any]) -> None:
        if self.average is not None and "average" not in resume:  # the run begins to average now
            self.average.start_from(0)
        elif self.average is not None:
            expect(self.saved_model_file, resume, average=dict)
            expect(self.saved_model_file, resume["average"], steps=int)
            load_weights(self.model, resume["average"], self.saved_model_file)
            self.average.start_from(resume["average"]["steps"])
            load_weights(self.model, resume, self.saved_model_file)
        if self.scaler.is_enabled() and resume.get("scaler"):
            numbers = dict.fromkeys(self.scaler.state_dict(), (int, float))
            expect(self.saved_model_file, resume["scaler"], **numbers)
            self.scaler.load_state_dict(resume["scaler"])


@lru_cache(maxsize=None)
def _durable(trainer_class: type) -> type:
    if trainer_class is Trainer:
        return SequenceTrainer
    if issubclass(trainer_class, DurableTraining) or not issubclass(trainer_class, Trainer):
        return trainer_class  # RecBole's decision trees have a trainer and files of their own
    return type(trainer_class.__name__, (DurableTraining, trainer_class), {"resumable": False})


def get_trainer(model_type, model_name: str) -> type:
    """As :func:`recbole.utils.get_trainer`, with the mixin :class:`DurableTraining`."""
    return _durable(recbole.utils.get_trainer(model_type, model_name))
