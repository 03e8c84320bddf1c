"""The lines of the hosts registry and the hosts in them. Pure: no clock, no input or output.

Spec: docs/settings-dispatcher.md, Hosts registry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from harp.protocol.fields import (
    ProtocolError,
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


@dataclass(frozen=True, slots=True)
class ParsedHosts:
    """The hosts of a file or of a script's output."""

    hosts: Mapping[str, Host]  # by name, in the order of the lines
    invalid_lines: tuple[tuple[int, str], ...]  # number, from 1, and error of each; an error never quotes the line
    duplicates: int  # number of lines that were replaced by a later line with the same hostname


def parse_hosts(lines: Iterable[bytes]) -> ParsedHosts:
    """Parse the output of `host_db_script` or the lines of `hosts_file`.

    Empty lines are skipped. The last of several lines with the same hostname is used.
    """
    hosts: dict[str, Host] = {}
    invalid_lines: list[tuple[int, str]] = []
    duplicates = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            host = parse_line(line)
        except ProtocolError as error:
            invalid_lines.append((number, error.message))
            continue
        duplicates += hosts.pop(host.hostname, None) is not None
        hosts[host.hostname] = host
    return ParsedHosts(hosts, tuple(invalid_lines), duplicates)


def parse_line(line: bytes) -> Host:
    """Return the host of a line. Raises `ProtocolError` if it is invalid; the message never quotes a value."""
    members = decode_object(line, decode_values)
    reject_unknown_keys(members, ("hostname", "address", "port", "credentials"))
    credentials = required_object(members, "credentials")
    reject_unknown_keys(credentials, ("user", "password"))
    names = {key: required_string(members, key) for key in ("hostname", "address")}
    for key, name in names.items():
        check(name != "", f"{key}: expected a name, got an empty string")
    port: Any = member_value(members, "port") if "port" in members else None
    check(type(port) is int and 0 < port <= 65535, "port: expected an integer from 1 to 65535")
    user, password = (required_string(credentials, key) for key in ("user", "password"))
    return Host(**names, port=port, user=user, password=password)
