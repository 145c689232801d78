"""Checkpoint files that hold data alone: written whole or not at all, safe to load from a stranger, damage noticed.

A file is what :func:`torch.save` writes, readable by ``torch.load(file, weights_only=True)``, with the digest of all
its bytes in the comment that the zip format has room for.
"""

import hashlib
import inspect
import logging
import os
import random
import struct
import tempfile
import time
import warnings
import zipfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from recbole_ssm.errors import UserError
from recbole_ssm.places import CHECKPOINTS_REMEDY, writing

try:
    import fcntl
except ImportError:  # Windows, which lets nobody remove a file that is open
    fcntl = None  # type: ignore[assignment]

FORMAT, FIRST_FORMAT = "recbole_ssm checkpoint 2", "recbole_ssm checkpoint 1"

REMEDY = "use another one, or train again."

_COMMENT = FORMAT.encode() + b" sha256 "
_COMMENT_SIZE = len(_COMMENT) + 64
_SCRATCH = ".saving-"
SECONDS_TO_LOCK = 2.0
_COMMENT_LENGTH = struct.Struct("<H")  # the last field of a zip file, before the comment itself


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path`` in one step: a process killed meanwhile leaves the file that was there before.

    ``state`` may hold tensors, Python's own types, NumPy arrays and SciPy matrices. Modules in it (some of RecBole's
    models list theirs as ``other_parameter``) are left out, for the ``state_dict`` holds their weights.

    Raises:
        CannotWrite: where the disk or the folder does not take it.
    """
    path = Path(path)
    with writing(path, CHECKPOINTS_REMEDY):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        _replace(path, state)


def _replace(path: Path, state: dict[str, Any]) -> None:
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}{_SCRATCH}")
    try:
        with os.fdopen(handle, "w+b") as file:
            lock(file)
            torch.save({"format": FORMAT, **_encode(state)}, file)
            file.seek(-_COMMENT_LENGTH.size, os.SEEK_END)
            file.write(_COMMENT_LENGTH.pack(_COMMENT_SIZE))
            file.seek(0)
            file.write(_COMMENT + digest(file).encode())
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

    One of the first format, which has no digest and names no items, is read too, and a line says so.

    Raises:
        UserError: where there is no such file, or it is damaged or none of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} not found.")
    damaged, told = f"{path} is damaged or no checkpoint at all: {REMEDY}", []
    try:
        with path.open("rb") as file:
            whole = _is_whole(file)
            if whole is False:
                raise UserError(damaged)
            file.seek(0)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                state = torch.load(file, map_location=device, weights_only=True)
        state = _decode(state)
    except UserError:
        raise
    except Exception as error:  # torch.load raises half a dozen types for a damaged file, undocumented
        # How torch names a Python object that it will not make, and a pickle that is none of its own.
        if "GLOBAL" in str(error) or any("pickle protocol" in str(warning.message) for warning in told):
            raise UserError(
                f"{path} holds Python objects, which could run code when loaded (RecBole's own checkpoints do): "
                "train it again with recbole-ssm."
            ) from error
        raise UserError(damaged) from error
    written = state.get("format") if isinstance(state, dict) else None
    if written not in (FORMAT, FIRST_FORMAT):
        raise UserError(f"{path} is a PyTorch file, but no checkpoint of this version of recbole-ssm.")
    if written == FORMAT and whole is None:
        raise UserError(damaged)
    if written == FIRST_FORMAT:
        _tell_first_format(path)
    return state


@lru_cache(maxsize=None)  # once a file, however often it is read
def _tell_first_format(path: Path) -> None:
    logging.getLogger().warning(
        f"{path} was written by an earlier version: it holds no ids of users and items and no digest, so neither data "
        "that were re-ordered since nor damage is noticed. A run that goes on from it with --resume writes them."
    )


def _is_whole(file: IO[bytes]) -> bool | None:
    """Whether a file is as it was written; None where no digest says so.

    Raises:
        zipfile.BadZipFile: for a file that is no zip archive.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _COMMENT_SIZE))
    comment = file.read()
    with zipfile.ZipFile(file) as archive:
        # torch stores what it writes as it is; anything else could grow out of a small file without end.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise zipfile.BadZipFile("compressed")
    if not comment.startswith(_COMMENT):
        return None
    file.seek(0)
    return comment[len(_COMMENT) :] == digest(file, size - _COMMENT_SIZE).encode()


