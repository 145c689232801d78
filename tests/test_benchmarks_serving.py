"""``python -m benchmarks serving``: every part at tiny sizes, and no figure where two ways give different answers."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import __main__
from benchmarks.serving import everyone, index, memory, servers

SMALL = ("--all_users", "20", "--memory_users", "30", "60", "--index_items", "2000", "--histories", "3", "--users", "1")
SMALL += ("--catalogues", "40", "--http_histories", "3", "--clients", "1", "4", "--rounds", "1", "--seconds", "0.3")


def run(monkeypatch, *parts):
    words = ["benchmarks", "serving", "--parts", *parts, *SMALL, "--output", "r.json", "--page", "page.md"]
    monkeypatch.setattr(sys, "argv", words)
    __main__.main()
    found, page = json.loads(Path("r.json").read_text())["parts"], Path("page.md").read_text()
    for part in parts:
        assert f"#### {found[part]['title']}" in page
        assert {"commit", "device", "settings", "protocol"} <= found[part].keys()
    return found


def test_events_and_answers(monkeypatch):
    found = run(monkeypatch, "events", "answers")
    assert len(found["events"]["rows"]) == 4
    assert [row["items"] for row in found["answers"]["rows"]] == ["40", "40"]


@pytest.fixture
def few_items(monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(everyone, "ITEMS", 50)
    monkeypatch.setattr(everyone, "BATCHES", (16, 64))


def test_everyone_by_both_ways(monkeypatch, few_items):
    part = run(monkeypatch, "everyone")["everyone"]
    ways = ["recommend_all, file to file", "full_sort_topk", "full_sort_topk"]
    assert [(row["model"], row["way"]) for row in part["rows"]] == [(m, way) for m in everyone.MODELS for way in ways]
    assert [row["users of a call"] for row in part["rows"]] == ["", 16, 2] * 2
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in part["seconds"].values())
    assert float(part["rows"][0]["recommend_all: times as fast"]) == 1


def test_no_figure_for_answers_that_differ(monkeypatch, few_items):
    ours = everyone.recommend_all
    monkeypatch.setattr(everyone, "recommend_all", lambda *given, **_: ours(*given, exclude_seen=True))
    with pytest.raises(RuntimeError, match="recommend_all and full_sort_topk of Mamba4Rec differ"):
        run(monkeypatch, "everyone")
    with pytest.raises(RuntimeError, match="servers give different answers"):
        servers._check([[1.0, 0.5], [1.0, 0.6]])


def test_generated_histories_are_those_of_ml_1m_in_length(tmp_path):
    count = everyone._write(tmp_path, 6040)
    assert 0.9e6 < count < 1.1e6  # it has 1,000,209
    assert sum(1 for _ in (tmp_path / "histories.inter").open()) == 1 + count - 6040


def test_memory(monkeypatch):
    pytest.importorskip("pyarrow")

    def here(words, **_):
        """What would be run in another process."""
        monkeypatch.setattr(sys, "argv", ["run_recommend", *words[3:]])
        with contextlib.redirect_stdout(io.StringIO()) as told, pytest.raises(SystemExit) as ended:
            exec(words[2], {})
        return subprocess.CompletedProcess(words, ended.value.code, told.getvalue(), "")

    with monkeypatch.context() as patch:
        patch.setattr(memory, "subprocess", SimpleNamespace(run=here))
        rows = run(patch, "memory")["memory"]["rows"]
    assert [row["users"] for row in rows] == ["30", "60"]
    assert all(int(row["peak, MB"]) > 50 for row in rows)


def test_the_index_and_what_it_misses(monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(index, "LISTS", (1, 10**6))
    part = run(monkeypatch, "faiss")["faiss"]
    assert list(part["recall"]) == ["clustered", "random"]
    for recall in part["recall"].values():
        exact, few, every = recall.values()
        assert 0 < few < every == exact == 1
    assert part["recall"]["random"] != part["recall"]["clustered"]


def test_servers_under_load(monkeypatch):
    pytest.importorskip("fastapi")
    from benchmarks.serving.plain_server import create_app as plain
    from recbole_ssm.serving import Recommender
    from recbole_ssm.serving.http.app import create_app

    from .serving.http.conftest import listening

    @contextlib.contextmanager
    def started(words, log):
        recommender = Recommender.load(words[-1], "cpu")
        if words[0] == "benchmarks.serving.plain_server":
            app = plain(recommender, "--threads" in words)
        else:
            app = create_app(recommender, rule="endless" if "endless" in words else "window")
        with listening(app) as address:
            yield int(address.rsplit(":", 1)[1])

    monkeypatch.setattr(servers, "_started", started)
    part = run(monkeypatch, "http")["http"]
    assert [(row["server"], row["clients"]) for row in part["rows"]] == [
        (s, c) for c in (1, 4) for s in servers.SERVERS
    ]
    assert all(row["events before"] == 3 and float(row["p50, ms"]) > 0 for row in part["rows"])
    with pytest.raises(RuntimeError, match="the clients failed"):
        servers._load(1, 1, 3, 0.1, 0)


@pytest.mark.slow
def test_commands_in_processes_of_their_own(monkeypatch):
    pytest.importorskip("fastapi")
    pytest.importorskip("pyarrow")
    found = run(monkeypatch, "memory", "http")
    assert len(found["memory"]["rows"]) == 2
    assert len(found["http"]["rows"]) == 2 * len(servers.SERVERS)


def test_a_server_that_does_not_start_is_told_with_its_log(tmp_path):
    words = ["json.tool", "--no-such-option"]
    with pytest.raises(RuntimeError, match="no-such-option"), servers._started(words, tmp_path / "log"):
        pass


@pytest.mark.parametrize("kind", index.KINDS)
def test_a_users_vector_is_the_same_in_any_order_of_users(kind):
    users = index.histories(4, 3, 600)
    represent = index._recommender(600, kind).represent
    assert torch.equal(represent(users.take(np.array([3, 1, 0, 2]))), represent(users)[[3, 1, 0, 2]])
