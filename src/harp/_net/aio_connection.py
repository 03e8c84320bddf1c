"""Connections that carry JSON lines, for asyncio: the twins of `harp._net.connection`, which see for the rules."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn, Self, cast

from harp._net.connection import CONNECT_DEADLINE, Dial, Endpoint, Incoming, encoded, quiet
from harp._net.tls import tls_context
from harp.errors import CommunicationError
from harp.protocol.json_text import loads

__all__ = ["AsyncJSONConnection", "AsyncJSONSSLConnection"]


class _Link(asyncio.Protocol):
    """The event loop's side of a connection: collects lines, and what ended it.

    Lines that came before the end can be read after it. While there are lines that nobody has taken, no more is read
    from the network, so that a fast peer fills no memory.
    """

    transport: asyncio.Transport

    def __init__(self, endpoint: Endpoint, sock: socket.socket) -> None:
        self.sock = sock
        self._incoming = Incoming(endpoint)
        self._endpoint = endpoint
        self._failure: CommunicationError | None = None
        self._news = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        # What was sent is with the operating system, or `written` still waits.
        self.transport.set_write_buffer_limits(high=1, low=0)

    def data_received(self, data: bytes) -> None:
        try:
            self._incoming.feed(data)
        except CommunicationError as error:
            self._fail(error)
            self.transport.abort()
        else:
            if self._incoming.waiting:
                self.transport.pause_reading()
                self._news.set()

    def eof_received(self) -> None:
        try:
            self._incoming.feed(b"")
        except CommunicationError as error:
            self._fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        try:
            with self._endpoint.mapped("reading"):
                if exc is not None:
                    raise exc
            self._incoming.feed(b"")
        except CommunicationError as error:
            self._fail(error)
        self._writable.set()
        self._lost.set()

    def _fail(self, failure: CommunicationError) -> None:
        if self._failure is None:
            self._failure = failure
        self._news.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    async def written(self) -> None:
        """Wait until what was written has left. Raises `CommunicationError` when it can't any more."""
        await self._writable.wait()
        if self._lost.is_set() and self._failure is not None:
            raise self._failure.with_traceback(None)

    async def line(self) -> bytes:
        """Wait for a line. Raises `CommunicationError` when none will come."""
        while (line := self._incoming.line()) is None:
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            self._news.clear()
            self.transport.resume_reading()
            await self._news.wait()
        return line

    def take(self, read: Callable[[Iterable[bytes]], list[Any]]) -> list[Any]:
        """What a function makes of the lines that have come already; see `Incoming.take`."""
        return self._incoming.take(read)

    def rest(self) -> None:
        """Notice what comes, though nobody waits for a line."""
        if self._failure is None:
            self.transport.resume_reading()

    def quiet(self) -> bool:
        """Whether the connection stands and nothing has come that nobody has taken."""
        return self._failure is None and self._incoming.empty and quiet(self.sock)

    async def lost(self) -> None:
        """Wait until nothing is left of the connection."""
        await self._lost.wait()


