"""Small datasets and settings; every test runs in an empty folder of its own."""

import ipaddress
import logging
import os
import sys
from pathlib import Path

import numba
import numpy as np
import psutil
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined

import yaml

from recbole_ssm import Config
from recbole_ssm.config import properties_dir
from recbole_ssm.data import create_dataset, data_preparation
from recbole_ssm.quick_start import build_model

# Where workers run side by side, the threads of them all would wait for each other, torch's in child processes, too.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

HEADER = "user_id:token\titem_id:token\ttimestamp:float"
SMALL = {"hidden_size": 16, "d_state": 4, "headdim": 8, "n_heads": 2, "n_experts": 3, "inner_size": 32}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """RecBole writes logs and checkpoints into the working directory, and reads the command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["test"])
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield tmp_path
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    root.setLevel(level)
    torch.use_deterministic_algorithms(False)


class Trap:
    """Unpickling it runs code, which leaves the file ``trap`` in the working directory."""

    def __reduce__(self):
        return Path.touch, (Path("trap"),)


def write_dataset(name: str, lines: list[str], header: str | None = HEADER) -> Path:
    """Write ``dataset/<name>/<name>.inter`` in the working directory."""
    path = Path("dataset", name, f"{name}.inter")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in ([] if header is None else [header]) + lines))
    return path


def random_rows(users: int = 40, items: int = 30, longest: int = 25, seed: int = 0) -> list[str]:
    """Histories of 4 to ``longest`` random items, in an order of lines that is not that of time."""
    generator = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        length = generator.integers(4, longest, endpoint=True)
        rows += [f"u{user}\ti{generator.integers(items)}\t{1_000_000_000 + 100 * time}" for time in range(length)]
    generator.shuffle(rows)
    return rows


def markov_rows(users: int, items: int, length: int, noise: float, seed: int = 0) -> list[str]:
    """Histories in which item ``7 i + 3`` follows ``i``, but for a share of ``noise`` that is random."""
    generator = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        item = generator.integers(items)
        for time in range(length):
            rows.append(f"{user}\t{item}\t{time}")
            item = generator.integers(items) if generator.random() < noise else (7 * item + 3) % items
    return rows


def small_settings(model: str) -> dict:
    """Settings that make any registered model small; none for RecBole's."""
    file = properties_dir() / "model" / f"{model}.yaml"
    own = yaml.safe_load(file.read_text()) if file.exists() else {}
    return {key: value for key, value in SMALL.items() if key in own}


def small_config(model: str, dataset: str = "tiny", **settings) -> Config:
    quiet = {"state": "ERROR", "show_progress": False, "data_path": "dataset"}
    return Config(model, dataset, config_dict={**quiet, **small_settings(model), **settings})


def build(model: str, dataset: str = "tiny", **settings):
    """Config, model and loaders of a small model on a dataset; writes ``tiny`` where there is none."""
    if not Path("dataset", dataset).exists():
        write_dataset(dataset, random_rows())
    config = small_config(model, dataset, **settings)
    loaders = data_preparation(config, create_dataset(config))
    return config, build_model(config, loaders[0]), loaders


def listening(process: psutil.Process) -> dict[str, list[str]]:
    """Addresses at which a process and those below it wait for others, by the processes' names; loopback ones are none.

    A process that waits at loopback addresses alone has an empty list.
    """
    found: dict[str, list[str]] = {}
    for one in [process, *process.children(recursive=True)]:
        try:
            name = one.name()
            sockets = one.net_connections("inet")
        except psutil.NoSuchProcess:
            continue
        for socket in sockets:
            if socket.laddr and not socket.raddr:
                address = ipaddress.ip_address(socket.laddr.ip)
                local = (getattr(address, "ipv4_mapped", None) or address).is_loopback
                found.setdefault(name, []).extend([] if local else [str(address)])
    return found
