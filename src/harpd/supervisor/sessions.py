"""The two kinds of session of a call: connection-bound and resumable.

Theory of operation. A connection-bound call, of a direct client or a legacy dispatcher, ends with its connection. Its
output is sent as it arrives, through a bounded buffer; while that is full, the worker waits. The channel to the
frontend is closed only when the call's processes have ended: the close proves it.

The dispatcher of a resumable call may disconnect and attach again. The records of the call go into a spool. The
attached connection receives them from the requested number on, and each acknowledgement deletes the records that the
dispatcher has stored. The end is sent once the worker has been reaped, and all stopped processes have ended or are
listed as survivors: stop report, exit info, then the closing line. So when the closing line is sent, the worker has
ended. Only the survivors in the stop report remain of the stopped processes. The dispatcher sends ``release`` when it
has stored the end.

At most a window of unacknowledged records is sent. So a dispatcher with a slow store need not stop reading, and
receives all other messages in time.

The dispatcher's heartbeat proves contact: it echoes the latest time that the dispatcher has received from this process,
so there was contact at that time. An open connection and other messages, which may have been delayed, do not count. A
running call without contact for `disconnect_timeout` seconds is stopped; the end of a call is discarded after
`result_ttl` seconds. One connection is attached at a time: a later one replaces the earlier.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from harp.protocol import harpd as messages
from harp.protocol.ends import Failed
from harp.protocol.harpd import MAX_COMMAND_BYTES, encode_message
from harp.protocol.json_text import Raw, dumps
from harp.protocol.lines import LineBuffer, LineTooLong
from harp.protocol.schema import ProtocolError
from harpd.supervisor.call import ERROR_PREFIX, CallContext, Session, StopReason
from harpd.supervisor.event_loop import Timer
from harpd.supervisor.fair_shares import Account
from harpd.supervisor.frames import END, ERROR
from harpd.supervisor.link import LinkChannel
from harpd.supervisor.spool import GUARANTEED_BYTES, Spool

log = logging.getLogger("harpd.supervisor")

#: Limits above this number of seconds are lowered: no call reaches it, and a large integer has no form as a float.
_MAX_SECONDS = 1e9
#: Seconds between two checks of a call that is being stopped, at least: its limits may be as short as a client likes.
_MIN_CHECK_INTERVAL = 1.0
#: Bytes of unacknowledged records that are sent; one record may be longer.
_WINDOW_BYTES = 1024 * 1024


@lru_cache(maxsize=128)  # the calls of a dispatcher have equal terms
def _encode_acknowledgement(streaming: bool, keep_alive: float | None, *terms: Any) -> bytes:
    granted = messages.GrantedTerms(*terms) if terms else None
    return encode_message(messages.Acknowledgement(streaming, granted, keep_alive))


class BoundSession(Session):
    """The session of a connection-bound call. Until the frontend reads, about `buffer_size` bytes may wait."""

    def __init__(
        self, channel: LinkChannel, account: Account, streaming: bool, keep_alive: float | None, buffer_size: int
    ) -> None:
        self.account = account
        self._acknowledgement = _encode_acknowledgement(streaming, keep_alive)
        self._buffer_size = buffer_size
        self._channel = channel
        channel.user = self

    @property
    def full(self) -> bool:
        return self._channel.waiting_bytes >= self._buffer_size

    def on_started(self) -> None:
        self._channel.send_soon(self._acknowledgement)

    def on_records(self, lines: bytes, count: int) -> None:
        self._channel.send(lines)

    def on_end(self, line: bytes) -> None:
        self._channel.send(line, ERROR if line.startswith(ERROR_PREFIX) else END)

    def on_closed(self, stop_report: Mapping[str, Any] | None) -> None:
        self._channel.close_after_flush()

    def on_commands(self, data: bytes) -> None:
        pass  # the frontend sends none

    def on_hang_up(self) -> None:
        self.stop(StopReason.CANCELLED)
        self.resume_reading()  # to discard the output that follows

    on_writable = Session.resume_reading


@dataclass(frozen=True, slots=True)
class SessionTerms:
    """The members of a session that a later supervisor needs to adopt it; durations are seconds."""

    owner: str = field(repr=False)  # the id of the dispatcher that owns the call
    secret: str = field(repr=False)  # a digest of the call's secret
    disconnect_timeout: float
    result_ttl: float
    timeout: float
    max_exec_time: float
    streaming: bool  # whether the procedure yields records
    user: str  # who has started the call

    @classmethod
    def decode(cls, members: Mapping[str, Any], limits: Mapping[str, Any] | None = None) -> SessionTerms:
        """Return the terms in a request, or those that `encode` has stored. Durations are lowered to `limits`.

        Raises KeyError and `ProtocolError`: a member is missing, or has a wrong type.
        """
        seconds: dict[str, float] = {}
        for key in ("disconnect_timeout", "result_ttl", "timeout", "max_exec_time"):
            number = members[key]
            if type(number) not in (int, float) or number <= 0:
                raise ProtocolError(f"{key}: expected a positive number of seconds")
            seconds[key] = float(min(number, (limits or {}).get(key, _MAX_SECONDS)))
        owner, secret, streaming = members["owner"], members["secret"], members["streaming"]
        user = members["user"]
        for text in (owner, secret, user):
            if type(text) is not str:
                raise ProtocolError("owner, secret, user: expected strings")
        if type(streaming) is not bool:
            raise ProtocolError("owner, secret, user: expected strings")
        return cls(owner, secret, **seconds, streaming=streaming, user=user)

    def encode(self) -> Raw:
        return dumps({key: getattr(self, key) for key in self.__slots__})


class ResumableSession(Session):
    """The session of a resumable call. `contact_at`: the latest loop time at which contact is proven."""

    def __init__(
        self,
        context: CallContext,
        call_id: str,
        terms: SessionTerms,
        contact_at: float,
        on_discarded: Callable[[ResumableSession], None],
    ) -> None:
        self.id = call_id
        self.terms = terms
        self.account = Account(terms.user, terms.owner)
        self.stored = terms.encode()
        self._context = context
        self._loop = context.loop
        self._quota = context.quota
        self._kill_grace = context.settings["kill_grace"]
        self._spool_size = context.settings["spool"]
        self._on_discarded = on_discarded
        self._spool = Spool()
        self._channel: LinkChannel | None = None
        self._keep_alive: float | None = None
        self._commands = LineBuffer(MAX_COMMAND_BYTES)
        self._next = 0  # the number of the record that is sent next
        self._unacknowledged = 0  # bytes that were sent on this connection
        self._heartbeat_pending = False
        self._started_at: float | None = None
        self._closing_line = b""  # before the worker has ended
        # Stop report, exit info and closing line; then, perhaps, the report of survivors that have ended.
        self._end: list[bytes] = []
        self._end_sent = 0  # how many of these were sent on this connection
        self._ended_at = 0.0
        self._adopted = False
        self._contact_at, self._last_output_at = contact_at, self._loop.now()
        self._timer: Timer | None = None  # None: the worker does not exist yet

    @property
    def full(self) -> bool:
        size = self._spool.size
        if size >= self._spool_size:
            return True
        return size >= GUARANTEED_BYTES and not self._quota.may_grow(self.account, self.resume_reading)

    def on_started(self) -> None:
        self._started_at = self._last_output_at = self._loop.now()  # the limits count from now on
        self._check()
        self._send_acknowledgement(0.0)

    def on_records(self, lines: bytes, count: int) -> None:
        self._last_output_at = self._loop.now()
        self._spool.append(lines, count, time.time())
        self._quota.reserve(self.account, len(lines))
        self._send_pending()

    def on_end(self, line: bytes) -> None:
        self._closing_line = line

    def on_exit(self, exit_info: Callable[[], Raw], stop_report: Mapping[str, Any] | None) -> None:
        closing_line, self._closing_line = self._closing_line, b""
        report = b"" if stop_report is None else encode_message(messages.StopReport(stop_report))
        self._ended_at = self._loop.now()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(self.terms.result_ttl, self._check)
        self._add_end(report + messages.encode_exit_info(exit_info()) + closing_line)

    def on_closed(self, stop_report: Mapping[str, Any] | None) -> None:
        if self._started_at is None:  # it is rejected
            if self._channel is not None:
                self._channel.send(self._closing_line)
            self.discard()
        if stop_report is not None:
            self._add_end(encode_message(messages.StopReport(stop_report)))

    def _add_end(self, lines: bytes) -> None:
        self._end.append(lines)
        self._quota.reserve(self.account, len(lines))
        self._send_pending()

    def adopt(self, stop_report: Mapping[str, Any] | None) -> None:
        """Adopt the call of a supervisor that has died. `on_closed` follows when the survivors have ended."""
        self._adopted = True
        self._started_at = self._loop.now()
        self.on_end(encode_message(Failed("call_died", "the supervisor of the call died")))
        self.on_exit(lambda: dumps({"by": "unknown", "supervisor": "died"}), stop_report)

    # The attached connection.

    def attach(self, channel: LinkChannel, since: int, keep_alive: float | None) -> Failed | None:
        """Attach a connection: send all records from number `since` on, and receive commands.

        Return the error if some of these records were deleted; then the connection is not attached.
        """
        if self._adopted:  # this supervisor does not have the earlier records
            self._spool.first = self._spool.end = since
        first, end = self._spool.first, self._spool.end
        if not first <= since <= end:
            data = {"first": first, "end": end}
            return Failed("records_gone", "some of the call's records from this number on are gone", data)
        if self._channel is not None:
            self._channel.close()
        channel.user = self
        self._channel, self._keep_alive = channel, keep_alive
        self._commands = LineBuffer(MAX_COMMAND_BYTES)
        self._next, self._unacknowledged, self._end_sent, self._heartbeat_pending = since, 0, 0, False
        self._send_acknowledgement(self._elapsed())
        self._send_pending()
        return None

    def _elapsed(self) -> float:
        return 0.0 if self._started_at is None else max(0.0, self._loop.now() - self._started_at)

    def _send_acknowledgement(self, elapsed: float) -> None:
        if self._channel is not None and self._started_at is not None:
            terms = self.terms
            limits = terms.disconnect_timeout, terms.result_ttl, self._kill_grace
            granted = self._context.instance, *limits, elapsed, self._spool.end
            self._channel.send_soon(_encode_acknowledgement(terms.streaming, self._keep_alive, *granted))

    def _send_pending(self) -> None:
        """Send all data that the attached connection has not received, while it is writable."""
        channel = self._channel
        if channel is None or self._started_at is None:
            return
        if self._heartbeat_pending and channel.writable:  # one reply to all heartbeats since the last one
            self._heartbeat_pending = False
            channel.send(encode_message(messages.Heartbeat(self._elapsed())))
        while self._next < self._spool.end and channel.writable and self._unacknowledged < _WINDOW_BYTES:
            chunk = self._spool.chunk_from(self._next)
            self._next = chunk.first + chunk.count
            self._unacknowledged += len(chunk.lines)
            channel.send(encode_message(messages.RecordTime(chunk.time)) + chunk.lines)
        while self._next == self._spool.end and self._end_sent < len(self._end):
            self._end_sent += 1
            channel.send(self._end[self._end_sent - 1])

    on_writable = _send_pending

    def on_commands(self, data: bytes) -> None:
        try:
            for line in self._commands.feed(data):
                if self._channel is not None:  # a release detaches it; further commands have no effect
                    self._handle_command(messages.decode_command(line))
        except (ProtocolError, LineTooLong) as error:
            log.error("invalid command from dispatcher", extra={"call": self.id, "reason": str(error)})
            self.on_hang_up()

    def on_hang_up(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
            log.debug("dispatcher detached from call", extra={"call": self.id})

    def _handle_command(self, command: messages.Command) -> None:
        match command:
            case messages.Ack(count):
                if count > self._spool.end:
                    raise ProtocolError(f"ack: expected at most {self._spool.end} records, got {count}")
                freed = self._spool.acknowledge(count)
                self._quota.release(self.account, freed)
                self._unacknowledged = 0 if count >= self._next else max(0, self._unacknowledged - freed)
                self._next = max(self._next, self._spool.first)  # records that were acknowledged unread were deleted
                self.resume_reading()
                self._send_pending()
            case messages.Heartbeat(elapsed):
                if elapsed > self._elapsed():
                    raise ProtocolError("heartbeat: the time is in the future")
                self._contact_at = max(self._contact_at, (self._started_at or 0) + elapsed)
                self._heartbeat_pending = True
                self._send_pending()
            case messages.StopCall(why, by):
                self.stop(StopReason.CANCELLED, why, by)
            case messages.Release():
                if not self._end:
                    raise ProtocolError("release: the call has not ended")
                self.discard()

    def _check(self) -> None:
        """Stop the call if it has reached a limit; discard its end if the dispatcher has not fetched it in time."""
        assert self._started_at is not None
        now, terms = self._loop.now(), self.terms
        if self._end:
            next_check = max(self._contact_at, self._ended_at) + terms.result_ttl
            if next_check <= now:
                log.warning("discarding unfetched end of call", extra={"call": self.id})
                self.discard()
                return
        else:
            if self.full:  # it cannot send
                self._last_output_at = now
            exec_deadline = self._started_at + terms.max_exec_time
            output_deadline = self._last_output_at + terms.timeout
            contact_deadline = self._contact_at + terms.disconnect_timeout
            next_check = min(exec_deadline, output_deadline, contact_deadline)
            if exec_deadline <= now:
                self.stop(StopReason.MAX_EXEC_TIME, f"{terms.max_exec_time:g} s")
            elif output_deadline <= now:
                self.stop(StopReason.SILENCE, f"{terms.timeout:g} s")
            elif contact_deadline <= now:
                self.stop(StopReason.LOST_CONTACT)
            if self._end:  # it had ended, and the next check is scheduled
                return
            if next_check <= now:
                next_check = now + max(_MIN_CHECK_INTERVAL, terms.result_ttl)
        self._timer = self._loop.call_later(next_check - now, self._check)

    def discard(self) -> None:
        """Discard the session: the dispatcher has stored its end, was rejected, or has not fetched it in time."""
        if self._timer is not None:
            self._timer.cancel()
        self._quota.release(self.account, self._spool.size + sum(map(len, self._end)))
        self._on_discarded(self)  # before the connection closes: the close is visible to others
        if self._channel is not None:
            self._channel.close_after_flush()
            self._channel = None
