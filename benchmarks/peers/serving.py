"""A peer's side: training steps on request, a line of JSON in and a line out.

It runs in the peer's environment, so it imports nothing of this package but :mod:`benchmarks.measure`.
"""

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import mark_peak, peak_since

# What both packages' Lightning trainers are given: to go on until they are stopped, and to write nothing.
TRAINER: dict[str, Any] = {
    "max_epochs": -1, "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False, "limit_val_batches": 0, "num_sanity_val_steps": 0,
}  # fmt: skip


def read_job() -> dict[str, Any]:
    """What :class:`benchmarks.peers.client.Peer` has put on the command line; threads and seed are set by it.

    Returns:
        ``data`` (a CSV file of ``user``, ``item`` and ``timestamp``, items counted from 1), ``items`` (how many),
        ``cuda``, and the model's ``hidden_size``, ``inner_size``, ``n_layers``, ``n_heads``, ``dropout``, ``length``
        and ``learning_rate``.
    """
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    return job


class Serving:
    """The part of a Lightning callback that lets a trainer take the steps that are asked for, and wait in between.

    A request ``{"batch": sequences a step, "steps": how many}`` is answered when they are done, with the ``targets``
    that they trained on, the model's ``parameters`` and ``peak_bytes``. A request for another batch ends the fit.

    Args:
        targets_of: number of targets in a batch as the model is given it, a tensor.
        cuda: whether it computes on a GPU.
    """

    def __init__(self, targets_of: Callable[[Any], torch.Tensor], cuda: bool):
        super().__init__()
        self._targets_of, self._cuda = targets_of, cuda
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is no answer
        self._request: dict[str, Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Serving":
        return self  # RecTools trains with a copy of its trainer

    def run(self, package: str, fit: Callable[[int], object]) -> None:
        """Answer until there are no more requests.

        Args:
            package: name by which its version is known.
            fit: trains a fresh model with a batch of so many sequences, and with this callback.
        """
        self._answer({"version": importlib.metadata.version(package), "torch": torch.__version__})
        self._next()
        while self._request is not None:
            self._serve(fit)

    def _serve(self, fit: Callable[[int], object]) -> None:
        assert self._request is not None
        try:
            fit(self._request["batch"])
        except torch.OutOfMemoryError:
            self._answer({"out_of_memory": True})
            self._next()

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """A fit was asked for with its first steps."""
        self._begin()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count; after the last step that was asked for, answer and wait for the next request."""
        assert self._request is not None
        self._targets.append(self._targets_of(batch))
        if len(self._targets) < self._request["steps"]:
            return
        if self._cuda:
            torch.cuda.synchronize()
        self._answer({
            "targets": int(sum(self._targets)),
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
            "peak_bytes": peak_since(self._mark, self._cuda),
        })  # fmt: skip
        before = self._request["batch"]
        self._next()
        if self._request is not None and self._request["batch"] == before:
            self._begin()
        else:
            trainer.should_stop = True

    def _begin(self) -> None:
        self._targets: list[torch.Tensor] = []
        self._mark = mark_peak(self._cuda)

    def _answer(self, found: dict[str, Any]) -> None:
        print(json.dumps(found), file=self._answers, flush=True)

    def _next(self) -> None:
        line = sys.stdin.readline()
        self._request = json.loads(line) if line else None
