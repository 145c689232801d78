"""What is asked of the model: batches of requests, in one thread."""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from recbole_ssm.errors import UserError
from recbole_ssm.serving.histories import ASK_WITH_TIME, Histories, histories_of
from recbole_ssm.serving.http.batching import Batcher
from recbole_ssm.serving.http.metrics import Metrics
from recbole_ssm.serving.http.refused import Refused
from recbole_ssm.serving.http.store import Kept, Store
from recbole_ssm.serving.recommender import Recommender
from recbole_ssm.serving.session import Sessions, State

# How often a session is tried that other processes change at the same time: of each round, one of them succeeds.
TRIES = 32


@dataclass(frozen=True)
class Choice:
    """What is to be recommended; see :meth:`~recbole_ssm.serving.recommender.Recommender.recommend`."""

    k: int
    exclude_seen: bool = True
    candidates: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Ask:
    """Recommendations for a history."""

    items: Sequence[str]
    times: Sequence[float] | None
    choice: Choice
    at: float | None = None


@dataclass(frozen=True)
class Turn:
    """Something of a session: events, recommendations, or both.

    Attributes:
        session: which one.
        items: of its events.
        times: of them.
        choice: what is recommended after them, or nothing.
        after: number of events that it is to have before, else it is refused.
        begins: whether a session is begun where there is none.
        forgets: whether it ends.
        at: when it is asked what comes next, where the model reads it.
    """

    session: str
    items: Sequence[str] = ()
    times: Sequence[float] | None = None
    choice: Choice | None = None
    after: int | None = None
    begins: bool = False
    forgets: bool = False
    at: float | None = None


@dataclass
class Answer:
    """To either.

    Attributes:
        unknown: tokens that the model does not know, which are left out.
        items: recommended tokens and their scores, best first; none where they were not asked for.
        events: how many the session has.
    """

    unknown: list[str]
    items: list[tuple[str, float]] | None = None
    events: int = 0


