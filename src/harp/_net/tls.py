"""TLS contexts of the client, cached for each state of a `ca_file`.

To create a context with its authorities takes about as long as a full handshake, and longer than a call on an open
connection.
"""

from __future__ import annotations

import errno
import os
import ssl
import time
from functools import lru_cache
from typing import Any

from harp.errors import HarpException

#: The most cached contexts.
_CACHE_SIZE = 16

#: Nanoseconds in which a file may change twice, but its times only once: contexts of newer files are not cached.
_CLOCK_TICK = 20_000_000


def tls_context(ca_file: str | os.PathLike[str] | None) -> ssl.SSLContext:
    """Return a context for TLS 1.2 and newer, which verifies the server's chain and name if there is a `ca_file`.

    All connections share the context: do not change it. The file is read again after it has changed.

    Raises:
        HarpException: the file cannot be read or contains no certificate.
    """
    if ca_file is None:
        return _context(None, ())
    try:
        path = os.fspath(ca_file)
        found = os.stat(path)
        # Two states of a file differ if the file system's clock ticks between the changes.
        state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        settled = time.time_ns() - found.st_ctime_ns > _CLOCK_TICK
        return _context(path, state) if settled else _context.__wrapped__(path, state)
    except ssl.SSLError as error:
        raise HarpException(f"ca_file {os.fspath(ca_file)!r}: contains no certificate in PEM form") from error
    except (OSError, ValueError, TypeError) as error:
        raise HarpException(f"ca_file {ca_file!r}: {getattr(error, 'strerror', None) or error}") from error


@lru_cache(maxsize=_CACHE_SIZE)  # does not cache errors
def _context(path: str | None, state: tuple[int, ...]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.sslsocket_class = _TLSSocket
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if path is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(cafile=path)
    return context


class _TLSSocket(ssl.SSLSocket):
    """A socket that closes, and reports the cause, if the peer resets the connection before the handshake.

    Plain `ssl.SSLSocket` first calls `getpeername` and treats this error as "not connected": it stays open and sends
    without TLS.
    """

    def getpeername(self) -> Any:
        """Return the peer's address. Raise `OSError`."""
        try:
            return super().getpeername()
        except OSError as error:
            self.close()
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)) from error
