"""A search of many columns in one pass."""

import pytest
import torch

from recbole_ssm.serving import top_items


@pytest.mark.parametrize(("count", "k"), [(16, 1), (5, 5), (1000, 1), (1003, 3), (5000, 10), (5000, 5000)])
@pytest.mark.parametrize("values", ["all different", "many alike", "most left out"])
def test_groups_find_what_one_search_finds(count, k, values, monkeypatch):
    monkeypatch.setattr(top_items, "SMALLEST_GROUP", 2)
    generator = torch.Generator().manual_seed(count + k)
    scores = torch.randn(7, count + 1, generator=generator)
    if values == "many alike":
        scores = scores.round()
    if values == "most left out":
        scores[scores < 2] = -torch.inf
    scores = scores[:, 1:]  # as a model of RecBole's gives them, without the padding
    best, where = top_items._topk(scores, k)
    assert torch.equal(best, scores.topk(k)[0])
    assert torch.equal(best, scores.gather(1, where))
    assert all(len(row.unique()) == k for row in where)
