"""The arguments of the state-space ops, as their backends take them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ScanArguments:
    """One call of ``selective_scan``, ``ssd`` or one of their forms for the last rows, which say what each shape is.

    Attributes:
        x: input.
        dt: step sizes before bias and softplus.
        A: state matrix, or each head's decay rate.
        B: input matrix.
        C: output matrix; absent where no outputs are wanted.
        cu_seqlens: borders of the sequences, int32 ``[S+1]``.
        D: skip weight.
        z: gate, which ``selective_scan`` alone has.
        dt_bias: bias of the step sizes.
        dt_softplus: whether the step sizes pass a softplus.
        initial_state: state before each sequence's first row; zeros where absent.
        return_final_state: whether the state after each sequence's last row is wanted.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor | None
    cu_seqlens: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    dt_softplus: bool = False
    initial_state: Tensor | None = None
    return_final_state: bool = False

    def with_step_sizes(self) -> "ScanArguments":
        """In at least float32, with ``dt`` the step sizes themselves: for backends that compute the recurrence alone.

        The recurrence sums hundreds of terms, so it runs in float32 whatever the dtype of the activations.
        """
        dtype = torch.promote_types(self.x.dtype, torch.float32)
        cast: dict[str, Any] = {
            name: None if tensor is None else tensor.to(dtype)
            for name in ("x", "A", "B", "C", "D", "z", "initial_state")
            for tensor in [getattr(self, name)]
        }
        dt = step_sizes(self.dt, self.dt_bias, self.dt_softplus, dtype)
        return replace(self, **cast, dt=dt, dt_bias=None, dt_softplus=False)


def step_sizes(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dtype: torch.dtype) -> Tensor:
    """``softplus(dt + dt_bias)`` where ``dt_softplus``, else ``dt + dt_bias``, in ``dtype``; ``dt [T, ...]``."""
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    return F.softplus(dt) if dt_softplus else dt
