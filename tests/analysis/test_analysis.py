"""Ranks against RecBole's evaluator, and what a model's parts do against a calculation by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_ssm import UserError
from recbole_ssm.analysis import expert_gates, fusion_weights, gate_entropy, history_categories, rank_targets
from recbole_ssm.analysis.ranking import Ranks, length_buckets
from recbole_ssm.trainer import get_trainer

from ..conftest import build

METRICS = {"metrics": ["Recall", "MRR", "NDCG", "Hit"], "topk": [1, 5, 10], "metric_decimal_place": 9}


def trained(name, **settings):
    config, model, loaders = build(name, **settings)
    return model, get_trainer(config["MODEL_TYPE"], name)(config, model), loaders


@pytest.mark.parametrize("exclude_history", [False, True])
@pytest.mark.parametrize("name", ["Mamba4Rec", "SASRec"])
def test_metrics_of_ranks_are_recboles(name, exclude_history):
    mode = {} if name == "Mamba4Rec" else {"train_mode": "sequence", "valid_metric": "NDCG@10"}
    _, trainer, (train_data, valid_data, test_data) = trained(name, exclude_history=exclude_history, **METRICS, **mode)
    trainer.eval_collector.data_collect(train_data)
    for data in (valid_data, test_data):
        theirs = trainer.evaluate(data, load_best_model=False)
        ours = rank_targets(trainer, data).metrics([1, 5, 10])
        assert ours.keys() | {f"hit@{k}" for k in (1, 5, 10)} == theirs.keys()
        for metric, value in ours.items():
            assert value == pytest.approx(theirs[metric], abs=1e-8)
        assert ours["recall@10"] > 0


@pytest.mark.parametrize("equal", [0, 1, 2, "all"])
def test_a_target_ranks_in_the_middle_of_its_equals(equal, monkeypatch):
    model, trainer, (_, valid_data, _) = trained("Mamba4Rec")
    items = model.n_items - 1

    def full_sort_predict(rows):
        if equal == "all":
            return torch.zeros(len(rows), items + 1)
        scores = torch.arange(items + 1, 0, -1.0).repeat(len(rows), 1)  # the item's id is its rank
        for row, target in zip(scores, rows[model.ITEM_ID].tolist(), strict=True):
            row[target : target + equal + 1] = row[target].item()
        return scores

    monkeypatch.setattr(model, "full_sort_predict", full_sort_predict)
    ranks = rank_targets(trainer, valid_data)
    if equal == "all":
        assert set(ranks.ranks) == {1 + items // 2}
        assert ranks.metrics([10])["ndcg@10"] == 0
    else:
        targets = valid_data._dataset.inter_feat
        ids = targets[model.ITEM_ID].numpy()[targets[model.USER_ID].numpy().argsort(kind="stable")]
        after = np.minimum(equal, items - ids)
        np.testing.assert_array_equal(ranks.ranks, ids + (after + 1) // 2)


def test_history_excluded_is_what_a_loop_over_users_gives():
    model, trainer, (_, _, test_data) = trained("Mamba4Rec", exclude_history=True, MAX_ITEM_LIST_LENGTH=3)
    found = rank_targets(trainer, test_data)
    dataset = test_data._dataset
    repeats = 0
    for i in range(len(dataset)):
        row = dataset[torch.tensor([i])]
        place = int(row[dataset.TARGET_POSITION])
        history = dataset.sorted_items[int(dataset.user_start[place]) : place].tolist()  # all, not the latest 3
        target = int(row[dataset.iid_field])
        repeats += target in history
        with torch.no_grad():
            scores = model.full_sort_predict(row)[0]
        rank = 1 + sum(
            bool(scores[item] > scores[target]) for item in range(1, dataset.item_num) if item not in history
        )
        (at,) = np.flatnonzero(found.users == int(row[dataset.uid_field]))
        assert found.ranks[at] == rank
        assert found.lengths[at] == len(history)
    assert repeats  # a target that the history holds is ranked all the same


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("Mamba4Rec", {"eval_args": {"mode": "uni10"}}, "leave the mode of eval_args at full"),
        ("SASRec", {}, "exclude_history needs whole histories"),
    ],
)
def test_history_that_cannot_be_excluded(model, settings, message):
    with pytest.raises(UserError, match=message):
        build(model, exclude_history=True, valid_metric="NDCG@10", **settings)


def test_sampled_candidates_need_the_mode_alone():
    config, _, (_, valid_data, _) = build("STARRec", eval_args={"mode": "pop10"})
    assert config["eval_args"]["split"] == {"LS": "valid_and_test"}
    assert config["eval_args"]["order"] == "TO"
    (rows, *_rest) = next(iter(valid_data))
    assert len(rows) % 11 == 0


def test_metrics_of_known_ranks():
    ranks = Ranks(np.arange(3), np.arange(3), np.array([1, 3, 11]))
    found = ranks.metrics([10])
    assert found == pytest.approx({"recall@10": 2 / 3, "mrr@10": (1 + 1 / 3) / 3, "ndcg@10": (1 + 0.5) / 3})


def test_length_buckets():
    found = length_buckets(np.array([1, 4, 5, 300]), [1, 5, 50, 200])
    assert {name: rows.tolist() for name, rows in found.items()} == {
        "1 to 4": [0, 1],
        "5 to 49": [2],
        "200 and more": [3],
    }


@pytest.mark.parametrize("input_dependent", [False, True])
def test_fusion_weights(input_dependent):
    model, _, (_, _, test_data) = trained("STARRec", input_dependent_fusion=input_dependent)
    layer = model.layers[-1]
    with torch.no_grad():
        if input_dependent:
            layer.fusion_gate.weight.normal_()
        else:
            layer.fusion_logits.copy_(torch.tensor([2.0, 0.0]))
    gamma = fusion_weights(model, test_data)
    assert gamma.shape == (len(test_data._dataset), 2)
    np.testing.assert_allclose(gamma.sum(1), 1, rtol=1e-6)
    if input_dependent:
        assert gamma[:, 0].std() > 0.01
    else:
        np.testing.assert_allclose(gamma[:, 0], 1 / (1 + np.exp(-2)), rtol=1e-6)
    with pytest.raises(UserError, match="one path alone"):
        fusion_weights(trained("STARRec", use_pma=False)[0], test_data)


def test_the_fused_output_is_the_weighted_sum(monkeypatch):
    """Weights of one path alone give that path's output."""
    model, _, (_, _, test_data) = trained("STARRec", input_dependent_fusion=True, dropout_prob=0.0)
    row = test_data._dataset[torch.arange(4)]
    scores = {}
    for path, bias in (("attention", [50.0, -50.0]), ("ssm", [-50.0, 50.0])):
        with torch.no_grad():
            model.layers[0].fusion_gate.weight.zero_()
            model.layers[0].fusion_gate.bias.copy_(torch.tensor(bias))
            fused = model.eval().full_sort_predict(row)
            monkeypatch.setattr(model.layers[0], "use_pma", path == "attention")
            monkeypatch.setattr(model.layers[0], "use_ssm", path == "ssm")
            alone = model.full_sort_predict(row)
            monkeypatch.undo()
        torch.testing.assert_close(fused, alone, msg=path)
        scores[path] = alone
    assert not torch.allclose(scores["attention"], scores["ssm"])


