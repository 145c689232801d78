"""Mixed precision: the weights of products, rounded once a step."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recbole_ssm.layers.mixture_of_experts import MixtureOfExperts


class _Rounded(torch.autograd.Function):
    """All weights in one launch each way; autocast takes one for each use that is not the whole of a parameter."""

    @staticmethod
    def forward(ctx, dtype, *weights):
        flat = torch.empty(sum(w.numel() for w in weights), dtype=dtype, device=weights[0].device)
        rounded = [part.view_as(w) for part, w in zip(flat.split([w.numel() for w in weights]), weights, strict=True)]
        torch._foreach_copy_(rounded, [w.detach() for w in weights])
        ctx.dtype = weights[0].dtype
        return tuple(rounded)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        exact = [torch.empty_like(g, dtype=ctx.dtype, memory_format=torch.contiguous_format) for g in gradients]
        torch._foreach_copy_(exact, gradients)
        return None, *exact


def rounded_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights that ``model`` only multiplies by, by their names, in ``dtype`` (:func:`torch.func.functional_call`).

    Those of linear layers and of experts, but no bias: the step size's is no summand of a product.
    """
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        names = ["weight"] if isinstance(module, nn.Linear) else []
        if isinstance(module, MixtureOfExperts):
            names = ["expand_weight", "contract_weight"]
        found |= {f"{prefix}.{name}".lstrip("."): getattr(module, name) for name in names}
    return dict(zip(found, _Rounded.apply(dtype, *found.values()), strict=True)) if found else {}
