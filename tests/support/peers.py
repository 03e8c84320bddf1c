"""Scripted peers: servers of lines, plain or with TLS, that do exactly what a test tells them.

A script is a function that is given a `HarpdConnection`; each connection plays the next script, in a thread of its own:

    def script(talk: Conversation) -> None:
        talk.expect({"harpcaller": 1, "get_result": JOB, "wait": True})
        talk.reply({"result": 5})

    with Peer(script) as peer:
        ...connect to peer.host, peer.port...

When a script returns, its connection is closed. At the end of the ``with`` everything is closed and joined; a script
that failed, was not played, or was played once too often fails the test.
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

#: Seconds that a step may take before the test fails.
DEADLINE = 30.0

#: Expects any request.
ANY: Any = object()


def line_of(message: object) -> bytes:
    """A message's line; bytes are taken as they are."""
    return message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n"


def single_bytes(data: bytes) -> list[bytes]:
    """Data as pieces of one byte."""
    return [data[at : at + 1] for at in range(len(data))]


class Conversation:
    """A connection, as the peer has it.

    Attributes:
        received: the lines that came, without line feeds.
        began: set when the connection is ready to talk, after the handshake of TLS.
        closed: set when the other side was seen to close.
        handshake_error: what broke the handshake of TLS.
    """

    def __init__(self, sock: socket.socket, ending: threading.Event) -> None:
        sock.settimeout(DEADLINE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.received: list[bytes] = []
        self.began = threading.Event()
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
                raise AssertionError(f"expected a line, the other side closed after {self._rest!r}")
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        self.received.append(line)
        return line

    def expect(self, request: object = ANY) -> Any:
        """Wait for a line, decode it, compare it with `request` unless that is `ANY`, and return it."""
        found = json.loads(self.line())
        assert request is ANY or found == request, f"expected {request!r}, got {found!r}"
        return found

    def send(self, *pieces: bytes) -> None:
        """Send bytes, each piece by itself."""
        for piece in pieces:
            self.sock.sendall(piece)

    def reply(self, *messages: object) -> None:
        """Send messages, each as a line."""
        for message in messages:
            self.send(line_of(message))

    def until_closed(self) -> None:
        """Say nothing until the other side closes, which `closed` then tells, or the test ends."""
        while not self._ending.is_set():
            try:
                if self.sock.recv(65536):
                    continue
            except TimeoutError as error:
                raise AssertionError(f"the other side did not close within {DEADLINE} s") from error
            except OSError:
                pass
            if not self._ending.is_set():
                self.closed.set()
            return

    def reset(self) -> None:
        """Close so that the other side gets a reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


Script: TypeAlias = Callable[[Conversation], None]


def answering(
    *replies: object, request: object = ANY, pieces: Callable[[bytes], Iterable[bytes]] = lambda data: [data]
) -> Script:
    """A script: expect a request, send the replies in pieces as `pieces` cuts them, close."""

    def script(talk: Conversation) -> None:
        talk.expect(request)
        talk.send(*pieces(b"".join(map(line_of, replies))))

    return script


def keeping(*answers: Iterable[object]) -> Script:
    """A script: one request after the other, each with its replies, then silence until the other side closes."""

    def script(talk: Conversation) -> None:
        for replies in answers:
            talk.expect()
            talk.send(b"".join(map(line_of, replies)))
        talk.until_closed()

    return script


def silent(talk: Conversation) -> None:
    """A script: say nothing."""
    talk.until_closed()


def resetting(talk: Conversation) -> None:
    """A script: read a request, then reset the connection."""
    talk.expect()
    talk.reset()


def server_context(certificates: Certificates) -> ssl.SSLContext:
    """TLS as a server speaks it; a test may change the versions in it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.certfile, certificates.keyfile)
    return context


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port of 127.0.0.1 that refuses, for peers to listen on one after the other; nobody else gets it meanwhile."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


class Peer:
    """A server that plays scripts.

    Args:
        *scripts: one a connection, in the order in which connections come.
        always: the script of every connection after these; None: there must be no more.
        tls: speak TLS.
        address: where to listen.
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
        self.conversations: list[Conversation] = []
        self._last: Any = None
        self._failures: list[BaseException] = []
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._accept, name="peer")]

    @property
    def requests(self) -> list[Any]:
        """Every line that came, decoded, connection after connection."""
        return [json.loads(line) for talk in self.conversations for line in talk.received]

    def play_next(self, script: Script) -> None:
        """Have this script played by a connection that is still to come, after the scripts that wait already."""
        self._scripts.append(script)

    def _accept(self) -> None:
        while True:
            sock, address = self._listener.accept()
            if address == self._last:
                sock.close()
                return
            talk = Conversation(sock, self._ending)
            script = self._scripts.pop(0) if self._scripts else self._always
            self.conversations.append(talk)
            thread = threading.Thread(target=self._play, args=(talk, script), name="peer")
            self._threads.append(thread)
            thread.start()

    def _play(self, talk: Conversation, script: Script | None) -> None:
        try:
            assert script is not None, "one connection more than there are scripts"
            if self._tls is None or self._shake_hands(talk, self._tls):
                talk.began.set()
                script(talk)
        except BaseException as error:  # noqa: BLE001  reported by __exit__
            if not self._ending.is_set():
                self._failures.append(error)
        finally:
            talk.sock.close()

    def _shake_hands(self, talk: Conversation, context: ssl.SSLContext) -> bool:
        try:
            talk.sock = context.wrap_socket(talk.sock, server_side=True)
        except OSError as error:
            talk.handshake_error = error
            return False
        return True

    def __enter__(self) -> Peer:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What connects last is accepted last: every connection of the test has found its script by then.
        with socket.socket(self._listener.family) as last:
            last.bind((self.host, 0))
            self._last = last.getsockname()
            last.settimeout(DEADLINE)
            last.connect((self.host, self.port))
            self._threads[0].join(DEADLINE)
        self._listener.close()
        self._ending.set()
        for talk in self.conversations:
            with suppress(OSError):
                socket.socket.shutdown(talk.sock, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(DEADLINE)
        left = [thread for thread in self._threads if thread.is_alive()]
        if kind is None:
            assert not left, f"{len(left)} threads of the peer are still running"
            assert not self._scripts, f"{len(self._scripts)} scripts were not played"
            if self._failures:
                raise self._failures[0]
