"""The list of RecBole's models that train on whole histories is what running them says."""

import pytest

from benchmarks.models import jobs
from recbole_ssm.settings import CAUSAL_MODELS

# One of each kind of reason.
OTHERS = {
    "NextItNet": "depends on what follows, or on padding",
    "NARM": "depends on what follows, or on padding",
    "HGN": "reads 'user_id'",
    "RepeatNet": "one output a row",
    "S3Rec": "a trainer of its own",
    "KSR": "a dataset of its own",
}


@pytest.fixture
def mode(empty_folder):
    jobs.write_dataset(empty_folder)
    return lambda name: jobs.sequence_mode(name, empty_folder)


def test_what_the_list_says_is_so(mode):
    assert {name: mode(name) for name in CAUSAL_MODELS} == dict.fromkeys(CAUSAL_MODELS, "yes")


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_told_why_not(name, mode):
    assert mode(name).startswith("no: it")
    assert OTHERS[name] in mode(name)


@pytest.mark.slow
def test_the_list_is_whole(mode):
    sequential = [name for name, family in jobs.families().items() if family == "sequential"]
    assert {name for name in sequential if mode(name) == "yes"} == set(CAUSAL_MODELS)
