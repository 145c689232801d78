"""GELU of packed batches."""

import pytest
import torch
import torch.nn.functional as F

from recbole_ssm.layers.gelu import gelu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(7, 5), (1, 5), (0, 5), (7, 1), (2, 7, 5), (2, 0, 5), (2, 1, 5)], ids=str)
def test_it_is_that_of_torch(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    weight = torch.arange(1, x.numel() + 1, dtype=dtype).reshape(shape)
    found, expected = gelu(x), F.gelu(x)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients)
