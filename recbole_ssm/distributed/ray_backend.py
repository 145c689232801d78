"""How the processes of Ray Train meet where all are on this machine: in a file, for lack of a port that is not open."""

import os
import tempfile
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.torch.config import TorchConfig, _TorchBackend

from recbole_ssm.distributed.processes import meet_on_this_machine


@dataclass
class LocalConfig(TorchConfig):
    """Ray's TorchConfig for a cluster on this machine; ``backend`` must be given.

    Attributes:
        folder: where each start of the processes makes the file that they meet in.
    """

    folder: str = ""

    @property
    def backend_cls(self) -> type:
        """What Ray Train starts the processes' group with."""
        return _LocalBackend


class _LocalBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: LocalConfig) -> None:
        # A file of an earlier start would tell of processes that are gone.
        handle, file = tempfile.mkstemp(dir=backend_config.folder)
        os.close(handle)
        size = len(worker_group)
        job = (meet_on_this_machine, backend_config.backend, file)
        ray.get([worker_group.execute_single_async(rank, *job, rank, size) for rank in range(size)])
