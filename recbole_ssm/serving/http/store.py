"""Where sessions are kept: in the memory of this process, or in Redis, where several processes share them."""

import secrets
from collections import OrderedDict
from typing import Any, NamedTuple, Protocol

from recbole_ssm.errors import UserError
from recbole_ssm.serving.http.refused import store_gone
from recbole_ssm.serving.session import Sessions, State


class Kept(NamedTuple):
    """What a store knows of a session.

    Attributes:
        version: changes with every save; empty where there is no such session.
        data: its state as the store keeps it, or none.
    """

    version: bytes = b""
    data: Any = None


class Store(Protocol):
    """What the server asks of a store. Its methods raise :class:`~recbole_ssm.serving.http.refused.Refused` where it
    does not answer.
    """

    def encode(self, state: State) -> Any:
        """A state as the store keeps it."""

    def decode(self, data: Any) -> State:
        """What :meth:`encode` gave; raises ``UserError`` where it is damaged."""

    async def load(self, ids: list[str]) -> dict[str, Kept]:
        """What is known of sessions, each of which is looked up."""

    async def save(self, changes: dict[str, Kept]) -> set[str]:
        """Keep sessions (or forget them, without data) that still have the version given.

        Returns:
            Those that have another by now, and are left as they are.
        """

    async def check(self) -> None:
        """Find out whether the store answers."""

    async def close(self) -> None:
        """Let go of its connections."""


MOST_SESSIONS, MOST_BYTES = 100_000, 1 << 30  # in memory
SECONDS = 30 * 24 * 3600  # in Redis, after the last event


class MemoryStore:
    """Sessions in the memory of one process; those that were used least recently go first.

    Args:
        most: sessions.
        most_bytes: of their states.

    Attributes:
        nbytes: of the states that are kept.
        evicted: how many have gone.
    """

    def __init__(self, most: int = MOST_SESSIONS, most_bytes: int = MOST_BYTES):
        self._most, self._most_bytes, self.nbytes = most, most_bytes, 0
        self._states: OrderedDict[str, State] = OrderedDict()
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._states)

    def encode(self, state: State) -> State:
        """As it is."""
        return state

    decode = encode

    async def load(self, ids: list[str]) -> dict[str, Kept]:
        """See :class:`Store`."""
        for session in self._states.keys() & ids:
            self._states.move_to_end(session)
        return {session: Kept(data=self._states.get(session)) for session in ids}

    async def save(self, changes: dict[str, Kept]) -> set[str]:
        """See :class:`Store`; no other process changes them."""
        for session, kept in changes.items():
            if (old := self._states.pop(session, None)) is not None:
                self.nbytes -= old.nbytes
            if kept.data is not None:
                self._states[session] = kept.data
                self.nbytes += kept.data.nbytes
        while self._states and (len(self) > self._most or self.nbytes > self._most_bytes):
            self.nbytes -= self._states.popitem(last=False)[1].nbytes
            self.evicted += 1
        return set()

    async def check(self) -> None:
        """It answers."""

    async def close(self) -> None:
        """There are none."""


# Compare and set, in one step of the server's. A version that is already the new one was set by the same call, whose
# answer was lost on its way.
SAVE = """
local found = redis.call('HGET', KEYS[1], 'version') or ''
if found == ARGV[2] then return 1 end
if found ~= ARGV[1] then return 0 end
if ARGV[3] == '' then
    redis.call('DEL', KEYS[1])
else
    redis.call('HSET', KEYS[1], 'version', ARGV[2], 'state', ARGV[3])
    redis.call('EXPIRE', KEYS[1], ARGV[4])
end
return 1
"""


class RedisStore:
    """Sessions in Redis: a hash of ``version`` and ``state`` a session, under the model's digest and the rule.

    Another model's sessions are others, so that an old and a new one can be served beside each other.

    Args:
        url: of the server, such as ``redis://localhost:6379/0``.
        sessions: whose states they are.
        seconds: after its last event until a session is forgotten.
        patience: seconds until a server that does not answer counts as gone.

    Raises:
        UserError: for another kind of address, or where redis-py is missing.
    """

    def __init__(self, url: str, sessions: Sessions, seconds: int = SECONDS, patience: float = 2.0):
        try:
            import redis.asyncio
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
        except ImportError as error:
            raise UserError("sessions in Redis need redis-py: pip install 'recbole-ssm[redis]'.") from error
        try:
            self._redis = redis.asyncio.Redis.from_url(
                url,
                socket_timeout=patience,
                socket_connect_timeout=patience,
                retry=Retry(NoBackoff(), 1),  # for a connection of a server that was started anew meanwhile
                retry_on_error=[redis.ConnectionError, redis.TimeoutError],
            )
        except ValueError as error:
            raise UserError("the address of Redis should read like redis://localhost:6379/0.") from error
        self._errors = (redis.RedisError, OSError)
        self._sessions, self._seconds = sessions, seconds
        self._prefix = f"recbole_ssm:{sessions.recommender.digest}:{sessions.rule}:"
        self.encode, self.decode = sessions.to_bytes, sessions.from_bytes

    async def load(self, ids: list[str]) -> dict[str, Kept]:
        """See :class:`Store`."""
        pipe = self._redis.pipeline(transaction=False)
        for session in ids:
            pipe.hmget(self._prefix + session, "version", "state")
        found = await self._executed(pipe)
        return {session: Kept(version or b"", data) for session, (version, data) in zip(ids, found, strict=True)}

    async def save(self, changes: dict[str, Kept]) -> set[str]:
        """See :class:`Store`."""
        pipe = self._redis.pipeline(transaction=False)
        for session, kept in changes.items():
            new = secrets.token_bytes(16)  # no counter: a session that was forgotten and begun anew is another
            pipe.eval(SAVE, 1, self._prefix + session, kept.version, new, kept.data or b"", self._seconds)
        saved = await self._executed(pipe)
        return {session for session, done in zip(changes, saved, strict=True) if not done}

    async def check(self) -> None:
        """See :class:`Store`."""
        try:
            await self._redis.ping()
        except self._errors as error:
            raise store_gone(type(error).__name__) from error

    async def close(self) -> None:
        """See :class:`Store`."""
        await self._redis.aclose()

    async def _executed(self, pipe: Any) -> list[Any]:
        if not len(pipe):
            return []
        try:
            return await pipe.execute()
        except self._errors as error:
            raise store_gone(type(error).__name__) from error
