"""A connection to a host's harpd: one request at a time, the messages that answer it, commands to a running call.

Heartbeats run in both directions, because an open connection does not prove that the peer is alive. Each heartbeat
echoes the host's latest timestamp. The host measures contact from that timestamp, so it can never count contact that
the dispatcher did not have. If nothing was received for too long, the connection is aborted and reading ends as if the
host had closed it. Time in which the dispatcher itself does not read, because the store is slow, is not counted.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from operator import methodcaller

from harp.protocol.call_output import RECORD_PREFIX
from harp.protocol.ends import Failed
from harp.protocol.fields import ProtocolError, is_count
from harp.protocol.harpd import (
    AnyRequest,
    Command,
    Heartbeat,
    Message,
    Record,
    ReplyReader,
    encode_command,
    encode_request,
)
from harp.protocol.json_text import InvalidJSON, Raw, loads
from harp.protocol.lines import LineBuffer
from harp_daemon.sliced_json import decode_slices, slice_records
from harpcaller.config import Config
from harpcaller.hosts.connecting import connect
from harpcaller.hosts.inventory import Host
from harpcaller.hosts.tls import HostTLS

#: A record number that does not exist. Attaching at it is refused with the number of the next record.
PAST_END = 2**53

_READ_BYTES = 64 * 1024
#: Seconds between two heartbeats, and the number of unanswered ones after which the connection is aborted.
_HEARTBEAT_INTERVAL, _MAX_MISSED_HEARTBEATS = 15.0, 3
#: Minimum seconds between two heartbeats, whatever timeout a host sets.
_MIN_HEARTBEAT_INTERVAL = 0.1
_is_record = methodcaller("startswith", RECORD_PREFIX)
#: Maximum bytes of commands that the host has not read.
_MAX_UNSENT_BYTES = 64 * 1024


class HarpdConnection:
    """A connection to a host, ready for a request. The caller closes it. `max_line` limits a received line in bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, max_line: int) -> None:
        self._reader = reader
        self._writer = writer
        self._lines = LineBuffer(max_line)
        self._exchange: ReplyReader | None = None
        self._heartbeat_timer: asyncio.TimerHandle | None = None
        self._peer_time = 0.0
        self._reading = False
        self._closed = False
        self._reused_unanswered = False
        #: Monotonic time of the last received data, or of the request.
        self.last_received_at = time.monotonic()

    def send_request(self, request: AnyRequest) -> None:
        """Write the request. It may have reached the host even if the connection breaks at once."""
        self._reused_unanswered = self._exchange is not None
        self.last_received_at = time.monotonic()
        self._exchange = ReplyReader(decode_slices, request)
        self._writer.write(encode_request(request))

    async def read(self) -> list[bytes] | None:
        """Return the next complete lines, possibly none; None at the end of the connection.

        Raises:
            LineTooLong: a line exceeds the maximum length.
            OSError: the connection broke.
        """
        self._reading = True
        try:
            data = await self._reader.read(_READ_BYTES)
        finally:
            self._reading = False
        self.last_received_at = time.monotonic()
        return self._lines.feed(data) if data else None

    def parse_line(self, line: bytes) -> Message:
        """Return the message of the next line.

        Raises:
            ProtocolError: the line is not a message, or the message is not allowed at this point.
        """
        assert self._exchange is not None
        if self._reused_unanswered and line.startswith(b'{"heartbeat":'):
            return Heartbeat(0.0)  # it belongs to the previous call on this connection
        message = self._exchange.read_message(line)
        self._reused_unanswered = False
        if isinstance(message, Heartbeat):
            self._peer_time = message.time
        return message

    def messages(self, lines: Sequence[bytes]) -> Iterator[Message | list[Raw] | ProtocolError]:
        """Yield the messages of the lines; adjacent records together as a list.

        The first invalid line yields its `ProtocolError` and ends the iteration.
        """
        assert self._exchange is not None
        at = 0
        while at < len(lines):
            run = list(takewhile(_is_record, islice(lines, at, None))) if self._exchange.is_streaming else []
            records = slice_records(run) if len(run) > 1 else None
            if records is not None:
                yield records
            else:
                run = run or [lines[at]]
                try:
                    for line in run:
                        message = self.parse_line(line)
                        yield [Raw(message.data)] if isinstance(message, Record) else message
                except ProtocolError as error:
                    yield error
                    return
            at += len(run)

    @property
    def keep_alive(self) -> float | None:
        """Seconds for which the host accepts another request on this connection; None if it closes it."""
        return None if self._exchange is None else self._exchange.keep_alive

    @property
    def is_reusable(self) -> bool:
        """Whether both sides are open and no partial line was received."""
        closed = self._reader.at_eof() or self._writer.transport.is_closing()
        return not closed and not self._lines.pending and self._reader.exception() is None

    def send_command(self, command: Command) -> None:
        """Send a command for the attached call. Abort the connection if the host leaves too much unread."""
        transport = self._writer.transport
        if not transport.is_closing():
            self._writer.write(encode_command(command))
            if transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
                transport.abort()

    def start_heartbeat(self, peer_time: float, timeout: float, at_once: bool) -> None:
        """Send heartbeats until `stop_heartbeat`, or until the connection is closed.

        Args:
            peer_time: the host's timestamp in its acknowledgement.
            timeout: seconds without a heartbeat after which the host ends the call.
            at_once: whether to send the first one now. A new call needs none: its request was one.
        """
        self._peer_time = peer_time
        interval = max(_MIN_HEARTBEAT_INTERVAL, min(_HEARTBEAT_INTERVAL, timeout / (_MAX_MISSED_HEARTBEATS + 2)))
        if at_once:
            self._send_heartbeat(interval)
        else:
            self._schedule_heartbeat(interval)

    def _send_heartbeat(self, interval: float) -> None:
        if self._reading and time.monotonic() - self.last_received_at > _MAX_MISSED_HEARTBEATS * interval:
            self._writer.transport.abort()
            return
        self.send_command(Heartbeat(self._peer_time))
        self._schedule_heartbeat(interval)

    def _schedule_heartbeat(self, interval: float) -> None:
        self._heartbeat_timer = asyncio.get_running_loop().call_later(interval, self._send_heartbeat, interval)

    @property
    def phase_text(self) -> str:
        """The phase of the exchange, for messages."""
        assert self._exchange is not None
        return self._exchange.phase.value

    def describe_state(self) -> str:
        """Return the state of the exchange, for the message that the connection ended in it."""
        return "in the middle of a line" if self._lines.pending else f"while {self.phase_text}"

    def close(self) -> None:
        """Close the connection after the written data was sent."""
        self.stop_heartbeat()
        self._closed = True
        self._writer.close()

    def abort(self) -> None:
        """Close the connection at once; do nothing after `close`, so that written data is still sent."""
        if not self._closed:
            self.stop_heartbeat()
            self._writer.transport.abort()

    def stop_heartbeat(self) -> None:
        """Send no further heartbeat, because the call has ended."""
        if self._heartbeat_timer is not None:
            self._heartbeat_timer.cancel()
            self._heartbeat_timer = None


async def open_connection(host: Host, tls: HostTLS, config: Config, max_line: int = sys.maxsize) -> HarpdConnection:
    """Connect to a host; a received line may have `record_line` bytes, or `max_line` if that is less.

    Raises:
        OSError, CertificateRefused, UnicodeError: see `harpcaller.hosts.connecting.connect`.
    """
    reader, writer = await connect(host, tls, config.connect_timeout)
    return HarpdConnection(reader, writer, min(max_line, config.record_line))


def parse_end_of_records(error: Failed) -> int:
    """Return the number of the next record of a call, from the data of the error ``records_gone``.

    Raises:
        ProtocolError: the data has another form.
    """
    try:
        data = loads(error.data) if isinstance(error.data, Raw) else None
    except InvalidJSON as invalid:
        raise ProtocolError(f"records_gone: {invalid}") from invalid
    end = data.get("end") if isinstance(data, dict) else None
    if not isinstance(end, int) or not is_count(end) or end >= PAST_END:
        raise ProtocolError("records_gone: expected the number of the next record as end")
    return end
