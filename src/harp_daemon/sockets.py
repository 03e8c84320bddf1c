"""What both daemons want of their TCP sockets."""

from __future__ import annotations

import socket

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


class ResolveError(Exception):
    """An address or name to listen on means nothing. The message names it and the reason."""


def listening_places(address: str | None) -> list[TCPPlace]:
    """Return what to bind in order to listen on a configured address.

    It may wait for a name server. On a machine without IPv6, the IPv6 addresses of a name are left out if the name has
    others: many hosts files give ``localhost`` both.

    Args:
        address: an address or a name; None or ``*``: every address of this machine.

    Raises:
        ResolveError: it is not an address, and no address is known for it as a name.
    """
    if address is None or address == "*":
        return [_any_address()]
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError as error:  # of the codec that makes a name ready for DNS
        raise ResolveError(f"cannot resolve {address!r}: not a valid host name") from error
    except OSError as error:
        raise ResolveError(f"cannot resolve {address!r}: {error.strerror}") from error
    places: list[TCPPlace] = list(dict.fromkeys((family, str(place[0])) for family, _, _, _, place in found))
    with_ipv4 = any(family == socket.AF_INET for family, _ in places)
    if with_ipv4 and not _can_bind(socket.AF_INET6, "::1"):
        places = [place for place in places if place[0] != socket.AF_INET6]
    return places


def _any_address() -> TCPPlace:
    """The place that stands for every address of this machine: IPv6 and IPv4 by one socket, if there is IPv6."""
    if socket.has_dualstack_ipv6() and _can_bind(socket.AF_INET6, "::"):
        return socket.AF_INET6, "::"
    return socket.AF_INET, "0.0.0.0"  # noqa: S104 - as asked


def _can_bind(family: socket.AddressFamily, address: str) -> bool:
    """Return whether this machine has the address, on any port."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True
