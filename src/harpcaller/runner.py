"""One job -> one call on a host: connect, send the request once, keep the records, store the end.

Theory of operation. A `Run` goes through `Phase`, forward only. Its one deadline is `max_exec_time`; whoever wants
the call to stop (`cancel`, `stop`) says what the end is and moves that deadline to now, so that there is one way out,
whatever the run waits for. The request is written without waiting in between: just before, the run looks whether
it has been told to stop. So a request either never goes out or went out before the word to stop, and then `cancel`
waits for the acknowledgement: a call that is acknowledged has started, and can't start after the cancel's reply.

Records are stored while more are read: what came during one commit goes into the next. What waits for the store is
bounded; then reading pauses, and the host with it. While the store fails, records and ends wait and are tried again.

A run sees the store's interface and never a backend.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Any, TypeVar

from harp.protocol.daemon import Acknowledgement, Exchange, Message, Record, Request, encode_request
from harp.protocol.ends import End, Failed, Raised
from harp.protocol.fields import ProtocolError
from harp.protocol.jsontext import Raw, open_sliced
from harp.protocol.lines import LineBuffer, LineTooLong
from harpcaller.config import Config
from harpcaller.hostlink import FAULTS, address_text, connect, errno_data, failed, named
from harpcaller.hosts import Host
from harpcaller.hosttls import HostTLS
from harpcaller.jobs import Job, NewJob, state_of
from harpcaller.news import News
from harpcaller.store import StorageError, Store

__all__ = ["Run", "StoreTrouble", "Surroundings", "fields"]

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds that a cancel waits for the acknowledgement of a request that is out.
_CANCEL_WAIT = 2.0

#: Seconds until a write is tried again that the store failed to do.
_STORE_PAUSE = 1.0

#: Bytes of records that may wait for the store before reading pauses.
_WAITING_BYTES = 1024 * 1024

#: What a waiting record costs beside its bytes.
_RECORD_OVERHEAD = 64

_READ_BYTES = 64 * 1024

#: Characters of an end's message that are logged.
_LOGGED_MESSAGE = 500


class StoreTrouble:
    """How many runs have something that the store does not take at the moment."""

    def __init__(self) -> None:
        self.waiting = 0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a run needs.

    Attributes:
        config: timeouts and limits.
        tls: judges the certificates of hosts.
        store: takes records and ends.
        news: tells those who wait for them.
        find_host: finds a host of the registry by its name; None: there is none.
        trouble: counts what the store does not take.
    """

    config: Config
    tls: HostTLS
    store: Store
    news: News
    find_host: Callable[[str], Host | None]
    trouble: StoreTrouble = field(default_factory=StoreTrouble)


class Phase(IntEnum):
    """How far a run is."""

    BEFORE = 0  # the request has not been sent
    SENT = 1  # it is out, and nothing has come back
    ANSWERED = 2  # the host has answered, or is gone
    OVER = 3  # the connection is closed


def fields(job: Job | NewJob) -> dict[str, Any]:
    """The fields by which the log names a job."""
    queue = job.queue.decode() if job.queue is not None else None
    return {"job": job.id, "host": job.host, "procedure": job.procedure, "queue": queue}


def _why(end: End | None) -> dict[str, str]:
    """What the log says of an end that is no result."""
    if isinstance(end, (Failed, Raised)):
        return {"error": end.type, "reason": end.message[:_LOGGED_MESSAGE]}
    return {}


