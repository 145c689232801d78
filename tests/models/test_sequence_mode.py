"""RecBole's own causal models, trained on whole histories: exact against their own rows."""

from pathlib import Path

import pytest
import torch
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer

from recbole_ssm import UserError, load_data_and_model, run_recbole
from recbole_ssm.models import sequence_mode
from recbole_ssm.models.sequence_mode import SequenceMode
from recbole_ssm.settings import CAUSAL_MODELS, SCHEMAS
from recbole_ssm.settings.models import WithFeatures
from recbole_ssm.trainer import get_trainer

from ..conftest import build, random_rows, small_config, write_dataset
from ..launches import count_launches, optimizers_fused

SMALL = {
    "hidden_size": 16, "inner_size": 32, "embedding_size": 16, "n_heads": 2, "train_batch_size": 10_000,
    "MAX_ITEM_LIST_LENGTH": 30, "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "dropout_prob": 0.0,
    "time_order": "float32",
}  # fmt: skip
LOSSES = {
    "CE": {"loss_type": "CE"},
    "BPR": {"loss_type": "BPR", "train_neg_sample_args": {"distribution": "uniform", "sample_num": 3}},
}

# Models and how their histories are padded; those with features are built of the others' parts.
PADDED = [(name, places) for name in ("SASRec", "GRU4Rec") for places in (1, 100, 10_000, None)]
PADDED += [(name, 100) for name in CAUSAL_MODELS if issubclass(SCHEMAS[name], WithFeatures)]


def recbole_model(name, mode, users=12, **settings):
    if mode is not None:
        settings["train_mode"] = mode
    write_dataset("tiny", random_rows(users=users))
    if issubclass(SCHEMAS[name], WithFeatures):
        classes = [f"i{item}\tc{item % 3} c{item % 4}" for item in range(30)]
        Path("dataset/tiny/tiny.item").write_text("\n".join(["item_id:token\tclass:token_seq", *classes]))
        settings["load_col"] = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "class"]}
    return build(name, **SMALL, **settings)


def padded_by(places, monkeypatch):
    """Blocks of so many places; where that is None all histories in one, as on a GPU."""
    if places is None:
        monkeypatch.setattr(SequenceMode, "_in_blocks", staticmethod(lambda _: False))
    else:
        monkeypatch.setattr(sequence_mode, "PLACES_PER_BLOCK", places)


@pytest.mark.parametrize(("name", "places"), PADDED)
@pytest.mark.parametrize("loss", LOSSES)
def test_one_pass_equals_recbole_rows(name, loss, places, monkeypatch):
    padded_by(places, monkeypatch)
    _, model, (histories, _, _) = recbole_model(name, "sequence", users=5, **LOSSES[loss])
    _, plain, (rows, _, _) = recbole_model(name, None, users=5, **LOSSES[loss])
    assert isinstance(model, SequenceMode)
    assert not isinstance(plain, SequenceMode)
    plain.load_state_dict(model.state_dict())
    model.double()
    plain.double()
    (batch,) = list(histories)
    if loss == "CE":
        (expected_batch,) = list(rows)
        expected = plain.calculate_loss(expected_batch)
    else:  # the same negatives for both
        expected = torch.stack([
            plain.calculate_loss(row_of(plain, batch, m, k)) for m in range(len(batch)) for k in range(3)
        ]).mean()  # fmt: skip
    loss_value = model.calculate_loss(batch)
    torch.testing.assert_close(loss_value, expected)
    loss_value.backward()
    expected.backward()
    for (parameter, tensor), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(tensor.grad, other.grad, msg=lambda m, n=parameter: f"{n}: {m}")


def row_of(model, batch, m, k):
    """RecBole's row of one target and one negative."""
    row = int(batch.target_rows[m])
    begin = int(batch.cu_seqlens[batch.cu_seqlens <= row].max())
    return {
        model.ITEM_SEQ: batch.items[None, begin : row + 1],
        model.ITEM_SEQ_LEN: torch.tensor([row + 1 - begin]),
        model.POS_ITEM_ID: batch.targets[m : m + 1],
        model.NEG_ITEM_ID: batch.negatives[m, k : k + 1],
    }


@pytest.mark.parametrize(("name", "places"), PADDED)
def test_scores_are_the_models_own(name, places, monkeypatch):
    padded_by(places, monkeypatch)
    _, model, (_, valid_data, _) = recbole_model(name, "sequence", **LOSSES["CE"])
    _, plain, (_, rows, _) = recbole_model(name, None, **LOSSES["CE"])
    plain.load_state_dict(model.state_dict())
    ours, theirs = next(iter(valid_data))[0], next(iter(rows))[0]
    torch.testing.assert_close(model.eval().full_sort_predict(ours), plain.eval().full_sort_predict(theirs))


