"""A host of the registry, and its line. Spec: docs/settings-dispatcher.md, Hosts registry."""

from __future__ import annotations

from typing import NamedTuple

from harp.protocol.fields import (
    check,
    decode_object,
    member_value,
    reject_unknown_keys,
    required_object,
    required_string,
)
from harp.protocol.json_text import decode_values


class Host(NamedTuple):
    """A host of the registry: where its harpd listens, and the credentials to call it with."""

    hostname: str  # the name in submitted jobs
    address: str  # the name, IPv4 or IPv6 address to connect to
    port: int
    user: str
    password: str

    def __repr__(self) -> str:
        """Return a text without the password."""
        return f"Host({self.hostname!r}, {self.address!r}, {self.port}, {self.user!r})"


def parse_line(line: bytes) -> Host:
    """Return the host of a line. Raises `ProtocolError` if it is invalid; the message never quotes a value."""
    members = decode_object(line, decode_values)
    reject_unknown_keys(members, ("hostname", "address", "port", "credentials"))
    credentials = required_object(members, "credentials")
    reject_unknown_keys(credentials, ("user", "password"))
    hostname, address = (required_string(members, key) for key in ("hostname", "address"))
    check(hostname != "", "hostname: expected a name, got an empty string")
    check(address != "", "address: expected a name, got an empty string")
    port = member_value(members, "port")
    check(type(port) is int and 0 < port <= 65535, "port: expected an integer from 1 to 65535")
    user, password = (required_string(credentials, key) for key in ("user", "password"))
    return Host(hostname, address, port, user, password)
