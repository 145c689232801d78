"""What every registered model must do; a new one is found by itself."""

from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from recbole.utils.case_study import full_sort_topk
from torch.utils.checkpoint import checkpoint

from recbole_ssm import UserError, run_recbole
from recbole_ssm.data.sequence_dataset import SequenceDataset
from recbole_ssm.layers.mixture_of_experts import expert_diversity, load_balance
from recbole_ssm.models import base
from recbole_ssm.models.base import ITEMS_KEPT, ITEMS_PER_BLOCK
from recbole_ssm.ops.both_ways import both_ways
from recbole_ssm.registry import MODELS
from recbole_ssm.settings import LOSS_TYPES

from ..conftest import build, markov_rows, small_settings, write_dataset

# The others learn the same behind -m slow, a quarter of a minute each.
LEARNING_IN_CI = ("STARRec", "SSD4Rec", "Mamba4Rec")

every_model = pytest.mark.parametrize("name", MODELS)

ABLATIONS = [
    ("STARRec", {"use_ssm": False}),
    ("STARRec", {"use_pma": False}),
    ("STARRec", {"use_similarity": False}),
    ("STARRec", {"pma_residual": False}),
    ("STARRec", {"use_moe": False}),
    ("STARRec", {"experts_per_token": 2}),
    ("STARRec", {"diversity_weight": 0.0}),
    ("STARRec", {"balance_weight": 0.0}),
    ("STARRec", {"use_position_embedding": False}),
    ("STARRec", {"attention_window": 3}),
    ("STARRec", {"similarity_threshold": [0.1, -0.2]}),
    ("STARRec", {"input_dependent_fusion": True}),
    ("STARRec", {"moe_level": "position"}),
    ("STARRec", {"use_time_gaps": True}),
    ("STARRec", {"num_layers": 2}),
    ("STARRec", {"num_layers": 3, "feed_forward": True}),
    ("STARRec", {"train_mode": "prefix"}),
    ("STARRec", {"ssm_backend": "reference"}),
    ("STARRec", {"ssm_block": "mamba3"}),
    ("STARRec", {"filter_share": 0.7}),
    ("STARRec", {"filter_share": 0.5, "use_ssm": False}),
    ("SSD4Rec", {"bidirectional": False}),
    ("SSD4Rec", {"bidirectional": False, "train_mode": "sequence"}),
    ("SSD4Rec", {"mask_ratio": 0.0}),
    ("SSD4Rec", {"var_len": False}),
    ("SSD4Rec", {"backward_stream": "aligned"}),
    ("SSD4Rec", {"norm_embedding": False, "num_layers": 1}),
    ("RecBLR", {"num_layers": 1}),
    ("RecBLR", {"d_conv": 1}),
    ("RecBLR", {"use_time_gaps": True}),
    ("Mamba4Rec", {"temperature": 0.1}),
    ("Mamba4Rec", {"num_layers": 2}),
    ("Mamba4Rec", {"ssm_block": "mamba2"}),
    ("Mamba4Rec", {"ssm_block": "mamba3"}),
    ("Mamba4Rec", {"filter_share": 0.7}),
    ("Mamba4Rec", {"train_mode": "prefix"}),
    ("TiM4Rec", {"time_aware": False}),
    ("TiM4Rec", {"num_layers": 1}),
    ("SS4Rec", {"time_aware": False}),
    ("SS4Rec", {"time_unit": 86400.0}),
    ("SS4Rec", {"request_time": "known"}),
    ("BSARec", {"alpha": 0.0}),
    ("BSARec", {"alpha": 1.0}),
    ("BSARec", {"c": 0}),
    ("BSARec", {"use_clock": True}),
    ("eSASRec", {"sampling_correction": True}),
    ("eSASRec", {"train_mode": "prefix"}),
    ("eSASRec", {"n_heads": 1}),
    ("eSASRec", {"use_clock": True}),
]


def total(loss):
    return sum(loss) if isinstance(loss, tuple) else loss


def rows(model, item_lists, width=12):
    """Padded rows as RecBole makes them; what the model reads of times follows from the items."""
    padded = torch.zeros(len(item_lists), width, dtype=torch.int64)
    for row, items in zip(padded, item_lists, strict=True):
        row[: len(items)] = torch.tensor(items)
    lengths = torch.tensor([len(items) for items in item_lists])
    times = {SequenceDataset.TIME_COLUMNS: padded[..., None].repeat(1, 1, len(model.columns))} if model.columns else {}
    return Interaction({"item_id_list": padded, "item_length": lengths, "item_id": lengths, **times})


