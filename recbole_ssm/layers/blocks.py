"""The layer that models stack, around one of the state-space blocks that ``ssm_block`` chooses among."""

from typing import Any, Literal

from pydantic import model_validator
from torch import Tensor, nn

from recbole_ssm.layers.mamba import Mamba
from recbole_ssm.layers.mamba2 import Mamba2
from recbole_ssm.layers.mamba3 import Mamba3
from recbole_ssm.layers.moving_average import MovingAverage, with_filter
from recbole_ssm.ops.packing import select_rows
from recbole_ssm.settings import ModelSettings, divides, setting


class BlockSettings(ModelSettings):
    """Settings of models that have a choice of blocks, beside ``d_state``, ``d_conv``, ``expand`` of their own."""

    ssm_block: Literal["mamba", "mamba2", "mamba3"] = setting(
        "mamba",
        "State-space block: 'mamba' (arXiv 2312.00752), 'mamba2' (2405.21060) or 'mamba3' (2603.15569), which has no "
        "convolution and does not read d_conv.",
        fixed=True,
    )
    headdim: int = setting(
        32, "Width of a head of mamba2 and mamba3; must divide expand * hidden_size.", "The papers': 64.",
        ge=1, le=2**16, fixed=True,
    )  # fmt: skip
    filter_share: float = setting(
        0.0,
        "Share of a low-pass filter in each layer's output, beside the state-space block, or STARRec's two paths: a "
        "moving average with learned decays; none when 0, as in the papers. BSARec's alpha, there 0.7.",
        ge=0, lt=1, fixed=True,
    )  # fmt: skip

    @model_validator(mode="after")
    def _block(self):
        settings: Any = self
        if self.ssm_block == "mamba" or not getattr(settings, "use_ssm", True):
            return self
        if self.ssm_block == "mamba3" and settings.d_state < 4:
            raise ValueError(f"d_state is {settings.d_state}: choose 4 or more for ssm_block mamba3.")
        return divides(self, "headdim", "expand * hidden_size =", settings.expand * self.hidden_size)


def ssm_block(
    name: str, d_model: int, d_state: int, d_conv: int, expand: int, headdim: int, backend: str = "auto"
) -> Mamba | Mamba2 | Mamba3:
    """The block of that ``name``; those that have no heads, or no convolution, do not read the size of it.

    Raises:
        ValueError: where there is none, or by :class:`Mamba2` and :class:`Mamba3`.
    """
    if name == "mamba":
        return Mamba(d_model, d_state, d_conv, expand, backend)
    if name == "mamba2":
        return Mamba2(d_model, d_state, d_conv, expand, headdim, backend)
    if name == "mamba3":
        return Mamba3(d_model, d_state, expand, headdim, backend)
    raise ValueError(f"ssm_block is {name!r}: choose one of mamba, mamba2, mamba3")


class MambaLayer(nn.Module):
    """State-space block, dropout, LayerNorm; a residual connection only where stacked (arXiv 2403.03900, 3.3).

    With a ``filter_share`` ``s`` the output is ``1 - s`` parts of this and ``s`` parts of :class:`MovingAverage`.

    Args:
        hidden_size: width ``d``.
        d_state: see :class:`Mamba`.
        d_conv: see :class:`Mamba`.
        expand: see :class:`Mamba`.
        dropout_prob: dropout rate.
        stacked: whether the model has more than one layer.
        backend: see :class:`Mamba`.
        block: see :func:`ssm_block`.
        headdim: see :class:`Mamba2`.
        filter_share: from 0, without a filter, to 1, exclusively.
    """

    def __init__(
        self,
        hidden_size: int,
        d_state: int,
        d_conv: int,
        expand: int,
        dropout_prob: float,
        stacked: bool,
        backend: str = "auto",
        block: str = "mamba",
        headdim: int = 32,
        filter_share: float = 0.0,
    ):
        super().__init__()
        self.mamba = ssm_block(block, hidden_size, d_state, d_conv, expand, headdim, backend)
        self.dropout = nn.Dropout(dropout_prob)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.stacked, self.filter_share = stacked, filter_share
        self.filter = MovingAverage(hidden_size, dropout_prob, backend) if filter_share else None

    def forward(self, x: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False) -> Tensor:
        """See :meth:`Mamba.forward`."""
        hidden = self.dropout(self.mamba(x, cu_seqlens, read, last))
        if self.stacked:
            hidden = hidden + select_rows(x, read)
        filtered = None if self.filter is None else self.filter(x, cu_seqlens, read, last)
        return with_filter(self.norm(hidden), filtered, self.filter_share)

    def initial_state(self, count: int) -> dict[str, Tensor]:
        """See :meth:`Mamba.initial_state`; with a filter that of :class:`MovingAverage`, too."""
        state = self.mamba.initial_state(count)
        return state if self.filter is None else {**state, **self.filter.initial_state(count)}

    def carry(self, x: Tensor, cu_seqlens: Tensor | None, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Mamba.carry`."""
        hidden, after = self.mamba.carry(x, cu_seqlens, state)
        hidden = self.norm(hidden + x if self.stacked else hidden)
        if self.filter is None:
            return hidden, after
        filtered, low = self.filter.carry(x, cu_seqlens, state)
        return with_filter(hidden, filtered, self.filter_share), {**after, **low}
