"""The writes of runs to the store. Each is repeated until the store succeeds, and no task waits for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from harp_daemon.timer_wheel import TimerWheel
from harpcaller.store import StorageError

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds before a failed write is repeated.
_RETRY_DELAY = 1.0


class StoreWrites:
    """The writes of all runs."""

    def __init__(self, timers: TimerWheel) -> None:
        self._timers = timers
        self._failing: set[object] = set()
        self._failed_at = float("-inf")

    @property
    def failing(self) -> bool:
        """Whether a write has failed and is being repeated."""
        return bool(self._failing)

    def failed_within(self, seconds: float) -> bool:
        """Return whether a write is failing, or was during the last `seconds`."""
        return self.failing or time.monotonic() - self._failed_at < seconds

    def begin(
        self,
        job_id: str,
        write: Callable[[], Awaitable[T]],
        on_stored: Callable[[T], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        """Begin a write: `write` calls a verb of the store, and is called again after each `StorageError`.

        `on_stored` is called with the result of the verb, `on_error` with any other exception of the verb or of
        `on_stored`.
        """

        def attempt() -> None:
            asyncio.ensure_future(write()).add_done_callback(on_done)

        def on_done(attempted: asyncio.Future[T]) -> None:
            if attempted.cancelled():
                return
            error = attempted.exception()
            if isinstance(error, StorageError):
                if write not in self._failing:
                    log.error("cannot store call data; retrying", extra={"job": job_id, "error": str(error)})
                    self._failing.add(write)
                self._timers.call_later(_RETRY_DELAY, attempt)
                return
            if write in self._failing:
                self._failing.remove(write)
                self._failed_at = time.monotonic()
            try:
                on_stored(attempted.result())
            except Exception as unexpected:  # noqa: BLE001 - the run logs it
                on_error(unexpected)

        attempt()