class Run:
    """The call of one job.

    Args:
        job: the job; it is running in the store.
        surroundings: what the run needs.
    """

    def __init__(self, job: Job, surroundings: Surroundings) -> None:
        self.job = job
        self._around = surroundings
        self._records = _Records(job, surroundings)
        self._phase = Phase.BEFORE
        self._moved = asyncio.Event()
        self._limit: asyncio.Timeout | None = None
        self._told_to_stop = False
        self._end: End | None = None
        # Our end of the connection, which harpd logs as the call's peer: so the two logs can be held together.
        self._link: dict[str, str] = {}

    async def run(self) -> None:
        """Carry out the call and store its end. Returns when all is stored, or the job has been cancelled."""
        begin = time.monotonic()
        log.info("call started", extra=fields(self.job))
        try:
            end = await self._guarded_call()
        finally:
            self._reach(Phase.OVER)
        try:
            await self._records.stored()
            how = state_of(end).value if end is not None and await self._finish(end) else "cancelled"
        finally:
            self._records.give_up()
        seconds = round(time.monotonic() - begin, 3)
        log.info("call ended", extra={**fields(self.job), "end": how, **_why(end), "seconds": seconds, **self._link})

    async def _finish(self, end: End) -> bool:
        """Store the end; False when the job has one already: it was cancelled."""
        around, job_id = self._around, self.job.id
        stored = await _persist(around.trouble, job_id, lambda: around.store.finish_job(job_id, end, time.time()))
        around.news.end(job_id)
        return stored

    async def cancel(self) -> None:
        """Stop the call of a job that is cancelled in the store; no start of it follows this function's return."""
        if self._phase is Phase.SENT:
            try:
                async with asyncio.timeout(_CANCEL_WAIT):
                    await self._moved.wait()
            except TimeoutError:
                log.warning("cancelled before the host acknowledged the call", extra=fields(self.job))
        self._interrupt(None)

    def stop(self, end: End) -> None:
        """Stop the call; `end` is how its job ends, unless it has an end already."""
        self._interrupt(end)

    def _interrupt(self, end: End | None) -> None:
        if self._phase is Phase.OVER or self._told_to_stop:
            return
        self._told_to_stop = True
        self._end = end
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(asyncio.get_running_loop().time())

    def _reach(self, phase: Phase) -> None:
        self._phase = phase
        if phase >= Phase.ANSWERED:
            self._moved.set()

    async def _guarded_call(self) -> End | None:
        """The end of the call, whatever happens in it. None: the job is cancelled."""
        host = self._around.find_host(self.job.host)
        if host is None:
            return Failed("unknown_host", f"the hosts registry has no host {self.job.host}")
        try:
            async with asyncio.timeout(self.job.max_exec_time) as self._limit:
                if not self._told_to_stop:
                    return await self._call(host)
        except TimeoutError:
            if not self._told_to_stop:
                return Failed("timeout", f"maximum execution time: the job took more than {self.job.max_exec_time:g} s")
        except Exception:
            log.exception("call failed by a fault of the dispatcher", extra=fields(self.job))
            return Failed("internal_error", "the dispatcher failed; its log says more")
        finally:
            self._limit = None
        return self._end

    async def _call(self, host: Host) -> End | None:
        try:
            reader, writer = await connect(host, self._around.tls, self._around.config.connect_timeout)
        except FAULTS as error:
            return failed(error, host, "connecting")
        try:
            self._link = {"connection": address_text(writer.get_extra_info("sockname"))}
            line = encode_request(Request(self.job.procedure, self.job.arguments, host.user, host.password))
            # Nothing may be awaited between this look and the writing.
            if self._told_to_stop:
                return self._end
            writer.write(line)
            self._phase = Phase.SENT
            return await self._read_end(reader, host)
        finally:
            writer.transport.abort()

    async def _read_end(self, reader: asyncio.StreamReader, host: Host) -> End | None:
        lines = LineBuffer(self._around.config.record_line)
        exchange = Exchange(open_sliced)
        silence = _Silence(self.job.timeout, self._around.config.acknowledgement_timeout)
        try:
            while data := await silence.read(reader):
                for line in lines.feed(data):
                    silence.broken()
                    if (end := self._take(exchange.message(line))) is not None:
                        return end
                if not await self._records.keep_up():
                    return Failed("internal_error", "the dispatcher could not keep the job's records")
        except (LineTooLong, ProtocolError) as error:
            return Failed("protocol_error", f"{named(host)}: what it sent is not of the protocol: {error}")
        except _Silent as silent:
            return silent.end(host)
        except OSError as error:
            return failed(error, host, exchange.phase.value)
        cut = "in the middle of a line" if lines.pending else f"while {exchange.phase.value}"
        return Failed("network_error", f"{named(host)}: it closed the connection {cut}")

    def _take(self, message: Message) -> End | None:
        if self._phase is Phase.SENT:
            self._reach(Phase.ANSWERED)
        if isinstance(message, Record):
            self._records.add(message.data)
        elif not isinstance(message, Acknowledgement):
            return message
        return None


