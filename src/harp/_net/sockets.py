"""The common part of both shells' connections: connecting, errors, received lines, the test for idleness.

Each error of socket, ssl, json and the protocol becomes a `CommunicationError` whose message contains host, port and
cause. Its `__cause__` is the original: `OSError` if the connection broke; `EOFError` if the peer closed it between
lines; `ValueError` if the peer sent invalid data.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import select
import socket
import ssl
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, NoReturn

from harp._core.connections import CAFile, Connection, DispatcherTLS, Endpoint, Steps
from harp._core.values import encode_line
from harp._net.connecting import CannotConnect, connect_first
from harp.errors import CommunicationError, HarpException
from harp.protocol.json_text import MAX_LINE_DEPTH, loads
from harp.protocol.lines import LineBuffer

#: Seconds to connect, TLS handshake included.
CONNECT_TIMEOUT = 30.0
#: Seconds between two attempts to connect to a Unix socket whose queue is full.
_QUEUE_FULL_PAUSE = 0.05
#: The most bytes in the line of a reply.
REPLY_LIMIT = 64 * 1024 * 1024
#: The most bytes of one read; more than the longest record of TLS (16 KiB).
READ_BYTES = 64 * 1024

#: Nanoseconds in which a file may change twice, but its times only once: contexts of newer files are not cached.
_CLOCK_TICK = 20_000_000

_OTHER_NAME = (
    "call the host by a name that its certificate has, or give it one with this {}; HarpServer: or use verify_hostname"
)
#: Remedies for a certificate that is not accepted, by OpenSSL's error number.
_HINTS = {
    9: "check the clocks of both machines",
    10: "renew the server's certificate",
    62: _OTHER_NAME.format("name"),
    64: _OTHER_NAME.format("address"),
}

#: Remedies for a handshake that failed, by OpenSSL's reason.
_HANDSHAKE_HINTS = {
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "TLSV1_ALERT_PROTOCOL_VERSION": "tls_minimum allows older versions",
    "UNSUPPORTED_PROTOCOL": "tls_minimum allows older versions",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the server requires a client certificate: use certfile",
    "TLSV1_ALERT_UNKNOWN_CA": "the server does not know the authority of this client's certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "renew this client's certificate",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "this client's certificate was revoked",
}

_VERSIONS = {
    "1.0": ssl.TLSVersion.TLSv1,
    "1.1": ssl.TLSVersion.TLSv1_1,
    "1.2": ssl.TLSVersion.TLSv1_2,
    "1.3": ssl.TLSVersion.TLSv1_3,
}

#: The foreign errors that become a `CommunicationError`.
FOREIGN_ERRORS = (OSError, EOFError, ValueError)


def describe_error(error: Exception) -> str:
    """Return an error's cause in words, with a hint where there is one."""
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = _HINTS.get(error.verify_code, "ca_file must contain the authority that issued it")
        return f"the server's certificate is not accepted: {error.verify_message.rstrip('.')} ({hint})"
    if isinstance(error, ssl.SSLError) and error.reason:
        words = error.reason.lower().replace("_", " ")
        return f"{words} ({_HANDSHAKE_HINTS[error.reason]})" if error.reason in _HANDSHAKE_HINTS else words
    if isinstance(error, ssl.SSLError):  # its number is not one of the system
        closed = isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError))
        return "the peer closed the connection" if closed else error.strerror or str(error)
    if isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or ("timed out" if isinstance(error, TimeoutError) else type(error).__name__)


#: Seconds by which a timer of an event loop may be early.
_TIMER_STEP = 0.05


def is_of_program(error: Exception, until: float) -> bool:
    """Return whether the program has raised an error in a wait that ends at `until`, usually in a handler of SIGALRM.

    It is a `TimeoutError` without a number of the system, before this time of the monotonic clock.
    """
    return isinstance(error, TimeoutError) and error.errno is None and time.monotonic() < until - _TIMER_STEP


class NamedByClass:
    """A function that gets its name from the body of the class in which it is: so it can be pickled."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __set_name__(self, owner: type, name: str) -> None:
        function = self._function
        function.__module__, function.__name__ = owner.__module__, name
        function.__qualname__ = f"{owner.__qualname__}.{name}"
        setattr(owner, name, function)


class Uncopyable:
    """Base of connections and iterators."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled: it has an open connection")


