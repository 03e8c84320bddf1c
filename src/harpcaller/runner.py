"""The active calls: claims queued jobs when they may be able to start, and runs them.

A claim runs after the other writes of its transaction. One claim is therefore enough for all requests in a turn of the
event loop, and it can claim a job that is stored in the same transaction. Several claims may be in progress: each
reserves the calls that it may start.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from harp_daemon.outcome import Outcome, when_done
from harpcaller.model.jobs import Job, State
from harpcaller.runs.context import RunContext
from harpcaller.runs.host_starts import HostStarts
from harpcaller.runs.run import Run
from harpcaller.store import StorageError

log = logging.getLogger(__name__)

_CLAIM_SIZE = 100  #: Maximum number of jobs in one claim.
_RETRY_INTERVAL = 1.0  #: Seconds between two attempts after the store failed.


class Runner:
    """Claims jobs from `start_claiming` to `detach`, and runs their calls.

    `can_start` returns whether calls can be started; `request_claim` is called when that becomes true. `started_at` is
    the Unix time at which the dispatcher started.
    """

    def __init__(self, can_start: Callable[[], bool], started_at: float) -> None:
        self.context: RunContext  #: The environment of new runs.
        self.runs: dict[str, Run] = {}  #: The runs of the active calls, by job id.
        self.starts = HostStarts(lambda: self.context, started_at)  #: Which hosts accept starts.
        self._can_start = can_start
        self._no_runs = asyncio.Event()  # set when the last run has closed
        self._cancelled_before_start: set[str] = set()  # jobs that the store has claimed and that have no run yet
        self._is_claiming = False
        self._claim_requested = False
        self._claim_postponed = False  # until a call has ended, or a claim has returned
        self._claims: dict[
            asyncio.Future[list[Job]] | Outcome[list[Job]], int
        ] = {}  # the claims in progress, with their limits
        self._retry: asyncio.TimerHandle | None = None

    async def recover(self) -> bool:
        """Create runs for the jobs to which an earlier dispatcher gave a slot; return False if the store failed."""
        try:
            jobs = await self.context.store.list_slot_holders()
        except StorageError as error:
            log.error("cannot recover jobs; retrying", extra={"error": str(error)})
            return False
        if self.context.metrics is not None:
            self.context.metrics.add_running(jobs)
        self._start_runs(jobs, recovered=True)
        if jobs:
            log.info("jobs recovered", extra={"jobs": len(jobs)})
        return True

    @property
    def is_claiming(self) -> bool:
        """Whether queued jobs can start: the jobs of the dispatcher before have been taken over."""
        return self._is_claiming

    async def start_claiming(self, recovered: bool) -> None:
        """Start to claim jobs when the jobs that hold a slot have a run; `recovered`: whether they have."""
        while not recovered:
            await asyncio.sleep(_RETRY_INTERVAL)
            recovered = await self.recover()
        self._is_claiming = True
        self.request_claim()

    def request_claim(self) -> None:
        """Claim jobs in the next turn of the event loop, because another job may be able to start."""
        if not self._claim_requested:
            self._claim_requested = True
            asyncio.get_running_loop().call_soon(self._claim)

    async def cancel_call(self, job_id: str, before: State, client: str | None) -> None:
        """Stop the call of a cancelled job, after the commit of its end. It is not started after this returns."""
        if run := self.runs.get(job_id):
            await run.cancel_call(client)
        elif before is State.RUNNING:
            self._cancelled_before_start.add(job_id)

    async def detach(self) -> None:
        """Claim no further jobs. Detach the runs: resumable calls continue on their hosts, the others are stopped."""
        self._is_claiming = False
        self.starts.close()
        if self._retry is not None:
            self._retry.cancel()
        if self._claims:
            await asyncio.gather(*self._claims, return_exceptions=True)
        for run in list(self.runs.values()):
            run.detach()

    async def wait_closed(self) -> None:
        """Wait until no call is active."""
        while self.runs:
            self._no_runs.clear()
            await self._no_runs.wait()

    def _claim(self) -> None:
        self._claim_requested = False
        if not self._is_claiming or not self._can_start():
            return
        context = self.context
        if context.writes.failing:  # no call starts while the data of active calls cannot be stored
            self._retry_claim()
            return
        limit = min(_CLAIM_SIZE, context.config.max_calls - len(self.runs) - sum(self._claims.values()))
        self._claim_postponed = limit <= 0
        if not self._claim_postponed:
            per_host = context.config.max_calls_per_host
            claimed = context.store.claim_jobs(context.wall(), limit, per_host, self.starts.max_new)
            self._claims[when_done(claimed, self._on_claimed)] = limit

    def _on_claimed(self, claim: asyncio.Future[list[Job]] | Outcome[list[Job]]) -> None:
        limit = self._claims.pop(claim)
        try:
            jobs = claim.result()
        except Exception as error:
            if isinstance(error, StorageError):
                log.error("cannot claim jobs; retrying", extra={"error": str(error)})
            else:
                log.exception("cannot claim jobs: internal error; retrying")
            self._retry_claim()
            return
        self._start_runs(jobs)
        if len(jobs) == limit or self._claim_postponed:
            self.request_claim()  # more jobs may be able to start

    def _retry_claim(self) -> None:
        if self._retry is None:
            self._retry = asyncio.get_running_loop().call_later(_RETRY_INTERVAL, self._on_retry)

    def _on_retry(self) -> None:
        self._retry = None
        self.request_claim()

    def _start_runs(self, jobs: Sequence[Job], recovered: bool = False) -> None:
        """Start a run for each of these jobs, which hold a slot.

        A job that was cancelled after its claim also needs a run, which releases its slot.
        """
        for job in jobs:
            run = self.runs[job.id] = Run(job, self.context, self.starts, self._on_run_closed)
            if job.id in self._cancelled_before_start:
                self._cancelled_before_start.discard(job.id)
                run.cancel_before_start()
            run.start(recovered)

    def _on_run_closed(self, run: Run) -> None:
        del self.runs[run.job.id]
        self.starts.on_closed(run.job)
        if self._claim_postponed:
            self.request_claim()
        if not self.runs:
            self._no_runs.set()
