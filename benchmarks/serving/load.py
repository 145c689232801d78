"""Clients of a server, in a process of their own: ``python benchmarks/serving/load.py '{"port": 8000, ...}'``.

It is run by its path and imports nothing but the standard library, so that it starts at once and costs the server's
machine little. What it measures is printed as JSON.
"""

import asyncio
import json
import random
import re
import sys
import time
from typing import Any


class Client:
    """One connection, which is kept."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer

    async def add(self, session: str, items: list[str], k: int | None = None) -> bytes:
        """Send events; the answer's body.

        Raises:
            RuntimeError: for an answer of another status than 200, or without the recommendations asked for.
        """
        body = json.dumps({"items": items} | ({} if k is None else {"k": k})).encode()
        head = f"POST /sessions/{session}/events HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", answer.lower())
        data = await self._reader.readexactly(int(length[1])) if length else b""
        if not answer.startswith(b"HTTP/1.1 200") or (k is not None and data.count(b'"score"') != k):
            raise RuntimeError(f"{answer!r} {data[:500]!r}")
        return data

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()


async def run(
    port: int, clients: int, sessions: int, history: int, growth: int, seconds: float, items: int, k: int, seed: int
) -> dict[str, Any]:
    """Give sessions a history, then time events with an answer to each.

    Args:
        port: the server's, at loopback.
        clients: at a time, each with a connection and sessions of its own, and one request at a time.
        sessions: of all clients together, new ones.
        history: events of each before.
        growth: most timed events of each; they come in turn.
        seconds: of the timed part at most.
        items: of the catalogue, named 1, 2, ...
        k: recommendations.
        seed: of items and of the sessions' names.

    Returns:
        ``taken``, the seconds of each request; ``seconds``, of all; ``scores``, of the first answer of one session.
    """
    generator = random.Random(seed)
    tokens = [[str(generator.randint(1, items)) for _ in range(history + growth)] for _ in range(sessions)]
    connected = [Client(*await asyncio.open_connection("127.0.0.1", port)) for _ in range(clients)]
    taken: list[float] = []
    first: list[bytes] = []

    async def prepare(number: int, client: Client) -> None:
        for session in range(number, sessions, clients):
            await client.add(f"{seed}-{session}", tokens[session][:history])
        await client.add(f"{seed}-warm-{number}", tokens[number][:2], k)

    async def ask(number: int, client: Client, end: float) -> None:
        for place in range(history, history + growth):
            for session in range(number, sessions, clients):
                begin = time.perf_counter()
                if begin > end:
                    return
                data = await client.add(f"{seed}-{session}", tokens[session][place : place + 1], k)
                taken.append(time.perf_counter() - begin)
                if not first and number == 0:
                    first.append(data)

    await asyncio.gather(*(prepare(number, client) for number, client in enumerate(connected)))
    begin = time.perf_counter()
    await asyncio.gather(*(ask(number, client, begin + seconds) for number, client in enumerate(connected)))
    done = time.perf_counter() - begin
    for client in connected:
        client.close()
    scores = [one["score"] for one in json.loads(first[0])["recommendations"]]
    return {"taken": taken, "seconds": done, "scores": scores}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(**json.loads(sys.argv[1])))))
