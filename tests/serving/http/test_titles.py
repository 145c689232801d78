"""What items are called: RecBole's files of items, as training reads them."""

import pytest

from recbole_ssm.serving.http.titles import read_titles, titles_beside


def test_titles_come_from_recboles_file(served, tmp_path, caplog):
    file = tmp_path / "x.item"
    file.write_text("item_id:token\tyear:float\tmovie_title:token_seq\ni4\t1\tThe Fourth\ni5\t2\t\nelse\t3\tElse\n")
    found = read_titles(file, served.config, served.vocabulary)
    assert (found.of("i4"), found.of("i5"), found.search("fourth", 5)) == ("The Fourth", None, ["i4"])
    with pytest.raises(ValueError, match="no column 'plot': it has item_id, year, movie_title"):
        read_titles(file, served.config, served.vocabulary, "plot")
    with pytest.raises(ValueError, match="cannot be read"):
        read_titles(tmp_path / "nothing.item", served.config, served.vocabulary)
    beside = {"data_path": str(tmp_path), "dataset": "x", "field_separator": "\t", "encoding": "utf-8"}
    assert titles_beside(beside, served.vocabulary).of("i4") == "The Fourth"
    file.write_text("item_id:token\tyear:float\ni4\t1\n")
    assert titles_beside(beside, served.vocabulary).of("i4") is None
    assert "items are called by their ids: " in caplog.text
    assert "has no column whose name holds 'title' or 'name'" in caplog.text
    file.unlink()
    caplog.clear()
    assert titles_beside(beside, served.vocabulary).search("i4", 1) == ["i4"]
    assert not caplog.text


def test_titles_are_written_as_the_data_of_the_training(served, tmp_path):
    file = tmp_path / "x.item"
    file.write_bytes("item_id:token::movie_title:token_seq\ni4::Die Vögel\n".encode("latin-1"))
    config = {"data_path": str(tmp_path), "dataset": "x", "field_separator": "::", "encoding": "latin-1"}
    for found in (read_titles(file, config, served.vocabulary), titles_beside(config, served.vocabulary)):
        assert found.of("i4") == "Die Vögel"
