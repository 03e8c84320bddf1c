"""The application: submit, cancel, result, follow, list; it starts the calls and owns their tasks.

The doors (client protocol, control socket) call `Dispatcher` and nothing behind it. Payloads are `Raw` in both
directions. The store is the truth; what is kept in memory beside it is which calls are under way here.

The order of a shutdown, held by leaving the context:

1. the doors have stopped accepting (they are inside the context);
2. nothing more is claimed: what is queued stays queued;
3. the calls under way are cancelled by closing their connections; their jobs end as ``missing_result``;
4. the ends are stored, for a bounded time: what the store does not take is settled at the next start;
5. upkeep stops, a running `host_db_script` with it;
6. whoever opened the store closes it.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar

from harp.protocol.dispatcher import Call, Continue, Packet
from harp.protocol.ends import End, Failed
from harp.protocol.jsontext import Raw
from harpcaller.config import Config
from harpcaller.hosts import Host
from harpcaller.hosttls import HostTLS
from harpcaller.jobs import MISSING_RESULT, Job, NewJob, State
from harpcaller.news import News
from harpcaller.registry import HostsRegistry
from harpcaller.runner import Run, Surroundings, fields
from harpcaller.store import QueueStatus, StorageError, Store, UnknownJob
from harpcaller.upkeep import prune, prune_regularly

__all__ = ["Dispatcher"]

log = logging.getLogger(__name__)

#: The form of a job id; anything else is the id of no job.
_JOB_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)

#: About how many bytes of records are read from the store at a time, for one follower.
_BATCH_BYTES = 64 * 1024

#: How many jobs are claimed at a time, and listed at a time.
_CLAIMED_AT_ONCE = 100
_LISTED_AT_ONCE = 200

#: Seconds until the store is asked again after it failed.
_STORE_PAUSE = 1.0

#: Seconds that a shutdown waits for the ends of the calls under way to be stored.
_LAST_ENDS = 10.0

T = TypeVar("T")

_STOPPED = Failed("missing_result", "the dispatcher was stopped while the job was running; its end is not known")


class Dispatcher:
    """The dispatcher: an asynchronous context manager that runs while its context lasts.

    Every method may raise `StorageError`; then it did nothing. Methods that name a job take any text: what is
    not a UUID in lower-case text form names no job.

    Args:
        config: the configuration.
        store: where jobs are kept, open; it stays open when the context is left.

    Raises:
        ConfigError: a certificate file or the hosts file can't be used.
    """

    def __init__(self, config: Config, store: Store) -> None:
        self._config = config
        self._store = store
        self._news = News()
        self._wake = asyncio.Event()
        self._registry = HostsRegistry(config, self._wake.set)
        self._surroundings = Surroundings(config, HostTLS(config), store, self._news, self._registry.find)
        self._group = asyncio.TaskGroup()
        self._runs: dict[str, Run] = {}
        self._run_tasks: set[asyncio.Task[None]] = set()
        self._requests: set[asyncio.Task[Any]] = set()
        self._stop = asyncio.Event()
        # Jobs cancelled between their claim's commit and the start of their call.
        self._claiming = False
        self._dropped: set[str] = set()

    async def __aenter__(self) -> Self:
        self._report_config(self._config, frozenset())
        settled = await self._settle()
        await self._group.__aenter__()
        self._claimer = self._group.create_task(self._claim(settled))
        self._upkeep = [
            self._group.create_task(self._registry.refresh_regularly()),
            self._group.create_task(prune_regularly(self._store, lambda: self._config.max_age_seconds)),
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
    def calls(self) -> int:
        """How many calls are under way."""
        return len(self._runs)

    async def submit(self, call: Call, client: str) -> str:
        """Accept a job: it is on stable storage when this returns.

        An unknown host is accepted; the job then ends as ``unknown_host``.

        Args:
            call: what to call; its payloads are `Raw`. Limits above the configured ones are lowered to these.
            client: who asks, for the log: an address.

        Returns:
            The job's id.
        """
        return await self._whole(self._submit(call, client))

    async def cancel(self, job_id: str) -> bool:
        """Cancel a job that is queued or running. No start of its call follows this function's return.

        Returns:
            False when the job has ended or is not known.
        """
        return _is_job_id(job_id) and await self._whole(self._cancel(job_id))

    async def cancel_queue(self, queue: Raw) -> int:
        """Cancel all jobs of a queue, as `cancel` does; return how many there were."""
        return await self._whole(self._cancel_queue(queue))

    async def job(self, job_id: str) -> Job:
        """Return a job. Raises `UnknownJob`."""
        if not _is_job_id(job_id):
            raise UnknownJob(job_id)
        return await self._store.get_job(job_id)

    async def result(self, job_id: str, wait: bool) -> End | None:
        """Return how a job ended; with `wait`, once it has.

        Returns:
            The end as it is stored; None, only without `wait`: the job has not ended.

        Raises:
            UnknownJob: there is no such job, or it was pruned meanwhile.
        """
        with self._news.watching(job_id) as topic:
            while True:
                ended = topic.ended
                job = await self.job(job_id)
                if job.end is not None or not wait:
                    return job.end
                await ended.wait()

    async def follow(
        self, job_id: str, since: int | None = None, recent: int | None = None
    ) -> AsyncGenerator[list[Packet] | End, None]:
        """Yield a job's records, those to come too, in batches of bounded size, then its end.

        Close the generator (`contextlib.aclosing`) when the reader goes before the end.

        Args:
            job_id: the job.
            since: number of the first record wanted; it may be one that has not come yet.
            recent: how many of the newest records to begin with. Neither given: 0. Not both.

        Raises:
            UnknownJob: there is no such job, or it was pruned meanwhile.
        """
        with self._news.watching(job_id) as topic:
            ended, job = topic.ended, await self.job(job_id)
            at = _first(job, since, 0 if since is None and recent is None else recent)
            while True:
                changed = topic.changed
                if ended.is_set():
                    ended, job = topic.ended, await self.job(job_id)
                if job.end is None or at < job.records:
                    records = topic.newest(at) or await self._store.read_records(job_id, at, _BATCH_BYTES)
                    if records:
                        batch = [_packets(at, records)]
                        at += len(records)
                        records = ()
                        yield batch.pop()  # not kept here as well while the reader is slow
                        continue
                if job.end is not None:
                    _check_complete(job, at)
                    yield job.end
                    return
                await changed.wait()

    async def read(
        self, job_id: str, since: int | None = None, recent: int | None = None
    ) -> AsyncGenerator[list[Packet] | End | Continue, None]:
        """Yield a job's records collected so far, in batches of bounded size, then its end or `Continue`.

        Arguments and errors as in `follow`, but with neither number given it begins with record 0.
        """
        job = await self.job(job_id)
        at = _first(job, since, recent)
        while at < job.records:
            records = (await self._store.read_records(job_id, at, _BATCH_BYTES))[: job.records - at]
            if not records:
                break
            batch = [_packets(at, records)]
            at += len(records)
            records = []
            yield batch.pop()
        _check_complete(job, at)
        yield Continue() if job.end is None else job.end

    async def list_jobs(self, ended: bool = False, queue: Raw | None = None) -> AsyncGenerator[Job, None]:
        """Yield jobs in the order of their submission, read from the store as they are taken.

        Args:
            ended: whether those that have ended are wanted too.
            queue: only the jobs of this queue.
        """
        after = 0
        while page := await self._store.list_jobs(ended=ended, queue=queue, after=after, limit=_LISTED_AT_ONCE):
            for place, job in page:
                yield job
                after = place

    async def list_queues(self) -> list[QueueStatus]:
        """Return the queues that have jobs which have not ended, oldest first."""
        return await self._store.list_queues()

    def hosts(self) -> list[Host]:
        """Return the hosts of the registry, by name. They hold credentials: these are for no list and no log."""
        return self._registry.hosts()

    async def refresh_hosts(self) -> int:
        """Run `host_db_script` now, or wait for the run that is under way; return how many hosts there are.

        Raises:
            RefreshFailed: the script failed, or there is none; the registry is what it was.
        """
        return await self._registry.refresh()

    async def prune(self, age: float) -> int:
        """Delete the jobs that ended more than `age` seconds ago, with their records; return how many."""
        return await prune(self._store, time.time() - age)

    async def reload(self, config: Config) -> None:
        """Take a new configuration: for calls that start from now on, for the registry and for pruning.

        The doors take their part (addresses, limits of requests) themselves, the program the log's settings.

        Raises:
            ConfigError: a certificate file or the hosts file can't be used; then nothing has changed.
        """
        tls = HostTLS(config)
        self._registry.reconfigure(config)
        reported, self._config = frozenset(self._config.ignored), config
        self._surroundings = replace(self._surroundings, config=config, tls=tls)
        self._report_config(config, reported)
        self._wake.set()

    # From here on: how it is done.

    async def _whole(self, request: Coroutine[Any, Any, T]) -> T:
        """Carry out a request to its end, also when the one who asked goes away in the middle."""
        task = asyncio.create_task(request)
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)
        return await asyncio.shield(task)

    async def _submit(self, call: Call, client: str) -> str:
        config = self._config
        job = NewJob(
            id=str(uuid.uuid4()),
            host=call.host,
            procedure=call.procedure,
            arguments=call.arguments,
            timeout=min(call.timeout or config.default_timeout, config.default_timeout),
            max_exec_time=min(call.max_exec_time or config.max_exec_time, config.max_exec_time),
            queue=call.queue.name if call.queue else None,
            concurrency=call.queue.concurrency if call.queue else 1,
            info=Raw(b"null") if call.info is None else call.info,
        )
        await self._store.add_job(job, time.time())
        log.info("job submitted", extra={**fields(job), "client": client})
        if log.isEnabledFor(logging.DEBUG):
            log.debug("job's arguments", extra={"job": job.id, "arguments": job.arguments.decode()})
        self._wake.set()
        return job.id

    async def _cancel(self, job_id: str) -> bool:
        before = await self._store.cancel_job(job_id, time.time())
        if before is not None:
            await self._stop_cancelled(job_id, before)
        return before is not None

    async def _cancel_queue(self, queue: Raw) -> int:
        cancelled = await self._store.cancel_queue(queue, time.time())
        await asyncio.gather(*(self._stop_cancelled(job_id, before) for job_id, before in cancelled))
        return len(cancelled)

    async def _stop_cancelled(self, job_id: str, before: State) -> None:
        """Stop the call of a job whose end `Cancelled` is committed."""
        log.info("job cancelled", extra={"job": job_id, "was": before.value})
        self._news.end(job_id)
        if run := self._runs.get(job_id):
            await run.cancel()
        elif before is State.RUNNING and self._claiming:
            self._dropped.add(job_id)
        self._wake.set()

    async def _settle(self) -> bool:
        """End the jobs that ran when the last dispatcher died. False: the store can't, try again."""
        try:
            interrupted = await self._store.settle_interrupted(MISSING_RESULT, time.time())
        except StorageError as error:
            log.error("interrupted jobs can't be settled yet", extra={"error": str(error)})
            return False
        if interrupted:
            log.warning("jobs were interrupted by the end of the last dispatcher", extra={"jobs": interrupted})
            self._news.ends()
        return True

    async def _claim(self, settled: bool) -> None:
        """Start queued jobs whenever something may have made room for one, until the dispatcher stops."""
        while not self._stop.is_set():
            await self._wake.wait()
            self._wake.clear()
            settled = settled or await self._settle()
            if not settled or not await self._claim_batch():
                await self._pause(_STORE_PAUSE)
                self._wake.set()

    async def _claim_batch(self) -> bool:
        """Claim and start what there is room for. False: the store has no room for more, try again later."""
        if self._surroundings.trouble.waiting:
            return False  # ends of calls wait to be stored: no new ones until they are
        limit = min(_CLAIMED_AT_ONCE, self._config.calls - len(self._runs))
        if limit <= 0 or not self._registry.usable or self._stop.is_set():
            return True  # the end of a call wakes, or the registry
        self._claiming = True
        try:
            jobs = await self._store.claim_jobs(time.time(), limit, self._config.host_concurrency)
            for job in jobs:
                if job.id not in self._dropped:
                    self._start(job)
        except StorageError as error:
            log.error("jobs can't be claimed, trying again", extra={"error": str(error)})
            return False
        finally:
            self._claiming = False
            self._dropped.clear()
        if len(jobs) == limit:
            self._wake.set()
        return True

    def _start(self, job: Job) -> None:
        run = self._runs[job.id] = Run(job, self._surroundings)
        task = self._group.create_task(self._carry_out(run))
        self._run_tasks.add(task)
        task.add_done_callback(self._run_tasks.discard)

    async def _carry_out(self, run: Run) -> None:
        try:
            await run.run()
        except Exception:
            # One job's fault must not end the others; this job ends at the next start.
            log.exception("run failed by a fault of the dispatcher", extra=fields(run.job))
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
            run.stop(_STOPPED)
        if last := self._run_tasks | self._requests:
            _, left = await asyncio.wait(last, timeout=_LAST_ENDS)
            if left:
                log.error("the store did not take all ends", extra={"left": len(left)})
            for task in left:
                task.cancel()
        for task in self._upkeep:
            task.cancel()

    def _report_config(self, config: Config, reported: frozenset[str]) -> None:
        for key in config.ignored:
            if key not in reported:
                log.warning("key of an older configuration ignored", extra={"file": str(config.file), "key": key})
        if config.hosts_file is None and config.host_db_script is None:
            log.warning("no host is known: set hosts_file or host_db_script")
        for warning in self._surroundings.tls.warnings:
            log.warning(warning)


def _is_job_id(text: str) -> bool:
    return _JOB_ID.fullmatch(text) is not None


def _first(job: Job, since: int | None, recent: int | None) -> int:
    if recent is not None:
        return max(0, job.records - recent)
    return since or 0


def _packets(first: int, records: Sequence[Raw]) -> list[Packet]:
    return [Packet(number, record) for number, record in enumerate(records, first)]


def _check_complete(job: Job, at: int) -> None:
    if at < job.records:
        raise UnknownJob(job.id)  # pruned while it was read