class Service:
    """Answers requests; :meth:`run` it.

    Args:
        recommender: the model.
        store: of the sessions.
        sessions: what happens to their states.
        metrics: what is counted.
        most: requests of a batch.
        waiting: requests of each kind that may wait.
    """

    def __init__(
        self, recommender: Recommender, store: Store, sessions: Sessions, metrics: Metrics, most: int, waiting: int
    ):
        self._recommender, self._store, self._sessions, self._metrics = recommender, store, sessions, metrics
        # A queue each, so that a store that does not answer keeps nobody waiting who asks nothing of it. Items like
        # another one go between the batches of the others, one at a time.
        self._asks: Batcher[Ask, Answer] = Batcher(self._answer_asks, most, waiting)
        self._turns: Batcher[Turn, Answer] = Batcher(self._answer_turns, most, waiting)
        self._likes: Batcher[tuple[str, int], list[tuple[str, float]]] = Batcher(self._answer_likes, 1, waiting)
        # One thread: a model on a machine's cores or its GPU gains nothing from a second.
        self._thread = ThreadPoolExecutor(1, "model")

    async def warm_up(self) -> None:
        """Have the model load what it loads at its first batch, so that nobody waits for it."""

        def first() -> None:
            state = self._sessions.new()
            for time in (0.0, 1.0):
                (state,) = self._sessions.update([state], [1], [time])
            self._sessions.top([state], 1, at=[2.0 if self._sessions.waits else None])

        await self._in_thread(first)

    async def run(self) -> None:
        """Answer until cancelled."""
        try:
            await asyncio.gather(self._asks.run(), self._turns.run(), self._likes.run())
        finally:
            self._thread.shutdown()

    async def recommend(self, ask: Ask) -> Answer:
        """Recommendations for a history."""
        return await self._asks.ask(ask)

    async def turn(self, turn: Turn) -> Answer:
        """See :class:`Turn`."""
        return await self._turns.ask(turn)

    async def similar(self, item: str, k: int) -> list[tuple[str, float]]:
        """See :meth:`~recbole_ssm.serving.recommender.Recommender.similar_items`.

        Raises:
            Refused: for an item that the model does not know, and where too many wait.
        """
        if not self._recommender.vocabulary.find([item])[0]:
            raise Refused(404, "unknown_item", "the model does not know this item: look it up at /items.")
        return await self._likes.ask((item, k))

    async def _in_thread(self, call: Callable[..., Any], *given: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *given)

    async def _answer_likes(self, asked: list[tuple[str, int]]) -> list[list[tuple[str, float]] | Exception]:
        return [await self._in_thread(self._recommender.similar_items, *one) for one in asked]

    async def _answer_asks(self, asks: list[Ask]) -> list[Answer | Exception]:
        return await self._in_thread(self._recommend, asks)

    def _recommend(self, asks: list[Ask]) -> list[Answer | Exception]:
        with self._metrics.batch("recommend", len(asks)):
            ids, unknown = self._known([ask.items for ask in asks])
            read = [self._history(own, ask) for own, ask in zip(ids, asks, strict=True)]
            answers: list[Answer | Exception] = [one if isinstance(one, UserError) else Answer([]) for one in read]
            histories = {i: one for i, one in enumerate(read) if isinstance(one, Histories)}
            which = list(histories)

            def top(rows: np.ndarray, *how: Any) -> tuple[np.ndarray, np.ndarray]:
                return self._recommender.top(Histories.joined([histories[which[row]] for row in rows]), *how)

            found = self._top([asks[i].choice for i in which], top, [unknown[i] for i in which])
            for i, answer in zip(which, found, strict=True):
                answers[i] = answer
            return answers

    def _history(self, ids: np.ndarray, ask: Ask) -> Histories | UserError:
        """Of a request's ids, of which 0 is left out; or why it has none."""
        if self._sessions.waits and ask.at is None:
            return UserError(ASK_WITH_TIME)
        when = None if ask.times is None else np.array(ask.times, dtype=np.float64)
        at = None if ask.at is None else np.array([ask.at], dtype=np.float64)
        try:
            return histories_of(ids, np.zeros(len(ids), np.int64), 1, when, self._recommender.time_columns, at)
        except UserError as error:
            return error

    def _known(self, tokens: list[Sequence[str]]) -> tuple[list[np.ndarray], list[list[str]]]:
        """Ids of lists of tokens, 0 for those that the model does not know, and the latter."""
        found = self._recommender.vocabulary.find(list(itertools.chain(*tokens)))
        ids = np.split(found, np.cumsum([len(one) for one in tokens])[:-1]) if tokens else []
        unknown = [
            [token for token, number in zip(one, row, strict=True) if not number]
            for one, row in zip(tokens, ids, strict=True)
        ]
        return ids, unknown

    def _top(
        self,
        choices: Sequence[Choice],
        top: Callable[..., tuple[np.ndarray, np.ndarray]],
        unknown: list[list[str]],
    ) -> list[Answer]:
        """Answers to choices, which are scored together where they choose from the same items."""
        answers = [Answer(unknown[i]) for i in range(len(choices))]
        groups: dict[tuple[bool, tuple[str, ...] | None], list[int]] = {}
        for i, choice in enumerate(choices):
            groups.setdefault((choice.exclude_seen, choice.candidates), []).append(i)
        for (exclude_seen, candidates), rows in groups.items():
            chosen = None
            if candidates is not None:
                (ids,), (strange,) = self._known([candidates])
                chosen = np.unique(ids[ids > 0])
                for i in rows:
                    answers[i].unknown = [*answers[i].unknown, *strange]
            k = max(choices[i].k for i in rows)
            named = self._recommender.named(*top(np.array(rows), k, exclude_seen, chosen))
            for i, items, scores in zip(rows, named.items, named.scores, strict=True):
                answers[i].items = list(zip(items, scores, strict=True))[: choices[i].k]
        return answers

    async def _answer_turns(self, turns: list[Turn]) -> list[Answer | Exception]:
        answers: dict[int, Answer | Exception] = {}
        chains: dict[str, list[int]] = {}
        for i, turn in enumerate(turns):
            chains.setdefault(turn.session, []).append(i)
        try:
            for _ in range(TRIES):
                kept = await self._store.load(list(chains))
                found, changes = await self._in_thread(self._take_turns, turns, chains, kept)
                answers.update(found)
                changed = await self._store.save(changes)
                chains = {session: chains[session] for session in changed}
                if not chains:
                    break
                self._metrics.conflicts.inc(len(chains))
            gone = Refused(503, "busy", "others change this session all the time: ask again in a second.")
        except Refused as error:
            self._metrics.store_errors.inc()
            gone = error
        answers.update({i: gone for chain in chains.values() for i in chain})
        self._metrics.events.inc(
            sum(
                len(turns[i].items) - len(answer.unknown) for i, answer in answers.items() if isinstance(answer, Answer)
            )
        )
        return [answers[i] for i in range(len(turns))]

    def _take_turns(
        self, turns: list[Turn], chains: dict[str, list[int]], kept: dict[str, Kept]
    ) -> tuple[dict[int, Answer | Exception], dict[str, Kept]]:
        """Answers to turns by their index, and the sessions that changed."""
        answers: dict[int, Answer | Exception] = {}
        states: dict[str, State | None] = {}
        with self._metrics.batch("session", sum(map(len, chains.values()))):
            for session, (_, data) in kept.items():
                states[session], damage = self._decoded(data)
                if damage:  # it can be forgotten, and nothing else
                    answers.update(dict.fromkeys(chains[session], damage))
            before = dict(states)
            # The turns of one session come after each other, those of different ones go together.
            for wave in itertools.zip_longest(*chains.values()):
                here = [i for i in wave if i is not None and (i not in answers or turns[i].forgets)]
                self._wave(turns, here, states, answers)
            changes = {
                session: Kept(kept[session].version, None if state is None else self._store.encode(state))
                for session, state in states.items()
                if state is not before[session]
            }
        return answers, changes

    def _decoded(self, data: Any) -> tuple[State | None, Refused | None]:
        try:
            return None if data is None else self._store.decode(data), None
        except UserError as error:
            return self._sessions.new(), Refused(409, "damaged_session", str(error))

    def _wave(
        self,
        turns: list[Turn],
        which: list[int],
        states: dict[str, State | None],
        answers: dict[int, Answer | Exception],
    ) -> None:
        """One turn each of different sessions."""
        ids, unknown = self._known([turns[i].items for i in which])
        after: dict[int, State] = {}
        events, strange = dict(zip(which, ids, strict=True)), dict(zip(which, unknown, strict=True))
        for i in which:
            turn, state = turns[i], states[turns[i].session]
            if state is None and not turn.begins:
                answers[i] = Refused(404, "unknown_session", "there is no such session: events begin one.")
            elif turn.forgets:
                states[turn.session], answers[i] = None, Answer([])
            elif turn.after is not None and turn.after != (count := 0 if state is None else len(state)):
                answers[i] = Refused(409, "other_events", f"the session has {count} events, not {turn.after}.")
            else:
                after[i] = self._sessions.new() if state is None else state
        for place in range(max((len(events[i]) for i in after), default=0)):
            for i, found in self._update(turns, [i for i in after if len(events[i]) > place], after, events, place):
                if isinstance(found, State):
                    after[i] = found
                else:
                    answers[i] = found
                    del after[i]
        for i in [i for i in after if turns[i].choice is not None]:
            if wrong := self._sessions.wrong_request(after[i], turns[i].at):
                answers[i] = Refused(422, "invalid", wrong)
                del after[i]
        states.update({turns[i].session: state for i, state in after.items()})
        asking = [i for i in after if turns[i].choice is not None]

        def top(
            rows: np.ndarray, k: int, exclude_seen: bool, candidates: np.ndarray | None
        ) -> tuple[np.ndarray, np.ndarray]:
            which = [asking[row] for row in rows]
            at = [turns[i].at for i in which]
            return self._sessions.top([after[i] for i in which], k, exclude_seen, candidates, at)

        answers.update({i: Answer(strange[i]) for i in after})
        choices = [choice for i in asking if (choice := turns[i].choice) is not None]
        answers.update(zip(asking, self._top(choices, top, [strange[i] for i in asking]), strict=True))
        for i, state in after.items():
            answer = answers[i]
            assert isinstance(answer, Answer)
            answer.events = len(state)

    def _update(
        self, turns: list[Turn], which: list[int], after: dict[int, State], events: dict[int, np.ndarray], place: int
    ) -> list[tuple[int, State | Refused]]:
        """One more event each, or why there is none."""
        times = [None if (given := turns[i].times) is None else given[place] for i in which]
        try:
            items = [int(events[i][place]) for i in which]
            return list(zip(which, self._sessions.update([after[i] for i in which], items, times), strict=True))
        except UserError as error:
            if len(which) == 1:
                return [(which[0], Refused(422, "invalid", str(error)))]
        return [one for i in which for one in self._update(turns, [i], after, events, place)]
