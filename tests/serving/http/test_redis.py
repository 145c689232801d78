"""Sessions in a real Redis: shared, kept over restarts, and back when it is."""

import asyncio
import secrets

import pytest

from recbole_ssm import UserError
from recbole_ssm.serving.http.app import create_app
from recbole_ssm.serving.http.store import Kept, RedisStore
from recbole_ssm.serving.session import Sessions

from .conftest import running
from .test_app import same


def store(served, redis_server, **how) -> RedisStore:
    return RedisStore(redis_server.url, Sessions(served), **how)


@pytest.fixture
def name():
    """Of a session that no other test uses."""
    return secrets.token_hex(8)


def test_a_restart_loses_nothing(served, redis_server, name):
    history = [f"i{n}" for n in range(8)]

    async def one_after_the_other():
        for begin in (0, 4):
            async with running(create_app(served, store(served, redis_server))) as client:
                for n in range(begin, begin + 4):
                    await client.post(f"/sessions/{name}/events", json={"items": [history[n]], "after": n})
        redis_server.stop()
        redis_server.start()
        async with running(create_app(served, store(served, redis_server))) as client:
            found = await client.get(f"/sessions/{name}/recommendations")
            gone = await client.delete(f"/sessions/{name}")
            return found, gone, await client.get(f"/sessions/{name}/recommendations")

    found, gone, after = asyncio.run(one_after_the_other())
    assert found.json()["events"] == 8
    same(found, served.recommend([history]))
    assert (gone.status_code, after.status_code) == (204, 404)


def test_two_servers_events_of_one_session_are_all_kept(served, redis_server, name):
    async def both():
        one, other = (create_app(served, store(served, redis_server)) for _ in range(2))
        async with running(one) as first, running(other) as second:
            posts = [
                client.post(f"/sessions/{name}{n % 3}/events", json={"items": [f"i{n % 29}"]})
                for n in range(90)
                for client in (first, second)
            ]
            answers = await asyncio.gather(*posts)
            last = [await second.get(f"/sessions/{name}{n}/recommendations?exclude_seen=false") for n in range(3)]
            kept = await store(served, redis_server).load([f"{name}{n}" for n in range(3)])
            return answers, last, kept, await first.get("/metrics"), await second.get("/metrics")

    answers, last, kept, *counts = asyncio.run(both())
    assert {answer.status_code for answer in answers} == {200}
    # Each event was the n-th of its session for exactly one n.
    assert sorted(answer.json()["events"] for answer in answers) == sorted([*range(1, 61)] * 3)
    for n, answer in enumerate(last):
        state = Sessions(served).from_bytes(kept[f"{name}{n}"].data)
        history = served.vocabulary.items[state.items].tolist()
        assert sorted(history) == sorted(2 * [f"i{one % 29}" for one in range(90) if one % 3 == n])
        same(answer, served.recommend([history], exclude_seen=False))
    conflicts = [float(text.text.split("\nrecbole_ssm_store_conflicts_total ")[1].split()[0]) for text in counts]
    assert sum(conflicts) > 0


def test_a_save_is_for_the_version_that_was_read(served, redis_server, name):
    async def saves():
        kept = store(served, redis_server, seconds=77)
        state = kept.encode(Sessions(served).new())
        assert await kept.save({name: Kept(b"", state)}) == set()
        assert await kept.save({name: Kept(b"", state)}) == {name}  # begun by another meanwhile
        old = (await kept.load([name]))[name]
        assert await kept.save({name: Kept(old.version, state)}) == set()
        assert await kept.save({name: Kept(old.version, None)}) == {name}
        seconds = await kept._redis.ttl(kept._prefix + name)
        new = (await kept.load([name]))[name]
        assert await kept.save({name: Kept(new.version, None)}) == set()
        assert await kept.load([name]) == {name: Kept()}
        # Forgotten and begun anew, it is another.
        assert await kept.save({name: Kept(b"", state)}) == set()
        assert await kept.save({name: Kept(new.version, state)}) == {name}
        await kept.close()
        return seconds

    assert 70 <= asyncio.run(saves()) <= 77


def test_redis_gone_and_back(served, redis_server, name):
    async def gone_and_back():
        async with running(create_app(served, store(served, redis_server, patience=0.5))) as client:
            path, body = f"/sessions/{name}/events", {"items": ["i1"]}
            before = await client.post(path, json=body)
            redis_server.stop()
            try:
                gone = [await client.post(path, json=body), await client.get("/health")]
                asked = await client.post("/recommend", json=body)
            finally:
                redis_server.start()
            return before, gone, asked, await client.post(path, json=body), await client.get("/health")

    before, gone, asked, after, health = asyncio.run(gone_and_back())
    for answer in gone:
        assert answer.status_code == 503
        assert answer.json()["error"]["type"] == "store_gone"
        assert str(redis_server.port) not in answer.text  # an address may hold a password
        assert answer.headers["retry-after"] == "1"
    assert (before.status_code, asked.status_code, health.status_code) == (200, 200, 200)
    assert after.json()["events"] == 2


def test_a_redis_that_hangs_is_gone(served):
    """It takes connections and says nothing."""

    async def hanging():
        async def silent(reader, writer):
            await reader.read()
            writer.close()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with running(create_app(served, RedisStore(url, Sessions(served), patience=0.2))) as client:
            turn = asyncio.create_task(client.post("/sessions/a/events", json={"items": ["i1"]}))
            asked = await client.post("/recommend", json={"items": ["i1"]})
            waits = not turn.done()
            answer = await turn
        server.close()
        return asked, waits, answer

    asked, waits, answer = asyncio.run(hanging())
    assert (asked.status_code, waits, answer.status_code) == (200, True, 503)


def test_damaged_and_foreign_states(served, timed, redis_server, name):
    async def damaged():
        kept = store(served, redis_server)
        await kept.save({name: Kept(b"", b"no state")})
        async with running(create_app(served, kept)) as client:
            path = f"/sessions/{name}/events"
            broken = await client.post(path, json={"items": ["i1"]})
            gone = await client.delete(f"/sessions/{name}")
            anew = await client.post(path, json={"items": ["i1"]})
            async with running(create_app(timed, store(timed, redis_server))) as other:
                foreign = await other.get(f"/sessions/{name}/recommendations")
            return broken, gone, anew, foreign

    broken, gone, anew, foreign = asyncio.run(damaged())
    assert (broken.status_code, broken.json()["error"]["type"]) == (409, "damaged_session")
    assert (gone.status_code, anew.status_code, foreign.status_code) == (204, 200, 404)


def test_an_address_of_another_kind_is_refused(served):
    pytest.importorskip("redis")
    with pytest.raises(UserError, match="should read like redis://"):
        RedisStore("http://secret@somewhere", Sessions(served))
