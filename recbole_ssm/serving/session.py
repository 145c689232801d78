"""Live sessions: what a user's history has come to, carried from event to event at a cost that does not grow."""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from recbole_ssm.data.sequence_dataset import time_gaps
from recbole_ssm.errors import UserError
from recbole_ssm.serving.histories import Histories

if TYPE_CHECKING:
    from recbole_ssm.serving.recommender import Recommendations, Recommender

FORMAT = 1
RULES = ("window", "endless")
HIDDEN = "hidden"


@dataclass(frozen=True)
class State:
    """What a session has come to.

    Attributes:
        items: ids of all events, int32 ``[n]``, oldest first: to leave them out, and to read the latest of them anew.
        carried: the model's own state, tensors ``[1, ...]`` by name, with the representation ``hidden [1, d]``; empty
            where the latest events are read anew.
        gaps: time gaps before each event, uint8 ``[n]``, where the model reads them.
        time: of the last event.
    """

    items: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    carried: dict[str, Tensor] = field(default_factory=dict)
    gaps: np.ndarray | None = None
    time: float | None = None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def nbytes(self) -> int:
        """Memory that its arrays take."""
        gaps = 0 if self.gaps is None else self.gaps.nbytes
        return self.items.nbytes + gaps + sum(value.nbytes for value in self.carried.values())


