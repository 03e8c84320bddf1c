"""The application: submit, cancel, result, follow, list; it starts the calls and owns their tasks.

The doors (client protocol, control socket) call `Dispatcher` and nothing behind it. Payloads are `Raw` in both
directions. The store is the truth; what is kept in memory beside it is which calls are under way here.

The order of a shutdown, held by leaving the context:

1. the doors have stopped accepting (they are inside the context);
2. nothing more is claimed: what is queued stays queued;
3. the calls under way are left to their hosts, which keep them for the next dispatcher; those that a host can't keep
   are cancelled by closing their connections, and their jobs end as ``missing_result``;
4. what is left to be stored is stored, for a bounded time: what the store does not take the next start takes up;
5. upkeep stops, a running `host_db_script` with it;
6. whoever opened the store closes it.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial, wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from harp.protocol.ends import Cancelled, End
from harp.protocol.json_text import Raw, dumps
from harp.protocol.replies import Continue
from harp.protocol.requests import Call
from harpcaller.config import Config
from harpcaller.explain import ExplainContext, describe
from harpcaller.hosts.capabilities import HostCapabilities
from harpcaller.hosts.inventory import Host
from harpcaller.hosts.pool import ConnectionPool
from harpcaller.hosts.registry import HostsRegistry
from harpcaller.hosts.tls import HostTLS
from harpcaller.model.ids import is_job_id, new_job_id
from harpcaller.model.jobs import Job, JobDetails, JobMetadata, NewJob, Records, State, StopState
from harpcaller.notifier import Notifier, RecordBatch
from harpcaller.pruner import prune, prune_regularly
from harpcaller.runs.context import RunContext, log_fields
from harpcaller.runs.reconciliation import OrphanReaper
from harpcaller.runs.run import Run
from harpcaller.store import QueueStatus, StorageError, Store, UnknownJob

__all__ = ["Dispatcher"]

log = logging.getLogger(__name__)

#: About how many bytes of records are read from the store at a time, for one follower.
_BATCH_BYTES = 64 * 1024

#: How many jobs are claimed at a time, and listed at a time.
_CLAIMED_AT_ONCE = 100
_LISTED_AT_ONCE = 200

#: Seconds until the store is asked again after it failed.
_STORE_PAUSE = 1.0

#: Seconds that a shutdown waits for the ends of the calls under way to be stored.
_LAST_ENDS = 10.0

P = ParamSpec("P")
T = TypeVar("T")


def _shielded(
    request: Callable[Concatenate[Dispatcher, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Dispatcher, P], Coroutine[Any, Any, T]]:
    """Make a method that completes its work even when its caller is cancelled."""

    @wraps(request)
    async def method(self: Dispatcher, /, *args: P.args, **kwargs: P.kwargs) -> T:
        task = asyncio.create_task(request(self, *args, **kwargs))
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)
        return await asyncio.shield(task)

    return method


class Dispatcher:
    """The dispatcher: an asynchronous context manager that runs while its context lasts.

    Every method may raise `StorageError`; then it did nothing. Methods that name a job take any text: what is
    not a UUID in lower-case text form names no job.

    Args:
        config: the configuration.
        store: where jobs are kept, open; it stays open when the context is left.
        wall: the wall clock, for times that are stored and shown; Unix seconds.

    Raises:
        ConfigError: a certificate file or the hosts file can't be used.
    """

    def __init__(self, config: Config, store: Store, wall: Callable[[], float] = time.time) -> None:
        self._config = config
        self._store = store
        self._wall = wall
        self._notifier = Notifier()
        self._wake = asyncio.Event()
        self._registry = HostsRegistry(config, self._wake.set)
        self._tls = HostTLS(config)
        self._context: RunContext
        self._orphan_reaper: OrphanReaper
        self._group = asyncio.TaskGroup()
        self._runs: dict[str, Run] = {}
        self._run_tasks: set[asyncio.Task[None]] = set()
        self._requests: set[asyncio.Task[Any]] = set()
        self._stop = asyncio.Event()
        # Jobs cancelled between the moment that the store gives them out and the one that their run is there.
        self._claiming = False
        self._cancelled_before_start: set[str] = set()

    async def __aenter__(self) -> Self:
        identity = await self._store.get_identity()
        self._context = RunContext(
            config=self._config,
            tls=self._tls,
            store=self._store,
            notifier=self._notifier,
            find_host=self._registry.find_host,
            identity=identity,
            capabilities=HostCapabilities(identity, self._on_call_list),
            connections=ConnectionPool(),
            wall=self._wall,
        )
        self._report_config(self._config, frozenset())
        await self._group.__aenter__()
        self._orphan_reaper = OrphanReaper(self._group, self._runs.__contains__)
        taken_up = await self._recover()
        self._claimer = self._group.create_task(self._claim(taken_up))
        self._maintenance = [
            self._group.create_task(self._registry.refresh_regularly()),
            self._group.create_task(prune_regularly(self._store, self._wall, lambda: self._config.max_age_seconds)),
        ]
        self._wake.set()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._shut_down()
        if isinstance(error, Exception):
            await self._group.__aexit__(None, None, None)  # the doors' own error stays what it is
        else:
            await self._group.__aexit__(kind, error, traceback)

    # What follows is what the doors call.

    @property
    def config(self) -> Config:
        """The configuration now in force."""
        return self._config

    @property
    def active_calls(self) -> int:
        """How many calls are under way."""
        return len(self._runs)

    @_shielded
    async def submit(self, call: Call, client: str, received_at: float | None = None) -> str:
        """Accept a job: it is on stable storage when this returns.

        An unknown host is accepted; the job then ends as ``unknown_host``.

        Args:
            call: what to call; its payloads are `Raw`. Limits above the configured ones are lowered to these.
            client: who asks, for the log: an address.
            received_at: when the request was here, on the monotonic clock, for the job's phases; None: not known.

        Returns:
            The job's id.
        """
        job = self._new_job(call)
        self._wake.set()  # the claim is asked for in this turn of the loop, too, and goes into the same commit
        asked = time.monotonic()
        await self._store.add_job(job, self._wall())
        self._context.timings.record_stored(job.id, received_at, asked)
        log.info("job submitted", extra={**log_fields(job), "client": client})
        self._log_arguments(job)
        return job.id

    @_shielded
    async def submit_many(self, calls: Sequence[Call], client: str) -> list[str]:
        """Accept jobs, all or none, as `submit` does; return their ids in the same order."""
        if not calls:
            return []
        # In a thread, so that nobody waits while there are many.
        jobs = await asyncio.to_thread(lambda: list(map(self._new_job, calls)))
        await self._store.add_jobs(jobs, self._wall())
        self._wake.set()
        about = {"jobs": len(jobs), "first": jobs[0].id, "last": jobs[-1].id}
        log.info("jobs submitted", extra={**about, "client": client})
        if log.isEnabledFor(logging.DEBUG):
            for job in jobs:
                log.debug("job submitted among many", extra=log_fields(job))
                self._log_arguments(job)
        return [job.id for job in jobs]

    @_shielded
    async def cancel(self, job_id: str, client: str | None = None) -> bool:
        """Cancel a job that is queued or running. No start of its call follows this function's return.

        Args:
            job_id: the job.
            client: who asks, for the evidence: an address.

        Returns:
            False when the job has ended or is not known.
        """
        if not is_job_id(job_id):
            return False
        before = await self._store.cancel_job(job_id, self._wall(), self._cancelled_by(client))
        if before is not None:
            await self._stop_cancelled(job_id, before, client)
        return before is not None

    @_shielded
    async def cancel_queue(self, queue: Raw, client: str | None = None) -> int:
        """Cancel all jobs of a queue, as `cancel` does; return how many there were."""
        cancelled = await self._store.cancel_queue(queue, self._wall(), self._cancelled_by(client))
        await asyncio.gather(*(self._stop_cancelled(job_id, before, client) for job_id, before in cancelled))
        return len(cancelled)

    async def wait_stopped(self, job_id: str) -> JobDetails:
        """Return a job once nothing is pending any more of its stop; at once when it was not stopped.

        Raises:
            UnknownJob: there is no such job, or it was pruned meanwhile.
        """
        with self._notifier.subscribe(job_id) as subscription:
            while True:
                ended = subscription.ended
                job = await self.get_job(job_id)
                if job.end is not None and job.stop is not StopState.PENDING:
                    return await self._store.get_details(job_id)
                await ended.wait()

    @_shielded
    async def release_slot(self, job_id: str) -> bool:
        """Free the slot of a job that has ended, whatever its host says; False when there is nothing to free."""
        if not is_job_id(job_id):
            return False
        try:
            pending = (await self._store.get_job(job_id)).stop is StopState.PENDING
        except UnknownJob:
            return False
        if pending:  # nobody would settle it any more
            metadata = JobMetadata(stop_report=dumps({"released": self._wall()}))
            released = await self._store.finalize_stop(job_id, StopState.FAILED, metadata=metadata)
        else:
            released = await self._store.release_slot(job_id)
        if released:
            log.warning("slot of a job released by hand", extra={"job": job_id})
            self._notifier.publish_end(job_id)
            self._wake.set()
        return released

    async def details(self, job_id: str) -> dict[str, Any]:
        """Return all that is known of a job, and a sentence why it is as it is. Payloads are `Raw`.

        Raises:
            UnknownJob: there is no such job.

        Spec: docs/protocol.md, Details.
        """
        if not is_job_id(job_id):
            raise UnknownJob(job_id)
        details = await self._store.get_details(job_id)
        context = ExplainContext(
            run=self._runs.get(job_id),
            host=self._registry.find_host(details.job.host),
            registry_loaded=self._registry.is_ready,
            max_calls_per_host=self._config.max_calls_per_host,
            active_calls=len(self._runs),
            max_calls=self._config.max_calls,
            store_failing=bool(self._context.pending_writes.count),
            timings=self._context.timings.get_phases(job_id),
            now=self._wall(),
        )
        return describe(details, context)

    async def get_job(self, job_id: str) -> Job:
        """Return a job. Raises `UnknownJob`."""
        if not is_job_id(job_id):
            raise UnknownJob(job_id)
        return await self._store.get_job(job_id)

    async def result(self, job_id: str, wait: bool) -> End | None:
        """Return how a job ended; with `wait`, once it has.

        Returns:
            The end as it is stored; None, only without `wait`: the job has not ended.

        Raises:
            UnknownJob: there is no such job, or it was pruned meanwhile.
        """
        with self._notifier.subscribe(job_id) as subscription:
            run = self._runs.get(job_id)
            if wait and run is not None and not run.has_ended:
                await (
                    subscription.ended.wait()
                )  # the store would say the same, and news comes before the run knows better
            while subscription.end is None:
                ended = subscription.ended
                job = await self.get_job(job_id)
                if job.end is not None or not wait:
                    return job.end
                await ended.wait()
            return subscription.end

    def record_delivery(self, job_id: str, received_at: float) -> None:
        """Somebody was told how a job ended whose request came at this time on the monotonic clock."""
        self._context.timings.record_delivery(job_id, received_at)

    async def follow(
        self, job_id: str, since: int | None = None, recent: int | None = None
    ) -> AsyncGenerator[RecordBatch | End, None]:
        """Yield a job's records, those to come too, in batches of bounded size, then its end.

        Close the generator (`contextlib.aclosing`) when the reader goes before the end.

        Args:
            job_id: the job.
            since: number of the first record wanted; it may be one that has not come yet.
            recent: how many of the newest records to begin with. Neither given: 0. Not both.

        Raises:
            UnknownJob: there is no such job, or it was pruned meanwhile.
        """
        with self._notifier.subscribe(job_id) as subscription:
            ended, job = subscription.ended, await self.get_job(job_id)
            at = _first_record(job, since, 0 if since is None and recent is None else recent)
            while True:
                changed = subscription.changed
                if ended.is_set():
                    ended, job = subscription.ended, await self.get_job(job_id)
                if job.end is None or at < job.records:
                    batch = subscription.newest_from(at) or await self._read_batch(job_id, at)
                    if batch is not None:
                        at = batch.next
                        waiting = [batch]
                        del batch
                        yield waiting.pop()  # not kept here as well while the reader is slow
                        continue
                if job.end is not None:
                    _check_complete(job, at)
                    yield job.end
                    return
                await changed.wait()

    async def read(
        self, job_id: str, since: int | None = None, recent: int | None = None
    ) -> AsyncGenerator[RecordBatch | End | Continue, None]:
        """Yield a job's records collected so far, in batches of bounded size, then its end or `Continue`.

        Arguments and errors as in `follow`, but with neither number given it begins with record 0.
        """
        job = await self.get_job(job_id)
        at = _first_record(job, since, recent)
        while at < job.records:
            batch = await self._read_batch(job_id, at, job.records)
            if batch is None:
                break
            at = batch.next
            waiting = [batch]
            del batch
            yield waiting.pop()
        _check_complete(job, at)
        yield Continue() if job.end is None else job.end

    async def _read_batch(self, job_id: str, first: int, most: int | None = None) -> RecordBatch | None:
        """Stored records from this one on, and before `most`; None: there are none."""
        records = await self._store.read_records(job_id, first, _BATCH_BYTES)
        if most is not None and first + len(records) > most:
            records = Records(records.values[: most - first], records.timestamps[: most - first])
        return RecordBatch(first, records) if records else None

    async def list_jobs(
        self, ended: bool = False, host: str | None = None, queue: Raw | None = None, newest: int | None = None
    ) -> AsyncGenerator[Job, None]:
        """Yield jobs in the order of their submission, read from the store as they are taken.

        Args:
            ended: whether those that have ended are wanted too.
            host: only the jobs for this host.
            queue: only the jobs of this queue; not together with `host`.
            newest: so many at most, and in the other order: the one that was submitted last comes first.
        """
        after = None
        left = sys.maxsize if newest is None else newest
        wanted = partial(self._store.list_jobs, ended=ended, host=host, queue=queue, newest_first=newest is not None)
        while left > 0 and (page := await wanted(after=after, limit=min(left, _LISTED_AT_ONCE))):
            left -= len(page)
            for after, job in page:  # noqa: B007 - the last one's place
                yield job

    async def list_queues(self) -> list[QueueStatus]:
        """Return the queues that have jobs which have not ended, oldest first."""
        return await self._store.list_queues()

    def hosts(self) -> list[Host]:
        """Return the hosts of the registry, by name. They hold credentials: these are for no list and no log."""
        return self._registry.list_hosts()

    async def refresh_hosts(self) -> int:
        """Run `host_db_script` now, or wait for the run that is under way; return how many hosts there are.

        Raises:
            RefreshFailed: the script failed, or there is none; the registry is what it was.
        """
        return await self._registry.refresh()

    async def prune(self, min_age: float) -> int:
        """Delete the jobs that ended more than `age` seconds ago, with their records; return how many."""
        return await prune(self._store, self._wall() - min_age)

    async def reload(self, config: Config) -> None:
        """Take a new configuration: for calls that start from now on, for the registry and for pruning.

        The doors take their part (addresses, limits of requests) themselves, the program the log's settings.

        Raises:
            ConfigError: a certificate file or the hosts file can't be used; then nothing has changed.
        """
        tls = HostTLS(config)
        self._registry.update_config(config)
        reported, self._config = frozenset(self._config.ignored), config
        self._tls = tls
        self._context = replace(self._context, config=config, tls=tls)
        self._report_config(config, reported)
        self._wake.set()

    # From here on: how it is done.

    def _new_job(self, call: Call) -> NewJob:
        config = self._config
        return NewJob(
            id=new_job_id(self._wall()),
            host=call.host,
            procedure=call.procedure,
            arguments=call.arguments,
            timeout=min(call.timeout or config.default_timeout, config.default_timeout),
            max_exec_time=min(call.max_exec_time or config.max_exec_time, config.max_exec_time),
            queue=call.queue.name if call.queue else None,
            concurrency=call.queue.concurrency if call.queue else 1,
            info=Raw(b"null") if call.info is None else call.info,
        )

    def _log_arguments(self, job: NewJob) -> None:
        if log.isEnabledFor(logging.DEBUG):
            log.debug("job's arguments", extra={"job": job.id, "arguments": job.arguments.decode()})

    def _cancelled_by(self, client: str | None) -> Raw:
        return dumps({"why": "cancelled", "by": client, "at": self._wall()})

    async def _stop_cancelled(self, job_id: str, before: State, client: str | None) -> None:
        """Stop the call of a job whose end `Cancelled` is committed."""
        log.info("job cancelled", extra={"job": job_id, "was": before.value, "client": client})
        self._notifier.publish_end(job_id, Cancelled())
        if run := self._runs.get(job_id):
            await run.cancel_call(client)
        elif before is State.RUNNING and self._claiming:
            self._cancelled_before_start.add(job_id)
        self._wake.set()

    async def _recover(self) -> bool:
        """Go on with the jobs that hold a slot from the last dispatcher. False: the store can't, try again."""
        self._claiming = True
        try:
            held = await self._store.list_slot_holders()
            for job in held:
                self._start(job, resumed=True, cancelled=job.id in self._cancelled_before_start)
        except StorageError as error:
            log.error("jobs of the last dispatcher can't be taken up yet", extra={"error": str(error)})
            return False
        finally:
            self._claiming = False
            self._cancelled_before_start.clear()
        if held:
            log.info("jobs of the last dispatcher are taken up", extra={"jobs": len(held)})
        return True

    def _on_call_list(self, host: Host, calls: Sequence[str]) -> None:
        """A host says which calls it holds for us."""
        self._orphan_reaper.reap_calls(host, calls, self._context)

    async def _claim(self, taken_up: bool) -> None:
        """Start queued jobs whenever something may have made room for one, until the dispatcher stops."""
        while not self._stop.is_set():
            await self._wake.wait()
            self._wake.clear()
            taken_up = taken_up or await self._recover()
            if not taken_up or not await self._claim_batch():
                await self._pause(_STORE_PAUSE)
                self._wake.set()

    async def _claim_batch(self) -> bool:
        """Claim and start what there is room for. False: the store has no room for more, try again later."""
        if self._context.pending_writes.count:
            return False  # ends of calls wait to be stored: no new ones until they are
        limit = min(_CLAIMED_AT_ONCE, self._config.max_calls - len(self._runs))
        if limit <= 0 or not self._registry.is_ready or self._stop.is_set():
            return True  # the end of a call wakes, or the registry
        self._claiming = True
        try:
            jobs = await self._store.claim_jobs(self._wall(), limit, self._config.max_calls_per_host)
            for job in jobs:
                # A job that was cancelled meanwhile has a run, too: it gives the slot back.
                self._start(job, cancelled=job.id in self._cancelled_before_start)
        except StorageError as error:
            log.error("jobs can't be claimed, trying again", extra={"error": str(error)})
            return False
        finally:
            self._claiming = False
            self._cancelled_before_start.clear()
        if len(jobs) == limit:
            self._wake.set()
        return True

    def _start(self, job: Job, resumed: bool = False, cancelled: bool = False) -> None:
        run = self._runs[job.id] = Run(job, self._context, resumed)
        if cancelled:
            run.cancel_before_start()
        task = self._group.create_task(self._run_call(run))
        self._run_tasks.add(task)
        task.add_done_callback(self._run_tasks.discard)

    async def _run_call(self, run: Run) -> None:
        try:
            await run.run()
        except Exception:
            # One job's fault must not end the others; this job ends at the next start.
            log.exception("run failed by a fault of the dispatcher", extra=log_fields(run.job))
        finally:
            del self._runs[run.job.id]
            self._wake.set()

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        except TimeoutError:
            pass

    async def _shut_down(self) -> None:
        log.info("dispatcher stops", extra={"calls": len(self._runs)})
        self._stop.set()
        self._wake.set()
        await asyncio.wait([self._claimer])
        for run in list(self._runs.values()):
            run.detach()
        if last := self._run_tasks | self._requests:
            _, left = await asyncio.wait(last, timeout=_LAST_ENDS)
            if left:
                log.error("not all could be stored; the next start takes it up", extra={"left": len(left)})
            for task in left:
                task.cancel()
        for task in self._maintenance:
            task.cancel()
        self._orphan_reaper.stop()
        self._context.connections.close()
        await self._context.capabilities.close()

    def _report_config(self, config: Config, reported: frozenset[str]) -> None:
        for key in config.ignored:
            if key not in reported:
                log.warning("key of an older configuration ignored", extra={"file": str(config.file), "key": key})
        if config.hosts_file is None and config.host_db_script is None:
            log.warning("no host is known: set hosts_file or host_db_script")
        for warning in self._tls.warnings:
            log.warning(warning)


def _first_record(job: Job, since: int | None, recent: int | None) -> int:
    if recent is not None:
        return max(0, job.records - recent)
    return since or 0


def _check_complete(job: Job, at: int) -> None:
    if at < job.records:
        raise UnknownJob(job.id)  # pruned while it was read
