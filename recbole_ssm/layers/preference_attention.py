"""Preference-aware multi-head attention, the PMA path of STAR-Rec (arXiv 2505.03484, section 3.1.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_ssm.ops import preference_attention, preference_features
from recbole_ssm.ops.packing import ring_places, select_rows


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
        context = self._context(x, item_embedding, cu_seqlens, self.window, last)
        return self._output(x, context if last else select_rows(context, read), read)

    def _context(self, x: Tensor, item_embedding: Tensor, cu_seqlens: Tensor, window: int | None, last: bool) -> Tensor:
        """What rows get of those they attend to, ``[T, d]``; of the last rows alone ``[S, d]``."""
        q, k, v = self.query_key_value(x).unflatten(-1, (3, self.n_heads, -1)).unbind(1)
        feature, similarity_weight = self._similarity(item_embedding)
        return preference_attention(
            q, k, v, feature, self.score_weight, similarity_weight, self.threshold,
            cu_seqlens=cu_seqlens, window=window, queries="last" if last else "all",
        ).flatten(-2)  # fmt: skip

    def _output(self, x: Tensor, context: Tensor, read: Tensor | None = None) -> Tensor:
        """The layer's output for the rows ``read`` of ``x [T, d]`` with their ``context [R, d]``: ``[R, d]``."""
        gated_context = context * F.silu(self.context_gate(context))
        out = self.dropout(self.out_proj(gated_context))
        return self.norm(select_rows(x, read) + out if self.residual else out)

    def initial_state(self, count: int, length: int) -> dict[str, Tensor]:
        """Room for the keys, values and compared embeddings of the latest ``length`` rows of ``count`` sequences.

        Returns:
            ``key``, ``value`` and, with similarity, ``gated``, each ``[count, min(length, window), d]``. Row ``p`` of
            a sequence stands in place ``p`` modulo their number.
        """
        length = length if self.window is None else min(length, self.window)
        names = ("key", "value", "gated") if self.use_similarity else ("key", "value")
        return {name: self.score_weight.new_zeros(count, length, self.out_proj.in_features) for name in names}

    def prefill(
        self, x: Tensor, item_embedding: Tensor, cu_seqlens: Tensor, length: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`forward` of whole sequences, and what :meth:`step` goes on from.

        Args:
            x: as of :meth:`forward`, as the next two.
            item_embedding: ``[T, d]``.
            cu_seqlens: int32 ``[S+1]``.
            length: see :meth:`initial_state`.
        """
        state = self.initial_state(len(cu_seqlens) - 1, length)
        places = state["key"].shape[1]
        kept, at = ring_places(cu_seqlens, places)
        state = {name: state[name].index_put(at, row[kept]) for name, row in self._kept(x, item_embedding).items()}
        return self._output(x, self._context(x, item_embedding, cu_seqlens, places, last=False)), state

    def step(
        self, x: Tensor, item_embedding: Tensor, position: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One more row of each of ``S`` sequences, which attends to itself and to those that the state holds.

        Args:
            x: ``[S, d]``.
            item_embedding: raw embeddings of the same items, ``[S, d]``.
            position: how many rows each sequence had before, int64 ``[S]``.
            state: as of :meth:`initial_state`, where these rows are put.

        Returns:
            ``[S, d]`` and the state after these rows.
        """
        count, places = state["key"].shape[:2]
        at = torch.arange(count, device=x.device), position % places
        state = {name: state[name].index_put(at, row) for name, row in self._kept(x, item_embedding).items()}
        q = self.query_key_value(x)[:, None, : x.shape[1]]
        own = state["gated"][at][:, None] if self.use_similarity else None
        seen = torch.arange(places, device=x.device) <= position[:, None]
        return self._output(x, self._attend(q, own, state, seen[:, None])[:, 0]), state

    def _attend(self, q: Tensor, own: Tensor | None, state: dict[str, Tensor], seen: Tensor) -> Tensor:
        """What ``Q`` rows of each of ``S`` sequences get of the ``L`` whose keys and values are at hand.

        Args:
            q: queries, ``[S, Q, d]``.
            own: their gated embeddings, ``[S, Q, d]``, where similarity is used.
            state: of :meth:`_kept`, each ``[S, L, d]``.
            seen: which rows they attend to, bool ``[S or 1, Q, L]``.

        Returns:
            ``[S, Q, d]``.
        """
        q, k, v = (one.unflatten(-1, (self.n_heads, -1)) for one in (q, state["key"], state["value"]))
        scores = torch.einsum("sqhp,slhp->shql", q, k) * (self.score_weight[:, None, None] / q.shape[-1] ** 0.5)
        if own is not None:
            # cos(m g_i, m g_j) of all heads' metrics m at once, by products with m^2.
            gated, squared = state["gated"], self.metric.square()
            lengths = torch.einsum("sld,hd->shl", gated.square(), squared).sqrt()
            own_length = torch.einsum("sqd,hd->shq", own.square(), squared).sqrt()
            similarity = torch.einsum("sqhd,sld->shql", own[:, :, None] * squared, gated)
            similarity = similarity / (lengths.clamp_min(1e-12)[:, :, None] * own_length.clamp_min(1e-12)[..., None])
            above = similarity > self.threshold[:, None, None]
            scores = scores + self.similarity_weight[:, None, None] * similarity * above
        attention = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        return torch.einsum("shql,slhp->sqhp", attention, v).flatten(-2)

    def _kept(self, x: Tensor, item_embedding: Tensor) -> dict[str, Tensor]:
        """What later rows read of these, each ``[T, d]``."""
        _, key, value = self.query_key_value(x).chunk(3, -1)
        kept = {"key": key, "value": value}
        if self.use_similarity:
            kept["gated"] = item_embedding * torch.sigmoid(self.embedding_gate(item_embedding))
        return kept

    def _similarity(self, item_embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Features to compare, ``[T, H, d]``, and their weight, ``[H]``; nothing to compare, ``[T, 1, 1]``, without."""
        if not self.use_similarity:
            return item_embedding.new_zeros(len(item_embedding), 1, 1), torch.zeros_like(self.score_weight)
        feature = preference_features(item_embedding, self.embedding_gate(item_embedding), self.metric)
        return feature, self.similarity_weight