class BufferedConnection(Connection, Uncopyable):
    """A peer, a socket, and the lines that were received."""

    #: The process that connected: in a forked process, the connection is not closed for the peer, and not used.
    _process: int
    _context: ssl.SSLContext | None = None

    def __init__(self, host: str, port: int) -> None:
        self._endpoint = Endpoint(host, port)
        self._set_socket(None)

    def _set_socket(self, sock: socket.socket | None) -> None:
        """Use a socket, which is connected; all that was received before is discarded."""
        self._socket = sock
        self._process = os.getpid()
        self._partial = LineBuffer(REPLY_LIMIT)
        self._lines: deque[bytes] = deque()  # complete lines that are unread
        self._poll = select.poll()
        if sock is not None:
            self._poll.register(sock, select.POLLIN)

    # Steps of the shell. A deadline is a time of the monotonic clock, after which they raise `TimeoutError`.

    #: Returns the peer's addresses, as `socket.getaddrinfo` does.
    _resolve: Callable[[float], Any]
    #: Returns the sockets that are connected or have failed; waits for one, at most until the deadline.
    _wait_connected: Callable[[list[socket.socket], float], Any]
    #: Completes the TLS handshake.
    _shake_hands: Callable[[ssl.SSLSocket, float], Any]
    _send_line: Callable[[bytes], Any]

    def _open(self) -> Steps[socket.socket]:
        """Return a socket that is connected to the first address that can be reached within `CONNECT_TIMEOUT`.

        See `connect_first`. The `CommunicationError` lists all failed attempts.
        """
        self._process = os.getpid()
        deadline = time.monotonic() + CONNECT_TIMEOUT
        if self.deadline is not None:
            deadline = min(deadline, self.deadline.at)
        if self._endpoint.path is not None:
            return (yield from self._open_path(self._endpoint.path, deadline))
        context: ssl.SSLContext | None = None if self.make_context is None else self.make_context()
        self._context = context
        try:
            found = yield self._resolve(deadline)
        except FOREIGN_ERRORS as error:
            if is_of_program(error, deadline):
                raise
            raise self.error("cannot resolve the name", error) from error
        try:
            sock: socket.socket = yield from connect_first(found, deadline, self._wait_connected)
        except CannotConnect as error:
            causes = dict.fromkeys(
                describe_error(failure) if address == self._endpoint.host else f"{address}: {describe_error(failure)}"
                for address, failure in error.failures
            )
            cause = error.failures[-1][1] if error.failures else None
            raise self._error("cannot connect", "; ".join(causes) or "the name has no address") from cause
        if context is None:
            if self.confidential is not None and not _is_loopback(sock):
                self._close_socket(sock)
                raise self.not_private(self.confidential)
            return sock
        try:
            name = self._endpoint.server_name
            sock = context.wrap_socket(sock, do_handshake_on_connect=False, server_hostname=name)
            yield self._shake_hands(sock, deadline)
        except BaseException as error:
            self._close_socket(sock)
            if isinstance(error, FOREIGN_ERRORS) and not is_of_program(error, deadline):
                raise self.error("TLS handshake", error) from error
            raise
        return sock

    def _open_path(self, path: str, deadline: float) -> Steps[socket.socket]:
        """Return a socket that is connected to the Unix socket `path`, as soon as its queue has room."""
        while True:
            sock = None
            try:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                sock.setblocking(False)
                sock.connect(path)
            except BaseException as error:
                if sock is not None:
                    self._close_socket(sock)
                if not isinstance(error, FOREIGN_ERRORS):
                    raise
                if not isinstance(error, BlockingIOError) or time.monotonic() >= deadline:
                    raise self.error("cannot connect", error) from error
            else:
                return sock
            yield self._wait_connected([], time.monotonic() + _QUEUE_FULL_PAUSE)

    def is_private(self) -> bool:
        """Return whether no other machine can read what is sent: over TLS, a Unix socket, or to a loopback address."""
        sock = self._socket
        if sock is None or sock.family == socket.AF_UNIX:
            return True
        return sock.version() is not None if isinstance(sock, ssl.SSLSocket) else _is_loopback(sock)

    def not_private(self, what: str) -> HarpException:
        """Return the error for something confidential that was not sent."""
        return HarpException(
            f"{self._endpoint}: the {what} was not sent: the connection has no TLS; use ca_file or tls=True with the "
            "port of a tls: listening address of the dispatcher, or its Unix socket"
        )

    def _remaining(self) -> float | None:
        """Return the seconds until the deadline; None: no deadline. Raise `TimeoutError` if it is over."""
        if self.deadline is None:
            return None
        remaining = self.deadline.at - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        return remaining

    def _send(self, obj: Any) -> Steps[None]:
        """Send any JSON value, typically a dict, as a line.

        Raises `HarpException` if JSON cannot represent the object (the message names the part), and
        `CommunicationError` if the connection is closed or broken.
        """
        yield self._send_line(encode_line(obj))

    def _receive(self) -> Steps[Any]:
        """Wait for a JSON line, without a time limit, and return its value, typically a dict.

        Raises `CommunicationError` if the peer closed the connection, or the line is longer than 64 MiB or not JSON.
        """
        line = yield self.receive_line()
        try:
            return loads(line, MAX_LINE_DEPTH)
        except ValueError as error:
            raise self.error("reading", error) from error

    def exchange(self, line: bytes) -> Steps[Any]:
        """See `Connection`. Raise `CommunicationError`."""
        try:
            yield self._send_line(line)
        except CommunicationError:
            # A peer that refuses a request may send the reason and close before it has read all of the request.
            with suppress(CommunicationError):
                return (yield self.receive_line())
            raise
        return (yield self.receive_line())

    def is_idle(self) -> bool:
        """Return whether another request can be sent: the connection is open, of this process, and has no unread data.

        TLS has no buffered data, because each read is longer than the longest TLS record (16 KiB).
        """
        if self._socket is None or self._process != os.getpid():
            return False
        if self._lines or self._partial.size or self._poll.poll(0):
            return False
        try:  # with other files, the peer may not be accepted now, or the client be another one
            return self.make_context is None or self.make_context() is self._context
        except HarpException:  # a new connection raises it
            return False

    def _close_socket(self, sock: socket.socket) -> None:
        """Close a socket; a thread that reads it is woken. In a forked process, the connection stays open."""
        with suppress(OSError):
            if self._process == os.getpid():
                # The method of socket: that of SSLSocket would remove TLS while another thread reads.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        with suppress(OSError):
            sock.close()

    def _end_of_input(self) -> NoReturn:
        """Raise `EOFError` if the peer has closed between two lines, `ConnectionAbortedError` within a line."""
        if size := self._partial.size:
            raise ConnectionAbortedError(f"the peer closed the connection {size} bytes into a line")
        raise EOFError("the peer closed the connection before the reply was complete")

    def parse_buffered(self, parse: Callable[[Iterable[bytes]], list[Any]]) -> list[Any]:
        """See `Connection`. As many of the first lines are removed as there are items."""
        items = parse(self._lines)
        for _ in items:
            self._lines.popleft()
        return items

    def error(self, action: str, cause: Exception) -> CommunicationError:
        """Return the error for an action that failed because of a foreign error."""
        is_late = isinstance(cause, TimeoutError) and not cause.errno and action in ("reading", "sending")
        if is_late and self.deadline is not None:
            return self._error(action, f"no reply within {self.deadline.seconds:g} s; see request_timeout")
        return self._error(action, describe_error(cause))

    def _closed_here(self) -> CommunicationError:
        return self._error("not connected", "the connection was closed on this side")

    def _error(self, action: str, cause: str) -> CommunicationError:
        return CommunicationError(f"{self._endpoint}: {action}: {cause}")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._endpoint} {'closed' if self._socket is None else 'connected'}>"


