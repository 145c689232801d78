"""What every registered model makes of times, by each of the settings."""

import pytest
import torch

from recbole_ssm import UserError
from recbole_ssm.data.context import column
from recbole_ssm.ops.packing import last_rows
from recbole_ssm.registry import MODELS

from ..conftest import build, small_config

LONG = 10_000  # gaps are below it here

OPTIONS = {
    "gaps": {"use_time_gaps": True},
    "clock": {"use_clock": True},
    "request": {"use_time_gaps": True, "use_clock": True, "request_time": "known"},
}
ADDED = {
    "gaps": ("gap_bucket",),
    "clock": ("hour", "weekday"),
    "request": ("gap_bucket", "hour", "weekday", "next_gap_bucket", "next_hour", "next_weekday"),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_times_are_read_where_they_are_known(name, option):
    _, model, (train_data, _, _) = build(name, num_layers=1, **OPTIONS[option])
    assert model.columns[: len(ADDED[option])] == ADDED[option]
    loss = model.train().calculate_loss(next(iter(train_data)))
    (sum(loss) if isinstance(loss, tuple) else loss).backward()
    embeddings = {n: p for n, p in model.named_parameters() if "time_gap_embed" in n or "hour" in n or "weekday" in n}
    assert len(embeddings) == len(ADDED[option])
    for weights, tensor in embeddings.items():
        assert tensor.grad.abs().max() > 0, weights

    model.double().eval()  # TiM4Rec's times change little before it has learned
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) or (name == "TiM4Rec" and isinstance(module, torch.nn.Linear)):
            torch.nn.init.normal_(module.weight, std=0.4, generator=generator)
    kinds = [model.n_items - 1, *(column(name).kinds or LONG for name in model.columns)]
    items = torch.stack([torch.randint(1, kind, (9,), generator=generator) for kind in kinds], 1)
    prefixes = [(begin, end) for begin, stop in ((0, 6), (6, 9)) for end in range(begin + 1, stop + 1)]
    alone = torch.cat([items[begin:end] for begin, end in prefixes])
    borders = torch.tensor([0, *(end - begin for begin, end in prefixes)]).cumsum(0).int()
    with torch.no_grad():
        expected = model.encode(alone, borders, read=last_rows(borders), last=True)
        if model.one_pass:  # a position's output is that of its prefix, so nothing that comes later is in it
            together = model.encode(items, torch.tensor([0, 6, 9], dtype=torch.int32))
            torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
        for place, kind in enumerate(kinds):
            changed = alone.clone()
            changed[-1, place] = (changed[-1, place] + kind // 2) % kind if kind != LONG else 0
            other = model.encode(changed, borders, read=last_rows(borders), last=True)
            torch.testing.assert_close(other[:-1], expected[:-1], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(other[-1], expected[-1], rtol=1e-9, atol=0), ("id", *model.columns)[place]


def test_rows_made_beforehand_have_no_times():
    _, _, (_, _, test_data) = build("Mamba4Rec")
    rows = test_data._dataset[torch.arange(2)]
    timed = build("Mamba4Rec", use_clock=True)[1]
    with pytest.raises(UserError, match="reads times, which rows that are made beforehand"):
        timed.full_sort_predict(rows)


def test_a_time_that_nobody_reads_is_refused():
    with pytest.raises(UserError, match="Mamba4Rec, as it is set, does not read it: set use_time_gaps or use_clock"):
        small_config("Mamba4Rec", request_time="known")
