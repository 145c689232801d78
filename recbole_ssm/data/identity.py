"""What the numbers in a checkpoint stand for: the tokens behind ids, and the interactions that were learned from.

RecBole numbers users and items in the order in which a file names them, so the same weights mean something else where
a line has moved. A checkpoint therefore carries its vocabularies; data that are loaded for it take its numbers over
(:meth:`recbole_ssm.data.atomic_files.AtomicFiles._remap`), and :func:`check_identity` says what is different.
"""

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np

from recbole_ssm.errors import UserError

SEPARATOR = "\n"  # which no token of a file of lines can hold


def digest_of(columns: list[np.ndarray]) -> str:
    """A digest of columns of numbers."""
    digest = hashlib.blake2b(digest_size=16)
    for column in columns:
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()


def identity(dataset: Any) -> dict[str, Any]:
    """What a checkpoint keeps of its data.

    Returns:
        ``vocabulary``: the tokens of each field in the order of their ids, from 1, a line each; ``data``: number and
        digest of the interactions.
    """
    fields = getattr(dataset, "field2id_token", {})
    vocabulary = {str(field): SEPARATOR.join(map(str, tokens[1:])) for field, tokens in fields.items()}
    return {"vocabulary": vocabulary, "data": getattr(dataset, "learned_from", {})}


def is_vocabulary(kept: dict) -> bool:
    """Whether this is what :func:`identity` keeps of tokens: different ones, a line each, by their field."""
    if not all(isinstance(word, str) for pair in kept.items() for word in pair):
        return False
    return all(len(set(tokens)) == len(tokens) for tokens in (lines.split(SEPARATOR) for lines in kept.values()))


def tokens_of(kept: dict[str, Any], field: str) -> list[str]:
    """Tokens of a field in the order of their ids, from 1; none where :func:`identity` did not keep any."""
    lines = kept.get("vocabulary", {}).get(field)
    return lines.split(SEPARATOR) if lines else []


def check_identity(dataset: Any, kept: dict[str, Any], file: str | Path) -> None:
    """Compare data with those that a checkpoint was trained on, and log what is different.

    Args:
        dataset: loaded for the checkpoint.
        kept: see :func:`identity`.
        file: the checkpoint's name.

    Raises:
        UserError: where items have other numbers than in the checkpoint, or there are some that it does not know.
    """
    new: dict[str, list[str]] = {}
    for field in kept.get("vocabulary", {}):
        known, tokens = tokens_of(kept, field), dataset.field2id_token.get(field)
        if tokens is None:
            continue
        here = [str(token) for token in tokens[1:]]
        if here[: len(known)] != known:
            moved = next(
                (a for a, b in zip(known, here, strict=False) if a != b), known[min(len(here), len(known) - 1)]
            )
            raise UserError(
                f"{file} numbers the {field} otherwise than the data here do (first {moved!r}): evaluate it on the "
                "files that it was trained on, or train again."
            )
        if here[len(known) :]:
            new[field] = here[len(known) :]
    unknown = new.pop(dataset.iid_field, [])
    if unknown:
        raise UserError(
            f"{file} does not fit this data, which must have changed since: it does not know {len(unknown)} "
            f"{dataset.iid_field} of the files, such as {unknown[0]!r}: leave their interactions out, or train again."
        )
    for field, tokens in new.items():
        logging.getLogger().warning(f"{file} does not know {len(tokens)} {field} of the files, such as {tokens[0]!r}")
    before, now = kept.get("data"), getattr(dataset, "learned_from", None)
    if before and now and before != now:
        logging.getLogger().warning(
            f"the data are not those that {file} was trained on ({before.get('interactions')} interactions then, "
            f"{now['interactions']} now, or others): it may be tested on what it has learned from"
        )