class TLSConnection(BufferedConnection):
    """A connection over TLS."""

    def __init__(
        self, host: str, port: int, ca_file: CAFile = None, *, tls_minimum: str = "1.2", verify_hostname: bool = True
    ) -> None:
        self.make_context = partial(tls_context, ca_file, tls_minimum, bool(verify_hostname))
        Endpoint(host, port).check_tcp()
        super().__init__(host, port)


def tls_context(ca_file: CAFile, tls_minimum: str = "1.2", verify_hostname: bool = True) -> ssl.SSLContext:
    """Return a context that verifies the server's chain and name if there is a `ca_file`.

    All connections share the context: do not change it. The file is read again after it has changed. Raises
    `HarpException` if it cannot be read or contains no certificate, or if the TLS version is unknown.
    """
    if tls_minimum not in _VERSIONS:
        raise HarpException(f"tls_minimum: expected one of {', '.join(_VERSIONS)}, got {tls_minimum!r}")
    if ca_file is None:
        return _context(None, (), tls_minimum, False)
    try:
        path = os.fspath(ca_file)
        state, settled = _file_state(path)
        new_context = _context if settled else _context.__wrapped__
        return new_context(path, state, tls_minimum, verify_hostname)
    except ssl.SSLError as error:
        raise HarpException(f"ca_file {os.fspath(ca_file)!r}: contains no certificate in PEM form") from error
    except (OSError, ValueError, TypeError) as error:
        raise HarpException(f"ca_file {ca_file!r}: {getattr(error, 'strerror', None) or error}") from error


