"""Mamba-2 block (arXiv 2405.21060, section 7) over packed sequences."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_ssm.layers.mamba import initial_step_sizes, inverse_softplus
from recbole_ssm.ops import causal_conv, ssd


class Mamba2(nn.Module):
    """One Mamba-2 block with a single B/C group; sizes named as in the paper.

    Args:
        d_model: width of the input and the output.
        d_state: states, ``N``.
        d_conv: width of the causal convolution.
        expand: inner width as a multiple of ``d_model``.
        headdim: width of a head, ``P``; must divide ``expand * d_model``.
        backend: see :func:`recbole_ssm.ops.ssd`.

    Raises:
        ValueError: where ``headdim`` does not divide the inner width.
    """

    def __init__(self, d_model: int, d_state: int, d_conv: int, expand: int, headdim: int, backend: str = "auto"):
        super().__init__()
        self.d_inner, self.d_state, self.headdim, self.backend = expand * d_model, d_state, headdim, backend
        if self.d_inner % headdim:
            raise ValueError(f"headdim {headdim} does not divide expand * hidden_size = {self.d_inner}")
        heads = self.d_inner // headdim
        d_conv_in = self.d_inner + 2 * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + d_conv_in + heads, bias=False)
        self.conv = nn.Conv1d(d_conv_in, d_conv_in, d_conv, groups=d_conv_in)
        self.dt_bias = nn.Parameter(inverse_softplus(initial_step_sizes(heads)))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(self.d_inner, eps=1e-5)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(self, x: Tensor, cu_seqlens: Tensor, read: Tensor | None = None) -> Tensor:
        """``[T, d_model]`` to ``[T, d_model]``, or to the rows ``read`` (int64 ``[R]``) alone: ``[R, d_model]``."""
        heads = len(self.D)
        z, xBC, dt = self.in_proj(x).split([self.d_inner, self.d_inner + 2 * self.d_state, heads], dim=-1)
        xBC = causal_conv(
            xBC, self.conv.weight[:, 0], self.conv.bias, "silu", cu_seqlens=cu_seqlens, backend=self.backend
        )
        x, B, C = xBC.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        y = ssd(
            x.unflatten(-1, (heads, self.headdim)),
            dt,
            -torch.exp(self.A_log.float()),
            B[:, None],
            C[:, None],
            self.D,
            self.dt_bias,
            dt_softplus=True,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        ).flatten(-2)
        if read is not None:
            y, z = y[read], z[read]
        return self.out_proj(self.norm(y * F.silu(z)))
