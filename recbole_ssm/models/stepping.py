"""Models that go on from a state, one item at a time: what is common to how their layers are gone through."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from recbole_ssm.models.base import PackedRecommender
from recbole_ssm.ops.packing import positions, sequence_lengths

# A live session carries at most so many events' keys and values (at width 64 some 3 MB a layer), which each event
# copies: what attends to more reads the latest events anew.
MOST_CARRIED = 1 << 12


class CarryingRecommender(PackedRecommender):
    """A model that steps by its layers alone: the state of a history is what each of them carries.

    A subclass implements :meth:`carrying` and :meth:`carry`.
    """

    steps = True

    def carrying(self) -> list[Any]:
        """The layers, each with ``initial_state`` and ``carry`` (:meth:`recbole_ssm.layers.Mamba.carry`)."""
        raise NotImplementedError

    def carry(
        self, items: Tensor, cu_seqlens: Tensor | None, states: list[dict[str, Tensor]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden states of more items of each sequence, and the model's state after them (:func:`of_layers`).

        Args:
            items: see :meth:`PackedRecommender.encode`.
            cu_seqlens: their borders; one item of each sequence where absent.
            states: of each layer, before these items.
        """
        raise NotImplementedError

    def prefill(self, items: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`PackedRecommender.prefill`."""
        return self.carry(items, cu_seqlens, [layer.initial_state(len(cu_seqlens) - 1) for layer in self.carrying()])

    def step(self, items: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`PackedRecommender.step`."""
        return self.carry(items, None, [by_layer(state, i) for i in range(len(self.carrying()))])


class AttendingRecommender(PackedRecommender):
    """A model whose layers also attend to events before: the latest ``MAX_ITEM_LIST_LENGTH``, in a session's window.

    A subclass has ``layers``, each with ``prefill`` and ``step``
    (:meth:`recbole_ssm.layers.PreferenceAwareAttention.prefill`), and implements :meth:`start`.
    """

    def start(self, items: Tensor, position: Tensor) -> tuple[Tensor, ...]:
        """What the first layer reads, ``[T, d]``, and what all layers read beside it.

        Args:
            items: see :meth:`PackedRecommender.encode`.
            position: of each item in its sequence, ``[T]``, below ``MAX_ITEM_LIST_LENGTH``.
        """
        raise NotImplementedError

    def prefill(self, items: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`PackedRecommender.prefill`."""
        hidden, *beside = self.start(items, self._at(positions(cu_seqlens)))
        states: dict[int, dict[str, Tensor]] = {}
        layers: Any = self.layers
        for i, layer in enumerate(layers):
            hidden, states[i] = layer.prefill(hidden, *beside, cu_seqlens, self.max_seq_length)
        return hidden, {"position": sequence_lengths(cu_seqlens), **of_layers(states)}

    def step(self, items: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`PackedRecommender.step`."""
        position = state["position"]
        hidden, *beside = self.start(items, self._at(position))
        states: dict[int, dict[str, Tensor]] = {}
        layers: Any = self.layers
        for i, layer in enumerate(layers):
            hidden, states[i] = layer.step(hidden, *beside, position, by_layer(state, i))
        return hidden, {"position": position + 1, **of_layers(states)}

    def _at(self, position: Tensor) -> Tensor:
        """Past the maximum length, where a session without an end goes on, positions stay at the last."""
        return position.clamp_max(self.max_seq_length - 1)


def by_layer(state: dict[str, Tensor], layer: int | str) -> dict[str, Tensor]:
    """What a layer keeps of a model's state, whose names begin with the layer's."""
    prefix = f"{layer}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def of_layers(states: Mapping[Any, dict[str, Tensor]]) -> dict[str, Tensor]:
    """A model's state of its layers', the inverse of :func:`by_layer`."""
    return {f"{layer}.{name}": value for layer, state in states.items() for name, value in state.items()}
