"""From a checkpoint to recommendations: for anybody's history, and for live sessions that carry their state."""

from recbole_ssm.serving.recommender import Recommendations, Recommender
from recbole_ssm.serving.session import Session, State

__all__ = ["Recommendations", "Recommender", "Session", "State"]
