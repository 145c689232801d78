"""RecBole's trainers, made to survive (safe checkpoints, exact resume, clear ends) and to be quick on a GPU."""

import math
import os
import secrets
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from time import perf_counter
from typing import Any

import recbole.utils
import torch
from recbole.trainer import Trainer
from recbole.utils import get_gpu_usage, get_local_time, set_color
from torch import nn, optim
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from recbole_ssm.checkpoint import (
    check_optimizer_state,
    expect,
    load_checkpoint,
    load_weights,
    random_state,
    save_checkpoint,
    set_random_state,
)
from recbole_ssm.data.batch import SequenceBatch
from recbole_ssm.data.identity import check_identity, identity
from recbole_ssm.distributed import (
    MergedEvaluator,
    from_all,
    rank,
    same_weights,
    surplus_rows,
    weight_of,
    weighted,
    world_size,
)
from recbole_ssm.errors import UserError
from recbole_ssm.graphs import GraphedSteps, made_ahead
from recbole_ssm.layers.precision import rounded_weights
from recbole_ssm.models.base import PackedRecommender

# On a GPU each look at the loss waits for all work before it, so only every this many steps is it checked for NaN.
STEPS_PER_CHECK = 32

FUSED_OPTIMIZERS = (optim.Adam, optim.AdamW, optim.SGD)


def learning_rate_factor(scheduler: str, warmup_ratio: float, progress: float) -> float:
    """What ``learning_rate`` is multiplied by.

    It rises linearly from 0 to 1 over the first ``warmup_ratio`` of a run; then ``constant`` keeps it, ``linear`` and
    ``cosine`` let it fall to 0 at the run's end.

    Args:
        scheduler: ``constant``, ``linear`` or ``cosine``.
        warmup_ratio: from 0 to 1, exclusively.
        progress: share of the run that is done, from 0 to 1.
    """
    if progress < warmup_ratio:
        return progress / warmup_ratio
    rest = (progress - warmup_ratio) / (1 - warmup_ratio)
    if scheduler == "linear":
        return 1 - rest
    return (1 + math.cos(math.pi * rest)) / 2 if scheduler == "cosine" else 1.0


@dataclass
class Timings:
    """Seconds spent, and targets trained on, by epoch; seconds by evaluation."""

    train_seconds: list[float] = field(default_factory=list)
    train_targets: list[int] = field(default_factory=list)
    eval_seconds: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float | None]:
        """Means; None for what did not happen."""
        seconds = sum(self.train_seconds)
        return {
            "train_seconds_per_epoch": seconds / len(self.train_seconds) if self.train_seconds else None,
            "train_targets_per_second": sum(self.train_targets) / seconds if seconds else None,
            "eval_seconds": sum(self.eval_seconds) / len(self.eval_seconds) if self.eval_seconds else None,
        }