def _file_state(path: str | bytes) -> tuple[tuple[int, ...], bool]:
    """Return the state of a file, and whether it is settled: then a later change gives another state. Raises OSError.

    Two states differ if the file system's clock ticks between the changes.
    """
    found = os.stat(path)
    state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return state, time.time_ns() - found.st_ctime_ns > _CLOCK_TICK


def dispatcher_context(tls: DispatcherTLS) -> ssl.SSLContext:
    """Return the context for a dispatcher, which verifies its chain and its name; or the given one.

    The files are read again after they have changed. Raises `HarpException`, which names the file, if one of them
    cannot be read.
    """
    if tls.context is not None:
        given: ssl.SSLContext = tls.context
        return given
    states, settled = [], True
    for name, path in (("ca_file", tls.ca_file), ("certfile", tls.certfile), ("keyfile", tls.keyfile)):
        if path is not None:
            try:
                state, old = _file_state(path)
            except (OSError, ValueError) as error:
                raise HarpException(f"{name} {path!r}: {getattr(error, 'strerror', None) or error}") from error
            states.append(state)
            settled = settled and old
    new_context = _dispatcher_context if settled else _dispatcher_context.__wrapped__
    return new_context(tls, tuple(states))


@lru_cache(maxsize=16)
def _dispatcher_context(tls: DispatcherTLS, states: tuple[tuple[int, ...], ...]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.sslsocket_class = _TLSSocket
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    name, path, problem = "ca_file", tls.ca_file, "contains no certificate in PEM form"
    try:
        if path is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(cafile=path)
        if tls.certfile is not None:
            name, path, problem = "certfile", tls.certfile, "has no certificate with its key in PEM form; see keyfile"
            if tls.keyfile is not None:
                problem = f"has no certificate in PEM form, or keyfile {tls.keyfile!r} is not its key"
            context.load_cert_chain(tls.certfile, tls.keyfile, _reject_encrypted_key)
    except ssl.SSLError as error:
        raise HarpException(f"{name} {path!r}: {problem}") from error
    except OSError as error:
        raise HarpException(f"{name} {path!r}: {error.strerror or error}") from error
    return context


def _reject_encrypted_key() -> str:
    # Otherwise OpenSSL asks for the passphrase on the terminal.
    raise HarpException("keyfile: the key has a passphrase; use a key without one")


def _is_loopback(sock: socket.socket) -> bool:
    """Return whether the peer of a TCP connection is on this machine."""
    address = ipaddress.ip_address(sock.getpeername()[0].partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


# Creating a context with authorities takes about as long as a full handshake. Errors are not cached.
@lru_cache(maxsize=16)
def _context(path: str | None, state: tuple[int, ...], tls_minimum: str, verify_hostname: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.sslsocket_class = _TLSSocket
    if tls_minimum < "1.2":
        # OpenSSL 3 rejects the signatures of TLS 1.0 and 1.1 at its default level.
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the caller has requested this version
        context.minimum_version = _VERSIONS[tls_minimum]
    context.check_hostname = verify_hostname
    if path is None:
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(cafile=path)
    return context


class _TLSSocket(ssl.SSLSocket):
    """A socket that closes after a reset before the handshake; the base class would continue without TLS."""

    def getpeername(self) -> Any:
        """Return the peer's address. Raise `OSError`."""
        try:
            return super().getpeername()
        except OSError as error:
            self.close()
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)) from error
