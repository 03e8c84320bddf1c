"""The network of the asyncio shell; each class and method does the same as the one of `harp._net.sync`."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any, NoReturn, Self, TypeVar, cast

from harp._core.calls import encode_line
from harp._core.connections import ConnectionPool, Endpoint, Peer, Steps
from harp._core.streams import Reader, StreamBase
from harp._net.sockets import CONNECT_TIMEOUT, FOREIGN_ERRORS, ReceiveBuffer, connect_socket, describe_error, is_idle
from harp._net.tls import tls_context
from harp.errors import CommunicationError
from harp.protocol.json_text import loads

T = TypeVar("T")


async def run(steps: Steps[T]) -> T:
    """Run steps and return their outcome."""
    try:
        step = next(steps)
        while True:
            try:
                value = await step
            except BaseException as error:  # noqa: BLE001  the steps handle or raise it
                step = steps.throw(error)
            else:
                step = steps.send(value)
    except StopIteration as end:
        outcome: T = end.value
        return outcome


class _Protocol(asyncio.Protocol):
    """The event loop's side of a connection: collects lines, and stores the error that ended it.

    Lines that arrived before the end can be read after it. While there are unread lines, nothing more is read from the
    network, so that a fast peer cannot fill the memory. When there are none, reading continues, so that the end of an
    idle connection is noticed.
    """

    transport: asyncio.Transport

    def __init__(self, endpoint: Endpoint, sock: socket.socket) -> None:
        self.sock = sock
        self._endpoint = endpoint
        self._received = ReceiveBuffer()
        self._failure: CommunicationError | None = None
        self._changed = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        # `flush` waits until the operating system has all data.
        self.transport.set_write_buffer_limits(high=1, low=0)

    def data_received(self, data: bytes) -> None:
        self._feed(data)
        if self._failure is not None:
            self.transport.abort()
        elif self._received.lines:
            self.transport.pause_reading()
            self._changed.set()

    def eof_received(self) -> None:
        self._feed(b"")

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._fail(exc)
        self._feed(b"")
        self._writable.set()
        self.lost.set()

    def _feed(self, data: bytes) -> None:
        try:
            self._received.feed(data)
        except FOREIGN_ERRORS as error:
            self._fail(error)

    def _fail(self, cause: Exception) -> None:
        if self._failure is None:
            self._failure = self._endpoint.error("reading", describe_error(cause))
            self._failure.__cause__ = cause
        self._changed.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    async def flush(self) -> None:
        """Wait until all data was written. Raise `CommunicationError` if the connection is lost."""
        await self._writable.wait()
        if self.lost.is_set() and self._failure is not None:
            raise self._failure.with_traceback(None)

    async def next_line(self) -> bytes:
        """Wait for a line. Raise `CommunicationError` when the connection ends without one."""
        lines = self._received.lines
        while not lines:
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            self._changed.clear()
            await self._changed.wait()
        line = lines.popleft()
        self._resume_reading()
        return line

    def parse(self, parse: Callable[[Iterable[bytes]], list[Any]]) -> list[Any]:
        """Pass the lines that have arrived already to a function; see `ReceiveBuffer.parse`."""
        items = self._received.parse(parse)
        self._resume_reading()
        return items

    def _resume_reading(self) -> None:
        if self._failure is None and not self._received.lines:
            self.transport.resume_reading()

    def is_idle(self) -> bool:
        """Return whether the connection is open and there is nothing to read."""
        return self._failure is None and self._received.empty and is_idle(self.sock)


class _Closable(ABC):
    """Common base of connections and iterators."""

    @abstractmethod
    async def close(self) -> None:
        """Close the connection."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled: it has an open connection")


