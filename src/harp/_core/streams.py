"""Reading streams: their items, the requests for them, and how to continue after an interruption.

A `Reader` receives lines, errors and times, and decides. `StreamBase` carries out the decisions on a connection.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeAlias, TypeVar

from harp._core.connections import Connection, ConnectionPool, Deadline, Steps
from harp._core.retry import ReconnectPolicy, closed_without_reply, unsupported_by_peer
from harp._core.values import refusal_of
from harp.errors import CommunicationError, HarpException
from harp.protocol.dispatcher import (
    Continue,
    FollowStream,
    Packet,
    ReadStream,
    Refused,
    Reply,
    ReplyReader,
    encode_request,
)

StreamRequest: TypeAlias = FollowStream | ReadStream
C = TypeVar("C", bound=Connection)

#: A legacy dispatcher closes the connection within this many seconds if the job is unknown. A later close is an outage.
_REFUSED_WITHIN = 1.0


class Reader:
    """Turns the lines of a stream into items, and decides how to continue after an interruption."""

    #: Whether a request must be sent on a new connection before the next line is read.
    has_request = False
    #: Whether the peer may wait for an event before it sends the next line.
    waits = True
    #: Returns until when a connection that begins now must be established, and a peer that does not wait send a line.
    deadline: Callable[[], Deadline | None] = staticmethod(lambda: None)
    #: Returns this request, once. The argument is the time when the connection was established.
    pop_request: Callable[[float], bytes]
    #: Whether the last line was read.
    finished = False
    #: Seconds that the peer then keeps the connection open for another request; None: it must be closed.
    keep_alive: float | None = None
    #: Returns the items of a line, at most one. Raises the error that the line reports, or `ProtocolError`.
    read: Callable[[bytes], tuple[Any, ...]]
    #: Returns the items of the first lines that have one item each; the line after them is for `read`. This is the fast
    #: path for the lines that arrived together with a line that had an item.
    read_batch: Callable[[Iterable[bytes]], list[Any]]

    def interrupted(self, error: HarpException, now: float) -> float:
        """Return the seconds to wait before the next request. Raise the error if the stream cannot continue."""
        raise error

    def set_mark(self) -> None:
        """Note that all items that were read so far have been returned."""

    def resume(self) -> None:
        """Continue from the mark on another connection, if the stream can; otherwise its next item raises an error."""


class StreamReader(Reader):
    """The records of a job, each once, over as many connections as necessary.

    To continue after an interruption, a reader needs a sequence number. A `FollowStream` without `since` has no number
    before its first record. So `ReadStream` is sent first, which is answered immediately; the stream is followed from
    there. Legacy dispatchers close the connection without a reply when the job is unknown. So `ReadStream` is also sent
    after an interruption until the first reply: if it is not answered either, the job is unknown.

    Timed items are number, time and record. An outage may last `reconnect` seconds; only a `FollowStream` continues.
    `store_end` stores the last reply and its line; `on_outage` is called with the error that begins an outage.
    """

    def __init__(
        self,
        request: StreamRequest,
        numbered: bool,
        reconnect: float,
        store_end: Callable[[Reply, bytes], None],
        on_outage: Callable[[HarpException], None] = lambda error: None,
    ) -> None:
        self._original = request
        self._store_end = store_end
        self._numbered = numbered
        self._policy = ReconnectPolicy(reconnect if isinstance(request, FollowStream) else 0.0, on_outage)
        self._next_number = self._marked_number = request.since
        #: Sent with each request: each has a new connection.
        self.token: str | None = None
        self._connected_at = 0.0
        self._replied = False
        self._silent_closes = 0
        self._set_request(self._next_request() if self._policy and request.since is None else request)

    def _set_request(self, request: StreamRequest) -> None:
        self._request = request
        self.waits = isinstance(request, FollowStream)
        self._replies = ReplyReader(request)
        self.has_request, self.finished = True, False

    def _next_request(self) -> StreamRequest:
        original = self._original
        if self._next_number is None:
            # At least one record, because of its number.
            return ReadStream(original.job, recent=max(original.recent or 0, 1), timed=original.timed)
        kind = ReadStream if self._silent_closes and not self._replied else FollowStream
        return kind(original.job, since=self._next_number, timed=original.timed)

    def pop_request(self, now: float) -> bytes:
        """See `Reader`."""
        self.has_request, self._connected_at = False, now
        self._policy.connected(now)
        return encode_request(self._request, token=self.token)

    def read(self, line: bytes) -> tuple[Any, ...]:
        """Return the records of a line: one, or none for a closing line. Raise the error of a refused request."""
        reply = self._replies.read_reply(line)
        if isinstance(reply, Refused):
            raise refusal_of(reply)
        self._replied = True
        self._policy.end_outage()
        if isinstance(reply, Packet):
            had_number, self._next_number = self._next_number is not None, reply.number + 1
            # Of the records read for their number, the first is older than the request; the others are new.
            skipped = not had_number and self._request is not self._original and not self._original.recent
            if skipped:
                return ()
            if self._original.timed:
                return ((reply.number, reply.time, reply.data),)
            return ((reply.number, reply.data) if self._numbered else reply.data,)
        if isinstance(reply, Continue) and isinstance(self._original, FollowStream):
            self._next_number = self._next_number or 0
            self._set_request(self._next_request())
            return ()
        self.finished = True
        self._store_end(reply, line)
        return ()

    def read_batch(self, lines: Iterable[bytes]) -> list[Any]:
        """See `Reader`."""
        first = self._next_number
        if first is None or self._original.timed:
            return []
        records = self._replies.read_packets(lines)
        self._next_number = first + len(records)
        return list(enumerate(records, first)) if self._numbered else records

    def interrupted(self, error: HarpException, now: float) -> float:
        """See `Reader`."""
        silent = not self._replied and closed_without_reply(error) and now - self._connected_at < _REFUSED_WITHIN
        self._silent_closes += silent
        refused = silent and isinstance(self._request, ReadStream) and self._silent_closes > 1
        if silent and (refused or not self._policy):
            assert isinstance(error, CommunicationError)
            if self._original.timed:
                raise unsupported_by_peer(error, "timed=True") from error
            raise error
        pause = self._policy.next_pause(error, now)
        self._set_request(self._next_request())
        return pause

    def set_mark(self) -> None:
        """See `Reader`."""
        self._marked_number = self._next_number

    def resume(self) -> None:
        """See `Reader`."""
        if self._policy:
            self._next_number = self._marked_number
            self._set_request(self._next_request())


class StreamBase(Generic[C]):
    """Items read from a connection. It is closed after the last item, after an error, and when this object is deleted.

    It connects again when the reader has a request. If the peer keeps it open after the last item, the pool gets it.
    After an error, each further item raises it again: otherwise it would look like the end of the stream.
    """

    #: Returns the time of the monotonic clock in seconds.
    _now: Callable[[], float]
    #: A step that ends the iteration early and closes the connection.
    close: Callable[[], Any]
    #: A step that waits until the time is over or the stream is closed.
    _sleep: Callable[[float], Any]

    def __init__(self, conn: C, reader: Reader, pool: ConnectionPool[C] | None = None) -> None:
        self._conn = conn
        self._reader = reader
        self._pool = pool
        self._parsed: deque[Any] = deque()  # items that arrived with an earlier one
        self._closed = False
        self._failure: HarpException | None = None
        self._finalizer = weakref.finalize(self, conn.close_threadsafe)

    def _end(self) -> bool:
        """End the iteration; return whether this call did, so that the connection belongs to its caller."""
        self._closed = True
        return self._finalizer.detach() is not None

    def _connect(self) -> Any:
        return self._conn.connect()

    def _next_items(self) -> Steps[tuple[Any, ...]]:
        """Return the next item in a tuple, which is empty at the end."""
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        while not self._closed:
            if self._parsed:
                return (self._parsed.popleft(),)
            self._reader.set_mark()
            try:
                items = yield from self._read()
                if items and not self._reader.finished:
                    self._parsed += items
                    self._parsed += self._conn.parse_buffered(self._reader.read_batch)
            except HarpException as error:
                self._failure = error
                yield from self._finish()
                raise
            except BaseException:  # the task was cancelled, or a signal handler raised it: it can continue
                self._parsed.clear()
                yield self._conn.close()
                self._reader.resume()
                raise
            if self._reader.finished:
                yield from self._finish()
                return items
        return ()

    def _read(self) -> Steps[tuple[Any, ...]]:
        """Return the items of the next line; none after an interruption and its pause."""
        try:
            reader, conn = self._reader, self._conn
            conn.deadline = reader.deadline()
            if reader.has_request:
                yield self._connect()
                if self._closed:  # before there was a connection to close
                    yield conn.close()
            if reader.waits:
                conn.deadline = None
            if reader.has_request:
                line = yield from conn.exchange(reader.pop_request(self._now()))
            else:
                line = yield conn.receive_line()
            try:
                return self._reader.read(line)
            except ValueError as error:
                raise self._conn.error("reading", error) from error
        except HarpException as error:
            if self._closed:  # by another thread or task
                return ()
            pause = self._reader.interrupted(error, self._now())
        yield self._sleep(pause)
        return ()

    def _finish(self) -> Steps[None]:
        """End the iteration after the last line or an error."""
        if self._pool is None or self._reader.keep_alive is None:
            yield self.close()
        elif self._end() and not self._pool.put(self._conn, self._reader.keep_alive, self._now()):
            yield self._conn.close()
