"""The counting of launches itself."""

import pytest
import torch
from torch import nn

from recbole_ssm.ops import causal_conv
from recbole_ssm.ops.packing import cu_seqlens_from_lengths

from .launches import count_launches, kernels_counted, optimizers_fused


def test_a_step_is_counted_by_operator():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Dropout(0.1), nn.RMSNorm(4)).to("meta")
    with optimizers_fused():
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
    x = torch.zeros(3, 4, device="meta")
    on_host = torch.arange(5)

    def step():
        optimizer.zero_grad()
        assert on_host.sum().item() == 10
        model(x[1:].view(2, 4)).sum().backward()
        optimizer.step()

    count_launches(step)  # which makes the optimizer's state
    forward = {"mm": 1, "native_dropout": 1, "native_layer_norm": 1, "sum": 1}
    backward = {"ones_like": 1, "native_layer_norm_backward": 1, "native_dropout_backward": 1, "mm": 1}
    update = {"_foreach_add_": 1, "_fused_adam_": 1}
    assert count_launches(step) == {**forward, **backward, **update, "mm": 2}


def test_kernels_are_counted_and_not_run():
    x = torch.full((5, 2), torch.nan)
    counts = count_launches(lambda: None)
    cu_seqlens = cu_seqlens_from_lengths(torch.tensor([2, 3]))
    with kernels_counted(counts):
        causal_conv(x, torch.ones(2, 3), cu_seqlens=cu_seqlens, backend="triton")
    assert counts == {"causal_conv.triton._forward": 1}


@pytest.mark.parametrize(
    "read", [torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.nonzero, lambda t: t[0].item(), lambda t: t[t > 0]]
)
def test_a_read_of_the_device_raises(read):
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        count_launches(lambda: read(torch.ones(3, device="meta")))
