"""Cleans up orphans: calls that hosts still hold although their jobs have ended or no longer exist.

Each orphan is stopped if it is running, and released by its host. Its stop report and exit info are stored with its
job, if the job belongs to this host; the end that was stored first wins.

A host may list any calls and send any reply: it occupies only its own few workers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from harp.protocol.ends import End, Failed
from harp.protocol.harpd import Ack, Acknowledgement, ExitInfo, Phase, Record, Release, StopCall, StopReport
from harp.protocol.json_text import Raw
from harpcaller.hosts.connecting import CONNECTION_ERRORS, open_connection
from harpcaller.hosts.connection import PAST_END, HarpdConnection, MessageQueue, parse_end_of_records
from harpcaller.hosts.inventory import Host
from harpcaller.model.jobs import JobMetadata
from harpcaller.runs.context import RunContext
from harpcaller.store import StorageError, UnknownJob

log = logging.getLogger(__name__)

#: Maximum number of orphans of a host that are handled at the same time.
_WORKERS_PER_HOST = 4

#: Maximum seconds for an orphan. Stopping takes less, unless a very long `kill_grace` is configured on its host.
_TIME_LIMIT = 120.0

#: Maximum number of attaches: the first one, past the end, is refused with the number of the next record.
_MAX_ATTACHES = 3


@dataclass(slots=True)
class _HostQueue:
    """The orphans of a host.

    Attributes:
        pending: orphans that wait, in the order of the host's list, as keys without values.
        active: orphans that are being handled.
        workers: the tasks that handle them.
    """

    pending: dict[str, None] = field(default_factory=dict)
    active: set[str] = field(default_factory=set)
    workers: set[asyncio.Task[None]] = field(default_factory=set)


class OrphanReaper:
    """The clean-up of the orphans in the call lists of hosts. `is_active` returns whether a run handles a call."""

    def __init__(self, group: asyncio.TaskGroup, is_active: Callable[[str], bool]) -> None:
        self._group = group
        self._is_active = is_active
        self._hosts: dict[str, _HostQueue] = {}

    def reap_calls(self, host: Host, calls: Sequence[str], context: RunContext) -> None:
        """Start to stop and release the orphans in a host's list, which replaces the previous list."""
        queue = self._hosts.setdefault(host.hostname, _HostQueue())
        queue.pending = {call: None for call in calls if call not in queue.active and not self._is_active(call)}
        for _ in range(min(_WORKERS_PER_HOST - len(queue.workers), len(queue.pending))):
            worker = self._group.create_task(self._reap_pending(host, queue, context))
            queue.workers.add(worker)
            worker.add_done_callback(queue.workers.discard)

    def stop(self) -> None:
        """Cancel all workers; the hosts will list the orphans again."""
        for queue in self._hosts.values():
            for worker in queue.workers:
                worker.cancel()

    async def _reap_pending(self, host: Host, queue: _HostQueue, context: RunContext) -> None:
        while queue.pending:
            call = next(iter(queue.pending))
            del queue.pending[call]
            queue.active.add(call)
            try:
                await self._reap_call(host, call, context)
            except Exception:  # no reply of a host may end the dispatcher
                log.exception("orphan clean-up failed: internal error", extra=_call_fields(host, call))
            finally:
                queue.active.discard(call)

    async def _reap_call(self, host: Host, call: str, context: RunContext) -> None:
        try:
            try:
                job = await context.store.get_job(call)
            except UnknownJob:
                job = None
            if self._is_active(call) or (job is not None and job.holds_slot):
                return
            log.info("stopping orphaned call", extra=_call_fields(host, call))
            is_of_host = job is not None and job.host == host.hostname  # another host must not report its end

            async def store_metadata(metadata: JobMetadata) -> None:
                if is_of_host:
                    await context.store.update_metadata(call, metadata)

            async with asyncio.timeout(_TIME_LIMIT):
                await _stop_and_release(host, call, context, store_metadata)
        except (*CONNECTION_ERRORS, StorageError) as error:
            reason = str(error) or type(error).__name__
            log.info("cannot clean up orphan now", extra={**_call_fields(host, call), "reason": reason})


async def _stop_and_release(
    host: Host, call: str, context: RunContext, store_metadata: Callable[[JobMetadata], Awaitable[None]]
) -> None:
    """Stop a call, store its metadata and release it on its host."""
    since: int | None = PAST_END
    for _ in range(_MAX_ATTACHES):
        if since is None:
            return
        conn = await open_connection(host, context.tls, context.config, context.timers)
        try:
            messages = MessageQueue(conn)
            conn.send_request(context.encode_attach(call, host, since), Phase.SENT_ATTACH, messages)
            since = await _await_end(conn, messages, since, store_metadata)
        finally:
            conn.abort()


async def _await_end(
    conn: HarpdConnection,
    messages: MessageQueue,
    since: int,
    store_metadata: Callable[[JobMetadata], Awaitable[None]],
) -> int | None:
    """Stop the call and release it; return the record to attach at again, None if nothing is left to do."""
    acknowledged = False
    stop_report: Raw | None = None
    exit_info: Raw | None = None
    while (message := await messages.receive()) is not None:
        match message:
            case Acknowledgement(_, terms):
                acknowledged = True
                conn.send_command(StopCall("orphaned"))
                if terms is not None:
                    conn.start_heartbeat(terms.elapsed, terms.disconnect_timeout, at_once=True)
            case Record():
                since += 1
                if not messages.has_next:
                    conn.send_command(Ack(since))  # dropped, but acked to the host
            case StopReport(data):
                stop_report = Raw(data)
            case ExitInfo(data):
                exit_info = Raw(data)
            case Failed("records_gone") if not acknowledged:
                return parse_end_of_records(message)
            case Failed() if not acknowledged:
                return None
            case _ if isinstance(message, End):
                await store_metadata(JobMetadata(stop_report=stop_report, exit_info=exit_info))
                conn.send_command(Release())
                while await messages.receive() is not None:
                    pass  # the host closes after the release; an earlier close could overtake the command
                return None
    return None


def _call_fields(host: Host, call: str) -> dict[str, str]:
    return {"job": call, "host": host.hostname}
