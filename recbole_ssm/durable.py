"""A mixin for RecBole's trainers: safe checkpoints, exact resume, clear ends."""

import math
import os
import secrets
import shlex
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch
from recbole.trainer import Trainer
from recbole.utils import get_local_time

from recbole_ssm.checkpoint import (
    check_optimizer_state,
    expect,
    load_checkpoint,
    load_weights,
    random_state,
    save_checkpoint,
    set_random_state,
)
from recbole_ssm.curves import Curves, Silence, disk_errors_told_once
from recbole_ssm.data.identity import check_identity, identity
from recbole_ssm.distributed import MergedEvaluator, from_all, rank, same_weights, surplus_rows, world_size
from recbole_ssm.errors import CannotWrite, UserError


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
    """Mixin for any of RecBole's trainers: safe checkpoints, exact resume, clear ends.

    One checkpoint file serves all: its ``state_dict`` is the best epoch's model, which evaluation loads, and its
    ``resume`` part is the whole state after the latest evaluated epoch, which :meth:`resume_checkpoint` continues
    from, bit for bit.

    Attributes:
        resumable: whether that state is all of the run's; some of RecBole's trainers keep more.
    """

    resumable = True
    evaluator: Any
    tensorboard: Any

    def __init__(self, config, model):
        super().__init__(config, model)
        # RecBole's has begun to write, in a thread of its own, whatever follows.
        self.tensorboard = Curves(self.tensorboard)
        if rank() > 0:
            self.tensorboard = Silence()
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
            UserError: where the loss became NaN, weights became infinite or a checkpoint cannot be written; the last
                one stays. Where a run is resumed on data that number their items otherwise.
            KeyboardInterrupt: on Ctrl-C, with a message that says how to go on.
        """
        self._train_data = train_data
        self._validates = bool(valid_data) and self.eval_step > 0
        if self._resume is not None:
            if not getattr(self.config, "identity", None):  # else it was done before the weights were taken
                check_identity(train_data._dataset, self._identity, self.saved_model_file)
            self._take_random_state(train_data)
            if self.start_epoch >= self.epochs or self.cur_step > self.stopping_step:
                self.logger.info(
                    "This run had ended: nothing is left to train, unless --epochs or --stopping_step are raised"
                )
                self.eval_collector.data_collect(train_data)
                return self.best_valid_score, self.best_valid_result

        self._identity = identity(train_data._dataset)

        def after_evaluation(epoch_idx, valid_score):
            if saved:
                self._write_checkpoint(epoch_idx)
            if callback_fn:
                callback_fn(epoch_idx, valid_score)

        try:
            with disk_errors_told_once():
                try:
                    return super().fit(train_data, valid_data, verbose, saved, show_progress, after_evaluation)
                finally:
                    self.tensorboard.close()  # and its thread
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted in epoch {self._epoch}; {self._kept()}") from None
        except CannotWrite as error:
            raise CannotWrite(f"{error} Training ended in epoch {self._epoch}; {self._kept()}") from error

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
        return (
            f"epochs up to {self._written_epoch} are kept in {file}; continue with: run_recbole --resume "
            f"{shlex.quote(str(file))}"
        )

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

    def _evaluated_weights(self) -> AbstractContextManager:
        """Puts the weights that validation judges and a checkpoint keeps into the model, where it trains others."""
        return nullcontext()

    def _valid_epoch(self, valid_data, show_progress=False):
        with self._evaluated_weights():
            return super()._valid_epoch(valid_data, show_progress)

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
            "state_dict": self._kept_weights(),
            "other_parameter": self.model.other_parameter(),
        }
        if not self._validates:
            self._write_checkpoint(epoch)
        if verbose:
            self.logger.info(f"Saving current: {self.saved_model_file}")

    def _kept_weights(self) -> dict[str, torch.Tensor]:
        """A copy of the weights that validation judges, as a checkpoint's ``state_dict``."""
        with self._evaluated_weights():
            return {k: v.detach().to("cpu", copy=True) for k, v in self.model.state_dict().items()}

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
            **(self._best or {"epoch": epoch, "state_dict": self._kept_weights()}),
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
        expect(resume_file, resume, optimizer=dict)
        expect(resume_file, resume["optimizer"], state=dict, param_groups=list)
        expect(resume_file, resume["timings"], **dict.fromkeys(asdict(Timings()), list))
        for name in asdict(Timings()):
            for number in resume["timings"][name]:
                expect(resume_file, {name: number}, **{name: (int, float)})
        if state["config"].get("learner") != self.learner:
            raise UserError(
                f"{resume_file} was trained with learner {state['config'].get('learner')}, whose state {self.learner} "
                "cannot take over: leave --learner out."
            )
        decay = state["config"].get("weight_decay")
        regrouped = len(resume["optimizer"]["param_groups"]) != len(self.optimizer.param_groups)
        if bool(decay) != bool(self.weight_decay) and regrouped:
            raise UserError(
                f"{resume_file} was trained with weight_decay {decay}, and with {self.weight_decay} the optimizer has "
                "its parameters in another order: leave --weight_decay out."
            )
        check_optimizer_state(resume_file, self.optimizer, resume["optimizer"])
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
