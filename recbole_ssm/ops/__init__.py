"""Ops over packed sequences, each with a choice of implementations: see :mod:`recbole_ssm.ops.backend`."""

from recbole_ssm.ops.causal_conv import causal_conv
from recbole_ssm.ops.preference_attention import preference_attention
from recbole_ssm.ops.selective_scan import selective_scan
from recbole_ssm.ops.ssd import ssd

__all__ = ["causal_conv", "preference_attention", "selective_scan", "ssd"]
