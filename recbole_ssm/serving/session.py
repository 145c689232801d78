"""Live sessions: what a user's history has come to, carried from event to event at a cost that does not grow."""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from recbole_ssm.data.context import reads_request
from recbole_ssm.errors import UserError
from recbole_ssm.serving.histories import ASK_WITH_TIME, ASKED_IN_VAIN, Histories, histories_of

if TYPE_CHECKING:
    from recbole_ssm.serving.recommender import Recommendations, Recommender

FORMAT = 2
RULES = ("window", "endless")
HIDDEN = "hidden"


@dataclass(frozen=True)
class State:
    """What a session has come to.

    Attributes:
        items: ids of all events, int32 ``[n]``, oldest first: to leave them out, and to read the latest of them anew.
        carried: the model's own state, tensors ``[1, ...]`` by name, with the representation ``hidden [1, d]``; empty
            where the latest events are read anew. Of a model that reads the time of what follows an event, it is of all
            events but the last.
        times: of each event, float64 ``[n]``, where the model reads them.
        time: of the last event.
    """

    items: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    carried: dict[str, Tensor] = field(default_factory=dict)
    times: np.ndarray | None = None
    time: float | None = None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def nbytes(self) -> int:
        """Memory that its arrays take."""
        times = 0 if self.times is None else self.times.nbytes
        return self.items.nbytes + times + sum(value.nbytes for value in self.carried.values())


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
        waits: whether the model reads the time of what follows an event, and so takes it in when that is known.

    Raises:
        UserError: for another rule, or ``endless`` of a model that does not step.
    """

    def __init__(self, recommender: "Recommender", rule: str = "window"):
        if rule not in RULES:
            raise UserError(f"rule is {rule!r}: choose {' or '.join(RULES)}.")
        self.recommender, self.rule = recommender, rule
        self.steps = recommender.packs and recommender.model.steps
        self.waits = reads_request(recommender.time_columns)
        if rule == "endless" and not self.steps:
            raise UserError(f"{recommender.config['model']}, as it is set, carries no state: choose the rule window.")

    def new(self) -> State:
        """A session without events."""
        return State(times=np.zeros(0) if self.recommender.time_columns else None)

    def start(self, histories: Histories) -> list[State]:
        """States after whole histories, in one pass."""
        ends = np.cumsum(histories.lengths)
        borders = list(zip(ends - histories.lengths, ends, strict=True))
        times: list[float | None] = [None] * len(histories)
        if histories.times is not None:
            times = [float(histories.times[end - 1]) if end > begin else None for begin, end in borders]
        states = []
        for (begin, end), time in zip(borders, times, strict=True):
            read = histories.times if self.recommender.time_columns else None
            own = read if read is None else read[begin:end].copy()
            states.append(State(histories.items[begin:end].astype(np.int32), {}, own, time))
        self._read_anew(states, [i for i, state in enumerate(states) if self._carries(len(state))])
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
            if wrong := self._wrong_time(state, time, "this model reads the time of each event: give it."):
                raise UserError(wrong)
            read = state.times if time is None or state.times is None else np.append(state.times, time)
            after[i] = State(
                np.append(state.items, np.int32(item)), {}, read, state.time if time is None else float(time)
            )
            if self._carries(len(after[i])):
                stepping.append(i)
        begun = [i for i in stepping if states[i].carried]
        if begun:
            taken_in = self.histories([after[i] for i in begun])
            taken_in = (taken_in.without_last() if self.waits else taken_in).latest(1)
            hidden, carried = self._stepped([states[i] for i in begun], taken_in)
            for i, part in zip(begun, _each({**carried, HIDDEN: hidden}, len(begun)), strict=True):
                after[i] = replace(after[i], carried=part)
        self._read_anew(after, [i for i in stepping if not states[i].carried])
        return after

    def top(
        self, states: Sequence[State], k: int, exclude_seen: bool = True, candidates: np.ndarray | None = None,
        at: Sequence[float | None] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """See :meth:`~recbole_ssm.serving.recommender.Recommender.top`.

        Args:
            states: of users.
            k: most items each.
            exclude_seen: see there.
            candidates: see there.
            at: the time at which each is asked about, where the model reads it.

        Raises:
            UserError: for a time that is missing, not read, or before that of the session's last event.
        """
        represented, asked = None, [None] * len(states) if at is None else at
        some = [(state, time) for state, time in zip(states, asked, strict=True) if len(state)]
        if wrong := next(filter(None, (self.wrong_request(*one) for one in some)), None):
            raise UserError(wrong)
        with torch.inference_mode():
            if self.recommender.packs and some:
                parts: list[Tensor | None] = [None] * len(some)
                for carried in (True, False):
                    which = [i for i, (state, _) in enumerate(some) if bool(state.carried) == carried]
                    if which:
                        hidden = self._represented([some[i][0] for i in which], [some[i][1] for i in which], carried)
                        for i, row in zip(which, hidden.split(1), strict=True):
                            parts[i] = row
                represented = torch.cat([part for part in parts if part is not None])
            return self.recommender.top(self.histories(states), k, exclude_seen, candidates, represented)

    def wrong_request(self, state: State, time: float | None) -> str | None:
        """The sentence by which :meth:`top` would refuse to answer at ``time``."""
        if not self.waits:
            return None if time is None else ASKED_IN_VAIN
        return self._wrong_time(state, time, ASK_WITH_TIME)

    def _represented(self, states: list[State], times: list[float | None], carried: bool) -> Tensor:
        """Representations of sessions of which all or none carry a state, asked about at ``times``; ``[N, d]``."""
        if carried and not self.waits:
            return torch.cat([state.carried[HIDDEN] for state in states])
        histories = self.histories(states, np.array(times, dtype=np.float64) if self.waits else None)
        return self._stepped(states, histories.latest(1))[0] if carried else self.recommender.represent(histories)

    def histories(self, states: Sequence[State], at: np.ndarray | None = None) -> Histories:
        """The events of sessions, asked about ``at`` these times (``[N]``)."""
        lengths = np.array([len(state) for state in states], dtype=np.int64)
        items = np.concatenate([np.zeros(0, np.int32), *(state.items for state in states)]).astype(np.int64)
        times = None
        if self.recommender.time_columns:
            times = np.concatenate([np.zeros(0), *(state.times for state in states if state.times is not None)])
        rows = np.repeat(np.arange(len(states)), lengths)
        return histories_of(items, rows, len(states), times, self.recommender.time_columns, at)

    def to_bytes(self, state: State) -> bytes:
        """A state for any store of keys and values."""
        about = {"format": FORMAT, "model": self.recommender.digest, "rule": self.rule, "time": state.time}
        tensors = {f"carried.{name}": value.contiguous().cpu() for name, value in state.carried.items()}
        tensors["items"] = torch.from_numpy(np.ascontiguousarray(state.items))
        if state.times is not None:
            tensors["times"] = torch.from_numpy(np.ascontiguousarray(state.times))
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
        items, times = tensors.pop("items", None), tensors.pop("times", None)
        if items is None or items.dtype != torch.int32 or items.dim() != 1:
            raise damaged
        if len(items) and not 0 < int(items.min()) <= int(items.max()) < self.recommender.vocabulary.item_num:
            raise damaged
        if (times is not None) != bool(self.recommender.time_columns):
            raise damaged
        if times is not None and (
            (times.dtype, times.shape) != (torch.float64, items.shape) or not times.isfinite().all()
        ):
            raise damaged
        if not isinstance(time, int | float | None) or (time is not None and not np.isfinite(time)):
            raise damaged
        carried = {name.removeprefix("carried."): value for name, value in tensors.items()}
        template = self._template if carried else {}
        taken_in = len(items) - self.waits
        if carried and (taken_in < 1 or {n: (v.shape, v.dtype) for n, v in carried.items()} != template):
            raise damaged
        if not all(bool(value.isfinite().all()) for value in carried.values() if value.is_floating_point()):
            raise damaged
        if "position" in carried and int(carried["position"]) != taken_in:
            raise damaged
        carried = {name: value.to(self.recommender.device) for name, value in carried.items()}
        return State(items.numpy(), carried, None if times is None else times.numpy(), time)

    @cached_property
    def _template(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        one = np.ones(1, np.int64)
        (carried,) = self._prefilled(histories_of(one, one - 1, 1, np.zeros(1), self.recommender.time_columns))
        return {name: (value.shape, value.dtype) for name, value in carried.items()}

    def _carries(self, count: int) -> bool:
        """Whether a session of so many events has a state."""
        return self.steps and count > self.waits and (self.rule == "endless" or count <= self.recommender.max_length)

    def _wrong_time(self, state: State, time: float | None, missing: str) -> str | None:
        if time is None:
            return missing if self.recommender.time_columns else None
        if not isinstance(time, Real) or not np.isfinite(time):
            return f"time is {time}: give a finite number."
        if state.time is not None and time < state.time:
            return f"time {time} is before that of the session's last event, {state.time}."
        return None

    def _stepped(self, states: list[State], events: Histories) -> tuple[Tensor, dict[str, Tensor]]:
        """Representations ``[S, d]`` and states after one event more of each, ``events``."""
        model, device = self.recommender.model, self.recommender.device
        names = [name for name in states[0].carried if name != HIDDEN]
        one = len(states) == 1
        before = {n: states[0].carried[n] if one else torch.cat([state.carried[n] for state in states]) for n in names}
        hidden, carried = model.step(events.inputs().to(device), before)
        return model.read_out(hidden), carried

    def _read_anew(self, states: list[State], which: list[int]) -> None:
        """Give some of the states what they carry, in one pass over all that each has taken in."""
        if which:
            whole = self.histories([states[i] for i in which])
            for i, carried in zip(which, self._prefilled(whole.without_last() if self.waits else whole), strict=True):
                states[i] = replace(states[i], carried=carried)

    @torch.inference_mode()
    def _prefilled(self, histories: Histories) -> list[dict[str, Tensor]]:
        model, device = self.recommender.model, self.recommender.device
        cu_seqlens = histories.cu_seqlens(device)
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

    def recommend(
        self, k: int = 10, exclude_seen: bool = True, candidates: Any = None, time: float | None = None
    ) -> "Recommendations":
        """The items that are most likely to come next; see :meth:`Recommender.recommend`.

        Raises:
            UserError: where the model reads the ``time`` at which it is asked, and there is none or one before the last
                event's; where it does not, and there is one.
        """
        chosen = None if candidates is None else self._recommender.candidate_ids(candidates)
        return self._recommender.named(*self._sessions.top([self.state], k, exclude_seen, chosen, [time]))

    def to_bytes(self) -> bytes:
        """See :meth:`Sessions.to_bytes`."""
        return self._sessions.to_bytes(self.state)

    def restore(self, data: bytes) -> None:
        """Go on from the bytes of a state; see :meth:`Sessions.from_bytes`."""
        self.state = self._sessions.from_bytes(data)
