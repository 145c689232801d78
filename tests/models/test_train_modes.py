"""One pass over a sequence is exactly RecBole's rows, summed."""

import numpy as np
import pytest
import torch

from recbole_ssm.errors import UserError

from ..conftest import build


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("STARRec", {"num_layers": 1}),
        ("STARRec", {"num_layers": 2}),
        ("Mamba4Rec", {"num_layers": 1}),
        ("Mamba4Rec", {"num_layers": 2}),
        ("Mamba4Rec", {"num_layers": 2, "ssm_block": "mamba3"}),
        ("RecBLR", {"num_layers": 2}),
        ("TiM4Rec", {"time_dropout_prob": 0.0}),
        ("SS4Rec", {}),
        ("SS4Rec", {"request_time": "known"}),
        ("eSASRec", {"loss_type": "CE"}),
        ("SSD4Rec", {"num_layers": 2, "bidirectional": False}),
        ("SSD4Rec", {"num_layers": 1}),
        ("SSD4Rec", {"num_layers": 1, "d_conv": 2, "norm_embedding": False}),
        ("SSD4Rec", {"num_layers": 1, "backward_stream": "aligned"}),
        ("SSD4Rec", {"num_layers": 1, "backward_stream": "aligned", "d_conv": 2, "norm_embedding": False}),
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-7)], ids=str)
def test_sequence_mode_equals_prefix_rows(name, own, dtype, tolerance):
    """Float32 through the compiled scan, float64 through the reference; errors are relative to the largest gradient."""
    settings = {"dropout_prob": 0.0, "train_batch_size": 10_000, "MAX_ITEM_LIST_LENGTH": 30, **own}
    if name == "SSD4Rec":
        settings |= {"mask_ratio": 0.0, "beta": 1.0}  # the published 0.1 would hide the backward stream's errors
    _, model, (sequences, _, _) = build(name, train_mode="sequence", **settings)
    _, _, (prefixes, _, _) = build(name, train_mode="prefix", **settings)
    model.to(dtype)
    results = []
    for loader in (sequences, prefixes):
        (batch,) = list(loader)
        model.zero_grad()
        loss = model.calculate_loss(batch)
        loss = sum(loss) if isinstance(loss, tuple) else loss
        (loss * len(batch)).backward()
        results.append((len(batch), loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    (count, loss, gradients), (expected_count, expected_loss, expected) = results
    assert count == expected_count
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    scale = max(gradient.abs().max() for gradient in expected.values())
    for parameter, gradient in gradients.items():
        difference = (gradient - expected[parameter]).abs().max() / scale
        assert difference < tolerance, f"{parameter}: {difference}"


@pytest.mark.parametrize("mode", ["sequence", "prefix"])
@pytest.mark.parametrize("loss_type", ["BPR", "BCE"])
@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_negatives_avoid_the_target(mode, loss_type, distribution):
    arguments = {"distribution": distribution, "sample_num": 3}
    _, _, (train_data, _, _) = build("Mamba4Rec", train_mode=mode, loss_type=loss_type, train_neg_sample_args=arguments)
    for batch in train_data:
        if mode == "sequence":
            assert batch.negatives.shape == (len(batch), 3)
            assert (batch.negatives != batch.targets[:, None]).all()
        else:
            assert (batch["neg_item_id"] != batch["item_id"]).all()


def test_losses_are_their_formulas():
    _, model, _ = build("Mamba4Rec", loss_type="CE")
    hidden, positives = torch.randn(4, 16), torch.tensor([1, 2, 3, 4])
    negatives = torch.tensor([[5, 6], [7, 8], [9, 1], [2, 3]])
    scores = hidden @ model.item_embedding.weight.T
    r = scores.gather(1, positives[:, None])
    n = scores.gather(1, negatives)
    expected = {
        "CE": -(r[:, 0] - scores.logsumexp(1)).mean(),
        "BCE": (-r.sigmoid().log() - (1 - n.sigmoid()).log()).mean(),
        "BPR": -(r - n).sigmoid().log().mean(),
    }
    for loss_type, value in expected.items():
        model.loss_type = loss_type
        torch.testing.assert_close(model.ranking_loss(hidden, positives, negatives), value)
    with pytest.raises(UserError, match="needs train_neg_sample_args"):
        model.ranking_loss(hidden, positives, None)


def test_expert_terms_are_their_formulas():
    from recbole_ssm.layers.mixture_of_experts import expert_diversity, load_balance

    experts = torch.randn(3, 5, 4, dtype=torch.float64)
    expected = np.mean(
        [
            torch.cosine_similarity(experts[i, m].float(), experts[j, m].float(), dim=0).item() ** 2
            for m in range(5)
            for i in range(3)
            for j in range(3)
            if i != j
        ]
    )
    assert expert_diversity(experts).item() == pytest.approx(expected, rel=1e-5)
    assert expert_diversity(experts[:1]) == 0
    assert load_balance(torch.full((6, 4), 0.25)).item() == pytest.approx(0)
    assert load_balance(torch.eye(4)[[1, 1]]).item() == pytest.approx(3)