class AsyncJSONConnection(_Closable):
    """Like `harp.JSONConnection`, but connected by ``async with`` or `connect`, not by the constructor.

    Spec: docs/client-api.md, asyncio.
    """

    def __init__(self, host: str, port: int) -> None:
        self._endpoint = Endpoint(host, port)
        self._protocol: _Protocol | None = None

    async def connect(self) -> None:
        """See `harp.JSONConnection.connect`."""
        await self.close()
        self._loop = asyncio.get_running_loop()
        self._protocol = await self._open(time.monotonic() + CONNECT_TIMEOUT)

    def _tls_context(self) -> ssl.SSLContext | None:
        return None

    async def _open(self, deadline: float) -> _Protocol:
        """Connect. Raise `CommunicationError` at the deadline, a time of the monotonic clock."""
        context, loop, endpoint = self._tls_context(), self._loop, self._endpoint
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                found = await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
        except FOREIGN_ERRORS as error:
            raise self.error("cannot resolve the name", error) from error
        sock = await run(connect_socket(endpoint, found, deadline, self._connect_socket))
        name = None if context is None else endpoint.server_name
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                _, protocol = await loop.create_connection(
                    lambda: _Protocol(endpoint, sock), sock=sock, ssl=context, server_hostname=name
                )
        except FOREIGN_ERRORS as error:
            raise self.error("TLS handshake" if context else "cannot connect", error) from error
        return protocol

    async def _connect_socket(self, sock: socket.socket, address: Any, seconds: float) -> None:
        sock.setblocking(False)
        async with asyncio.timeout(seconds):
            await self._loop.sock_connect(sock, address)

    async def close(self) -> None:
        """See `harp.JSONConnection.close`; returns when the connection is closed completely."""
        protocol, self._protocol = self._protocol, None
        if protocol is not None:
            protocol.transport.abort()
            await protocol.lost.wait()

    def close_threadsafe(self) -> None:
        """Close the connection without waiting, from any thread, also when its event loop has ended."""
        protocol, self._protocol = self._protocol, None
        if protocol is not None:
            try:
                self._loop.call_soon_threadsafe(protocol.transport.abort)
            except RuntimeError:  # the loop is closed: it cannot close the socket any more
                protocol.sock.close()

    async def send(self, obj: Any) -> None:
        """See `harp.JSONConnection.send`."""
        await self._send_line(encode_line(obj))

    async def receive(self) -> Any:
        """See `harp.JSONConnection.receive`."""
        line = await self.receive_line()
        try:
            return loads(line)
        except ValueError as error:
            raise self.error("reading", error) from error

    async def _send_line(self, line: bytes) -> None:
        protocol = self._connected()
        protocol.transport.write(line)
        await protocol.flush()

    async def receive_line(self) -> bytes:
        """See `harp.JSONConnection.receive_line`."""
        return await self._connected().next_line()

    def parse_buffered(self, parse: Callable[[Iterable[bytes]], list[Any]]) -> list[Any]:
        """See `harp.JSONConnection.parse_buffered`."""
        return [] if self._protocol is None else self._protocol.parse(parse)

    async def exchange(self, line: bytes) -> bytes:
        """See `harp.JSONConnection.exchange`."""
        try:
            await self._send_line(line)
        except CommunicationError:
            # A peer that refuses a request may send the reason and close before it has read all of the request.
            with suppress(CommunicationError):
                return await self.receive_line()
            raise
        return await self.receive_line()

    def is_idle(self) -> bool:
        """See `harp.JSONConnection.is_idle`; also, the connection must belong to the running event loop."""
        protocol = self._protocol
        return protocol is not None and self._loop is asyncio.get_running_loop() and protocol.is_idle()

    def error(self, action: str, cause: Exception) -> CommunicationError:
        """See `harp.JSONConnection.error`."""
        return self._endpoint.error(action, describe_error(cause))

    def _connected(self) -> _Protocol:
        if self._protocol is None:
            raise self._endpoint.error("not connected", "the connection is closed on this side")
        return self._protocol

    async def __aenter__(self) -> Self:
        if self._protocol is None:
            await self.connect()
        return self

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._endpoint} {'closed' if self._protocol is None else 'connected'}>"


class AsyncJSONSSLConnection(AsyncJSONConnection):
    """Like `harp.JSONSSLConnection`, but connected by ``async with`` or `connect`, not by the constructor.

    Spec: docs/client-api.md, asyncio.
    """

    def __init__(self, host: str, port: int, ca_file: str | os.PathLike[str] | None = None) -> None:
        self._ca_file = ca_file
        super().__init__(host, port)

    def _tls_context(self) -> ssl.SSLContext:
        return tls_context(self._ca_file)


class AsyncPeer(Peer[AsyncJSONConnection]):
    """A peer as a context manager that closes its waiting connections."""

    _now = staticmethod(time.monotonic)
    _sleep = staticmethod(asyncio.sleep)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        for conn in self._pool.drain():
            if conn.is_idle():
                await conn.close()
            else:  # it may belong to another event loop
                conn.close_threadsafe()


class AsyncIteration(_Closable, AsyncIterator[Any]):
    """Common base of the iterators."""

    async def all(self) -> list[Any]:
        """See `harp.RemoteCall.StreamIterator.all`."""
        return [item async for item in self]


class AsyncStream(StreamBase[AsyncJSONConnection], AsyncIteration):
    """Items read from a connection; see `StreamBase`."""

    _now = staticmethod(time.monotonic)

    def __init__(
        self, conn: AsyncJSONConnection, reader: Reader, pool: ConnectionPool[AsyncJSONConnection] | None = None
    ) -> None:
        self._reading = asyncio.Lock()
        self._waiting: asyncio.Timeout | None = None
        super().__init__(conn, reader, pool)

    async def __anext__(self) -> Any:
        async with self._reading:
            if self._parsed and not self._closed:
                return self._parsed.popleft()
            for item in await run(self._next_items()):
                return item
            raise StopAsyncIteration

    async def close(self) -> None:
        """End the iteration early and close its connection; has no effect after the end.

        A task that waits for an item, or for the dispatcher to come back, is woken: its iteration ends.
        """
        if self._end():
            if self._waiting is not None:
                self._waiting.reschedule(asyncio.get_running_loop().time())
            await self._conn.close()

    def _end(self) -> bool:
        ended, self._closed = self._closed, True
        return not ended

    async def _connect(self) -> None:
        await self._until_closed(self._conn.connect())

    async def _sleep(self, seconds: float) -> None:
        await self._until_closed(asyncio.sleep(seconds))

    async def _until_closed(self, waiting: Awaitable[None]) -> None:
        """Wait for something, but not after `close` of another task."""
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(None) as self._waiting:
                    await waiting
        finally:
            self._waiting = None

    def __del__(self) -> None:
        if not self._closed:
            self._conn.close_threadsafe()
