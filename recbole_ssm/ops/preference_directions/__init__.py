"""Unit vectors that STAR-Rec's preference-aware attention compares (arXiv 2505.03484, section 3.1.2)."""

from torch import Tensor

from recbole_ssm.ops.backend import choose
from recbole_ssm.ops.preference_directions.reference import preference_directions_reference


def preference_directions(embedding: Tensor, gate_logits: Tensor, metric: Tensor, *, backend: str = "auto") -> Tensor:
    """Directions of gated embeddings in each head's own metric space.

    ``out_h[t] = v / max(|v|, 1e-12)`` with ``v = metric_h * embedding_t * sigmoid(gate_logits_t)``, so that inner
    products of two rows are the cosines that :func:`recbole_ssm.ops.preference_attention` takes with ``normalized``.

    Args:
        embedding: ``[T, d]``.
        gate_logits: ``[T, d]``.
        metric: ``[H, d]``.
        backend: see :mod:`recbole_ssm.ops.backend`; only ``reference`` and ``triton`` have this op.

    Returns:
        ``[T, H, d]``, in at least float32 whatever the inputs' dtype.

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
    if choose("preference_directions", backend, embedding) == "triton":
        from recbole_ssm.ops.preference_directions.triton import preference_directions_triton

        return preference_directions_triton(embedding, gate_logits, metric)
    return preference_directions_reference(embedding, gate_logits, metric)
