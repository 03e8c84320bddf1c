"""Claims queued jobs when one may have become able to start, and hands them over.

A claim runs after the other writes of its transaction. So one claim for all requests of a turn of the event loop is
enough, and a job that is stored in this turn is claimed with the same commit. Several claims may be in the store: each
reserves the calls that it may start.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from harpcaller.config import Config
from harpcaller.model.jobs import Job
from harpcaller.store import StorageError, Store

log = logging.getLogger(__name__)

#: Maximum number of jobs in one claim.
_CLAIM_SIZE = 100

#: Seconds between two attempts after the store failed.
_RETRY_INTERVAL = 1.0


class Claimer:
    """Claims jobs between `begin` and `stop`.

    Args:
        store: the store.
        wall: the wall clock; Unix seconds.
        config: returns the configuration with the limits.
        is_ready: returns whether jobs can be started; `request` is called when that becomes true.
        is_failing: returns whether data of active calls cannot be stored: then no new calls are started.
        count_calls: returns the number of active calls.
        start_calls: starts the calls of the claimed jobs.
    """

    def __init__(
        self,
        store: Store,
        wall: Callable[[], float],
        *,
        config: Callable[[], Config],
        is_ready: Callable[[], bool],
        is_failing: Callable[[], bool],
        count_calls: Callable[[], int],
        start_calls: Callable[[Sequence[Job]], None],
    ) -> None:
        self._store = store
        self._wall = wall
        self._config = config
        self._is_ready = is_ready
        self._is_failing = is_failing
        self._count_calls = count_calls
        self._start_calls = start_calls
        self._begun = False
        self._requested = False
        self._retry: asyncio.TimerHandle | None = None
        self._claims: dict[asyncio.Future[list[Job]], int] = {}  # those in the store, with their limits
        #: Whether a request waits until a call has ended, or a claim has returned.
        self.is_postponed = False

    def begin(self) -> None:
        """Claim jobs from now on."""
        self._begun = True
        self.request()

    async def stop(self) -> None:
        """Claim no further jobs, and wait for the claims that are in the store."""
        self._begun = False
        if self._retry is not None:
            self._retry.cancel()
        if self._claims:
            await asyncio.wait(self._claims)

    def request(self) -> None:
        """Claim jobs in the next turn of the event loop, because a job may have become able to start."""
        if not self._requested:
            self._requested = True
            asyncio.get_running_loop().call_soon(self._claim)

    def _claim(self) -> None:
        self._requested = False
        if not self._begun or not self._is_ready():
            return
        if self._is_failing():
            self._request_later()
            return
        config = self._config()
        limit = min(_CLAIM_SIZE, config.max_calls - self._count_calls() - sum(self._claims.values()))
        self.is_postponed = limit <= 0
        if not self.is_postponed:
            claim = asyncio.ensure_future(self._store.claim_jobs(self._wall(), limit, config.max_calls_per_host))
            self._claims[claim] = limit
            claim.add_done_callback(self._on_claimed)

    def _on_claimed(self, claim: asyncio.Future[list[Job]]) -> None:
        limit = self._claims.pop(claim)
        try:
            jobs = claim.result()
        except Exception as error:
            if isinstance(error, StorageError):
                log.error("cannot claim jobs; retrying", extra={"error": str(error)})
            else:
                log.exception("cannot claim jobs: internal error; retrying")
            self._request_later()
            return
        self._start_calls(jobs)
        if len(jobs) == limit or self.is_postponed:
            self.request()  # there may be more

    def _request_later(self) -> None:
        if self._retry is None:
            self._retry = asyncio.get_running_loop().call_later(_RETRY_INTERVAL, self._on_retry)

    def _on_retry(self) -> None:
        self._retry = None
        self.request()
