"""Cleans up orphans: calls that hosts still have although their jobs have ended or no longer exist.

Each orphan is stopped and released. Its stop report and exit info are stored with its job, if the job belongs to this
host. Each host has a few workers, so a faulty host, which may list any calls, cannot occupy the workers of others.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterator, Sequence

from msgspec.structs import replace

from harp.protocol.ends import End, Failed
from harp.protocol.harpd import Ack, Acknowledgement, ExitInfo, Phase, Record, Release, StopCall, StopReport
from harp.protocol.json_text import Raw
from harpcaller.hosts.connecting import CONNECTION_ERRORS, open_connection
from harpcaller.hosts.connection import PAST_END, MessageQueue, parse_end_of_records
from harpcaller.hosts.registry import Host
from harpcaller.model.jobs import JobMetadata
from harpcaller.runs.context import RunContext
from harpcaller.store import StorageError, UnknownJob

log = logging.getLogger(__name__)

_WORKERS_PER_HOST = 4  #: Maximum number of orphans of a host that are handled at the same time.
_TIME_LIMIT = 120.0  #: Maximum seconds for an orphan: a stop is shorter, unless `kill_grace` of its host is very long.
_MAX_ATTACHES = 3  #: Maximum number of attaches: the first, past the end, is refused with the next record number.


class OrphanReaper:
    """The clean-up of the orphans in the call lists of hosts. `is_active` returns whether a run handles a call."""

    def __init__(self, group: asyncio.TaskGroup, is_active: Callable[[str], bool]) -> None:
        self._group = group
        self._is_active = is_active
        self._workers: dict[str, list[asyncio.Task[None]]] = {}  # by host, of its latest list

    def reap_calls(self, host: Host, calls: Sequence[str], context: RunContext) -> None:
        """Start to stop and release the orphans in a host's list, which replaces the previous list."""
        for worker in self._workers.get(host.hostname, ()):
            worker.cancel()  # the orphan that it was stopping is in the new list, or was released
        orphans = [call for call in calls if not self._is_active(call)]
        pending, count = iter(orphans), min(_WORKERS_PER_HOST, len(orphans))
        workers = [self._group.create_task(self._reap_pending(host, pending, context)) for _ in range(count)]
        self._workers[host.hostname] = workers

    def stop(self) -> None:
        """Cancel all workers; the hosts will list the orphans again."""
        for workers in self._workers.values():
            for worker in workers:
                worker.cancel()

    async def _reap_pending(self, host: Host, pending: Iterator[str], context: RunContext) -> None:
        """Handle the next orphans of an iterator that the workers of a host share."""
        for call in pending:
            fields = {"job": call, "host": host.hostname}
            try:
                await self._reap_call(host, call, context, fields)
            except (*CONNECTION_ERRORS, StorageError) as error:
                reason = str(error) or type(error).__name__
                log.info("cannot clean up orphan now", extra={**fields, "reason": reason})
            except Exception:  # no reply of a host may end the dispatcher
                log.exception("orphan clean-up failed: internal error", extra=fields)

    async def _reap_call(self, host: Host, call: str, context: RunContext, fields: dict[str, str]) -> None:
        try:
            job = await context.store.get_job(call)
        except UnknownJob:
            job = None
        if self._is_active(call) or (job is not None and job.holds_slot):
            return
        log.info("stopping orphaned call", extra=fields)
        # Another host must not report its end, nor learn its secret.
        submitted = job.submitted if job is not None and job.host == host.hostname else math.inf
        async with asyncio.timeout(_TIME_LIMIT):
            await _stop_and_release(host, call, submitted, context)


async def _stop_and_release(host: Host, call: str, submitted: float, context: RunContext) -> None:
    """Stop a call, store its metadata if its job is of this host, and release it.

    `submitted`: the time of the job's submission, infinite if it is not of this host.
    """
    since = PAST_END
    for _ in range(_MAX_ATTACHES):
        conn = await open_connection(host, context.tls, context.config, context.timers, context.resolver)
        try:
            messages = MessageQueue(conn)
            conn.send_request(context.encode_attach(call, submitted, host, since), Phase.SENT_ATTACH, messages)
            reply = await messages.receive()
            if isinstance(reply, Failed) and reply.type == "records_gone":
                since = parse_end_of_records(reply)
                continue
            if not isinstance(reply, Acknowledgement) or reply.call is None:
                return
            conn.start_heartbeat(reply.call.elapsed, reply.call.disconnect_timeout, at_once=True)
            conn.send_command(StopCall("orphaned"))
            metadata = JobMetadata()
            while (message := await messages.receive()) is not None:  # the host closes after the release
                match message:
                    case Record():
                        since += 1
                        if not messages.has_next:
                            conn.send_command(Ack(since))  # discarded, but acknowledged to the host
                    case StopReport(data):
                        metadata = replace(metadata, stop_report=Raw(data))
                    case ExitInfo(data):
                        metadata = replace(metadata, exit_info=Raw(data))
                    case _ if isinstance(message, End):
                        if submitted < math.inf:
                            await context.store.update_metadata(call, metadata)
                        conn.send_command(Release())
            return
        finally:
            conn.abort()
