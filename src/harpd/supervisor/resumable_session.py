"""Who hears a kept call: its dispatcher, which may go away and come back.

Theory of operation. The call's records go into a spool; whoever is attached is sent them from the number it asked for,
and drops them here by saying how far it has stored them. The end is told once the main process has been reaped and
what was to be stopped is gone (or survives, which the receipt says): evidence, then the closing line. So a closing
line means that nothing of the call runs any more. The dispatcher says ``done`` when it has stored that.

No more is sent ahead of what is acknowledged than a window: so a dispatcher whose store is slow need not stop reading,
and hears what else there is to hear.

The dispatcher's heartbeat proves contact: it echoes the latest time that this process has sent, so up to that time the
dispatcher has received from us. Nothing else counts: an open connection proves nothing, and a message may have been
delayed. A running call without contact for `disconnect_timeout` seconds is stopped; the end of a call is discarded
after `result_ttl` seconds. One connection is attached at a time: a later one replaces the earlier.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from harp.protocol.ends import Failed
from harp.protocol.fields import ProtocolError
from harp.protocol.harpd import (
    Ack,
    Acknowledgement,
    ExitInfo,
    GrantedTerms,
    Heartbeat,
    RecordTime,
    Release,
    StopCall,
    StopReport,
    decode_command,
    encode_message,
)
from harp.protocol.json_text import Raw
from harp.protocol.lines import LineBuffer, LineTooLong
from harpd.supervisor.buffered_stream import BufferedStream
from harpd.supervisor.call import Call, StopReason
from harpd.supervisor.event_loop import EventLoop, Timer
from harpd.supervisor.spool import Spool, SpoolQuota

__all__ = ["Ownership", "ResumableSession", "SessionLimits"]

log = logging.getLogger("harpd.supervisor")

#: Bytes of records that are sent ahead of what the dispatcher has stored; one record may be longer.
_WINDOW = 1024 * 1024
#: The most bytes of a line of the dispatcher's after its request.
_LONGEST_ORDER = 4096


@dataclass(frozen=True, slots=True)
class Ownership:
    """Whose a call is: the dispatcher's name for itself, and a digest of the call's secret."""

    owner: str = field(repr=False)
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """How long a call is kept, and its limits; seconds. What was asked for, lowered to what is allowed here."""

    disconnect_timeout: float
    result_ttl: float
    timeout: float
    max_exec_time: float


class ResumableSession:
    """A call that is kept for its dispatcher. A `harpd.supervisor.call.CallObserver`.

    Args:
        loop: the event loop.
        call_id: the call's id.
        claim: whose it is.
        terms: how long it is kept.
        streaming: whether records will come.
        begun: when its start, or what else was heard of its dispatcher, arrived here; a time of the loop.
        kill_grace: told to the dispatcher.
        warden: the incarnation, told to the dispatcher.
        spool: bytes that may wait to be stored.
        memory: what all calls may keep together.
        on_forgotten: called once, when the call is not kept any more.
    """

    def __init__(
        self,
        loop: EventLoop,
        call_id: str,
        claim: Ownership,
        terms: SessionLimits,
        streaming: bool,
        begun: float,
        kill_grace: float,
        warden: str,
        spool: int,
        memory: SpoolQuota,
        on_forgotten: Callable[[ResumableSession], None],
    ) -> None:
        self.id = call_id
        self.ownership = claim
        self.limits = terms
        self._loop = loop
        self._streaming = streaming
        self._kill_grace = kill_grace
        self._warden = warden
        self._most = spool
        self._memory = memory
        self._on_forgotten = on_forgotten
        self._spool = Spool()
        self._call: Call | None = None
        self._reader: BufferedStream | None = None
        self._keep: float | None = None
        self._lines = LineBuffer(_LONGEST_ORDER)
        self._next = 0
        self._ahead = 0  # bytes that were sent on this connection and are not acknowledged
        self._told_end = self._told_last = False
        self._owes_answer = False
        self._started: float | None = None
        self._refusal: Failed | None = None
        self._end: bytes | None = None
        self._closing: bytes | None = None
        self._last_receipt: bytes | None = None
        self._ended = 0.0
        self._buried = False
        self._contact, self._said = begun, loop.now()
        self._timer: Timer | None = None
        self._limits: list[Timer] = []
        self.discarded = False
        self._check_contact()

    # What the call does: `CallObserver`.

    def bind_call(self, call: Call) -> None:
        """From now on this is the call."""
        self._call = call

    @property
    def full(self) -> bool:
        """See `CallObserver`."""
        size = self._spool.size
        return size >= self._most or not self._memory.may_grow(size, self, self._resume)

    def on_started(self) -> None:
        """See `CallObserver`."""
        self._started = self._said = self._loop.now()
        self._limits.append(self._loop.call_later(self.limits.max_exec_time, self._take_too_long))
        self._check_silence()
        self._greet()

    def on_rejected(self, end: Failed) -> None:
        """See `CallObserver`."""
        self._refusal = end
        if self._reader is not None:
            self._reader.send(encode_message(end))
        self.discard()

    def on_records(self, lines: bytes, count: int) -> None:
        """See `CallObserver`."""
        self._said = self._loop.now()
        self._spool.append(lines, count, time.time())
        self._memory.reserve(len(lines))
        self._pump()

    def on_end(self, line: bytes) -> None:
        """See `CallObserver`."""
        self._end = line
        self._cancel_limits()

    def on_exit(self, evidence: Callable[[], Raw], receipt: Raw | None) -> None:
        """See `CallObserver`."""
        assert self._end is not None
        said = b"" if receipt is None else encode_message(StopReport(receipt))
        self._closing = said + encode_message(ExitInfo(evidence())) + self._end
        self._memory.reserve(len(self._closing))
        self._end = None
        self._ended = self._loop.now()
        self._arm(self.limits.result_ttl)
        self._pump()

    def on_closed(self, receipt: Raw | None) -> None:
        """See `CallObserver`."""
        self._call = None
        if receipt is not None:
            self._last_receipt = encode_message(StopReport(receipt))
            self._pump()

    # Who is attached.

    def attach(self, connection: socket.socket, since: int, behind: bytes, keep: float | None) -> None:
        """Send everything from record number `since` on to this connection, and listen to it.

        Args:
            connection: the connection.
            since: a number that `has_records_from` has allowed.
            behind: what has come on the connection already, behind the request.
            keep: what the acknowledgement says of the client's connection.
        """
        self._keep = keep
        if self._reader is not None:
            self._reader.close()
        self._lines = LineBuffer(_LONGEST_ORDER)
        self._next = since
        self._ahead = 0
        self._told_end = self._told_last = self._owes_answer = False
        # The callbacks know their own connection: one that was superseded says nothing any more.
        reader: BufferedStream
        reader = self._reader = BufferedStream(
            self._loop,
            connection,
            lambda data: self._take_orders(reader, data),
            lambda: self._detach(reader),
            self._pump,
        )
        self._greet()
        if behind:
            self._take_orders(reader, behind)

    def adopt(self, end: Failed, evidence: Raw, receipt: Raw | None = None) -> None:
        """It was the call of a warden that has died: it is over, and there are no more records of it.

        `receipt`: something of it survives; `gone` tells the end of that.
        """
        self._buried = True
        self._started = self._ended = self._loop.now()
        said = b"" if receipt is None else encode_message(StopReport(receipt))
        self._closing = said + encode_message(ExitInfo(evidence)) + encode_message(end)
        self._arm(self.limits.result_ttl)

    def has_records_from(self, since: int) -> bool:
        """Whether the records from this number on are still here."""
        if self._buried:
            self._spool.start_at(since)
        return self._spool.first <= since <= self._spool.end

    @property
    def available_range(self) -> tuple[int, int]:
        """The numbers of the first record that is here and of the one to come."""
        return self._spool.first, self._spool.end

    @property
    def attached(self) -> bool:
        """Whether somebody is there to hear it."""
        return self._reader is not None

    @property
    def running(self) -> bool:
        """Whether its end is not known yet."""
        return self._closing is None

    def _greet(self) -> None:
        if self._reader is not None and self._started is not None:
            terms = GrantedTerms(
                instance=self._warden,
                disconnect_timeout=self.limits.disconnect_timeout,
                result_ttl=self.limits.result_ttl,
                kill_grace=self._kill_grace,
                elapsed=self._elapsed(),
                records=self._spool.end,
            )
            self._reader.send_soon(encode_message(Acknowledgement(self._streaming, terms, self._keep)))
            self._pump()

    def _elapsed(self) -> float:
        """Seconds since the start."""
        return 0.0 if self._started is None else max(0.0, self._loop.now() - self._started)

    def _pump(self) -> None:
        """Send what the reader has not been sent yet, as much as it takes now."""
        reader = self._reader
        if reader is None or self._started is None:
            return
        if self._owes_answer and reader.writable:  # one for all that were asked for since
            self._owes_answer = False
            reader.send(encode_message(Heartbeat(self._elapsed())))
        while reader.writable and self._ahead < _WINDOW and (piece := self._spool.chunk_from(self._next)) is not None:
            self._next = piece.first + piece.count
            self._ahead += len(piece.lines)
            reader.send(encode_message(RecordTime(piece.time)) + piece.lines)
        if self._next < self._spool.end or self._closing is None:
            return
        if not self._told_end:
            self._told_end = True
            reader.send(self._closing)
        if self._last_receipt is not None and not self._told_last:
            self._told_last = True
            reader.send(self._last_receipt)

    def _take_orders(self, reader: BufferedStream, data: bytes) -> None:
        try:
            lines = self._lines.feed(data)
            for line in lines:
                if reader is self._reader:
                    self._obey(decode_command(line), reader)
        except (ProtocolError, LineTooLong) as error:
            log.error("what a dispatcher said of its call is not of the protocol", extra=self._about(str(error)))
            self._detach(reader)

    def _obey(self, order: Ack | Heartbeat | StopCall | Release, reader: BufferedStream) -> None:
        match order:
            case Ack(count):
                if count > self._spool.end:
                    raise ProtocolError(f"stored: {count} records, of {self._spool.end}")
                stored = self._spool.acknowledge(count)
                self._memory.release(stored)
                self._ahead = 0 if count >= self._next else max(0, self._ahead - stored)
                self._resume()
                self._pump()
            case Heartbeat(at):
                if at > self._elapsed():
                    raise ProtocolError("alive: a time that has not come yet")
                self._contact = max(self._contact, (self._started or 0) + at)
                self._owes_answer = True
                self._pump()
            case StopCall(why, by):
                self._stop(StopReason.CANCELLED, why, by)
            case Release():
                if self._closing is None:
                    raise ProtocolError("done: the call has not ended")
                self.discard()

    def _detach(self, reader: BufferedStream) -> None:
        reader.close()
        if reader is self._reader:
            self._reader = None
            log.debug("dispatcher detached from its call", extra={"call": self.id})

    # Limits and contact.

    def _stop(self, why: StopReason, reason: str | None = None, by: str | None = None) -> None:
        if self._call is not None and self.running:
            self._call.stop(why, reason, by)

    def _resume(self) -> None:
        if self._call is not None:
            self._call.resume_reading()

    def _take_too_long(self) -> None:
        self._stop(StopReason.MAX_EXEC_TIME, f"{self.limits.max_exec_time:g} s")

    def _check_silence(self) -> None:
        """Stop a call that has said nothing for too long. While its spool is full it can't say anything."""
        if not self.running or self._end is not None:
            return
        now = self._loop.now()
        if self.full:
            self._said = now
        left = self._said + self.limits.timeout - now
        if left <= 0:
            self._stop(StopReason.SILENCE, f"{self.limits.timeout:g} s")
        else:
            self._limits[1:] = [self._loop.call_later(left, self._check_silence)]

    def _check_contact(self) -> None:
        now = self._loop.now()
        if self.running:
            left = self._contact + self.limits.disconnect_timeout - now
            if left <= 0:
                self._stop(StopReason.LOST_CONTACT)
                left = self.limits.result_ttl
        else:
            left = max(self._contact, self._ended) + self.limits.result_ttl - now
            if left <= 0:
                log.warning("an ended call was not fetched in time; forgotten", extra={"call": self.id})
                self.discard()
                return
        self._arm(left)

    def _arm(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._check_contact)

    def _cancel_limits(self) -> None:
        for timer in self._limits:
            timer.cancel()
        self._limits.clear()

    def discard(self) -> None:
        """Keep it no more: its end is stored, or nobody came for it."""
        if self.discarded:
            return
        self.discarded = True
        self._cancel_limits()
        if self._timer is not None:
            self._timer.cancel()
        self._memory.release(self._spool.size + (0 if self._closing is None or self._buried else len(self._closing)))
        self._on_forgotten(self)  # before the connection closes, by which others learn of it
        if self._reader is not None:
            self._reader.close_after_flush(lambda: None)
            self._reader = None

    def _about(self, reason: str) -> dict[str, str]:
        return {"call": self.id, "reason": reason}
