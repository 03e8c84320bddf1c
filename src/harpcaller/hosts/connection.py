"""A connection to a host's harpd: one request at a time, the messages that answer it, commands to a running call.

No task reads a connection: `HarpdConnection.data_received` calls the request's `Receiver` for each message, and once
for adjacent records. A line of more than 64 KiB is decoded in a thread; until then, no data is read from the host.

Heartbeats run in both directions, because an open connection does not prove that the peer is alive. Each heartbeat
echoes the host's latest timestamp. The host measures contact from that timestamp, so it can never count contact that
the dispatcher did not have. A connection without data for too long is aborted, as if the host had closed it. Time in
which the dispatcher does not read, because the store is slow, is not counted.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice, takewhile
from operator import methodcaller
from typing import Any, Protocol, cast

from harp.protocol.call_output import RECORD_PREFIX
from harp.protocol.ends import Failed
from harp.protocol.harpd import (
    MAX_MESSAGE_BYTES,
    STREAMING,
    Acknowledgement,
    Command,
    Heartbeat,
    Message,
    Phase,
    Record,
    ReplyReader,
    encode_command,
)
from harp.protocol.json_text import InvalidJSON, Raw, loads
from harp.protocol.lines import LineBuffer, LineTooLong, LongLine
from harp.protocol.schema import ProtocolError, is_count
from harp_daemon.event_loop import LONG_LINE, run_in_turn
from harp_daemon.sliced_json import decode_slices, slice_records
from harp_daemon.timer_wheel import Timer, TimerWheel
from harpcaller.secret_arguments import mask_message, mask_records

PAST_END = 2**53  #: A record number above all others. An attach with it is refused with the number of the next record.

_MAX_TURN_LINES = 1000  #: Maximum number of records that are delivered in one turn of the event loop.
_MAX_TURN_SECONDS = 0.01  #: Most CPU seconds that count as used for the records of one turn: others use it, too.
_SINGLE_LINE_COST = 30  #: The number of adjacent records that need as much time as one line that is decoded singly.
#: Maximum bytes times masked texts of what is masked in the event loop: 1 ms.
_MAX_MASKING = 3_000_000
_MAX_STORED_LINE = 1000  #: Maximum bytes of a stored acknowledgement.
_HEARTBEAT_INTERVAL = 15.0  #: Seconds between two heartbeats.
_MAX_MISSED_HEARTBEATS = 3  #: Number of unanswered heartbeats after which the connection is aborted.
_MIN_HEARTBEAT_INTERVAL = 0.1  #: Minimum seconds between two heartbeats, whatever timeout a host sets.
_begins_as_record = methodcaller("startswith", RECORD_PREFIX)
_begins_as_heartbeat = methodcaller("startswith", b'{"heartbeat":')
_MAX_UNSENT_BYTES = 64 * 1024  #: Maximum bytes of commands that the host has not read.
_COMMAND_DELAY = 0.03  #: Maximum seconds for which the last command of a call waits for the next request.
_MAX_QUEUED = 64  #: Maximum number of messages in a `MessageQueue`; above it, its connection is not read.


def _never(seconds: float) -> float:
    return 0.0


def _is_record(line: bytes | LongLine) -> bool:
    return len(line) <= LONG_LINE and _begins_as_record(line)


def _is_heartbeat(line: bytes | LongLine) -> bool:
    return len(line) <= LONG_LINE and _begins_as_heartbeat(line)


class Receiver(Protocol):
    """The receiver of one request's messages. It may send commands and close the connection, and must not raise."""

    def on_records(self, records: list[bytes]) -> None:
        """Receive the next records, at least one, as the values of `Records`."""

    def on_message(self, message: Message) -> None:
        """Receive the next message; it is not a record."""

    def on_disconnect(self, error: Exception | None) -> None:
        """Receive the last event, the end of the connection: None if the host closed it, otherwise the reason."""


