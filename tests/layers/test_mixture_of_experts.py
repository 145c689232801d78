"""Routing to some experts, against the mixture of all of them."""

import pytest
import torch

from recbole_ssm.layers import MixtureOfExperts
from recbole_ssm.layers.mixture_of_experts import expert_diversity, load_balance


def mixtures(k, n_experts=5, width=6, count=17):
    torch.manual_seed(0)
    dense = MixtureOfExperts(width, n_experts, 0.0).double()
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter)
    sparse = MixtureOfExperts(width, n_experts, 0.0, experts_per_token=k).double()
    sparse.load_state_dict(dense.state_dict())
    return dense, sparse, torch.randn(count, width, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 17])
def test_chosen_experts_are_those_of_the_whole_mixture(k, count):
    dense, sparse, y = mixtures(k, count=count)
    whole, some = dense(y), sparse(y)
    kept = torch.zeros_like(whole.gate).scatter(1, some.chosen, 1.0) * whole.gate
    expected = dense.norm(y + torch.einsum("me,emd->md", kept, whole.experts))
    torch.testing.assert_close(some.output, expected)
    assert some.chosen.shape == (count, k)
    if count:
        assert (kept.sum(1) >= whole.gate.topk(k).values.sum(1) - 1e-12).all()
    taken = whole.experts.gather(0, some.chosen.T[..., None].expand(-1, -1, 6))
    torch.testing.assert_close(some.experts, taken)
    weights = torch.randn_like(expected)
    found = torch.autograd.grad((some.output * weights).sum(), list(sparse.parameters()))
    wanted = torch.autograd.grad((expected * weights).sum(), list(dense.parameters()))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_all_chosen_is_the_whole_mixture():
    dense, sparse, y = mixtures(5)
    torch.testing.assert_close(sparse(y).output, dense(y).output)
    torch.testing.assert_close(expert_diversity(sparse(y).experts), expert_diversity(dense(y).experts))


def test_load_balance_counts_what_was_chosen():
    even = torch.full((8, 4), 0.25)
    assert load_balance(even).item() == pytest.approx(0)
    assert load_balance(even, torch.arange(8)[:, None] % 4).item() == pytest.approx(0)
    one = torch.eye(4)[:1].expand(8, -1)
    assert load_balance(one).item() == pytest.approx(3)
    assert load_balance(one, torch.zeros(8, 1, dtype=torch.int64)).item() == pytest.approx(3)
    gate = torch.tensor([[0.7, 0.3], [0.6, 0.4]])
    assert load_balance(gate, torch.zeros(2, 1, dtype=torch.int64)).item() == pytest.approx(2 * 0.65 - 1)


@pytest.mark.parametrize("k", [0, 6])
def test_as_many_experts_as_there_are(k):
    with pytest.raises(ValueError, match="experts_per_token is"):
        MixtureOfExperts(6, 5, 0.0, experts_per_token=k)


def test_what_is_added_to_the_loss_is_exact_under_autocast():
    """Rounded to bfloat16, a gate that is nearly even would count as even."""
    generator = torch.Generator().manual_seed(0)
    gate = torch.softmax(0.01 * torch.randn(64, 8, generator=generator), -1)
    experts, weights = torch.randn(4, 64, 6, generator=generator), torch.full((64,), 1 / 64)

    def terms():
        return load_balance(gate, target_weights=weights), expert_diversity(experts, weights, backend="reference")

    expected = terms()
    with torch.autocast("cpu", torch.bfloat16):
        found = terms()
    for own, other in zip(found, expected, strict=True):
        assert own.dtype == torch.float32
        assert torch.equal(own, other)
