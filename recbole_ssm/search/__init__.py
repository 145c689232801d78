"""Hyper-parameter search with Ray Tune, through the same property files as a run."""

from recbole_ssm.search.definition import Search
from recbole_ssm.search.space import read_space, search_file
from recbole_ssm.search.tuner import resume, tune

__all__ = ["Search", "read_space", "resume", "search_file", "tune"]
