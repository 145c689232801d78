"""A low-pass filter of a history, for a layer to have beside what it learns to read."""

from typing import Any

import torch
from torch import Tensor, nn

from recbole_ssm.layers.mamba import inverse_softplus, keep_from_weight_decay
from recbole_ssm.ops import selective_scan, selective_scan_last
from recbole_ssm.ops.decaying_scan import scan_arguments_of
from recbole_ssm.ops.packing import select_rows, single_rows

# Of what a moving average holds, the part that one more item takes the place of: about 1 in 20, and 1 in 3.
FIRST_DECAYS = 0.05, 0.4


class MovingAverage(nn.Module):
    """``LayerNorm(x + dropout(low + beta^2 (x - low)))`` with ``low_t = a low_{t-1} + (1 - a) x_t``.

    BSARec's frequency layer (arXiv 2312.10325, section 4.2), where ``low`` is what a Fourier filter leaves of a padded
    row. Here it is the moving average of Mega (arXiv 2209.10655, section 3.1), with a decay ``a`` that each feature
    learns: it sees no later row, and its state is one row.

    Args:
        hidden_size: width ``d``.
        dropout_prob: dropout rate.
        backend: see :func:`recbole_ssm.ops.selective_scan`.
    """

    def __init__(self, hidden_size: int, dropout_prob: float, backend: str = "auto"):
        super().__init__()
        self.backend = backend
        # -log a is its softplus.
        first, last = inverse_softplus(torch.tensor(FIRST_DECAYS)).tolist()
        self.Lambda = nn.Parameter(torch.linspace(first, last, hidden_size))
        keep_from_weight_decay(self.Lambda)
        self.beta = nn.Parameter(torch.randn(hidden_size))
        self.dropout = nn.Dropout(dropout_prob)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-12)

    def forward(self, x: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False) -> Tensor:
        """See :meth:`recbole_ssm.layers.Mamba.forward`."""
        settings: dict[str, Any] = {"cu_seqlens": cu_seqlens, "backend": self.backend}
        entering, dt, A, one = scan_arguments_of(*self.entering(x))
        if last:
            low = selective_scan_last(entering, dt, A, one, one.new_ones(len(cu_seqlens) - 1, 1), **settings)
        else:
            low = select_rows(selective_scan(entering, dt, A, one, one, **settings), read)
        return self.filtered(select_rows(x, read), low)

    def initial_state(self, count: int) -> dict[str, Tensor]:
        """What :meth:`carry` starts ``count`` sequences with: ``low [count, d, 1]``, all zeros."""
        return {"low": self.Lambda.new_zeros(count, len(self.Lambda), 1)}

    def carry(self, x: Tensor, cu_seqlens: Tensor | None, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`recbole_ssm.layers.Mamba.carry`."""
        cu_seqlens = single_rows(len(x), x.device) if cu_seqlens is None else cu_seqlens
        entering, dt, A, one = scan_arguments_of(*self.entering(x))
        low, after = selective_scan(
            entering, dt, A, one, one,
            cu_seqlens=cu_seqlens, initial_state=state["low"], return_final_state=True, backend=self.backend,
        )  # fmt: skip
        return self.filtered(x, low), {"low": after}

    def entering(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(1 - a) x`` and ``-log a`` for rows ``x [..., d]``, both ``[..., d]``."""
        decay = nn.functional.softplus(self.Lambda)
        return x * -torch.expm1(-decay), decay.expand(x.shape).contiguous()

    def filtered(self, x: Tensor, low: Tensor) -> Tensor:
        """The layer's output for rows ``x [..., d]`` and their moving averages."""
        low = low.to(x.dtype)
        return self.norm(x + self.dropout(torch.lerp(low, x, self.beta.square().to(x.dtype))))


def with_filter(output: Tensor, filtered: Tensor | None, share: float) -> Tensor:
    """``1 - share`` parts of a layer's ``output`` and ``share`` parts of a filter's beside it, where there is one."""
    return output if filtered is None else torch.lerp(output, filtered.to(output.dtype), share)
