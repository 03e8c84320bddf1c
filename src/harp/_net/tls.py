"""TLS contexts of the client, each made once for each state of a `ca_file`.

Making a context with its authorities takes about as long as a full handshake, and either takes longer than a call over
an open connection.
"""

from __future__ import annotations

import errno
import os
import ssl
import time
from functools import lru_cache
from typing import Any, TypeAlias

from harp.errors import HarpException

__all__ = ["tls_context"]

#: The most contexts that are kept.
_CONTEXTS = 16

#: What tells one state of a file from another, if there is more time between them than a tick of the file system.
_FileState: TypeAlias = tuple[int, ...]

#: Nanoseconds within which a file may change twice and its times only once: what is as new as that is not kept.
_TICK = 20_000_000


def tls_context(ca_file: str | os.PathLike[str] | None) -> ssl.SSLContext:
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
def _kept_context(path: str | None, state: _FileState) -> ssl.SSLContext:
    return _context(path)


def _context(path: str | None) -> ssl.SSLContext:
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
    """Is closed, and says why, when the peer has reset the connection before the handshake.

    The plain one, which asks for the peer's name first of all, would be left open, or be taken for connected.
    """

    def getpeername(self) -> Any:
        """Return the peer's address. Raise `OSError`."""
        try:
            return super().getpeername()
        except OSError as error:
            self.close()
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)) from error
