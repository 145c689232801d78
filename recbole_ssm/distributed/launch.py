"""Start several processes that train one model, on this machine alone or with those of others."""

import os
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import parent_process
from pathlib import Path
from typing import Any

import numba
import torch
from torch.multiprocessing import ProcessExitedException

from recbole_ssm.compat import ignore_recboles_warnings
from recbole_ssm.config import Config
from recbole_ssm.errors import UserError


def launch(
    job: Callable[[dict[str, Any]], Any],
    config: Config,
    settings: dict[str, Any],
    nproc: int,
    world_size: int = -1,
    ip: str = "localhost",
    port: str | int = "5678",
    group_offset: int = 0,
) -> Any:
    """Run a job in several processes at a time; where one ends before its time, the others are stopped.

    Args:
        job: what each process does with its settings; it is pickled.
        config: the configuration that ``settings`` make.
        settings: those of all processes, to which each has what it needs to find the others added.
        nproc: processes on this machine: one a GPU, or all on the CPU where there is none.
        world_size: processes on all machines; those of this one where it is not positive.
        ip: address of the first machine; none is needed where all processes are on this one, as for ``port``.
        port: its port.
        group_offset: rank of this machine's first process.

    Returns:
        What the job returned in this machine's first process.

    Raises:
        UserError: for no process, where this machine has fewer GPUs than processes, or a process fails or dies.
    """
    if nproc < 1:
        raise UserError(f"--nproc is {nproc}: at least one process is needed.")
    if config["device"].type == "cuda":
        named = len(config["gpu_id"].split(","))
        if torch.cuda.device_count() < nproc or named < nproc:
            raise UserError(
                f"--nproc={nproc} needs as many GPUs; gpu_id names {named} and {torch.cuda.device_count()} can be "
                "used: name more (--gpu_id=0,1), leave --nproc out, or use the CPU alone (--gpu_id='')."
            )
    with tempfile.TemporaryDirectory() as folder:
        where = {"ip": ip, "port": port}
        if world_size <= 0 or world_size == nproc:
            world_size, where = nproc, {"rendezvous": str(Path(folder, "rendezvous"))}
        if not 0 <= group_offset <= world_size - nproc:
            raise UserError(
                f"--group_offset={group_offset} and --nproc={nproc} make ranks up to {group_offset + nproc - 1}, but "
                f"--world_size is {world_size}: give the number of processes of all machines."
            )
        return _run(job, {**settings, "nproc": nproc, "offset": group_offset, "world_size": world_size, **where})


def _run(job, settings):
    nproc = settings["nproc"]
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    workers = torch.multiprocessing.spawn(run_rank, (job, settings, queue), nproc, join=False)
    try:
        while not workers.join():
            pass
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "interrupted; the log names the checkpoint, from which the run goes on with --resume."
        ) from None
    except ProcessExitedException as error:
        if not queue.empty():
            raise queue.get() from error
        how = error.signal_name or f"exit code {error.exit_code}"
        raise UserError(
            f"process {error.error_index} of {nproc} died ({how}) and the others were stopped; the log names the "
            "checkpoint, from which the run goes on with --resume."
        ) from error
    return queue.get()


def run_rank(rank: int, job: Callable[[dict[str, Any]], Any], settings: dict[str, Any], queue: Any) -> None:
    """Run a job as one of several processes of this machine; see :func:`launch`.

    Args:
        rank: number of the process on this machine.
        job: see :func:`launch`.
        settings: those of all processes; ``nproc`` among them.
        queue: where the first process puts what the job returned, and any process the :class:`UserError` that ends it.
    """
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    ignore_recboles_warnings()
    # Each process would take all cores, by torch and by numba.
    torch.set_num_threads(max(1, torch.get_num_threads() // settings["nproc"]))
    numba.set_num_threads(max(1, numba.get_num_threads() // settings["nproc"]))
    try:
        result = job({**settings, "local_rank": rank})
    except UserError as error:
        queue.put(type(error)(f"process {rank}: {error}"))
        sys.exit(1)
    if rank == 0:
        queue.put(result)
    torch.distributed.destroy_process_group()


def _end_with_launcher():
    """Wait for the launcher's end, of which a process that waits for the others in a collective learns nothing."""
    if (launcher := parent_process()) is not None:
        wait([launcher.sentinel])
        os._exit(1)
