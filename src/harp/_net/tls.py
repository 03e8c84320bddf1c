"""TLS as the client speaks it: contexts that are made once, and sessions that are resumed.

Making a context with its authorities takes about as long as a full handshake, and either takes longer than a call over
a connection that stands. So a context is made once for each state of a `ca_file`. The synchronous client also resumes
TLS 1.3 sessions: a server that has shown its certificate before proves by a shared secret that it is the same one.
(asyncio has no way to be given a session.)

What a resumed session proves, and what not:

- A session belongs to the context that verified the certificate, and to the name and port that it was verified for;
  it is never used for anything else. A `ca_file` that has changed is another context, and has no sessions.
- The certificate is not shown again. So one that has expired meanwhile is noticed at the next full handshake, which is
  due `TRUST_IN_SESSION` seconds after the one that began the session: what a resumed connection brings is not
  remembered, so no chain of them puts that off. The server may set a shorter time.
- Every handshake agrees on fresh keys: connections of the past stay secret when the secret of a session gets known.
- A server that does not want the session, as one that was started anew, goes on with a full handshake. A session that
  is used for several connections tells who listens that they are of the same client; its address does so anyway.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import time
from functools import lru_cache
from typing import Any, TypeAlias

from harp.errors import HarpException

__all__ = ["TRUST_IN_SESSION", "TLSContext", "TLSSocket", "tls_context"]

#: Seconds for which a session is resumed.
TRUST_IN_SESSION = 600.0

#: The most servers whose session a context remembers.
_SESSIONS = 256

#: The most contexts that are kept.
_CONTEXTS = 16

#: What tells one state of a file from another, if there is more time between them than a tick of the file system.
_FileState: TypeAlias = tuple[int, ...]

#: Nanoseconds within which a file may change twice and its times only once: what is as new as that is not kept.
_TICK = 20_000_000


def tls_context(ca_file: str | os.PathLike[str] | None) -> TLSContext:
    """How TLS is spoken: 1.2 and up; the server's chain and name are verified when there is a `ca_file`.

    The context is shared by all that ask for the same: nobody may change it. The file is read again as soon as it
    has changed.

    Raises:
        HarpException: the file can't be read or holds no certificate.
    """
    if ca_file is None:
        return _kept_context(None, ())
    try:
        path = os.fspath(ca_file)
        found = os.stat(path)
        state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        settled = time.time_ns() - found.st_ctime_ns > _TICK
        return _kept_context(path, state) if settled else _context(path)
    except ssl.SSLError as error:
        raise HarpException(f"ca_file {os.fspath(ca_file)!r}: holds no certificate in PEM form") from error
    except (OSError, ValueError, TypeError) as error:
        raise HarpException(f"ca_file {ca_file!r}: {getattr(error, 'strerror', None) or error}") from error


@lru_cache(maxsize=_CONTEXTS)  # keeps no errors
def _kept_context(path: str | None, state: _FileState) -> TLSContext:
    return _context(path)


def _context(path: str | None) -> TLSContext:
    context = TLSContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if path is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(cafile=path)
    return context


class TLSSocket(ssl.SSLSocket):
    """Is closed, and says why, when the peer has reset the connection before the handshake.

    The plain one, which asks for the peer's name first of all, would be left open, or be taken for connected.
    """

    #: When its handshake began, in seconds of the monotonic clock.
    began: float

    def getpeername(self) -> Any:
        """The peer's address. Raises `OSError`."""
        try:
            return super().getpeername()
        except OSError as error:
            self.close()
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)) from error


class TLSContext(ssl.SSLContext):
    """A context that remembers a session with each server. Any number of threads may use it."""

    sslsocket_class = TLSSocket

    def __init__(self, protocol: int) -> None:
        # Sessions, and when they began. Changed by single operations of dict: no lock can be held when a process forks.
        self._sessions: dict[tuple[str, int], tuple[ssl.SSLSession, float]] = {}

    def secured(self, sock: socket.socket, name: str, port: int) -> TLSSocket:
        """Shake hands with a server over a connected socket; resumes the session with it, if there is one.

        Args:
            sock: the socket; what is returned takes its place.
            name: what the server's certificate is to be for.
            port: the server's port.

        Raises:
            OSError: the handshake failed, or the certificate is not accepted.
        """
        now = time.monotonic()
        session, began = self._sessions.get((name, port), (None, now))
        if now - began > TRUST_IN_SESSION:
            session = None
        secured = self.wrap_socket(sock, server_hostname=name, session=session)
        assert isinstance(secured, TLSSocket)
        secured.began = now
        return secured

    def remember(self, sock: TLSSocket, name: str, port: int) -> None:
        """Remember the session that began with a connection, once the server has said something over it.

        In TLS 1.3 what is needed to resume it comes after the handshake. A session that was resumed is known already.
        """
        if sock.session_reused or sock.version() != "TLSv1.3":
            return
        session = sock.session
        if session is None or not session.has_ticket:
            return
        self._sessions.pop((name, port), None)
        self._sessions[name, port] = session, sock.began
        for oldest in list(self._sessions)[:-_SESSIONS]:
            self._sessions.pop(oldest, None)
