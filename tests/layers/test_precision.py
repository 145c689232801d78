import pytest
import torch
from torch.func import functional_call

from recbole_ssm.layers.precision import rounded_weights
from recbole_ssm.registry import MODELS
from recbole_ssm.trainer import _Loss

from ..conftest import build
from ..launches import count_launches


@pytest.mark.parametrize("name", MODELS)
def test_rounded_once_all_is_as_autocast_rounds_it(name):
    # The reference, for the compiled kernels would first be compiled for bfloat16.
    _, model, (train_data, *_) = build(name, train_batch_size=32, dropout_prob=0.0, ssm_backend="reference")
    batch, module = next(iter(train_data)), _Loss(model)

    def gradients(weights):
        torch.manual_seed(0)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            losses = functional_call(module, weights(), (batch,)) if weights else module(batch)
        losses = losses if isinstance(losses, tuple) else (losses,)
        sum(losses).backward()
        return {name: p.grad for name, p in model.named_parameters()} | {"loss": torch.stack(losses).detach()}

    expected = gradients(None)
    found = gradients(lambda: rounded_weights(module, torch.bfloat16))
    assert all(value.dtype == torch.float32 for value in found.values())
    for parameter, value in expected.items():  # a weight that is used twice sums two gradients in bfloat16
        assert (found[parameter] - value).norm() <= 2**-8 * value.norm() + 1e-7, parameter


def test_one_launch_each_way():
    _, model, _ = build("STARRec")
    module = _Loss(model.to("meta"))
    names = [name for name, _ in module.named_parameters()]
    weights = {}
    launches = count_launches(lambda: weights.update(rounded_weights(module, torch.bfloat16)))
    assert launches.total() == 1
    assert set(weights) < set(names)
    assert "model.item_embedding.weight" not in weights
    assert not any(name.endswith("bias") for name in weights)
