"""SS4Rec: Continuous-Time Sequential Recommendation with State Space Models (arXiv 2502.08132).

Item embedding; blocks of a time-aware state-space model, discretised by the time that passed, and a relation-aware one,
a Mamba block, each with dropout, residual and LayerNorm. docs/models.md gives the equations and says where this differs
from the released code, which always knows the time of the target (here ``request_time: known``).
"""

from typing import Any

import torch
from torch import Tensor, nn

from recbole_ssm.layers import MambaLayer
from recbole_ssm.layers.mamba import initial_step_sizes, keep_from_weight_decay
from recbole_ssm.models.base import PackedRecommender, init_weights
from recbole_ssm.models.stepping import by_layer, of_layers
from recbole_ssm.ops.packing import last_rows, positions
from recbole_ssm.ops.rotating_scan import rotating_scan
from recbole_ssm.registry import register_model
from recbole_ssm.settings import LossType, ModelSettings, Whole, setting


class SS4RecSettings(ModelSettings):
    """SS4Rec (arXiv 2502.08132). 'released': the settings in the authors' code, the same for all its datasets."""

    hidden_size: int = setting(
        64, "Number of features in the hidden state.", "Released.", section="Size", ge=1, le=2**16, fixed=True
    )
    num_layers: int = setting(2, "Number of blocks of the two models.", "Released.", ge=1, le=1024, fixed=True)
    dropout_prob: float = setting(0.2, "Dropout rate.", "Released.", ge=0, lt=1)
    time_aware: bool = setting(
        True,
        "Whether the time-aware model reads the time that passed; when False each interaction counts 1.",
        section="Time-aware state-space model", fixed=True,
    )  # fmt: skip
    d_time_state: int = setting(32, "Its (complex) states.", "Released.", ge=1, le=1024, fixed=True)
    time_unit: float = setting(
        1.0,
        "How many units of the timestamp are 1 in it. With seconds and 1 the slowest state that it starts with has "
        "lost half of what it held after 23 minutes; 86400 makes these days.",
        "Released.", gt=0, le=1e12, fixed=True,
    )  # fmt: skip
    d_state: int = setting(
        32, "SSM state expansion factor.", "Released.", section="Relation-aware state-space model (Mamba)",
        ge=1, le=4096, fixed=True,
    )  # fmt: skip
    d_conv: int = setting(4, "Local convolution width.", "Released.", ge=1, le=8, fixed=True)
    expand: int = setting(2, "Block expansion factor.", "Released.", ge=1, le=64, fixed=True)
    train_batch_size: Whole = setting(1024, "Targets a step.", "Released.", section="Training")
    loss_type: LossType = setting("CE", "The loss; all but CE draw negatives.", "Released.")


