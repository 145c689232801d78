"""Vectors of items from their columns of the ``.item`` file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from recbole.utils import FeatureType
from torch import Tensor, nn

from recbole_ssm.data.reading import AtomicFile, file_format
from recbole_ssm.errors import UserError


class _Held(nn.Module):
    """What a column holds of each item, ``[n, L]``; nothing yet where there are no data (:meth:`ItemFeatures.hold`)."""

    values: Tensor

    def __init__(self, values: Tensor):
        super().__init__()
        self.register_buffer("values", values)


class Tokens(_Held):
    """A column of one or several tokens an item: the mean of their embeddings, and nothing where there is none.

    Args:
        values: ids, int64 ``[n, L]``; 0 is none.
        kinds: number of ids.
        size: width ``d``.
    """

    def __init__(self, values: Tensor, kinds: int, size: int):
        super().__init__(values)
        self.embedding = nn.EmbeddingBag(kinds, size, mode="mean", padding_idx=0)
        nn.init.normal_(self.embedding.weight[1:], std=0.02)

    def forward(self) -> Tensor:
        """``[n, d]``."""
        return self.embedding(self.values)


class Number(_Held):
    """A column of a number an item, standardised: a learned vector times it.

    Args:
        values: ``[n, 1]``.
        size: width ``d``.
    """

    def __init__(self, values: Tensor, size: int):
        known = values[1:]
        if len(known):
            deviation = known.std(unbiased=False)
            values = (values - known.mean()) / (deviation if deviation > 0 else 1.0)
            values[0] = 0.0
        super().__init__(values)
        self.weight = nn.Parameter(torch.empty(1, size).normal_(std=0.02))

    def forward(self) -> Tensor:
        """``[n, d]``."""
        return self.values * self.weight


class ItemFeatures(nn.Module):
    """Items' vectors made of their own embeddings and those of their columns, ``[n, d]`` to ``[n, d]``.

    An item that the training part never has keeps no embedding of its own, which would be what it began as, pushed away
    by all targets that are other items: it is what its columns say.

    Args:
        dataset: RecBole's, with the training part's interactions; or a vocabulary, where a checkpoint has the rest.
        fields: columns of the ``.item`` file: one or several tokens, or a number.
        size: width ``d``.
        fusion: ``sum`` of all; or ``concat``, a linear map of all side by side.

    Raises:
        UserError: for a column that there is not, or of several numbers.
    """

    def __init__(self, dataset: Any, fields: Sequence[str], size: int, fusion: str):
        super().__init__()
        has_data = hasattr(dataset, "inter_matrix")
        self.columns = nn.ModuleList(_column(dataset, field, size, has_data) for field in fields)
        seen = torch.zeros(dataset.item_num, 1)
        if has_data:
            seen[torch.from_numpy(dataset.inter_matrix().col)] = 1.0
        seen[0] = 1.0  # the padding, by which a model may mask items
        self.register_buffer("seen", seen)
        self.seen: Tensor
        self.fuse = nn.Linear((1 + len(fields)) * size, size) if fusion == "concat" else None
        self._made: Tensor | None = None

    def forward(self, own: Tensor) -> Tensor:
        """Vectors of all items, of their own embeddings ``[n, d]``; in inference they are made once."""
        if self.training or torch.is_grad_enabled():
            return self._make(own)
        if self._made is None:
            self._made = self._make(own)
        return self._made

    def _make(self, own: Tensor) -> Tensor:
        parts = [own * self.seen, *(column() for column in self.columns)]
        return torch.stack(parts).sum(0) if self.fuse is None else self.fuse(torch.cat(parts, -1))

    def hold(self, weights: Mapping[str, Any], prefix: str) -> None:
        """Take what a checkpoint says of each column, ``[n, L]``, where it was built without data.

        Args:
            weights: of the whole model, by name.
            prefix: with which the names of this module's begin.

        Raises:
            UserError: where these are no values of such columns.
        """
        for place, column in enumerate(self.columns):
            held = weights.get(f"{prefix}columns.{place}.values")
            if not isinstance(held, Tensor) or not self._fits(column, held):
                raise UserError("the checkpoint's item_features are no columns of its items: train it again.")
            column.values = held.to(self.seen.device)

    def _fits(self, column: Any, held: Tensor) -> bool:
        if held.ndim != 2 or len(held) != len(self.seen) or held.dtype != column.values.dtype:
            return False
        kinds = column.embedding.num_embeddings if isinstance(column, Tokens) else None
        return kinds is None or bool(((held >= 0) & (held < kinds)).all())

    def train(self, mode: bool = True):
        """As torch's; what was made is forgotten."""
        self._made = None
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._made = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args):
        self._made = None
        super()._load_from_state_dict(*args)


def check_is_column(dataset: Any, setting: str, field: str) -> None:
    """Look for a column of the ``.item`` file that a setting names.

    Raises:
        UserError: where there is none, naming those that there are.
    """
    features = dataset.get_item_feature()
    if features is not None and field in features and field != dataset.iid_field:
        return
    file = Path(dataset.dataset_path, f"{dataset.dataset_name}.item")
    if not file.is_file():
        raise UserError(f"{setting} names {field!r}, but there is no file {file} with such a column.")
    known = [name for name in AtomicFile(file, *file_format(dataset.config)).columns if name != dataset.iid_field]
    raise UserError(f"{setting} names {field!r}, which is no column of {file}: choose of {', '.join(known) or 'none'}.")


def _column(dataset: Any, field: str, size: int, has_data: bool) -> Tokens | Number:
    if not has_data:
        if field in dataset.field2id_token:
            return Tokens(torch.zeros(0, 1, dtype=torch.int64), dataset.num(field), size)
        return Number(torch.zeros(0, 1), size)
    check_is_column(dataset, "item_features", field)
    features = dataset.get_item_feature()
    kind, values = dataset.field2type[field], features[field]
    if kind == FeatureType.FLOAT_SEQ:
        raise UserError(
            f"item_features names {field!r}, a column of several numbers: choose one of tokens or a number."
        )
    if kind == FeatureType.FLOAT:
        return Number(values.float()[:, None], size)
    return Tokens(values if kind == FeatureType.TOKEN_SEQ else values[:, None], dataset.num(field), size)
