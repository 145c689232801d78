"""Position-wise feed-forward network."""

from collections.abc import Callable

from torch import Tensor, nn

from recbole_ssm.layers.gelu import gelu


class FeedForward(nn.Module):
    """``LayerNorm(x + dropout(W2 dropout(GELU(W1 x))))`` (Mamba4Rec, arXiv 2403.03900, section 3.3).

    Args:
        hidden_size: width ``d`` of the input and the output.
        dropout_prob: dropout rate.
        dropout_last: drop out after the LayerNorm rather than before the residual sum, as SSD4Rec's released code.
        activation: in the place of GELU.
        inner_dropout: without it nothing is dropped between the projections, as in BSARec's released code.
    """

    def __init__(
        self,
        hidden_size: int,
        dropout_prob: float,
        dropout_last: bool = False,
        activation: Callable[[Tensor], Tensor] = gelu,
        inner_dropout: bool = True,
    ):
        super().__init__()
        self.expand = nn.Linear(hidden_size, 4 * hidden_size)
        self.contract = nn.Linear(4 * hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout_prob)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.dropout_last, self.activation, self.inner_dropout = dropout_last, activation, inner_dropout

    def forward(self, x: Tensor) -> Tensor:
        """``[T, d]`` to ``[T, d]``."""
        hidden = self.activation(self.expand(x))
        hidden = self.contract(self.dropout(hidden) if self.inner_dropout else hidden)
        if self.dropout_last:
            return self.dropout(self.norm(hidden + x))
        return self.norm(self.dropout(hidden) + x)
