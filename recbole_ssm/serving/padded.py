"""Blocks on padded batches in torch's own operators alone, for what a compiler is to take.

The ops of this package choose kernels by what they are given, which no exporter can follow. So a model that is to be
exported is copied, and those of its modules that call ops become the ones here (:func:`padded`): the same weights, and
the model's own code around them. Right-padded rows are packed as they are, each sequence ``L`` rows long with the
padding after its end, which no earlier row sees.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops import scan

from recbole_ssm.layers import Mamba, Mamba2, Mamba3, MixtureOfExperts, MovingAverage, PreferenceAwareAttention
from recbole_ssm.models.bsarec import BSARec
from recbole_ssm.models.esasrec import CausalAttention
from recbole_ssm.models.recblr import GatedRecurrence
from recbole_ssm.models.ss4rec import TimeAwareSSM
from recbole_ssm.models.ssd4rec import BiSSDLayer, SSD4Rec
from recbole_ssm.models.starrec import DualPathLayer
from recbole_ssm.models.tim4rec import TimeScale
from recbole_ssm.ops.packing import Borders, borders, flip_rows, know, positions, select_rows

State = dict[str, Tensor]


class PaddedBorders(Borders):
    """Borders of sequences that all have ``longest`` rows, their padding among them.

    Args:
        lengths: of what is no padding, int64 ``[B]``.
        longest: ``L``.
    """

    def __init__(self, lengths: Tensor, longest: int):
        self.lengths, self.longest, self.count = lengths, longest, lengths.shape[0]

    def table(self, name: str) -> Tensor:
        """``positions`` and ``flip_rows``, int64 ``[B L]``; padding is not flipped."""
        place = torch.arange(self.longest, device=self.lengths.device)[None].expand(self.count, -1)
        if name == "flip_rows":
            first = torch.arange(self.count, device=place.device)[:, None] * self.longest
            length = self.lengths[:, None]
            place = first + torch.where(place < length, length - 1 - place, place)
        elif name != "positions":
            raise KeyError(name)
        return place.flatten()


def padded_borders(lengths: Tensor, longest: int) -> Tensor:
    """Borders to call a model with whose modules are those of :func:`padded`, int32 ``[B+1]``."""
    cu_seqlens = torch.arange(lengths.shape[0] + 1, dtype=torch.int32) * longest
    know(cu_seqlens, PaddedBorders(lengths, longest))
    return cu_seqlens


def _batch(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``[B L, ...]`` to ``[B, L, ...]``."""
    known: Any = borders(cu_seqlens)
    return x.reshape(known.count, known.longest, *x.shape[1:])


