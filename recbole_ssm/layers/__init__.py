"""Blocks that the models are made of, all over packed rows ``[T, d]``."""

from recbole_ssm.layers.blocks import MambaLayer
from recbole_ssm.layers.feed_forward import FeedForward
from recbole_ssm.layers.mamba import Mamba
from recbole_ssm.layers.mamba2 import Mamba2
from recbole_ssm.layers.mamba3 import Mamba3
from recbole_ssm.layers.mixture_of_experts import MixtureOfExperts
from recbole_ssm.layers.moving_average import MovingAverage
from recbole_ssm.layers.preference_attention import PreferenceAwareAttention

__all__ = [
    "FeedForward",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "MambaLayer",
    "MixtureOfExperts",
    "MovingAverage",
    "PreferenceAwareAttention",
]