@every_model
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_each_parameter_gets_a_gradient(name, loss_type, num_layers):
    _, model, (train_data, _, _) = build(name, loss_type=loss_type, num_layers=num_layers)
    model.train()
    for batch in islice(train_data, 3):
        total(model.calculate_loss(batch)).backward()
    for parameter, tensor in model.named_parameters():
        assert tensor.grad is not None, f"{parameter} has no gradient"
        assert tensor.grad.isfinite().all(), parameter
        assert tensor.grad.abs().max() > 0, f"{parameter} has a zero gradient"


@every_model
def test_padding_and_batch_mates_change_nothing(name):
    _, model, _ = build(name, num_layers=2)
    model.eval()
    lists = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [8, 4]]
    together = model.full_sort_predict(rows(model, lists))
    for items, scores in zip(lists, together, strict=True):
        alone = model.full_sort_predict(rows(model, [items], width=len(items)))[0]
        torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-5)
    backwards = model.full_sort_predict(rows(model, lists[::-1]))
    torch.testing.assert_close(backwards.flip(0), together, rtol=1e-4, atol=1e-5)


@every_model
def test_predict_agrees_with_full_sort_predict(name):
    _, model, (_, _, test_data) = build(name)
    model.eval()
    interaction = test_data._dataset[np.arange(len(test_data._dataset))]
    scores = model.full_sort_predict(interaction)
    assert scores.shape == (len(interaction), model.n_items)
    chosen = scores.gather(1, interaction["item_id"][:, None])[:, 0]
    torch.testing.assert_close(model.predict(interaction), chosen)


@every_model
def test_blocks_of_a_batch_change_nothing(name, monkeypatch):
    """Encoding in blocks, recomputed in the backward pass or not, gives the same loss and gradients."""
    _, model, (train_data, _, _) = build(name, train_mode="prefix", dropout_prob=0.0, train_batch_size=24)
    model.eval()
    batch = next(iter(train_data))
    results = []
    for items, kept in ((10**9, 10**9), (7, 10**9), (7, 20)):
        monkeypatch.setitem(ITEMS_PER_BLOCK, "cpu", items)
        monkeypatch.setitem(ITEMS_KEPT, "cpu", kept)
        model.zero_grad()
        loss = total(model.calculate_loss(batch))
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for whole, blocks, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(whole, blocks, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(recomputed, blocks, rtol=1e-4, atol=1e-6)


def test_recomputed_blocks_draw_what_they_drew(monkeypatch):
    """torch keeps the random state of those devices alone that a block's arguments lie on."""
    _, model, (train_data, _, _) = build("Mamba4Rec", train_mode="prefix", dropout_prob=0.5, train_batch_size=24)
    monkeypatch.setitem(ITEMS_PER_BLOCK, "cpu", 7)
    monkeypatch.setitem(ITEMS_KEPT, "cpu", 20)
    devices = []

    def kept(function, *arguments, **settings):
        devices.append([a.device for a in arguments if isinstance(a, torch.Tensor)])
        return checkpoint(function, *arguments, **settings)

    monkeypatch.setattr(base, "checkpoint", kept)
    total(model.train().calculate_loss(next(iter(train_data)))).backward()
    assert len(devices) > 1
    assert all(own == [model.item_embedding.weight.device] for own in devices)


@every_model
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_no_kernel_is_compiled_for_the_shape_of_a_batch(name, capfd):
    """As oneDNN's are, of which a thousand are kept: packed batches bring a new number of rows each."""
    _, model, (train_data, _, test_data) = build(name, num_layers=2)
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        F.gelu(torch.ones(3, 2))
        assert "eltwise" in capfd.readouterr().out  # that is how it would show
        total(model.train().calculate_loss(next(iter(train_data)))).backward()
        model.eval().full_sort_predict(test_data._dataset[np.arange(4)])
    assert ",exec," not in capfd.readouterr().out


@every_model
@pytest.mark.parametrize("settings", [{}, {"train_mode": "prefix"}], ids=["default mode", "prefix mode"])
def test_bfloat16_autocast(name, settings):
    _, model, (train_data, _, _) = build(name, **settings)
    with torch.autocast("cpu"):
        loss = total(model.train().calculate_loss(next(iter(train_data))))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every_model
def test_a_model_of_more_than_one_pass_refuses_whole_histories(name):
    _, model, _ = build(name)
    _, _, (histories, _, _) = build("Mamba4Rec")
    model.one_pass = False
    with pytest.raises(UserError, match="needs a row for each target: set train_mode: prefix"):
        model.calculate_loss(next(iter(histories)))


@every_model
def test_recbole_case_study_ranks_by_our_scores(name):
    _, model, (_, _, test_data) = build(name)
    users = test_data._dataset.inter_feat["user_id"][:3].numpy()
    scores, items = full_sort_topk(users, model, test_data, k=5)
    assert scores.shape == items.shape == (3, 5)
    assert (items > 0).all()
    assert (scores.diff(dim=1) <= 0).all()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in LEARNING_IN_CI)) for name in MODELS]
)
def test_learnable_data_is_learned_and_random_data_is_not(name):
    """With 100 items a random ranking has an NDCG@10 of about 0.045."""
    settings = {
        **small_settings(name), "hidden_size": 32, "num_layers": 1, "epochs": 12, "learning_rate": 0.01,
        "train_batch_size": 512, "dropout_prob": 0.2, "state": "ERROR", "show_progress": False, "stopping_step": 3,
    }  # fmt: skip
    results = {}
    for dataset, noise in (("chain", 0.1), ("noise", 1.0)):
        write_dataset(dataset, markov_rows(users=300, items=100, length=12, noise=noise))
        result = run_recbole(name, dataset, config_dict=settings, saved=False)
        results[dataset] = result["test_result"]["ndcg@10"]
    assert results["chain"] > 0.6
    assert results["noise"] < 0.09


