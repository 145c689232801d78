"""How alike a mixture's experts answer: STAR-Rec's diversity term (arXiv 2505.03484, section 3.1.5)."""

import torch
from torch import Tensor

from recbole_ssm.ops.backend import choose
from recbole_ssm.ops.expert_diversity.reference import expert_diversity_reference


def expert_diversity(
    experts: Tensor, weights: Tensor | None = None, scale: float = 1.0, *, backend: str = "auto"
) -> Tensor:
    """How alike the experts answer: the mean over sequences and pairs ``i != j`` of ``cos(expert_i, expert_j)^2``.

    0 where all experts' outputs are orthogonal, 1 where they are parallel; times ``scale``. The paper names a diversity
    regulariser (``L_div``) without giving its form; this is ours.

    Args:
        experts: outputs, ``[E, M, d]``; of each representation's chosen experts, ``[k, M, d]``.
        weights: what each representation counts, ``[M]``, summing to 1, a constant; all alike where absent.
        scale: a factor.
        backend: see :mod:`recbole_ssm.ops.backend`; only ``reference`` and ``triton`` have this op.

    Returns:
        A scalar, in at least float32; NaN where there are neither representations nor weights, as torch's mean.

    Raises:
        ValueError: shapes that do not fit, an unknown backend.
        BackendUnavailable: a backend that cannot run here.
        RuntimeError: by a second backward pass through the same result of ``triton``, which keeps its gradient for one.
    """
    if experts.dim() != 3 or (weights is not None and weights.shape != experts.shape[1:2]):
        shape = None if weights is None else list(weights.shape)
        raise ValueError(f"experts {list(experts.shape)} and weights {shape} do not fit [E, M, d] and [M]")
    if len(experts) < 2:
        return experts.new_zeros(())
    weights = None if weights is None else weights.detach()
    sizes = {"K": len(experts), "E": experts.shape[2]}
    if choose("expert_diversity", backend, experts, sizes) == "triton":
        from recbole_ssm.ops.expert_diversity.triton import expert_diversity_triton

        return expert_diversity_triton(experts, weights, scale)
    with torch.autocast(experts.device.type, enabled=False):
        return scale * expert_diversity_reference(experts, weights)
