"""Mamba block (arXiv 2312.00752, figure 3 and algorithm 2) over packed sequences."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recbole_ssm.layers.causal_conv import CausalConv1d
from recbole_ssm.ops import selective_scan, selective_scan_last
from recbole_ssm.ops.packing import select_rows, single_rows


def inverse_softplus(value: Tensor) -> Tensor:
    """``v`` such that ``softplus(v) = value``."""
    return value + torch.log(-torch.expm1(-value))


def initial_step_sizes(count: int) -> Tensor:
    """Step sizes drawn log-uniformly from [0.001, 0.1], ``[count]`` (arXiv 2312.00752, section 3.6)."""
    return torch.exp(torch.empty(count).uniform_(math.log(0.001), math.log(0.1)))


def keep_from_weight_decay(*parameters: nn.Parameter) -> None:
    """Mark parameters that :class:`~recbole_ssm.trainer.SequenceTrainer` leaves out of ``weight_decay``.

    By the attribute that mamba_ssm marks them with, which other trainers know too: decay would pull rates and step
    sizes not to nothing but to a value that means nothing in particular. (Mamba's own bias of step sizes decays, as in
    mamba_ssm.)
    """
    for parameter in parameters:
        parameter._no_weight_decay = True  # type: ignore[attr-defined]


class _DecayRates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, A_log):
        # On a GPU channels lie side by side, as the scan's kernels read them.
        rates = torch.empty_like(A_log) if A_log.is_cpu else A_log.new_empty(A_log.T.shape).T
        torch.exp(A_log, out=rates).neg_()
        ctx.save_for_backward(rates)
        return rates

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (rates,) = ctx.saved_tensors
        return grad * rates


class Mamba(nn.Module):
    """One Mamba block; sizes named as in the paper.

    Args:
        d_model: width of the input and the output.
        d_state: states a channel, ``N``.
        d_conv: width of the causal convolution.
        expand: inner width as a multiple of ``d_model``.
        backend: see :func:`recbole_ssm.ops.selective_scan`.
    """

    def __init__(self, d_model: int, d_state: int, d_conv: int, expand: int, backend: str = "auto"):
        super().__init__()
        self.d_state, self.backend = d_state, backend
        d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv = CausalConv1d(d_inner, d_conv, backend)
        self.x_proj = nn.Linear(d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        keep_from_weight_decay(self.A_log, self.D)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's initialisation of the step size (section 3.6), as in its released code."""
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(inverse_softplus(initial_step_sizes(len(self.D))))

    def forward(self, x: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False) -> Tensor:
        """Run the block over packed sequences.

        Args:
            x: ``[T, d_model]``.
            cu_seqlens: borders of the sequences, int32 ``[S+1]``.
            read: rows whose output is wanted, int64 ``[R]``; all where absent.
            last: promise that ``read`` is the last row of every sequence, whose output alone is computed then.

        Returns:
            ``[T, d_model]`` or ``[R, d_model]``.
        """
        settings: dict[str, Any] = {
            "dt_bias": self.dt_proj.bias, "dt_softplus": True, "cu_seqlens": cu_seqlens, "backend": self.backend,
        }  # fmt: skip
        A = _DecayRates.apply(self.A_log.float())  # -exp(A_log)
        if not last and (self.backend == "triton" or not x.is_cpu):
            # Kernels take skip and gate as they go: fewer launches count more there than rows that nobody reads.
            x, z = F.linear(x, self.in_proj.weight).chunk(2, -1)
            x = self.conv.packed(x, cu_seqlens)
            dt, B, C = F.linear(x, self.x_proj.weight).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
            y = selective_scan(x, F.linear(dt, self.dt_proj.weight), A, B, C, self.D, z, **settings)
            return self.out_proj(select_rows(y, read))
        into_scan, into_gate = self.in_proj.weight.chunk(2)
        z = F.linear(select_rows(x, read), into_gate)
        x = self.conv.packed(F.linear(x, into_scan), cu_seqlens)
        into_steps, into_C = self.x_proj.weight.split([self.dt_rank + self.d_state, self.d_state])
        dt, B = F.linear(x, into_steps).split([self.dt_rank, self.d_state], dim=-1)
        dt = F.linear(dt, self.dt_proj.weight)
        if last:
            x_read = select_rows(x, read)
            y = selective_scan_last(x, dt, A, B, F.linear(x_read, into_C), **settings)
        else:
            # In this order, in which the backward pass adds up the gradients of x: another rounds otherwise.
            y = select_rows(selective_scan(x, dt, A, B, F.linear(x, into_C), **settings), read)
            x_read = select_rows(x, read)
        return self.out_proj((y + self.D * x_read) * F.silu(z))

    def initial_state(self, count: int) -> dict[str, Tensor]:
        """What :meth:`carry` starts ``count`` sequences with: all zeros."""
        ssm = self.D.new_zeros(count, len(self.D), self.d_state)
        return {"conv": self.conv.initial_state(count), "ssm": ssm}

    def carry(self, x: Tensor, cu_seqlens: Tensor | None, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """More rows of each sequence, after those that ``state`` has seen; for inference.

        Args:
            x: ``[T, d_model]``.
            cu_seqlens: borders of the new rows, int32 ``[S+1]``; one row of each sequence where absent.
            state: ``conv [S, d_inner, d_conv-1]``, the rows before for the convolution, and ``ssm [S, d_inner, N]``.

        Returns:
            ``[T, d_model]`` and the state after these rows.
        """
        cu_seqlens = single_rows(len(x), x.device) if cu_seqlens is None else cu_seqlens
        x, z = self.in_proj(x).chunk(2, -1)
        x, conv = self.conv.carry(x, cu_seqlens, state["conv"])
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y, ssm = selective_scan(
            x, F.linear(dt, self.dt_proj.weight), -torch.exp(self.A_log.float()), B, C,
            dt_bias=self.dt_proj.bias, dt_softplus=True, initial_state=state["ssm"], return_final_state=True,
            cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip
        return self.out_proj((y + self.D * x) * F.silu(z)), {"conv": conv, "ssm": ssm}