@pytest.mark.parametrize(("name", "switch"), ABLATIONS, ids=lambda value: str(value))
def test_every_switch_runs_and_matters(name, switch):
    _, model, (train_data, _, test_data) = build(name, **switch)
    total(model.train().calculate_loss(next(iter(train_data)))).backward()
    scores = model.eval().full_sort_predict(test_data._dataset[np.arange(4)])
    assert scores.isfinite().all()
    if switch.keys() <= {
        "mask_ratio",
        "diversity_weight",
        "balance_weight",
        "train_mode",
        "ssm_backend",
        "sampling_correction",
    }:
        return  # these change training or speed, not scores
    _, plain, (_, _, of_plain) = build(name)
    if {n: p.shape for n, p in plain.state_dict().items()} == {n: p.shape for n, p in model.state_dict().items()}:
        plain.load_state_dict(model.state_dict())
        assert not torch.equal(plain.eval().full_sort_predict(of_plain._dataset[np.arange(4)]), scores)


def test_mask_ratio_masks_that_share_in_training_only():
    _, model, _ = build("SSD4Rec", mask_ratio=0.3)
    seen = []
    model.item_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    items, borders = torch.ones(20_000, dtype=torch.int64), torch.arange(0, 20_001, 10, dtype=torch.int32)
    model.train().encode(items, borders)
    model.eval().encode(items, borders)
    assert abs((seen[0] == 0).double().mean().item() - 0.3) < 0.02
    assert (seen[1] == 1).all()


def test_backward_stream_readings():
    """'final' hands the last position the state after the whole reversed sequence, 'aligned' a scan of itself."""
    outputs = {}
    for reading in ("final", "aligned"):
        _, model, _ = build("SSD4Rec", backward_stream=reading, beta=1.0, num_layers=1)
        layer = model.eval().layers[0]
        x = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
        borders = torch.tensor([0, 5, 7], dtype=torch.int32)
        flipped = torch.cat([x[:5].flip(0), x[5:].flip(0)])
        forward, backward = layer.mamba(x, borders), layer.mamba(flipped, borders)
        if reading == "aligned":
            backward = torch.cat([backward[:5].flip(0), backward[5:].flip(0)])
        expected = layer.feed_forward(layer.norm(forward + backward + x))
        streams = both_ways(borders)
        torch.testing.assert_close(layer(x, borders, streams=streams), expected)
        for last in (False, True):
            read = layer(x, borders, torch.tensor([4, 6]), last, streams)
            torch.testing.assert_close(read, expected[[4, 6]])
        outputs[reading] = expected
    assert not torch.allclose(outputs["final"], outputs["aligned"])


