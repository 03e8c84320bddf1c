"""Calls that hosts hold for us and nobody here wants: jobs that ended, were given up, or are not known any more.

Each is stopped if it still runs, and forgotten by its host. What it has to say about its end is kept as evidence of its
job, if that is a job of this host; the end that was stored first stands.

A host may list what it likes and answer what it likes: it takes up the time of its own few workers, and no more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from harp.protocol.ends import End, Failed
from harp.protocol.fields import ProtocolError
from harp.protocol.harpd import Ack, Acknowledgement, ExitInfo, Record, Release, StopCall, StopReport
from harp.protocol.json_text import Raw
from harp.protocol.lines import LineTooLong
from harpcaller.hosts.connecting import CONNECT_ERRORS
from harpcaller.hosts.connection import PAST_END, HarpdConnection, open_connection, parse_end_of_records
from harpcaller.hosts.inventory import Host
from harpcaller.model.jobs import Job, JobMetadata
from harpcaller.runs.context import RunContext
from harpcaller.store import StorageError, UnknownJob

__all__ = ["OrphanReaper"]

log = logging.getLogger(__name__)

#: How many are dealt with at once on a host.
_WORKERS_PER_HOST = 4

#: Seconds that one may take: it is stopped in less, unless a very long `kill_grace` is configured on its host.
_TIME_LIMIT = 120.0

#: How often one is attached to: its records are asked for from behind their end, which is told by a refusal.
_MAX_ATTACHES = 3


@dataclass(slots=True)
class _HostQueue:
    """What is to be done on a host.

    Attributes:
        waiting: calls that it holds, in the order in which it listed them; the values mean nothing.
        under_way: those that are dealt with now.
        workers: who deals with them.
    """

    pending: dict[str, None] = field(default_factory=dict)
    active: set[str] = field(default_factory=set)
    workers: set[asyncio.Task[None]] = field(default_factory=set)


class OrphanReaper:
    """Looks through the lists of calls that hosts hold.

    Args:
        group: where the work is done.
        is_wanted: whether somebody looks after this job's call.
    """

    def __init__(self, group: asyncio.TaskGroup, is_active: Callable[[str], bool]) -> None:
        self._group = group
        self._is_active = is_active
        self._hosts: dict[str, _HostQueue] = {}
        self._stopped = False

    def reap_calls(self, host: Host, calls: Sequence[str], context: RunContext) -> None:
        """Begin to get rid of those that nobody wants. A host's list takes the place of the one before."""
        if self._stopped:
            return
        there = self._hosts.setdefault(host.hostname, _HostQueue())
        there.pending = {call: None for call in calls if call not in there.active and not self._is_active(call)}
        for _ in range(min(_WORKERS_PER_HOST - len(there.workers), len(there.pending))):
            worker = self._group.create_task(self._reap_pending(host, there, context))
            there.workers.add(worker)
            worker.add_done_callback(there.workers.discard)

    def stop(self) -> None:
        """Stop what is under way; the hosts will list it again."""
        self._stopped = True
        for there in self._hosts.values():
            for worker in there.workers:
                worker.cancel()

    async def _reap_pending(self, host: Host, there: _HostQueue, context: RunContext) -> None:
        while there.pending:
            call = next(iter(there.pending))
            del there.pending[call]
            there.active.add(call)
            try:
                await self._reap_call(host, call, context)
            except Exception:  # whatever one host says must not end the dispatcher
                log.exception("a call that nobody wants: a fault of the dispatcher", extra=_call_fields(host, call))
            finally:
                there.active.discard(call)

    async def _reap_call(self, host: Host, call: str, context: RunContext) -> None:
        try:
            job = await _find_job(call, context)
            if self._is_active(call) or (job is not None and job.holds_slot):
                return
            log.info("a call that nobody wants is stopped", extra=_call_fields(host, call))
            ours = job is not None and job.host == host.hostname  # else it is not for this host to say how it ended
            async with asyncio.timeout(_TIME_LIMIT):
                await _stop_and_release(host, call, context, ours)
        except (*CONNECT_ERRORS, StorageError, ProtocolError, LineTooLong) as error:
            reason = str(error) or type(error).__name__
            log.info("a call that nobody wants is left for later", extra={**_call_fields(host, call), "reason": reason})


async def _find_job(call: str, context: RunContext) -> Job | None:
    try:
        return await context.store.get_job(call)
    except UnknownJob:
        return None


async def _stop_and_release(host: Host, call: str, context: RunContext, ours: bool) -> None:
    """Stop a call and have it forgotten; keep what its host says of it, if it is the call of a job of ours."""

    async def note(metadata: JobMetadata) -> None:
        if ours:
            await context.store.update_metadata(call, metadata)

    since: int | None = PAST_END
    for _ in range(_MAX_ATTACHES):
        if since is None:
            return
        conn = await open_connection(host, context.tls, context.config)
        try:
            conn.send_request(context.attach_request(call, host, since))
            since = await _await_end(conn, since, note)
        finally:
            conn.abort()


async def _await_end(conn: HarpdConnection, since: int, note: Callable[[JobMetadata], Awaitable[None]]) -> int | None:
    """Order the stop and hear the end; return the record to attach at instead, None: there is no more to do."""
    acknowledged = False
    number = since
    receipt: Raw | None = None
    evidence: Raw | None = None
    while (lines := await conn.read()) is not None:
        for line in lines:
            match message := conn.parse_line(line):
                case Acknowledgement(_, terms):
                    acknowledged = True
                    conn.send_command(StopCall("unwanted"))
                    if terms is not None:
                        conn.start_heartbeat(terms.elapsed, terms.disconnect_timeout, at_once=True)
                case Record():
                    number += 1
                case StopReport(found):
                    receipt = Raw(found)
                case ExitInfo(found):
                    evidence = Raw(found)
                case Failed("records_gone") if not acknowledged:
                    return parse_end_of_records(message)
                case Failed() if not acknowledged:
                    return None
                case _ if isinstance(message, End):
                    await note(JobMetadata(stop_report=receipt, exit_info=evidence))
                    conn.send_command(Release())
                    conn.close()
                    return None
        if number > since:
            since = number
            conn.send_command(Ack(number))  # wanted no more, which is as good as stored
    return None


def _call_fields(host: Host, call: str) -> dict[str, str]:
    return {"job": call, "host": host.hostname}
