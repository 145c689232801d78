"""Features that STAR-Rec's preference-aware attention compares (arXiv 2505.03484, section 3.1.2)."""

from torch import Tensor

from recbole_ssm.ops.backend import choose
from recbole_ssm.ops.preference_features.reference import preference_features_reference


def preference_features(embedding: Tensor, gate_logits: Tensor, metric: Tensor, *, backend: str = "auto") -> Tensor:
    """Gated embeddings in each head's own metric space: ``metric_h * embedding_t * sigmoid(gate_logits_t)``.

    Their cosines are what :func:`recbole_ssm.ops.preference_attention` compares.

    Args:
        embedding: ``[T, d]``.
        gate_logits: ``[T, d]``.
        metric: ``[H, d]``.
        backend: see :mod:`recbole_ssm.ops.backend`; only ``reference`` and ``triton`` have this op.

    Returns:
        ``[T, H, d]``, in the dtype that a product of the three has.

    Raises:
        ValueError: shapes that do not fit, an unknown backend.
        BackendUnavailable: a backend that cannot run here.
    """
    fits = embedding.dim() == metric.dim() == 2 and embedding.shape == gate_logits.shape
    if not fits or embedding.shape[1] != metric.shape[1]:
        raise ValueError(
            f"embedding {list(embedding.shape)}, gate_logits {list(gate_logits.shape)} and metric "
            f"{list(metric.shape)} do not fit [T, d], [T, d] and [H, d]"
        )
    if choose("preference_features", backend, embedding, {"H": len(metric), "E": metric.shape[1]}) == "triton":
        from recbole_ssm.ops.preference_features.triton import preference_features_triton

        return preference_features_triton(embedding, gate_logits, metric)
    return preference_features_reference(embedding, gate_logits, metric)
