"""The output of everyone's recommendations: runs that end anywhere and go on, and what is never replaced."""

import itertools
import logging
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest

from recbole_ssm import UserError
from recbole_ssm.checkpoint import lock
from recbole_ssm.errors import CannotWrite

from ..test_places import disk_full_after
from .conftest import recommender
from .test_batch import batch, check, interactions, small_parts, written

assert small_parts  # of every test here


class Stopped(BaseException):
    """As if the process had been killed, wherever it may be caught."""


def stop_at(monkeypatch, step: int, *calls: str) -> None:
    """Let the ``step``-th file (of spills, states and parts) be the last that appears, or one of ``calls`` be the last.

    Args:
        monkeypatch: as of pytest.
        step: counted from 0.
        calls: functions of ``os``.
    """
    count = [0]

    def counting(call):
        def counted(*given, **named):
            if count[0] == step:
                raise Stopped
            count[0] += 1
            return call(*given, **named)

        return counted

    for name in calls or ("replace",):
        monkeypatch.setattr(os, name, counting(getattr(os, name)))


def stopped_run(monkeypatch, served, source, output="out.parquet", k=3) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(Stopped):
            batch.recommend_all(served, source, output, k=k)


@pytest.mark.parametrize("output", ["out.parquet", "out/"])
def test_a_run_goes_on_from_wherever_it_stopped(output, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    served, source = recommender("Mamba4Rec"), written(interactions(120), "csv")
    batch.recommend_all(served, source, "whole.parquet", k=3)
    expected, step, begun = pd.read_parquet("whole.parquet"), 0, []
    answer = batch.read_part
    monkeypatch.setattr(batch, "read_part", lambda *given: begun.append(given[1]) or answer(*given))
    while True:
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            try:
                batch.recommend_all(served, source, output, k=3)
                break
            except Stopped:
                parts = sorted(Path("out.parquet.partial" if output[-1] != "/" else "out.partial", "parts").iterdir())
        begun.clear()
        done = batch.recommend_all(served, source, output, k=3)
        assert not {f"part-{number:05}.parquet" for number in begun} & {file.name for file in parts}
        assert (done.users, done.answered) == (121, 120)
        pd.testing.assert_frame_equal(pd.read_parquet(output), expected)
        step += 1
    assert step > 8
    assert "rows read, 2 parts answered" in caplog.text


@pytest.mark.parametrize(("output", "changes"), [("out.parquet", "finish"), ("out", "finish"), ("out", "begin")])
def test_a_run_that_is_killed_as_files_go_away_can_be_given_again(output, changes, monkeypatch):
    """As it ends, or starts anew beside what another left; then by the same command, or one of another job."""
    served, source = recommender("Mamba4Rec"), written(interactions(40), "csv")
    expected = {k: served.recommend(interactions(40), k) for k in (2, 3)}
    change = getattr(batch.Output, changes)

    def dying(*given):
        with monkeypatch.context() as patch:
            stop_at(patch, step, "replace", "unlink", "rmdir")
            return change(*given)

    for step in itertools.count():
        for then in (3, 2):
            shutil.rmtree(f"{output}.partial", ignore_errors=True)
            batch.recommend_all(served, source, output if "." in output else "out/", k=2)
            if changes == "begin":
                stopped_run(monkeypatch, served, source, output, k=2)
            with monkeypatch.context() as patch:
                patch.setattr(batch.Output, changes, dying)
                try:
                    batch.recommend_all(served, source, output, k=3)
                    assert step > 5
                    return
                except Stopped:
                    pass
            if Path(output).exists():
                assert pd.read_parquet(output)["rank"].max() in (2, 3)
            batch.recommend_all(served, source, output, k=then)
            check(pd.read_parquet(output), expected[then])
            assert not Path(f"{output}.partial").exists()


def test_the_folder_that_is_being_replaced_is_not_lost(monkeypatch):
    served, source = recommender("Mamba4Rec"), written(interactions(40), "csv")
    batch.recommend_all(served, source, "out/", k=2)
    finish = batch.Output.finish
    with monkeypatch.context() as patch:
        patch.setattr(batch.Output, "finish", lambda place: stop_at(patch, 1) or finish(place))
        with pytest.raises(Stopped):
            batch.recommend_all(served, source, "out/", k=3)
    assert not Path("out").exists()
    with pytest.raises(UserError, match="the lists to search are 0"):
        batch.recommend_all(served, source, "out/", index="faiss", lists_searched=0)
    check(pd.read_parquet("out"), served.recommend(interactions(40), 2))


def test_another_job_starts_anew_and_says_so(monkeypatch, caplog):
    served, source = recommender("Mamba4Rec"), written(interactions(100), "csv")
    stopped_run(monkeypatch, served, source)
    with caplog.at_level(logging.WARNING):
        batch.recommend_all(served, source, "out.parquet", k=4)
    assert "out.parquet.partial is of another run (other k): starting anew" in caplog.text
    check(pd.read_parquet("out.parquet"), served.recommend(interactions(100), 4))
    stopped_run(monkeypatch, served, source)
    interactions(90).to_csv(source, index=False)
    Path("out.parquet.partial/state.json.writing").write_text("{")
    with caplog.at_level(logging.WARNING):
        batch.recommend_all(served, source, "out.parquet", k=3)
    assert "(other input): starting anew" in caplog.text
    check(pd.read_parquet("out.parquet"), served.recommend(interactions(90), 3))


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(caplog):
    served, source = recommender("Mamba4Rec"), written(interactions(), "csv")
    for size in (6000, 12000):
        with disk_full_after(size), pytest.raises(CannotWrite, match=r"out\.parquet.* cannot be written \(.*make room"):
            batch.recommend_all(served, source, "out.parquet")
    batch.recommend_all(served, source, "out.parquet")
    check(pd.read_parquet("out.parquet"), served.recommend(interactions()))


def test_two_runs_of_one_output_do_not_mix():
    source = written(interactions(100), "csv")
    with batch.Output("out.parquet").held(), pytest.raises(UserError, match=r"another run writes out\.parquet"):
        batch.recommend_all(recommender("Mamba4Rec"), source, "out.parquet")


@pytest.mark.parametrize("by_a_third", [False, True])
def test_a_run_that_ends_while_another_begins_is_waited_for(monkeypatch, by_a_third):
    def ended_before(file):
        shutil.rmtree("out.parquet.partial")
        if by_a_third:
            Path("out.parquet.partial").mkdir()
            Path("out.parquet.partial/lock").touch()
        return lock(file)

    monkeypatch.setattr("recbole_ssm.serving.output.lock", ended_before)
    with pytest.raises(UserError, match=r"another run writes out\.parquet: wait"), batch.Output("out.parquet").held():
        pass


def test_an_output_that_is_there_is_replaced():
    served = recommender("Mamba4Rec")
    Path("out.parquet").touch()
    for users in (100, 50):
        table = interactions(users)
        for output in ("out.parquet", "out/"):
            batch.recommend_all(served, written(table, "csv"), output, k=2)
            check(pd.read_parquet(output), served.recommend(table, 2))
        assert not list(Path().glob("*.partial"))


@pytest.mark.parametrize(
    ("input", "output", "message"),
    [
        ("in.csv", "in.csv", "would replace the input"),
        ("in.csv", "link.parquet", "would replace the input"),
        ("in", "in", "would replace the input"),
        ("in", "in/part-0.parquet", "would replace the input"),
        ("in", "in/out.parquet", "or be read as a part of it"),
        ("in/part-0.parquet", "in/", "would replace the input"),
        ("out.parquet.partial/in.csv", "out.parquet", "would replace the input"),
        ("in.csv", "model.pth", "is there, and holds no recommendations"),
        ("in.csv", "other.parquet", "is there, and holds no recommendations"),
        ("in.csv", "pipe", "is there, and holds no recommendations"),
        ("in.csv", "other", "other holds other files than parts of recommendations"),
    ],
)
def test_nothing_but_recommendations_is_replaced(input, output, message):
    table = interactions(9)
    for folder in ("in", "other", "out.parquet.partial"):
        Path(folder).mkdir()
    for file in ("in.csv", "out.parquet.partial/in.csv"):
        table.to_csv(file, index=False)
    for file in ("in/part-0.parquet", "other/part-0.parquet", "other.parquet"):
        table.to_parquet(file)
    Path("link.parquet").symlink_to("in.csv")
    Path("model.pth").write_bytes(b"PK")
    os.mkfifo("pipe")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        batch.recommend_all(recommender("Mamba4Rec"), input, output)
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path in before}
