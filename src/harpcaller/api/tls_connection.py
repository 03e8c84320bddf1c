"""A client's connection with TLS: a handshake, then the same requests as without.

OpenSSL gets the data of the socket in limited pieces, through memory. If it read the socket by itself, it would process
messages of TLS as fast as a client sends them: 60,000 of them, in 1.6 MB, took the event loop 2 s.
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
from harpcaller.access.identities import UnreadableCertificate
from harpcaller.api.connection import READ_BYTES, Connection, Server

log = logging.getLogger(__name__)

_NEEDS_TLS = encode_reply(Refused("invalid_request", "this listening address requires TLS; see ca_file of HarpCaller"))

_MAX_HANDSHAKE_TIME = 10.0  #: Maximum seconds of a handshake.
_RECEIVED = 4 * 1024  #: Bytes that are received at once. This many bytes of the most costly messages need 10 ms.
_RECORD = 16 * 1024  #: Maximum bytes of the data in a record.
#: Maximum bytes of a handshake, and later of messages without data, which includes a record until it is complete. The
#: certificates of a client are checked in one step: those of 105 KB took 112 ms.
_MAX_HANDSHAKE, _MAX_WITHOUT_DATA = 32 * 1024, 24 * 1024
_PLAIN_REASONS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNEXPECTED_MESSAGE", "PACKET_LENGTH_TOO_LONG"})


class TLSConnection(Connection):
    """An accepted connection with TLS. `identify` returns its client after the handshake."""

    def __init__(
        self,
        accepted: socket.socket,
        client: Client,
        server: Server,
        context: ssl.SSLContext,
        identify: Callable[[ssl.SSLObject], Client],
    ) -> None:
        super().__init__(accepted, client, server)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._send = self._send_encrypted
        self._identify = identify
        self._on_ready: Callable[[], object] | None = None  # until the end of the handshake
        self._without_data = 0  # bytes received since the last data of the client
        self._encrypted = b""  # of the next `_encrypts` bytes to send, unless it is empty
        self._encrypts = 0

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

    # Received data.

    def _on_readable(self) -> None:
        try:
            received = self._socket.recv(_RECEIVED)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            received = b""
        is_shaking_hands = self._on_ready is not None
        if self.is_closing:
            self._on_data(received)
        elif not received:
            if is_shaking_hands:
                self._on_handshake_failed("the client has disconnected")
            else:
                self._on_data(b"")
        else:
            self._incoming.write(received)
            self._without_data += len(received)
            if self._without_data > (_MAX_HANDSHAKE if is_shaking_hands else _MAX_WITHOUT_DATA):
                log.info("TLS client sends no data", extra={"peer": self.client.peer, "bytes": self._without_data})
                self.abort()
            elif is_shaking_hands:
                self._server.handshakes.add(self._shake_hands)
            else:
                self._decrypt()

    def _decrypt(self) -> None:
        """Pass on the data of all received records."""
        pieces, is_ended = [], False
        try:
            while piece := self._tls.read(_RECORD):
                pieces.append(piece)
            is_ended = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:
            is_ended = True
        if not self._encrypted:
            self._send_messages()
        if data := b"".join(pieces):
            self._without_data = 0
            self._on_data(data)
        if is_ended and not self.closed.done():
            self._on_data(b"")

    # The handshake.

    def _shake_hands(self) -> None:
        if self._on_ready is None or self.closed.done():
            return
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._send_messages()
            return
        except ssl.SSLError as error:
            if error.reason not in _PLAIN_REASONS:
                self._send_messages()
            reason = getattr(error, "verify_message", None) or error.reason or type(error).__name__
            self._on_handshake_failed(str(reason))
            return
        self._send_messages()
        if self.closed.done():
            return
        self._cancel_timer()
        try:
            self.client = self._identify(self._tls)
        except UnreadableCertificate as error:
            self._on_handshake_failed(str(error))
            return
        on_ready, self._on_ready = self._on_ready, None
        on_ready()
        if not self.is_closing:
            self._decrypt()  # the client may have sent its request already

    def _on_handshake_failed(self, reason: str) -> None:
        fields = {"peer": self.client.peer, "reason": reason}
        if reason in OLD_TLS_REASONS:
            fields["hint"] = "the client has no TLS version of at least tls.minimum"
        elif reason in _PLAIN_REASONS:
            fields["hint"] = "the client does not speak TLS"
            with suppress(OSError):  # the client gets the reason, unless it sends more than this
                with suppress(BlockingIOError):
                    self._socket.recv(READ_BYTES)
                self._socket.send(_NEEDS_TLS)
        log.info("TLS handshake failed", extra=fields)
        self.abort()

    # Sent data.

    def _send_messages(self) -> None:
        """Send what OpenSSL has to send by itself. A client that does not read it is disconnected."""
        if self._outgoing.pending and not self.closed.done():
            messages = self._outgoing.read()
            try:
                is_sent = self._socket.send(messages) == len(messages)
            except OSError:
                is_sent = False
            if not is_sent:
                self.abort()

    def _send_encrypted(self, data: bytes | memoryview) -> int:
        """Send as much as the kernel takes now; return the number of bytes.

        The last record may be sent in part. Its bytes do not count until it is complete; it is not encrypted again.
        """
        view, sent = memoryview(data), 0
        while sent < len(view):
            if not self._encrypted:
                piece = view[sent : sent + _RECORD]
                self._tls.write(piece)
                self._encrypted, self._encrypts = self._outgoing.read(), len(piece)
            try:
                self._encrypted = self._encrypted[self._socket.send(self._encrypted) :]
            except (BlockingIOError, InterruptedError):
                break
            if self._encrypted:
                break
            sent += self._encrypts
        return sent

    def close(self) -> None:
        """See `Connection`; the client also learns that no data is missing."""
        if self._on_ready is None and self._unsent is None and not self.closed.done():
            with suppress(ssl.SSLError):
                self._tls.unwrap()
            self._send_messages()
        super().close()
