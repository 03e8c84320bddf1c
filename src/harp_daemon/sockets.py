"""What both daemons want of their TCP sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Any

__all__ = ["TCPPlace", "any_address", "distinct", "prepare"]

#: A family of addresses, and an address to bind.
TCPPlace = tuple[socket.AddressFamily, str]

#: A peer that is gone without a word is noticed after about two minutes.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))


def prepare(connection: socket.socket) -> None:
    """Have a socket not block, send at once, and notice within two minutes that its peer is lost. Raises OSError."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def any_address() -> TCPPlace:
    """The place that stands for every address of this machine: IPv6 and IPv4 by one socket, if there is IPv6."""
    if socket.has_dualstack_ipv6():
        try:
            with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
                probe.bind(("::", 0))
        except OSError:
            pass
        else:
            return socket.AF_INET6, "::"
    return socket.AF_INET, "0.0.0.0"  # noqa: S104 - as asked


def distinct(found: Iterable[tuple[Any, Any, Any, Any, tuple[Any, ...]]]) -> list[TCPPlace]:
    """The places of what `getaddrinfo` found, each once, in its order."""
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))
