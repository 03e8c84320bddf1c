"""The network of the asyncio shell; its classes and methods behave as those of `harp._net.sync`.

A connection is a socket that does not block, and that the event loop watches: no transport, no protocol, no TLS in
memory. That is a third of the work, and a connection that is still open at the end of its loop does not warn.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from functools import wraps
from typing import Any, ParamSpec, Self, TypeVar

from harp._core.connections import Peer, Steps
from harp._core.lists import ListBase
from harp._core.streams import StreamBase
from harp._net.connecting import AddressInfo, find_connected, look_up
from harp._net.sockets import (
    FOREIGN_ERRORS,
    READ_BYTES,
    BufferedConnection,
    NamedByClass,
    TLSConnection,
    Uncopyable,
)
from harp.errors import CommunicationError

T = TypeVar("T")
P = ParamSpec("P")


def method(operation: Callable[P, Steps[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Return the coroutine function that runs the steps of an operation; the class gives it its name."""

    @wraps(operation)
    async def run(*args: P.args, **kwargs: P.kwargs) -> T:
        steps, deleted = operation(*args, **kwargs), False
        try:
            step = next(steps)
            while True:
                try:
                    value = await step
                except BaseException as error:  # noqa: BLE001  the steps handle or raise it
                    # The task is deleted with its loop: after GeneratorExit, the steps could not close connections.
                    deleted = isinstance(error, GeneratorExit)
                    step = steps.throw(asyncio.CancelledError() if deleted else error)
                else:
                    step = steps.send(value)
        except StopIteration as end:
            outcome: T = end.value
            return outcome
        except asyncio.CancelledError:
            if deleted:
                raise GeneratorExit from None
            raise

    named: Any = NamedByClass(run)
    method: Callable[P, Coroutine[Any, Any, T]] = named
    return method


class _Closable(Uncopyable):
    """Common base of connections and iterators."""

    close: Callable[[], Coroutine[Any, Any, None]]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()