class DurableTraining(Trainer):
    """What goes in front of any of RecBole's trainers.

    One checkpoint file serves all: its ``state_dict`` is the best epoch's model, which evaluation loads, and its
    ``resume`` part is the whole state after the latest evaluated epoch, which :meth:`resume_checkpoint` continues
    from, bit for bit.

    Attributes:
        resumable: whether that state is all of the run's; some of RecBole's trainers keep more.
    """

    resumable = True
    evaluator: Any

    def __init__(self, config, model):
        super().__init__(config, model)
        # RecBole names the file by the second, which two runs started together share (as they may their process's
        # number, in two containers).
        name = [f"{config['model']}-{config['dataset']}-{get_local_time()}-{secrets.token_hex(4)}.pth"]
        if world_size() > 1:
            torch.distributed.broadcast_object_list(name)
            self.evaluator = MergedEvaluator(self.evaluator)
        self.saved_model_file = os.path.join(self.checkpoint_dir, name[0])
        self.timings = Timings()
        self._epoch = 0
        self._best: dict[str, Any] | None = None
        self._written_epoch: int | None = None
        self._resume: dict[str, Any] | None = None
        self._train_data: Any = None
        self._identity: dict[str, Any] = {}
        self._validates = False
        self._scores_are_numbers: torch.Tensor | None = None

    def fit(
        self, train_data, valid_data=None, verbose=True, saved=True, show_progress=False, callback_fn=None
    ):  # fmt: skip
        """See :meth:`recbole.trainer.Trainer.fit`.

        Raises:
            UserError: where the loss became NaN, or weights became infinite; the last checkpoint stays. Where a run
                is resumed on data that number their items otherwise.
            KeyboardInterrupt: on Ctrl-C, with a message that says how to go on.
        """
        self._train_data = train_data
        self._validates = bool(valid_data) and self.eval_step > 0
        if self._resume is not None:
            if not getattr(self.config, "identity", None):  # else it was done before the weights were taken
                check_identity(train_data._dataset, self._identity, self.saved_model_file)
            self._take_random_state(train_data)
            if self.start_epoch >= self.epochs or self.cur_step > self.stopping_step:
                self.logger.info("This run had ended; nothing is left to train")
                self.eval_collector.data_collect(train_data)
                return self.best_valid_score, self.best_valid_result

        self._identity = identity(train_data._dataset)

        def after_evaluation(epoch_idx, valid_score):
            if saved:
                self._write_checkpoint(epoch_idx)
            if callback_fn:
                callback_fn(epoch_idx, valid_score)

        try:
            return super().fit(train_data, valid_data, verbose, saved, show_progress, after_evaluation)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted in epoch {self._epoch}; {self._kept()}") from None

    def _take_random_state(self, train_data: Any) -> None:
        assert self._resume is not None
        states = self._resume["random"]
        states = [states] if isinstance(states, dict) else states  # of the first format, which kept one process's
        if rank() < len(states):  # more processes than before keep a random stream of their own
            set_random_state(states[rank()], self.saved_model_file)
        if "loader" in self._resume:
            try:
                train_data.generator.set_state(self._resume["loader"].cpu())
            except (RuntimeError, TypeError, AttributeError) as error:
                raise UserError(f"{self.saved_model_file} holds no state of the loader: train again.") from error

    def _kept(self) -> str:
        if self._written_epoch is None:
            return "nothing was saved yet."
        file = self.saved_model_file
        return f"epochs up to {self._written_epoch} are kept in {file}; continue with: run_recbole --resume {file}"

    def _train_epoch(self, train_data, epoch_idx, loss_func=None, show_progress=False):
        self._epoch = epoch_idx
        if hasattr(train_data, "set_epoch"):
            train_data.set_epoch(epoch_idx)
        begin = perf_counter()
        loss = self._optimize(train_data, epoch_idx, loss_func, show_progress)
        self._check_finite()
        self.timings.train_seconds.append(perf_counter() - begin)
        self.timings.train_targets.append(getattr(train_data, "num_targets", None) or len(train_data._dataset))
        return loss

    @property
    def best_epoch(self) -> int | None:
        """Index of the epoch whose model is kept."""
        return None if self._best is None else self._best["epoch"]

    def _optimize(self, train_data, epoch_idx, loss_func, show_progress):
        """The steps of an epoch, by the loop of RecBole's trainer; returns its sum of losses."""
        return super()._train_epoch(train_data, epoch_idx, loss_func=loss_func, show_progress=show_progress)

    def evaluate(self, eval_data, load_best_model=True, model_file=None, show_progress=False):
        """See :meth:`recbole.trainer.Trainer.evaluate`."""
        if not eval_data:
            return None
        if load_best_model:
            file = model_file or self.saved_model_file
            if rank() == 0:  # who wrote it, perhaps on another machine
                load_weights(self.model, load_checkpoint(file, self.device), file)
            same_weights(self.model)
            self.logger.info(f"Loading model structure and parameters from {file}")
        begin = perf_counter()
        if world_size() > 1:
            self.evaluator.surplus = surplus_rows(eval_data)
        self._scores_are_numbers = None
        with self._precision_of_evaluation():
            result = super().evaluate(eval_data, load_best_model=False, show_progress=show_progress)
        if self._scores_are_numbers is not None and not self._scores_are_numbers:
            trained = f" in epoch {self._epoch}; {self._kept()}" if self._train_data is not None else "."
            raise UserError(f"scores of items became infinite or NaN{trained} {self._remedy()}")
        self.timings.eval_seconds.append(perf_counter() - begin)
        return OrderedDict((metric, float(value)) for metric, value in result.items())

    def _precision_of_evaluation(self) -> AbstractContextManager:
        return nullcontext()

    def _full_sort_batch_eval(self, batched_data):
        return self._noted(self._rank_all(batched_data))

    def _rank_all(self, batched_data):
        """RecBole's ``_full_sort_batch_eval``."""
        return super()._full_sort_batch_eval(batched_data)

    def _neg_sample_batch_eval(self, batched_data):
        return self._noted(super()._neg_sample_batch_eval(batched_data))

    def _noted(self, scored: tuple) -> tuple:
        """Note whether each row's highest score (``scored[1]``) is a number, for the end: a GPU is not waited for."""
        numbers = (scored[1].amax(-1) < math.inf).all()
        before = self._scores_are_numbers
        self._scores_are_numbers = numbers if before is None else before & numbers
        return scored

    def _check_nan(self, loss):
        if torch.isnan(loss):
            raise UserError(f"the training loss became NaN in epoch {self._epoch}; {self._kept()} {self._remedy()}")

    def _check_finite(self) -> None:
        """Refuse to go on with a model that no number can come of, whatever the loss said.

        Raises:
            UserError: naming a weight that is infinite or NaN, or whose optimizer's state is.
        """
        for name, weight in self.model.named_parameters():
            moments = (value for value in self.optimizer.state.get(weight, {}).values() if torch.is_tensor(value))
            if not all(tensor.isfinite().all() for tensor in (weight, *moments)):
                raise UserError(
                    f"{name} became infinite or NaN in epoch {self._epoch}; {self._kept()} {self._remedy()}"
                )

    def _remedy(self) -> str:
        return (
            f"Lower the learning rate (now {self.learning_rate}), clip gradients "
            "(--clip_grad_norm=\"{'max_norm': 5}\") or turn --enable_amp off."
        )

    def _save_checkpoint(self, epoch, verbose=True, **kwargs):
        """The epoch is the best so far: keep its weights.

        The file is written once RecBole has noted the epoch's result too, after its evaluation.
        """
        self._best = {
            "epoch": epoch,
            "state_dict": {k: v.detach().to("cpu", copy=True) for k, v in self.model.state_dict().items()},
            "other_parameter": self.model.other_parameter(),
        }
        if not self._validates:
            self._write_checkpoint(epoch)
        if verbose:
            self.logger.info(f"Saving current: {self.saved_model_file}")

    def _write_checkpoint(self, epoch: int) -> None:
        states = from_all(random_state())
        if rank() != 0:
            return
        resume: dict[str, Any] = {
            "epoch": epoch,
            "cur_step": self.cur_step,
            "state_dict": self.model.state_dict(),
            "optimizer": self._optimizer_state(),
            "random": states,
            "timings": asdict(self.timings),
            **self._more_state(),
        }
        if isinstance(getattr(self._train_data, "generator", None), torch.Generator):
            resume["loader"] = self._train_data.generator.get_state()
        best_valid_result = self.best_valid_result and dict(self.best_valid_result)
        state = {
            "config": getattr(self.config, "given", {}),
            "best_valid_score": float(self.best_valid_score),
            "best_valid_result": best_valid_result,
            "resume": resume,
            **self._identity,
            **(self._best or {"epoch": epoch, "state_dict": resume["state_dict"]}),
        }
        save_checkpoint(self.saved_model_file, state)
        self._written_epoch = epoch

    def _optimizer_state(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        # On a GPU it may be a tensor, which a CUDA graph reads anew at each replay.
        groups = [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    def _more_state(self) -> dict[str, Any]:
        """What else a run needs to go on, for :meth:`_take_more_state`."""
        return {}

    def _take_more_state(self, resume: dict[str, Any]) -> None:
        pass

    def save_pretrained_model(self, epoch, saved_model_file):
        """As RecBole's, for its models with a pre-training stage, in a file that torch loads without running code."""
        state = {"config": getattr(self.config, "given", {}), "epoch": epoch, "state_dict": self.model.state_dict()}
        save_checkpoint(saved_model_file, {**state, "other_parameter": self.model.other_parameter()})
        self.saved_model_file = saved_model_file

    def resume_checkpoint(self, resume_file):
        """Take up a run after the latest epoch that its checkpoint holds; later ones are written to the same file.

        Raises:
            UserError: for a file that is no checkpoint, or one of another model, data or optimizer; and for the
                models of RecBole whose own trainers keep more state than a checkpoint holds.
        """
        if not self.resumable:
            raise UserError(
                f"{type(self).__name__} of {self.config['model']} keeps state that a checkpoint does not hold: "
                "train it again from the start."
            )
        state = load_checkpoint(resume_file)  # on the CPU, where Adam keeps its step counts
        if "resume" not in state:
            raise UserError(f"{resume_file} holds a model, but no run that could be continued.")
        resume = state.pop("resume")
        expect(resume_file, {"resume": resume}, resume=dict)
        resume.setdefault("timings", asdict(Timings()))
        expect(resume_file, state, config=dict, best_valid_score=float, best_valid_result=(dict, type(None)), epoch=int)
        expect(resume_file, resume, epoch=int, cur_step=int, state_dict=dict, random=(list, dict), timings=dict)
        expect(resume_file, resume["timings"], **dict.fromkeys(asdict(Timings()), list))
        if state["config"].get("learner") != self.learner:
            raise UserError(
                f"{resume_file} was trained with learner {state['config'].get('learner')}, whose state {self.learner} "
                "cannot take over: leave --learner out."
            )
        check_optimizer_state(resume_file, self.optimizer, resume.get("optimizer"))
        load_weights(self.model, state, resume_file)  # the best epoch's, of which the test will be made
        load_weights(self.model, {**state, "state_dict": resume["state_dict"]}, resume_file)
        self.timings = Timings(**{key: resume["timings"][key] for key in asdict(Timings())})
        # The state brings its own settings, whatever they are now and whatever device it was trained on.
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(resume["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        self.saved_model_file = str(resume_file)
        self._take_more_state(resume)
        self.start_epoch, self.cur_step = resume["epoch"] + 1, resume["cur_step"]
        self.best_valid_score, self.best_valid_result = state["best_valid_score"], state["best_valid_result"]
        self._best = {key: state[key] for key in ("epoch", "state_dict", "other_parameter") if key in state}
        self._written_epoch, self._resume = resume["epoch"], resume
        self._identity = {key: state[key] for key in ("vocabulary", "data") if key in state}
        self.logger.info(f"Checkpoint loaded. Resume training from epoch {self.start_epoch}")


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
    ``lr_scheduler_type`` and ``warmup_ratio`` (:func:`learning_rate_factor`) over ``epochs``.

    On a GPU batches are packed on the host by a thread of their own, and steps replay as CUDA graphs
    (``cuda_graphs``, :class:`~recbole_ssm.graphs.GraphedSteps`).
    """

    def __init__(self, config, model):
        super().__init__(config, model)
        half = self.device.type == "cuda" and not torch.cuda.is_bf16_supported()
        self.amp_dtype = torch.float16 if half else torch.bfloat16
        scaled = self.enable_scaler or (self.enable_amp and half)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.lr_schedule = config["lr_scheduler_type"] or "constant", config["warmup_ratio"] or 0.0
        self._shared_loss = None
        self._loss_of: Any = None
        self._rate: float | None = None  # which the optimizer has
        self._one = torch.ones((), device=self.device)
        self.graphs = self._graphed_steps() if self._wants_graphs(scaled) else None
        if world_size() > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self._shared_loss = DistributedDataParallel(
                _Loss(model),
                device_ids=devices,
                find_unused_parameters=not isinstance(model, PackedRecommender),
            )

    def _build_optimizer(self, **kwargs):
        optimizer = super()._build_optimizer(**kwargs)
        if type(optimizer) not in FUSED_OPTIMIZERS:
            return optimizer
        (group,) = optimizer.param_groups
        settings = {key: group[key] for key in ("lr", "weight_decay")}
        if self.device.type == "cuda":  # as a CUDA graph needs it
            settings["lr"] = torch.tensor(group["lr"], device=self.device)
            settings |= {"capturable": True} if "capturable" in group else {}
        return type(optimizer)(group["params"], **settings, fused=True)

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
        return interaction, scores, positive_u, positive_i

    def _optimize(self, train_data, epoch_idx, loss_func, show_progress):
        self.model.train()
        self._loss_of = self._shared_loss or loss_func or self._loss
        on_gpu = self.device.type != "cpu"
        description = set_color(f"Train {epoch_idx:>5}", "pink")
        batches = train_data
        # Of the other models of RecBole some draw random numbers where the loader does.
        if self.graphs is not None or (on_gpu and hasattr(self.model, "fillable")):
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
        with self._autocast(), weighted(weight):
            losses = self._loss_of(batch)
        losses = losses if isinstance(losses, tuple) else (losses,)
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

    def _more_state(self) -> dict[str, Any]:
        return {"scaler": self.scaler.state_dict()}

    def _take_more_state(self, resume: dict[str, Any]) -> None:
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
    """As :func:`recbole.utils.get_trainer`, with :class:`DurableTraining` in front of what that finds."""
    return _durable(recbole.utils.get_trainer(model_type, model_name))
