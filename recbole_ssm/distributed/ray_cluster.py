"""What runs on a Ray cluster share: searches (:mod:`recbole_ssm.search`) and training by several processes."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from recbole_ssm.distributed.processes import LOOPBACK
from recbole_ssm.errors import UserError

CHECKPOINT = "model.pth"

# What Ray reads as it is imported: datasets are shared without copying them into each trial; progress is told by us,
# not by its TensorBoard logger and warnings.
ENVIRONMENT = {
    "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def start_ray(address: str | None = None) -> None:
    """Connect to a Ray cluster, or start one on this machine, where that was not done yet.

    One that is started here listens on the loopback interface alone.

    Args:
        address: of the cluster; ``auto`` for one that runs on this machine.

    Raises:
        UserError: where Ray is not installed, nothing answers at ``address``, or one that is started here would listen
            on all interfaces.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray.tune
    except ImportError as error:
        raise UserError(f"this needs Ray ({error}): pip install 'recbole-ssm[tune]'") from error
    if ray.is_initialized():
        return
    own = (address or os.environ.get("RAY_ADDRESS") or "local") == "local"
    try:
        with _loopback_alone() if own else nullcontext():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise UserError(f"no Ray cluster answers at {address} ({error}): start one with ray start --head.") from error
    if own and not on_this_machine():
        ray.shutdown()
        raise UserError(
            f"Ray {ray.__version__} cannot be kept from listening on all interfaces: install another version or, where "
            "that does no harm, start it with ray start --head and give --address=auto."
        )


@contextmanager
def _loopback_alone() -> Iterator[None]:
    """Let a Ray that starts meanwhile listen on the loopback interface alone, as it does by itself outside Linux.

    Its ``_node_ip_address`` cannot say so: on Linux it takes 127.0.0.1 for the address of a network interface. The
    variable RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER could, were it not read when Ray is imported, which others may have done.
    """
    from ray._private import ray_constants

    before = getattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def on_this_machine() -> bool:
    """Whether the Ray that this process is connected to can be reached from this machine alone."""
    import ray

    return all(node["NodeManagerAddress"] in LOOPBACK for node in ray.nodes())


@contextmanager
def all_gpus_visible() -> Iterator[None]:
    """Undo that RecBole's configuration hides all GPUs but its own, which Ray then would not find."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def assigned_gpus() -> dict[str, Any]:
    """The GPUs that Ray gave to this process, as a setting; RecBole would choose for itself."""
    import ray

    return {"gpu_id": ",".join(map(str, ray.get_gpu_ids()))}


def resume_from(checkpoint: Any, trainer: Any) -> None:
    """Take up a run from what :func:`checkpoint_folder` gave to Ray, in the trainer's own file."""
    own_file = trainer.saved_model_file
    with checkpoint.as_directory() as folder:
        shutil.copyfile(Path(folder, CHECKPOINT), own_file)
    trainer.resume_checkpoint(own_file)


@contextmanager
def checkpoint_folder(trainer: Any) -> Iterator[str]:
    """A folder with the latest checkpoint of a trainer, for Ray to keep."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, CHECKPOINT)
        try:
            # The file is replaced by the next one, never written in place, so a link to it stays as it is.
            os.link(trainer.saved_model_file, target)
        except OSError:  # another file system
            shutil.copyfile(trainer.saved_model_file, target)
        yield folder


def reason(error: BaseException | None) -> str:
    """Why a process on the cluster failed, in a line."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"
