"""A client's connection with TLS: a handshake, then the same requests as without.

The socket is non-blocking. OpenSSL reads one record at a time from it, so that a socket with more data is readable, as
one without TLS is.
"""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress

from harp.protocol.dispatcher import Refused, encode_reply
from harp_daemon.settings import OLD_TLS_REASONS
from harpcaller.access.client import Client
from harpcaller.api.connection import READ_BYTES, Connection, Server

log = logging.getLogger(__name__)

_NEEDS_TLS = encode_reply(Refused("invalid_request", "this listening address requires TLS; see ca_file of HarpCaller"))

_MAX_HANDSHAKE_TIME = 10.0  #: Maximum seconds of a handshake.
_PLAIN_REASONS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNEXPECTED_MESSAGE", "PACKET_LENGTH_TOO_LONG"})


class TLSConnection(Connection):
    """An accepted connection with TLS. `identify` returns its client after the handshake."""

    def __init__(
        self,
        accepted: socket.socket,
        client: Client,
        server: Server,
        context: ssl.SSLContext,
        identify: Callable[[ssl.SSLSocket], Client],
    ) -> None:
        self._tls = context.wrap_socket(accepted, server_side=True, do_handshake_on_connect=False)
        super().__init__(self._tls, client, server)
        self._send = self._send_records
        self._identify = identify
        self._on_ready: Callable[[], object] | None = None  # until the end of the handshake

    def begin(self, on_ready: Callable[[], object]) -> None:
        """Call a function after the handshake."""
        self._on_ready = on_ready
        seconds = min(_MAX_HANDSHAKE_TIME, self._server._request_limits()[1])
        self._timer = self._server.timers.call_later(seconds, lambda: self._on_handshake_failed("it took too long"))

    def mark_disconnected(self) -> None:
        """Treat the client as disconnected."""
        if self._on_ready is not None:
            self.abort()
        else:
            super().mark_disconnected()

    def _on_readable(self) -> None:
        if self._on_ready is None:
            super()._on_readable()
        else:
            self._server.handshakes.add(self._shake_hands)

    def _shake_hands(self) -> None:
        if self._on_ready is None or self.closed.done():
            return
        try:
            self._tls.do_handshake()
            self.client = self._identify(self._tls)
        except ssl.SSLWantReadError:
            return
        except ssl.SSLWantWriteError:
            self._loop.add_writer(self._tls.fileno(), self._on_handshake_writable)
            return
        except OSError as error:  # `ssl.SSLError` too
            reason = getattr(error, "verify_message", None) or getattr(error, "reason", None) or error.strerror
            self._on_handshake_failed(str(reason or type(error).__name__))
            return
        self._cancel_timer()
        on_ready, self._on_ready = self._on_ready, None
        on_ready()

    def _on_handshake_writable(self) -> None:
        self._loop.remove_writer(self._tls.fileno())
        self._server.handshakes.add(self._shake_hands)

    def _on_handshake_failed(self, reason: str) -> None:
        fields = {"peer": self.client.peer, "reason": reason}
        if reason in OLD_TLS_REASONS:
            fields["hint"] = "the client has no TLS version of at least tls.minimum"
        elif reason in _PLAIN_REASONS:
            fields["hint"] = "the client does not speak TLS"
            with suppress(OSError):  # the client gets the reason, unless it sends more than this
                socket.socket.recv(self._tls, READ_BYTES)
                socket.socket.send(self._tls, _NEEDS_TLS)
        log.info("TLS handshake failed", extra=fields)
        self.abort()

    def _send_records(self, data: bytes | memoryview) -> int:
        """Send as much as the kernel takes now; return the number of bytes. OpenSSL sends one record at a time."""
        view = memoryview(data)
        sent = self._tls.send(view)
        with suppress(ssl.SSLWantWriteError):
            while sent < len(view):
                sent += self._tls.send(view[sent:])
        return sent

    def close(self) -> None:
        """See `Connection`; the client also learns that no data is missing."""
        if self._on_ready is None and self._unsent is None and not self.closed.done():
            with suppress(OSError, ValueError):
                self._tls.unwrap()
        super().close()
