"""A running average of a model's weights, which is evaluated and kept in the place of the weights themselves."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """Exponential moving average of a model's parameters: ``a <- b a + (1 - b) w`` after each step.

    In step ``n`` ``b`` is at most ``n / (n + 9)``, so that the first weights are soon forgotten (TensorFlow's
    ``ExponentialMovingAverage``). :class:`torch.optim.swa_utils.AveragedModel` counts steps on the device, which a
    GPU would be waited for at each of them, and evaluates a copy of the model, in which what some of RecBole's keep of
    their weights (LightGCN's propagated embeddings) would grow old.

    Args:
        model: whose parameters are averaged.
        decay: ``b``, from 0 to below 1.

    Attributes:
        steps: how many were averaged.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        self._weights = [parameter.detach() for parameter in model.parameters()]
        self._average = [weight.clone() for weight in self._weights]

    def update(self) -> None:
        """Take the weights of one more step in."""
        self.steps += 1
        torch._foreach_lerp_(self._average, self._weights, 1 - min(self.decay, self.steps / (self.steps + 9)))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the average as its weights, in place, so that whatever refers to them reads it."""
        trained = [weight.clone() for weight in self._weights]
        torch._foreach_copy_(self._weights, self._average)
        try:
            yield
        finally:
            torch._foreach_copy_(self._weights, trained)

    def start_from(self, steps: int) -> None:
        """Make the model's weights the average after so many steps."""
        self.steps = steps
        torch._foreach_copy_(self._average, self._weights)