class HarpdConnection(asyncio.Protocol):
    """A connection to a host, ready for a request; the caller closes it. Lines have at most `max_line` bytes."""

    def __init__(self, timers: TimerWheel, max_line: int) -> None:
        self._timers = timers
        self._transport: asyncio.Transport
        self._address: str | None = None
        self._lines = LineBuffer(max_line)
        # Complete lines that wait for the first request, or for a long line before them.
        self._unread: list[bytes | LongLine] = []
        self._exchange: ReplyReader | None = None
        self._receiver: Receiver | None = None
        self._masked_texts: Sequence[bytes] = ()
        self._suspended = False  # the next lines wait for a thread that decodes a line, or for the next turn
        self._is_reading = True
        self._resuming = False
        self._unwritten: deque[memoryview] = deque()  # pieces of long data
        self._ended = False
        self._end_error: Exception | None = None
        self._heartbeat_timer: Timer | None = None
        self._heartbeat_interval = _HEARTBEAT_INTERVAL
        self._last_command = b""  # of a finished request; not sent yet
        self._command_timer: Timer | None = None
        self._peer_time = 0.0  # the latest time of the host, which the next heartbeat echoes
        self._heartbeat_sent_at: float | None = None  # monotonic time of a heartbeat without a reply
        self.on_round_trip: Callable[[float], None] | None = None  #: Is called with the seconds to a heartbeat's reply.
        #: Returns for how many seconds a host pauses that has used so many of the processor; see `Store.find_pause`.
        self.find_pause: Callable[[float], float] = _never
        self._used = 0.0  # CPU seconds of this process at the last pause
        self._reused_unanswered = False
        self._acknowledgement: tuple[bytes, Message] | None = None  # of the last call; most calls receive the same line
        self.is_paused = False  #: Whether the receiver has paused reading.
        self.opened_at = time.monotonic()  #: Monotonic time of the opening.
        self.tls_version: tuple[int, ...] = ()  #: `HostTLS.version` when the host's certificate was accepted.
        #: Monotonic time of the last received data, or of the request.
        self.last_received_at = self._reading_since = time.monotonic()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast(asyncio.Transport, transport)
        peername = transport.get_extra_info("peername")
        self._address = peername[0] if peername else None  # the host may have closed the connection

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self.last_received_at = time.monotonic()
        try:
            long, lines = self._lines.feed_long(data)
        except LineTooLong as error:
            self._end(error)
        else:
            if long is not None:
                self._unread.append(long)
            self._unread += lines
            self._deliver()
            if self._lines.size > MAX_MESSAGE_BYTES:
                self._check_length(self._lines.size)

    def eof_received(self) -> None:
        """See `asyncio.Protocol`. asyncio closes the transport."""
        self._ended = True

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._end(exc)

    # The request.

    def send_request(self, line: bytes, phase: Phase, receiver: Receiver, masked_texts: Sequence[bytes] = ()) -> None:
        """Write an encoded request; its exchange starts in `phase`. The receiver is called from the next turn on.

        The `masked_texts` are masked in all that it receives.
        """
        self._masked_texts = masked_texts
        self._reused_unanswered = self._exchange is not None
        self.last_received_at = self._reading_since = time.monotonic()
        self._exchange = ReplyReader(decode_slices, phase)
        self._receiver = receiver
        last_command, self._last_command = self._last_command, b""
        self._write(last_command + line)
        if self._unread or self._ended:
            asyncio.get_running_loop().call_soon(self._continue)
        self.resume_reading()

    def send_command(self, command: Command) -> None:
        """Send a command for the call. Abort the connection if the host does not read its commands."""
        transport = self._transport
        if not transport.is_closing():
            self._write(encode_command(command))
            if transport.get_write_buffer_size() > _MAX_UNSENT_BYTES and not self._unwritten:
                transport.abort()

    def _write(self, data: bytes) -> None:
        """Write data; long data in several turns of the event loop, because its encryption takes time."""
        if len(data) <= LONG_LINE and not self._unwritten:
            self._transport.write(data)
            return
        if not self._unwritten:
            asyncio.get_running_loop().call_soon(self._write_piece)
        pieces = memoryview(data)
        self._unwritten += [pieces[at : at + LONG_LINE] for at in range(0, len(data), LONG_LINE)]

    def _write_piece(self) -> None:
        if self._transport.is_closing():
            self._unwritten.clear()
        if self._unwritten:
            self._transport.write(self._unwritten.popleft())
        if self._unwritten:
            asyncio.get_running_loop().call_soon(self._write_piece)

    def finish_request(self, last_command: bytes = b"") -> None:
        """End the request: no message is delivered.

        An encoded last command is sent with the next request, to save a write.
        """
        self._stop_heartbeat()
        self._receiver = None
        if self._unread:
            self._discard_idle_lines()
        if last_command:
            self._last_command = last_command
            if self._command_timer is None:
                self._command_timer = self._timers.call_later(_COMMAND_DELAY, self._send_last_command)

    def _send_last_command(self) -> None:
        self._command_timer = None
        if self._last_command:
            self._write(self._last_command)
            self._last_command = b""

    def pause_reading(self) -> None:
        """Stop reading; data that was read before is still delivered."""
        self.is_paused = True
        self._update_reading()

    def resume_reading(self) -> None:
        """Read again."""
        self.is_paused = False
        self._update_reading()

    @property
    def keep_alive(self) -> float | None:
        """Seconds for which the host accepts another request on this connection; None if it closes it."""
        return None if self._exchange is None else self._exchange.keep_alive

    @property
    def is_reusable(self) -> bool:
        """Whether both sides are open, and every received line is complete and decoded."""
        unfinished = self._suspended or self._unread or self._lines.size
        return not (self._ended or self._transport.is_closing() or unfinished)

    @property
    def phase_text(self) -> str:
        """The phase of the exchange, for messages."""
        assert self._exchange is not None
        return self._exchange.phase.value

    def describe_state(self) -> str:
        """Return the state of the exchange, for an error message."""
        return "in the middle of a line" if self._lines.size else f"while {self.phase_text}"

    def close(self) -> None:
        """Close the connection after the written data was sent."""
        self.finish_request()
        self._send_last_command()
        while self._unwritten:
            self._transport.write(self._unwritten.popleft())
        self._transport.close()

    def abort(self) -> None:
        """Close the connection immediately."""
        self._unread.clear()
        self._last_command = b""
        self.finish_request()
        self._transport.abort()

    # Received lines.

    def _deliver(self) -> None:
        """Pass the complete lines to the receiver, as many as it can receive now."""
        lines, self._unread = self._unread, []
        at = decode_singly_to = 0
        room = _MAX_TURN_LINES
        while at < len(lines):
            receiver, exchange = self._receiver, self._exchange
            if receiver is None or exchange is None or self._suspended:
                self._unread = lines[at:]
                if exchange is None:
                    self.pause_reading()  # the host sends before the request, for example to refuse the connection
                elif receiver is None:
                    self._discard_idle_lines()
                return
            if room <= 0:
                self._unread = lines[at:]
                self._suspend()
                self._pause()
                return
            line = lines[at]
            is_long = isinstance(line, LongLine) or len(line) > LONG_LINE
            if is_long or (self._masked_texts and self._is_masking_slow(len(line))):
                at += 1
                if not self._check_length(len(line)):
                    return
                self._suspend()
                run_in_turn(self._decode, line, self._address).add_done_callback(self._on_decoded)
                continue
            if exchange.phase in STREAMING and at >= decode_singly_to:
                run = cast(list[bytes], list(takewhile(_is_record, islice(lines, at, at + room))))
                if len(run) > 1 and (records := slice_records(run)) is not None:
                    at += len(run)
                    room -= len(run)
                    if self._is_masking_slow(sum(map(len, records))):
                        self._suspend()
                        masking = partial(mask_records, texts=self._masked_texts)
                        run_in_turn(masking, records, self._address).add_done_callback(self._on_masked)
                    else:
                        receiver.on_records(mask_records(records, self._masked_texts))
                    continue
                decode_singly_to = at + len(run)
            at += 1
            room -= _SINGLE_LINE_COST
            try:
                message = self._read_message(cast(bytes, line))
            except ProtocolError as error:
                self._end(error)
            else:
                self._receive(mask_message(message, self._masked_texts) if self._masked_texts else message)

    def _check_length(self, length: int) -> bool:
        """Return whether a line may have this length now, or grow to it; otherwise end the exchange."""
        exchange = self._exchange
        if exchange is None or not exchange.expects_short or length <= MAX_MESSAGE_BYTES:
            return True
        self._unread.clear()
        reason = f"a message of more than {MAX_MESSAGE_BYTES} bytes received while {exchange.phase.value}"
        self._end(ProtocolError(reason))
        return False

    def _discard_idle_lines(self) -> None:
        """Discard the late heartbeats of the last call; disconnect a host that sends anything else."""
        if all(map(_is_heartbeat, self._unread)):
            self._unread.clear()
        else:
            self._transport.abort()

    def _continue(self) -> None:
        """Deliver the waiting lines, then the end of the connection if it was received."""
        self._deliver()
        if self._ended and not self._suspended:
            self._end(self._end_error)
        self._update_reading()

    def _on_decoded(self, decoding: asyncio.Future[Message]) -> None:
        self._suspended = False
        error = decoding.exception()
        if error is not None:
            self._end(cast(Exception, error))
        elif self._receiver is not None:
            self._receive(decoding.result())
        self._continue()

    def _is_masking_slow(self, length: int) -> bool:
        """Return whether it would delay the event loop to mask a text of this length."""
        return length * len(self._masked_texts) > _MAX_MASKING

    def _on_masked(self, masking: asyncio.Future[list[bytes]]) -> None:
        self._suspended = False
        if self._receiver is not None:
            self._receiver.on_records(masking.result())
        self._continue()

    def _suspend(self) -> None:
        self._suspended = True
        self._update_reading()

    def _pause(self) -> None:
        """Have the next turn, after a pause if there are others: a flood keeps this process busy until it is stored."""
        used, self._used = self._used, time.process_time()
        seconds = self.find_pause(min(self._used - used, _MAX_TURN_SECONDS))
        asyncio.get_running_loop().call_later(seconds, self._next_turn)

    def _next_turn(self) -> None:
        self._suspended = False
        self._continue()

    def _update_reading(self) -> None:
        """Read from the host unless the receiver or a long line forbids it."""
        is_reading = not (self.is_paused or self._suspended)
        if is_reading is self._is_reading or self._resuming or self._transport.is_closing():
            return
        self._is_reading = is_reading
        if not is_reading:
            self._transport.pause_reading()
            return
        self._reading_since = time.monotonic()
        self._transport.resume_reading()
        # asyncio loses data if reading is paused in the turn of the loop in which it was resumed, and the host closes.
        self._resuming = True
        asyncio.get_running_loop().call_soon(self._on_resumed)

    def _on_resumed(self) -> None:
        self._resuming = False
        self._update_reading()

    def _decode(self, line: bytes) -> Message:
        """Return the message of the next line, masked. Raises `ProtocolError` if it is invalid or unexpected."""
        message = self._read_message(line)
        return mask_message(message, self._masked_texts) if self._masked_texts else message

    def _read_message(self, line: bytes) -> Message:
        assert self._exchange is not None
        if self._reused_unanswered and _is_heartbeat(line):
            return Heartbeat(0.0)  # it belongs to the previous call on this connection
        self._reused_unanswered = False
        if self._acknowledgement is not None and line == self._acknowledgement[0]:
            message = self._acknowledgement[1]
            self._exchange.accept(message)
            return message
        message = self._exchange.read_message(line)
        if isinstance(message, Acknowledgement) and len(line) <= _MAX_STORED_LINE:
            self._acknowledgement = line, message
        return message

    def _receive(self, message: Message) -> None:
        assert self._receiver is not None
        if isinstance(message, Record):
            self._receiver.on_records([bytes(message.data)])
        else:
            if isinstance(message, Heartbeat):
                self._peer_time = message.time
                if self._heartbeat_sent_at is not None and self.on_round_trip is not None:
                    self.on_round_trip(self.last_received_at - self._heartbeat_sent_at)
                self._heartbeat_sent_at = None
            self._receiver.on_message(message)

    def _end(self, error: Exception | None) -> None:
        """Notify the receiver of the end of the connection, after the lines before it."""
        self._ended = True
        self._end_error = self._end_error or error
        if self._suspended:
            return
        receiver, self._receiver = self._receiver, None
        self._last_command = b""
        self._stop_heartbeat()
        self._transport.abort()
        if receiver is not None:
            receiver.on_disconnect(self._end_error)

    def start_heartbeat(self, peer_time: float, timeout: float, at_once: bool) -> None:
        """Send heartbeats until the request is finished; without them, the host ends the call after `timeout` s."""
        self._peer_time = peer_time
        interval = min(_HEARTBEAT_INTERVAL, timeout / (_MAX_MISSED_HEARTBEATS + 2))
        self._heartbeat_interval = max(_MIN_HEARTBEAT_INTERVAL, interval)
        if at_once:
            self._send_heartbeat()
        else:
            self._heartbeat_timer = self._timers.call_later(self._heartbeat_interval, self._send_heartbeat)

    def _stop_heartbeat(self) -> None:
        if self._heartbeat_timer is not None:
            self._heartbeat_timer.cancel()
            self._heartbeat_timer = None
        self._heartbeat_sent_at = None

    def _send_heartbeat(self) -> None:
        silent_since = max(self.last_received_at, self._reading_since)
        max_silence = _MAX_MISSED_HEARTBEATS * self._heartbeat_interval
        if self._is_reading and time.monotonic() - silent_since > max_silence:
            self._transport.abort()
            return
        if self._heartbeat_sent_at is None:
            self._heartbeat_sent_at = time.monotonic()  # before the kernel has it, and perhaps halts this process
        self.send_command(Heartbeat(self._peer_time))
        self._heartbeat_timer = self._timers.call_later(self._heartbeat_interval, self._send_heartbeat)


