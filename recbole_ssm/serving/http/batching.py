"""Requests that arrive together are answered together."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from recbole_ssm.serving.http.refused import Refused

Job = TypeVar("Job")
Answer = TypeVar("Answer")


class Batcher(Generic[Job, Answer]):
    """Takes all jobs that wait, whenever the batch before is done; alone, a job waits for nobody.

    One batch at a time, in the order of arrival: what is asked of one session is answered in that order.

    Args:
        answer: answers a batch of jobs, each by an answer or an exception.
        most: jobs of a batch.
        waiting: jobs that may wait.
    """

    def __init__(self, answer: Callable[[list[Job]], Awaitable[list[Answer | Exception]]], most: int, waiting: int):
        self._answer, self._most = answer, most
        self._queue: asyncio.Queue[tuple[Job, asyncio.Future[Answer]]] = asyncio.Queue(waiting)

    async def ask(self, job: Job) -> Answer:
        """The answer to a job.

        Raises:
            Refused: where too many wait.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        try:
            self._queue.put_nowait((job, future))
        except asyncio.QueueFull:
            raise Refused(503, "overloaded", "too many requests wait: ask again in a second.") from None
        return await future

    async def run(self) -> None:
        """Answer until cancelled."""
        while True:
            batch = [await self._queue.get()]
            while len(batch) < self._most and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            batch = [(job, future) for job, future in batch if not future.done()]  # whose client has not gone
            if not batch:
                continue
            answers = await self._answers([job for job, _ in batch])
            for (_, future), answer in zip(batch, answers, strict=True):
                if future.done():
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

    async def _answers(self, jobs: list[Job]) -> list[Answer | Exception]:
        try:
            return await self._answer(jobs)
        except Exception as error:
            if len(jobs) == 1:
                return [error]
        # One of them is at fault: the others are answered.
        return [answer for job in jobs for answer in await self._answers([job])]
