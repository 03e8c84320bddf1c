"""The session of a resumable call: its dispatcher may disconnect and attach again.

Theory of operation. The records of the call go into a spool. The attached connection receives them from the number that
it has requested, and each acknowledgement deletes the records that the dispatcher has stored. The end is sent once the
worker has been reaped and all stopped processes are gone (or survive, as the stop report says): exit info, then the
closing line. So when the closing line is sent, the worker has ended, and no process that had to be stopped is left,
except the survivors in the stop report. The dispatcher sends ``release`` when it has stored the end.

At most a window of unacknowledged records is sent. So a dispatcher with a slow store need not stop reading, and
receives all other messages in time.

The dispatcher's heartbeat proves contact: it echoes the latest time that the dispatcher has received from this process,
so there was contact at that time. Nothing else counts: an open connection proves nothing, and a message may have been
delayed. A running call without contact for `disconnect_timeout` seconds is stopped; the end of a call is discarded
after `result_ttl` seconds. One connection is attached at a time: a later one replaces the earlier.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from harp.protocol.ends import Failed
from harp.protocol.fields import ProtocolError
from harp.protocol.harpd import (
    Ack,
    Acknowledgement,
    GrantedTerms,
    Heartbeat,
    RecordTime,
    Release,
    StopCall,
    StopReport,
    decode_command,
    encode_exit_info,
    encode_message,
)
from harp.protocol.json_text import Raw, dumps
from harp.protocol.lines import LineBuffer, LineTooLong
from harpd.supervisor.call import Call, StopReason
from harpd.supervisor.event_loop import EventLoop, Timer
from harpd.supervisor.link import LinkChannel
from harpd.supervisor.spool import GUARANTEED_BYTES, Spool, SpoolQuota

log = logging.getLogger("harpd.supervisor")

#: Limits above this number of seconds are lowered: no call reaches it, and a large integer has no form as a float.
_MAX_SECONDS = 1e9
_NO_LIMITS: Mapping[str, float] = MappingProxyType({})
#: Bytes of unacknowledged records that are sent; one record may be longer.
_WINDOW_BYTES = 1024 * 1024
#: The most bytes of a command line.
_MAX_COMMAND_BYTES = 4096


@dataclass(frozen=True, slots=True)
class SessionTerms:
    """The members of a session that a later supervisor needs to adopt it.

    Attributes:
        owner: the id of the dispatcher that owns the call.
        secret: a digest of the call's secret.
        disconnect_timeout, result_ttl: seconds: the requested values, at most the configured ones.
        timeout, max_exec_time: seconds: the requested values.
        streaming: whether the procedure yields records.
    """

    owner: str = field(repr=False)
    secret: str = field(repr=False)
    disconnect_timeout: float
    result_ttl: float
    timeout: float
    max_exec_time: float
    streaming: bool

    @classmethod
    def decode(cls, members: Mapping[str, Any], limits: Mapping[str, float] = _NO_LIMITS) -> SessionTerms:
        """Return the terms in a request, or those that `encode` has stored.

        Args:
            members: the attributes by name, and others.
            limits: the most seconds of some of the attributes; more are lowered.

        Raises:
            KeyError, ProtocolError: a member is missing, or has a wrong type.
        """
        seconds: dict[str, float] = {}
        for key in ("disconnect_timeout", "result_ttl", "timeout", "max_exec_time"):
            number = members[key]
            if type(number) not in (int, float) or number <= 0:
                raise ProtocolError(f"{key}: expected a positive number of seconds")
            seconds[key] = float(min(number, limits.get(key, _MAX_SECONDS)))
        owner, secret, streaming = members["owner"], members["secret"], members["streaming"]
        if not (isinstance(owner, str) and isinstance(secret, str) and isinstance(streaming, bool)):
            raise ProtocolError("owner, secret: expected strings")
        return cls(owner, secret, **seconds, streaming=streaming)

    def encode(self) -> Raw:
        """Return the terms as a JSON object."""
        return dumps({key: getattr(self, key) for key in self.__slots__})


@lru_cache(maxsize=64)  # the calls of a dispatcher have the same one
def _encode_acknowledgement(
    streaming: bool, instance: str, times: tuple[float, float, float, float], records: int, keep_alive: float | None
) -> bytes:
    disconnect_timeout, result_ttl, kill_grace, elapsed = times
    granted = GrantedTerms(
        instance=instance,
        disconnect_timeout=disconnect_timeout,
        result_ttl=result_ttl,
        kill_grace=kill_grace,
        elapsed=elapsed,
        records=records,
    )
    return encode_message(Acknowledgement(streaming, granted, keep_alive))


class ResumableSession:
    """A call's state for its dispatcher: a `harpd.supervisor.call.CallObserver` and the user of a link channel.

    Args:
        contact_at: the latest loop time at which contact with the dispatcher is proven.
        kill_grace, instance: sent to the dispatcher.
        spool_size: bytes of records that may wait for acknowledgement.
        quota: the memory of all calls.
        on_discarded: called once, when the session is discarded.
    """

    def __init__(
        self,
        loop: EventLoop,
        call_id: str,
        terms: SessionTerms,
        contact_at: float,
        kill_grace: float,
        instance: str,
        spool_size: int,
        quota: SpoolQuota,
        on_discarded: Callable[[ResumableSession], None],
    ) -> None:
        self.id = call_id
        self.terms = terms
        self.stored_session = terms.encode()
        self.call: Call | None = None
        self._loop = loop
        self._kill_grace = kill_grace
        self._instance = instance
        self._spool_size = spool_size
        self._guaranteed_size = min(spool_size, GUARANTEED_BYTES)
        self._quota = quota
        self._on_discarded = on_discarded
        self._spool = Spool()
        self._channel: LinkChannel | None = None
        self._keep_alive: float | None = None
        self._lines = LineBuffer(_MAX_COMMAND_BYTES)
        self._next = 0
        self._unacknowledged = 0  # bytes that were sent on this connection
        self._sent_end = self._sent_last_report = False
        self._heartbeat_pending = False
        self._started_at: float | None = None
        self._end: bytes | None = None  # the closing line, before the worker has ended
        self._closing: bytes | None = None  # stop report, exit info and closing line
        self._last_report: bytes | None = None  # the stop report of survivors that are gone now
        self._ended_at = 0.0
        self._adopted = False
        self._contact_at, self._last_output_at = contact_at, loop.now()
        self._timer: Timer | None = None  # None: the worker does not exist yet

    # The call's notifications: `CallObserver`.

    @property
    def full(self) -> bool:
        """See `CallObserver`."""
        size = self._spool.size
        if size < self._guaranteed_size:
            return False
        return size >= self._spool_size or not self._quota.may_grow(size, self, self._resume_reading)

    def on_started(self) -> None:
        """See `CallObserver`."""
        self._started_at = self._last_output_at = self._loop.now()
        self._check()
        if self._channel is not None:
            self._send_acknowledgement(self._channel, 0.0)

    def on_rejected(self, line: bytes) -> None:
        """See `CallObserver`."""
        if self._channel is not None:
            self._channel.send(line)
        self.discard()

    def on_records(self, lines: bytes, count: int) -> None:
        """See `CallObserver`."""
        self._last_output_at = self._loop.now()
        self._spool.append(lines, count, time.time())
        self._quota.reserve(len(lines))
        self._send_pending()

    def on_end(self, line: bytes) -> None:
        """See `CallObserver`."""
        self._end = line

    def on_exit(self, exit_info: Callable[[], Raw], stop_report: Raw | None) -> None:
        """See `CallObserver`."""
        assert self._end is not None
        self._set_closing(stop_report, exit_info(), self._end)
        self._end = None  # it may be long, and is part of `_closing` now
        self._send_pending()

    def on_closed(self, stop_report: Raw | None) -> None:
        """See `CallObserver`."""
        self.call = None
        if stop_report is not None:
            self._last_report = encode_message(StopReport(stop_report))
            self._send_pending()

    # The attached connection.

    def attach(self, channel: LinkChannel, since: int, keep_alive: float | None) -> Failed | None:
        """Attach a connection: send all records from number `since` on, and receive commands.

        Return the error if some of these records are gone; then the connection is not attached. `keep_alive`: the value
        in the acknowledgement.
        """
        if self._adopted:
            self._spool.start_at(since)
        first, end = self._spool.first, self._spool.end
        if not first <= since <= end:
            data = {"first": first, "end": end}
            return Failed("records_gone", "some of the call's records from this number on are gone", data)
        self._keep_alive = keep_alive
        if self._channel is not None:
            self._channel.close()
        self._lines = LineBuffer(_MAX_COMMAND_BYTES)
        self._next = since
        self._unacknowledged = 0
        self._sent_end = self._sent_last_report = self._heartbeat_pending = False
        self._channel = channel
        channel.user = self
        if self._started_at is not None:
            self._send_acknowledgement(channel, self._elapsed())
            self._send_pending()
        return None

    def adopt(self, stop_report: Raw | None) -> None:
        """Adopt the call of a supervisor that has died: it has ended, and further records do not exist.

        `stop_report`: of survivors; None: there are none. `on_closed` reports when they are gone.
        """
        self._adopted = True
        self._started_at = self._loop.now()
        end = Failed("call_died", "the supervisor of the call died")
        self._set_closing(stop_report, dumps({"by": "unknown", "supervisor": "died"}), encode_message(end))

    def _set_closing(self, stop_report: Raw | None, exit_info: Raw, closing_line: bytes) -> None:
        report = b"" if stop_report is None else encode_message(StopReport(stop_report))
        self._closing = report + encode_exit_info(exit_info) + closing_line
        self._quota.reserve(len(self._closing))
        self._ended_at = self._loop.now()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(self.terms.result_ttl, self._check)

    @property
    def attached(self) -> bool:
        """Whether a connection is attached."""
        return self._channel is not None

    def _send_acknowledgement(self, channel: LinkChannel, elapsed: float) -> None:
        terms = self.terms
        times = terms.disconnect_timeout, terms.result_ttl, self._kill_grace, elapsed
        channel.send_soon(
            _encode_acknowledgement(terms.streaming, self._instance, times, self._spool.end, self._keep_alive)
        )

    def _elapsed(self) -> float:
        """Return the seconds since the start."""
        return 0.0 if self._started_at is None else max(0.0, self._loop.now() - self._started_at)

    def _send_pending(self) -> None:
        """Send all data that the attached connection has not received yet, while it is writable."""
        channel = self._channel
        if channel is None or self._started_at is None:
            return
        if self._heartbeat_pending and channel.writable:  # one reply to all heartbeats since the last one
            self._heartbeat_pending = False
            channel.send(encode_message(Heartbeat(self._elapsed())))
        while self._next < self._spool.end and channel.writable and self._unacknowledged < _WINDOW_BYTES:
            chunk = self._spool.chunk_from(self._next)
            self._next = chunk.first + chunk.count
            self._unacknowledged += len(chunk.lines)
            channel.send(encode_message(RecordTime(chunk.time)) + chunk.lines)
        if self._next < self._spool.end or self._closing is None:
            return
        if not self._sent_end:
            self._sent_end = True
            channel.send(self._closing)
        if self._last_report is not None and not self._sent_last_report:
            self._sent_last_report = True
            channel.send(self._last_report)

    def on_commands(self, data: bytes) -> None:
        """See `ChannelUser`."""
        try:
            for line in self._lines.feed(data):
                if self._channel is not None:  # a release detaches it; further commands have no effect
                    self._handle_command(decode_command(line))
        except (ProtocolError, LineTooLong) as error:
            log.error("invalid command from dispatcher", extra={"call": self.id, "reason": str(error)})
            self._detach()

    def on_hang_up(self) -> None:
        """See `ChannelUser`."""
        self._detach()

    def on_writable(self) -> None:
        """See `ChannelUser`."""
        self._send_pending()

    def _handle_command(self, command: Ack | Heartbeat | StopCall | Release) -> None:
        match command:
            case Ack(count):
                if count > self._spool.end:
                    raise ProtocolError(f"ack: expected at most {self._spool.end} records, got {count}")
                freed = self._spool.acknowledge(count)
                self._quota.release(freed)
                self._unacknowledged = 0 if count >= self._next else max(0, self._unacknowledged - freed)
                self._next = max(self._next, self._spool.first)  # records that were acknowledged unread are gone
                self._resume_reading()
                self._send_pending()
            case Heartbeat(elapsed):
                if elapsed > self._elapsed():
                    raise ProtocolError("heartbeat: the time is in the future")
                self._contact_at = max(self._contact_at, (self._started_at or 0) + elapsed)
                self._heartbeat_pending = True
                self._send_pending()
            case StopCall(why, by):
                self._stop(StopReason.CANCELLED, why, by)
            case Release():
                if self._closing is None:
                    raise ProtocolError("release: the call has not ended")
                self.discard()

    def _detach(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
            log.debug("dispatcher detached from call", extra={"call": self.id})

    # Limits and contact.

    def _stop(self, stop_reason: StopReason, reason: str | None = None, by: str | None = None) -> None:
        if self.call is not None and self._closing is None:
            self.call.stop(stop_reason, reason, by)

    def _resume_reading(self) -> None:
        if self.call is not None:
            self.call.update_watch()

    def _check(self) -> None:
        """Stop the call if it has reached a limit; discard its end if the dispatcher has not fetched it in time."""
        if self._closing is None:
            remaining = self._enforce_limits()
        else:
            remaining = max(self._contact_at, self._ended_at) + self.terms.result_ttl - self._loop.now()
            if remaining <= 0:
                log.warning("discarding unfetched end of call", extra={"call": self.id})
                self.discard()
                return
        self._timer = self._loop.call_later(remaining, self._check)

    def _enforce_limits(self) -> float:
        """Stop the call if it has reached a limit; return the seconds until the next check."""
        assert self._started_at is not None
        now, terms = self._loop.now(), self.terms
        if self.full:  # it cannot send
            self._last_output_at = now
        deadlines = {
            StopReason.MAX_EXEC_TIME: self._started_at + terms.max_exec_time,
            StopReason.SILENCE: self._last_output_at + terms.timeout,
            StopReason.LOST_CONTACT: self._contact_at + terms.disconnect_timeout,
        }
        nearest = min(deadlines.values())
        if nearest > now:
            return nearest - now
        if deadlines[StopReason.MAX_EXEC_TIME] <= now:
            self._stop(StopReason.MAX_EXEC_TIME, f"{terms.max_exec_time:g} s")
        elif deadlines[StopReason.SILENCE] <= now:
            self._stop(StopReason.SILENCE, f"{terms.timeout:g} s")
        else:
            self._stop(StopReason.LOST_CONTACT)
        return terms.result_ttl

    def discard(self) -> None:
        """Discard the session: the dispatcher has stored its end, was rejected, or has not fetched it in time."""
        if self._timer is not None:
            self._timer.cancel()
        self._quota.release(self._spool.size + len(self._closing or b""))
        self._on_discarded(self)  # before the connection closes: the close is visible to others
        if self._channel is not None:
            self._channel.close_after_flush()
            self._channel = None
