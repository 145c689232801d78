"""RecBole's models that do not run on today's stack as they are."""

from collections import Counter

import pytest
import recbole.model.general_recommender as general
import torch
from recbole.utils import get_model

from benchmarks.models import jobs
from recbole_ssm import Config, run_recbole
from recbole_ssm.compat import mended, scatter_mean, scatter_softmax
from recbole_ssm.data import create_dataset, data_preparation
from recbole_ssm.quick_start import build_model


def built(name, folder):
    jobs.write_dataset(folder)
    settings = jobs.stages(name, jobs.families()[name])[0]
    config = Config.from_settings({**settings, "model": name, "dataset": jobs.DATASET})
    train_data, *_ = data_preparation(config, create_dataset(config))
    return build_model(config, train_data), train_data._dataset


# One of each cause: a matrix that SciPy fills no more, one that wants torch_scatter too, dgl, a loss of
# one number, negatives beside a loss over all items, embeddings of entities in a file.
@pytest.mark.parametrize("name", ["SpectralCF", "KGIN", "KGAT", "TransRec", "SINE", "KSR"])
def test_a_model_of_each_cause_runs(name, empty_folder):
    jobs.write_dataset(empty_folder)
    (settings,) = jobs.stages(name, jobs.families()[name])
    result = run_recbole(name, jobs.DATASET, config_dict=settings)
    assert 0 <= result["test_result"]["ndcg@10"] <= 1


def test_the_adjacency_is_that_of_the_paper(empty_folder):
    model, dataset = built("LightGCN", empty_folder)
    adjacency = torch.zeros(model.n_users + model.n_items, model.n_users + model.n_items, dtype=torch.float64)
    users, items = dataset.inter_feat["user_id"], dataset.inter_feat["item_id"] + model.n_users
    adjacency[users, items] = adjacency[items, users] = 1
    degree = adjacency.sum(1, keepdim=True) + 1e-7
    expected = adjacency / degree.sqrt() / degree.sqrt().T
    torch.testing.assert_close(model.norm_adj_matrix.to_dense().double(), expected, rtol=1e-6, atol=1e-7)


def test_kgat_starts_from_row_means_of_each_relation(empty_folder):
    model, dataset = built("KGAT", empty_folder)
    graph = dataset.ckg_graph("coo", "relation_id")
    edges = list(zip(graph.row.tolist(), graph.col.tolist(), graph.data.tolist(), strict=True))
    degree = Counter((head, relation) for head, _, relation in edges)
    expected = Counter()
    for head, tail, relation in edges:
        expected[head, tail] += 1 / degree[head, relation]
    found = model.A_in.coalesce()
    ends = zip(*found.indices().tolist(), strict=True)
    assert expected == pytest.approx(dict(zip(ends, found.values().tolist(), strict=True)), rel=1e-6)


def test_scatters_are_sums_over_rows_of_one_index():
    src, index = torch.randn(7, 3, dtype=torch.float64, requires_grad=True), torch.tensor([4, 0, 2, 0, 0, 4, 2])
    mean, softmax = scatter_mean(src, index, dim=0, dim_size=6), scatter_softmax(src, index, dim=0)
    for i in range(6):
        rows = index == i
        torch.testing.assert_close(mean[i], src[rows].mean(0) if rows.any() else torch.zeros_like(src[0]))
        torch.testing.assert_close(softmax[rows], src[rows].softmax(0))
    assert torch.autograd.gradcheck(lambda x: scatter_mean(x, index, 0, 6), src)
    assert torch.autograd.gradcheck(lambda x: scatter_softmax(x, index, 0), src)


def test_recboles_classes_stay_as_they_are():
    assert mended(general.BPR) is general.BPR
    assert mended(general.LightGCN) is not general.LightGCN
    assert issubclass(mended(general.LightGCN), general.LightGCN)
    assert get_model("LightGCN") is general.LightGCN
    assert mended(general.LightGCN).__name__ == "LightGCN"
