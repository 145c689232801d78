"""Training by several processes on a Ray cluster, which starts them again from the last checkpoint where one dies."""

import json
import logging
import tempfile
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from typing import Any

from recbole_ssm.config import Config
from recbole_ssm.distributed.processes import rank
from recbole_ssm.distributed.ray_cluster import (
    all_gpus_visible,
    assigned_gpus,
    checkpoint_folder,
    on_this_machine,
    reason,
    resume_from,
    start_ray,
)
from recbole_ssm.errors import UserError
from recbole_ssm.places import CHECKPOINTS_REMEDY, check_folder
from recbole_ssm.quick_start import fit, prepare

# How often the processes are started again before the run is given up.
RESTARTS = 3


def train_on_ray(
    model: str | None = None,
    dataset: str | None = None,
    config_file_list: list[str] | None = None,
    config_dict: dict[str, Any] | None = None,
    nproc: int = 1,
    address: str | None = None,
) -> dict[str, Any]:
    """Train and test with Ray Train's TorchTrainer; see :func:`recbole_ssm.quick_start.run` for what processes share.

    Args:
        model: model name, ours or RecBole's.
        dataset: dataset name.
        config_file_list: YAML files with settings.
        config_dict: settings, above those of the files.
        nproc: processes on the whole cluster; a GPU each where it has GPUs, a core each where not.
        address: of a running Ray cluster; one on this machine is started where absent.

    Returns:
        RecBole's result.

    Raises:
        UserError: for settings that cannot be used, or where processes died more often than they are started again.
    """
    if nproc < 1:
        raise UserError(f"--nproc is {nproc}: at least one process is needed.")
    with all_gpus_visible():
        config = Config(model, dataset, config_file_list, config_dict)
    check_folder(config["checkpoint_dir"], CHECKPOINTS_REMEDY)
    start_ray(address)
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Queue

    from recbole_ssm.distributed.ray_backend import LocalConfig

    settings = {**config.external_config_dict, "model": config["model"], "dataset": config["dataset"]}
    settings["data_path"] = str(Path(config.given["data_path"]).resolve())
    settings["checkpoint_dir"] = folder = str(Path(config["checkpoint_dir"]).resolve())
    log = Queue()
    use_gpu = bool(ray.cluster_resources().get("GPU"))
    with tempfile.TemporaryDirectory() as meeting:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"settings": settings, "log": log},
            torch_config=LocalConfig("nccl" if use_gpu else "gloo", folder=meeting) if on_this_machine() else None,
            scaling_config=ScalingConfig(num_workers=nproc, use_gpu=use_gpu),
            run_config=RunConfig(
                storage_path=folder,
                failure_config=FailureConfig(max_failures=RESTARTS),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
            ),
        )
        listener = QueueListener(log, logging.StreamHandler())
        listener.start()
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            raise UserError(f"the processes failed {RESTARTS + 1} times, at last with: {reason(error)}") from error
        finally:
            listener.stop()
            log.shutdown()
    return json.loads(result.metrics["result"])


def train_worker(given: dict[str, Any]) -> None:
    """What each process does: a run that reports to Ray after each evaluation, and goes on from its checkpoint.

    Args:
        given: ``settings`` of the run, and the queue to ``log`` to.
    """
    from ray import train

    context = train.get_context()
    processes = {
        "local_rank": context.get_local_rank(),
        "offset": context.get_world_rank() - context.get_local_rank(),
        "nproc": context.get_local_world_size(),
        "world_size": context.get_world_size(),
    }
    config = Config.from_settings({**given["settings"], **processes, **assigned_gpus()})
    root = logging.getLogger()
    root.handlers = [QueueHandler(given["log"])] if rank() == 0 else [logging.NullHandler()]
    root.setLevel(logging.INFO)
    logging.getLogger("ray").setLevel(logging.ERROR)
    trainer, loaders = prepare(config)
    checkpoint = train.get_checkpoint()
    if checkpoint is not None and trainer.resumable:
        resume_from(checkpoint, trainer)

    def report(metrics: dict[str, Any]) -> None:
        if rank() > 0:
            train.report(metrics)
            return
        with checkpoint_folder(trainer) as folder:
            train.report(metrics, checkpoint=train.Checkpoint.from_directory(folder))

    run = fit(trainer, loaders, callback_fn=lambda epoch, score: report({"epoch": epoch, "valid_score": float(score)}))
    report({"result": json.dumps(run.result, default=float)})
