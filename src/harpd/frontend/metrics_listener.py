"""The listener for Prometheus: it answers ``GET /metrics`` on loopback addresses, and nothing else.

It needs no HTTP library, because it accepts one form of request and closes each connection after its reply. All is
bounded: connections, bytes and time of a request, and the time in which a client reads. The header ``Host`` must name
this machine, so that no page in a browser can read the metrics by a name that resolves to a loopback address.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from typing import cast

from harp_daemon.exposition import OPENMETRICS, TEXT, accepts_openmetrics
from harp_daemon.sockets import Listener

log = logging.getLogger("harpd.frontend")

_MAX_CONNECTIONS = 16  #: Maximum number of open connections; the oldest one without a request gives way.
_MAX_HEAD = 8192  #: Maximum bytes of a request.
_SECONDS = 10.0  #: Maximum seconds from the connection to its end.
_REQUEST = re.compile(rb"(GET|HEAD) (/[!-~]*) HTTP/1\.[01]\r\n")
#: The value has the spaces around it: an expression that separates them has n^3 ways to divide n spaces.
_HEADER = re.compile(rb"^([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)\r$", re.MULTILINE)
_HOST = re.compile(r"(?:localhost|127(?:\.\d{1,3}){3}|\[::1\])(?::\d{1,5})?", re.IGNORECASE | re.ASCII)
_REASONS = {200: "OK", 400: "Bad Request", 403: "Forbidden", 404: "Not Found", 503: "Service Unavailable"}


class MetricsListener:
    """The server on some listeners. `scrape` returns the text of the metrics, with True in the format OpenMetrics.

    A connection lasts at most `seconds`.
    """

    def __init__(
        self, listeners: list[Listener], scrape: Callable[[bool], Awaitable[bytes]], seconds: float = _SECONDS
    ) -> None:
        self.seconds = seconds
        self._listeners = listeners
        self._scrape = scrape
        self._servers: list[asyncio.Server] = []
        self._opening: asyncio.Task[None] | None = None
        self._connections: dict[_Connection, None] = {}  # the oldest first
        self._replies: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Accept connections."""
        self._opening = asyncio.create_task(self._open())

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            self._servers.append(await loop.create_server(self._connect, sock=listener.socket))
            log.info("harpd serves metrics", extra=listener.fields)

    async def aclose(self) -> None:
        """Close all connections and the listeners."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        for server in self._servers:
            server.close()
        for listener in self._listeners:
            listener.close()
        for connection in list(self._connections):
            connection.abort()
        for reply in self._replies:
            reply.cancel()
        if self._replies:
            await asyncio.wait(self._replies)

    def _connect(self) -> _Connection:
        return _Connection(self)

    def _admit(self, connection: _Connection) -> bool:
        if len(self._connections) >= _MAX_CONNECTIONS:
            silent = next((each for each in self._connections if not each.has_request), None)
            if silent is None:
                return False
            self._forget(silent)
            silent.abort()
        self._connections[connection] = None
        return True

    def _forget(self, connection: _Connection) -> None:
        self._connections.pop(connection, None)

    def _reply(self, connection: _Connection, head: bytes) -> None:
        reply = asyncio.create_task(self._send_reply(connection, head))
        self._replies.add(reply)
        reply.add_done_callback(self._replies.discard)

    async def _send_reply(self, connection: _Connection, head: bytes) -> None:
        status, method, openmetrics = check_request(head)
        body = f"{_REASONS[status]}\n".encode()
        kind = "text/plain; charset=utf-8"
        if status == 200:
            try:
                body = await self._scrape(openmetrics)
                kind = OPENMETRICS if openmetrics else TEXT
            except Exception:
                log.exception("cannot measure: internal error")
                status, body = 503, b"cannot measure; see the log of harpd\n"
        connection.send(status, kind, body, with_body=method != b"HEAD")


def check_request(head: bytes) -> tuple[int, bytes, bool]:
    """Return the status of the reply to a request, its method, and whether it asks for OpenMetrics."""
    request = _REQUEST.match(head)
    if request is None:
        return 400, b"GET", False
    lines = head[request.end() :]
    headers = [(name.lower(), value.strip(b" \t").decode("latin-1")) for name, value in _HEADER.findall(lines)]
    if len(headers) != lines.count(b"\n"):  # a line of another form, such as one that continues another
        return 400, request[1], False
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) != 1 or any(name in (b"content-length", b"transfer-encoding") for name, _ in headers):
        return 400, request[1], False
    if not _HOST.fullmatch(hosts[0]):
        return 403, request[1], False
    path = request[2].partition(b"?")[0]
    accepted = ",".join(value for name, value in headers if name == b"accept")
    return 200 if path == b"/metrics" else 404, request[1], accepts_openmetrics(accepted)


class _Connection(asyncio.Protocol):
    """A connection of a client, for one request."""

    def __init__(self, server: MetricsListener) -> None:
        self._server = server
        self._head = b""
        self.has_request = False
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if not self._server._admit(self):
            self._transport.abort()
            return
        self._timer = asyncio.get_running_loop().call_later(self._server.seconds, self.abort)

    def data_received(self, data: bytes) -> None:
        if self.has_request:
            return  # nothing may follow; the time is limited
        self._head += data
        head, end, _ = self._head.partition(b"\r\n\r\n")
        if len(head) > _MAX_HEAD:
            self.has_request = True
            self.send(400, "text/plain; charset=utf-8", b"the request is too long\n")
        elif end:
            self.has_request = True
            self._head = b""
            self._server._reply(self, head + b"\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._server._forget(self)

    def send(self, status: int, kind: str, body: bytes, with_body: bool = True) -> None:
        head = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
        )
        self._transport.write(head.encode() + (body if with_body else b""))
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()
