"""One job, one call on a host: start it once, store its records, reattach after outages, store its end.

Theory of operation. A `Run` lives as long as its job holds its slot. It starts the call, processes the host's messages
and attaches to the call again after an outage, until the host reports the end or counts as lost.

A call is *resumable* if the host's harpd supports it (`harpcaller.hosts.capabilities`). Otherwise it is
*connection-bound*, as on a legacy harpd: closing the connection stops it without confirmation, and a lost connection
ends the job.

At most once: the request is written a single time. Nothing is awaited between the last check that the job was not
cancelled and the write. It is written again only after the host has reported that the start did not happen: because it
named another instance (``wrong_instance``), or arrived too late. If the connection breaks before the acknowledgement,
the run attaches: a host that does not hold the call keeps a tombstone for its id from then on.

After a protocol error the host's messages are ignored, except the stop report. The run attaches once more, past the
last record, only to stop the call.

A cancel or a limit that stops a call stores the job's end first. The stop command is sent when the host can be
reached, and the stop report is stored when it is received. Waits are interruptible
(`harpcaller.runs.interruptible_wait`); pending changes are applied after every wait, in one place.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import Any

from harp.protocol.ends import End, Failed
from harp.protocol.fields import ProtocolError, is_container
from harp.protocol.harpd import (
    Ack,
    Acknowledgement,
    ExitInfo,
    GrantedTerms,
    Message,
    RecordTime,
    Release,
    StopCall,
    StopReport,
)
from harp.protocol.json_text import InvalidJSON, Raw, dumps, loads
from harp.protocol.lines import LineTooLong
from harp_daemon.backoff import Backoff
from harpcaller.hosts.connecting import (
    HostUnreachable,
    describe_host,
    map_connect_errors,
    to_failed,
    to_protocol_error,
)
from harpcaller.hosts.connection import PAST_END, HarpdConnection, open_connection, parse_end_of_records
from harpcaller.hosts.inventory import Host
from harpcaller.model.jobs import Job, StopState
from harpcaller.runs.context import RunContext, log_fields
from harpcaller.runs.deadlines import Deadlines
from harpcaller.runs.interruptible_wait import Interrupted, InterruptibleWait
from harpcaller.runs.outage import Outage
from harpcaller.runs.outcome_writer import OutcomeWriter
from harpcaller.runs.record_writer import RecordWriter

log = logging.getLogger(__name__)

#: Seconds between two attempts to attach to a call, or to start one that was delayed: the first delay, and the longest.
_MIN_DELAY, _MAX_DELAY = 0.2, 5.0

#: Maximum seconds that a cancel waits for the reply to a sent request.
_CANCEL_WAIT = 2.0

#: Maximum number of starts, if the host reports that the earlier ones named another instance.
_MAX_STARTS = 3

_DISPATCHER_STOPPED = Failed(
    "missing_result", "the dispatcher stopped while the job was running; the end of its call is not known"
)
_INTERNAL_ERROR = Failed("internal_error", "internal error of the dispatcher; see its log")


class Outcome(Enum):
    """The result of one connection."""

    FINISHED = "nothing is left to do"
    DISCONNECTED = "the connection is lost; the call may still be running"
    WRONG_INSTANCE = "the start did not happen: it named another instance of the supervisor"
    DELAYED = "the start did not happen: it was delayed for too long"


class Run:
    """The call of one job that holds a slot; `recovered`: an earlier dispatcher may have started the call."""

    def __init__(self, job: Job, context: RunContext, recovered: bool = False) -> None:
        self.job = job
        self._context = context
        self._recovered = recovered
        self._records = RecordWriter(job, context, self._on_stored)
        self._outcome = OutcomeWriter(job, context, self.describe_call)
        self._request_sent = False
        self._answered = asyncio.Event()  # the host has replied, an outage has begun or the run has ended
        self._wait = InterruptibleWait()
        self._detaching = False
        self._stop_command: StopCall | None = None
        self._conn: HarpdConnection | None = None
        self._host: Host | None = None
        self._terms: GrantedTerms | None = None
        self._resumable = False  # whether the last request was for a resumable call
        self._deadlines = Deadlines(job, context.config.acknowledgement_timeout)
        self._stop_sent = False  # on the current connection
        self._remote_ended = False  # the closing line was received, on the current connection
        self._attempts = 0
        self._backoff = Backoff(_MIN_DELAY, _MAX_DELAY)
        #: The current outage; None if there is none.
        self.outage: Outage | None = None
        self._record_time: float | None = None

    async def run(self) -> None:
        """Run the call. Return when its end is stored, or after `detach`."""
        begin = time.monotonic()
        log.info("call recovered" if self._recovered else "call started", extra=log_fields(self.job))
        try:
            outcome = await self._run_call()
        except Exception:
            log.exception("call failed: internal error", extra=log_fields(self.job))
            outcome = await self._fail_internally()
        finally:
            self._answered.set()
            self._records.cancel()
        fields = {**log_fields(self.job), **self._outcome.log_fields, "seconds": round(time.monotonic() - begin, 3)}
        log.info("call ended" if outcome is Outcome.FINISHED else "call detached", extra=fields)

    async def _run_call(self) -> Outcome:
        outcome = await (self._recover() if self._recovered else self._start_call())
        while outcome is Outcome.DISCONNECTED and not self._detaching:
            outcome = await self._reattach()
        return outcome

    async def _fail_internally(self) -> Outcome:
        """End the job after an internal error.

        If the request was sent, the call may be running. The job then holds its slot until the next start of the
        dispatcher. Its stop is not pending, because no run handles it any more.
        """
        sent = self._request_sent
        if self._outcome.has_ended or not await self._outcome.store_end(
            _INTERNAL_ERROR, StopState.FAILED if sent else None, sent
        ):
            await self._outcome.store_stop(StopState.FAILED if sent else StopState.CONFIRMED, keep_slot=sent)
        return Outcome.FINISHED

    # Requests to the run.

    async def cancel_call(self, by: str | None) -> None:
        """Stop the call of a job that this client cancelled in the store. It is not started after this returns."""
        self._outcome.has_ended = True
        if self._request_sent:
            try:
                async with asyncio.timeout(_CANCEL_WAIT):
                    await self._answered.wait()
            except TimeoutError:
                log.warning("host has not acknowledged cancelled call", extra=log_fields(self.job))
        self._stop_command = self._stop_command or StopCall("cancelled", by)
        self._wait.interrupt()

    def cancel_before_start(self) -> None:
        """Mark the job as cancelled before `run`: its call is not started, or stopped if it was recovered."""
        self._outcome.has_ended = True
        self._stop_command = StopCall("cancelled")

    @property
    def has_ended(self) -> bool:
        """Whether the job has ended: this run has stored its end, or has found or was notified of another end."""
        return self._outcome.has_ended

    def detach(self) -> None:
        """Leave a resumable call to its host, for the next dispatcher; end a connection-bound one."""
        self._detaching = True
        self._wait.interrupt()

    def describe_call(self) -> dict[str, Any]:
        """Return where and how the call runs, for `details`. Spec: docs/protocol.md, Details."""
        host, terms = self._host, self._terms
        return {
            "address": host.address if host else None,
            "port": host.port if host else None,
            "attempts": self._attempts,
            "connect_seconds": self._deadlines.connect_seconds,
            "resumable": terms is not None or (self._resumable and self.outage is not None),
            "instance": terms.instance if terms else None,
        }

    def last_contact(self, now: float) -> float | None:
        """Return the Unix time of the last data received for the call, given the current one; None before the first."""
        if self.outage is not None:
            return self.outage.since
        return None if self._conn is None else now - (time.monotonic() - self._conn.last_received_at)

    def seconds_until_lost(self) -> float:
        """Return the seconds until the host counts as lost, if the outage continues."""
        return 0.0 if self.outage is None else self.outage.deadline(self._host_timeout()) - time.monotonic()

    @property
    def is_acknowledged(self) -> bool:
        """Whether the host has acknowledged the call."""
        return self._deadlines.acknowledged

    # The start.

    async def _start_call(self) -> Outcome:
        job = self.job
        host = self._host = self._context.find_host(job.host)
        if host is None:
            return await self._finish(Failed("unknown_host", f"the hosts registry has no host {job.host}"))
        wrong_instances = 0
        while wrong_instances < _MAX_STARTS:
            match outcome := await self._send_start(host):
                case Outcome.WRONG_INSTANCE:
                    wrong_instances += 1
                case Outcome.DELAYED:
                    await self._pause_starts()
                case _:
                    return outcome
        return await self._finish(
            Failed("network_error", f"{describe_host(host)}: its supervisor was restarted at every start")
        )

    async def _pause_starts(self) -> None:
        """Wait before a start is sent again: the host, or the way to it, was suspended."""
        self._backoff.record_attempt()
        with suppress(Interrupted):
            await self._wait.wait(asyncio.sleep(self._backoff.next_delay()), self._deadlines.deadline)

    async def _send_start(self, host: Host) -> Outcome:
        context = self._context
        instance = conn = None
        while conn is None:
            self._wait.clear()
            if not self._may_start() or time.monotonic() >= self._deadlines.deadline:
                return await self._finish_unsent()
            self._attempts += 1
            try:
                with map_connect_errors(host):
                    if context.config.resumable_calls:
                        query = context.capabilities.get_instance(host, context.tls, context.config)
                        instance = await self._wait.wait(query, self._deadlines.deadline)
                    conn = context.connections.get(host, context.tls)
                    if conn is None:
                        connecting = open_connection(host, context.tls, context.config)
                        conn = await self._wait.wait(connecting, self._deadlines.deadline)
            except Interrupted:
                continue
            except HostUnreachable as unreachable:
                return await self._finish(unreachable.error)
        request = context.start_request(self.job, host, instance)
        # Nothing may be awaited between this check and the write.
        if not self._may_start():
            conn.abort()
            return await self._finish_unsent()
        conn.send_request(request)
        self._request_sent = True
        self._answered.clear()
        self._resumable = instance is not None
        return await self._process_messages(conn, host)

    def _may_start(self) -> bool:
        return self._stop_command is None

    async def _finish_unsent(self) -> Outcome:
        if self._outcome.has_ended:
            return await self._finish_stop(StopState.CONFIRMED)
        return await self._finish(self._deadlines.max_exec_time_error())

    # One connection.

    async def _process_messages(self, conn: HarpdConnection, host: Host) -> Outcome:
        """Process the host's messages until the connection has a result, then close it."""
        self._conn = conn
        self._remote_ended = False
        self._deadlines.on_request_sent(reattach=self.outage is not None)
        try:
            while True:
                try:
                    if (outcome := await self._apply_pending(conn, host)) is not None:
                        return outcome
                    if self._records.over_soft_limit if self._terms is None else self._records.over_hard_limit:
                        await self._wait.wait(self._records.flush())
                        self._deadlines.on_message()
                        continue
                    lines = await self._wait.wait(conn.read(), self._deadlines.next_deadline(self._outcome.has_ended))
                except Interrupted:
                    continue
                except LineTooLong as error:
                    return await self._on_protocol_error(error, host)
                except OSError as error:
                    return await self._on_disconnect(to_failed(error, host, conn.phase_text), host)
                if lines is None:
                    closed = Failed(
                        "network_error", f"{describe_host(host)}: it closed the connection {conn.describe_state()}"
                    )
                    return await self._on_disconnect(closed, host)
                for message in conn.messages(lines):
                    self._deadlines.on_message()
                    if isinstance(message, ProtocolError):
                        return await self._on_protocol_error(message, host)
                    if (outcome := await self._on_message(message, conn, host)) is not None:
                        return outcome
                if self._records.closed:
                    self._on_stored(self._records.count)
        finally:
            if self._conn is not None:
                self._conn = None
                conn.abort()

    async def _apply_pending(self, conn: HarpdConnection, host: Host) -> Outcome | None:
        """Apply limits, stops and `detach`; return an outcome if the connection is no longer needed."""
        self._wait.clear()
        if self._context.pending_writes.count:
            self._deadlines.postpone()  # records that were received in time may not be stored yet
        if self._records.closed and not self._outcome.has_ended:
            await self._end_job(_INTERNAL_ERROR, "internal_error")
        elif (end := self._deadlines.expired(describe_host(host), self._outcome.has_ended)) is not None:
            if not self._deadlines.acknowledged and self._resumable and end.type != "timeout":
                self._begin_outage(end.message)  # attaching will show whether the call has started
                return Outcome.DISCONNECTED
            await self._end_job(end, "limit")
        if self._stop_command is not None:
            if not self._resumable:
                self._answered.set()
                return await self._finish_stop(StopState.UNKNOWN)  # closing the connection stops the call
            if self._deadlines.acknowledged:
                self._send_stop(conn)
        if self._detaching and self._deadlines.acknowledged:
            if self._terms is not None:
                return Outcome.DISCONNECTED
            return await self._finish(_DISPATCHER_STOPPED, stop=StopState.UNKNOWN)
        return None

    def _send_stop(self, conn: HarpdConnection) -> None:
        if self._stop_command is not None and not self._stop_sent:
            self._stop_sent = True
            conn.send_command(self._stop_command)

    async def _on_message(self, message: Message | list[Raw], conn: HarpdConnection, host: Host) -> Outcome | None:
        match message:
            case list(records):
                self._deadlines.on_record()
                self._records.add_records(
                    records, self._context.wall() if self._record_time is None else self._record_time
                )
            case RecordTime(made_at):
                self._record_time = made_at
            case Acknowledgement(_, terms):
                await self._on_acknowledged(terms, conn, host)
            case ExitInfo(data):
                self._outcome.exit_info = Raw(data)
            case StopReport(data):
                self._outcome.stop_report = Raw(data)
                if self._remote_ended:
                    return await self._on_call_finished(conn)
            case Failed() if not self._deadlines.acknowledged:
                return await self._on_refused(message, host)
            case _ if isinstance(message, End):
                if self._terms is None:
                    return await self._finish(message)
                self._remote_ended = True
                return await self._on_call_finished(conn, message)
        return None

    async def _on_acknowledged(self, terms: GrantedTerms | None, conn: HarpdConnection, host: Host) -> None:
        self._answered.set()
        self._deadlines.on_acknowledged(None if terms is None else terms.elapsed)
        self._terms = terms
        if terms is None:
            if self._resumable:  # the host was downgraded to a legacy harpd
                self._resumable = False
                self._context.capabilities.set_legacy(host)
            return
        self._stop_sent = False
        self._send_stop(conn)  # at once: the next message may break the connection
        again = self.outage is not None
        if self.outage is not None:
            outage, self.outage = self.outage, None
            log.info("outage ended", extra={**log_fields(self.job), "attempts": outage.attempts})
        conn.start_heartbeat(terms.elapsed, terms.disconnect_timeout, at_once=again)

    async def _on_refused(self, error: Failed, host: Host) -> Outcome:
        """Handle an error instead of the acknowledgement."""
        self._answered.set()
        if self.outage is not None:  # the request was an attach
            match error.type:
                case "no_such_call":
                    return await self._on_unknown_call(host)
                case "records_gone":
                    return await self._on_records_gone(error, host)
                case _:
                    self.outage.record_error(f"{describe_host(host)}: {error.type}: {error.message}")
                    return Outcome.DISCONNECTED
        if self._resumable and (retry := _reason_to_retry(error)) is not None:
            self._request_sent = False  # the call does not run, so a cancel or an internal error has nothing to stop
            if retry is Outcome.WRONG_INSTANCE:
                self._context.capabilities.invalidate(host)
            return retry
        return await self._finish(error)

    async def _on_call_finished(self, conn: HarpdConnection, end: End | None = None) -> Outcome | None:
        """Store the end of a call. Return None if processes survive, because more messages follow."""
        await self._records.flush()
        report = self._outcome.stop_report
        survives = report is not None and bool(StopReport(report).survivors)
        stop = StopState.FAILED if survives else StopState.CONFIRMED
        if (
            end is None
            or self._outcome.has_ended
            or not await self._outcome.store_end(end, None if report is None else stop, survives)
        ):
            await self._finish_stop(stop, survives)
        if survives:
            log.error("processes survive on host", extra=log_fields(self.job))
            return None
        await asyncio.sleep(0)  # waiting clients are notified first
        conn.send_command(Release())
        assert self._host is not None
        self._conn = None  # the pool owns it now
        self._context.connections.put(self._host, self._context.tls, conn)
        return Outcome.FINISHED

    async def _on_disconnect(self, end: Failed, host: Host) -> Outcome:
        """Handle a broken connection."""
        if not self._resumable:
            self._answered.set()
            if self._outcome.has_ended:
                return await self._finish_stop(StopState.UNKNOWN)
            return await self._finish(end)
        self._begin_outage(end.message)
        return Outcome.DISCONNECTED

    async def _on_protocol_error(self, error: ProtocolError | LineTooLong, host: Host) -> Outcome:
        """End the job after a protocol error. Reattaching would repeat the error."""
        end = to_protocol_error(error, host)
        if self._resumable and self._deadlines.acknowledged:
            await self._records.flush()
            end = Failed(end.type, f"{end.message} (expected record {self._records.next_number})")
            await self._end_job(end, "protocol_error")
            self._records.close_at(PAST_END)
        return await self._on_disconnect(end, host)

    # Limits.

    async def _end_job(self, end: Failed, why: str) -> None:
        """Store an end of the job, and stop its call."""
        if not self._outcome.has_ended:
            stopped = dumps({"why": why, "by": "dispatcher", "at": self._context.wall()})
            if not await self._outcome.store_end(end, StopState.PENDING, True, stopped):
                return  # the job was cancelled; `cancel_call` follows
        self._stop_command = self._stop_command or StopCall(why, "dispatcher")

    # Outages.

    def _begin_outage(self, error: str) -> None:
        if self.outage is None:
            now = time.monotonic()
            received_at = self._conn.last_received_at if self._conn is not None else now
            self.outage = Outage.begin(now - received_at, self._context.wall())
            log.warning("outage began", extra={**log_fields(self.job), "reason": error})
            if self._host is not None:
                self._context.capabilities.invalidate(self._host)
        self.outage.record_error(error)
        self._answered.set()

    async def _recover(self) -> Outcome:
        """Prepare to attach to the call of an earlier dispatcher."""
        self._request_sent = self._resumable = True
        self._answered.set()
        read = partial(self._context.store.get_details, self.job.id)
        stop_request = (await self._context.retry_until_stored(self.job.id, read)).metadata.stop_request
        self.outage = Outage.begin(0.0, self._context.wall())
        if self.job.end is not None and self._stop_command is None:
            stopped = loads(stop_request) if stop_request else {}
            self._stop_command = StopCall(str(stopped.get("why", "cancelled")), stopped.get("by"))
        return Outcome.DISCONNECTED

    async def _reattach(self) -> Outcome:
        """Attach to the call, after a delay if the last attempt failed."""
        assert self.outage is not None
        outage, context = self.outage, self._context
        lost_at = outage.deadline(self._host_timeout())
        try:
            if delay := self._backoff.next_delay():
                await self._wait.wait(asyncio.sleep(delay), lost_at)
        except Interrupted:
            self._wait.clear()
            if self._detaching:
                return Outcome.DISCONNECTED
        if time.monotonic() >= lost_at:
            return await self._declare_host_lost()
        self._attempts += 1
        self._backoff.record_attempt()
        outage.attempts += 1
        self._host = host = context.find_host(self.job.host) or self._host
        if host is None:
            outage.record_error(f"the hosts registry has no host {self.job.host}")
            return Outcome.DISCONNECTED
        self._wait.clear()
        conn: HarpdConnection | None = None
        try:
            with map_connect_errors(host):
                query = context.capabilities.get_instance(host, context.tls, context.config)
                instance = await self._wait.wait(query, lost_at)
                if instance is None and self._terms is None:
                    return await self._on_legacy_host(host)
                conn = await self._wait.wait(open_connection(host, context.tls, context.config), lost_at)
        except Interrupted:
            outage.record_error(outage.error or "connecting took too long")
        except HostUnreachable as unreachable:
            outage.record_error(f"{unreachable.error.type}: {unreachable.error.message}")
        if conn is None:
            return Outcome.DISCONNECTED
        conn.send_request(context.attach_request(self.job.id, host, self._records.next_number))
        return await self._process_messages(conn, host)

    def _host_timeout(self) -> float:
        """Return the seconds of an outage after which the host has certainly stopped the call."""
        terms, after = self._terms, self._context.config.host_timeout
        return after if terms is None else max(after, terms.disconnect_timeout + 2 * terms.kill_grace + 5.0)

    async def _declare_host_lost(self) -> Outcome:
        """End the job or its stop, because the host counts as lost; its slot is released."""
        assert self.outage is not None
        outage = self.outage.as_json()
        message = f"host {self.job.host} could not be reached for {self._host_timeout():g} s, {self.outage.describe()}"
        if not self._outcome.has_ended:
            return await self._finish(Failed("host_lost", message, dumps(outage)), StopState.FAILED)
        return await self._finish_stop(StopState.FAILED, stop_report=dumps({"host_lost": outage}))

    async def _on_unknown_call(self, host: Host) -> Outcome:
        assert self.outage is not None
        if self._outcome.has_ended:
            return await self._finish_stop(StopState.CONFIRMED, stop_report=Raw(b'{"known":false}'))
        message = f"{describe_host(host)} does not hold the job's call: it was never started, or its end was lost"
        return await self._finish(Failed("missing_result", f"{message}; outage {self.outage.describe()}"))

    async def _on_legacy_host(self, host: Host) -> Outcome:
        """End the job of an earlier dispatcher on a legacy harpd: the call ended with its connection."""
        if self._outcome.has_ended:
            return await self._finish_stop(StopState.UNKNOWN)
        message = f"the dispatcher stopped while the job was running; {describe_host(host)} cannot resume calls"
        return await self._finish(Failed("missing_result", message), StopState.UNKNOWN)

    async def _on_records_gone(self, error: Failed, host: Host) -> Outcome:
        """End the job: the host has deleted records that are not stored, for example after a restored backup."""
        assert self.outage is not None
        message = f"{describe_host(host)}: records of the job are lost from number {self._records.next_number} on"
        try:
            end = parse_end_of_records(error)
        except ProtocolError as invalid:
            self.outage.record_error(to_protocol_error(invalid, host).message)
            return Outcome.DISCONNECTED
        await self._records.flush()
        await self._end_job(Failed("missing_result", message), "records_gone")
        self._records.close_at(end)
        self.outage.record_error(message)
        return Outcome.DISCONNECTED

    # The end of the job.

    async def _finish(self, end: End, stop: StopState | None = None) -> Outcome:
        """Store the end of a job whose call has ended or was never started; its slot is released."""
        await self._records.flush()
        if not await self._outcome.store_end(end, stop):
            await self._finish_stop(
                stop or (StopState.CONFIRMED if self._terms or not self._deadlines.acknowledged else StopState.UNKNOWN)
            )
        return Outcome.FINISHED

    async def _finish_stop(self, stop: StopState, keep_slot: bool = False, stop_report: Raw | None = None) -> Outcome:
        await self._outcome.store_stop(stop, keep_slot, stop_report)
        return Outcome.FINISHED

    def _on_stored(self, count: int) -> None:
        if not self._records.closed:
            self._backoff.reset()
        if self._conn is not None and self._terms is not None and self._deadlines.acknowledged:
            self._conn.send_command(Ack(count))


def _reason_to_retry(error: Failed) -> Outcome | None:
    """Return why a host that replies this error has certainly not started the call; None if a retry is useless."""
    if error.type == "wrong_instance":
        return Outcome.WRONG_INSTANCE
    if error.type == "call_refused" and isinstance(error.data, Raw) and is_container(error.data, (dict,)):
        with suppress(InvalidJSON):
            if loads(error.data).get("reason") == "delayed":
                return Outcome.DELAYED
    return None
