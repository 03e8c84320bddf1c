"""One job, one call on a host: start it once, store its records, attach again after outages, store its end.

Theory of operation. A `Run` exists as long as its job holds its slot. It is a state object without a task. The
connection, the store, the timers and the dispatcher call its methods, which change the state and return. Its phases:

    CONNECTING -> SENT -> RUNNING -> STORING_END -> CLOSED
                  SENT, RUNNING -> OUTAGE -> SENT, with an attach
                  STORING_END <-> SURVIVORS
                  any phase -> ENDING -> CLOSED, also of a job that is queued again

It attaches to the call again after each outage, until the host reports the end or is declared lost. Its state is a
cache: the next dispatcher continues from the store and the hosts.

A *connection-bound* call, as on a legacy harpd, ends with its connection, without confirmation, and so does its job.
The following is about *resumable* calls.

At most once: the start is written a single time, in the same step as the last check that the job was not cancelled. It
is written again only if the host has reported that it did not happen. After ``wrong_instance`` that is immediately.
Otherwise the job is queued again (`Run._fail_start`), as after a connection that failed before the start was written.
If the connection breaks before the acknowledgement, the run attaches; a host without the call then stores a tombstone.

After a protocol error the run attaches once more, past the last record, only to stop the call and receive the stop
report.

A cancel or a limit that stops a call stores the job's end first. The stop command is sent when the host can be
reached, and the stop report is stored when it is received. The first stored end wins, so writes of one job may overlap.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from enum import Enum
from functools import partial, wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec

from harp.protocol import harpd
from harp.protocol.ends import End, Failed, Raised, Returned
from harp.protocol.json_text import Raw, dumps, loads
from harp.protocol.lines import LineTooLong
from harp.protocol.schema import ProtocolError
from harp_daemon.timer_wheel import Backoff, Timer
from harpcaller.hosts.capabilities import LEGACY, HostSupport
from harpcaller.hosts.connecting import CONNECTION_ERRORS, describe_host, open_connection, to_failed
from harpcaller.hosts.connection import PAST_END, HarpdConnection, parse_end_of_records
from harpcaller.hosts.registry import Host
from harpcaller.model.jobs import Job, JobDetails, JobMetadata, StopState, state_of
from harpcaller.runs.context import RunContext, log_fields
from harpcaller.runs.deadlines import MARGIN, Deadlines, Outage
from harpcaller.runs.host_starts import HostStarts, is_refusal, is_unsent
from harpcaller.runs.record_writer import RecordWriter
from harpcaller.secret_arguments import CannotDecrypt, OpenedArguments

log = logging.getLogger(__name__)

P = ParamSpec("P")

_MIN_DELAY, _MAX_DELAY = 0.2, 5.0  #: Seconds between two attempts to attach to a call.
_CANCEL_WAIT = 2.0  #: Maximum seconds that a cancel waits for the reply to a sent start.
_MAX_STARTS = 3  #: Maximum number of starts that a host refuses because they name another instance.
_RECHECK = 1.0  #: Seconds until the limits are checked again while the host is not read.
_MAX_LOGGED = 500  #: Maximum length of a logged error in characters.

_DISPATCHER_STOPPED = Failed(
    "missing_result", "the dispatcher stopped while the job was running; the end of its call is not known"
)
_RELEASE = harpd.encode_command(harpd.Release())
_INTERNAL_ERROR = Failed("internal_error", "internal error of the dispatcher; see its log")


class RunPhase(Enum):
    """The phase of a run."""

    CONNECTING = "the call has not been started"
    SENT = "a start or an attach was sent, and the host has not replied"
    RUNNING = "the host has acknowledged the call on the current connection"
    OUTAGE = "there is no connection; the call may be running"
    STORING_END = "the end of a resumable call is being stored, or a later state of its stop"
    SURVIVORS = "the end is stored, but processes of the call survive; the host will report their end"
    ENDING = "the last write is in progress; other events are ignored"
    CLOSED = "the run is complete"


class _Outcome(NamedTuple):
    """The end of a job, and the state of the processes of its call."""

    end: End | None  # None: the job has ended before
    stop: StopState = StopState.CONFIRMED  # stored with `end` only if `was_stopped`
    was_stopped: bool = False  # whether the end is the effect of a stop
    keep_slot: bool = False
    stop_request: Raw | None = None  # stored with `end`
    stop_report: Raw | None = None  # stored if the job has ended before; None: the report of the host


def _event(method: Callable[Concatenate[Run, P], None]) -> Callable[Concatenate[Run, P], None]:
    """Return a method for an event: an internal error in it ends this job only."""

    @wraps(method)
    def guarded(self: Run, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - logged there
            self._fail(error)

    return guarded


class Run:
    """The call of a job that holds a slot; `on_closed` is called when the run is complete or has detached."""

    def __init__(self, job: Job, context: RunContext, starts: HostStarts, on_closed: Callable[[Run], None]) -> None:
        self.job = job
        self.has_ended = job.end is not None  #: Whether the job has an end in the store.
        self.outage: Outage | None = None  #: The current outage.
        self._context = context
        self._starts = starts
        self._on_closed = on_closed
        self._created_at = time.monotonic()
        self._job_started_at = self._created_at  # also if an earlier dispatcher started the job
        self._phase = RunPhase.CONNECTING
        self._records = RecordWriter(job, context, self._on_records_stored)
        self._deadlines = Deadlines(job, context.config.acknowledgement_timeout)
        self._backoff = Backoff(_MIN_DELAY, _MAX_DELAY)
        self._timer: Timer | None = None
        self._timer_at = 0.0  # monotonic time
        self._opening: asyncio.Task[tuple[HarpdConnection | None, HostSupport]] | None = None
        self._conn: HarpdConnection | None = None
        self._host: Host | None = None
        self._terms: harpd.GrantedTerms | None = None
        self._resumable = False  # whether the last request was for a resumable call
        self._no_start_pending = asyncio.Event()  # set unless a start was sent and has no reply yet
        self._no_start_pending.set()
        self._stop_command: harpd.StopCall | None = None
        self._stop_sent = False  # on the current connection
        self._detaching = False
        self._ending_job = False  # an end is being stored; then the call is stopped
        self._has_failed = False
        self._wrong_instances = 0
        self._attempts = 0
        self._connect_seconds: float | None = None  # to the first start
        self._record_time: float | None = None
        self._exit_info: Raw | None = None
        self._stop_report: Raw | None = None
        self._arguments = OpenedArguments(job.arguments)
        self._log_fields = log_fields(job)
        self._end_fields: dict[str, Any] = {}  # log fields of the end

    @_event
    def start(self, recovered: bool = False) -> None:
        """Start the call; if the job is `recovered`, attach to the call that an earlier dispatcher may have started."""
        log.info("call recovered" if recovered else "call started", extra=self._log_fields)
        try:
            self._arguments = self._context.open_secrets(self.job)
        except CannotDecrypt as error:
            log.error("cannot decrypt secret arguments", extra={**self._log_fields, "reason": str(error)})
            if not recovered:
                self._finish(_Outcome(Failed("secrets_unavailable", f"cannot decrypt the secret arguments: {error}")))
                return
        if recovered:
            self._phase = RunPhase.OUTAGE
            self._resumable = True
            wall = self._context.wall()
            self._job_started_at -= max(0.0, wall - (self.job.started or wall))
            self.outage = Outage.started_ago(0.0, wall)
            if self.has_ended and self._stop_command is None:
                read = partial(self._context.store.get_details, self.job.id)
                self._context.writes.retry_until_stored(self.job.id, read, self._on_stop_request_read, self._fail)
                return
            if self.job.records:
                read = partial(self._context.store.get_details, self.job.id)
                self._context.writes.retry_until_stored(self.job.id, read, self._on_size_read, self._fail)
                return
        else:
            self._starts.on_start(self.job)
        self._connect()

    async def cancel_call(self, by: str | None) -> None:
        """Stop the call of a job that a client has cancelled in the store. It is not started after this returns."""
        self.has_ended = True
        try:
            async with asyncio.timeout(_CANCEL_WAIT):
                await self._no_start_pending.wait()
        except TimeoutError:
            log.warning("host has not acknowledged cancelled call", extra=self._log_fields)
        self._stop_command = self._stop_command or harpd.StopCall("cancelled", by)
        self._continue()

    def cancel_before_start(self) -> None:
        """Mark the job as cancelled before `start`: its call is not started, or stopped if it was recovered."""
        self.has_ended = True
        self._stop_command = harpd.StopCall("cancelled")

    @_event
    def detach(self) -> None:
        """Detach from a resumable call, or end a connection-bound call. A reply to a sent request is awaited first.

        A job that has not been started is queued again.
        """
        self._detaching = True
        self._detach_if_possible()

    def abandon(self) -> None:
        """End the run immediately. Writes in progress may still be completed."""
        self._disconnect()
        self._records.abandon()
        self._phase = RunPhase.CLOSED

    def describe_call(self) -> dict[str, Any]:
        """Return where and how the call runs, for `details`. Spec: docs/protocol.md, Details."""
        host, terms = self._host, self._terms
        return {
            "address": host.address if host else None,
            "port": host.port if host else None,
            "attempts": self._attempts,
            "connect_seconds": self._connect_seconds,
            "resumable": terms is not None or (self._resumable and self.outage is not None),
            "instance": terms.instance if terms else None,
        }

    def last_contact(self, now: float) -> float | None:
        """Return the Unix time of the last data received for the call, or None; `now` is the current Unix time."""
        if self.outage is not None:
            return self.outage.since
        return None if self._conn is None else now - (time.monotonic() - self._conn.last_received_at)

    def seconds_until_lost(self) -> float:
        """Return the seconds until the host is declared lost, if the outage continues."""
        return 0.0 if self.outage is None else self.outage.deadline(self._host_timeout()) - time.monotonic()

    @property
    def is_acknowledged(self) -> bool:
        """Whether the host has acknowledged the call."""
        return self._deadlines.acknowledged

    # The start, and attaching.

    def _connect(self) -> None:
        """Connect to start the call, or in an outage to attach to it; end the job if its limit has expired."""
        if self._ending_job:
            return  # `_on_job_ended` connects when the end is stored
        context, outage = self._context, self.outage
        if outage is None:
            deadline = self._deadlines.deadline
            if self.has_ended or time.monotonic() >= deadline:
                self._finish(_Outcome(self._deadlines.max_exec_time_error()))
                return
        else:
            deadline = outage.deadline(self._host_timeout())
            if time.monotonic() >= deadline:
                self._declare_host_lost(outage)
                return
            self._backoff.record_attempt()
            outage.attempts += 1
        host = self._host = context.find_host(self.job.host) or self._host
        if host is None:
            self._on_unreachable(self._unknown_host())
            return
        self._attempts += 1
        if outage is None:
            support = context.capabilities.get_cached(host) if context.config.resumable_calls else LEGACY
            if support is not None and (conn := context.connections.get(host, context.tls)) is not None:
                self._send_request(conn, host, support)
                return
        self._opening = asyncio.create_task(self._open_connection(host))
        self._opening.add_done_callback(partial(self._on_opened, host))
        context.openings.add(self._opening)
        self._opening.add_done_callback(context.openings.discard)
        self._set_timer(deadline)

    async def _open_connection(self, host: Host) -> tuple[HarpdConnection | None, HostSupport]:
        """Return a connection and the capabilities of the host; no connection if the host cannot resume the call."""
        context, support = self._context, LEGACY
        if self.outage is not None or context.config.resumable_calls:
            support = await context.capabilities.get(host, context.tls, context.config)
        if self.outage is not None and support.instance is None and self._terms is None:
            return None, support
        return await open_connection(host, context.tls, context.config, context.timers, context.resolver), support

    @_event
    def _on_opened(self, host: Host, opening: asyncio.Task[tuple[HarpdConnection | None, HostSupport]]) -> None:
        if opening.cancelled():
            return
        error = opening.exception()
        conn, support = (None, LEGACY) if error is not None else opening.result()
        if opening is not self._opening:  # the run has cancelled it
            if conn is not None:
                conn.abort()
            return
        self._opening = None
        if isinstance(error, CONNECTION_ERRORS):
            self._on_unreachable(to_failed(error, host, "connecting"))
        elif error is not None:
            raise error
        elif conn is not None:
            self._send_request(conn, host, support)
        else:  # the call ended with the connection of the earlier dispatcher
            message = f"the dispatcher stopped while the job was running; {describe_host(host)} cannot resume calls"
            self._finish(_Outcome(Failed("missing_result", message), StopState.UNKNOWN, was_stopped=True))

    def _on_unreachable(self, end: Failed) -> None:
        if self.outage is None:
            if self._host is not None and is_unsent(end):
                self._fail_start(end)
            else:
                self._finish(_Outcome(end))
        else:
            self.outage.record_error(end.message if self._host is None else f"{end.type}: {end.message}")
            self._connect_later()

    def _send_request(self, conn: HarpdConnection, host: Host, support: HostSupport) -> None:
        if self.outage is not None:
            exchange = harpd.Phase.SENT_ATTACH
            job, since = self.job, self._records.next_number
            line = self._context.encode_attach(job.id, job.submitted, host, since)
        elif self.has_ended:
            conn.abort()
            self._finish(_Outcome(self._deadlines.max_exec_time_error()))
            return
        else:
            self._resumable = support.instance is not None
            exchange = harpd.Phase.SENT_RESUMABLE if self._resumable else harpd.Phase.SENT
            line = self._context.encode_start(self.job, self._arguments, host, support)
            self._starts.on_connected(self.job.host)
            self._no_start_pending.clear()
            if self._connect_seconds is None:
                self._connect_seconds = round(time.monotonic() - self._created_at, 6)
        self._conn = conn
        self._phase = RunPhase.SENT
        self._stop_sent = False
        self._deadlines.on_request_sent(reattach=self.outage is not None)
        conn.find_pause = self._context.store.find_pause
        conn.send_request(line, exchange, self, self._arguments.texts)
        self._set_timer(self._deadlines.next_deadline(self.has_ended))

    def _unknown_host(self) -> Failed:
        return Failed("unknown_host", f"the hosts registry has no host {self.job.host}")

    def _start_at_next_instance(self) -> None:
        """Start the call in the current supervisor, after ``wrong_instance``: the host has started no call."""
        self._context.capabilities.invalidate(self._connected_host)
        self._wrong_instances += 1
        if self._wrong_instances == _MAX_STARTS:
            message = f"{describe_host(self._connected_host)}: its supervisor was restarted at every start"
            self._fail_start(Failed("network_error", message))
            return
        self._phase = RunPhase.CONNECTING
        self._disconnect()
        self._connect()

    def _fail_start(self, error: Failed) -> None:
        """Queue the job again after a start that certainly did not happen; end it if `start_within` has expired."""
        self._starts.record_failure(self.job, error, self._created_at)
        if self.has_ended or self._starts.has_waited(self.job):
            self._finish(_Outcome(error))
            return
        reason = {"error": error.type[:_MAX_LOGGED], "reason": error.message[:_MAX_LOGGED]}
        log.info("start failed; job queued again", extra={**self._log_fields, **reason})
        self._requeue()

    def _requeue(self) -> None:
        """Queue the job again, because its start certainly did not happen."""
        self._disconnect()
        self._phase = RunPhase.ENDING
        context, tried = self._context, self._context.wall() - (time.monotonic() - self._created_at)

        def write() -> Awaitable[bool]:
            context.request_claim()
            return context.store.requeue_job(self.job.id, tried)

        def on_done(requeued: bool) -> None:
            self._no_start_pending.set()
            if requeued:
                self._close("job queued again")
            else:  # it was cancelled before this write
                self.has_ended = True
                self._finish(_Outcome(None))

        context.writes.retry_until_stored(self.job.id, write, on_done, self._fail)

    @property
    def _connected_host(self) -> Host:
        """The host, after the first connection to it."""
        assert self._host is not None
        return self._host

    @_event
    def on_records(self, records: list[bytes]) -> None:
        """See `Receiver`."""
        if self._phase is not RunPhase.RUNNING:
            return
        self._deadlines.on_record()
        self._records.add_records(records, self._context.wall() if self._record_time is None else self._record_time)
        if self._records.closed:
            self._on_records_stored(self._records.count)
        elif self._records.is_exceeded or self._records.is_full(self._terms is not None):
            assert self._conn is not None
            self._conn.pause_reading()
            if self._records.is_exceeded:
                self._records.when_empty(self._end_at_record_limit)

    @_event
    def on_message(self, message: harpd.Message) -> None:
        """See `Receiver`."""
        if self._phase is RunPhase.ENDING:
            return
        self._deadlines.on_message()
        match message:
            case harpd.RecordTime(made_at):
                self._record_time = made_at
            case harpd.Acknowledgement(_, terms):
                self._on_acknowledged(terms)
            case harpd.ExitInfo(data):
                self._exit_info = Raw(data)
            case harpd.StopReport(data):
                self._stop_report = Raw(data)
                if self._phase is RunPhase.SURVIVORS:
                    self._store_call_end(None)
            case Failed() if self._phase is RunPhase.SENT:
                self._on_refused(message)
            case Returned() | Raised() | Failed():
                self._on_end(self._record_limit() if self._exceeds_bytes(message) else message)

    def _on_end(self, end: Returned | Raised | Failed) -> None:
        if self._terms is None:
            self._finish(_Outcome(end, StopState.UNKNOWN))
        else:
            self._phase = RunPhase.STORING_END
            self._records.when_empty(partial(self._store_call_end, end))

    def _exceeds_bytes(self, end: Returned | Raised | Failed) -> bool:
        """Return whether the records of the job, and the value of this end, exceed their limit."""
        value = end.result if isinstance(end, Returned) else end.data
        size = len(value) if isinstance(value, bytes) else 0
        return self._records.is_exceeded or self._records.size + size > self._records.max_bytes

    def _end_at_record_limit(self) -> None:
        self._end_job(self._record_limit(), "limit", self._records.next_number)

    def _record_limit(self) -> Failed:
        limit = self._records.max_bytes
        of_rule = " of its access rule" if limit < self._context.config.max_record_bytes else ""
        what = "the records and the result of the job exceed max_record_bytes"
        return Failed("record_limit", f"{what}{of_rule} ({limit} bytes)")

    def _on_acknowledged(self, terms: harpd.GrantedTerms | None) -> None:
        conn = self._conn
        assert conn is not None
        self._phase = RunPhase.RUNNING
        self._no_start_pending.set()
        self._starts.on_reply(self.job.host, self._created_at)
        self._deadlines.on_acknowledged(None if terms is None else terms.elapsed)
        self._terms = terms
        if terms is not None:
            conn.start_heartbeat(terms.elapsed, terms.disconnect_timeout, at_once=self.outage is not None)
            if self.outage is not None:
                self._job_started_at = time.monotonic() - terms.elapsed
                log.info("outage ended", extra={**self._log_fields, "attempts": self.outage.attempts})
                self.outage = None
                self._context.on_outage(self.job.id)
            if self._records.count and not self._records.closed:
                # The host may not have received the last acknowledgements; a call with a full spool waits for them.
                conn.send_command(harpd.Ack(self._records.count))
        elif self._resumable:  # the host was downgraded to a legacy harpd
            self._resumable = False
            self._context.capabilities.set_legacy(self._connected_host)
        self._check_records()
        self._continue()

    def _on_refused(self, error: Failed) -> None:
        """Handle an error that the host sent instead of the acknowledgement."""
        self._no_start_pending.set()
        where = describe_host(self._connected_host)
        if self.outage is None:
            if self._resumable and error.type == "wrong_instance":
                self._start_at_next_instance()
            elif is_refusal(error):
                self._fail_start(error)
            else:
                self._starts.on_reply(self.job.host, self._created_at)
                self._finish(_Outcome(error))
        elif error.type == "no_such_call":
            message = f"{where} does not have the job's call: it was never started, or its end was lost"
            end = Failed("missing_result", f"{message}; outage {self.outage.describe()}")
            self._finish(_Outcome(end, stop_report=Raw(b'{"known":false}')))
        elif error.type == "records_gone":
            self._on_records_gone(error, where)
        else:
            self._lose_contact(f"{where}: {error.type}: {error.message}")

    def _on_records_gone(self, error: Failed, where: str) -> None:
        """End the job: the host has deleted records that are not stored, as after a restored backup."""
        message = f"{where}: records of the job are lost from number {self._records.next_number} on"
        try:
            end_of_records = parse_end_of_records(error)
        except ProtocolError as invalid:
            self._lose_contact(to_failed(invalid, self._connected_host, "attaching").message)
            return
        self._begin_outage(message)
        self._end_job(Failed("missing_result", message), "records_gone", end_of_records)

    def _store_call_end(self, end: End | None) -> None:
        """Store the end of a resumable call; with `end` None, only a later state of its stop."""
        self._phase = RunPhase.STORING_END
        report = self._stop_report
        survives = report is not None and bool(harpd.StopReport(report).survivors)
        stop = StopState.FAILED if survives else StopState.CONFIRMED
        outcome = _Outcome(end, stop, was_stopped=report is not None, keep_slot=survives)
        self._store(outcome, partial(self._on_call_end_stored, report, survives))

    def _on_call_end_stored(self, report: Raw | None, survives: bool) -> None:
        if self._phase is not RunPhase.STORING_END:
            return
        if not survives:
            conn, self._conn = self._conn, None
            if conn is not None:
                conn.finish_request(_RELEASE)
                self._context.connections.put(self._connected_host, self._context.tls, conn)
            self._close()
            return
        log.error("processes survive on host", extra=self._log_fields)
        if self._stop_report is not report:  # the host sent another report during the write
            self._store_call_end(None)
        elif self._conn is None:
            self._lose_contact("the connection broke after the end of the call")
        else:
            self._phase = RunPhase.SURVIVORS
            self._detach_if_possible()

    @_event
    def on_disconnect(self, error: Exception | None) -> None:
        """See `Receiver`."""
        conn = self._conn
        assert conn is not None
        if self._phase in (RunPhase.STORING_END, RunPhase.ENDING):
            self._conn = None
            return
        if error is None:
            message = f"{describe_host(self._connected_host)}: it closed the connection {conn.describe_state()}"
            end = Failed("network_error", message)
        else:
            end = to_failed(error, self._connected_host, conn.phase_text)
        if not self._resumable:
            self._finish(_Outcome(end, StopState.UNKNOWN))
        elif isinstance(error, (ProtocolError, LineTooLong)) and self._phase is not RunPhase.SENT:
            # Another attach to receive the records would repeat the error.
            self._begin_outage(end.message)
            message = f"{end.message} (expected record {self._records.next_number})"
            self._end_job(Failed(end.type, message), "protocol_error", PAST_END)
        else:
            self._lose_contact(end.message)

    @_event
    def _on_timer(self) -> None:
        self._timer = None
        match self._phase:
            case RunPhase.CONNECTING | RunPhase.OUTAGE:
                if self.outage is not None and self._opening is not None:
                    self.outage.record_error(self.outage.error or "connecting took too long")
                self._disconnect()
                self._connect()
            case RunPhase.SENT | RunPhase.RUNNING:
                self._check_limits()

    def _check_limits(self) -> None:
        conn = self._conn
        if self._context.writes.failed_within(MARGIN):
            self._deadlines.postpone()  # records that arrived in time may not be stored yet
        if conn is not None and conn.is_paused:
            self._set_timer(time.monotonic() + _RECHECK)
            return
        end = self._deadlines.expired(describe_host(self._connected_host), self.has_ended)
        if end is None:
            self._watch_limits()
        elif self._phase is RunPhase.SENT and self._resumable and end.type != "timeout":
            self._lose_contact(end.message)  # the reply to the attach shows whether the call has started
        else:
            self._end_job(end, "limit")

    def _end_job(self, end: Failed, why: str, next_record: int | None = None) -> None:
        """Store an end of the job, then stop its call. Records from number `next_record` are discarded."""
        if self._ending_job:
            return
        self._ending_job = True
        store = partial(self._store_job_end, end, harpd.StopCall(why, "dispatcher"), next_record)
        if next_record is None:
            store()
        else:
            self._records.when_empty(store)  # after the received records

    @_event
    def _store_job_end(self, end: Failed, command: harpd.StopCall, next_record: int | None) -> None:
        if next_record is not None:
            self._records.close(next_record)
        if self.has_ended:
            self._on_job_ended(command)
        else:
            stop_request = dumps({"why": command.why, "by": command.by, "at": self._context.wall()})
            outcome = _Outcome(end, StopState.PENDING, was_stopped=True, keep_slot=True, stop_request=stop_request)
            self._store(outcome, partial(self._on_job_ended, command))

    def _on_job_ended(self, command: harpd.StopCall) -> None:
        self._ending_job = False
        self._stop_command = self._stop_command or command
        if self._phase is RunPhase.OUTAGE:
            self._connect_later()
            return
        if self._records.closed:  # it may have waited for this
            self._on_records_stored(self._records.count)
        self._continue()

    @_event
    def _continue(self) -> None:
        """Check the limits; stop the call or detach from it, if requested and possible now."""
        if self._phase in (RunPhase.SENT, RunPhase.RUNNING):
            self._watch_limits()
        self._apply_stop()
        self._detach_if_possible()

    def _apply_stop(self) -> None:
        """Stop the call, if requested and possible now."""
        if self._stop_command is None:
            return
        match self._phase:
            case RunPhase.CONNECTING:
                self._disconnect()
                self._connect()  # ends the run, because the job has ended
            case RunPhase.SENT | RunPhase.RUNNING if not self._resumable:
                self._finish(_Outcome(None, StopState.UNKNOWN))  # closing the connection stops the call
            case RunPhase.RUNNING if self._conn is not None and not self._stop_sent:
                self._stop_sent = True
                self._conn.send_command(self._stop_command)
            case RunPhase.OUTAGE if self._opening is None:
                self._connect()

    def _detach_if_possible(self) -> None:
        if not self._detaching or self._ending_job:
            return
        match self._phase:
            case RunPhase.CONNECTING:
                self._requeue()  # the next dispatcher starts it
            case RunPhase.RUNNING if self._terms is None:
                self._finish(_Outcome(_DISPATCHER_STOPPED, StopState.UNKNOWN, was_stopped=True))
            case RunPhase.RUNNING | RunPhase.SURVIVORS | RunPhase.OUTAGE:
                self._close("call detached")

    def _begin_outage(self, error: str) -> None:
        """Close the connection; the caller attaches again later."""
        if self.outage is None:
            now = time.monotonic()
            received_at = self._conn.last_received_at if self._conn is not None else now
            self.outage = Outage.started_ago(now - received_at, self._context.wall())
            log.warning("outage began", extra={**self._log_fields, "reason": error})
            self._context.on_outage(self.job.id)
            self._starts.on_contact_lost(self.job, error, self._created_at)
            if self._host is not None:
                self._context.capabilities.invalidate(self._host)
        self.outage.record_error(error)
        self._disconnect()
        self._phase = RunPhase.OUTAGE
        self._no_start_pending.set()

    def _lose_contact(self, error: str) -> None:
        self._begin_outage(error)
        self._connect_later()

    @_event
    def _on_size_read(self, details: JobDetails) -> None:
        self._records.size += details.record_bytes
        if self._phase is RunPhase.OUTAGE and self._opening is None:
            self._connect()

    def _on_stop_request_read(self, details: JobDetails) -> None:
        stop_request = details.metadata.stop_request
        stopped = loads(stop_request) if stop_request else {}
        self._stop_command = harpd.StopCall(str(stopped.get("why", "cancelled")), stopped.get("by"))
        if self._phase is RunPhase.OUTAGE:
            self._connect()

    def _connect_later(self) -> None:
        """Attach to the call, after a delay if the last attempt failed."""
        self._detach_if_possible()
        if self._phase is not RunPhase.OUTAGE:
            return
        assert self.outage is not None
        if delay := self._backoff.next_delay():
            self._set_timer(min(time.monotonic() + delay, self.outage.deadline(self._host_timeout())))
        else:
            self._connect()

    def _host_timeout(self) -> float:
        """Return after how many seconds of an outage the host has certainly stopped the call."""
        terms, after = self._terms, self._context.config.host_timeout
        return after if terms is None else max(after, terms.disconnect_timeout + 2 * terms.kill_grace + 5.0)

    def _declare_host_lost(self, outage: Outage) -> None:
        """Store that the host is lost as the job's end, or as the outcome of its stop; release the slot."""
        if self._host is None:  # reported only now: the call of a host that was removed may still be running
            end = self._unknown_host()
        else:
            message = f"host {self.job.host} could not be reached for {self._host_timeout():g} s, {outage.describe()}"
            end = Failed("host_lost", message, dumps(outage.as_json()))
        report = dumps({"host_lost": outage.as_json()})
        self._finish(_Outcome(end, StopState.FAILED, was_stopped=True, stop_report=report))

    # The end of the job.

    def _finish(self, outcome: _Outcome) -> None:
        """Store the outcome of a job whose call has ended or was never started, then close the run."""
        self._phase = RunPhase.ENDING
        self._no_start_pending.set()
        self._records.when_empty(partial(self._store, outcome, self._close))

    def _fail(self, error: Exception) -> None:
        """End the job after an internal error; if the call may be running, the next dispatcher recovers its slot."""
        if self._phase is RunPhase.CLOSED:
            return
        log.error("call failed: internal error", exc_info=error, extra=self._log_fields)
        if self._has_failed:
            self._close()  # the next start of the dispatcher recovers this job
            return
        self._has_failed = True
        may_run = self._phase is not RunPhase.CONNECTING
        stop = StopState.FAILED if may_run else StopState.CONFIRMED  # not pending: no further run handles it
        self._disconnect()
        self._phase = RunPhase.ENDING
        self._store(_Outcome(_INTERNAL_ERROR, stop, was_stopped=may_run, keep_slot=may_run), self._close)

    @_event
    def _on_records_stored(self, count: int) -> None:
        conn = self._conn
        if not self._records.closed:
            self._backoff.reset()
        if conn is None or self._phase is RunPhase.ENDING or not self.is_acknowledged:
            return
        if self._terms is not None:
            conn.send_command(harpd.Ack(count))
        self._check_records()
        if conn.is_paused and self._records.is_empty:
            self._deadlines.on_message()
            conn.resume_reading()

    def _check_records(self) -> None:
        """End a job whose records cannot be stored because of an internal error; a cancelled job has ended."""
        if self._records.closed and not self.has_ended:
            self._end_job(_INTERNAL_ERROR, "internal_error")

    def _close(self, event: str = "call ended") -> None:
        if self._phase is not RunPhase.CLOSED:
            self.abandon()
            seconds = round(time.monotonic() - self._job_started_at, 3)
            log.info(event, extra={**self._log_fields, **self._end_fields, "seconds": seconds})
            self._on_closed(self)

    def _store(self, outcome: _Outcome, on_stored: Callable[[], None]) -> None:
        """Store the end of the job, or only the outcome of its stop if it has ended; then call `on_stored`."""
        context, job_id, write_started_at = self._context, self.job.id, time.monotonic()
        end = None if self.has_ended else outcome.end
        report = (outcome.stop_report if end is None else None) or self._stop_report
        metadata = JobMetadata(dumps(self.describe_call()), outcome.stop_request, report, self._exit_info)

        def write() -> Awaitable[bool]:
            context.request_claim()
            store, keep_slot = context.store, outcome.keep_slot
            if end is None:
                return store.finalize_stop(job_id, outcome.stop, keep_slot=keep_slot, metadata=metadata)
            stop, now = outcome.stop if outcome.was_stopped else None, context.wall()
            return store.finish_job(job_id, end, now, stop=stop, keep_slot=keep_slot, metadata=metadata)

        def on_done(stored: bool) -> None:
            self.has_ended = True
            if end is None:
                self._end_fields = {**(self._end_fields or {"end": "cancelled"}), "stop": outcome.stop.value}
            elif stored:
                if context.metrics is not None:
                    ended = context.wall() - (time.monotonic() - write_started_at)
                    of_call = self._connect_seconds, self._exit_info
                    context.metrics.record_end(self.job, ended, write_started_at, *of_call)
                    if context.tls.connects is not None:
                        context.tls.connects.record_call(self.job, ended, self._exit_info)
                by = "host" if self._stop_report is not None else None
                context.audit.report_end(job_id, self.job, end, "dispatcher" if outcome.stop_request else by)
                self._end_fields = {"end": state_of(end).value}
                if isinstance(end, (Failed, Raised)):
                    self._end_fields |= {"error": end.type[:_MAX_LOGGED], "reason": end.message[:_MAX_LOGGED]}
            context.notifier.publish_end(job_id, end if stored else None)
            if end is None or stored or outcome.stop is StopState.PENDING:
                on_stored()
            else:
                self._store(outcome, on_stored)

        context.writes.retry_until_stored(job_id, write, on_done, self._fail)

    def _disconnect(self) -> None:
        self._set_timer(None)
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.cancel()
        conn, self._conn = self._conn, None
        if conn is not None:
            conn.abort()

    def _watch_limits(self) -> None:
        """Set the timer to the next limit, unless it expires earlier."""
        when = self._deadlines.next_deadline(self.has_ended)
        if when is not None and (self._timer is None or when < self._timer_at):
            self._set_timer(when)

    def _set_timer(self, when: float | None) -> None:
        """Call `_on_timer` at a monotonic time, instead of the previous time; with None, do not call it."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if when is not None:
            self._timer_at = when
            self._timer = self._context.timers.call_later(when - time.monotonic(), self._on_timer)