#: Raised by a socket that does not block when it has to wait.
_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class AsyncJSONConnection(BufferedConnection, _Closable):
    """Like `harp.JSONConnection`, but connected by ``async with`` or `connect`, not by the constructor.

    Lines that arrived before the end of the connection can be read after it. While there are unread lines, reading from
    the network is paused, so that a fast peer cannot fill the memory. Otherwise it continues, so that the end of an
    idle connection is noticed. Spec: docs/client-api.md, asyncio.
    """

    _is_watched = False
    _failure: CommunicationError | None = None

    async def connect(self) -> None:
        """See `harp.JSONConnection.connect`."""
        await self.close()
        self._loop = asyncio.get_running_loop()
        self._failure = None
        self._is_watched = False  # an earlier loop may have ended with an open connection
        self._waiters: list[asyncio.Future[None]] = []
        self._set_socket(await self._open_socket())

    _open_socket = method(BufferedConnection._open)

    async def _resolve(self, deadline: float) -> Sequence[AddressInfo]:
        loop = self._loop
        found: asyncio.Future[Sequence[AddressInfo] | Exception] = loop.create_future()

        def put(outcome: Sequence[AddressInfo] | Exception) -> None:
            if not found.done():
                found.set_result(outcome)

        def put_threadsafe(outcome: Sequence[AddressInfo] | Exception) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(put, outcome)

        look_up(self._endpoint.host, self._endpoint.port, put_threadsafe)
        async with asyncio.timeout(deadline - time.monotonic()):
            outcome = await found
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _wait_connected(self, sockets: list[socket.socket], deadline: float) -> list[socket.socket]:
        for sock in sockets:
            self._loop.add_writer(sock.fileno(), self._wake)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._changed()
        finally:
            for sock in sockets:
                self._loop.remove_writer(sock.fileno())
        return find_connected(sockets, 0.0)

    async def _shake_hands(self, sock: ssl.SSLSocket, deadline: float) -> None:
        async with asyncio.timeout(deadline - time.monotonic()):
            while True:
                try:
                    return sock.do_handshake()
                except ssl.SSLWantReadError:
                    await self._until_ready(sock, self._loop.add_reader, self._loop.remove_reader)
                except ssl.SSLWantWriteError:
                    await self._until_ready(sock, self._loop.add_writer, self._loop.remove_writer)

    async def _until_ready(self, sock: socket.socket, add: Callable[..., Any], remove: Callable[[int], Any]) -> None:
        """Wait until the loop reports a socket, or the connection has ended."""
        add(sock.fileno(), self._wake)
        try:
            await self._changed()
        finally:
            if sock.fileno() >= 0:  # not closed
                remove(sock.fileno())

    async def close(self) -> None:
        """See `harp.JSONConnection.close`."""
        if self._socket is not None and self._process == os.getpid() and self._loop is _running_loop():
            self._close()
        else:
            self.close_threadsafe()

    def close_threadsafe(self) -> None:
        """Close the connection without waiting, from any thread, also when its event loop has ended."""
        sock = self._socket
        if sock is not None:
            if self._process == os.getpid():
                with suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._close)
                    return
            # Its loop is closed, or belongs to the parent process.
            self._socket = None
            self._close_socket(sock)

    def _close(self) -> None:
        sock, self._socket = self._socket, None
        if sock is not None:
            self._is_watched = False
            self._loop.remove_reader(sock.fileno())
            self._loop.remove_writer(sock.fileno())
            self._close_socket(sock)
            self._wake()

    def _on_readable(self, sock: socket.socket) -> None:
        if self._lines:
            self._is_watched = False
            self._loop.remove_reader(sock.fileno())
            return
        try:
            data = sock.recv(READ_BYTES)
            self._lines += self._partial.feed(data) if data else self._end_of_input()
        except _WOULD_BLOCK:
            return
        except FOREIGN_ERRORS as error:
            self._failure = self.error("reading", error)
            self._failure.__cause__ = error
            self._close()
        if self._lines:
            self._wake()

    def _changed(self) -> asyncio.Future[None]:
        """Return a future that ends when the socket is ready, lines have arrived, or the connection or time is over."""
        remaining = self._remaining()
        waiter = self._loop.create_future()
        self._waiters.append(waiter)
        if remaining is not None:
            timer = self._loop.call_later(remaining, self._wake)
            waiter.add_done_callback(lambda done: timer.cancel())
        return waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    send = method(BufferedConnection._send)
    receive = method(BufferedConnection._receive)

    async def _send_line(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:
            sock = self._connected()
            try:
                try:
                    rest = rest[sock.send(rest) :]
                except _WOULD_BLOCK:
                    await self._until_ready(sock, self._loop.add_writer, self._loop.remove_writer)
            except FOREIGN_ERRORS as error:
                raise self.error("sending", error) from error

    async def receive_line(self) -> bytes:
        """See `BufferedConnection`."""
        while not self._lines:
            sock = self._connected()
            if not self._is_watched:
                self._is_watched = True
                self._loop.add_reader(sock.fileno(), self._on_readable, sock)
            try:
                await self._changed()
            except TimeoutError as error:
                raise self.error("reading", error) from error
        return self._lines.popleft()

    def is_idle(self) -> bool:
        """See `BufferedConnection`; also, the connection must belong to the running event loop."""
        return self._socket is not None and self._loop is _running_loop() and super().is_idle()

    def _connected(self) -> socket.socket:
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        if self._socket is None:
            raise self._closed_here()
        return self._socket

    async def __aenter__(self) -> Self:
        if self._socket is None:
            await self.connect()
        return self


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the loop that runs in this thread; None: none does, as when a task is deleted after its loop."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class AsyncJSONSSLConnection(TLSConnection, AsyncJSONConnection):
    """Like `harp.JSONSSLConnection`, connected by ``async with`` or `connect`. Spec: docs/client-api.md, asyncio."""


class AsyncPeer(Peer[AsyncJSONConnection]):
    """A peer as a context manager that closes its waiting connections."""

    _now = staticmethod(time.monotonic)
    _sleep = staticmethod(asyncio.sleep)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self._pool.close()


class AsyncIteration(_Closable, AsyncIterator[Any]):
    """Common base of the iterators."""

    async def all(self) -> list[Any]:
        """See `harp.RemoteCall.StreamIterator.all`."""
        return [item async for item in self]


class AsyncStream(StreamBase[AsyncJSONConnection], AsyncIteration):
    """Items read from a connection; see `StreamBase`."""

    _now = staticmethod(time.monotonic)
    _next = method(StreamBase._next_items)

    def __init__(self, *stream: Any) -> None:
        super().__init__(*stream)
        self._reading = asyncio.Lock()
        self._waiting: asyncio.Timeout | None = None

    async def __anext__(self) -> Any:
        async with self._reading:
            if self._parsed and not self._closed:
                return self._parsed.popleft()
            for item in await self._next():
                return item
            raise StopAsyncIteration

    async def close(self) -> None:
        """See `harp._net.sync.Stream.close`."""
        if self._end():
            if self._waiting is not None:
                self._waiting.reschedule(0.0)  # immediately
            await self._conn.close()

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


class AsyncListIterator(ListBase[T], _Closable, AsyncIterator[T]):
    """See `harp._net.sync.ListIterator`."""

    _next = method(ListBase._next_items)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._reading = asyncio.Lock()

    async def __anext__(self) -> T:
        async with self._reading:
            found: tuple[T, ...] = await self._next()
        for item in found:
            return item
        raise StopAsyncIteration

    async def all(self) -> list[T]:
        """See `harp._net.sync.ListIterator.all`."""
        return [item async for item in self]

    async def close(self) -> None:
        """See `harp._net.sync.ListIterator.close`."""
        self._end()
