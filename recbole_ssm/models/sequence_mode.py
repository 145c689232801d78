"""RecBole's own causal models trained on every position of a history at once, their classes unchanged."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from recbole.model.layers import FeedForward, MultiHeadAttention
from torch import Tensor, nn

from recbole_ssm.data.batch import SequenceBatch
from recbole_ssm.layers.gelu import gelu
from recbole_ssm.ops.packing import block_rows, length_blocks, pad, positions, sequence_ids, sequence_lengths

# Places of a padded block of histories: some tens of MB of a transformer's activations.
PLACES_PER_BLOCK = 1 << 13


class FusedAttention(MultiHeadAttention):
    """RecBole's attention by torch's fused kernel, where it is given no mask.

    In a history whose padding comes last, a place that sees none after it sees no padding either: being causal is all
    that is asked. So only what padding itself gets, which nobody reads, is other than with RecBole's mask.
    """

    def forward(self, input_tensor, attention_mask):
        """``[n, L, d]`` to ``[n, L, d]``."""
        if attention_mask is not None:
            return super().forward(input_tensor, attention_mask)
        q, k, v = (
            self.transpose_for_scores(project(input_tensor)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        dropout = self.attn_dropout.p if self.training else 0.0
        context = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        hidden = self.out_dropout(self.dense(context.transpose(1, 2).flatten(2)))
        return self.LayerNorm(hidden + input_tensor)


class SequenceMode:
    """Mixin for a class of :data:`recbole_ssm.settings.CAUSAL_MODELS`.

    Such a model computes its output at every position and keeps the last one. Given a
    :class:`~recbole_ssm.data.batch.SequenceBatch`, all positions that have a target are kept instead, and the model's
    own loss is taken over them: the same as over RecBole's rows, where no history is longer than the maximum length.
    On a CPU histories of similar length are padded together, when scoring, too; on a GPU all of a batch.
    """

    ITEM_SEQ: str
    ITEM_SEQ_LEN: str
    POS_ITEM_ID: str
    NEG_ITEM_ID: str
    loss_type: str
    _read: tuple[Tensor, int] | None = None  # places to keep of the padded block's n L, int64 [M], and how often

    def __init__(self, config, dataset):
        super().__init__(config, dataset)  # type: ignore[call-arg]
        for module in self.modules():  # type: ignore[attr-defined]
            if type(module) is MultiHeadAttention:
                module.__class__ = FusedAttention
            elif isinstance(module, FeedForward) and module.intermediate_act_fn == module.gelu:
                module.intermediate_act_fn = gelu  # the same function, written out there

    @property
    def fillable(self) -> bool:
        """See :class:`~recbole_ssm.models.base.PackedRecommender`: torch's cross-entropy can leave targets out."""
        return self.loss_type == "CE"

    def get_attention_mask(self, item_seq, bidirectional=False):
        """As RecBole's; none where attention is fused."""
        if self._in_blocks(item_seq) or bidirectional:
            return super().get_attention_mask(item_seq, bidirectional)  # type: ignore[misc]
        return None

    def gather_indexes(self, output, gather_index):
        """As RecBole's, ``[n, L, d]`` to ``[n, d]``; in sequence mode to the outputs that have a target."""
        if self._read is None:
            return super().gather_indexes(output, gather_index)  # type: ignore[misc]
        places, times = self._read
        output = output.flatten(0, 1).index_select(0, places)
        return output if times == 1 else output.repeat(times, 1)

    def full_sort_predict(self, interaction):
        """As RecBole's, ``[B, n_items]``; on a CPU histories of similar length at a time, no wider than the longest."""
        item_seq, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        if not self._in_blocks(item_seq):
            return super().full_sort_predict(interaction)  # type: ignore[misc]
        blocks = length_blocks(lengths, PLACES_PER_BLOCK)
        scores = []
        for rows in blocks:
            columns = {
                self.ITEM_SEQ: item_seq[rows, : int(lengths[rows].max())],
                self.ITEM_SEQ_LEN: lengths[rows],
            }
            scores.append(super().full_sort_predict(Interaction(columns)))  # type: ignore[misc]
        return torch.cat(scores)[torch.cat(blocks).argsort()]

    def calculate_loss(self, interaction):
        """Loss of one batch, as RecBole's trainer calls it."""
        if not isinstance(interaction, SequenceBatch):
            return super().calculate_loss(interaction)  # type: ignore[misc]
        batch = interaction
        if batch.target_weights is not None or not self._in_blocks(batch.items):
            return self._loss_of_one_block(batch)
        target = torch.full_like(batch.items, -1)  # which target each row has
        target[batch.target_rows] = torch.arange(len(batch), device=target.device)
        lengths, losses = sequence_lengths(batch.cu_seqlens), []
        for sequences in length_blocks(lengths, PLACES_PER_BLOCK):
            rows, real = block_rows(batch.cu_seqlens, sequences)
            places = (real & (target[rows] >= 0)).flatten().nonzero()[:, 0]
            wanted = target[rows.flatten()[places]]
            negatives = None if batch.negatives is None else batch.negatives[wanted]
            loss = self._loss(batch.items[rows] * real, lengths[sequences], places, batch.targets[wanted], negatives)
            losses.append(loss * len(wanted))
        return sum(losses) / len(batch)

    def _loss_of_one_block(self, batch: SequenceBatch) -> Tensor:
        """All histories padded to the longest: a fixed sequence of launches, and nothing read back from the device."""
        item_seq = pad(batch.items, batch.cu_seqlens)
        window, position = (t(batch.cu_seqlens).index_select(0, batch.target_rows) for t in (sequence_ids, positions))
        places = torch.add(position, window, alpha=item_seq.shape[1])
        targets = batch.targets
        if batch.target_weights is not None:
            targets = targets.where(batch.target_weights > 0, nn.CrossEntropyLoss().ignore_index)
        return self._loss(item_seq, batch.cu_seqlens.diff(), places, targets, batch.negatives)

    def _loss(
        self, item_seq: Tensor, lengths: Tensor, places: Tensor, targets: Tensor, negatives: Tensor | None
    ) -> Tensor:
        """The model's own loss of the outputs at ``places [M]`` of ``item_seq [n, L]``, each negative in its turn."""
        columns = {self.ITEM_SEQ: item_seq, self.ITEM_SEQ_LEN: lengths, self.POS_ITEM_ID: targets}
        times = 1
        if negatives is not None:
            times = negatives.shape[1]
            columns[self.POS_ITEM_ID] = targets.repeat(times)
            columns[self.NEG_ITEM_ID] = negatives.T.flatten()
        self._read = places, times
        try:
            return super().calculate_loss(columns)  # type: ignore[misc]
        finally:
            self._read = None

    @staticmethod
    def _in_blocks(items: Tensor) -> bool:
        """Whether padding costs more than launches, so that histories of similar length are worked on together."""
        return items.is_cpu


@lru_cache(maxsize=None)
def with_sequence_mode(model_class: type) -> type:
    """``model_class`` of RecBole with the mixin :class:`SequenceMode`."""
    return type(model_class.__name__, (SequenceMode, model_class), {})
