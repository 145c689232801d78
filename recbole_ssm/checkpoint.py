"""Checkpoint files that hold data alone: written whole or not at all, and safe to load from a stranger."""

import os
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch

from recbole_ssm.errors import UserError

FORMAT = "recbole_ssm checkpoint 1"


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path`` in one step: a process killed meanwhile leaves the file that was there before.

    ``state`` may hold tensors, Python's own types, NumPy arrays and SciPy matrices. Modules in it (some of RecBole's
    models list theirs as ``other_parameter``) are left out, for the ``state_dict`` holds their weights.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"format": FORMAT, **_encode(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.umask(umask := os.umask(0))
        os.chmod(scratch, 0o666 & ~umask)  # mkstemp's file is its owner's alone
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint; no code in it is ever run.

    Raises:
        UserError: where there is no such file, or it is damaged or none of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} not found.")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types for a damaged file, undocumented
        if "GLOBAL" in str(error):  # how torch names a Python object that it will not make
            raise UserError(
                f"{path} holds Python objects, which could run code when loaded (RecBole's own checkpoints do): "
                "train it again with recbole-ssm."
            ) from error
        raise UserError(f"{path} is damaged or no checkpoint at all: use another one, or train again.") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is a PyTorch file, but no checkpoint of this version of recbole-ssm.")
    return _decode(state)


def load_weights(model, state: dict[str, Any], file: str | Path) -> None:
    """Put a checkpoint's weights, and what RecBole keeps beside them, into a RecBole model.

    Raises:
        UserError: where they do not fit, naming the ``file``.
    """
    try:
        model.load_state_dict(state["state_dict"])
    except RuntimeError as error:
        raise UserError(f"{file} does not fit this data, which must have changed since: {error}") from error
    model.load_other_parameter(state.get("other_parameter"))


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {_encode(key): _encode(item) for key, item in value.items() if not isinstance(item, torch.nn.Module)}
    if isinstance(value, list | tuple):
        return type(value)(_encode(item) for item in value)
    if isinstance(value, np.ndarray):
        return {"__numpy__": torch.from_numpy(value.copy())}
    if isinstance(value, np.generic):
        return value.item()
    if scipy.sparse.issparse(value):
        coo = value.tocoo()
        parts = {"row": coo.row, "col": coo.col, "data": coo.data, "shape": coo.shape, "layout": value.format}
        return {"__sparse__": _encode(parts)}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"__numpy__"}:
            return value["__numpy__"].cpu().numpy()
        if value.keys() == {"__sparse__"}:
            parts = _decode(value["__sparse__"])
            coo = scipy.sparse.coo_matrix((parts["data"], (parts["row"], parts["col"])), shape=parts["shape"])
            return coo.asformat(parts["layout"])
        for key, item in value.items():  # in place: a state_dict keeps its type and metadata
            value[key] = _decode(item)
        return value
    if isinstance(value, list | tuple):
        return type(value)(_decode(item) for item in value)
    return value


def random_state() -> dict[str, Any]:
    """State of Python's, NumPy's and torch's global random generators."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back to a state from :func:`random_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