def each_row(advance: Callable, state: Tensor, columns: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Carry a state through the rows of a batch.

    Args:
        advance: of the state ``[B, ...]`` and a row of each column the next state and what the row gets.
        state: the first.
        columns: ``[B, L, ...]`` each.

    Returns:
        The last state, and what the rows get, ``[B, L, ...]``.
    """
    state, found = scan(advance, state, tuple(column.transpose(0, 1).contiguous() for column in columns))
    return state, found.transpose(0, 1)


def one_row(advance: Callable, state: Tensor, columns: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """:func:`each_row` where there is one."""
    state, found = advance(state, tuple(column[:, 0] for column in columns))
    return state, found[:, None]


class _Padded:
    """What the blocks of state spaces have in common."""

    initial_state: Callable[[int], State]
    out_proj: nn.Linear

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False,
        step_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See the block's own."""
        x, scale = _batch(x, cu_seqlens), None if step_scale is None else _batch(step_scale, cu_seqlens)
        y, _ = self._run(x, self.initial_state(x.shape[0]), each_row, scale)
        return self.out_proj(select_rows(y.flatten(0, 1), read))

    def carry(
        self, x: Tensor, cu_seqlens: Tensor | None, state: State, step_scale: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """See the block's own; of one row of each sequence."""
        y, state = self._run(x[:, None], state, one_row, None if step_scale is None else step_scale[:, None])
        return self.out_proj(y[:, 0]), state

    def _run(self, x: Tensor, state: State, recur: Callable, step_scale: Tensor | None = None) -> tuple[Tensor, State]:
        """What ``out_proj`` is of, ``[B, L, d_inner]``, for ``x [B, L, d]``, and the state after it."""
        raise NotImplementedError


class PaddedMamba(_Padded, Mamba):
    """See :class:`~recbole_ssm.layers.Mamba`."""

    def _run(self, x: Tensor, state: State, recur: Callable, step_scale: Tensor | None = None) -> tuple[Tensor, State]:
        x, z = self.in_proj(x).chunk(2, -1)
        seen = torch.cat([state["conv"], x.mT], -1)
        after, x = seen[..., x.shape[1] :], F.silu(self.conv(seen)).mT
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        dt, A = F.softplus(self.dt_proj(dt)), -torch.exp(self.A_log)

        def advance(state, row):
            dt, drive, B, C = row
            state = torch.exp(dt[..., None] * A) * state + drive[..., None] * B[:, None]
            return state, (state * C[:, None]).sum(-1)

        ssm, y = recur(advance, state["ssm"], (dt, dt * x, B, C))
        return (y + self.D * x) * F.silu(z), {"conv": after, "ssm": ssm}


class PaddedMamba2(_Padded, Mamba2):
    """See :class:`~recbole_ssm.layers.Mamba2`."""

    def _run(self, x: Tensor, state: State, recur: Callable, step_scale: Tensor | None = None) -> tuple[Tensor, State]:
        z, xBC, dt = self.in_proj(x).split([self.d_inner, *self._widths], -1)
        seen = torch.cat([state["conv"], xBC.mT], -1)
        x, B, C = self._split(F.silu(self.conv(seen)).mT)
        dt = F.softplus((dt if step_scale is None else dt * step_scale) + self.dt_bias)

        def advance(state, row):
            decay, drive, B, C = row
            state = decay[..., None, None] * state + drive[..., None] * B[:, None, None]
            return state, (state * C[:, None, None]).sum(-1)

        ssm, y = recur(advance, state["ssm"], (torch.exp(dt * self._rates()), dt[..., None] * x, B, C))
        after = {"conv": seen[..., xBC.shape[1] :], "ssm": ssm}
        return self._gate(y + self.D[:, None] * x, z), after


class PaddedMamba3(_Padded, Mamba3):
    """See :class:`~recbole_ssm.layers.Mamba3`."""

    def _run(self, x: Tensor, state: State, recur: Callable, step_scale: Tensor | None = None) -> tuple[Tensor, State]:
        outward, inward = self.in_proj(x).split(self._widths, -1)
        z, C = outward.split(self._outward, -1)
        x, B, decay, now, before, turn = self._inputs(inward)
        theta = state["angle"][:, None] + turn.cumsum(1)
        B, C = self._rotated_B(B, theta), self._rotated_C(C, theta)
        later = F.pad(before[:, 1:], (0, 0, 0, 1))
        entering = before[:, 0, :, None, None] * state["x"][..., None] * state["B"][:, :, None]

        def advance(state, row):
            decay, drive, B, C = row
            state = decay[..., None, None] * state + drive[..., None] * B[:, :, None]
            return state, (state * C[:, :, None]).sum(-1)

        columns = (torch.exp(-decay), (now + later)[..., None] * x, B, C)
        ssm, y = recur(advance, state["ssm"] + entering, columns)
        after = {"ssm": ssm, "x": x[:, -1], "B": B[:, -1], "angle": self._less_whole_turns(theta[:, -1])}
        return self._gate(self._with_own(y, x, B, C, later), z), after


def _decayed(state: Tensor, row: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A state ``[B, D, 1]`` after a row of what enters it and of its decay, ``[B, D]`` each, and itself, ``[B, D]``."""
    entering, decay = row
    state = torch.exp(-decay)[..., None] * state + entering[..., None]
    return state, state.sum(-1)  # of one number; a view of the state itself is what scan refuses


class PaddedRecurrence(_Padded, GatedRecurrence):
    """See :class:`~recbole_ssm.models.recblr.GatedRecurrence`."""

    def _run(self, x: Tensor, state: State, recur: Callable, step_scale: Tensor | None = None) -> tuple[Tensor, State]:
        u, z = self.in_proj(x).chunk(2, -1)
        seen = torch.cat([state["conv"], u.mT], -1)
        after, h = recur(_decayed, state["h"], self.gated(F.silu(self.conv(seen)).mT))
        return h * F.silu(z), {"conv": seen[..., u.shape[1] :], "h": after}


class PaddedMovingAverage(MovingAverage):
    """See :class:`~recbole_ssm.layers.MovingAverage`."""

    def forward(self, x: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False) -> Tensor:
        """See there."""
        rows = _batch(x, cu_seqlens)
        low, _ = self._run(rows, self.initial_state(rows.shape[0]), each_row)
        return self.filtered(select_rows(x, read), select_rows(low.flatten(0, 1), read))

    def carry(self, x: Tensor, cu_seqlens: Tensor | None, state: State) -> tuple[Tensor, State]:
        """See there; of one row of each sequence."""
        low, state = self._run(x[:, None], state, one_row)
        return self.filtered(x, low[:, 0]), state

    def _run(self, x: Tensor, state: State, recur: Callable) -> tuple[Tensor, State]:
        after, low = recur(_decayed, state["low"], self.entering(x))
        return low, {"low": after}


class PaddedBiSSDLayer(BiSSDLayer):
    """See :class:`~recbole_ssm.models.ssd4rec.BiSSDLayer`."""

    def _backward_of_prefixes(self, x: Tensor, cu_seqlens: Tensor, read: Tensor | None) -> Tensor:
        """What the backward scan of each whole sequence gives its rows."""
        flipped = flip_rows(cu_seqlens)
        back = self.mamba(x.index_select(0, flipped), cu_seqlens)
        return select_rows(back.index_select(0, flipped) if self.flip_back else back, read)


class PaddedAttention(PreferenceAwareAttention):
    """See :class:`~recbole_ssm.layers.PreferenceAwareAttention`."""

    def forward(
        self, x: Tensor, item_embedding: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False
    ) -> Tensor:
        """See there; ``read`` has as many rows of one sequence as of another."""
        state = {name: _batch(row, cu_seqlens) for name, row in self._kept(x, item_embedding).items()}
        count, length = state["key"].shape[:2]

        def asking(of: Tensor) -> Tensor:  # [B L, d] to [B, Q, d]
            return select_rows(of, read).reshape(count, -1, of.shape[-1])

        own = asking(state["gated"].flatten(0, 1)) if self.use_similarity else None
        back = asking(positions(cu_seqlens)[:, None]) - torch.arange(length, device=x.device)
        seen = (back >= 0) if self.window is None else (back >= 0) & (back < self.window)
        x = select_rows(x, read)
        q = self.query_key_value(x)[:, : x.shape[1]].reshape(count, -1, x.shape[1])
        return self._output(x, self._attend(q, own, state, seen).flatten(0, 1))


class PaddedCausalAttention(CausalAttention):
    """See :class:`~recbole_ssm.models.esasrec.CausalAttention`."""

    def forward(self, x: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False) -> Tensor:
        """See there; ``read`` has as many rows of one sequence as of another."""
        query, key_value = self.query_key_value(x).split([x.shape[1], 2 * x.shape[1]], -1)
        key_value = _batch(key_value, cu_seqlens)
        count, length = key_value.shape[:2]
        asking = select_rows(query, read).reshape(count, -1, x.shape[1])
        position = select_rows(positions(cu_seqlens), read).reshape(count, -1, 1)
        seen = torch.arange(length, device=x.device) <= position
        return self.out_proj(self._attend(asking, key_value, seen).flatten(0, 1))


class PaddedDualPathLayer(DualPathLayer):
    """See :class:`~recbole_ssm.models.starrec.DualPathLayer`."""

    def fused(self, attended: Tensor, scanned: Tensor) -> Tensor:
        """See there; a transposed matrix by a vector, as there, is multiplied wrongly by ONNX Runtime (1.32)."""
        if self.fusion_gate is not None:
            return super().fused(attended, scanned)
        gamma = self.fusion_logits.softmax(0)
        return gamma[0] * attended + gamma[1] * scanned


class PaddedMixture(MixtureOfExperts):
    """See :class:`~recbole_ssm.layers.MixtureOfExperts`."""

    def _chosen_experts(self, y: Tensor, chosen: Tensor) -> Tensor:
        """All are computed, whichever are chosen: ``[k, M, d]``."""
        found = self._experts(y.expand(self.gate.out_features, -1, -1))
        return found.gather(0, chosen.T[..., None].expand(-1, -1, y.shape[-1]))


class PaddedTimeScale(TimeScale):
    """See :class:`~recbole_ssm.models.tim4rec.TimeScale`; of one row of each sequence where there is a state."""

    def forward(
        self, time: Tensor, cu_seqlens: Tensor | None, state: State | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """As the layer's own."""
        rows = time[:, None] if cu_seqlens is None else _batch(time, cu_seqlens)
        before = self.initial_state(rows.shape[0]) if state is None else state
        scale, after = rows * self.own(rows), {}
        convs: Any = self.convs
        for i, conv in enumerate(convs):
            seen = torch.cat([before[f"conv{i}"], scale.mT], -1)
            after[f"conv{i}"], scale = seen[..., rows.shape[1] :], F.silu(conv(seen)).mT
        scale = scale.flatten(0, 1)
        if self.gate is not None and self.norm is not None:
            gate = self.gate(time)
            time = self.norm(gate * time + (1 - gate) * scale)
        return scale, time, after


class PaddedTimeAwareSSM(TimeAwareSSM):
    """See :class:`~recbole_ssm.models.ss4rec.TimeAwareSSM`; of complex numbers, which ONNX has not, both parts."""

    def forward(self, u: Tensor, gap: Tensor, cu_seqlens: Tensor) -> Tensor:
        """See there."""
        rows = _batch(u, cu_seqlens)
        driven = self._driven_parts(rows)
        held = driven if self.reads_ahead else F.pad(driven[:, :-1], (0, 0, 0, 0, 1, 0))
        columns = self._factors(_batch(gap, cu_seqlens), held)
        _, x = each_row(self._advance, torch.zeros_like(driven[:, 0]), columns)
        return self._read_parts(x, rows).flatten(0, 1)

    def carry(
        self, u: Tensor, gap: Tensor, cu_seqlens: Tensor | None, state: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See there; of one row of each sequence."""
        assert state is not None
        driven = self._driven_parts(u)
        x, _ = self._advance(state["x"], self._factors(gap, driven if self.reads_ahead else state["held"]))
        return self._read_parts(x, u), {"x": x} if self.reads_ahead else {"x": x, "held": driven}

    @staticmethod
    def _advance(x: Tensor, row: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        decay, entering = row
        x = _product(decay, x) + entering
        return x, x.clone()  # scan refuses a row that is the state itself

    def _driven_parts(self, u: Tensor) -> Tensor:
        """``[..., P, 2]``."""
        return self.into_state(u).unflatten(-1, (-1, 2))

    def _read_parts(self, x: Tensor, u: Tensor) -> Tensor:
        return self.out_of_state(x.flatten(-2)) + self.D * u

    def _factors(self, gap: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        """What a state is multiplied with over a gap, and what enters it, ``[..., P, 2]``."""
        step = gap.to(self.log_dt.dtype)[..., None] * torch.exp(self.log_dt)
        real, imag = -torch.exp(self.A_log), self.A_imag
        shrink, angle = real * step, imag * step
        decay = torch.exp(shrink)[..., None] * torch.stack([torch.cos(angle), torch.sin(angle)], -1)
        # Decay less 1, without subtracting it from what is nearly 1.
        half = torch.tanh(shrink / 2)
        less = 2 * half / (1 - half) * torch.cos(angle) - 2 * torch.sin(angle / 2) ** 2
        gone = torch.stack([less, decay[..., 1]], -1)
        inverse = torch.stack([real, -imag], -1) / (real**2 + imag**2)[:, None]
        return decay, _product(_product(gone, inverse), held)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Of complex numbers, real and imaginary part side by side, ``[..., 2]``."""
    (real, imag), (other_real, other_imag) = a.unbind(-1), b.unbind(-1)
    return torch.stack([real * other_real - imag * other_imag, real * other_imag + imag * other_real], -1)


class PaddedBSARec(BSARec):
    """See :class:`~recbole_ssm.models.bsarec.BSARec`, whose rows have their padding in front."""

    def encode(self, items: Tensor, cu_seqlens: Tensor, read: Tensor | None = None, last: bool = False) -> Tensor:
        """See there; ``read`` is the last row of each sequence."""
        rows, known = _batch(items, cu_seqlens), borders(cu_seqlens)
        first = self.max_seq_length - known.lengths
        source = torch.arange(self.max_seq_length) - first[:, None]  # which item stands in a place; below 0 none does
        source = source.view(*source.shape, *(1,) * (rows.ndim - 2)).expand(-1, -1, *rows.shape[2:])
        return self.of_rows(rows.gather(1, source.clamp_min(0)) * (source >= 0), first, last=True)[:, 0]


PADDED: dict[type, type] = {
    Mamba: PaddedMamba,
    Mamba2: PaddedMamba2,
    Mamba3: PaddedMamba3,
    MovingAverage: PaddedMovingAverage,
    GatedRecurrence: PaddedRecurrence,
    TimeAwareSSM: PaddedTimeAwareSSM,
    TimeScale: PaddedTimeScale,
    BSARec: PaddedBSARec,
    BiSSDLayer: PaddedBiSSDLayer,
    DualPathLayer: PaddedDualPathLayer,
    PreferenceAwareAttention: PaddedAttention,
    CausalAttention: PaddedCausalAttention,
    MixtureOfExperts: PaddedMixture,
}


def padded(model: nn.Module) -> Any:
    """A copy of a model for inference on a CPU, whose modules take :func:`padded_borders`."""
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    for module in model.modules():
        if type(module) in PADDED:
            module.__class__ = PADDED[type(module)]
    if isinstance(model, SSD4Rec):
        model.one_pass = True  # so that it leaves both directions to its layers
    return model