@pytest.mark.parametrize("level", ["sequence", "position"])
def test_starrecs_loss_holds_the_terms_of_its_mixture(level):
    """They are those of the mixture over what it routes: targets, or all positions."""
    _, model, (train_data, _, _) = build("STARRec", moe_level=level, dropout_prob=0.0, diversity_weight=0.5)
    batch = next(iter(train_data))
    _, diversity, balance = model.calculate_loss(batch)
    routed = []
    hook = model.mixture.register_forward_hook(lambda _module, inputs, output: routed.append((inputs[0], output)))
    model.calculate_loss(batch)
    hook.remove()
    ((y, mixed),) = routed
    assert len(y) == (len(batch) if level == "sequence" else len(batch.items))
    torch.testing.assert_close(diversity, 0.5 * expert_diversity(mixed.experts))
    torch.testing.assert_close(balance, model.balance_weight * load_balance(mixed.gate))


def test_routing_positions_needs_whole_histories():
    with pytest.raises(UserError, match="moe_level: position learns from whole histories alone"):
        build("STARRec", moe_level="position", train_mode="prefix")


@pytest.mark.parametrize(
    ("name", "train_mode"),
    [("STARRec", "sequence"), ("STARRec", "prefix"), ("Mamba4Rec", "sequence"), ("SSD4Rec", "prefix")],
)
def test_what_may_not_repeat_is_no_class_and_ranks_last(name, train_mode):
    """The loss is torch's without the items that a window holds up to the target; scores of a row's own are -inf."""
    own = {"diversity_weight": 0.0, "balance_weight": 0.0} if name == "STARRec" else {}
    _, model, (train_data, _, test_data) = build(name, allow_repeats=False, train_mode=train_mode, **own)
    model.eval()
    batch = model.packed(next(iter(train_data)))
    hidden = model.encode(batch.items, batch.cu_seqlens, read=batch.target_rows)
    scores = model.read_out(hidden) @ model.item_embedding.weight.T
    begins = batch.cu_seqlens[torch.searchsorted(batch.cu_seqlens, batch.target_rows.int(), right=True) - 1]
    for row, (begin, end) in enumerate(zip(begins.tolist(), batch.target_rows.tolist(), strict=True)):
        chosen = scores[row, batch.targets[row]].item()
        scores.data[row, batch.items[begin : end + 1]] = -torch.inf
        scores.data[row, batch.targets[row]] = chosen
    expected = torch.nn.functional.cross_entropy(scores, batch.targets)
    torch.testing.assert_close(model.calculate_loss(batch), expected)
    rows = next(iter(test_data))[0]
    with torch.no_grad():
        scores = model.full_sort_predict(rows)
        own_item = rows["item_id_list"][torch.arange(len(rows)), rows["item_length"] - 1]
        rows.update(Interaction({"item_id": own_item}))
        assert model.predict(rows).isneginf().all()
        rows.update(Interaction({"item_id": scores.argmax(1)}))
        torch.testing.assert_close(model.predict(rows), scores.max(1).values)
    for found, items, length in zip(scores, rows["item_id_list"], rows["item_length"], strict=True):
        assert set(found.isneginf().nonzero()[:, 0].tolist()) == set(items[:length].tolist())


def test_repeats_in_data_of_a_model_without_are_told(caplog):
    build("Mamba4Rec", allow_repeats=False)
    assert "of the interactions are with an item that the user had before" in caplog.text


def test_temperature_makes_scores_cosines():
    _, model, (_, _, test_data) = build("Mamba4Rec", temperature=0.2)
    row = test_data._dataset[np.arange(4)]
    with torch.no_grad():
        scores = model.eval().full_sort_predict(row)
        hidden = model(row["item_id_list"], row["item_length"])
        cosine = torch.cosine_similarity(hidden[:, None], model.item_embedding.weight, dim=-1)
    torch.testing.assert_close(scores, cosine / 0.2)
    (batch,) = [next(iter(build("Mamba4Rec", temperature=0.2)[2][0]))]
    hidden = model.encode(batch.items, batch.cu_seqlens, read=batch.target_rows)
    cosine = torch.cosine_similarity(hidden[:, None], model.item_embedding.weight, dim=-1)
    expected = torch.nn.functional.cross_entropy(cosine / 0.2, batch.targets)
    torch.testing.assert_close(model.calculate_loss(batch), expected)
