"""Mamba-2 block (arXiv 2405.21060, section 7) over packed sequences."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_ssm.layers.causal_conv import CausalConv1d
from recbole_ssm.layers.mamba import initial_step_sizes, inverse_softplus, keep_from_weight_decay
from recbole_ssm.ops import causal_conv, ssd, ssd_last
from recbole_ssm.ops.packing import positions, select_rows, sequence_ids, single_rows
from recbole_ssm.ops.scan_arguments import step_sizes


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
        self.conv = CausalConv1d(d_conv_in, d_conv, backend)
        self.dt_bias = nn.Parameter(inverse_softplus(initial_step_sizes(heads)))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        keep_from_weight_decay(self.dt_bias, self.A_log, self.D)
        self.norm = nn.RMSNorm(self.d_inner, eps=1e-5)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        read: Tensor | None = None,
        last: bool = False,
        step_scale: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`recbole_ssm.layers.Mamba.forward`, and :meth:`inner` for ``step_scale``."""
        return self.out_proj(self.inner(x, cu_seqlens, read, last, step_scale=step_scale))

    def inner(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        read: Tensor | None = None,
        last: bool = False,
        order: Tensor | None = None,
        step_scale: Tensor | None = None,
    ) -> Tensor:
        """What the block's last projection, ``out_proj``, is of: ``[R, H P]``, or ``[T, H P]`` where all rows are read.

        Args:
            x: ``[T', d_model]``.
            cu_seqlens: borders of the sequences, int32 ``[S+1]``.
            read: see :meth:`recbole_ssm.layers.Mamba.forward`.
            last: see there.
            order: row of ``x`` that each of the sequences' is, integer ``[T]``, where they are not the same. A row that
                several are is projected once.
            step_scale: what multiplies the raw step sizes, before bias and softplus, ``[T, H]``; 1 where absent.
        """
        if read is None:
            z, xBC, dt = select_rows(self.in_proj(x), order).split([self.d_inner, *self._widths], dim=-1)
        else:
            into_gate, into_scan = self.in_proj.weight.split([self.d_inner, sum(self._widths)])
            z = F.linear(x.index_select(0, read if order is None else order.index_select(0, read)), into_gate)
            xBC, dt = select_rows(F.linear(x, into_scan), order).split(self._widths, dim=-1)
        dt = _scaled(dt, step_scale)
        x, B, C = self._split(self.conv.packed(xBC, cu_seqlens))
        settings: dict[str, Any] = {
            "D": self.D, "dt_bias": self.dt_bias, "dt_softplus": True, "cu_seqlens": cu_seqlens,
            "backend": self.backend,
        }  # fmt: skip
        if last:
            return self._gate(ssd_last(x, dt, self._rates(), B[:, None], select_rows(C, read)[:, None], **settings), z)
        return self._gate(select_rows(ssd(x, dt, self._rates(), B[:, None], C[:, None], **settings), read), z)

    def initial_state(self, count: int) -> dict[str, Tensor]:
        """What :meth:`carry` starts ``count`` sequences with: all zeros."""
        ssm = self.D.new_zeros(count, len(self.D), self.headdim, self.d_state)
        return {"conv": self.conv.initial_state(count), "ssm": ssm}

    def carry(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None,
        state: dict[str, Tensor],
        step_scale: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`recbole_ssm.layers.Mamba.carry`, and :meth:`inner` for ``step_scale``.

        The state is ``conv [S, H P + 2 N, d_conv-1]`` and ``ssm [S, H, P, N]``.
        """
        cu_seqlens = single_rows(len(x), x.device) if cu_seqlens is None else cu_seqlens
        z, xBC, dt = self.in_proj(x).split([self.d_inner, *self._widths], dim=-1)
        xBC, conv = self.conv.carry(xBC, cu_seqlens, state["conv"])
        x, B, C = self._split(xBC)
        y, ssm = ssd(
            x, _scaled(dt, step_scale), self._rates(), B[:, None], C[:, None], D=self.D, dt_bias=self.dt_bias,
            dt_softplus=True, initial_state=state["ssm"], return_final_state=True, cu_seqlens=cu_seqlens,
            backend=self.backend,
        )  # fmt: skip
        return self.out_proj(self._gate(y, z)), {"conv": conv, "ssm": ssm}

    def read_prefixes_in_reverse(self, x: Tensor, cu_seqlens: Tensor, read: Tensor | None = None) -> Tensor:
        """The block's last output over each prefix of each sequence, read from its end to its beginning, in one pass.

        For the prefix of the items ``s`` to ``t``, the recurrence of :func:`recbole_ssm.ops.ssd` over ``t, ..., s`` is,
        per head and written out at its last step, item ``s``::

            y(t) = sum_{j=s..t} weight_j (C_s . B_j) x_j + D x_s,   weight_j = dt_j prod_{i=s..j-1} exp(dt_i A)

        where ``x_j``, ``B_j`` and ``C_j`` come of a convolution over the items ``j`` to ``j+K-1``, of which a prefix
        has those up to ``t``. So the summand of ``j`` is the same for all ``t >= j+K-1``, and their sum a running one;
        the last ``K-1`` summands of a prefix are its own.

        Returns:
            For each row that of the prefix which ends there: ``[T, d_model]``, or for the rows ``read`` alone.
        """
        position = positions(cu_seqlens).long()
        first = torch.arange(len(x), device=x.device) - position
        into_gate, into_scan = self.in_proj.weight.split([self.d_inner, sum(self._widths)])
        # Of an empty sequence, which begins where there may be no row, nothing is read.
        starts = cu_seqlens[:-1].clamp_max(len(x) - 1) if len(x) else cu_seqlens[:0]
        z = F.linear(x.index_select(0, starts), into_gate)
        xBC, dt = F.linear(x, into_scan).split(self._widths, dim=-1)
        weight = self._weights_from_first(dt, position, cu_seqlens)
        seen = self._convolve_prefixes(xBC, cu_seqlens)
        *own, shared = seen.unbind(1)
        reach = position.clamp_max(len(own))
        # By one index, whose backward pass adds up; that of two sorts.
        x_first, _, C = self._split(seen.flatten(0, 1).index_select(0, (first + reach) * seen.shape[1] + reach))

        def weight_before(distance: int) -> Tensor:
            return weight.roll(distance, 0) * (position >= distance)[:, None]

        x, B, _ = self._split(shared)
        # Without decay a state is the sum of what was added to it.
        y = ssd(
            x, weight_before(len(own)), torch.zeros_like(self.D), B[:, None], C[:, None],
            cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip
        y = y + self.D[:, None] * x_first
        for distance, convolved in enumerate(own):
            x, B, _ = self._split(convolved)
            product = weight_before(distance) * (B * C.to(weight.dtype)).sum(-1, keepdim=True)
            y = y + product[..., None] * x
        sequence = select_rows(sequence_ids(cu_seqlens), read)
        return self.out_proj(self._gate(select_rows(y, read).to(xBC.dtype), z.index_select(0, sequence)))

    @property
    def _widths(self) -> list[int]:
        """Of what is projected beside the gate: to be convolved, ``H P + 2 N``, and the raw step sizes, ``H``."""
        return [self.d_inner + 2 * self.d_state, len(self.D)]

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[..., H P + 2 N]`` to ``x [..., H, P]``, ``B [..., N]`` and ``C [..., N]``."""
        x, B, C = xBC.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        return x.unflatten(-1, (-1, self.headdim)), B, C

    def _rates(self) -> Tensor:
        return -torch.exp(self.A_log.float())

    def _gate(self, y: Tensor, z: Tensor) -> Tensor:
        """``y [..., H, P]`` through its gate, ``[..., H P]``."""
        return self.norm((y.flatten(-2) * F.silu(z)).to(self.norm.weight.dtype))

    def _convolve_prefixes(self, xBC: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Convolutions of reversed prefixes near their ends, ``[T, D]`` to ``[T, K, D]``.

        At row ``t`` the ``o``-th is that of item ``t-o`` in the prefix that ends with ``t``: over the items ``t-o`` to
        ``t``, of which the filter's last column weighs the first. It is meaningless where ``t-o`` is no item.
        """
        filters = self.conv.weight.squeeze(1)
        taps = filters.shape[1]
        # In a causal convolution's order, the o-th [D, K] of them: K-1-o zeros, then the last o+1 columns, reversed.
        filters = F.pad(filters.flip(1), (taps - 1, 0)).unfold(1, taps, 1).transpose(0, 1)
        assert self.conv.bias is not None
        seen = causal_conv(
            xBC.repeat(1, taps), filters.flatten(0, 1), self.conv.bias.repeat(taps), "silu", cu_seqlens=cu_seqlens,
            backend=self.backend,
        )  # fmt: skip
        return seen.unflatten(-1, (taps, -1))

    def _weights_from_first(self, dt: Tensor, position: Tensor, cu_seqlens: Tensor) -> Tensor:
        """``dt_j prod_{i<j} exp(dt_i A)``, the product over the items before ``j`` in its sequence: ``[T, H]``.

        The product is what is left of a state of 1 at the sequence's first item. The SSM's own recurrence takes it, as
        a sum of exponents over all rows would leak rounding from one sequence to the next.
        """
        dt = step_sizes(dt, self.dt_bias, True, torch.promote_types(dt.dtype, torch.float32))
        is_first = (position == 0)[:, None]
        one = dt.new_ones(len(dt), 1, 1)
        left = ssd(
            (is_first * torch.ones_like(dt))[..., None], torch.where(is_first, 1.0, dt.roll(1, 0)), self._rates(),
            one, one, cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip
        return dt * left[..., 0]


def _scaled(dt: Tensor, scale: Tensor | None) -> Tensor:
    return dt if scale is None else (dt * scale).to(dt.dtype)
