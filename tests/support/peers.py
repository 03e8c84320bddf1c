"""Scripted peers: servers of JSON lines, with or without TLS. The test supplies their behaviour as a script.

A script is a function of a `PeerConnection`, one connection of the peer. Each connection runs the next script:

    def script(conn: PeerConnection) -> None:
        conn.expect({"harpcaller": 1, "get_result": JOB, "wait": True})
        conn.reply({"result": 5})

    with Peer(script) as peer:
        ...connect to peer.host, peer.port...

When a script returns, its connection is closed. The end of ``with`` closes all connections and joins all threads. The
test fails if a script failed, if a script was not run, or if there were more connections than scripts.
"""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, TypeAlias

from support.certificates import Certificates

#: Seconds after which a step fails the test.
DEADLINE = 30.0

#: Matches any request.
ANY: Any = object()


class ClosedWithoutRequest(AssertionError):
    """The client has closed a connection before it sent anything."""


def line_of(message: object) -> bytes:
    """Return a message's line; bytes stay unchanged."""
    return message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n"


def single_bytes(data: bytes) -> list[bytes]:
    """Return data in pieces of one byte."""
    return [data[at : at + 1] for at in range(len(data))]


class PeerConnection:
    """The peer's side of a connection.

    Attributes:
        received: the received lines, without line feeds.
        is_ready: set when the connection is ready, after the TLS handshake.
        closed: set when the client has closed.
        handshake_error: the error of the TLS handshake.
    """

    def __init__(self, sock: socket.socket, ending: threading.Event) -> None:
        sock.settimeout(DEADLINE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.received: list[bytes] = []
        self.is_ready = threading.Event()
        self.closed = threading.Event()
        self.handshake_error: OSError | None = None
        self._ending = ending
        self._rest = b""

    def line(self) -> bytes:
        """Wait for a line and return it without its line feed."""
        while b"\n" not in self._rest:
            try:
                data = self.sock.recv(65536)
            except ConnectionError:
                data = b""
            if not data:
                self.closed.set()
                kind = AssertionError if self._rest or self.received else ClosedWithoutRequest
                raise kind(f"expected a line, the client closed after {self._rest!r}")
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        self.received.append(line)
        return line

    def expect(self, request: object = ANY) -> Any:
        """Wait for a line and return its value. Assert that it equals `request`, unless this is `ANY`."""
        found = json.loads(self.line())
        assert request is ANY or found == request, f"expected {request!r}, got {found!r}"
        return found

    def send(self, *pieces: bytes) -> None:
        """Send bytes, one piece after the other."""
        for piece in pieces:
            self.sock.sendall(piece)

    def reply(self, *messages: object) -> None:
        """Send messages, each as a line."""
        for message in messages:
            self.send(line_of(message))

    def until_closed(self, deadline: float | None = DEADLINE) -> None:
        """Be silent until the client closes, and set `closed`; or until the test ends.

        With None as `deadline` the client may stay as long as the test takes.
        """
        self.sock.settimeout(deadline)
        while not self._ending.is_set():
            try:
                if self.sock.recv(65536):
                    continue
            except TimeoutError as error:
                raise AssertionError(f"the client did not close within {deadline} s") from error
            except OSError:
                pass
            if not self._ending.is_set():
                self.closed.set()
            return

    def reset(self) -> None:
        """Reset the connection."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


Script: TypeAlias = Callable[[PeerConnection], None]


def answering(
    *replies: object, request: object = ANY, pieces: Callable[[bytes], Iterable[bytes]] = lambda data: [data]
) -> Script:
    """Return a script that expects a request, sends the replies in pieces cut by `pieces`, and closes."""

    def script(conn: PeerConnection) -> None:
        conn.expect(request)
        conn.send(*pieces(b"".join(map(line_of, replies))))

    return script


def keeping(*answers: Iterable[object]) -> Script:
    """Return a script that sends the replies of one request after the other, then waits until the client closes."""

    def script(conn: PeerConnection) -> None:
        for replies in answers:
            conn.expect()
            conn.send(b"".join(map(line_of, replies)))
        conn.until_closed()

    return script


def unless_closed(script: Script) -> Script:
    """Return a script for a client that may close at any time, also before it sends its request."""

    def tolerant(conn: PeerConnection) -> None:
        with suppress(ClosedWithoutRequest):
            script(conn)

    return tolerant


def silent(conn: PeerConnection) -> None:
    """Be silent; a script."""
    conn.until_closed()


def resetting(conn: PeerConnection) -> None:
    """Read a request, then reset the connection; a script."""
    conn.expect()
    conn.reset()


def server_context(certificates: Certificates) -> ssl.SSLContext:
    """Return a new TLS context for a server; the test may change it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.certfile, certificates.keyfile)
    return context


@contextmanager
def reserved_port() -> Iterator[int]:
    """Reserve a port of 127.0.0.1, which refuses connections until a peer listens on it."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


class Peer:
    """A server that runs scripts.

    Args:
        *scripts: one for each connection, in the order of the connections.
        always: the script of all further connections; None: there must be none.
        tls: the TLS context; None: no TLS.
        address: the address to listen on.
        port: the port; 0: a free one.
    """

    def __init__(
        self,
        *scripts: Script,
        always: Script | None = None,
        tls: ssl.SSLContext | None = None,
        address: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self._scripts = list(scripts)
        self._always = always
        self._tls = tls
        self.host = address
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, port), family=family, backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self.connections: list[PeerConnection] = []
        self._last: Any = None
        self._failures: list[BaseException] = []
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._accept, name="peer")]

    @property
    def requests(self) -> list[Any]:
        """The values of all received lines, connection after connection."""
        return [json.loads(line) for conn in self.connections for line in conn.received]

    def play_next(self, script: Script) -> None:
        """Add a script for a further connection."""
        self._scripts.append(script)

    def _accept(self) -> None:
        while True:
            sock, address = self._listener.accept()
            if address == self._last:
                sock.close()
                return
            conn = PeerConnection(sock, self._ending)
            script = self._scripts.pop(0) if self._scripts else self._always
            self.connections.append(conn)
            thread = threading.Thread(target=self._play, args=(conn, script), name="peer")
            self._threads.append(thread)
            thread.start()

    def _play(self, conn: PeerConnection, script: Script | None) -> None:
        try:
            assert script is not None, "more connections than scripts"
            if self._tls is None or self._shake_hands(conn, self._tls):
                conn.is_ready.set()
                script(conn)
        except BaseException as error:  # noqa: BLE001  reported by __exit__
            if not self._ending.is_set():
                self._failures.append(error)
        finally:
            conn.sock.close()

    def _shake_hands(self, conn: PeerConnection, context: ssl.SSLContext) -> bool:
        try:
            conn.sock = context.wrap_socket(conn.sock, server_side=True)
        except OSError as error:
            conn.handshake_error = error
            return False
        return True

    def __enter__(self) -> Peer:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Connections are accepted in order: after this last one, every connection of the test has its script.
        with socket.socket(self._listener.family) as last:
            last.bind((self.host, 0))
            self._last = last.getsockname()
            last.settimeout(DEADLINE)
            last.connect((self.host, self.port))
            self._threads[0].join(DEADLINE)
        self._listener.close()
        self._ending.set()
        for conn in self.connections:
            with suppress(OSError):
                socket.socket.shutdown(conn.sock, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(DEADLINE)
        left = [thread for thread in self._threads if thread.is_alive()]
        if kind is None:
            assert not left, f"{len(left)} threads of the peer are still running"
            assert not self._scripts, f"{len(self._scripts)} scripts were not run"
            if self._failures:
                raise self._failures[0]