class TimeAwareSSM(nn.Module):
    """A linear system in continuous time, observed when something happens (S5, arXiv 2208.04933, sections 2 and 3).

    ``x'(t) = Lambda x(t) + B u(t)``, ``y(t) = Re(C x(t)) + D u(t)`` with diagonal, complex ``Lambda``. Each input is
    held until the next (zero-order hold), so that over a gap of length ``g``::

        x(t + g) = exp(Lambda s g) x(t) + (exp(Lambda s g) - 1) / Lambda B u(t)

    with ``s`` a learned step size a state.

    Args:
        d_model: width of the input and the output, ``d``.
        d_state: states, ``P``.
        reads_ahead: whether the gap of a row is that until the next event, at which the state is read then; else it is
            that since the event before, and the state is read at the row's own time.
        backend: see :func:`recbole_ssm.ops.selective_scan`.
    """

    def __init__(self, d_model: int, d_state: int, reads_ahead: bool, backend: str = "auto"):
        super().__init__()
        self.reads_ahead, self.backend = reads_ahead, backend
        self.A_log = nn.Parameter(torch.empty(d_state))  # log(-Re Lambda)
        self.A_imag = nn.Parameter(torch.empty(d_state))
        self.log_dt = nn.Parameter(torch.empty(d_state))
        self.D = nn.Parameter(torch.empty(d_model))
        keep_from_weight_decay(self.A_log, self.A_imag, self.log_dt, self.D)
        self.into_state = nn.Linear(d_model, 2 * d_state, bias=False)  # B: real and imaginary part of each state
        self.out_of_state = nn.Linear(2 * d_state, d_model, bias=False)  # C: of x's real and imaginary parts
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """S5's initialisation (section 3.3): the normal part of the HiPPO-LegS matrix, in its eigenvectors' basis."""
        count, width = len(self.A_log), len(self.D)
        order = torch.arange(count, dtype=torch.float64)
        root = torch.sqrt(order + 0.5)
        # HiPPO-LegS and a matrix of rank 1 make -1/2 and this skew-symmetric matrix.
        turning = root[:, None] * root * torch.sign(order - order[:, None])
        angles, basis = torch.linalg.eigh(-1j * turning)
        basis = basis * basis[0].conj().sgn()  # whose phases are else the processor's to choose
        self.A_log.fill_(0.5).log_()
        self.A_imag.copy_(angles)
        self.log_dt.copy_(initial_step_sizes(count).log())
        nn.init.uniform_(self.D)
        B = basis.mH @ (torch.randn(count, width, dtype=torch.float64) / width**0.5).to(basis.dtype)
        C = torch.randn(width, count, dtype=basis.dtype) / count**0.5 @ basis
        self.into_state.weight.copy_(torch.view_as_real(B).permute(0, 2, 1).flatten(0, 1))
        self.out_of_state.weight.copy_(torch.view_as_real(C.conj().resolve_conj()).flatten(1))

    def forward(self, u: Tensor, gap: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Run over packed sequences.

        Args:
            u: ``[T, d]``.
            gap: time that passed, ``[T]``, nowhere negative.
            cu_seqlens: borders of the sequences, int32 ``[S+1]``.

        Returns:
            ``[T, d]``.
        """
        return self._run(u, gap, cu_seqlens)[0]

    def carry(
        self, u: Tensor, gap: Tensor, cu_seqlens: Tensor | None, state: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Whole sequences, or with a ``state`` one more row of each; for inference.

        The state is ``x [S, P, 2]`` and, where it is needed, the input that is held, ``held [S, P, 2]``.
        """
        if state is None:
            assert cu_seqlens is not None
            y, x, driven = self._run(u, gap, cu_seqlens)
            last = last_rows(cu_seqlens)
            x, driven = x.index_select(0, last), driven.index_select(0, last)
        else:
            decay, weight = self._discretised(gap)
            driven = self._driven(u)
            held = driven if self.reads_ahead else torch.view_as_complex(state["held"])
            x = torch.exp(decay) * torch.view_as_complex(state["x"]) + weight * held
            y = self._read(x, u)
        after = {"x": torch.view_as_real(x)}
        return y, after if self.reads_ahead else {**after, "held": torch.view_as_real(driven)}

    def _run(self, u: Tensor, gap: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs ``[T, d]``, states and ``B u``, both complex ``[T, P]``."""
        decay, weight = self._discretised(gap)
        held = driven = self._driven(u)
        if not self.reads_ahead:  # over the gap that ended with a row it is the input before that was held
            held = driven.roll(1, 0) * (positions(cu_seqlens) > 0)[:, None]
        x = rotating_scan(weight * held, decay, cu_seqlens=cu_seqlens, backend=self.backend)
        return self._read(x, u), x, driven

    def _driven(self, u: Tensor) -> Tensor:
        driven = self.into_state(u).to(self.A_log.dtype)
        return torch.view_as_complex(driven.unflatten(-1, (-1, 2)))

    def _discretised(self, gap: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithm of what is left of a state after a gap, and what a held input is weighted by: ``[T, P]``."""
        rates = torch.complex(-torch.exp(self.A_log), self.A_imag)
        decay = rates * (gap.to(self.log_dt.dtype)[:, None] * torch.exp(self.log_dt))
        # The gradient of expm1 is its value plus 1, which is off by a rounding error; long gaps would multiply that.
        gone = torch.where(decay.abs() < 1, torch.expm1(decay), torch.exp(decay) - 1)
        return decay, gone / rates

    def _read(self, x: Tensor, u: Tensor) -> Tensor:
        return self.out_of_state(torch.view_as_real(x).flatten(1)) + self.D * u


class SS4RecBlock(nn.Module):
    """``h = LayerNorm(x + dropout(TimeAwareSSM(x)))``, then ``LayerNorm(h + dropout(Mamba(h)))``."""

    def __init__(self, config, reads_ahead: bool):
        super().__init__()
        size, dropout_prob, backend = config["hidden_size"], config["dropout_prob"], config["ssm_backend"]
        self.time_ssm = TimeAwareSSM(size, config["d_time_state"], reads_ahead, backend)
        self.dropout = nn.Dropout(dropout_prob)
        self.norm = nn.LayerNorm(size, eps=1e-12)
        self.relation_ssm = MambaLayer(
            size, config["d_state"], config["d_conv"], config["expand"], dropout_prob, stacked=True, backend=backend
        )  # fmt: skip

    def forward(
        self, x: Tensor, gap: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False
    ) -> Tensor:
        """See :meth:`recbole_ssm.layers.Mamba.forward`, with the gap of each row, ``[T]``."""
        hidden = self.norm(x + self.dropout(self.time_ssm(x, gap, cu_seqlens)))
        return self.relation_ssm(hidden, cu_seqlens, read, last)

    def carry(
        self, x: Tensor, gap: Tensor, cu_seqlens: Tensor | None, state: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Whole sequences, or with a ``state`` one more row of each; see :meth:`recbole_ssm.layers.Mamba.carry`."""
        after: dict[str, dict[str, Tensor]] = {}
        if state is None:
            assert cu_seqlens is not None
            relation, time = self.relation_ssm.initial_state(len(cu_seqlens) - 1), None
        else:
            relation, time = by_layer(state, "relation"), by_layer(state, "time")
        timed, after["time"] = self.time_ssm.carry(x, gap, cu_seqlens, time)
        hidden, after["relation"] = self.relation_ssm.carry(self.norm(x + timed), cu_seqlens, relation)
        return hidden, of_layers(after)


@register_model(SS4RecSettings)
class SS4Rec(PackedRecommender):
    """Blocks of a time-aware and a relation-aware state-space model over item embeddings."""

    steps = True

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.item_embedding = nn.Embedding(self.n_items, self.hidden_size)
        self.make_time_embeddings()
        self.time_aware, self.time_unit = config["time_aware"], config["time_unit"]
        self.reads_ahead = self.time_aware and config["request_time"] == "known"
        self.blocks = nn.ModuleList(SS4RecBlock(config, self.reads_ahead) for _ in range(config["num_layers"]))
        self.apply(init_weights)
        blocks: Any = self.blocks
        for block in blocks:
            block.time_ssm.reset_parameters()

    @classmethod
    def time_columns(cls, config) -> tuple[str, ...]:
        """See :meth:`PackedRecommender.time_columns`."""
        own = "next_gap" if config["request_time"] == "known" else "gap"
        return (*super().time_columns(config), *((own,) if config["time_aware"] else ()))

    def encode(self, items: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False) -> Tensor:
        """See :meth:`PackedRecommender.encode`."""
        hidden, gap = self.embed(items), self._gap(items)
        for block in self.blocks[:-1]:
            hidden = block(hidden, gap, cu_seqlens)
        return self.blocks[-1](hidden, gap, cu_seqlens, read, last)

    def _gap(self, items: Tensor) -> Tensor:
        """The time that passes over each row, ``[T]``: since the event before, or until the one that follows."""
        if not self.time_aware:
            return torch.ones_like(self.ids(items))
        gap = self.column(items, "next_gap" if self.reads_ahead else "gap")
        return gap.to(self.item_embedding.weight.dtype) / self.time_unit

    def prefill(self, items: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`PackedRecommender.prefill`."""
        return self._carry(items, cu_seqlens, None)

    def step(self, items: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`PackedRecommender.step`."""
        return self._carry(items, None, state)

    def _carry(self, items: Tensor, cu_seqlens: Tensor | None, state: dict[str, Tensor] | None):
        hidden, gap = self.embed(items), self._gap(items)
        after: dict[int, dict[str, Tensor]] = {}
        blocks: Any = self.blocks
        for i, block in enumerate(blocks):
            hidden, after[i] = block.carry(hidden, gap, cu_seqlens, None if state is None else by_layer(state, i))
        return hidden, of_layers(after)
