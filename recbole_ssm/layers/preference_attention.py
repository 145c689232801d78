"""Preference-aware multi-head attention, the PMA path of STAR-Rec (arXiv 2505.03484, section 3.1.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_ssm.ops import preference_attention, preference_features
from recbole_ssm.ops.packing import select_rows


class PreferenceAwareAttention(nn.Module):
    """Attention whose scores add how alike two items are in each head's own metric space.

    With raw item embeddings ``e`` and layer input ``x``::

        g      = e * sigmoid(W_g e + b_g)                                    gated embedding
        S_h    = cos(m_h * g_i, m_h * g_j) where above tau_h, else 0         m_h: the head's metric vector
        A_h    = softmax(w1_h Q K^T / sqrt(D_k) + w2_h S_h)                  causal
        c      = concat_h(A_h V)
        out    = LayerNorm(x + dropout(W_o (c * SiLU(W_c c))))

    Args:
        hidden_size: width ``d``.
        n_heads: heads ``H``; must divide ``d``.
        dropout_prob: dropout rate.
        similarity_threshold: tau, one for all heads or one a head; a setting, not learned, for its step has no
            gradient.
        use_similarity: without it the scores are plain attention's (the paper's ablation).
        window: attend to at most this many latest positions; all where absent.
        residual: without it ``out`` leaves ``x`` away.

    Raises:
        ValueError: where ``n_heads`` does not divide ``d``, the thresholds are not one a head, or the window is empty.
    """

    threshold: Tensor

    def __init__(
        self,
        hidden_size: int,
        n_heads: int,
        dropout_prob: float,
        similarity_threshold: float | list[float] = 0.0,
        use_similarity: bool = True,
        window: int | None = None,
        residual: bool = True,
    ):
        super().__init__()
        if hidden_size % n_heads:
            raise ValueError(f"n_heads {n_heads} does not divide hidden_size {hidden_size}")
        if window is not None and window < 1:
            raise ValueError(f"attention_window is {window}, but at least the position itself must be seen")
        threshold = torch.as_tensor(similarity_threshold, dtype=torch.float32)
        if threshold.dim() and threshold.shape != (n_heads,):
            raise ValueError(f"similarity_threshold has {threshold.numel()} values for n_heads {n_heads}")
        self.n_heads, self.window = n_heads, window
        self.use_similarity, self.residual = use_similarity, residual
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.context_gate = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout_prob)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.score_weight = nn.Parameter(torch.ones(n_heads))
        if use_similarity:
            self.embedding_gate = nn.Linear(hidden_size, hidden_size)
            self.metric = nn.Parameter(torch.empty(n_heads, hidden_size).uniform_(0.5, 1.5))
            self.similarity_weight = nn.Parameter(torch.ones(n_heads))
        self.register_buffer("threshold", threshold.expand(n_heads).clone(), persistent=False)

    def forward(
        self, x: Tensor, item_embedding: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False
    ) -> Tensor:
        """Attend within each sequence.

        Args:
            x: layer input, ``[T, d]``.
            item_embedding: raw embeddings of the same items, ``[T, d]``.
            cu_seqlens: borders of the sequences, int32 ``[S+1]``.
            read: rows whose output is wanted, int64 ``[R]``; all where absent.
            last: promise that ``read`` is the last row of every sequence, which is all that is computed then.

        Returns:
            ``[T, d]`` or ``[R, d]``.
        """
        q, k, v = self.query_key_value(x).unflatten(-1, (3, self.n_heads, -1)).unbind(1)
        feature, similarity_weight = self._similarity(item_embedding)
        context = preference_attention(
            q, k, v, feature, self.score_weight, similarity_weight, self.threshold,
            cu_seqlens=cu_seqlens, window=self.window, queries="last" if last else "all",
        ).flatten(-2)  # fmt: skip
        context = context if last else select_rows(context, read)
        gated_context = context * F.silu(self.context_gate(context))
        out = self.dropout(self.out_proj(gated_context))
        return self.norm(select_rows(x, read) + out if self.residual else out)

    def _similarity(self, item_embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Features to compare, ``[T, H, d]``, and their weight, ``[H]``; nothing to compare, ``[T, 1, 1]``, without."""
        if not self.use_similarity:
            return item_embedding.new_zeros(len(item_embedding), 1, 1), torch.zeros_like(self.score_weight)
        feature = preference_features(item_embedding, self.embedding_gate(item_embedding), self.metric)
        return feature, self.similarity_weight
