"""One trial of a search: a run that reports to Ray Tune after each evaluation, and goes on from its checkpoint."""

from typing import Any

import numba
import ray
import torch
from ray import tune

from recbole_ssm.config import Config
from recbole_ssm.data.utils import made_alike
from recbole_ssm.distributed.ray_cluster import assigned_gpus, checkpoint_folder, resume_from
from recbole_ssm.quick_start import prepare
from recbole_ssm.search.definition import METRIC, Search


def train_trial(values: dict[str, Any], search: Search, dataset: Any) -> None:
    """Train with ``values`` above the settings of the search.

    Each evaluation is reported as ``valid_score``, ``best_valid_score`` and the metrics of the best epoch, with a
    checkpoint that :func:`recbole_ssm.quick_start.evaluate` reads. The test set is not looked at.

    Args:
        values: this trial's, of what is searched.
        search: what all trials share.
        dataset: its filtered data, in Ray's object store; loaded anew where ``values`` change them.
    """
    threads = max(1, int(search.cpus_per_trial))
    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    config = Config.from_settings({**search.settings, **search.chosen(values), **assigned_gpus()})
    if made_alike(config, dataset.config):
        dataset.config = config
    else:
        dataset = None
    trainer, (train_data, valid_data, _) = prepare(config, dataset)
    if (checkpoint := tune.get_checkpoint()) is not None and trainer.resumable:
        resume_from(checkpoint, trainer)

    def report(epoch: int, score: float) -> None:
        with checkpoint_folder(trainer) as folder:
            tune.report(
                {
                    "epoch": epoch,
                    "node": ray.get_runtime_context().get_node_id(),
                    "valid_score": float(score),
                    METRIC: float(trainer.best_valid_score),
                    "ended": epoch + trainer.eval_step >= trainer.epochs or trainer.cur_step > trainer.stopping_step,
                    **{name: float(value) for name, value in trainer.best_valid_result.items()},
                },
                checkpoint=tune.Checkpoint.from_directory(folder),
            )

    trainer.fit(train_data, valid_data, verbose=False, saved=True, show_progress=False, callback_fn=report)