class _Silent(Exception):
    """The host has said nothing for too long. `limit`: for how many seconds; `acknowledged`: whether it ever did."""

    def __init__(self, limit: float, acknowledging: bool) -> None:
        super().__init__()
        self._limit = limit
        self._acknowledging = acknowledging

    def end(self, host: Host) -> Failed:
        """What it means for the job."""
        if self._acknowledging:
            message = f"{named(host)}: it did not acknowledge the call within {self._limit:g} s"
            return Failed("network_error", message, errno_data("ETIMEDOUT"))
        return Failed("timeout", f"reading the result: {named(host)} sent nothing for {self._limit:g} s")


class _Silence:
    """The time since the last message. Only reading counts: while the store is waited for, the host may be silent.

    Args:
        timeout: the job's, in seconds.
        acknowledgement_timeout: for the first message, when it is less.
    """

    def __init__(self, timeout: float, acknowledgement_timeout: float) -> None:
        self._timeout = timeout
        self._acknowledging = acknowledgement_timeout < timeout
        self._limit = min(timeout, acknowledgement_timeout)
        self._spent = 0.0

    def broken(self) -> None:
        """A message has come."""
        self._acknowledging = False
        self._limit = self._timeout
        self._spent = 0.0

    async def read(self, reader: asyncio.StreamReader) -> bytes:
        """What comes next; empty at the end. Raises `_Silent`, OSError."""
        begin = time.monotonic()
        try:
            async with asyncio.timeout(self._limit - self._spent) as limit:
                return await reader.read(_READ_BYTES)
        except TimeoutError:
            if limit.expired():
                raise _Silent(self._limit, self._acknowledging) from None
            raise  # the system's: the connection is dead
        finally:
            self._spent += time.monotonic() - begin


class _Records:
    """A job's records on their way into the store, in batches: what came during a commit goes into the next.

    Args:
        job: the job; its records so far are in the store.
        surroundings: as of the run.
    """

    def __init__(self, job: Job, surroundings: Surroundings) -> None:
        self._job = job
        self._around = surroundings
        self._count = job.records
        self._waiting: list[Raw] = []
        self._bytes = 0
        self._task: asyncio.Task[None] | None = None
        self._refused = False

    def add(self, record: Raw) -> None:
        """Take the next record."""
        self._waiting.append(record)
        self._bytes += len(record) + _RECORD_OVERHEAD
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._store())

    async def keep_up(self) -> bool:
        """Wait while too much waits for the store. False: the store does not take this job's records any more."""
        if self._bytes > _WAITING_BYTES:
            await self.stored()
        return not self._refused

    async def stored(self) -> None:
        """Wait until nothing waits."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def give_up(self) -> None:
        """Drop what waits still."""
        if self._task is not None:
            self._task.cancel()

    async def _store(self) -> None:
        around, job_id = self._around, self._job.id
        try:
            while self._waiting and not self._refused:
                batch, self._waiting, self._bytes = self._waiting, [], 0
                append = partial(around.store.append_records, job_id, self._count, batch)
                if await _persist(around.trouble, job_id, append):
                    around.news.records(job_id, self._count, batch)
                    self._count += len(batch)
                else:
                    self._refused = True
        except Exception:
            log.exception("records lost by a fault of the dispatcher", extra=fields(self._job))
            self._refused = True


async def _persist(trouble: StoreTrouble, job_id: str, write: Callable[[], Awaitable[T]]) -> T:
    """Write, again and again until the store can."""
    failing = False
    try:
        while True:
            try:
                return await write()
            except StorageError as error:
                if not failing:
                    log.error("what a call brought can't be stored, trying again", extra=_fault(job_id, error))
                    trouble.waiting += 1
                    failing = True
            await asyncio.sleep(_STORE_PAUSE)
    finally:
        trouble.waiting -= failing


def _fault(job_id: str, error: StorageError) -> dict[str, str]:
    return {"job": job_id, "error": str(error)}