class AsyncJSONConnection:
    """As `harp.JSONConnection`, but connected by ``async with`` or `connect`, not when it is made.

    Spec: docs/client-api.md, asyncio.
    """

    def __init__(self, host: str, port: int) -> None:
        #: What it connects to.
        self.endpoint = Endpoint(host, port)
        self._link: _Link | None = None

    async def connect(self) -> None:
        """As `harp.JSONConnection.connect`."""
        await self.close()
        self._loop = asyncio.get_running_loop()
        self._link = await self._open(time.monotonic() + CONNECT_DEADLINE)

    async def _open(self, last: float) -> _Link:
        """Connect before `last`, a time of the monotonic clock."""
        return await self._attach(await self._dial(last), last)

    async def _dial(self, last: float) -> socket.socket:
        with self.endpoint.mapped("can't find its address"):
            async with asyncio.timeout(last - time.monotonic()):
                found = await self._loop.getaddrinfo(self.endpoint.host, self.endpoint.port, type=socket.SOCK_STREAM)
        dial = Dial(self.endpoint, found, last)
        for sock, address, seconds in dial:
            with dial.attempt(sock, address):
                sock.setblocking(False)
                async with asyncio.timeout(seconds):
                    await self._loop.sock_connect(sock, address)
                return sock
        raise dial.failure()

    async def _attach(self, sock: socket.socket, last: float, context: ssl.SSLContext | None = None) -> _Link:
        """Give a connected socket, and TLS over it, to the event loop."""
        name = None if context is None else self.endpoint.server_name
        with self.endpoint.mapped("TLS handshake" if context else "can't connect"):
            async with asyncio.timeout(last - time.monotonic()):
                _, link = await self._loop.create_connection(
                    lambda: _Link(self.endpoint, sock), sock=sock, ssl=context, server_hostname=name
                )
        return link

    async def close(self) -> None:
        """As `harp.JSONConnection.close`; returns when nothing is left of the connection."""
        link = self._link
        self.abort()
        if link is not None:
            await link.lost()

    def abort(self) -> None:
        """Close the connection without waiting until that is done."""
        link, self._link = self._link, None
        if link is not None:
            link.transport.abort()

    def abandon(self) -> None:
        """`abort`, from any thread and also when the event loop has gone: for who is not held by anyone any more."""
        link, self._link = self._link, None
        if link is not None:
            try:
                self._loop.call_soon_threadsafe(link.transport.abort)
            except RuntimeError:  # the loop is closed: nobody else will close the socket
                link.sock.close()

    async def send(self, obj: Any) -> None:
        """As `harp.JSONConnection.send`."""
        await self.send_line(encoded(obj))

    async def receive(self) -> Any:
        """As `harp.JSONConnection.receive`."""
        line = await self.receive_line()
        with self.endpoint.mapped("reading"):
            return loads(line)

    async def send_line(self, line: bytes) -> None:
        """As `harp.JSONConnection.send_line`."""
        link = self._connected()
        link.transport.write(line)
        await link.written()

    async def receive_line(self) -> bytes:
        """As `harp.JSONConnection.receive_line`."""
        return await self._connected().line()

    def take(self, read: Callable[[Iterable[bytes]], list[Any]]) -> list[Any]:
        """As `harp.JSONConnection.take`."""
        return [] if self._link is None else self._link.take(read)

    async def ask(self, line: bytes) -> bytes:
        """As `harp.JSONConnection.ask`."""
        try:
            await self.send_line(line)
        except CommunicationError:
            # A peer that refuses a request may say why and close before it has read all of it.
            with suppress(CommunicationError):
                return await self.receive_line()
            raise
        return await self.receive_line()

    def rest(self) -> None:
        """Notice from now on what comes, the end of the connection too, though nobody waits for a line."""
        self._connected().rest()

    def quiet(self) -> bool:
        """As `harp.JSONConnection.quiet`, and the running event loop is the one that has the connection."""
        return self._link is not None and self._loop is asyncio.get_running_loop() and self._link.quiet()

    def _connected(self) -> _Link:
        if self._link is None:
            raise self.endpoint.error("not connected", "the connection is closed on this side")
        return self._link

    async def __aenter__(self) -> Self:
        if self._link is None:
            await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.endpoint} {'closed' if self._link is None else 'connected'}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} can't be copied or pickled: it holds an open connection")


class AsyncJSONSSLConnection(AsyncJSONConnection):
    """As `harp.JSONSSLConnection`, but connected by ``async with`` or `connect`, not when it is made.

    Spec: docs/client-api.md, asyncio.
    """

    def __init__(self, host: str, port: int, ca_file: str | os.PathLike[str] | None = None) -> None:
        self._ca_file = ca_file
        super().__init__(host, port)

    async def _open(self, last: float) -> _Link:
        context = tls_context(self._ca_file)
        return await self._attach(await self._dial(last), last, context)