def digest(file: IO[bytes], size: int | None = None) -> str:
    """SHA-256 of the next ``size`` bytes, or of all that follow."""
    found = hashlib.sha256()
    while block := file.read(1 << 20 if size is None else min(size, 1 << 20)):
        found.update(block)
        size = None if size is None else size - len(block)
    return found.hexdigest()


def lock(file: IO[bytes]) -> bool:
    """Hold a file until it is closed, or this process ends however; returns whether nobody else does."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process writes it, or the file system has no locks
        return False
    return True


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed while they wrote a checkpoint have left behind."""
    for scratch in folder.glob(f".*{_SCRATCH}*"):
        with suppress(OSError):
            with scratch.open("rb") as file:
                found = os.fstat(file.fileno())
                # A new one that is empty may be about to be locked.
                abandoned = lock(file) and (found.st_size > 0 or time.time() - found.st_mtime > SECONDS_TO_LOCK)
            if abandoned:
                scratch.unlink()


def expect(file: str | Path, part: Any, **types: type | tuple[type, ...]) -> None:
    """Check that ``part`` of a checkpoint is a dict and holds these keys, of these types.

    Raises:
        UserError: where it does not, naming the ``file``.
    """
    for key, kind in types.items():
        if not isinstance(part, dict) or not isinstance(part.get(key), kind):
            raise UserError(f"{file} is no whole checkpoint: {key} is missing, or no {_names(kind)}: {REMEDY}")


def _names(kind: type | tuple[type, ...]) -> str:
    return " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))


def load_weights(model, state: dict[str, Any], file: str | Path) -> None:
    """Put a checkpoint's weights, and what RecBole keeps beside them, into a RecBole model.

    Args:
        model: the model.
        state: the checkpoint's content.
        file: its name, for what there is to tell.

    Raises:
        UserError: where they do not fit, or are no finite numbers.
    """
    expect(file, state, state_dict=dict)
    weights, own = state["state_dict"], model.state_dict()
    if weights.keys() != own.keys():
        names = ", ".join(map(repr, [*(own.keys() - weights.keys()), *(weights.keys() - own.keys())][:3]))
        raise UserError(f"{file} does not fit {type(model).__name__} with these settings: it differs in {names}.")
    for name, weight in weights.items():
        problem = _unlike(weight, own[name])
        if problem:
            raise UserError(f"{file} does not fit this data, which must have changed since: {name} {problem}.")
    learned = dict(model.named_parameters())
    _refuse_infinite(file, {name: weight for name, weight in weights.items() if name in learned})
    other = state.get("other_parameter")
    if other is not None and (
        not isinstance(other, dict) or other.keys() - set(getattr(model, "other_parameter_name", ()))
    ):
        raise UserError(f"{file} holds more than {type(model).__name__} keeps beside its weights: {REMEDY}")
    model.load_state_dict(weights)
    model.load_other_parameter(other)


