"""The listening sockets of the client API and of the HTTP API, as the configuration names their addresses."""

from __future__ import annotations

from collections.abc import Iterable

from harp_daemon.settings import ConfigError
from harp_daemon.sockets import Listener, ListenError, listen_tcp, listen_unix
from harpcaller.config import Address, Config


def listen(config: Config, key: str, addresses: Iterable[Address]) -> list[Listener]:
    """Open the addresses of a key, each once, or none: raises `ConfigError` if an address cannot be opened."""
    opened: list[Listener] = []
    for address in dict.fromkeys(addresses):
        try:
            if address.path is None:
                opened += listen_tcp(address.host, address.port, str(address))
            else:
                opened.append(listen_unix(address.path, 0o660, str(address)))  # for its owner and its group
        except ListenError as error:
            for listener in opened:
                listener.close()
            raise ConfigError(f"{config.file}: {key}: cannot listen on {address}: {error}") from error
    return opened
