"""The application: submit, cancel, read results and streams, list.

The APIs (client protocol, control socket) call `Dispatcher`, and its store and registry for lists. Payloads are `Raw`
in both directions. The state is in the store; only the active calls are in memory (`Runner`).

Leaving the context shuts the dispatcher down in this order:

1. No further job is claimed; queued jobs stay queued.
2. Resumable calls continue on their hosts, for the next dispatcher. The connections of connection-bound calls are
   closed, which stops these calls; their jobs end as ``missing_result``.
3. Pending writes are completed for a limited time; after that, the next start recovers the jobs.
4. Pruning and the refresh of the hosts registry stop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial, wraps
from hashlib import blake2b
from types import TracebackType
from typing import Any, Concatenate, NamedTuple, ParamSpec, Self, TypeVar

import msgspec

from harp.protocol.dispatcher import Call
from harp.protocol.ends import Cancelled, End
from harp.protocol.json_text import Raw, dumps
from harp.protocol.schema import ProtocolError, encode_object
from harp_daemon import json_pieces
from harp_daemon.audit import Recorded
from harp_daemon.event_loop import run_in_turn
from harp_daemon.outcome import Outcome, when_done
from harp_daemon.timer_wheel import TimerWheel
from harpcaller.access.client import Client
from harpcaller.access.enforcement import SUBJECT_BYTES, Access, Admission, Wait, may
from harpcaller.access.policy import Action, Policy
from harpcaller.access.source import PolicySource
from harpcaller.audit import Audit
from harpcaller.changes import ChangeFeed, LiveJobs
from harpcaller.config import MAX_SECONDS, Config
from harpcaller.cursors import Cursors
from harpcaller.explain import ExplainContext, describe_job
from harpcaller.host_states import HostState, describe_hosts
from harpcaller.hosts.capabilities import HostCapabilities
from harpcaller.hosts.connects import HostConnects
from harpcaller.hosts.pool import ConnectionPool
from harpcaller.hosts.registry import Host, HostsRegistry
from harpcaller.hosts.resolving import Resolver
from harpcaller.hosts.tls import HostTLS
from harpcaller.metrics import Metrics
from harpcaller.model.ids import new_job_id, new_job_ids
from harpcaller.model.job_filters import JobFilter
from harpcaller.model.jobs import (
    Job,
    JobCounts,
    JobDetails,
    JobMetadata,
    JobPage,
    JobStatistics,
    JobSummary,
    NewJob,
    State,
    StopState,
    Subject,
)
from harpcaller.model.matching import matches
from harpcaller.notifier import Notifier
from harpcaller.pruner import Pruner
from harpcaller.record_stream import RecordStream, wait_for_end
from harpcaller.runner import Runner
from harpcaller.runs.context import RunContext, StoreWrites, log_fields
from harpcaller.runs.reconciliation import OrphanReaper
from harpcaller.secret_arguments import SecretKeys, read_key_file
from harpcaller.shared_answers import SharedAnswers
from harpcaller.store import LimitReached, QueueSummary, RecordMatches, StorageError, UnknownJob
from harpcaller.store.disk_space import DiskSpace
from harpcaller.store.sqlite import Store

log = logging.getLogger(__name__)

_PAGE_SIZE = 200  #: Maximum number of jobs or queues that are read together for a list.
_CANCEL_STEP = 100  #: Maximum number of jobs of a queue that are cancelled in one transaction: 2 ms.
_NEW_STEP = 250  #: Number of new jobs that are made in one step, without a pause for other threads: 1 ms.
_SHUTDOWN_TIMEOUT = 10.0  #: Maximum seconds that a shutdown waits until the ends of the active calls are stored.
_POLICY_INTERVAL = 0.25  #: Seconds between two checks whether the policy has changed.
_WAITS_STEP = 500  #: Maximum number of waiting requests that are decided about in one step.
_QUEUE_STEPS = 5  #: Maximum number of steps of `_PAGE_SIZE` queues that one page of a list looks at.
_QUEUES = "queues"  #: The form of the list of queues, for its cursors.
_ADMITTED = Admission()
_NULL = Raw(b"null")
P = ParamSpec("P")
T = TypeVar("T")


def _shielded(
    request: Callable[Concatenate[Dispatcher, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Dispatcher, P], Coroutine[Any, Any, T]]:
    """Return a method that completes its work even if its caller is cancelled."""

    @wraps(request)
    async def method(self: Dispatcher, /, *args: P.args, **kwargs: P.kwargs) -> T:
        task = asyncio.create_task(request(self, *args, **kwargs))
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # perhaps nobody waits any more
        return await asyncio.shield(task)

    return method


class QueueRights(NamedTuple):
    """Which queues a client sees, and whether with all of their jobs."""

    #: The owners whose jobs are counted in queues for which `sees_own` returns True; None: there is no such queue.
    owners: tuple[str, ...] | None
    sees_own_only: bool  #: Whether `sees_all` returns False for each queue.
    sees_all: Callable[[QueueSummary], bool]
    sees_own: Callable[[QueueSummary], bool]


ALL_QUEUES = QueueRights(None, False, lambda queue: True, lambda queue: True)

#: What of a host shows when others use it.
_TIMES_OF_OTHERS: Mapping[str, Any] = {"contact": None, "checked": None, "round_trip": None, "clock_skew": None}


class Dispatcher:
    """The dispatcher: an asynchronous context manager that runs while its context lasts.

    Every method may raise `StorageError`; then it had no effect. `wall` returns the wall clock in Unix seconds, for
    times that are stored and shown. Raises `ConfigError` if a certificate file or the hosts file is invalid.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        wall: Callable[[], float] = time.time,
        audit: Audit | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.config = config  #: The current configuration.
        self.store = store
        self.audit = audit or Audit()  #: What is recorded; the requests are recorded by `harpcaller.acting`.
        self.metrics = metrics  #: What is counted; None: nothing.
        self._wall = wall
        self._notifier = Notifier()
        self.access = Access(config)  #: The policy; `harpcaller.acting` enforces it.
        self.connects = HostConnects()  #: What connections to hosts have shown.
        self._tls = HostTLS(config, lambda: self.registry.list_hosts(), self.connects)
        self._secret_keys = read_key_file(config)
        self._runner = Runner(lambda: self.registry.is_ready, wall())
        self.registry = HostsRegistry(config, self._on_hosts_changed)
        self.access.use_tags(self.registry.list_tags())
        self._pruner = Pruner(store, wall, lambda: self.config.max_age_seconds, on_deleted=self._notifier.forget_ends)
        self._group = asyncio.TaskGroup()
        # A call that a host lists, and that has no run, is an orphan.
        self._orphan_reaper = OrphanReaper(self._group, self._runner.runs.__contains__)
        self._disk_space = DiskSpace(store.path)
        self._requests: set[asyncio.Task[Any]] = set()
        self._answers = SharedAnswers()
        self._counting = asyncio.Lock()
        self._cursors: Cursors
        self._search_lock = asyncio.Lock()
        self.changes = ChangeFeed()  #: The changes of jobs, if there is an API that shows them.
        self.live = LiveJobs(self.changes, self.get_summaries)  #: For `harpcaller.acting`.

    async def __aenter__(self) -> Self:
        identity = await self.store.get_identity()
        self._cursors = Cursors(identity.key)
        timers, resolver = TimerWheel(), Resolver()
        runner = self._runner
        runner.context = RunContext(
            config=self.config,
            tls=self._tls,
            store=self.store,
            notifier=self._notifier,
            find_host=self.registry.find_host,
            identity=identity,
            timers=timers,
            resolver=resolver,
            capabilities=HostCapabilities(
                identity,
                timers,
                resolver,
                lambda host, calls: self._orphan_reaper.reap_calls(host, calls, runner.context),
            ),
            connections=ConnectionPool(timers),
            writes=StoreWrites(timers),
            request_claim=runner.request_claim,
            wall=self._wall,
            secret_keys=self._secret_keys,
            audit=self.audit,
            on_outage=lambda job_id: self.changes.touch([job_id]),
            metrics=self.metrics,
        )
        self._report_config(self.config, frozenset())
        if self.config.http is not None:
            self.store.observe(self.changes.record)
        if self.audit.log is not None:
            self.store.call_before_commits(self.audit.log.write_before_commit)
        await self._group.__aenter__()
        recovered = await runner.recover()
        self._maintenance = [
            self._group.create_task(runner.start_claiming(recovered)),
            self._group.create_task(self.registry.refresh_regularly()),
            self._group.create_task(self._pruner.run_regularly()),
            self._group.create_task(self._enforce_changes()),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        runner, context = self._runner, self._runner.context
        self.live.close()
        log.info("dispatcher stops", extra={"calls": len(runner.runs)})
        await runner.detach()
        try:
            async with asyncio.timeout(_SHUTDOWN_TIMEOUT):
                await runner.wait_closed()
                while self._requests:
                    await asyncio.wait(self._requests)
        except TimeoutError:
            unfinished = len(runner.runs) + len(self._requests)
            log.error("shutdown timeout; jobs will be recovered", extra={"unfinished": unfinished})
            for run in runner.runs.values():
                run.abandon()
            for task in self._requests:
                task.cancel()
        for task in self._maintenance:
            task.cancel()
        self._orphan_reaper.stop()
        context.connections.close()
        await context.capabilities.close()
        if context.openings:
            await asyncio.wait(context.openings)
        context.timers.close()
        if isinstance(error, Exception):
            await self._group.__aexit__(None, None, None)  # so that the error of the APIs is raised unchanged
        else:
            await self._group.__aexit__(kind, error, traceback)

    # Requests of the APIs.

    @property
    def notifier(self) -> Notifier:
        """The jobs with clients that wait."""
        return self._notifier

    @property
    def is_claiming(self) -> bool:
        """Whether queued jobs can start: the jobs of the dispatcher before have been taken over."""
        return self._runner.is_claiming

    @property
    def missing_store(self) -> str | None:
        """That the file of the store was removed or moved; None: it is where it was."""
        return self._disk_space.describe_missing()

    @property
    def waiting_writes(self) -> int:
        """The number of writes of active calls that have failed and are being repeated."""
        return self._runner.context.writes.waiting

    def list_active_jobs(self) -> list[Job]:
        """Return the jobs whose calls are active; their states may be out of date."""
        return [run.job for run in self._runner.runs.values()]

    def list_host_states(self) -> tuple[frozenset[str], frozenset[str]]:
        """Return the names of the hosts that accept starts, and of those that do not."""
        return self._runner.starts.list_states()

    @property
    def active_calls(self) -> int:
        """The number of active calls."""
        return len(self._runner.runs)

    def submit(
        self,
        call: Call,
        client: str,
        received_at: float | None = None,
        admission: Admission = _ADMITTED,
        record: Callable[[NewJob], Recorded | None] = lambda job: None,
        on_limit: Callable[[LimitReached, Outcome[str]], None] | None = None,
        on_repeated: Callable[[], object] = lambda: None,
    ) -> Outcome[str]:
        """Store a job; return a future of its id, which is set when the job is on stable storage.

        An unknown host is accepted; the job then ends as ``unknown_host``. Limits are lowered to the configured limits.
        A call with the request id of a stored job is that job; raises `RequestIDReused` if the call differs. `client`
        is the client's address, for the log; `received_at` is the monotonic time of the request, or None.
        `record` returns its audit entry, which the id waits for. Raises `LimitReached` for too many
        queued jobs; with `on_limit`, that function gets the error and sets the future. `on_repeated` is called if the
        call has been submitted before.
        """
        job_id: Outcome[str] = Outcome(asyncio.get_running_loop())
        if (shortage := self._disk_space.find_shortage(self.config.disk_reserve)) is not None:
            job_id.set_exception(shortage)
            return job_id
        job = self._new_job(new_job_id(self._wall()), call, admission)
        recorded = record(job)
        self._runner.context.addresses[job.id] = client
        write_started_at = time.monotonic()

        def on_stored(stored: Outcome[str]) -> None:
            if recorded is not None and not recorded.is_done:  # the store has not begun a transaction
                self.audit.write_calls()
            if (error := stored.exception()) is not None:
                self.audit.report("end", job=job.id, end="not_stored", error=str(error))
                if job_id.done():
                    return
                if on_limit is not None and isinstance(error, LimitReached):
                    on_limit(error, job_id)
                else:
                    job_id.set_exception(error)
                return
            if stored.result() == job.id:
                self.access.remember(job)
                if self.metrics is not None:
                    self.metrics.record_stored(received_at, write_started_at)
                log.info("job submitted", extra={**log_fields(job), "client": client})
                if log.isEnabledFor(logging.DEBUG):
                    _log_arguments(job)
            else:
                on_repeated()
                repeated = {"job": stored.result(), "request_id": job.request_id}
                self.audit.report("end", job=job.id, end="not_stored", same_as=stored.result())
                log.info("job submitted again", extra={**repeated, "client": client})
            if admission.end is not None and stored.result() == job.id:
                self.audit.report_end(job.id, None, admission.end, "dispatcher")
            if job_id.done():
                return
            if recorded is not None and recorded.error is not None:
                job_id.set_exception(StorageError(f"the audit file cannot be written: {recorded.error}"))
            else:
                job_id.set_result(stored.result())

        self._runner.request_claim()  # before `add_job`, so that both share a commit
        when_done(self.store.add_job(job, self._wall()), on_stored)
        return job_id

    @_shielded
    async def submit_many(
        self,
        calls: Sequence[Call],
        client: str,
        admissions: Sequence[Admission] | None = None,
        record: Callable[[Sequence[NewJob]], Awaitable[None]] | None = None,
        as_one: bool = False,
        on_repeated: Callable[[], object] = lambda: None,
    ) -> list[str]:
        """Store jobs, all or none, as `submit` does; return their ids in the same order.

        `as_one`: their request ids are only used for these calls together. `on_repeated` is called if all of them have
        been submitted before.
        """
        if not calls:
            return []
        if (shortage := self._disk_space.find_shortage(self.config.disk_reserve)) is not None:
            raise shortage
        # In a thread, so that many jobs do not block the event loop.
        jobs = await run_in_turn(partial(self._new_jobs, admissions or [_ADMITTED] * len(calls), as_one), calls)
        if record is not None:
            await record(jobs)
        addresses = self._runner.context.addresses
        for job in jobs:
            addresses[job.id] = client
        try:
            job_ids = await self.store.add_jobs(jobs, self._wall(), self._runner.request_claim)
        except Exception as error:
            ids = {"first": jobs[0].id, "last": jobs[-1].id}
            self.audit.report("end", jobs=len(jobs), **ids, end="not_stored", error=str(error))
            raise
        for job, job_id in zip(jobs, job_ids, strict=True):
            if job.id != job_id:
                self.audit.report("end", job=job.id, end="not_stored", same_as=job_id)
        new = [job for job, job_id in zip(jobs, job_ids, strict=True) if job.id == job_id]
        if not new:
            on_repeated()
        ids = {"first": job_ids[0], "last": job_ids[-1]}
        log.info("jobs submitted", extra={"jobs": len(new), "again": len(jobs) - len(new), **ids, "client": client})
        if log.isEnabledFor(logging.DEBUG):
            for job in new:
                log.debug("job submitted with others", extra=log_fields(job))
                _log_arguments(job)
        return job_ids

    @_shielded
    async def cancel(self, job_id: str, client: str | None = None, principal: str | None = None) -> bool:
        """Cancel a queued or running job; return False if it has ended or is unknown.

        Its call is not started after this function has returned. `client` is the address, and
        `principal` the name of the client in the stop request; the latter is also for the audit.
        """
        before = await self.store.cancel_job(job_id, self._wall(), self._cancelled_by(client, principal))
        if before is not None:
            await self._report_cancelled([job_id], principal)
            await self._stop_cancelled(job_id, before, client)
        return before is not None

    @_shielded
    async def cancel_queue(self, queue: Raw, client: str | None = None, principal: str | None = None) -> int:
        """Cancel all jobs of a queue, as `cancel` does; return how many were cancelled.

        Each step is a separate transaction, so that other writes do not wait for all steps.
        """
        stop_request, cancelled = self._cancelled_by(client, principal), 0
        while True:
            began = time.monotonic()
            jobs = await self.store.cancel_queue(queue, self._wall(), stop_request, limit=_CANCEL_STEP)
            await self._report_cancelled([job_id for job_id, _ in jobs], principal)
            await asyncio.gather(*(self._stop_cancelled(job_id, before, client) for job_id, before in jobs))
            cancelled += len(jobs)
            if len(jobs) < _CANCEL_STEP:
                return cancelled
            await asyncio.sleep(self.store.find_pause(time.monotonic() - began))

    async def wait_stopped(self, job_id: str) -> JobDetails:
        """Wait until a job has ended and its stop is not pending; return its details. Raises `UnknownJob`."""
        changed = asyncio.Event()

        def on_published(_: bool) -> None:
            changed.set()

        self._notifier.subscribe(job_id, on_published)
        try:
            while True:
                changed.clear()
                job = await self.get_job(job_id)
                if job.end is not None and job.stop is not StopState.PENDING:
                    return await self.store.get_details(job_id)
                await changed.wait()
        finally:
            self._notifier.unsubscribe(job_id, on_published)

    @_shielded
    async def release_slot(self, job_id: str) -> bool:
        """Release the slot of a job that has ended, without a report of its host; return False if it holds no slot."""
        try:
            job = await self.store.get_job(job_id)
        except UnknownJob:
            return False
        # The stop of an ended job that holds its slot is pending or has failed. After a failed stop, the report stays.
        report = dumps({"released": self._wall()}) if job.stop is StopState.PENDING else None
        released = await self.store.finalize_stop(job_id, StopState.FAILED, metadata=JobMetadata(stop_report=report))
        if released:
            log.warning("slot released by administrator", extra={"job": job_id})
            self._notifier.publish_end(job_id)
            self._runner.request_claim()
        return released

    async def details(self, job_id: str) -> dict[str, Any]:
        """Return all details of a job, and why it is in its state. Payloads are `Raw`. Raises `UnknownJob`."""
        return (await self.describe(job_id))[1]

    async def describe(
        self,
        job_id: str,
        may_read: Callable[[Subject], bool] | None = None,
        sees_others: Callable[[Job], bool] = lambda job: True,
        permits: Callable[[Subject], bool] | None = None,
        *,
        is_new: bool = False,
    ) -> tuple[JobDetails, dict[str, Any]]:
        """Return what is stored of a job, and what `details` returns.

        Ids of jobs for which `may_read` returns False are replaced by their number. If `sees_others` returns False for
        the job, its position is among the jobs of its owner; then `permits`, which is as in `get_job`, is needed.
        `is_new`: the job was just submitted, with short payloads. Spec: docs/protocol.md, Details.
        """
        if permits is None:
            details = self.store.get_new_details(job_id) if is_new else None
            if details is None:
                details = await self.store.get_details(job_id)
        else:
            details = await self.store.get_permitted_details(job_id, permits, SUBJECT_BYTES)
        position, hidden = details.queue_position, 0
        if may_read is not None and position is not None:
            subjects = await self.find_subjects(position.slot_holders)
            visible = tuple(job for job, subject in subjects.items() if may_read(subject))
            hidden = len(position.slot_holders) - len(visible)
            details = msgspec.structs.replace(
                details, queue_position=msgspec.structs.replace(position, slot_holders=visible)
            )
        runs, context = self._runner.runs, self._runner.context
        has_ended = details.job.end is not None  # then the registry, which looks at its files, explains nothing
        state = ExplainContext(
            run=runs.get(job_id),
            host=None if has_ended else self.registry.find_host(details.job.host),
            registry_loaded=has_ended or self.registry.is_ready,
            config=self.config,
            active_calls=len(runs),
            store_failing=context.writes.failing,
            failing=self._runner.starts.get_failing(details.job.host),
            now=self._wall(),
            hidden_holders=hidden,
            sees_others=sees_others(details.job),
        )
        return details, describe_job(details, state)

    async def get_job(self, job_id: str, permits: Callable[[Subject], bool] | None = None) -> Job:
        """Return a job. Raises `UnknownJob`, also for a job for which `permits` returns False in another thread."""
        if permits is None:
            return await self.store.get_job(job_id)
        return await self.store.get_permitted_job(job_id, permits, SUBJECT_BYTES)

    def get_active_job(self, job_id: str) -> Job | None:
        """Return a job whose call is active; its state may be out of date."""
        run = self._runner.runs.get(job_id)
        return None if run is None else run.job

    async def find_subjects(self, job_ids: Sequence[str]) -> dict[str, Subject]:
        """Return what decides who may do something with each of these jobs; unknown ones are missing."""
        return await self.store.find_subjects(job_ids, SUBJECT_BYTES)

    def result(self, job_id: str, first_read: Awaitable[Job] | None = None) -> Outcome[End]:
        """Return a future of the job's end, as `wait_for_end`. It raises `UnknownJob`, also if the job is pruned.

        With `first_read` the job is read by it, and the future raises what it raises.
        """
        run = self._runner.runs.get(job_id)
        is_active = run is not None and not run.has_ended
        return wait_for_end(job_id, is_active, self.store, self._notifier, first_read)

    def record_delivery(self, job_id: str, received_at: float) -> None:
        """Record that the end of a job was sent to a client; `received_at` is the monotonic time of its request."""
        if self.metrics is not None:
            self.metrics.record_delivery(job_id, received_at)

    def stream(
        self,
        job_id: str,
        since: int | None,
        recent: int | None,
        wait: bool,
        on_ready: Callable[[], None],
        first_read: Awaitable[Job] | None = None,
    ) -> RecordStream:
        """Return the records of a job; with `wait`, also future records. The caller closes the stream.

        See `RecordStream` for the arguments. Without `since` and `recent`, a stream with `wait` starts with the next
        record, any other stream with record 0. The stream raises `UnknownJob`.
        """
        if wait and since is None and recent is None:
            recent = 0
        return RecordStream(job_id, since, recent, wait, self.store, self._notifier, on_ready, first_read)

    async def search_records(
        self, job_id: str, text: str, fold: bool, first: int, until: int, limit: int, max_bytes: int
    ) -> RecordMatches:
        """Return the records of a job from `first` to before `until` whose JSON has a text, as `Store.search_records`.

        The text is looked for as it is, and as a part of a JSON string. One search is executed at a time, so that
        searches do not occupy all reading threads.
        """
        spellings = text, dumps(text)[1:-1].decode(), json.dumps(text, ensure_ascii=False)[1:-1]
        needles = dict.fromkeys(spelling.encode() for spelling in spellings)
        async with self._search_lock:
            return await self.store.search_records(job_id, list(needles), fold, first, until, limit, max_bytes)

    async def list_jobs(
        self,
        ended: bool = False,
        host: str | None = None,
        queue: Raw | None = None,
        newest: int | None = None,
        may_list: Callable[[Job], bool] | None = None,
    ) -> AsyncGenerator[Job, None]:
        """Yield the jobs of `Store.list_jobs`; with `newest`, only the last `newest` jobs in reverse order.

        Jobs for which `may_list` returns False are left out.
        """
        after = None
        remaining = sys.maxsize if newest is None else newest
        next_page = partial(self.store.list_jobs, ended=ended, host=host, queue=queue, newest_first=newest is not None)
        while remaining > 0 and (
            page := await next_page(after=after, limit=_PAGE_SIZE if may_list else min(remaining, _PAGE_SIZE))
        ):
            for after, job in page:  # noqa: B007 - the next page starts after the last job
                if remaining > 0 and (may_list is None or may_list(job)):
                    remaining -= 1
                    yield job

    async def find_jobs(
        self,
        wanted: JobFilter,
        newest_first: bool = True,
        limit: int = 50,
        cursor: str | None = None,
        owners: Sequence[str] | None = None,
        permits: Callable[[Subject], bool] | None = None,
        with_subjects: bool = False,
    ) -> JobPage:
        """Return a part of the list of jobs that fit a filter, as `Store.find_jobs` does, from a cursor on.

        Raises `InvalidCursor` for a cursor of another list.
        """
        list_form = f"{'newest' if newest_first else 'oldest'} {wanted.normal_form()}"
        found = await self.store.find_jobs(
            wanted,
            owners=owners,
            permits=permits,
            subject_bytes=SUBJECT_BYTES if with_subjects or permits is not None else None,
            newest_first=newest_first,
            after=None if cursor is None else self._cursors.decode(cursor, list_form),
            limit=limit,
        )
        following = None if found.next is None else self._cursors.encode(found.next, list_form)
        summaries = self._add_outages(found.summaries)
        return JobPage(summaries, following, found.complete, found.examined, found.searched_to)

    async def get_summaries(self, job_ids: Sequence[str], with_subjects: bool = False) -> list[JobSummary]:
        """Return the summaries of these jobs, in the order of submission; unknown ones are missing."""
        subject_bytes = SUBJECT_BYTES if with_subjects else None
        summaries = await self.store.get_summaries(job_ids, subject_bytes=subject_bytes)
        return self._add_outages(summaries)

    async def select_jobs(self, wanted: JobFilter, summaries: Sequence[JobSummary]) -> frozenset[str]:
        """Return the ids of those of these jobs that fit a filter. The store is read only if their payloads decide."""
        found = {summary.id: matches(wanted, summary) for summary in summaries}
        fitting = frozenset(job_id for job_id, fits in found.items() if fits)
        if unsure := [job_id for job_id, fits in found.items() if fits is None]:
            fitting |= await self.store.select_jobs(wanted, unsure)
        return fitting

    def find_outage(self, job_id: str) -> float | None:
        """Return since when the host of an active call has not been reached, in Unix seconds; None: it is reached."""
        run = self._runner.runs.get(job_id)
        return None if run is None or run.outage is None else run.outage.since

    def _add_outages(self, summaries: Sequence[JobSummary]) -> list[JobSummary]:
        runs = self._runner.runs  # few of many jobs have one
        return [each if each.id not in runs else self._add_outage(each) for each in summaries]

    def _add_outage(self, summary: JobSummary) -> JobSummary:
        since = self.find_outage(summary.id)
        return summary if since is None else msgspec.structs.replace(summary, unreachable_since=since)

    async def count_jobs(
        self,
        wanted: JobFilter,
        by: Sequence[str],
        most: int,
        owners: Sequence[str] | None = None,
        permits: Callable[[Subject], bool] | None = None,
        whose: Hashable = None,
    ) -> JobCounts:
        """Count jobs as `Store.count_jobs` does. The answer is shared by equal rights: `whose`, and `owners`."""
        question = ("counts", wanted.normal_form(), tuple(by), most, None if owners is None else tuple(owners), whose)
        rights: dict[str, Any] = {"owners": owners, "permits": permits, "subject_bytes": SUBJECT_BYTES}
        count = partial(self.store.count_jobs, wanted, by, most=most, at=self._wall(), **rights)
        return await self._answers.get(question, partial(self._count, count))

    async def _count(self, count: Callable[[], Awaitable[T]]) -> T:
        """Let one thread of the store count at a time: the others are for short reads."""
        async with self._counting:
            return await count()

    async def job_statistics(
        self,
        since: float,
        until: float,
        step: float,
        states: frozenset[State] = frozenset(),
        owners: Sequence[str] | None = None,
        permits: Callable[[Subject], bool] | None = None,
        whose: Hashable = None,
    ) -> JobStatistics:
        """Count jobs over time as `Store.job_statistics` does. The answer is shared as that of `count_jobs`."""
        question = ("statistics", since, until, step, states, None if owners is None else tuple(owners), whose)
        rights: dict[str, Any] = {"owners": owners, "permits": permits, "subject_bytes": SUBJECT_BYTES}
        count = partial(self.store.job_statistics, since, until, step, states, **rights)
        return await self._answers.get(question, partial(self._count, count))

    async def find_queues(
        self, rights: QueueRights, fits: Callable[[QueueSummary], bool], limit: int, cursor: str | None = None
    ) -> tuple[list[QueueSummary], str | None]:
        """Return at most `limit` queues for which `fits` returns True, and the cursor at which the list continues.

        It looks at a limited number of queues from a cursor on. Raises `InvalidCursor`.
        """
        place = 0 if cursor is None else self._cursors.decode(cursor, _QUEUES)
        found: list[QueueSummary] = []
        for _ in range(_QUEUE_STEPS):
            step = await self._read_queues(rights, place, _PAGE_SIZE)
            for place, queue in step:
                if queue is not None and fits(queue):
                    found.append(queue)
                    if len(found) == limit:
                        return found, self._cursors.encode(place, _QUEUES)
            if len(step) < _PAGE_SIZE:
                return found, None
        return found, self._cursors.encode(place, _QUEUES)

    async def get_queue(self, rights: QueueRights, queue_id: str) -> QueueSummary | None:
        """Return the queue with an id; None if it has no job that has not ended or holds a slot."""
        found = await self._read_queues(rights, 0, 1, f"queue:{queue_id}")
        return found[0][1] if found else None

    async def _read_queues(
        self, rights: QueueRights, after: int, limit: int, lane: str | None = None
    ) -> list[tuple[int, QueueSummary | None]]:
        """Return a step of the list of queues, as `Store.find_queues`: the place of each, and what a client sees."""
        own: list[QueueSummary] = []
        if rights.owners is not None:
            own = await self.store.find_queues(after, limit, lane, rights.owners)
            if rights.sees_own_only:
                return [(queue.place, queue if rights.sees_own(queue) else None) for queue in own]
        of_id = {queue.id: queue for queue in own if rights.sees_own(queue)}
        queues = await self.store.find_queues(after, limit, lane)
        return [(queue.place, queue if rights.sees_all(queue) else of_id.get(queue.id)) for queue in queues]

    async def describe_hosts(
        self, hosts: Sequence[Host], owners: tuple[str, ...] = (), sees_all: Callable[[str], bool] = lambda host: True
    ) -> list[HostState]:
        """Return what is known about these hosts of the registry.

        Only the jobs of `owners` are counted on hosts for whose names `sees_all` returns False. When such a host was
        last used is left out.
        """
        counts = await self._answers.get("open jobs of hosts", self.store.count_open_of_hosts)
        states = self._describe_hosts(hosts, counts)
        restricted = {host.hostname for host in hosts if not sees_all(host.hostname)}
        if not restricted:
            return states
        count_own = partial(self.store.count_open_of_hosts, owners)
        own = await self._answers.get(("open jobs of hosts", owners), count_own)
        lost = [run.job for run in self._runner.runs.values() if run.outage is not None and run.job.owner in owners]
        outages = Counter(job.host for job in lost)

        def restrict(state: HostState) -> HostState:
            name = state.host.hostname
            running, queued = own.get(name, (0, 0))
            own_jobs = replace(state, running=running, queued=queued, outages=outages[name])
            return replace(own_jobs, **_TIMES_OF_OTHERS)

        return [restrict(state) if state.host.hostname in restricted else state for state in states]

    def _describe_hosts(self, hosts: Sequence[Host], counts: Mapping[str, tuple[int, int]]) -> list[HostState]:
        runner = self._runner
        limit, capabilities = self.config.max_calls_per_host, runner.context.capabilities
        known = runner.starts, capabilities, self.connects
        states = describe_hosts(hosts, counts, runner.runs.values(), *known, limit, self._wall())
        sources = self.registry.sources_of(host.hostname for host in hosts)
        return [replace(state, source=sources[state.host.hostname]) for state in states]

    async def prune(self, min_age: float | None = None, trust_clock: bool = False) -> int:
        """Delete old jobs as `Pruner.prune` does; return how many. Raises `PruneRefused`."""
        return await self._pruner.prune(min_age, trust_clock)

    async def reload(self, config: Config) -> None:
        """Apply a new configuration to later calls, to the hosts registry and to pruning.

        The APIs apply the limits of requests, and the program applies the log settings. Raises `ConfigError` without a
        change if a certificate file or the hosts file is invalid.
        """
        tls, source, secret_keys = (
            HostTLS(config, self.registry.list_hosts, self.connects),
            PolicySource(config),
            read_key_file(config),
        )
        self.registry.update_config(config)
        self.access.use(source)
        reported, self.config = frozenset(self.config.ignored), config
        self._tls, self._secret_keys = tls, secret_keys
        self._runner.context = replace(self._runner.context, config=config, tls=tls, secret_keys=secret_keys)
        self._report_config(config, reported)
        self._runner.request_claim()
        await self.registry.read_changed_file()

    # The policy.

    def _on_hosts_changed(self) -> None:
        self.access.use_tags(self.registry.list_tags())
        self._runner.request_claim()

    async def _enforce_changes(self) -> None:
        """Decide again about the requests that wait for a job, after each change of the policy."""
        policy, of_file = self.access.policy, self.access.source.policy
        while True:
            await asyncio.sleep(_POLICY_INTERVAL)
            self.access.refresh()
            self.access.use_tags(self.registry.list_tags())
            if self.access.source.policy is not of_file:
                of_file = self.access.source.policy
                self.audit.report("policy", **self.access.source.describe_version())
            if self.access.policy is not policy:
                policy = self.access.policy
                self.live.expel_all()
            if waits := self.access.take_unchecked():
                await self._end_denied_waits(waits)

    async def _end_denied_waits(self, waits: list[tuple[object, Wait]]) -> None:
        while waits:
            step = waits[:_WAITS_STEP]
            try:
                jobs = await self.find_subjects([wait.job_id for _, wait in step])
            except StorageError as error:
                log.error("cannot decide about waiting requests; retrying", extra={"error": str(error)})
                await asyncio.sleep(_POLICY_INTERVAL)
                continue
            del waits[:_WAITS_STEP]
            found = [(key, wait, job) for key, wait in step if (job := jobs.get(wait.job_id)) is not None]
            asked = [(self.access.policy_of(wait.client), wait.client, job) for _, wait, job in found]
            # In a thread, because rules may look at long arguments.
            allowed = await asyncio.to_thread(_may_read_each, asked)
            for (key, wait, _), (policy, _, _), is_allowed in zip(found, asked, allowed, strict=True):
                if key not in self.access.waits:
                    continue
                if is_allowed:
                    self.access.add_wait(key, wait._replace(policy=policy))
                else:
                    wait.revoke()

    # Internals.

    def _new_jobs(self, admissions: Sequence[Admission], as_one: bool, calls: Sequence[Call]) -> list[NewJob]:
        ids = new_job_ids(self._wall(), len(calls))
        others = b"".join(map(self._digest, calls)) if as_one else b""
        jobs: list[NewJob] = []
        for of_job in zip(ids, calls, admissions, strict=True):
            if len(jobs) % _NEW_STEP == 0:
                json_pieces.between_pieces()
            jobs.append(self._new_job(*of_job, others))
        return jobs

    def _new_job(self, job_id: str, call: Call, admission: Admission, others: bytes = b"") -> NewJob:
        """Return the job of a call. Its request id is only for the calls whose digests are `others`."""
        config, (owner, limits, request_ids_of, end, rerun_of) = self.config, admission
        timeout = min(call.timeout or config.default_timeout, config.default_timeout)
        max_exec_time = min(call.max_exec_time or config.max_exec_time, config.max_exec_time)
        queue, concurrency = (call.queue.name, call.queue.concurrency) if call.queue else (None, 1)
        start_within = config.start_within if call.start_within is None else float(min(call.start_within, MAX_SECONDS))
        if limits.max_exec_time is not None:
            max_exec_time = min(max_exec_time, limits.max_exec_time)
        arguments, secrets = self._seal(job_id, call)
        # A refused call may be sent again with its request id.
        request_id = None if end is not None else call.request_id
        return NewJob(
            id=job_id,
            host=call.host,
            procedure=call.procedure,
            arguments=arguments,
            timeout=timeout,
            max_exec_time=max_exec_time,
            queue=queue,
            concurrency=concurrency,
            info=_NULL if call.info is None else call.info,
            start_within=start_within,
            request_id=request_id,
            call_digest=b"" if request_id is None else self._digest(call, others + (rerun_of or "").encode()),
            owner=owner,
            request_ids_of=request_ids_of,
            max_running=limits.running,
            max_queued=limits.queued,
            max_record_bytes=limits.max_record_bytes,
            secrets=None if end is not None else secrets,
            end=end,
            rerun_of=rerun_of,
        )

    def _digest(self, call: Call, context: bytes = b"") -> bytes:
        """Return a digest of a call's text, which includes the request id, and of what else it is submitted for."""
        text = encode_object(call) + context
        if call.secrets and self._secret_keys is not None:
            return self._secret_keys.digest(text)
        return blake2b(text, digest_size=16).digest()

    def _seal(self, job_id: str, call: Call) -> tuple[Raw, bytes | None]:
        """Return the arguments to store and show, and the encrypted secret values."""
        if not call.secrets:
            return call.arguments, None
        return self.require_secret_keys().seal(job_id, call.arguments, call.secrets)

    def require_secret_keys(self) -> SecretKeys:
        """Return the keys for secret arguments. Raises `ProtocolError` if there are none."""
        if self._secret_keys is None:
            raise ProtocolError("secrets: the dispatcher has no keys for secret arguments; set secrets_key_file")
        return self._secret_keys

    def _cancelled_by(self, client: str | None, principal: str | None) -> Raw:
        named = {} if principal is None else {"principal": principal}
        return dumps({"why": "cancelled", "by": client, **named, "at": self._wall()})

    async def _report_cancelled(self, job_ids: Sequence[str], principal: str | None) -> None:
        if self.audit.log is None:
            return
        subjects: dict[str, Subject] = {}
        with suppress(StorageError):  # the entries name the jobs only
            subjects = await self.find_subjects(job_ids)
        for job_id in job_ids:
            self.audit.report_end(job_id, subjects.get(job_id), Cancelled(), principal)

    async def _stop_cancelled(self, job_id: str, before: State, client: str | None) -> None:
        """Stop the call of a cancelled job, after the commit of its end."""
        log.info("job cancelled", extra={"job": job_id, "was": before.value, "client": client})
        self._notifier.publish_end(job_id, Cancelled())
        await self._runner.cancel_call(job_id, before, client)
        self._runner.request_claim()

    def _report_config(self, config: Config, reported: frozenset[str]) -> None:
        for key in config.ignored:
            if key not in reported:
                log.warning("obsolete configuration key ignored", extra={"file": str(config.file), "key": key})
        if config.max_age is None:
            log.warning("jobs are never deleted; set max_age", extra={"file": str(config.file)})
        else:
            log.info("ended jobs are deleted after max_age", extra={"hours": config.max_age})
        if exposed := [str(address) for address in config.unsafe_listeners]:
            lines = "; ".join(config.safe_lines)
            log.warning("clients need no rights; set access_file", extra={"listeners": exposed, "lines": lines})
        if config.hosts_file is None and config.host_db_script is None:
            log.warning("no hosts; set hosts_file or host_db_script")
        for warning in self._tls.warnings:
            log.warning(warning)


def _may_read_each(jobs: Sequence[tuple[Policy, Client, Subject]]) -> list[bool]:
    return [may(policy, client, Action.READ, job) for policy, client, job in jobs]


def _log_arguments(job: NewJob) -> None:
    log.debug("job's arguments", extra={"job": job.id, "arguments": job.arguments.decode()})
