"""A checkpoint's model as a recommender: by item tokens, without the data that it was trained on."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from recbole.utils import ModelType
from torch import Tensor

from recbole_ssm.checkpoint import expect, load_checkpoint, load_weights
from recbole_ssm.config import Config
from recbole_ssm.data.batch import SequenceBatch
from recbole_ssm.data.context import reads_request
from recbole_ssm.errors import UserError
from recbole_ssm.layers.item_features import ItemFeatures
from recbole_ssm.models.base import PackedRecommender
from recbole_ssm.ops.packing import pad
from recbole_ssm.quick_start import config_of, load_data_and_model
from recbole_ssm.registry import model_class
from recbole_ssm.serving.histories import ASK_WITH_TIME, Histories, read_histories
from recbole_ssm.serving.session import Session
from recbole_ssm.serving.top_items import top_items
from recbole_ssm.serving.vocabulary import Vocabulary
from recbole_ssm.settings import fixed

# Histories whose scores of all items are held at a time.
ROWS_AT_A_TIME = 256

# Of these, how many a model of RecBole's reads at a time, padded: activations of more leave a CPU's caches.
PADDED_AT_A_TIME = {"cpu": 16, "cuda": 256}

# What a checkpoint says of how good its model is.
RESULTS = ("epoch", "best_valid_score", "best_valid_result")


@dataclass(frozen=True)
class Recommendations:
    """What is recommended to each history.

    Attributes:
        items: tokens, best first; fewer than asked for where there are no more, none for a history without known items.
        scores: theirs, in the same order.
    """

    items: list[list[str]]
    scores: list[list[float]]


class Recommender:
    """Top items for any history, on a CPU or a GPU; see :meth:`load`.

    Args:
        model: a trained sequential model.
        config: its configuration.
        vocabulary: the tokens of its items.
        results: see below.

    Attributes:
        model: as given, in evaluation mode.
        config: as given.
        vocabulary: as given.
        results: what the checkpoint says of its best epoch: ``epoch``, ``best_valid_score``, ``best_valid_result``.
        time_columns: what the model reads of times (:mod:`recbole_ssm.data.context`).
        allow_repeats: whether the model scores what a history holds.
        digest: of the weights, the settings that decide what they mean, and the items; what states are bound to.
    """

    def __init__(self, model: Any, config: Config, vocabulary: Vocabulary, results: dict[str, Any] | None = None):
        self.model, self.config, self.vocabulary = model.eval(), config, vocabulary
        self.results = results or {}
        self.packs = isinstance(model, PackedRecommender)
        self.max_length = config["MAX_ITEM_LIST_LENGTH"]
        self.time_columns: tuple[str, ...] = model.columns if self.packs else ()
        self.allow_repeats = model.allow_repeats if self.packs else True

    @classmethod
    def load(cls, checkpoint: str | Path, device: str | None = None, with_data: bool = False) -> "Recommender":
        """Load a checkpoint of any sequential model, ours or RecBole's; no code in it is run.

        Args:
            checkpoint: the file.
            device: ``cpu``, or ``cuda``; a GPU where there is one, if absent.
            with_data: read the dataset, too, for the models of RecBole that are built of more of it than its items.

        Raises:
            UserError: for a file that is no checkpoint, names no items, or holds a model that ranks for the users that
                it was trained on, or is built of more than items.
        """
        if device not in (None, "cpu", "cuda"):
            raise UserError(f"device is {device!r}: choose cpu or cuda, or leave it out.")
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("device is cuda, but torch finds no GPU here: choose cpu.")
        settings = {"show_progress": False, "log_wandb": False} | ({"gpu_id": ""} if device == "cpu" else {})
        file = str(checkpoint)
        state = load_checkpoint(file)
        config = config_of(file, settings, state)
        if config["MODEL_TYPE"] != ModelType.SEQUENTIAL:
            raise UserError(
                f"{config['model']} ranks for the users that it was trained on, not for histories: use RecBole's "
                "full_sort_topk with load_data_and_model."
            )
        vocabulary = Vocabulary(config)
        if with_data:
            model = load_data_and_model(file, settings)[1]
        else:
            try:
                model = model_class(config)(config, vocabulary).to(config["device"])
            except (AttributeError, KeyError) as error:
                raise UserError(
                    f"{config['model']} is built of more than its items ({error}): load it with_data=True, where the "
                    "dataset is."
                ) from error
            if isinstance(features := getattr(model, "item_features", None), ItemFeatures):
                expect(file, state, state_dict=dict)
                features.hold(state["state_dict"], "item_features.")
            load_weights(model, state, file)
        return cls(model, config, vocabulary, {name: state[name] for name in RESULTS if name in state})

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @cached_property
    def digest(self) -> str:
        """See the class."""
        found = hashlib.blake2b(digest_size=16)
        given = {key: self.config.given[key] for key in sorted(fixed() & self.config.given.keys())}
        about = [self.config["model"], self.max_length, self.vocabulary.items.tolist(), given]
        found.update(json.dumps(about, default=str).encode())
        for name, weight in sorted(self.model.state_dict().items()):
            found.update(name.encode())
            found.update(weight.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def export(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write files that run without this package; see :func:`~recbole_ssm.serving.export.export`."""
        from recbole_ssm.serving.export import export

        export(self, folder, overwrite)

    def session(self, rule: str = "window") -> Session:
        """A live session of one user; see :class:`~recbole_ssm.serving.session.Session`."""
        return Session(self, rule)

    def recommend(
        self,
        sequences: Any,
        k: int = 10,
        exclude_seen: bool = True,
        candidates: Iterable[Any] | None = None,
        filter: Callable[[str], bool] | None = None,
        times: Any = None,
        at: Any = None,
    ) -> Any:
        """The items that are most likely to come next.

        Items that the model does not know are left out of histories and candidates, and a line of the log says so. Of
        a history's items the latest ``MAX_ITEM_LIST_LENGTH`` are read.

        Args:
            sequences: histories, oldest item first, see :func:`~recbole_ssm.serving.histories.read_histories`.
            k: most items a history.
            exclude_seen: whether a history's own items are left out, all of them; a model without ``allow_repeats``
                leaves them out in any case.
            candidates: items to choose from; all that the model knows where absent.
            filter: whether an item may be recommended, by its token.
            times: of each item, for lists, where the model reads them.
            at: the time at which recommendations are asked for, one for all or one a history (or user, in the order in
                which they come), where the model reads it (``request_time: known``).

        Returns:
            :class:`Recommendations` for lists; for a DataFrame or an Arrow table one with a row a recommendation: the
            user, the item, ``score`` and ``rank`` from 1.

        Raises:
            UserError: for a ``k`` below 1, or what :func:`~recbole_ssm.serving.histories.read_histories` refuses.
        """
        histories, users = self.read(sequences, times, at)
        ids, scores = self.top(histories, k, exclude_seen, self.candidate_ids(candidates, filter))
        if users is None:
            return self.named(ids, scores)
        row, place = np.nonzero(ids)
        table = pd.DataFrame(
            {
                self.vocabulary.uid_field: np.asarray(users)[row],
                self.vocabulary.iid_field: self.vocabulary.items[ids[row, place]],
                "score": scores[row, place],
                "rank": place + 1,
            }
        )
        if isinstance(sequences, pd.DataFrame):
            return table
        import pyarrow

        return pyarrow.Table.from_pandas(table, preserve_index=False)

    def score(self, sequences: Any, items: Iterable[Any], times: Any = None, at: Any = None) -> np.ndarray:
        """Scores of the same ``M`` items for each history, float32 ``[N, M]``.

        NaN stands for a history without known items, and by a model without ``allow_repeats``, whose scores of what it
        reads of a history were never trained, for those items.

        ``times`` and ``at`` are as in :meth:`recommend`.

        Raises:
            UserError: for an item that the model does not know, or what
                :func:`~recbole_ssm.serving.histories.read_histories` refuses.
        """
        histories, _ = self.read(sequences, times, at)
        wanted = np.array([self.vocabulary.id(token) for token in _listed("items", items)], dtype=np.int64)
        found = np.full((len(histories), len(wanted)), np.nan, np.float32)
        some = np.flatnonzero(histories.lengths)
        if len(some) and len(wanted):
            with torch.inference_mode():
                scores_of = self._scores_of(histories.take(some), wanted)
                step = ROWS_AT_A_TIME
                for begin in range(0, len(some), step):
                    rows = slice(begin, begin + step)
                    found[some[rows]] = scores_of(rows).float().cpu().numpy()
        if not self.allow_repeats:
            read, n_items = histories.latest(self.max_length), self.vocabulary.item_num
            pairs = np.arange(len(histories))[:, None] * n_items + wanted
            found[np.isin(pairs, read.rows * n_items + read.items)] = np.nan
        return found

    def similar_items(self, item: Any, k: int = 10) -> list[tuple[str, float]]:
        """The items whose embeddings have the largest cosine with that of ``item``, and the cosines.

        Raises:
            UserError: for an item that the model does not know, or a ``k`` below 1.
        """
        chosen = self.vocabulary.id(item)
        others = np.setdiff1d(self.candidate_ids(), [chosen])
        with torch.inference_mode():
            table = self._directions
            scores = (table[chosen] @ table.T)[None, torch.from_numpy(others).to(table.device)]
        ids, values = top_items(lambda _: scores, 1, others, len(table), _checked(k))
        found = self.named(ids, values)
        return list(zip(found.items[0], found.scores[0], strict=True))

    @cached_property
    def _directions(self) -> Tensor:
        """Embeddings of all ids, of length 1: a server is asked often, and a large catalogue's take long."""
        with torch.inference_mode():
            return F.normalize(self._table().float(), dim=-1)

    def item_embeddings(self) -> pd.DataFrame:
        """The embedding of each item, a row an item, by its token."""
        table = self._table().detach().float().cpu().numpy()
        return pd.DataFrame(table[1:], index=pd.Index(self.vocabulary.items[1:], name=self.vocabulary.iid_field))

    def read(self, sequences: Any, times: Any = None, at: Any = None) -> tuple[Histories, Any]:
        """See :func:`~recbole_ssm.serving.histories.read_histories`."""
        return read_histories(sequences, self.vocabulary, self.config["TIME_FIELD"], times, self.time_columns, at)

    def candidate_ids(
        self, candidates: Iterable[Any] | None = None, filter: Callable[[str], bool] | None = None
    ) -> np.ndarray:
        """Ids of what may be recommended, ascending; see :meth:`recommend`."""
        ids = np.arange(1, self.vocabulary.item_num)
        if filter is not None and not callable(filter):
            raise UserError(f"filter is {filter!r}: give a function of an item's token.")
        if candidates is not None:
            candidates = _listed("candidates", candidates)
            ids = np.unique(self.vocabulary.ids(candidates))
            ids = ids[ids > 0]
        if filter is not None:
            ids = ids[[bool(filter(token)) for token in self.vocabulary.items[ids].tolist()]]
        return ids

    def top(
        self,
        histories: Histories,
        k: int,
        exclude_seen: bool = True,
        candidates: np.ndarray | None = None,
        represented: Tensor | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best items by id, and their scores, as of :func:`~recbole_ssm.serving.top_items.top_items`.

        Args:
            histories: of any lengths; one without items gets nothing.
            k: most items each.
            exclude_seen: see :meth:`recommend`.
            candidates: ids, see :meth:`candidate_ids`; all where absent.
            represented: representations of the histories, ``[N, d]``, where they are known.
        """
        candidates = self.candidate_ids() if candidates is None else candidates
        exclude_seen = exclude_seen or not self.allow_repeats
        some = np.flatnonzero(histories.lengths)
        k = min(_checked(k), len(candidates))
        ids, values = np.zeros((len(histories), k), np.int64), np.full((len(histories), k), -np.inf, np.float32)
        if len(some) and k:
            part = histories if len(some) == len(histories) else histories.take(some)
            with torch.inference_mode():
                scores_of = self._scores_of(part, candidates, represented)
                found = top_items(
                    scores_of, len(part), candidates, self.vocabulary.item_num, k, part if exclude_seen else None
                )
            ids[some], values[some] = found
        return ids, values

    def named(self, ids: np.ndarray, scores: np.ndarray) -> Recommendations:
        """Ids and scores of :meth:`top` with tokens instead of ids."""
        tokens = self.vocabulary.items[ids].tolist()
        counts = (ids > 0).sum(1).tolist()
        return Recommendations(
            [row[:count] for row, count in zip(tokens, counts, strict=True)],
            [row[:count] for row, count in zip(scores.tolist(), counts, strict=True)],
        )

    def represent(self, histories: Histories) -> Tensor:
        """Representations of histories of at least one item, ``[N, d]``; of our models alone.

        Raises:
            UserError: where the model reads the time at which it is asked, and the histories do not tell it.
        """
        if histories.at is None and reads_request(self.time_columns):
            raise UserError(ASK_WITH_TIME)
        read = histories.latest(self.max_length)
        cu_seqlens = read.cu_seqlens()
        ends = cu_seqlens[1:].long() - 1
        return self.model._represent(SequenceBatch(read.inputs(), cu_seqlens, ends, ends, last=True))

    def _scores_of(
        self, histories: Histories, candidates: np.ndarray, represented: Tensor | None = None
    ) -> Callable[[slice], Tensor]:
        if not self.packs:
            chosen = self._chosen(candidates)
            return lambda rows: self._full_scores(histories, rows)[:, chosen]
        hidden, table = self.factors(histories, candidates, represented)
        return lambda rows: hidden[rows] @ table.T

    def factors(
        self, histories: Histories, candidates: np.ndarray, represented: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What scores are inner products of: one row a history ``[N, d]``, one an item ``[C, d]``; of our models alone.

        Args:
            histories: of at least one item each.
            candidates: ids, see :meth:`candidate_ids`.
            represented: see :meth:`top`.
        """
        hidden = self.represent(histories) if represented is None else represented
        table = self.model.score_table()
        return self.model.score_factors(hidden.to(table.dtype), table[self._chosen(candidates)])

    def _chosen(self, candidates: np.ndarray) -> slice | Tensor:
        every = len(candidates) == self.vocabulary.item_num - 1 and bool((np.diff(candidates) == 1).all())
        return slice(1, None) if every else torch.from_numpy(candidates).to(self.device)

    def _full_scores(self, histories: Histories, rows: slice) -> Tensor:
        """Scores of all ids by a model of RecBole's, on its padded rows."""
        part = histories.take(np.arange(len(histories))[rows]).latest(self.max_length)
        blocks = []
        step = PADDED_AT_A_TIME[self.device.type]
        for begin in range(0, len(part), step):
            block = part.take(np.arange(begin, min(begin + step, len(part))))
            padded = pad(torch.from_numpy(block.items), block.cu_seqlens())
            padded = F.pad(padded, (0, self.max_length - padded.shape[1]))
            lengths = torch.from_numpy(block.lengths)
            rows_of_recbole = Interaction({self.model.ITEM_SEQ: padded, self.model.ITEM_SEQ_LEN: lengths})
            try:
                scores = self.model.full_sort_predict(rows_of_recbole.to(self.device))
            except KeyError as error:
                raise UserError(
                    f"{self.config['model']} reads {error.args[0]!r} of a history, which has nothing but its items."
                ) from error
            blocks.append(scores.view(len(block), -1))
        return torch.cat(blocks)

    def _table(self) -> Tensor:
        table = getattr(self.model, "item_embedding", None)
        if not isinstance(table, torch.nn.Embedding) or table.num_embeddings < self.vocabulary.item_num:
            raise UserError(f"{self.config['model']} has no table of item embeddings.")
        return (self.model.item_table() if self.packs else table.weight)[: self.vocabulary.item_num]


def _listed(name: str, given: Iterable[Any]) -> list[Any]:
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise UserError(f"{name} is {given!r}: give a list of items.")
    return list(given)


def _checked(k: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise UserError(f"k is {k!r}: choose a whole number from 1.")
    return int(k)
