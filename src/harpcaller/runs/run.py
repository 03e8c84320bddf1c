"""One job, one call on a host: start it once, store its records, reattach after outages, store its end.

Theory of operation. A `Run` lives as long as its job holds its slot. It is a state object: the connection, the store,
the timers and the dispatcher call its methods, which change the state and return; it has no task. Its phases:

    CONNECTING -> SENT -> RUNNING -> ENDING -> CLOSED
                  SENT or RUNNING -> OUTAGE -> SENT, with an attach

It starts the call, processes the host's messages and attaches to the call again after an outage, until the host
reports the end or counts as lost. All that it holds is a cache of rows that this dispatcher owns: the next dispatcher
continues from the store and the hosts.

A call is *resumable* if the host's harpd supports it (`harpcaller.hosts.capabilities`). Otherwise it is
*connection-bound*, as on a legacy harpd: closing the connection stops it without confirmation, and a lost connection
ends the job.

At most once: the request is written a single time, in the same step as the last check that the job was not cancelled.
It is written again only after the host has reported that the start did not happen: because it named another instance
(``wrong_instance``), or arrived too late. If the connection breaks before the acknowledgement, the run attaches: a host
that does not hold the call keeps a tombstone for its id from then on.

After a protocol error the host's messages are ignored, except the stop report. The run attaches once more, past the
last record, only to stop the call.

A cancel or a limit that stops a call stores the job's end first. The stop command is sent when the host can be
reached, and the stop report is stored when it is received. The first stored end wins, so writes of one job may overlap.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec

from harp.protocol.ends import End, Failed
from harp.protocol.fields import ProtocolError
from harp.protocol.harpd import (
    Ack,
    Acknowledgement,
    ExitInfo,
    GrantedTerms,
    Message,
    Phase,
    RecordTime,
    Release,
    StopCall,
    StopReport,
)
from harp.protocol.json_text import Raw, dumps, loads
from harp.protocol.lines import LineTooLong
from harp_daemon.backoff import Backoff
from harp_daemon.timer_wheel import Timer
from harpcaller.hosts.capabilities import LEGACY, HostSupport
from harpcaller.hosts.connecting import CONNECTION_ERRORS, describe_host, open_connection, to_failed
from harpcaller.hosts.connection import PAST_END, HarpdConnection, get_error_detail, parse_end_of_records
from harpcaller.hosts.inventory import Host
from harpcaller.model.jobs import Job, JobDetails, StopState
from harpcaller.runs.context import RunContext, log_fields
from harpcaller.runs.deadlines import MARGIN, Deadlines
from harpcaller.runs.outage import Outage
from harpcaller.runs.outcome_writer import OutcomeWriter
from harpcaller.runs.record_writer import RecordWriter

log = logging.getLogger(__name__)

P = ParamSpec("P")

#: Seconds between two attempts to attach to a call, or to start one that was delayed: the first delay, and the longest.
_MIN_DELAY, _MAX_DELAY = 0.2, 5.0

#: Maximum seconds that a cancel waits for the reply to a sent request.
_CANCEL_WAIT = 2.0

#: Maximum number of starts, if the host reports that the earlier ones named another instance.
_MAX_STARTS = 3

#: Seconds until the limits are checked again while the host is not read.
_RECHECK = 1.0

_DISPATCHER_STOPPED = Failed(
    "missing_result", "the dispatcher stopped while the job was running; the end of its call is not known"
)
_INTERNAL_ERROR = Failed("internal_error", "internal error of the dispatcher; see its log")


class RunPhase(Enum):
    """The phase of a run."""

    CONNECTING = "the call has not been started"
    SENT = "a start or an attach was sent, and the host has not replied"
    RUNNING = "the host has acknowledged the call on the current connection"
    OUTAGE = "there is no connection; the call may be running"
    ENDING = "the last write is in progress; no other event matters"
    CLOSED = "nothing is left to do"


def _event(method: Callable[Concatenate[Run, P], None]) -> Callable[Concatenate[Run, P], None]:
    """Return a method for an event: an internal error in it ends the job, and no other."""

    @wraps(method)
    def guarded(self: Run, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - logged there
            self.fail_internally(error)

    return guarded


class Run:
    """The call of one job that holds a slot. It is a `harpcaller.hosts.connection.Receiver`.

    Args:
        job: the job.
        context: its environment.
        on_closed: called when nothing is left to do: the end is stored, or the call was left to the next dispatcher.
        recovered: whether an earlier dispatcher may have started the call.
    """

    def __init__(
        self, job: Job, context: RunContext, on_closed: Callable[[Run], None], recovered: bool = False
    ) -> None:
        self.job = job
        self._context = context
        self._on_closed = on_closed
        self._recovered = recovered
        self._began_at = time.monotonic()
        self._phase = RunPhase.CONNECTING
        self._records = RecordWriter(job, context, self._on_records_stored)
        self._outcome = OutcomeWriter(job, context, self.describe_call, self.fail_internally)
        self._deadlines = Deadlines(job, context.config.acknowledgement_timeout)
        self._backoff = Backoff(_MIN_DELAY, _MAX_DELAY)
        self._timer: Timer | None = None
        self._timer_at = 0.0  # monotonic time
        self._opening: asyncio.Task[tuple[HarpdConnection | None, HostSupport]] | None = None
        self._conn: HarpdConnection | None = None
        self._host: Host | None = None
        self._terms: GrantedTerms | None = None
        self._request_sent = False
        self._resumable = False  # whether the last request was for a resumable call
        self._answered = asyncio.Event()  # the host has replied, an outage has begun or the run has ended
        self._stop_command: StopCall | None = None
        self._stop_sent = False  # on the current connection
        self._detaching = False
        self._ending_job = False  # an end is being stored, and the call is to be stopped after that
        self._call_ended = False  # the closing line was received, on the current connection
        self._storing_call_end = False
        self._has_failed = False
        self._wrong_instances = 0
        self._attempts = 0
        #: The current outage; None if there is none.
        self.outage: Outage | None = None
        self._record_time: float | None = None

    # Requests to the run.

    @_event
    def start(self) -> None:
        """Start the call, or attach to the call that an earlier dispatcher has started."""
        log.info("call recovered" if self._recovered else "call started", extra=log_fields(self.job))
        if self._recovered:
            self._recover()
            return
        self._host = self._context.find_host(self.job.host)
        if self._host is None:
            self._finish(Failed("unknown_host", f"the hosts registry has no host {self.job.host}"))
        else:
            self._connect()

    async def cancel_call(self, by: str | None) -> None:
        """Stop the call of a job that this client cancelled in the store. It is not started after this returns."""
        self._outcome.has_ended = True
        if self._request_sent:
            try:
                async with asyncio.timeout(_CANCEL_WAIT):
                    await self._answered.wait()
            except TimeoutError:
                log.warning("host has not acknowledged cancelled call", extra=log_fields(self.job))
        self._stop(StopCall("cancelled", by))

    def cancel_before_start(self) -> None:
        """Mark the job as cancelled before `start`: its call is not started, or stopped if it was recovered."""
        self._outcome.has_ended = True
        self._stop_command = StopCall("cancelled")

    @property
    def has_ended(self) -> bool:
        """Whether the job has ended: this run has stored its end, or has found or was notified of another end."""
        return self._outcome.has_ended

    @_event
    def detach(self) -> None:
        """Leave a resumable call to its host, for the next dispatcher; end a connection-bound one.

        A call whose request is being sent is left when the host has replied. A write in progress is completed.
        """
        self._detaching = True
        self._detach_if_possible()

    def abandon(self) -> None:
        """Do nothing more. Writes that have begun may still be completed."""
        self._leave()
        self._records.abandon()
        self._phase = RunPhase.CLOSED

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

    def _connect(self) -> None:
        """Start the call on an idle connection, or open one first."""
        host, context = self._host, self._context
        assert host is not None
        if self._outcome.has_ended or time.monotonic() >= self._deadlines.deadline:
            self._finish_unsent()
            return
        self._attempts += 1
        support = context.capabilities.get_known(host) if context.config.resumable_calls else LEGACY
        conn = None if support is None else context.connections.get(host, context.tls)
        if support is not None and conn is not None:
            self._send_start(conn, host, support)
        else:
            self._open(host, self._deadlines.deadline)

    def _open(self, host: Host, deadline: float) -> None:
        """Open a connection in a task, which is cancelled at the monotonic time `deadline`."""
        self._opening = asyncio.create_task(self._open_connection(host))
        self._opening.add_done_callback(self._on_opened)
        self._context.openings.add(self._opening)
        self._opening.add_done_callback(self._context.openings.discard)
        self._set_timer(deadline)

    async def _open_connection(self, host: Host) -> tuple[HarpdConnection | None, HostSupport]:
        """Return a connection, and what the host supports; no connection if that excludes an attach."""
        context, support = self._context, LEGACY
        if self._phase is RunPhase.OUTAGE or context.config.resumable_calls:
            support = await context.capabilities.get(host, context.tls, context.config)
        if self._phase is RunPhase.OUTAGE and support.instance is None and self._terms is None:
            return None, support
        return await open_connection(host, context.tls, context.config, context.timers), support

    @_event
    def _on_opened(self, opening: asyncio.Task[tuple[HarpdConnection | None, HostSupport]]) -> None:
        if opening.cancelled():
            return
        error = opening.exception()
        conn, support = (None, LEGACY) if error is not None else opening.result()
        if opening is not self._opening:  # the run has given it up
            if conn is not None:
                conn.abort()
            return
        self._opening = None
        host = self._host
        assert host is not None
        if error is not None:
            self._on_unreachable(error, host)
        elif self._phase is RunPhase.CONNECTING:
            assert conn is not None
            self._send_start(conn, host, support)
        elif conn is None:
            self._on_legacy_host(host)
        else:
            line = self._context.encode_attach(self.job.id, host, self._records.next_number)
            self._send(conn, line, Phase.SENT_ATTACH)

    def _on_unreachable(self, error: BaseException, host: Host) -> None:
        if not isinstance(error, CONNECTION_ERRORS):
            raise error
        end = to_failed(error, host, "connecting")
        if self.outage is None:
            self._finish(end)
        else:
            self.outage.record_error(f"{end.type}: {end.message}")
            self._reattach_later()

    def _send_start(self, conn: HarpdConnection, host: Host, support: HostSupport) -> None:
        if self._outcome.has_ended:
            conn.abort()
            self._finish_unsent()
            return
        line = self._context.encode_start(self.job, host, support)
        self._request_sent, self._resumable = True, support.instance is not None
        self._answered.clear()
        self._send(conn, line, Phase.SENT_RESUMABLE if self._resumable else Phase.SENT)

    def _send(self, conn: HarpdConnection, line: bytes, exchange: Phase) -> None:
        self._conn = conn
        self._phase = RunPhase.SENT
        self._stop_sent = self._call_ended = False
        self._deadlines.on_request_sent(reattach=self.outage is not None)
        conn.send_request(line, exchange, self)
        self._set_timer(None)
        self._watch_limits()

    def _finish_unsent(self) -> None:
        self._finish(self._deadlines.max_exec_time_error(), stop_of_ended=StopState.CONFIRMED)

    def _start_again(self, error: Failed) -> bool:
        """Start a refused call again; return False if the host may have started it, or would refuse it again."""
        if error.type == "wrong_instance":
            assert self._host is not None
            self._context.capabilities.invalidate(self._host)
            self._wrong_instances += 1
            if self._wrong_instances == _MAX_STARTS:
                message = f"{describe_host(self._host)}: its supervisor was restarted at every start"
                self._finish(Failed("network_error", message))
                return True
        elif not _was_delayed(error):
            return False
        # The call does not run, so a cancel or an internal error has nothing to stop.
        self._request_sent = False
        self._phase = RunPhase.CONNECTING
        self._leave()
        if error.type == "wrong_instance":
            self._connect()
        else:  # the host, or the way to it, was suspended
            self._backoff.record_attempt()
            self._set_timer(min(time.monotonic() + self._backoff.next_delay(), self._deadlines.deadline))
        return True

    # Messages of the host.

    @_event
    def on_records(self, records: list[Raw]) -> None:
        """See `Receiver`."""
        if self._phase is not RunPhase.RUNNING or self._call_ended:
            return
        self._deadlines.on_message()
        self._deadlines.on_record()
        self._records.add_records(records, self._context.wall() if self._record_time is None else self._record_time)
        if self._records.closed:
            self._on_records_stored(self._records.count)
        elif self._records.over_soft_limit if self._terms is None else self._records.over_hard_limit:
            assert self._conn is not None
            self._conn.pause_reading()

    @_event
    def on_message(self, message: Message) -> None:
        """See `Receiver`."""
        if self._phase not in (RunPhase.SENT, RunPhase.RUNNING):
            return
        self._deadlines.on_message()
        match message:
            case RecordTime(made_at):
                self._record_time = made_at
            case Acknowledgement(_, terms):
                self._on_acknowledged(terms)
            case ExitInfo(data):
                self._outcome.exit_info = Raw(data)
            case StopReport(data):
                self._outcome.stop_report = Raw(data)
                if self._call_ended and not self._storing_call_end:
                    self._store_call_end(None)
            case Failed() if self._phase is RunPhase.SENT:
                self._on_refused(message)
            case _ if isinstance(message, End) and not self._call_ended:
                self._on_call_ended(message)

    def _on_acknowledged(self, terms: GrantedTerms | None) -> None:
        conn = self._conn
        assert conn is not None
        self._phase = RunPhase.RUNNING
        self._answered.set()
        self._deadlines.on_acknowledged(None if terms is None else terms.elapsed)
        self._terms = terms
        if terms is None and self._resumable:  # the host was downgraded to a legacy harpd
            assert self._host is not None
            self._resumable = False
            self._context.capabilities.set_legacy(self._host)
        if terms is not None:
            again = self.outage is not None
            if self.outage is not None:
                outage, self.outage = self.outage, None
                log.info("outage ended", extra={**log_fields(self.job), "attempts": outage.attempts})
            conn.start_heartbeat(terms.elapsed, terms.disconnect_timeout, at_once=again)
        self._watch_limits()
        self._check_records()
        self._apply_stop()
        self._detach_if_possible()

    def _on_refused(self, error: Failed) -> None:
        """Handle an error instead of the acknowledgement."""
        self._answered.set()
        host = self._host
        assert host is not None
        if self.outage is None:
            if not (self._resumable and self._start_again(error)):
                self._finish(error)
        elif error.type == "no_such_call":
            self._on_unknown_call(host)
        elif error.type == "records_gone":
            self._on_records_gone(error, host)
        else:
            self._lose_contact(f"{describe_host(host)}: {error.type}: {error.message}")

    def _on_call_ended(self, end: End) -> None:
        """Handle the closing line."""
        if self._terms is None:
            self._finish(end)
            return
        self._call_ended = self._storing_call_end = True
        self._records.when_empty(lambda: self._store_call_end(end))

    def _store_call_end(self, end: End | None) -> None:
        """Store the end of a call, or with None only a later state of its stop."""
        self._storing_call_end = True
        report = self._outcome.stop_report
        survives = report is not None and bool(StopReport(report).survivors)
        stop = StopState.FAILED if survives else StopState.CONFIRMED
        on_stored = partial(self._on_call_end_stored, report, survives)
        self._outcome.store_outcome(end, on_stored, None if report is None else stop, stop, survives)

    def _on_call_end_stored(self, report: Raw | None, survives: bool) -> None:
        self._storing_call_end = False
        if self._phase is RunPhase.CLOSED:
            return
        if not survives:
            self._release()
            return
        log.error("processes survive on host", extra=log_fields(self.job))
        if self._outcome.stop_report is not report:  # another one was received meanwhile
            self._store_call_end(None)
        elif self._conn is None:
            self._lose_contact("the connection broke after the end of the call")
        else:
            self._detach_if_possible()

    def _release(self) -> None:
        """Release the call on its host, and keep the connection for the next one."""
        conn, self._conn = self._conn, None
        if conn is not None and self._host is not None:
            conn.finish_request(Release())
            self._context.connections.put(self._host, self._context.tls, conn)
        self._close()

    # The end of a connection.

    @_event
    def on_disconnect(self, error: Exception | None) -> None:
        """See `Receiver`."""
        if self._phase not in (RunPhase.SENT, RunPhase.RUNNING):
            return
        conn, host = self._conn, self._host
        assert conn is not None
        assert host is not None
        if self._storing_call_end:
            self._conn = None
        elif isinstance(error, (ProtocolError, LineTooLong)):
            self._on_protocol_error(to_failed(error, host, conn.phase_text))
        elif error is None:
            message = f"{describe_host(host)}: it closed the connection {conn.describe_state()}"
            self._on_lost_connection(Failed("network_error", message))
        else:
            self._on_lost_connection(to_failed(error, host, conn.phase_text))

    def _on_lost_connection(self, end: Failed) -> None:
        if self._resumable:
            self._lose_contact(end.message)
        else:
            self._finish(end, stop_of_ended=StopState.UNKNOWN)

    def _on_protocol_error(self, end: Failed) -> None:
        """End the job after a protocol error. Reattaching would repeat the error."""
        if self._phase is RunPhase.RUNNING and self._resumable:
            self._begin_outage(end.message)
            message = f"{end.message} (expected record {self._records.next_number})"
            self._end_job(Failed(end.type, message), "protocol_error", PAST_END)
        else:
            self._on_lost_connection(end)

    # Limits.

    @_event
    def _on_timer(self) -> None:
        self._timer = None
        if self._phase is RunPhase.OUTAGE:
            assert self.outage is not None
            if self._opening is not None:
                self.outage.record_error(self.outage.error or "connecting took too long")
            self._leave()
            self._reattach()
        elif self._phase is RunPhase.CONNECTING:
            self._leave()
            self._connect()
        elif self._phase in (RunPhase.SENT, RunPhase.RUNNING):
            self._check_limits()

    def _check_limits(self) -> None:
        host, conn = self._host, self._conn
        assert host is not None
        if self._call_ended:
            return
        if self._context.writes.failed_within(MARGIN):
            self._deadlines.postpone()  # records that were received in time may not be stored yet
        if conn is not None and conn.is_paused:
            self._set_timer(time.monotonic() + _RECHECK)
            return
        end = self._deadlines.expired(describe_host(host), self._outcome.has_ended)
        if end is None:
            self._watch_limits()
        elif self._phase is RunPhase.SENT and self._resumable and end.type != "timeout":
            self._lose_contact(end.message)  # attaching will show whether the call has started
        else:
            self._end_job(end, "limit")

    def _end_job(self, end: Failed, why: str, next_record: int | None = None) -> None:
        """Store an end of the job, then stop its call.

        With `next_record`, the records received so far are stored before, and all further ones are dropped; the first
        of these has that number.
        """
        if self._ending_job:
            return
        self._ending_job = True
        store = partial(self._store_job_end, end, why, next_record)
        if next_record is None:
            store()
        else:
            self._records.when_empty(store)

    @_event
    def _store_job_end(self, end: Failed, why: str, next_record: int | None) -> None:
        on_stored = partial(self._on_job_ended, why, next_record)
        if self._outcome.has_ended:
            on_stored(True)
        else:
            stopped = dumps({"why": why, "by": "dispatcher", "at": self._context.wall()})
            self._outcome.store_end(end, on_stored, StopState.PENDING, True, stopped)

    def _on_job_ended(self, why: str, next_record: int | None, stored: bool) -> None:
        self._ending_job = False
        if next_record is not None:
            self._records.close_at(next_record)
        if stored:  # otherwise the job was cancelled, and `cancel_call` follows
            self._stop_command = self._stop_command or StopCall(why, "dispatcher")
        if self._phase is RunPhase.OUTAGE:
            self._reattach_later()
        elif self._phase in (RunPhase.SENT, RunPhase.RUNNING):
            self._watch_limits()
            self._apply_stop()
            self._detach_if_possible()

    # Stops.

    @_event
    def _stop(self, command: StopCall) -> None:
        self._stop_command = self._stop_command or command
        self._apply_stop()

    def _apply_stop(self) -> None:
        """Stop the call if that was requested and is possible now."""
        if self._stop_command is None:
            return
        match self._phase:
            case RunPhase.CONNECTING:
                self._leave()
                self._finish_unsent()
            case RunPhase.SENT | RunPhase.RUNNING if not self._resumable:
                self._answered.set()
                self._finish(None, stop_of_ended=StopState.UNKNOWN)  # closing the connection stops the call
            case RunPhase.RUNNING if self._conn is not None and not self._stop_sent:
                self._stop_sent = True
                self._conn.send_command(self._stop_command)
            case RunPhase.OUTAGE if self._opening is None:
                self._reattach()

    def _detach_if_possible(self) -> None:
        if not self._detaching or self._ending_job or self._storing_call_end:
            return
        if self._phase is RunPhase.OUTAGE or (self._phase is RunPhase.RUNNING and self._terms is not None):
            self._close("call detached")
        elif self._phase is RunPhase.RUNNING:
            self._finish(_DISPATCHER_STOPPED, StopState.UNKNOWN)

    # Outages.

    def _begin_outage(self, error: str) -> None:
        """Leave the connection; the caller attaches again later."""
        if self.outage is None:
            now = time.monotonic()
            received_at = self._conn.last_received_at if self._conn is not None else now
            self.outage = Outage.begin(now - received_at, self._context.wall())
            log.warning("outage began", extra={**log_fields(self.job), "reason": error})
            if self._host is not None:
                self._context.capabilities.invalidate(self._host)
        self.outage.record_error(error)
        self._leave()
        self._phase = RunPhase.OUTAGE
        self._answered.set()

    def _lose_contact(self, error: str) -> None:
        """Handle a connection that is of no more use; the call may be running."""
        self._begin_outage(error)
        self._reattach_later()

    def _recover(self) -> None:
        """Attach to the call of an earlier dispatcher."""
        self._phase = RunPhase.OUTAGE
        self._request_sent = self._resumable = True
        self._answered.set()
        self.outage = Outage.begin(0.0, self._context.wall())
        if self.job.end is None or self._stop_command is not None:
            self._reattach()
            return
        read = partial(self._context.store.get_details, self.job.id)
        self._context.writes.begin(self.job.id, read, self._on_stop_request_read, self.fail_internally)

    def _on_stop_request_read(self, details: JobDetails) -> None:
        stop_request = details.metadata.stop_request
        stopped = loads(stop_request) if stop_request else {}
        self._stop_command = StopCall(str(stopped.get("why", "cancelled")), stopped.get("by"))
        if self._phase is RunPhase.OUTAGE:
            self._reattach()

    def _reattach_later(self) -> None:
        """Attach to the call, after a delay if the last attempt failed."""
        self._detach_if_possible()
        if self._phase is not RunPhase.OUTAGE:
            return
        assert self.outage is not None
        if delay := self._backoff.next_delay():
            self._set_timer(min(time.monotonic() + delay, self.outage.deadline(self._host_timeout())))
        else:
            self._reattach()

    def _reattach(self) -> None:
        assert self.outage is not None
        if self._ending_job:
            return  # it is called again when the end is stored
        lost_at = self.outage.deadline(self._host_timeout())
        if time.monotonic() >= lost_at:
            self._declare_host_lost()
            return
        self._attempts += 1
        self._backoff.record_attempt()
        self.outage.attempts += 1
        self._host = self._context.find_host(self.job.host) or self._host
        if self._host is None:
            self.outage.record_error(f"the hosts registry has no host {self.job.host}")
            self._reattach_later()
        else:
            self._open(self._host, lost_at)

    def _host_timeout(self) -> float:
        """Return the seconds of an outage after which the host has certainly stopped the call."""
        terms, after = self._terms, self._context.config.host_timeout
        return after if terms is None else max(after, terms.disconnect_timeout + 2 * terms.kill_grace + 5.0)

    def _declare_host_lost(self) -> None:
        """End the job or its stop, because the host counts as lost; its slot is released."""
        assert self.outage is not None
        outage = self.outage.as_json()
        message = f"host {self.job.host} could not be reached for {self._host_timeout():g} s, {self.outage.describe()}"
        report = dumps({"host_lost": outage})
        self._finish(Failed("host_lost", message, dumps(outage)), StopState.FAILED, report_of_ended=report)

    def _on_unknown_call(self, host: Host) -> None:
        assert self.outage is not None
        message = f"{describe_host(host)} does not hold the job's call: it was never started, or its end was lost"
        end = Failed("missing_result", f"{message}; outage {self.outage.describe()}")
        self._finish(end, stop_of_ended=StopState.CONFIRMED, report_of_ended=Raw(b'{"known":false}'))

    def _on_legacy_host(self, host: Host) -> None:
        """End the job of an earlier dispatcher on a legacy harpd: the call ended with its connection."""
        message = f"the dispatcher stopped while the job was running; {describe_host(host)} cannot resume calls"
        self._finish(Failed("missing_result", message), StopState.UNKNOWN)

    def _on_records_gone(self, error: Failed, host: Host) -> None:
        """End the job: the host has deleted records that are not stored, for example after a restored backup."""
        message = f"{describe_host(host)}: records of the job are lost from number {self._records.next_number} on"
        try:
            end = parse_end_of_records(error)
        except ProtocolError as invalid:
            self._lose_contact(to_failed(invalid, host, "attaching").message)
            return
        self._begin_outage(message)
        self._end_job(Failed("missing_result", message), "records_gone", end)

    # The end of the job.

    def _finish(
        self,
        end: End | None,
        stop: StopState | None = None,
        stop_of_ended: StopState | None = None,
        report_of_ended: Raw | None = None,
    ) -> None:
        """Store the end of a job whose call has ended or was never started, and release its slot.

        The arguments are those of `OutcomeWriter.store_outcome`.
        """
        is_confirmed = self._terms is not None or not self._deadlines.acknowledged
        of_ended = stop_of_ended or stop or (StopState.CONFIRMED if is_confirmed else StopState.UNKNOWN)
        self._phase = RunPhase.ENDING
        store = partial(self._outcome.store_outcome, end, self._close, stop, of_ended, report_of_ended=report_of_ended)
        self._records.when_empty(store)

    def fail_internally(self, error: Exception) -> None:
        """End the job after an internal error.

        If the request was sent, the call may be running. The job then holds its slot until the next start of the
        dispatcher. Its stop is not pending, because no run handles it any more.
        """
        if self._phase is RunPhase.CLOSED:
            return
        log.error("call failed: internal error", exc_info=error, extra=log_fields(self.job))
        if self._has_failed:
            self._close()  # the next start of the dispatcher recovers this job
            return
        self._has_failed = True
        self._leave()
        self._phase = RunPhase.ENDING
        sent = self._request_sent
        self._outcome.store_outcome(
            _INTERNAL_ERROR,
            self._close,
            StopState.FAILED if sent else None,
            StopState.FAILED if sent else StopState.CONFIRMED,
            keep_slot=sent,
        )

    @_event
    def _on_records_stored(self, count: int) -> None:
        conn = self._conn
        if not self._records.closed:
            self._backoff.reset()
        if self._phase is not RunPhase.RUNNING or conn is None:
            return
        if self._terms is not None:
            conn.send_command(Ack(count))
        self._check_records()
        if conn.is_paused and self._records.is_empty:
            self._deadlines.on_message()
            conn.resume_reading()

    def _check_records(self) -> None:
        """End a job whose records cannot be stored: an internal error, or the job was cancelled a moment ago."""
        if self._records.closed and not self._outcome.has_ended:
            self._end_job(_INTERNAL_ERROR, "internal_error")

    def _close(self, event: str = "call ended") -> None:
        if self._phase is not RunPhase.CLOSED:
            self.abandon()
            self._answered.set()
            seconds = round(time.monotonic() - self._began_at, 3)
            log.info(event, extra={**log_fields(self.job), **self._outcome.log_fields, "seconds": seconds})
            self._on_closed(self)

    # Resources.

    def _leave(self) -> None:
        """Close the connection, or stop opening one; cancel the timer."""
        self._set_timer(None)
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.cancel()
        conn, self._conn = self._conn, None
        if conn is not None:
            conn.abort()

    def _watch_limits(self) -> None:
        """Check the limits when the next one may be exceeded; a check before that changes nothing."""
        when = self._deadlines.next_deadline(self._outcome.has_ended)
        if when is not None and (self._timer is None or when < self._timer_at):
            self._set_timer(when)

    def _set_timer(self, when: float | None) -> None:
        """Call `_on_timer` at a monotonic time; None: not at all. It replaces the earlier time."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if when is not None:
            self._timer_at = when
            self._timer = self._context.timers.call_later(when - time.monotonic(), self._on_timer)


def _was_delayed(error: Failed) -> bool:
    """Return whether the host has not started a call because the request was delayed for too long."""
    with suppress(ProtocolError):
        return error.type == "call_refused" and get_error_detail(error, "reason") == "delayed"
    return False