def test_expert_gates():
    model, _, (_, _, test_data) = trained("STARRec")
    with torch.no_grad():
        model.mixture.gate.weight.zero_()
        model.mixture.gate.bias.copy_(torch.tensor([30.0, 0.0, 0.0]))
    gates = expert_gates(model, test_data)
    np.testing.assert_allclose(gates, [[1, 0, 0]] * len(test_data._dataset), atol=1e-6)
    np.testing.assert_allclose(gate_entropy(gates), 0, atol=1e-6)
    np.testing.assert_allclose(gate_entropy(np.full((2, 4), 0.25)), 1)
    for switch in ({"use_moe": False}, {"moe_level": "position"}):
        with pytest.raises(UserError, match="no mixture of experts for histories"):
            expert_gates(trained("STARRec", **switch)[0], test_data)
    with pytest.raises(UserError, match="no mixture of experts for histories"):
        expert_gates(trained("Mamba4Rec")[0], test_data)


def test_a_broken_model_ranks_nothing_first():
    model, trainer, (_, _, test_data) = trained("Mamba4Rec")
    with torch.no_grad():
        model.item_embedding.weight.fill_(float("nan"))
    assert rank_targets(trainer, test_data).metrics([10])["recall@10"] == 0


def test_ranks_need_full_ranking():
    _, trainer, (_, _, test_data) = trained("Mamba4Rec", eval_args={"mode": "uni10"})
    with pytest.raises(UserError, match="ranks need full ranking of whole histories"):
        rank_targets(trainer, test_data)


def test_history_categories():
    _, _, (_, _, test_data) = trained("Mamba4Rec")
    dataset = test_data._dataset
    lines = ["item_id:token\tgenre:token_seq"]
    lines += [f"i{item}\t{'Drama' if item % 2 else 'Comedy War'}" for item in range(30) if item != 7]
    Path("tiny.item").write_text("\n".join(lines) + "\n")
    names, shares = history_categories(test_data, Path("tiny.item"), "genre")
    assert names == ["Comedy", "Drama", "War"]
    for i in range(len(dataset)):
        place = int(dataset.inter_feat[dataset.TARGET_POSITION][i])
        items = dataset.sorted_items[int(dataset.user_start[place]) : place].numpy()
        tokens = [int(token[1:]) for token in dataset.id2token("item_id", items)]
        known = [token for token in tokens if token != 7]
        drama = sum(token % 2 for token in known) / len(known)
        np.testing.assert_allclose(shares[i], [(1 - drama) / 2, drama, (1 - drama) / 2])
    with pytest.raises(UserError, match="has no column class:token_seq beside item_id: choose one of genre"):
        history_categories(test_data, Path("tiny.item"), "class")
