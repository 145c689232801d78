import math
from pathlib import Path

import pytest
import yaml

from recbole_ssm import Config, UserError
from recbole_ssm.config import properties_dir
from recbole_ssm.search.space import Parameter, read_space, space_of

SHIPPED = sorted((properties_dir() / "search").glob("*.yaml"))


def write(text: str, name: str = "hyper.test") -> Path:
    file = Path(name)
    file.write_text(text)
    return file


def test_recboles_file_with_recboles_bounds():
    space = read_space(
        write(
            "learning_rate loguniform -8, -2\n"
            "# a comment\n"
            "\n"
            "dropout_prob quniform 0.1,0.55,0.1\n"
            "reg_weight uniform 0, 1\n"
            "train_batch_size choice [512, 1024]  # targets\n"
            "loss_type choice ['CE', 'BPR']\n"
            "mlp_hidden_size choice ['[64]','[64,32]']\n"
        )
    )
    assert space["learning_rate"] == Parameter("loguniform", (), math.exp(-8), math.exp(-2))
    assert space["dropout_prob"] == Parameter("quniform", (), 0.1, 0.55, 0.1)
    assert space["reg_weight"] == Parameter("uniform", (), 0.0, 1.0)
    assert space["train_batch_size"].values == (512, 1024)
    assert space["loss_type"].values == ("CE", "BPR")
    assert space["mlp_hidden_size"].values == ("[64]", "[64,32]")


def test_yaml_bounds_are_values():
    text = "learning_rate: {type: loguniform, low: 1.0e-4, high: 1.0e-2}\nnum_layers: [1, 2]\nbase: [~, 0.1]\n"
    space = read_space(write(text, "space.yaml"))
    assert space == {
        "learning_rate": Parameter("loguniform", (), 1e-4, 1e-2),
        "num_layers": Parameter("choice", (1, 2)),
        "base": Parameter("choice", (None, 0.1)),
    }
    assert space_of({name: parameter.plain() for name, parameter in space.items()}) == space


def test_recboles_dict_by_type():
    space = space_of({"choice": {"num_layers": [1, 2]}, "loguniform": {"learning_rate": [-8, 0]}})
    assert space == {
        "num_layers": Parameter("choice", (1, 2)),
        "learning_rate": Parameter("loguniform", (), math.exp(-8), 1.0),
    }


def test_steps_are_what_rounding_gives():
    assert Parameter("quniform", (), 0.1, 0.5, 0.1).grid() == [0.1, 0.2, 0.3, 0.4, 0.5]
    # Bounds that are no multiples: RecBole's (hyperopt's) outcomes are round(x / q) * q.
    assert Parameter("quniform", (), 20, 100, 32).grid() == [32, 64, 96]
    assert Parameter("uniform", (), 0, 1).grid() is None


def test_domains_draw_what_they_say():
    pytest.importorskip("ray")
    whole = Parameter("quniform", (), 20, 100, 32).domain()
    assert {whole.sample() for _ in range(200)} == {32, 64, 96}
    tenths = Parameter("quniform", (), 0.1, 0.3, 0.1).domain()
    assert {round(tenths.sample(), 9) for _ in range(200)} == {0.1, 0.2, 0.3}
    rate = Parameter("loguniform", (), 1e-4, 1e-2).domain()
    draws = [rate.sample() for _ in range(500)]
    assert all(1e-4 <= draw <= 1e-2 for draw in draws)
    assert 0.35 < sum(draw < 1e-3 for draw in draws) / 500 < 0.65


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate", r"line 1 of hyper\.test should be name, type and values"),
        ("\nlearning_rate normal 0,1", r"line 2 of hyper\.test: learning_rate: there is no type 'normal'"),
        ("learning_rate uniform 0.1", r"uniform needs 2 numbers, not 0\.1"),
        ("learning_rate uniform 1,0.1", r"a lower bound below the upper one, not 1\.0 and 0\.1"),
        ("x quniform 0,1,0", r"needs a positive step"),
        ("x choice []", r"a choice needs at least one value"),
        ("", r"names no parameter to search"),
    ],
)
def test_a_bad_line_is_named(text, message):
    with pytest.raises(UserError, match=message):
        read_space(write(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1", r"a: write a list of values, or"),
        ("a: {type: loguniform, low: 0, high: 1}", r"a: loguniform needs positive values"),
        ("a: {type: uniform, low: 0}", r"a: uniform needs low, high, not low"),
        ("- a", r"should hold lines of name: values"),
    ],
)
def test_bad_yaml_is_named(text, message):
    with pytest.raises(UserError, match=message):
        read_space(write(text, "space.yaml"))


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"parameter file nowhere\.yaml not found"):
        read_space("nowhere.yaml")


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_spaces_hold_settings_of_their_model(file):
    config = Config(file.stem, "ml-100k")
    space = read_space(file)
    assert all(name in config for name in space)
    lines = file.read_text().splitlines()
    for name in yaml.safe_load(file.read_text()):
        assert any(line.startswith(f"{name}:") and "#" in line for line in lines)
