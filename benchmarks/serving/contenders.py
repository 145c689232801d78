"""Models to be served: untrained, for what they cost does not depend on what they have learned."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_ssm import Config, Recommender
from recbole_ssm.checkpoint import save_checkpoint
from recbole_ssm.data.identity import SEPARATOR
from recbole_ssm.registry import model_class
from recbole_ssm.serving.histories import Histories
from recbole_ssm.serving.vocabulary import Vocabulary

ROOT = Path(__file__).parents[2]
SIZE = {"hidden_size": 64, "MAX_ITEM_LIST_LENGTH": 200}
SETTINGS = {"state": "ERROR", "gpu_id": "", "tuned": False}


def served(model: str, items: int, **settings: Any) -> Recommender:
    """A recommender of a model on a catalogue of so many items."""
    config = Config(model, "ml-1m", config_dict={**SIZE, **SETTINGS, **settings})
    words = SEPARATOR.join(map(str, range(1, items + 1)))
    config.identity = {"file": "", "vocabulary": {"user_id": "1", "item_id": words}, "data": {}}
    vocabulary = Vocabulary(config)
    torch.manual_seed(0)
    return Recommender(model_class(config)(config, vocabulary), config, vocabulary)


def save(recommender: Recommender, path: Path) -> None:
    """A checkpoint of it, for commands."""
    config = recommender.config
    state = {"config": config.given, "state_dict": recommender.model.state_dict()}
    save_checkpoint(path, state | {name: config.identity[name] for name in ("vocabulary", "data")})


def histories(count: int, length: int, items: int) -> Histories:
    """Random ones."""
    ids = np.random.default_rng(0).integers(1, items + 1, count * length)
    return Histories(ids, np.full(count, length))


def in_turns(cases: dict[str, Callable[[], Any]], rounds: int, seconds: float, warm: int = 3) -> dict[str, list[float]]:
    """Seconds of each call, all of them in every round, until there are so many rounds or seconds."""
    for _ in range(warm):
        for call in cases.values():
            call()
    taken: dict[str, list[float]] = {name: [] for name in cases}
    begin = time.perf_counter()
    for done in range(rounds):
        for name, call in cases.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
        if done >= 4 and time.perf_counter() - begin > seconds:
            break
    return taken


def milliseconds(value: float) -> str:
    """For a table."""
    return f"{value * 1e3:.3g}"