class MessageQueue:
    """A `Receiver` for a task that waits for the messages of a request one by one; `conn` sends the request."""

    def __init__(self, conn: HarpdConnection) -> None:
        self._conn = conn
        self._messages: asyncio.Queue[Message | Exception | None] = asyncio.Queue()

    def on_records(self, records: list[bytes]) -> None:
        """See `Receiver`."""
        for record in records:
            self.on_message(Record(Raw(record)))

    def on_message(self, message: Message) -> None:
        """See `Receiver`."""
        self._messages.put_nowait(message)
        if self._messages.qsize() > _MAX_QUEUED:
            self._conn.pause_reading()

    def on_disconnect(self, error: Exception | None) -> None:
        """See `Receiver`."""
        self._messages.put_nowait(error)

    @property
    def has_next(self) -> bool:
        """Whether the next message, or the end, has been received."""
        return not self._messages.empty()

    async def receive(self) -> Message | None:
        """Return the next message; None if the host closed. Raises `ProtocolError`, `LineTooLong` or OSError."""
        if self._messages.empty():
            self._conn.resume_reading()
        message = await self._messages.get()
        if isinstance(message, Exception):
            raise message
        return message


def parse_end_of_records(error: Failed) -> int:
    """Return the number of the next record of a call from an error ``records_gone``. Raises `ProtocolError`."""
    end = get_error_detail(error, "end")
    if not isinstance(end, int) or not is_count(end) or end >= PAST_END:
        raise ProtocolError("records_gone: expected the number of the next record as end")
    return end


def get_error_detail(error: Failed, key: str) -> Any:
    """Return a member of an error's data; None if it is missing, or the data cannot be decoded."""
    try:
        data = loads(error.data) if isinstance(error.data, Raw) else None
    except InvalidJSON:
        return None
    return data.get(key) if isinstance(data, dict) else None
