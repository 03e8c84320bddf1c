"""One connection to a host: a request, what harpd says, what is said to it while a kept call runs; and the next one.

Contact is kept up by `Alive`, in both directions: a connection that is open proves nothing. We say the host's own time
that we have heard last; that is what it counts from, and so it never believes in a contact that we have given up. When
nothing has come for too long the connection is given up, and reading ends as if the host had closed it. While we don't
read ourselves, for the store is slow, silence proves nothing either.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from operator import methodcaller

from harp.protocol.call_output import RECORD
from harp.protocol.ends import Failed
from harp.protocol.fields import ProtocolError, is_count
from harp.protocol.harpd import Alive, AnyRequest, Exchange, Message, Order, Record, encode_order, encode_request
from harp.protocol.json_text import InvalidJSON, Raw, loads
from harp.protocol.lines import LineBuffer
from harp_daemon.sliced_json import open_quickly, sliced_records
from harpcaller.config import Config
from harpcaller.hosts.connecting import connect, format_address
from harpcaller.hosts.inventory import Host
from harpcaller.hosts.tls import HostTLS

__all__ = ["PAST_END", "HarpdConnection", "open_connection", "parse_end_of_records"]

#: A number that no record has. To attach from it on is refused with the number to come, which is what it is for.
PAST_END = 2**53

_READ_BYTES = 64 * 1024
#: Seconds between two signs of life, and after how many without an answer the host is taken for gone.
_HEARTBEAT_INTERVAL, _MAX_MISSED_HEARTBEATS = 15.0, 3
#: They are never closer together than this, whatever a host says of its patience.
_MIN_HEARTBEAT_INTERVAL = 0.1
#: How an answer to a sign of life begins.
_HEARTBEAT_PREFIX = b'{"alive":'
_is_record = methodcaller("startswith", RECORD)
#: Bytes of orders that a host may leave unread.
_MAX_UNSENT_BYTES = 64 * 1024


class HarpdConnection:
    """A connection to a host on which the next thing to be said is a request. Close it in any case.

    Args:
        reader: its reading end.
        writer: its writing end.
        max_line: the most bytes of a line of the host's.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, max_line: int) -> None:
        self._reader = reader
        self._writer = writer
        self._lines = LineBuffer(max_line)
        self._exchange: Exchange | None = None
        self._heartbeat_timer: asyncio.TimerHandle | None = None
        self._last_received_at = time.monotonic()
        self._peer_time = 0.0
        self._reading = False
        self._closed = False
        self._parked = False
        self._reused = False  # for a request before
        self._answered = False
        #: Our end of the connection, which harpd logs as the call's peer: so the two logs can be held together.
        self.local_address = format_address(writer.get_extra_info("sockname"))

    def send_request(self, request: AnyRequest) -> None:
        """Send the request; it is written when this returns, whatever becomes of it."""
        self._reused = self._exchange is not None
        self._answered = False
        self._last_received_at, self._peer_time = time.monotonic(), 0.0
        self._exchange = Exchange(open_quickly, request)
        self._writer.write(encode_request(request))

    async def read(self) -> list[bytes] | None:
        """What has come, none or more lines, each for `message`; None at the end.

        Raises:
            LineTooLong: a line is too long.
            OSError: the connection broke.
        """
        self._reading = True
        try:
            data = await self._reader.read(_READ_BYTES)
        finally:
            self._reading = False
        self._last_received_at = time.monotonic()
        if not data:
            return None
        return self._lines.feed(data)

    def parse_line(self, line: bytes) -> Message:
        """The message of the next line. Raises `ProtocolError`: it is none, or may not come now."""
        assert self._exchange is not None
        if self._reused and not self._answered and line.startswith(_HEARTBEAT_PREFIX):
            return Alive(0.0)  # an answer to what was asked of the call before
        message = self._exchange.message(line)
        self._answered = True
        if isinstance(message, Alive):
            self._peer_time = message.at
        return message

    def messages(self, lines: Sequence[bytes]) -> Iterator[Message | list[Raw] | ProtocolError]:
        """What these lines say, one after the other: messages, records as lists, for there may be many of them at once.

        A fault ends it: a line that is no message, or may not come now.
        """
        assert self._exchange is not None
        at = 0
        while at < len(lines):
            run = list(takewhile(_is_record, islice(lines, at, None))) if self._exchange.streams else []
            records = sliced_records(run) if len(run) > 1 else None
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
        """Seconds for which the host waits for another request on this connection; None: it closes."""
        return None if self._exchange is None else self._exchange.keep

    @property
    def is_reusable(self) -> bool:
        """Whether neither side has closed, and nothing was said by halves."""
        closed = self._closed or self._reader.at_eof() or self._writer.transport.is_closing()
        return not closed and not self._lines.pending and self._reader.exception() is None

    def park(self) -> None:
        """Keep the connection as it is, for the next request: `abort` has no effect until then."""
        self._stop_heartbeat()
        self._parked = True

    def unpark(self) -> None:
        """It rests no more."""
        self._parked = False

    def send_command(self, order: Order) -> None:
        """Say something about the call that this connection is attached to.

        A host that leaves too much unread is given up: reading ends as if it had closed the connection.
        """
        transport = self._writer.transport
        if not transport.is_closing():
            self._writer.write(encode_order(order))
            if transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
                transport.abort()

    def start_heartbeat(self, peer_time: float, timeout: float, at_once: bool) -> None:
        """Give a sign of life every now and then.

        Args:
            peer_time: the host's time, as its acknowledgement has it.
            timeout: seconds without a sign after which the host gives the call up.
            at_once: whether it needs one at once. A call that has just begun doesn't: its request was one.
        """
        self._peer_time = peer_time
        pause = max(_MIN_HEARTBEAT_INTERVAL, min(_HEARTBEAT_INTERVAL, timeout / (_MAX_MISSED_HEARTBEATS + 2)))
        if at_once:
            self._send_heartbeat(pause)
        else:
            self._schedule_heartbeat(pause)

    def _send_heartbeat(self, pause: float) -> None:
        if self._reading and time.monotonic() - self._last_received_at > _MAX_MISSED_HEARTBEATS * pause:
            self._writer.transport.abort()
            return
        self.send_command(Alive(self._peer_time))
        self._schedule_heartbeat(pause)

    def _schedule_heartbeat(self, pause: float) -> None:
        self._heartbeat_timer = asyncio.get_running_loop().call_later(pause, self._send_heartbeat, pause)

    @property
    def last_received_at(self) -> float:
        """When something came the last time, on the monotonic clock."""
        return self._last_received_at

    @property
    def phase_text(self) -> str:
        """Where the exchange stands, for messages."""
        assert self._exchange is not None
        return self._exchange.phase.value

    @property
    def describe_state(self) -> str:
        """Where the exchange stands, for a message that says that it broke off there."""
        return "in the middle of a line" if self._lines.pending else f"while {self.phase_text}"

    def close(self) -> None:
        """Close; what was said last still goes out."""
        self._stop_heartbeat()
        self._closed = True
        self._writer.close()

    def abort(self) -> None:
        """Close at once, unless it is being closed already."""
        if not self._parked:
            self._stop_heartbeat()
            if not self._closed:
                self._writer.transport.abort()

    def _stop_heartbeat(self) -> None:
        if self._heartbeat_timer is not None:
            self._heartbeat_timer.cancel()
            self._heartbeat_timer = None


async def open_connection(host: Host, tls: HostTLS, config: Config, max_line: int = sys.maxsize) -> HarpdConnection:
    """Connect to a host. Raises as `harpcaller.hosts.connecting.connect`.

    Args:
        host: the host.
        tls: judges its certificate.
        config: its `connect_timeout` and `record_line` count.
        max_line: the most bytes of a line of the host's, if that is less than `record_line`.
    """
    reader, writer = await connect(host, tls, config.connect_timeout)
    return HarpdConnection(reader, writer, min(max_line, config.record_line))


def parse_end_of_records(error: Failed) -> int:
    """The number of the record to come of a call, as the error ``records_gone`` has it. Raises `ProtocolError`."""
    try:
        data = loads(error.data) if isinstance(error.data, Raw) else None
    except InvalidJSON as fault:
        raise ProtocolError(f"records_gone: {fault}") from fault
    end = data.get("end") if isinstance(data, dict) else None
    if not isinstance(end, int) or not is_count(end) or end >= PAST_END:
        raise ProtocolError("records_gone: expected the number of the record to come as end")
    return end
