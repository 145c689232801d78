"""A depthwise causal convolution with its state."""

from torch import Tensor, nn

from recbole_ssm.ops import causal_conv


class CausalConv1d(nn.Conv1d):
    """Depthwise causal convolution over packed sequences, then SiLU (:func:`recbole_ssm.ops.causal_conv`).

    Called as it is, it is torch's on padded ``[S, D, K-1+L]``, without SiLU. Its parameters are torch's, and start as
    those do.

    Args:
        channels: width of the rows, ``D``.
        d_conv: how many rows it reads, ``K``.
        backend: see :func:`recbole_ssm.ops.causal_conv`.
    """

    def __init__(self, channels: int, d_conv: int, backend: str = "auto"):
        super().__init__(channels, channels, d_conv, groups=channels)
        self.backend = backend

    def packed(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Rows ``[T, D]`` of sequences with the borders ``cu_seqlens``, int32 ``[S+1]``, to as many."""
        weight = self.weight.squeeze(1)
        return causal_conv(x, weight, self.bias, "silu", cu_seqlens=cu_seqlens, backend=self.backend)

    def initial_state(self, count: int) -> Tensor:
        """What :meth:`carry` starts ``count`` sequences with: no rows before, zeros ``[S, D, K-1]``."""
        return self.weight.new_zeros(count, self.out_channels, self.kernel_size[0] - 1)

    def carry(self, x: Tensor, cu_seqlens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """More rows of each sequence, after those of its ``state``; returns them and the state after them."""
        return causal_conv(
            x, self.weight.squeeze(1), self.bias, "silu", initial_state=state, return_final_state=True,
            cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip
