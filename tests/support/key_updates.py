"""A hostile TLS 1.3 client: it sends many KeyUpdate messages, which cost the server time.

The handshake is OpenSSL's; the secret of the client's records comes from its key log. Spec: RFC 8446, 4.6.3 and 7.2.
"""

from __future__ import annotations

import hmac
import socket
import ssl
import struct
from hashlib import sha384
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_HANDSHAKE, _KEY_UPDATE, _APPLICATION_DATA = 22, 24, 23


def key_updates(sock: socket.socket, ca_file: Path, key_log: Path, number: int, requested: bool = False) -> bytes:
    """Shake hands over a connected socket; return the records of so many messages.

    With `requested`, the server must answer each of them.
    """
    context = ssl.create_default_context(cafile=ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.keylog_filename = str(key_log)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    while True:
        try:
            client.do_handshake()
            break
        except ssl.SSLWantReadError:
            sock.sendall(outgoing.read())
            incoming.write(sock.recv(65536))
    sock.sendall(outgoing.read())
    cipher = client.cipher()
    assert cipher is not None
    assert cipher[0] == "TLS_AES_256_GCM_SHA384"
    lines = [line.split() for line in key_log.read_text().splitlines() if line.startswith("CLIENT_TRAFFIC_SECRET_0")]
    secret = bytes.fromhex(lines[-1][2])
    records = []
    for _ in range(number):
        records.append(_record(secret, struct.pack("!B3sB", _KEY_UPDATE, b"\0\0\1", requested), _HANDSHAKE))
        secret = _expand(secret, b"traffic upd", 48)
    return b"".join(records)


def _record(secret: bytes, message: bytes, kind: int) -> bytes:
    """Return the first record under a secret."""
    key, iv = _expand(secret, b"key", 32), _expand(secret, b"iv", 12)
    plain = message + bytes([kind])
    header = struct.pack("!BHH", _APPLICATION_DATA, 0x0303, len(plain) + 16)
    return header + AESGCM(key).encrypt(iv, plain, header)


def _expand(secret: bytes, label: bytes, length: int) -> bytes:
    label = b"tls13 " + label
    info = struct.pack("!HB", length, len(label)) + label + b"\0"
    return hmac.digest(secret, info + b"\1", sha384)[:length]
