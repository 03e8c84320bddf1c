"""Answers that many clients ask for at the same time: each is computed once for all of them.

`SharedAnswers` keeps an answer for a second, or for some times as long as it took: so a costly question that is
repeated costs a small part of a thread's time, whatever the number of clients.

`SharedReads` keeps nothing: a client gets an answer that was read after its question came. Those that ask while the
same is being read share the next read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

_MIN_AGE = 1.0  # Seconds.
_COST_RATIO = 20  # An answer is kept for this many times its duration.
_MAX_ANSWERS = 1000


@dataclass(slots=True)
class _Answer:
    task: asyncio.Task[Any]
    asked_at: float  # monotonic
    expires_at: float | None = None  # None: it is being computed


class SharedAnswers:
    """The latest answers by their questions."""

    def __init__(self) -> None:
        self._answers: dict[Hashable, _Answer] = {}

    def __len__(self) -> int:
        return len(self._answers)

    async def get(self, question: Hashable, compute: Callable[[], Awaitable[T]]) -> T:
        """Return the answer to a question; `compute` is called if it is not known. An error is not kept."""
        now = time.monotonic()
        answer = self._answers.get(question)
        if answer is None or (answer.expires_at is not None and answer.expires_at <= now):
            self._make_room(now)
            answer = _Answer(asyncio.ensure_future(_await(compute())), now)
            self._answers[question] = answer
            answer.task.add_done_callback(lambda task: self._on_done(question, answer))
        result: T = await asyncio.shield(answer.task)
        return result

    def _on_done(self, question: Hashable, answer: _Answer) -> None:
        if answer.task.cancelled() or answer.task.exception() is not None:
            if self._answers.get(question) is answer:
                del self._answers[question]
            return
        now = time.monotonic()
        answer.expires_at = answer.asked_at + max(_MIN_AGE, _COST_RATIO * (now - answer.asked_at))

    def _make_room(self, now: float) -> None:
        if len(self._answers) >= _MAX_ANSWERS:
            kept = {q: a for q, a in self._answers.items() if a.expires_at is None or a.expires_at > now}
            self._answers = kept if len(kept) < _MAX_ANSWERS else {}


async def _await(computed: Awaitable[T]) -> T:
    return await computed


class SharedReads:
    """The reads that are in progress, by their questions."""

    def __init__(self) -> None:
        self._running: dict[Hashable, asyncio.Future[None]] = {}  # done when the read is
        self._next: dict[Hashable, asyncio.Task[Any]] = {}

    async def get(self, question: Hashable, read: Callable[[], Awaitable[T]]) -> T:
        """Return what `read` returns, perhaps that of another client with the same question, which is called later."""
        running = self._running.get(question)
        if running is None:
            return await self._read(question, read)
        following = self._next.get(question)
        if following is None:
            following = self._next[question] = asyncio.ensure_future(self._read_after(running, question, read))
            following.add_done_callback(lambda task: task.cancelled() or task.exception())  # perhaps nobody waits
        result: T = await asyncio.shield(following)
        return result

    async def _read_after(
        self, running: asyncio.Future[None], question: Hashable, read: Callable[[], Awaitable[T]]
    ) -> T:
        await running
        del self._next[question]
        return await self._read(question, read)

    async def _read(self, question: Hashable, read: Callable[[], Awaitable[T]]) -> T:
        done = self._running[question] = asyncio.get_running_loop().create_future()
        try:
            return await read()
        finally:
            if self._running.get(question) is done:
                del self._running[question]
            done.set_result(None)