class Sessions:
    """What happens to states, of many users at once.

    A model that steps (:attr:`~recbole_ssm.models.base.PackedRecommender.steps`) carries its state from event to event.
    Another one reads the latest events anew where recommendations are asked for. Beyond ``MAX_ITEM_LIST_LENGTH`` events
    there is a choice:

    - ``window``: the latest ``MAX_ITEM_LIST_LENGTH`` events are read anew, as in training and evaluation;
    - ``endless``: the state goes on at the same cost. A state space keeps what it will of all events, attention reads
      the latest ``MAX_ITEM_LIST_LENGTH``, and positions stay at the last.

    Args:
        recommender: whose sessions they are.
        rule: ``window`` or ``endless``.

    Attributes:
        steps: whether an event costs the same whatever came before.

    Raises:
        UserError: for another rule, or ``endless`` of a model that does not step.
    """

    def __init__(self, recommender: "Recommender", rule: str = "window"):
        if rule not in RULES:
            raise UserError(f"rule is {rule!r}: choose {' or '.join(RULES)}.")
        self.recommender, self.rule = recommender, rule
        self.steps = recommender.packs and recommender.model.steps
        if rule == "endless" and not self.steps:
            raise UserError(f"{recommender.config['model']}, as it is set, carries no state: choose the rule window.")

    def new(self) -> State:
        """A session without events."""
        return State(gaps=np.zeros(0, np.uint8) if self.recommender.wants_gaps else None)

    def start(self, histories: Histories, times: Sequence[float | None] | None = None) -> list[State]:
        """States after whole histories, in one pass.

        Args:
            histories: the events so far.
            times: of each history's last event, where the model reads times.
        """
        ends = np.cumsum(histories.lengths)
        borders = list(zip(ends - histories.lengths, ends, strict=True))
        times = times or [None] * len(histories)
        if histories.times is not None:
            times = [float(histories.times[end - 1]) if end > begin else None for begin, end in borders]
        states = []
        for (begin, end), time in zip(borders, times, strict=True):
            gaps = None if histories.gaps is None else histories.gaps[begin:end].astype(np.uint8)
            states.append(State(histories.items[begin:end].astype(np.int32), {}, gaps, time))
        carried = [i for i, state in enumerate(states) if len(state) and self._carries(len(state))]
        if carried:
            for i, after in zip(carried, self._prefilled(histories.take(np.array(carried))), strict=True):
                states[i] = replace(states[i], carried=after)
        return states

    @torch.inference_mode()
    def update(
        self, states: Sequence[State], items: Sequence[int], times: Sequence[float | None] | None = None
    ) -> list[State]:
        """States after one more event each.

        Args:
            states: of different users; they are left as they are.
            items: item ids, 0 for an unknown item, which changes nothing.
            times: of the events, where the model reads them.

        Raises:
            UserError: for a time that is missing or before the last.
        """
        times = [None] * len(states) if times is None else times
        after, stepping = list(states), []
        for i, (state, item, time) in enumerate(zip(states, items, times, strict=True)):
            if not item:
                continue
            gap = self._gap(state, time)
            gaps = None if state.gaps is None else np.append(state.gaps, np.uint8(gap))
            after[i] = State(np.append(state.items, np.int32(item)), {}, gaps, state.time if time is None else time)
            if self._carries(len(after[i])):
                stepping.append(i)
        begun = [i for i in stepping if len(after[i]) > 1 and states[i].carried]
        fresh = [i for i in stepping if len(after[i]) == 1 or not states[i].carried]
        if begun:
            self._step(states, after, begun)
        if fresh:
            whole = self.histories([after[i] for i in fresh])
            for i, carried in zip(fresh, self._prefilled(whole), strict=True):
                after[i] = replace(after[i], carried=carried)
        return after

    def top(
        self, states: Sequence[State], k: int, exclude_seen: bool = True, columns: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`~recbole_ssm.serving.recommender.Recommender.top`."""
        histories, represented = self.histories(states), None
        with torch.inference_mode():
            some = [state for state in states if len(state)]
            if self.recommender.packs and some:
                anew = [state for state in some if not state.carried]
                read = iter(self.recommender.represent(self.histories(anew)).split(1) if anew else ())
                represented = torch.cat([state.carried[HIDDEN] if state.carried else next(read) for state in some])
            return self.recommender.top(histories, k, exclude_seen, columns, represented)

    def histories(self, states: Sequence[State]) -> Histories:
        """The events of sessions."""
        lengths = np.array([len(state) for state in states], dtype=np.int64)
        items = np.concatenate([np.zeros(0, np.int32), *(state.items for state in states)]).astype(np.int64)
        gaps = None
        if self.recommender.wants_gaps:
            known = [state.gaps for state in states if state.gaps is not None]
            gaps = np.concatenate([np.zeros(0, np.uint8), *known]).astype(np.int64)
        return Histories(items, lengths, gaps)

    def to_bytes(self, state: State) -> bytes:
        """A state for any store of keys and values."""
        about = {"format": FORMAT, "model": self.recommender.digest, "rule": self.rule, "time": state.time}
        tensors = {f"carried.{name}": value.contiguous().cpu() for name, value in state.carried.items()}
        tensors["items"] = torch.from_numpy(np.ascontiguousarray(state.items))
        if state.gaps is not None:
            tensors["gaps"] = torch.from_numpy(np.ascontiguousarray(state.gaps))
        return safetensors.torch.save(tensors, {"about": json.dumps(about)})

    def from_bytes(self, data: bytes) -> State:
        """What :meth:`to_bytes` gave; no code in it is run.

        Raises:
            UserError: for bytes that are no state, or one of another model, version or rule.
        """
        try:
            (size,) = struct.unpack_from("<Q", data)  # safetensors' header, which its own reader keeps to itself
            about = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["about"])
            tensors = safetensors.torch.load(data)
            kept = {key: about[key] for key in ("format", "model", "rule", "time")}
        except (safetensors.SafetensorError, struct.error, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"these bytes are no state of a session ({type(error).__name__}): start anew.") from error
        if kept["format"] != FORMAT:
            raise UserError(f"the state has format {kept['format']!r}, and this version reads {FORMAT}: start anew.")
        if kept["model"] != self.recommender.digest:
            raise UserError("the state is one of another model: start anew, with the items of the session.")
        if kept["rule"] != self.rule:
            raise UserError(f"the state was kept by the rule {kept['rule']!r}, not {self.rule!r}: start anew.")
        return self._checked(tensors, kept["time"])

    def _checked(self, tensors: dict[str, Tensor], time: Any) -> State:
        damaged = UserError("the state is damaged: start anew, with the items of the session.")
        items, gaps = tensors.pop("items", None), tensors.pop("gaps", None)
        if items is None or items.dtype != torch.int32 or items.dim() != 1:
            raise damaged
        if len(items) and not 0 < int(items.min()) <= int(items.max()) < self.recommender.vocabulary.item_num:
            raise damaged
        wants_gaps = self.recommender.wants_gaps
        if (gaps is not None) != wants_gaps or (
            gaps is not None and (gaps.dtype, len(gaps)) != (torch.uint8, len(items))
        ):
            raise damaged
        if not isinstance(time, int | float | None) or (time is not None and not np.isfinite(time)):
            raise damaged
        carried = {name.removeprefix("carried."): value for name, value in tensors.items()}
        template = self._template if carried else {}
        if carried and (not len(items) or {n: (v.shape, v.dtype) for n, v in carried.items()} != template):
            raise damaged
        if not all(bool(value.isfinite().all()) for value in carried.values() if value.is_floating_point()):
            raise damaged
        if "position" in carried and int(carried["position"]) != len(items):
            raise damaged
        carried = {name: value.to(self.recommender.device) for name, value in carried.items()}
        return State(items.numpy(), carried, None if gaps is None else gaps.numpy(), time)

    @cached_property
    def _template(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        one = Histories(
            np.ones(1, np.int64), np.ones(1, np.int64), np.zeros(1, np.int64) if self.recommender.wants_gaps else None
        )
        (carried,) = self._prefilled(one)
        return {name: (value.shape, value.dtype) for name, value in carried.items()}

    def _carries(self, count: int) -> bool:
        """Whether a session of so many events has a state."""
        return self.steps and (self.rule == "endless" or count <= self.recommender.max_length)

    def _gap(self, state: State, time: float | None) -> int:
        if time is not None and not np.isfinite(time):
            raise UserError(f"time is {time}: give a finite number.")
        if time is not None and state.time is not None and time < state.time:
            raise UserError(f"time {time} is before that of the session's last event, {state.time}.")
        if not self.recommender.wants_gaps:
            return 0
        if time is None:
            raise UserError("this model reads the time of each event: give it.")
        if state.time is None:
            return 0
        return int(time_gaps(np.array([state.time, time]), np.array([0]))[1])

    def _step(self, states: Sequence[State], after: list[State], which: list[int]) -> None:
        model, device = self.recommender.model, self.recommender.device
        items = torch.tensor([int(after[i].items[-1]) for i in which])
        if self.recommender.wants_gaps:
            gaps = torch.tensor([int(after[i].gaps[-1]) for i in which])  # type: ignore[index]
            items = torch.stack([items, gaps], -1)
        names = [name for name in states[which[0]].carried if name != HIDDEN]
        one = len(which) == 1
        before = {
            n: states[which[0]].carried[n] if one else torch.cat([states[i].carried[n] for i in which]) for n in names
        }
        hidden, carried = model.step(items.to(device), before)
        for i, part in zip(which, _each({**carried, HIDDEN: model.read_out(hidden)}, len(which)), strict=True):
            after[i] = replace(after[i], carried=part)

    @torch.inference_mode()
    def _prefilled(self, histories: Histories) -> list[dict[str, Tensor]]:
        model, device = self.recommender.model, self.recommender.device
        cu_seqlens = histories.cu_seqlens().to(device)
        hidden, carried = model.prefill(histories.inputs().to(device), cu_seqlens)
        last = hidden.index_select(0, cu_seqlens[1:].long() - 1)
        return _each({**carried, HIDDEN: model.read_out(last)}, len(histories))


def _each(tensors: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """``[S, ...]`` by name to ``S`` of ``[1, ...]`` by name, which share no memory."""
    if count == 1:
        return [tensors]
    parts = {name: [part.clone() for part in value.split(1)] for name, value in tensors.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(count)]


class Session:
    """One user's live session; see :class:`Sessions` for what happens past ``MAX_ITEM_LIST_LENGTH`` events.

    Args:
        recommender: whose session it is.
        rule: ``window`` or ``endless``.

    Attributes:
        state: what it has come to.
    """

    def __init__(self, recommender: "Recommender", rule: str = "window"):
        self._recommender, self._sessions = recommender, Sessions(recommender, rule)
        self.state = self._sessions.new()

    @property
    def recomputes(self) -> bool:
        """Whether recommendations read the latest events anew, for the model carries no state."""
        return not self._sessions.steps

    def append(self, item: Any, time: float | None = None) -> None:
        """One more event; an item that the model does not know changes nothing, and a line of the log says so.

        Raises:
            UserError: for a time that is missing where the model reads it, or before the last.
        """
        ids = self._recommender.vocabulary.ids([item])
        (self.state,) = self._sessions.update([self.state], ids.tolist(), [time])

    def recommend(self, k: int = 10, exclude_seen: bool = True, candidates: Any = None) -> "Recommendations":
        """The items that are most likely to come next; see :meth:`Recommender.recommend`."""
        columns = None if candidates is None else self._recommender.columns(candidates)
        return self._recommender.named(*self._sessions.top([self.state], k, exclude_seen, columns))

    def to_bytes(self) -> bytes:
        """See :meth:`Sessions.to_bytes`."""
        return self._sessions.to_bytes(self.state)

    def restore(self, data: bytes) -> None:
        """Go on from the bytes of a state; see :meth:`Sessions.from_bytes`."""
        self.state = self._sessions.from_bytes(data)
