"""Where a server listens."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from harp.errors import CommunicationError, HarpException


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A host, by name or address, and a port.

    Raises:
        HarpException: one of them is invalid.
    """

    host: str
    port: int

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not self.host:
            raise HarpException(f"host: expected a name or an address, got {self.host!r}")
        if not isinstance(self.port, int) or isinstance(self.port, bool) or not 0 < self.port < 65536:
            raise HarpException(f"port: expected a number from 1 to 65535, got {self.port!r}")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def server_name(self) -> str:
        """The name that the server's certificate must contain: without an address's zone or a trailing dot."""
        address = self.host.partition("%")[0]
        try:
            return str(ipaddress.ip_address(address))
        except ValueError:
            return self.host.rstrip(".")

    def error(self, action: str, cause: str) -> CommunicationError:
        """Return the error for an action that failed with this peer, with its cause."""
        return CommunicationError(f"{self}: {action}: {cause}")
