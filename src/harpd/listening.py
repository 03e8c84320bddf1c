"""The sockets of the network: where harpd listens, and how it sets up what it accepts."""

from __future__ import annotations

import socket
from pathlib import Path

from harpd.config import ConfigError, Network

__all__ = ["listen", "prepare"]


def listen(network: Network, path: Path) -> list[socket.socket]:
    """Open the listening sockets that the section `network` of the configuration file `path` asks for.

    Raises:
        ConfigError: an address can't be listened on.
    """
    found: list[socket.socket] = []
    port = network.port
    try:
        for family, address in _addresses(network):
            everywhere = network.address is None and family == socket.AF_INET6
            listener = socket.create_server(
                (address, port), family=family, backlog=1024, dualstack_ipv6=everywhere, reuse_port=False
            )
            listener.setblocking(False)
            found.append(listener)
            port = listener.getsockname()[1]  # when 0 was asked for, one free port for all addresses
    except OSError as error:
        for listener in found:
            listener.close()
        where = network.address or "any address"
        fault = f"can't listen on {where}, port {port}: {error.strerror}"
        raise ConfigError(f"{path}: network.address: {fault}") from error
    return found


def _addresses(network: Network) -> list[tuple[socket.AddressFamily, str]]:
    if network.address is None:
        both = _has_ipv6() and socket.has_dualstack_ipv6()
        return [(socket.AF_INET6, "::")] if both else [(socket.AF_INET, "0.0.0.0")]  # noqa: S104 - as asked
    found = socket.getaddrinfo(network.address, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::", 0))
    except OSError:
        return False
    return True


def prepare(accepted: socket.socket) -> None:
    """Have an accepted socket send at once, and notice within two minutes that its peer is lost. Raises `OSError`."""
    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
