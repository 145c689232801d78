"""Models give the same loss and gradients whatever their ops run on."""

import pytest
import torch

from recbole_ssm.registry import MODELS

from ..conftest import build


def loss_and_gradients(name, backend):
    torch.manual_seed(0)
    _, model, (train_data, *_) = build(name, ssm_backend=backend, train_batch_size=8, dropout_prob=0.0)
    batch = next(iter(train_data))
    torch.manual_seed(1)
    loss = model.calculate_loss(batch)
    loss = sum(loss) if isinstance(loss, tuple) else loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_triton_equals_the_reference(name):
    loss, gradients = loss_and_gradients(name, "triton")
    expected, wanted = loss_and_gradients(name, "reference")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(
            gradients[parameter], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, n=parameter: f"{n}: {m}"
        )
