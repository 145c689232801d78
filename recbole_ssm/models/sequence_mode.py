"""RecBole's own causal models trained on every position of a history at once, their classes unchanged."""

from functools import lru_cache

import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_ssm.data.batch import SequenceBatch
from recbole_ssm.ops.packing import block_rows, length_blocks, sequence_lengths

# Models of RecBole whose output at a position depends on that position and those before it alone, which read it by
# SequentialRecommender.gather_indexes once a pass, and whose loss is a mean over rows.
CAUSAL_MODELS = ("SASRec", "GRU4Rec")

# Places of a padded block of histories: some tens of MB of a transformer's activations.
PLACES_PER_BLOCK = 1 << 13


class SequenceMode:
    """What goes in front of a class of :data:`CAUSAL_MODELS`.

    Such a model computes its output at every position and keeps the last one. Given a
    :class:`~recbole_ssm.data.batch.SequenceBatch`, all positions that have a target are kept instead, and the model's
    own loss is taken over them: the same as over RecBole's rows, where no history is longer than the maximum length.
    Histories of similar length are padded together, when scoring, too.
    """

    ITEM_SEQ: str
    ITEM_SEQ_LEN: str
    POS_ITEM_ID: str
    NEG_ITEM_ID: str
    _read: tuple[Tensor, int] | None = None  # places to keep, bool [n, L], and how often

    def gather_indexes(self, output, gather_index):
        """As RecBole's, ``[n, L, d]`` to ``[n, d]``; in sequence mode to the outputs that have a target."""
        if self._read is None:
            return super().gather_indexes(output, gather_index)  # type: ignore[misc]
        places, times = self._read
        return output[places].repeat(times, 1)

    def full_sort_predict(self, interaction):
        """As RecBole's, ``[B, n_items]``, histories of similar length at a time and no wider than the longest."""
        item_seq, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
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
        times = 1 if batch.negatives is None else batch.negatives.shape[1]
        target = torch.full_like(batch.items, -1)  # which target each row has
        target[batch.target_rows] = torch.arange(len(batch), device=target.device)
        lengths, total = sequence_lengths(batch.cu_seqlens), 0.0
        for sequences in length_blocks(lengths, PLACES_PER_BLOCK):
            rows, real = block_rows(batch.cu_seqlens, sequences)
            places = real & (target[rows] >= 0)
            wanted = target[rows[places]]
            columns = {
                self.ITEM_SEQ: batch.items[rows] * real,
                self.ITEM_SEQ_LEN: lengths[sequences],
                self.POS_ITEM_ID: batch.targets[wanted].repeat(times),
            }
            if batch.negatives is not None:
                columns[self.NEG_ITEM_ID] = batch.negatives[wanted].T.flatten()
            self._read = places, times
            try:
                loss = super().calculate_loss(Interaction(columns))  # type: ignore[misc]
            finally:
                self._read = None
            total = total + loss * len(wanted)
        return total / len(batch)


@lru_cache(maxsize=None)
def with_sequence_mode(model_class: type) -> type:
    """``model_class`` of RecBole with :class:`SequenceMode` in front."""
    return type(model_class.__name__, (SequenceMode, model_class), {})
