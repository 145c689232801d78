"""Ops over packed sequences or single rows, with a choice of implementations: see :mod:`recbole_ssm.ops.backend`."""

from recbole_ssm.ops.causal_conv import causal_conv
from recbole_ssm.ops.expert_diversity import expert_diversity
from recbole_ssm.ops.preference_attention import preference_attention
from recbole_ssm.ops.preference_features import preference_features
from recbole_ssm.ops.selective_scan import selective_scan, selective_scan_last
from recbole_ssm.ops.ssd import ssd, ssd_last

__all__ = [
    "causal_conv",
    "expert_diversity",
    "preference_attention",
    "preference_features",
    "selective_scan",
    "selective_scan_last",
    "ssd",
    "ssd_last",
]
