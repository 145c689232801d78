"""What all models share: batches in, losses and scores out. A model itself only encodes sequences."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recbole_ssm.data.batch import SeenItems, SequenceBatch
from recbole_ssm.data.context import beside, column, columns_of, switched_on
from recbole_ssm.data.sequence_dataset import SequenceDataset
from recbole_ssm.distributed import weight_of
from recbole_ssm.errors import UserError
from recbole_ssm.layers import Mamba
from recbole_ssm.layers.item_features import ItemFeatures
from recbole_ssm.layers.losses import bce, bpr, full_cross_entropy, gbce, item_scores, sampled_softmax
from recbole_ssm.ops.packing import borders

# Rows of one target each are encoded in blocks of about this many items; on a CPU small ones, whose activations (up to
# 32 MB) the allocator reuses where it would fetch larger ones anew. Up to so many items' activations are kept for the
# backward pass; of larger batches they are computed again, a block at a time.
ITEMS_PER_BLOCK = {"cpu": 1 << 13, "cuda": 1 << 17}
ITEMS_KEPT = {"cpu": 1 << 15, "cuda": 1 << 18}


class PackedRecommender(SequentialRecommender):
    """A sequential recommender over packed sequences.

    A subclass sets ``item_embedding`` and implements :meth:`encode`. It works on a :class:`SequenceBatch`: a target at
    many positions of one sequence, where one pass gives what a row for each of them would; or RecBole's padded rows of
    one target each (:class:`~recbole.data.interaction.Interaction`), which :meth:`packed` packs.

    Attributes:
        one_pass: whether one pass over a sequence gives the hidden state after each of its prefixes.
        columns: names of what is read of events' times, in the order in which they stand beside the ids of ``items``
            (:mod:`recbole_ssm.data.context`).
        fillable: whether inert rows leave the loss as it is (:meth:`SequenceBatch.filled`).
        reads_device: whether a training step has shapes that follow from numbers on the device, so that no CUDA graph
            can hold it.
        steps: whether one more item costs the same whatever came before: :meth:`prefill` and :meth:`step` are there.
        corrects_samples: whether ``SampledSoftmax`` corrects for how few negatives are drawn.
    """

    one_pass = True
    columns: tuple[str, ...] = ()
    fillable = True
    reads_device = False
    steps = False
    corrects_samples = True
    item_embedding: nn.Embedding

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        if config["train_mode"] is None:
            raise UserError(
                f"{type(self).__name__} needs the settings of its property file: "
                "make the configuration with recbole_ssm.Config instead of recbole.config.Config."
            )
        self.loss_type, self.gbce_t = config["loss_type"], config["gbce_t"]
        self.label_smoothing, self.temperature = config["label_smoothing"], config["temperature"]
        self.allow_repeats = config["allow_repeats"]
        self.n_negatives = config["train_neg_sample_args"]["sample_num"]
        self.hidden_size = config["hidden_size"]
        self.columns, self._embedded = columns_of(type(self), config), switched_on(config)
        self.item_features, self.score_features = None, config["score_features"]
        if config["item_features"]:
            self.item_features = ItemFeatures(
                dataset, config["item_features"], self.hidden_size, config["feature_fusion"]
            )

    @classmethod
    def time_columns(cls, config) -> tuple[str, ...]:
        """Names of the columns of time that the model reads as it is set (:data:`recbole_ssm.data.context.COLUMNS`).

        A model that reads more than the settings of all models switch on adds them:
        ``(*super().time_columns(config), "gap")``.
        """
        return switched_on(config)

    def ids(self, items: Tensor) -> Tensor:
        """Item ids ``[...]`` of what :meth:`encode` is given."""
        return items[..., 0] if self.columns else items

    def column(self, items: Tensor, name: str) -> Tensor:
        """A column of time ``[...]``, int64, of what :meth:`encode` is given; one of :attr:`columns`."""
        return items[..., 1 + self.columns.index(name)]

    def make_time_embeddings(self) -> None:
        """Make what :meth:`embed` adds, an embedding a column; for ``__init__``, after the model's other embeddings."""
        for name in self._embedded:
            kinds = column(name).kinds
            assert kinds is not None
            self.add_module(_embedding_of(name), nn.Embedding(kinds, self.hidden_size))

    def embed(self, items: Tensor) -> Tensor:
        """What the first layer reads of ``items``, ``[T, d]``: the item's vector, and the embeddings of its columns."""
        return self.with_times(self.item_vectors(self.ids(items)), items)

    def item_vectors(self, ids: Tensor) -> Tensor:
        """What the model reads of items ``[...]``: embeddings, or what ``item_features`` makes of them."""
        return self.item_embedding(ids) if self.item_features is None else F.embedding(ids, self.item_table())

    def item_table(self) -> Tensor:
        """:meth:`item_vectors` of all items, ``[n_items, d]``."""
        table = self.item_embedding.weight
        return table if self.item_features is None else self.item_features(table)

    def score_table(self) -> Tensor:
        """What scores are inner products with, ``[n_items, d]``: embeddings, or with ``score_features`` vectors."""
        return self.item_table() if self.score_features else self.item_embedding.weight

    def with_times(self, hidden: Tensor, items: Tensor) -> Tensor:
        """``hidden [T, d]`` and the embeddings of the columns of ``items`` that are switched on."""
        for name in self._embedded:
            hidden = hidden + self.get_submodule(_embedding_of(name))(self.column(items, name))
        return hidden

    def encode(self, items: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False) -> Tensor:
        """Hidden states of packed sequences.

        Args:
            items: item ids, int64 ``[T]``; with :attr:`columns` these beside them, ``[T, 1 + C]``: see :meth:`ids`,
                :meth:`column` and :meth:`embed`.
            cu_seqlens: borders of the sequences, int32 ``[S+1]``.
            read: rows whose hidden state is wanted, int64 ``[R]``; all where absent.
            last: promise that ``read`` is the last row of every sequence.

        Returns:
            ``[T, d]`` or ``[R, d]``.
        """
        raise NotImplementedError

    def prefill(self, items: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden states of packed sequences, and the states that :meth:`step` goes on from; for inference.

        Sequences may be longer than ``MAX_ITEM_LIST_LENGTH``: see :mod:`recbole_ssm.serving.session`.

        Args:
            items: see :meth:`encode`.
            cu_seqlens: see there.

        Returns:
            ``[T, d]``, and tensors by name, each ``[S, ...]``.
        """
        raise NotImplementedError

    def step(self, items: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """One more item of each of ``S`` sequences; for inference.

        Args:
            items: int64 ``[S]``; with :attr:`columns` ``[S, 1 + C]``.
            state: as of :meth:`prefill`; it is left as it is.

        Returns:
            Hidden states ``[S, d]``, and the states after these items.
        """
        raise NotImplementedError

    def read_out(self, hidden: Tensor) -> Tensor:
        """What a model does only where its hidden state is read: ``[M, d]`` to ``[M, d]``."""
        return hidden

    def loss(
        self,
        hidden: Tensor,
        positives: Tensor,
        negatives: Tensor | None,
        target_weights: Tensor | None = None,
        process_weight: float = 1.0,
        seen: SeenItems | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """The training loss, or a tuple of terms to be summed.

        Args:
            hidden: hidden states, ``[M, d]``.
            positives: the items that came next, int64 ``[M]``.
            negatives: sampled items, int64 ``[M, K]``.
            target_weights: what each target counts, ``[M]``, summing to 1; all alike where absent.
            process_weight: of this process's targets, see :func:`recbole_ssm.distributed.weight_of`; for terms that
                are no means over targets.
            seen: items that cannot come next; none where absent.
        """
        return self.ranking_loss(self.read_out(hidden), positives, negatives, target_weights, seen)

    def ranking_loss(
        self,
        hidden: Tensor,
        positives: Tensor,
        negatives: Tensor | None,
        target_weights: Tensor | None = None,
        seen: SeenItems | None = None,
    ) -> Tensor:
        """Mean over targets of the loss that ``loss_type`` names, with scores ``r`` as of :meth:`score_factors`.

        ``CE``: ``-log softmax(r)[positive]`` over all items, or all that can come next; the others are those of
        :mod:`recbole_ssm.layers.losses`.
        """
        hidden, table = self.score_factors(hidden, self.score_table())
        if self.loss_type == "CE":
            return full_cross_entropy(hidden, table, positives, self.label_smoothing, target_weights, seen)
        if negatives is None:
            raise UserError(f"loss_type {self.loss_type} needs train_neg_sample_args (a dict), which is unset.")
        scores = item_scores(hidden, table, torch.cat([positives[:, None], negatives], 1))
        positive, negative = scores[:, :1], scores[:, 1:]
        if self.loss_type == "BCE":
            return bce(positive, negative, target_weights)
        if self.loss_type == "BPR":
            return bpr(positive, negative, target_weights)
        others = self.n_items - 2  # neither the padding nor the positive itself
        if self.loss_type == "gBCE":
            return gbce(positive, negative, others, self.gbce_t, target_weights)
        return sampled_softmax(
            positive, negative, others if self.corrects_samples else self.n_negatives, target_weights
        )

    def score_factors(self, hidden: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """What scores are inner products of: hidden states ``[M, d]`` and item embeddings ``[n, d]`` as they are.

        With a ``temperature`` both have length 1, and the score is their cosine over the temperature.
        """
        if self.temperature is None:
            return hidden, items
        return F.normalize(hidden, dim=-1) / self.temperature, F.normalize(items, dim=-1)

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """Representation of each right-padded sequence: ids ``[B, L]`` and lengths ``[B]`` to ``[B, d]``.

        With :attr:`columns` these beside the ids, ``[B, L, 1 + C]``.
        """
        item_seq, lengths = item_seq.cpu(), item_seq_len.cpu()
        return self._represent(self._pack_rows(item_seq, lengths, targets=lengths.new_zeros(lengths.shape)))

    def calculate_loss(self, interaction: SequenceBatch | Interaction) -> Tensor | tuple[Tensor, ...]:
        """Loss of one batch, as RecBole's trainer calls it."""
        batch, device = self.packed(interaction), self.item_embedding.weight.device
        if batch.last:
            batch = batch.to(device) if self.in_one_block(batch) else batch
            hidden = self._encode_last(batch)
            batch = batch.to(device)
        elif self.one_pass:
            batch = batch.to(device)
            hidden = self.encode(batch.items, batch.cu_seqlens, read=batch.target_rows)
        else:
            raise UserError(
                f"{type(self).__name__}, as it is set, needs a row for each target: set train_mode: prefix."
            )
        seen = None if self.allow_repeats else batch.seen
        return self.loss(hidden, batch.targets, batch.negatives, batch.target_weights, batch.weight, seen)

    def packed(self, interaction: SequenceBatch | Interaction) -> SequenceBatch:
        """A batch of RecBole's rows as the model works on it, on the host; one that is packed already, as it is.

        Rows on a GPU are fetched from there, so it is better to leave them on the host.
        """
        if isinstance(interaction, SequenceBatch):
            return interaction
        rows, negatives = len(interaction), None
        if self.NEG_ITEM_ID in interaction:
            # RecBole lays all rows end to end once for each negative.
            negatives = interaction[self.NEG_ITEM_ID].cpu().view(self.n_negatives, -1).T
            rows = len(negatives)
        targets = interaction[self.POS_ITEM_ID] if self.POS_ITEM_ID in interaction else interaction[self.ITEM_SEQ_LEN]
        batch = self._pack_rows(
            self._history(interaction)[:rows].cpu(),
            interaction[self.ITEM_SEQ_LEN][:rows].cpu(),
            targets[:rows].cpu(),
            negatives,
        )
        return replace(batch, weight=weight_of(interaction))

    def _pack_rows(self, item_seq, item_seq_len, targets, negatives=None) -> SequenceBatch:
        if bool((item_seq_len == 0).any()):
            raise UserError("a row has an empty history, from which nothing can be predicted: leave such rows out.")
        return SequenceBatch.of_rows(item_seq, item_seq_len, targets, negatives)

    def predict(self, interaction: Interaction) -> Tensor:
        """Score of each row's own item, ``[B]``, in the parameters' dtype."""
        batch = self.packed(interaction)
        hidden = self._represent(batch)
        with torch.autocast(hidden.device.type, enabled=False):
            item = F.embedding(interaction[self.ITEM_ID].to(hidden.device), self.score_table())
            hidden, item = self.score_factors(hidden.to(item.dtype), item)
            scores = (hidden * item).sum(-1)
        if not self.allow_repeats:
            seen = batch.to(hidden.device).seen.of() == interaction[self.ITEM_ID].to(hidden.device)[:, None]
            scores = scores.masked_fill(seen.any(1), -torch.inf)
        return scores

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores of all items for each row, ``[B, n_items]``, in the parameters' dtype; column 0 is padding.

        Without ``allow_repeats`` the row's own items have -inf.
        """
        batch = self.packed(interaction)
        hidden, table = self._represent(batch), self.score_table()
        with torch.autocast(hidden.device.type, enabled=False):  # rounded to bfloat16, scores would tie
            hidden, table = self.score_factors(hidden.to(table.dtype), table)
            scores = hidden @ table.T
        return scores if self.allow_repeats else scores.scatter(1, batch.to(scores.device).seen.of(), -torch.inf)

    def _represent(self, batch: SequenceBatch) -> Tensor:
        """Representation of each window of a ``last`` batch, ``[N, d]``."""
        return self.read_out(self._encode_last(batch))

    def _history(self, interaction: Interaction) -> Tensor:
        """Item ids of padded rows, ``[B, L]``; with :attr:`columns` ``[B, L, 1 + C]``."""
        items = interaction[self.ITEM_SEQ]
        if not self.columns:
            return items
        if SequenceDataset.TIME_COLUMNS not in interaction:
            raise UserError(
                f"{type(self).__name__}, as it is set, reads times, which rows that are made beforehand "
                "(benchmark_filename) do not have: give one .inter file."
            )
        return beside(items, interaction[SequenceDataset.TIME_COLUMNS])

    def _encode_last(self, batch: SequenceBatch) -> Tensor:
        """Hidden state at the last item of each window of a ``last`` batch, ``[N, d]``.

        It is cut into blocks where it lies, so that each travels to the device with its own tables.
        """
        device = "cpu" if self.item_embedding.weight.is_cpu else "cuda"
        read = self.items_read(borders(batch.cu_seqlens).lengths)
        block = (read.cumsum(0) - read) // ITEMS_PER_BLOCK[device]
        blocks = batch.split(block.unique_consecutive(return_counts=True)[1].tolist())
        if len(blocks) > 1 and torch.is_grad_enabled() and int(read.sum()) > ITEMS_KEPT[device]:
            # The random state that is kept for dropout is that of its tensors' devices, and the blocks lie on the host.
            where = self.item_embedding.weight

            def encode(part: SequenceBatch, _: Tensor) -> Tensor:
                return self._encode_block(part)

            return torch.cat([checkpoint(encode, part, where, use_reentrant=False) for part in blocks])
        hidden = [self._encode_block(part) for part in blocks]
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)

    def in_one_block(self, batch: SequenceBatch) -> bool:
        """Whether all of a batch is encoded at once: how it is cut otherwise depends on its lengths."""
        rows = self.items_read(borders(batch.cu_seqlens).lengths)
        return not batch.last or int(rows.sum()) <= ITEMS_PER_BLOCK["cuda"]

    def items_read(self, item_seq_len: Tensor) -> Tensor:
        """How many items the model works on for rows of these lengths, ``[B]``."""
        return item_seq_len

    def _encode_block(self, batch: SequenceBatch) -> Tensor:
        batch = batch.to(self.item_embedding.weight.device)
        return self.encode(batch.items, batch.cu_seqlens, read=batch.target_rows, last=True)


def _embedding_of(column: str) -> str:
    """The attribute that embeds a column; checkpoints name weights by it."""
    return column.replace("gap_bucket", "time_gap") + "_embedding"


def init_weights(module: nn.Module) -> None:
    """RecBole's initialisation of linear and embedding layers: normal with standard deviation 0.02, no bias."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    # A Mamba block's step sizes start where its paper puts them; Module.apply visits children before their parent.
    if isinstance(module, Mamba):
        module.reset_parameters()
