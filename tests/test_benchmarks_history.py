"""``python -m benchmarks history``: older commits are measured by their own code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__, history

from .conftest import random_rows, write_dataset

pytestmark = pytest.mark.skipif(not (history.ROOT / ".git").exists(), reason="needs the repository's history")


def worktrees():
    return subprocess.run(["git", "worktree", "list"], cwd=history.ROOT, capture_output=True, check=True).stdout


@pytest.mark.slow
def test_each_commit_runs_its_own_code(monkeypatch):
    write_dataset("tiny", random_rows())
    words = ["--commits", "HEAD", "--datasets", "tiny", "--models", "Mamba4Rec", "--rounds", "1"]
    paths = ["--data_path", "dataset", "--output", "r.json", "--page", "page.md"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "history", *words, *paths])
    before = worktrees()
    __main__.main()
    ((run,),) = json.loads(Path("r.json").read_text())["cases"]["tiny, Mamba4Rec"].values()
    assert {"step_ms", "load_s", "eval_s"} == run.keys()
    assert min(run.values()) > 0
    assert "| tiny, Mamba4Rec | " in Path("page.md").read_text()
    assert worktrees() == before


def test_the_tree_comes_before_the_installed_package():
    Path("recbole_ssm").mkdir()
    Path("recbole_ssm", "__init__.py").write_text("raise SystemExit('its own')")
    environment = {"PYTHONPATH": str(Path.cwd()), "PATH": ""}
    words = [sys.executable, history.__file__, '["dataset", ["tiny"], ["Mamba4Rec"]]']
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert "its own" in done.stderr
