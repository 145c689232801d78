"""What a study of a trained model needs: ranks of its targets, and what its parts do."""

from recbole_ssm.analysis.categories import history_categories
from recbole_ssm.analysis.parts import expert_gates, fusion_weights, gate_entropy
from recbole_ssm.analysis.ranking import Ranks, rank_targets

__all__ = ["Ranks", "expert_gates", "fusion_weights", "gate_entropy", "history_categories", "rank_targets"]