def check_optimizer_state(file: str | Path, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Check that an optimizer's ``state`` and ``param_groups`` are what this one could have: fused kernels do not.

    Raises:
        UserError: where it is not, naming the ``file``.
    """
    groups = [group["params"] for group in optimizer.param_groups]
    numbers = [group.get("params") if isinstance(group, dict) else None for group in state["param_groups"]]
    counted = iter(range(sum(map(len, groups))))
    if numbers != [[next(counted) for _ in group] for group in groups]:
        raise UserError(f"{file} holds an optimizer of other parameters than this model's: {REMEDY}")
    parameters = [parameter for group in groups for parameter in group]
    known = _state_of_a_step(optimizer)
    for number, moments in state["state"].items():
        if not isinstance(number, int) or not 0 <= number < len(parameters) or not isinstance(moments, dict):
            raise UserError(f"{file} holds an optimizer of other parameters than this model's: {REMEDY}")
        moments = {key: value for key, value in moments.items() if value is not None}
        if moments.keys() != known.keys():
            raise UserError(f"{file} holds the state of another optimizer than {type(optimizer).__name__}: {REMEDY}")
        for key, value in moments.items():
            if isinstance(known[key], int) and isinstance(value, int):
                continue
            problem = _unlike(value, parameters[number] if known[key].dim() else known[key])
            if problem:
                raise UserError(f"{file} holds an optimizer that does not fit: {key} of parameter {number} {problem}.")
            _refuse_infinite(file, {f"{key} of parameter {number}": value})


def _state_of_a_step(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What such an optimizer keeps of a parameter once it has made a step."""
    weight = torch.zeros(1, 1, requires_grad=True)
    weight.grad = torch.zeros(1, 1)
    taken = inspect.signature(type(optimizer)).parameters.keys() - {"fused", "capturable", "foreach"}
    settings = {key: value for key, value in optimizer.defaults.items() if key in taken}
    twin = type(optimizer)([weight], **{**settings, "lr": float(settings["lr"])})
    twin.step()
    return {key: value for key, value in twin.state[weight].items() if value is not None}


def _unlike(value: Any, own: Tensor) -> str | None:
    """What tells ``value`` from a dense tensor of the shape and type of ``own``."""
    if not isinstance(value, Tensor) or value.layout != own.layout or value.is_quantized:
        return f"is no {str(own.layout).removeprefix('torch.')} tensor of plain numbers"
    if value.shape != own.shape:
        return f"is {list(value.shape)} there and {list(own.shape)} here"
    if value.dtype != own.dtype:
        return f"is {value.dtype} there and {own.dtype} here"
    return None


def _refuse_infinite(file: str | Path, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{file} cannot be used: {name} holds numbers that are infinite or none (NaN): {REMEDY}")


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
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
        # A view of a few bytes could claim to be any number of them, and fused optimizers go through memory from the
        # first number on, whatever the strides say.
        if (value.storage_offset() + value.numel()) * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError("a tensor larger than what it is stored in")
    elif isinstance(value, dict):
        if value.keys() == {"__numpy__"}:
            return _decode(value["__numpy__"]).cpu().numpy()
        if value.keys() == {"__sparse__"}:
            parts = _decode(value["__sparse__"])
            coo = scipy.sparse.coo_matrix((parts["data"], (parts["row"], parts["col"])), shape=parts["shape"])
            return coo.asformat(parts["layout"])
        for key, item in value.items():  # in place: a state_dict keeps its type and metadata
            value[key] = _decode(item)
    elif isinstance(value, list | tuple):
        return type(value)(_decode(item) for item in value)
    return value


def random_state() -> dict[str, Any]:
    """State of Python's, NumPy's and torch's global random generators, and of this process's GPU's."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = [torch.cuda.get_rng_state()]
    return state


def set_random_state(state: dict[str, Any], file: str | Path = "the checkpoint") -> None:
    """Put the generators back to a state from :func:`random_state`.

    Raises:
        UserError: for what is none, naming the ``file``.
    """
    try:
        _, _, place, *_ = numpy_state = state["numpy"]
        if not 0 <= place <= 624:  # NumPy reads wherever it points
            raise ValueError("place")
        random.setstate(state["python"])
        np.random.set_state(numpy_state)
        torch.set_rng_state(state["torch"].cpu())
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"][0].cpu())
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError) as error:
        raise UserError(f"{file} holds no state of the random generators ({error}): {REMEDY}") from error
