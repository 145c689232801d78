"""What a study of a trained model needs: ranks of its targets, and what its parts do."""

from recbole_ssm.analysis.ranking import Ranks, rank_targets

__all__ = ["Ranks", "rank_targets"]
