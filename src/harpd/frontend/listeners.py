"""Where harpd listens."""

from __future__ import annotations

import socket
from pathlib import Path

from harpd.config.settings import ConfigError, Network, listening_places


def listen(network: Network, path: Path) -> list[socket.socket]:
    """Open the listening sockets that the section `network` of the configuration file `path` asks for.

    Raises:
        ConfigError: the address can't be resolved, or one of its addresses can't be listened on.
    """
    places = listening_places(network, path)
    everywhere = network.address in (None, "*")
    found: list[socket.socket] = []
    port = network.port
    try:
        for family, address in places:
            both = everywhere and family == socket.AF_INET6
            listener = socket.create_server(
                (address, port), family=family, backlog=1024, dualstack_ipv6=both, reuse_port=False
            )
            listener.setblocking(False)
            found.append(listener)
            port = listener.getsockname()[1]  # when 0 was asked for, one free port for all addresses
    except OSError as error:
        for listener in found:
            listener.close()
        where = "any address" if everywhere else network.address
        fault = f"can't listen on {where}, port {port}: {error.strerror}"
        raise ConfigError(f"{path}: network.address: {fault}") from error
    return found
