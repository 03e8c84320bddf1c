"""Accepted and connecting sockets: options, and the name of the peer."""

from __future__ import annotations

import socket
import struct
from typing import Any

#: A lost peer is noticed after about two minutes.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))


def configure_socket(connection: socket.socket) -> None:
    """Make a socket non-blocking; a TCP socket also sends at once and detects a lost peer. Raises OSError."""
    connection.setblocking(False)
    if connection.family == socket.AF_UNIX:
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def peer_name(connection: socket.socket, address: Any) -> str:
    """Return the peer, whose address `accept` has returned, as text for logs; a Unix socket has the user instead."""
    if connection.family == socket.AF_UNIX:
        return f"uid:{peer_process(connection)[1]}"
    host = str(address[0]).removeprefix("::ffff:")  # IPv4 on a socket for both
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"


def peer_process(connection: socket.socket) -> tuple[int, int]:
    """Return the process id and the user id of the peer of a Unix socket. Raises OSError."""
    pid, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, user
