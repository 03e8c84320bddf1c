"""Where harpd listens."""

from __future__ import annotations

import socket
from pathlib import Path

from harp_daemon.sockets import TCPPlace, any_address, distinct
from harpd.config.settings import ConfigError, Network

__all__ = ["listen"]


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


def _addresses(network: Network) -> list[TCPPlace]:
    if network.address is None:
        return [any_address()]
    found = socket.getaddrinfo(network.address, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return distinct(found)
