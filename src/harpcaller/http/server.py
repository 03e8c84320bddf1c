"""The server of the HTTP API: accepted connections with the parser and the ASGI side of uvicorn, in the given loop.

Theory of operation: uvicorn with httptools has no limit on the head of a request, and no deadline for one. This module
adds both to its protocol:

- A connection waits for the first byte of a request, is in its head, in its body, or waits for the response. Each of
  the first three has a deadline; the one of the body is renewed by each piece.
- The parser is fed in small pieces, so that a head is refused soon after its limit. The parser itself refuses messages
  that two readers could divide differently (request smuggling); what it accepts beyond HTTP/1.1 is refused here.
- A response to a client that does not read it is aborted when nothing was sent for some time.
- A refused client may still send. Its connection is closed for writing, and what it sends is discarded for a short
  time: closing a socket with unread data resets the connection, and the client would miss the response.

It depends on names of uvicorn's class that are not documented; a test lists them. Spec: docs/http-api.md, Limits.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from email.utils import formatdate
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from harp_daemon.acceptor import Acceptor
from harp_daemon.server_tls import ServerTLS
from harp_daemon.sockets import Listener
from harp_daemon.timer_wheel import Timer, TimerWheel
from harpcaller.access.client import Client
from harpcaller.access.identities import CERTIFICATE_EXPIRED, CERTIFICATES_CHANGED, anonymous, certified, find_expiry
from harpcaller.config import Config, HTTPSettings
from harpcaller.http.problems import COMMON_HEADERS, Problem, new_request_id
from harpcaller.http.proofs import KnownToken

log = logging.getLogger(__name__)

MAX_HEAD = 32 * 1024  #: Maximum bytes of the head of a request.
MAX_HEADERS = 100  #: Maximum number of its header lines.
MAX_URL = 8 * 1024  #: Maximum bytes of its URL.
HEAD_SECONDS = 10.0  #: Maximum seconds to the end of the head, and of a TLS handshake.
KEEP_ALIVE_SECONDS = 75  #: Maximum seconds between two requests of a connection.
_PIECE = 4 * 1024  #: Bytes that the parser gets at once.
_MAX_PIPELINED = 8  #: Maximum number of requests of a connection that wait for the response to an earlier one.
_MAX_FRAMING = 16 * 1024  #: Maximum bytes of a chunked body that are not data, beside 8 for each byte of data.
_LINGER_SECONDS = 2.0  #: Seconds for a refused client to read the response and close.
_DRAIN_SECONDS = 5.0  #: Seconds for which a closing server waits for requests in progress.
_UNSENT_BYTES = 64 * 1024  #: Maximum unsent bytes in the kernel's buffer for a client.
_SERVER = (b"server", b"harpcallerd")


def open_tls(config: Config, http: HTTPSettings) -> ServerTLS | None:
    """Return the TLS context of the addresses with TLS; None: there is no certificate. Raises `ConfigError`."""
    if http.certfile is None or http.keyfile is None:
        return None
    files = http.certfile, http.keyfile, http.tls_minimum, http.client_ca_file, http.crl_file
    return ServerTLS(f"{config.file}: http", *files)


class HTTPServer:
    """Accepts connections, and passes their requests to an ASGI application.

    `settings` returns the current settings, which a reload may change; `idle_timeout` the maximum seconds without
    progress of a body, and of a response that the client does not read.
    """

    def __init__(
        self,
        application: Any,
        settings: Callable[[], HTTPSettings],
        idle_timeout: Callable[[], float],
        tls: ServerTLS | None = None,
    ) -> None:
        self.timers = TimerWheel()
        self.idle_timeout = idle_timeout
        self.tls = tls
        self.state = ServerState()
        self.uvicorn = uvicorn.Config(
            application,
            interface="asgi3",
            http=HttpToolsProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
        self.uvicorn.load()
        problem = Problem("too_many_connections", "too many clients are connected, in all or from here", retry_after=5)
        self.acceptor: Acceptor[HTTPConnection] = Acceptor(
            self._connect,
            self._serve,
            self._reject,
            max_connections=lambda: settings().connections,
            rejection=encode_refusal(problem),
            max_per_peer=lambda: settings().connections_per_peer,
        )
        self._rejection = problem
        self._renew_date()

    def serve(self, listeners: Sequence[Listener]) -> None:
        """Accept connections from the listeners."""
        self.acceptor.open(listeners)
        for listener in listeners:
            log.info("harpcallerd is serving HTTP", extra=listener.fields)

    async def aclose(self) -> None:
        """Stop accepting connections, and wait a limited time for the requests in progress."""
        self.acceptor.close_listeners()
        for task, connection in self.acceptor.connections.items():
            if connection.is_established:
                connection.shutdown()
            else:
                task.cancel()  # its handshake
        await self.acceptor.drain(_DRAIN_SECONDS)
        await asyncio.sleep(0)  # the protocols learn that their connections are closed
        for request in self.state.tasks:
            request.cancel()
        await asyncio.gather(*self.state.tasks, return_exceptions=True)
        self.timers.close()

    @property
    def tls_version(self) -> tuple[int, int]:
        """What changes with the certificates that are accepted."""
        return (0, 0) if self.tls is None else (id(self.tls), self.tls.version)

    def _renew_date(self) -> None:
        """Set the headers of every response: the time, once a second."""
        self.state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode()), _SERVER]
        self.timers.call_later(1.0, self._renew_date)

    def _connect(self, accepted: socket.socket, peer: str, listener: Listener) -> HTTPConnection:
        if accepted.family != socket.AF_UNIX:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        context = self.tls.context if listener.is_tls and self.tls is not None else None
        return HTTPConnection(self, accepted, anonymous(peer, listener), context, self.tls_version)

    async def _serve(self, connection: HTTPConnection) -> None:
        try:
            await connection.run()
        finally:
            connection.abort()

    async def _reject(self, connection: HTTPConnection) -> None:
        connection.rejection = self._rejection
        await self._serve(connection)


class _Refused(Exception):
    """A callback of the parser has refused the request; `HTTPConnection` has the problem."""


class _Transport:
    """The transport of a connection; closing it lets the client receive what was sent.

    The head of a response, which uvicorn writes by itself, waits for the body: both are one system call and one packet.
    """

    __slots__ = ("_connection", "_head", "_transport")

    def __init__(self, transport: asyncio.Transport, connection: HTTPConnection) -> None:
        self._transport = transport
        self._connection = connection
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._connection.is_closing or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(b"HTTP/1.1 "):
            self._head = data
            self._connection.loop.call_soon(self.flush)  # if no body follows at once
            return
        self._transport.write(data)

    def flush(self) -> None:
        """Write a head that waits for its body."""
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)

    def close(self) -> None:
        self.flush()
        self._connection.close(self._transport)


class HTTPConnection(HttpToolsProtocol):
    """A connection of a client; its requests have the connection and the client in ``scope["state"]``."""

    def __init__(
        self,
        server: HTTPServer,
        accepted: socket.socket,
        client: Client,
        context: ssl.SSLContext | None,
        tls_version: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__(server.uvicorn, server.state, {"client": client, "connection": self})
        # Data after a request with "Connection: close" is an error of the client, and is discarded.
        self.parser.set_dangerous_leniencies(lenient_data_after_close=False)
        self.access_log = False
        self.peer = client  #: What is known of the client without its requests.
        self.is_closing = False  #: Whether no response can follow; input is discarded.
        self.token_proof: KnownToken | None = None  #: For `harpcaller.http.authentication`.
        self.rejection: Problem | None = None  #: With it, the connection is refused without a request.
        self.closed: asyncio.Future[None] = self.loop.create_future()  #: Done when the connection is closed.
        self._server = server
        self._accepted = accepted
        self._tls_version = tls_version
        self._expires: float | None = None  # when the certificate of the client expires, Unix seconds
        self._context = context
        self._plain: asyncio.Transport | None = None
        self._timer: Timer | None = None  # of the input
        self._write_timer: Timer | None = None
        self._is_in_head = self._is_in_body = False
        self._head_bytes = self._body_bytes = self._body_data = 0
        self._is_discarding = False  # whether input is discarded until the connection closes
        self._answered: RequestResponseCycle | None = None  # the request that is being answered, or was the last one
        self._refusal: Problem | None = None

    async def run(self) -> None:
        """Serve the connection until it is closed."""
        try:
            seconds = {} if self._context is None else {"ssl_handshake_timeout": HEAD_SECONDS}
            if self._context is not None:
                seconds["ssl_shutdown_timeout"] = _LINGER_SECONDS
            await self.loop.connect_accepted_socket(lambda: self, self._accepted, ssl=self._context, **seconds)
        except (OSError, ValueError) as error:  # ValueError: a certificate with a name that Python cannot decode
            log.info("TLS handshake failed", extra={"peer": self.peer.peer, "reason": str(error)})
            return
        await self.closed

    @property
    def is_established(self) -> bool:
        """Whether the client can send requests: a handshake, if there is one, has ended."""
        return self._plain is not None

    def confirm(self) -> None:
        """Note that the client has sent a valid request: the connection gives way to no other one."""
        self._server.acceptor.confirm(self)

    def find_error(self) -> str | None:
        """Return why the certificate of the client is void now; None: it is not."""
        if self._expires is not None and time.time() >= self._expires:
            return CERTIFICATE_EXPIRED
        return None if self._tls_version == self._server.tls_version else CERTIFICATES_CHANGED

    async def drain(self) -> None:
        """Wait until most of the sent data is in the kernel's buffer, or the connection is closed."""
        await self.flow.drain()

    def write_part(self, part: bytes) -> bool:
        """Write a part of the response that has begun, in chunks; return False if the client has to read first."""
        if self.is_closing or self.flow.write_paused:
            return False
        if part:  # an empty chunk would be the end
            self.transport.write(b"%x\r\n%b\r\n" % (len(part), part))
        return True

    # Connection.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        self._plain = transport
        if (tls_object := transport.get_extra_info("ssl_object")) is not None:
            self.app_state["client"] = self.peer = certified(self.peer, tls_object)
            self._expires = find_expiry(tls_object)
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        if self.rejection is not None:
            self._is_in_head = True
            self._send_refusal(self.rejection)
        else:
            self._start_timer(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self.is_closing = True
        self._stop_timers()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self.pipeline.clear()  # they are not answered
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True  # uvicorn does so with the latest request, which may wait behind it
            self._answered.message_event.set()
        if not self.closed.done():
            self.closed.set_result(None)

    def abort(self) -> None:
        """Close the connection at once."""
        self.is_closing = True
        if self._plain is None:
            self._accepted.close()
        elif not self.closed.done():  # asyncio fails if its transport has closed behind its last data
            self._plain.abort()

    def close(self, transport: asyncio.Transport) -> None:
        """Close the connection when all is sent. Further input is discarded."""
        if self.is_closing:
            return
        self.is_closing = True
        self._stop_timer()
        if (self._is_in_head or self._is_in_body) and transport.can_write_eof():
            self.flow.resume_reading()
            try:
                transport.write_eof()
            except OSError:  # the client has just reset the connection
                transport.abort()
                return
            self._timer = self._server.timers.call_later(_LINGER_SECONDS, transport.close)
        else:
            transport.close()
        if transport.get_write_buffer_size():
            self._watch_reader()

    # Deadlines.

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self._server.timers.call_later(seconds, self._on_late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_timers(self) -> None:
        self._stop_timer()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _on_late(self) -> None:
        self._timer = None
        if self.is_closing:
            return
        if self._is_in_body and self.flow.read_paused:
            self._start_timer(self._server.idle_timeout())  # the application has not read yet
        elif self._is_in_body:
            self._refuse(Problem("request_timeout", f"no part of the body for {self._server.idle_timeout():g} s"))
        elif self._is_in_head:
            self._refuse(Problem("request_timeout", f"the head was not complete within {HEAD_SECONDS:g} s"))
        elif self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().resume_writing()
        if self._write_timer is not None and not self.is_closing:
            self._write_timer.cancel()
            self._write_timer = None

    def _watch_reader(self) -> None:
        """Abort the connection if the client reads nothing for some time."""
        if self._write_timer is None and self._plain is not None:
            unsent = self._plain.get_write_buffer_size()
            self._write_timer = self._server.timers.call_later(
                self._server.idle_timeout(), lambda: self._check_reader(unsent)
            )

    def _check_reader(self, unsent_before: int) -> None:
        self._write_timer = None
        if self._plain is None or not (unsent := self._plain.get_write_buffer_size()):
            return
        if unsent >= unsent_before:
            log.info("client does not read", extra={"peer": self.peer.peer, "unsent": unsent})
            self.abort()
        else:
            self._watch_reader()

    # Input.

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self.is_closing or self._is_discarding:
            return
        self._unset_keepalive_if_required()
        if self._timer is None:
            self._start_timer(HEAD_SECONDS)
        for at in range(0, len(data), _PIECE):
            if not self._feed(data[at : at + _PIECE]):
                return
        if self._is_in_body:
            self._start_timer(self._server.idle_timeout())

    def _feed(self, piece: bytes) -> bool:
        """Pass data to the parser; return whether it may get more."""
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            # The request is answered as if it had no such header, which a server may do. Nothing more is parsed.
            self._end_input()
        except httptools.HttpParserCallbackError:
            self._refuse(self._refusal or Problem("invalid_request", "the request is not valid HTTP"))
        except httptools.HttpParserError as error:
            self._refuse(Problem("invalid_request", f"the request is not valid HTTP: {error}"))
        else:
            if self._is_in_head:
                self._head_bytes += len(piece)
                if self._head_bytes > MAX_HEAD + _PIECE:
                    self._refuse(_head_too_long())
            elif self._is_in_body:
                self._body_bytes += len(piece)
                if self._body_bytes - self._body_data > _MAX_FRAMING + _PIECE + 8 * self._body_data:
                    self._refuse(Problem("invalid_request", "the chunks of the body have too little data"))
        return not self.is_closing and not self._is_discarding

    def _reject_request(self, problem: Problem) -> None:
        """Refuse the request from a callback of the parser."""
        self._refusal = problem
        raise _Refused

    def on_message_begin(self) -> None:
        """Begin a request."""
        if len(self.pipeline) >= _MAX_PIPELINED:
            self._reject_request(Problem("too_many_requests", "too many requests wait on this connection"))
        super().on_message_begin()
        self._is_in_head, self._is_in_body = True, False
        self._head_bytes = self._body_bytes = self._body_data = 0

    def on_url(self, url: bytes) -> None:
        """Note a part of the URL."""
        super().on_url(url)
        if len(self.url) > MAX_URL:
            self._reject_request(Problem("url_too_long", f"the URL is longer than {MAX_URL} bytes"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header."""
        if not self._is_in_head:
            self._reject_request(Problem("invalid_request", "headers after the body are not accepted"))
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            detail = f"the request has more than {MAX_HEADERS} headers"
            self._reject_request(Problem("head_too_long", detail))

    def on_headers_complete(self) -> None:
        """Check the head, and start the application."""
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD:
            self._reject_request(_head_too_long())
        version = self.parser.get_http_version()
        names = [name for name, _ in self.headers]
        encodings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        if version not in ("1.0", "1.1"):
            self._reject_request(Problem("invalid_request", "expected HTTP/1.1 or HTTP/1.0"))
        if names.count(b"host") != 1 and (version == "1.1" or names.count(b"host") > 1):
            self._reject_request(Problem("invalid_request", "Host: expected one header"))
        if encodings and (encodings != [b"chunked"] or version == "1.0"):
            self._reject_request(Problem("invalid_request", 'Transfer-Encoding: expected "chunked" with HTTP/1.1'))
        if not self.url.startswith(b"/"):
            self._reject_request(Problem("invalid_request", "the URL must begin with a slash"))
        super().on_headers_complete()
        self._is_in_head, self._is_in_body = False, True

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        """Note a part of the body."""
        self._body_data += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the input of a request."""
        self._is_in_head = self._is_in_body = False
        self._stop_timer()
        super().on_message_complete()

    # Refusals.

    def _end_input(self) -> None:
        """Discard further input; the connection is closed after the responses to the requests so far."""
        self._is_discarding = True
        self._stop_timer()
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:
            self.cycle.keep_alive = False

    def _refuse(self, problem: Problem) -> None:
        """Send a refusal, or only close the connection after the responses to earlier requests."""
        if self._is_in_body and self.pipeline:  # its newest one is refused
            self.pipeline.popleft()
            before = self.pipeline[0][0] if self.pipeline else self._answered
            assert before is not None
            self.cycle = before
            self._end_input()
            return
        cycle = self.cycle
        is_open = cycle is not None and not cycle.response_complete
        if is_open and self._is_in_body and not cycle.response_started:
            cycle.disconnected = True
            cycle.message_event.set()
            self._send_refusal(problem)
        elif is_open:
            if self._is_in_body:
                cycle.disconnected = True
                cycle.message_event.set()
                self.transport.close()
            self._end_input()
        elif self._is_in_body:  # the request has its response
            self.transport.close()
        else:
            self._send_refusal(problem)

    def _send_refusal(self, problem: Problem) -> None:
        log.info("HTTP request refused", extra={"client": self.peer.peer, "reason": problem.detail})
        self.transport.write(encode_refusal(problem, self.server_state.default_headers))
        self.transport.close()


def _head_too_long() -> Problem:
    return Problem("head_too_long", f"the head of the request is longer than {MAX_HEAD} bytes")


def encode_refusal(problem: Problem, headers: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """Return a response without an application, after which the connection is closed."""
    request_id = new_request_id()
    body = problem.encode(request_id)
    lines = [b"%b: %b" % pair for pair in (*headers, *COMMON_HEADERS)]
    own = {**problem.all_headers(), "Harp-Request": request_id, "Content-Length": str(len(body)), "Connection": "close"}
    lines += [f"{name}: {value}".encode() for name, value in own.items()]
    status = b"HTTP/1.1 %d %b" % (problem.status, problem.title.encode())
    return b"\r\n".join([status, *lines, b"", body])
