"""Mamba-3 block (arXiv 2603.15569; its form of one input and one output a state) over packed sequences."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_ssm.layers.mamba import initial_step_sizes, inverse_softplus, keep_from_weight_decay
from recbole_ssm.ops import selective_scan, ssd, ssd_last
from recbole_ssm.ops.packing import last_rows, positions, select_rows, single_rows

LEAST_RATE = 1e-4  # of a state's decay, as in the paper's released code (A_floor)
LEAST_DECAY = 1e-12  # of a row, which is divided by twice in the backward pass; less is none in float32


class Mamba3(nn.Module):
    """One Mamba-3 block with a single B/C group; sizes named as in the paper.

    Per head of width ``P`` and row ``t``, all but the biases and ``D`` linear maps of the row (``in_proj``)::

        dt = softplus(dt + dt_bias),  alpha = exp(-dt max(softplus(a), 1e-4)),  lambda = sigmoid(lambda)
        theta_t = theta_{t-1} + pi dt_t tanh(omega_t)                       an angle for each pair of states
        B_t = R(theta_t) (RMSNorm(B_t) + B_bias),  C_t = R(theta_t) (RMSNorm(C_t) + C_bias)
        h_t = alpha_t (h_{t-1} + (1 - lambda_t) dt_t x_{t-1} B_{t-1}^T) + lambda_t dt_t x_t B_t^T   ([P, N] a head)
        y_t = h_t C_t + D x_t,  out_t = out_proj(y_t silu(z_t))

    The third line but one is the exponential-trapezoidal rule. ``R`` rotates the first half of the states, pairs of
    neighbours each by an angle of its own; to rotate what enters and leaves by the sum of all angles so far is to
    rotate the state by each row's angle. There is no convolution.

    Args:
        d_model: width of the input and the output.
        d_state: states, ``N``, 4 or more.
        expand: inner width as a multiple of ``d_model``.
        headdim: width of a head, ``P``; must divide ``expand * d_model``.
        backend: see :func:`recbole_ssm.ops.ssd`.

    Raises:
        ValueError: where ``headdim`` does not divide the inner width, or there are fewer than 4 states.
    """

    def __init__(self, d_model: int, d_state: int, expand: int, headdim: int, backend: str = "auto"):
        super().__init__()
        self.d_inner, self.d_state, self.headdim, self.backend = expand * d_model, d_state, headdim, backend
        if self.d_inner % headdim:
            raise ValueError(f"headdim {headdim} does not divide expand * hidden_size = {self.d_inner}")
        if d_state < 4:
            raise ValueError(f"d_state {d_state} leaves no pair of states to rotate, which half of them are for")
        heads, self.n_angles = self.d_inner // headdim, d_state // 4
        # First what is read where outputs are wanted (z and C), then what makes the states.
        self._outward, self._inward = [self.d_inner, d_state], [self.d_inner, d_state, *[heads] * 3, self.n_angles]
        self._widths = [sum(self._outward), sum(self._inward)]
        self.in_proj = nn.Linear(d_model, sum(self._widths), bias=False)
        self.dt_bias = nn.Parameter(inverse_softplus(initial_step_sizes(heads)))
        self.B_norm, self.C_norm = nn.RMSNorm(d_state, eps=1e-5), nn.RMSNorm(d_state, eps=1e-5)
        self.B_bias, self.C_bias = (nn.Parameter(torch.ones(heads, d_state)) for _ in range(2))
        self.D = nn.Parameter(torch.ones(heads))
        keep_from_weight_decay(self.dt_bias, self.D)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(self, x: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False) -> Tensor:
        """See :meth:`recbole_ssm.layers.Mamba.forward`."""
        into_outputs, into_states = self.in_proj.weight.split(self._widths)
        z, C = F.linear(select_rows(x, read) if last else x, into_outputs).split(self._outward, -1)
        x, B, decay, now, before, turn = self._inputs(F.linear(x, into_states))
        theta = self._sum_of(turn, cu_seqlens)
        B, C = self._rotated_B(B, theta), self._rotated_C(C, select_rows(theta, read) if last else theta)
        settings: dict[str, Any] = {"cu_seqlens": cu_seqlens, "backend": self.backend}
        later = self._next(before, cu_seqlens)
        A, drive = -torch.ones_like(self.D), self._drive(x, decay, now + later)
        if last:
            y = ssd_last(drive, decay, A, B, C, **settings) + self.D[:, None] * select_rows(x, read)
        else:
            y = self._with_own(ssd(drive, decay, A, B, C, **settings), x, B, C, later)
            y, z = select_rows(y, read), select_rows(z, read)
        return self.out_proj(self._gate(y, z))

    def initial_state(self, count: int) -> dict[str, Tensor]:
        """What :meth:`carry` starts ``count`` sequences with: all zeros."""
        heads, new = len(self.D), self.D.new_zeros
        return {
            "ssm": new(count, heads, self.headdim, self.d_state), "x": new(count, heads, self.headdim),
            "B": new(count, heads, self.d_state), "angle": new(count, heads, self.n_angles),
        }  # fmt: skip

    def carry(self, x: Tensor, cu_seqlens: Tensor | None, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`recbole_ssm.layers.Mamba.carry`.

        The state is ``ssm [S, H, P, N]``; ``x [S, H, P]`` and ``B [S, H, N]``, rotated, of the last row; and ``angle
        [S, H, N // 4]``, from 0 to 2 pi.
        """
        if not len(x):
            return x, state
        cu_seqlens = single_rows(len(x), x.device) if cu_seqlens is None else cu_seqlens
        outward, inward = self.in_proj(x).split(self._widths, -1)
        z, C = outward.split(self._outward, -1)
        x, B, decay, now, before, turn = self._inputs(inward)
        theta, angle = self._sum_of(turn, cu_seqlens, state["angle"])
        B, C = self._rotated_B(B, theta), self._rotated_C(C, theta)
        some, first = cu_seqlens.diff() > 0, cu_seqlens[:-1].clamp_max(len(x) - 1)
        later = self._next(before, cu_seqlens)
        entering = (some[:, None] * before.index_select(0, first))[..., None] * state["x"]
        y, ssm = ssd(
            self._drive(x, decay, now + later), decay, -torch.ones_like(self.D), B, C, cu_seqlens=cu_seqlens,
            initial_state=state["ssm"] + entering[..., None] * state["B"][:, :, None], return_final_state=True,
            backend=self.backend,
        )  # fmt: skip
        y = self._gate(self._with_own(y, x, B, C, later), z)
        final, some = last_rows(cu_seqlens).clamp_min(0), some[:, None, None]
        kept = {name: torch.where(some, row[final], state[name]) for name, row in (("x", x), ("B", B))}
        return self.out_proj(y), {"ssm": ssm, **kept, "angle": angle}

    def _inputs(self, projected: Tensor) -> tuple[Tensor, ...]:
        """What enters the states, in float32, of the rows' projections.

        Returns:
            ``x [..., H, P]``; ``B [..., N]``, neither normed nor rotated; ``-log alpha``, ``lambda dt`` and
            ``(1 - lambda) dt``, ``[..., H]``; and by how much the angles grow, ``[..., H, N // 4]``.
        """
        exact = torch.promote_types(projected.dtype, torch.float32)
        x, B, dt, rate, trapezoid, omega = projected.to(exact).split(self._inward, -1)
        dt = F.softplus(dt + self.dt_bias)
        decay = (dt * F.softplus(rate).clamp_min(LEAST_RATE)).clamp_min(LEAST_DECAY)
        now, before = dt * torch.sigmoid(trapezoid), dt * torch.sigmoid(-trapezoid)
        turn = dt[..., None] * (math.pi * torch.tanh(omega))[..., None, :]
        return x.unflatten(-1, (-1, self.headdim)), B, decay, now, before, turn

    def _sum_of(self, turn: Tensor, cu_seqlens: Tensor, angle: Tensor | None = None) -> Any:
        """Running sums of ``turn [T, H, n]`` within each sequence, the state-space model that forgets nothing.

        With the sums before the first rows, ``[S, H, n]``, also those after the last, less whole turns.
        """
        one = turn.new_ones(len(turn), 1)
        turns = turn.flatten(1)
        settings: dict[str, Any] = {"cu_seqlens": cu_seqlens, "backend": self.backend}
        if angle is not None:
            settings |= {"initial_state": angle.flatten(1)[..., None], "return_final_state": True}
        found = selective_scan(turns, torch.ones_like(turns), turns.new_zeros(turns.shape[1], 1), one, one, **settings)
        if angle is None:
            return found.view_as(turn)
        return found[0].view_as(turn), self._less_whole_turns(found[1].view_as(angle))

    def _less_whole_turns(self, angle: Tensor) -> Tensor:
        return angle - 2 * math.pi * torch.floor(angle / (2 * math.pi))

    def _rotated_B(self, B: Tensor, theta: Tensor) -> Tensor:
        """``B [..., N]``, normed, with its bias and rotated by ``theta [..., H, n]``: ``[..., H, N]``."""
        return self._rotated(self.B_norm(B)[..., None, :] + self.B_bias, theta)

    def _rotated_C(self, C: Tensor, theta: Tensor) -> Tensor:
        return self._rotated(self.C_norm(C.to(theta.dtype))[..., None, :] + self.C_bias, theta)

    def _rotated(self, matrix: Tensor, theta: Tensor) -> Tensor:
        turning, fixed = matrix.split([2 * self.n_angles, self.d_state - 2 * self.n_angles], -1)
        first, second = turning.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = torch.cos(theta), torch.sin(theta)
        turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1)
        return torch.cat([turned.flatten(-2), fixed], -1)

    def _next(self, before: Tensor, cu_seqlens: Tensor) -> Tensor:
        """What the next row of its sequence adds of each row, ``(1 - lambda) dt`` there; nothing of the last."""
        return before.roll(-1, 0) * (positions(cu_seqlens).roll(-1, 0) > 0)[:, None]

    def _drive(self, x: Tensor, decay: Tensor, weight: Tensor) -> Tensor:
        """What :func:`~recbole_ssm.ops.ssd` takes for its input, whose ``dt`` is the decay and multiplies it.

        A row enters the state twice, with ``lambda dt`` at once and with the next row's ``(1 - lambda) dt`` when that
        decays both alike: so to later rows it is one input of the sum of both weights. Gradients of the decay through
        the quotient here and the product there cancel to within rounding of one of them, however small the decay is:
        what reaches the weights is multiplied by it.
        """
        return x * (weight / decay)[..., None]

    def _with_own(self, y: Tensor, x: Tensor, B: Tensor, C: Tensor, later: Tensor) -> Tensor:
        """The outputs: with the skip, and without what each row adds to its own by the next row's weight."""
        return y + (self.D - later * (C * B).sum(-1))[..., None] * x

    def _gate(self, y: Tensor, z: Tensor) -> Tensor:
        """``y [..., H, P]`` through its gate, ``[..., H P]``."""
        return y.flatten(-2).to(z.dtype) * F.silu(z)
