from types import SimpleNamespace

import pytest

pytest.importorskip("ray")

from recbole_ssm.search import Search
from recbole_ssm.search.definition import METRIC
from recbole_ssm.search.report import draw


def test_a_trial_that_never_began_has_no_values():
    search = Search({"model": "m", "dataset": "d"}, {"x": [1, 2]})
    assert search.chosen({"x": 1}) == {"x": 1}
    assert search.chosen(None) == {}


def test_names_and_values_are_text_in_the_pictures(tmp_path):
    script = "</script><script>alert(1)</script>"
    search = Search({"model": script, "dataset": script}, {script: ["a", script]})
    results = [
        SimpleNamespace(metrics={METRIC: score}, metrics_dataframe=None, config={script: value})
        for value, score in (("a", 0.1), (script, 0.2))
    ]
    draw(results, search, tmp_path / "trials.html")  # type: ignore[arg-type]
    page = (tmp_path / "trials.html").read_text()
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4  # twice in the head's title, twice in the body's
