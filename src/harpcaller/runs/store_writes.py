"""The writes of runs to the store. Each is repeated until the store succeeds, and no task waits for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from harp_daemon.timer_wheel import TimerWheel
from harpcaller.store import StorageError

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds before a failed write is repeated.
_RETRY_DELAY = 1.0


class StoreWrites:
    """The writes of all runs; `timers` are those of the event loop."""

    def __init__(self, timers: TimerWheel) -> None:
        self._timers = timers
        self._failing = 0
        self._failed_at = float("-inf")

    @property
    def failing(self) -> bool:
        """Whether a write has failed and is being repeated."""
        return self._failing > 0

    def failed_within(self, seconds: float) -> bool:
        """Return whether a write is failing, or was during the last `seconds`."""
        return self._failing > 0 or time.monotonic() - self._failed_at < seconds

    def begin(
        self,
        job_id: str,
        write: Callable[[], Awaitable[T]],
        on_stored: Callable[[T], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        """Begin a write.

        Args:
            job_id: the job, for the log.
            write: calls a verb of the store; called again after each `StorageError`.
            on_stored: called with the result of the verb.
            on_error: called with any other exception, of the verb or of `on_stored`.
        """
        _Write(self, job_id, write, on_stored, on_error).begin()

    def repeat(self, write: _Write[T], is_first_failure: bool) -> None:
        """Begin a failed write again after a delay."""
        self._failing += is_first_failure
        self._timers.call_later(_RETRY_DELAY, write.begin)

    def note_success(self) -> None:
        """Count one failing write less."""
        self._failing -= 1
        self._failed_at = time.monotonic()


class _Write(Generic[T]):
    """One write, from its beginning until it has succeeded."""

    __slots__ = ("_has_failed", "_job_id", "_on_error", "_on_stored", "_write", "_writes")

    def __init__(
        self,
        writes: StoreWrites,
        job_id: str,
        write: Callable[[], Awaitable[T]],
        on_stored: Callable[[T], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self._writes = writes
        self._job_id = job_id
        self._write = write
        self._on_stored = on_stored
        self._on_error = on_error
        self._has_failed = False

    def begin(self) -> None:
        asyncio.ensure_future(self._write()).add_done_callback(self._on_done)

    def _on_done(self, future: asyncio.Future[T]) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if isinstance(error, StorageError):
            if not self._has_failed:
                log.error("cannot store call data; retrying", extra={"job": self._job_id, "error": str(error)})
            self._writes.repeat(self, not self._has_failed)
            self._has_failed = True
            return
        if self._has_failed:
            self._writes.note_success()
        try:
            self._on_stored(future.result())
        except Exception as error:  # noqa: BLE001 - the run logs it
            self._on_error(error)
