"""What STAR-Rec's parts do for each user: the fusion's weights and the gate of its experts."""

import numpy as np
import torch
from torch import Tensor, nn

from recbole_ssm.errors import UserError
from recbole_ssm.models.starrec import DualPathLayer, STARRec


@torch.no_grad()
def _outputs(model: STARRec, eval_data, module: nn.Module) -> Tensor:
    """What ``module`` returns for the last position of every row of ``eval_data``, in the loader's order."""
    model.eval()
    device = next(model.parameters()).device
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.float().cpu()))
    try:
        for rows, *_ in eval_data:
            model.full_sort_predict(rows.to(device))
    finally:
        hook.remove()
    return torch.cat(seen)


def fusion_weights(model: STARRec, eval_data) -> np.ndarray:
    """gamma_1 (attention) and gamma_2 (state space) of eq. 3 in the last layer, for every row, ``[N, 2]``.

    Args:
        model: a STARRec with both paths; its rows differ with ``input_dependent_fusion`` alone.
        eval_data: validation or test loader.

    Raises:
        UserError: for a model that has a single path.
    """
    layer = model.layers[-1]
    assert isinstance(layer, DualPathLayer)
    if not (layer.use_pma and layer.use_ssm):
        raise UserError("this model has one path alone (use_pma or use_ssm is off), so nothing is fused.")
    if layer.fusion_gate is not None:
        return _outputs(model, eval_data, layer.fusion_gate).softmax(-1).numpy()
    gamma = layer.fusion_logits.detach().cpu().softmax(0)
    return gamma.expand(len(eval_data._dataset), 2).numpy()


def expert_gates(model: STARRec, eval_data) -> np.ndarray:
    """The gate ``G`` of section 3.1.5 for every row's representation, ``[N, E]``, rows summing to 1.

    Args:
        model: a STARRec with its mixture of experts.
        eval_data: validation or test loader.

    Raises:
        UserError: for a model without one, or whose mixture routes positions instead of histories.
    """
    mixture = model.mixture if isinstance(model, STARRec) else None
    if mixture is None or model.routes_positions:
        raise UserError("this model has no mixture of experts for histories (use_moe is off, or moe_level: position).")
    return _outputs(model, eval_data, mixture.gate).softmax(-1).numpy()


def gate_entropy(gates: np.ndarray) -> np.ndarray:
    """Entropy of each row's gate in units of its largest, ``[N]``: 0 for one expert alone, 1 for all alike."""
    logs = np.log(np.maximum(gates, np.finfo(gates.dtype).tiny))
    return -(gates * logs).sum(1) / np.log(max(2, gates.shape[1]))
