"""A job's records on their way into the store, in batches: what came during a commit goes into the next.

What waits for the store is bounded by whoever adds: it looks at `full` and waits. While the store fails, records wait
and are tried again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from harp.protocol.json_text import Raw
from harpcaller.model.jobs import Records
from harpcaller.notifier import News
from harpcaller.store import StorageError, Store

__all__ = ["Recording", "StoreTrouble", "persist"]

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds until a write is tried again that the store failed to do.
_STORE_PAUSE = 1.0

#: Bytes of records that may wait for the store.
_WAITING_BYTES = 1024 * 1024

#: As many and one record more is what a host sends ahead by itself of a kept call, however short its records are.
_AHEAD_BYTES = 8 * 1024 * 1024

#: What a waiting record costs beside its bytes.
_RECORD_OVERHEAD = 64


class StoreTrouble:
    """How many runs have something that the store does not take at the moment."""

    def __init__(self) -> None:
        self.waiting = 0


class Recording:
    """Stores the records of one job, from the first that is not stored on.

    Args:
        job_id: the job.
        count: how many of its records are stored.
        store: where they go.
        news: who follows is told there.
        trouble: counts what the store does not take.
        on_stored: called with the number of stored records whenever there are more.
    """

    def __init__(
        self,
        job_id: str,
        count: int,
        store: Store,
        news: News,
        trouble: StoreTrouble,
        on_stored: Callable[[int], None],
    ) -> None:
        self._job_id = job_id
        self._store = store
        self._news = news
        self._trouble = trouble
        self._on_stored = on_stored
        self._values: list[Raw] = []
        self._made: list[float] = []
        self._bytes = 0
        self._longest = 0
        self._under_way = 0
        self._task: asyncio.Task[None] | None = None
        #: How many are stored, or dropped because the store takes no more of them.
        self.count = count
        #: Whether the store takes no more of them: the job has ended.
        self.refused = False

    @property
    def full(self) -> bool:
        """Whether so much waits that no more should be added."""
        return self._bytes > _WAITING_BYTES

    @property
    def flooded(self) -> bool:
        """Whether more waits than a host sends ahead that keeps to the protocol."""
        return self._bytes - self._longest > _AHEAD_BYTES

    @property
    def expected(self) -> int:
        """The number of the record to come."""
        return self.count + self._under_way + len(self._values)

    def add(self, records: Sequence[Raw], made: float) -> None:
        """Take the next records, one or more, made at this time; Unix seconds."""
        if self.refused:
            self.count += len(records)  # dropped, which is as good as stored to the host
            return
        self._values += records
        self._made += [made] * len(records)
        sizes = [len(record) for record in records]
        self._bytes += sum(sizes) + _RECORD_OVERHEAD * len(sizes)
        self._longest = max(self._longest, *sizes)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._keep_storing())

    async def stored(self) -> None:
        """Wait until nothing waits."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def skip_to(self, number: int) -> None:
        """Take no more of them; the next to come has this number. Nothing waits: see `stored`."""
        self.refused = True
        self.count = number

    def give_up(self) -> None:
        """Drop what waits still."""
        if self._task is not None:
            self._task.cancel()

    async def _keep_storing(self) -> None:
        try:
            while self._values and not self.refused:
                batch = Records(self._values, self._made)
                self._forget_waiting()
                self._under_way = len(batch)
                append = partial(self._store.append_records, self._job_id, self.count, batch)
                taken = await persist(self._trouble, self._job_id, append)
                self._under_way = 0
                if taken:
                    self._news.records(self._job_id, self.count, batch)
                    self.count += len(batch)
                    self._on_stored(self.count)
                else:
                    self._refuse(len(batch))
        except Exception:
            log.exception("records lost by a fault of the dispatcher", extra={"job": self._job_id})
            self._refuse(self._under_way)

    def _refuse(self, dropped: int) -> None:
        """Take no more records, and drop those that wait."""
        self.refused = True
        self.count += dropped + len(self._values)
        self._forget_waiting()
        self._under_way = 0
        self._on_stored(self.count)

    def _forget_waiting(self) -> None:
        self._values, self._made, self._bytes, self._longest = [], [], 0, 0


async def persist(trouble: StoreTrouble, job_id: str, write: Callable[[], Awaitable[T]]) -> T:
    """Write, again and again until the store can."""
    failing = False
    try:
        while True:
            try:
                return await write()
            except StorageError as error:
                if not failing:
                    about = {"job": job_id, "error": str(error)}
                    log.error("what a call brought can't be stored, trying again", extra=about)
                    trouble.waiting += 1
                    failing = True
            await asyncio.sleep(_STORE_PAUSE)
    finally:
        trouble.waiting -= failing
