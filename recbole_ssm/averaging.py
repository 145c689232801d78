"""A running average of a model's weights, which is evaluated and kept in the place of the weights themselves."""

from copy import deepcopy
from typing import Any

import torch
from torch import nn


class WeightAverage:
    """Exponential moving average of a model's parameters: ``a <- b a + (1 - b) w`` after each step.

    In step ``n`` ``b`` is at most ``n / (n + 9)``, so that the first weights are soon forgotten (TensorFlow's
    ``ExponentialMovingAverage``). :class:`torch.optim.swa_utils.AveragedModel` counts steps on the device, which a
    GPU would be waited for at each of them.

    Args:
        model: whose parameters are averaged; what else it holds is taken as it is when :meth:`update` is called.
        decay: ``b``, from 0 to below 1.

    Attributes:
        model: a copy of the model with the average.
        steps: how many were averaged.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        self.model = deepcopy(model).requires_grad_(False)
        self._weights, self._average = ([p.detach() for p in m.parameters()] for m in (model, self.model))
        self._buffers = list(zip(self.model.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of one more step in."""
        self.steps += 1
        torch._foreach_lerp_(self._average, self._weights, 1 - min(self.decay, self.steps / (self.steps + 9)))
        for copy, buffer in self._buffers:
            copy.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"steps": self.steps, "state_dict": self.model.state_dict()}