@pytest.mark.parametrize("name", CAUSAL_MODELS)
def test_a_filled_batch_is_the_batch_itself(name):
    """Inert windows, some of them empty, and inert targets change neither the loss nor a gradient."""
    _, model, (histories, _, _) = recbole_model(name, "sequence", **LOSSES["CE"])
    assert model.fillable
    model.double()
    (batch,) = list(histories)
    filled = batch.filled(30)
    assert len(filled) > len(batch)
    assert len(filled.items) > len(batch.items)
    assert len(filled.cu_seqlens) > len(batch.cu_seqlens)
    found = []
    for each in (batch, filled):
        model.zero_grad()
        loss = model.calculate_loss(each)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_mean_over_pairs_cannot_leave_targets_out():
    _, model, _ = recbole_model("SASRec", "sequence", **LOSSES["BPR"])
    assert not model.fillable


@pytest.mark.parametrize("filled", [False, True])
def test_a_training_step_on_a_gpu_reads_nothing_back_and_launches_little(filled):
    """Two layers; 998 launches once, in blocks of similar length."""
    _, model, (histories, _, _) = recbole_model("SASRec", "sequence", **LOSSES["CE"])
    assert model.n_layers == 2
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.to("meta").train()
    (batch,) = list(histories)
    batch = (batch.filled(30) if filled else batch).to("meta")
    with optimizers_fused():
        optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def step():
        optimizer.zero_grad()
        model.calculate_loss(batch).backward()
        optimizer.step()

    count_launches(step)  # which makes the optimizer's state
    launches = count_launches(step)
    assert launches["native_dropout"] == 5
    assert launches.total() <= 130, launches


def test_scoring_on_a_gpu_reads_nothing_back():
    _, model, (_, valid_data, _) = recbole_model("SASRec", "sequence", **LOSSES["CE"])
    model.to("meta").eval()
    rows = {name: t.to("meta") for name, t in next(iter(valid_data))[0].interaction.items()}
    launches = count_launches(lambda: model.full_sort_predict(rows))
    assert launches["_scaled_dot_product_efficient_attention"] == model.n_layers


def test_a_run_trains_and_its_checkpoint_comes_back():
    write_dataset("tiny", random_rows())
    settings = {**SMALL, "train_mode": "sequence", "epochs": 2, "state": "ERROR", "show_progress": False}
    result = run_recbole("SASRec", "tiny", config_dict={**settings, "loss_type": "CE", "data_path": "dataset"})
    assert result["test_result"]["ndcg@10"] > 0
    (file,) = Path("saved").glob("SASRec-tiny-*.pth")
    config, model, *_ = load_data_and_model(file)
    assert config["train_mode"] == "sequence"
    assert isinstance(model, SequenceMode)


def test_recboles_way_stays_the_default():
    config, model, (rows, _, _) = recbole_model("SASRec", None, **LOSSES["CE"])
    assert type(model) is SASRec
    assert config["train_mode"] is None
    assert "SequenceDataset" not in type(rows._dataset).__name__
    assert issubclass(get_trainer(config["MODEL_TYPE"], "SASRec"), Trainer)


def test_models_that_see_the_future_are_refused():
    write_dataset("tiny", random_rows())
    with pytest.raises(
        UserError, match=r"BERT4Rec cannot be trained .*: of RecBole's models .*SASRecF, GRU4RecF and FDSA can"
    ):
        small_config("BERT4Rec", loss_type="CE", train_mode="sequence")
    with pytest.raises(UserError, match="train_mode is 'both': choose one of sequence, prefix"):
        small_config("SASRec", loss_type="CE", train_mode="both")
    assert small_config("GRU4Rec", train_mode="sequence", loss_type="CE")["time_order"] == "exact"


def test_prefix_mode_is_recboles_rows():
    _, model, (rows, _, _) = recbole_model("SASRec", "prefix", **LOSSES["CE"])
    _, _, (expected, _, _) = recbole_model("SASRec", None, **LOSSES["CE"])
    assert type(model) is SASRec
    assert len(rows._dataset) == len(expected._dataset)
    assert build("Mamba4Rec", train_mode="prefix")[0]["train_mode"] == "prefix"
