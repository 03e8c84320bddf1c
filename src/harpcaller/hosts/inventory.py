"""The hosts registry: its lines, and the hosts in them. Pure: no clock, no input or output.

Spec: docs/settings-dispatcher.md, Hosts registry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harp.protocol.fields import ProtocolError, check, opened, string, value, within
from harp.protocol.json_text import Members, open_decoded

__all__ = ["Host", "InvalidLine", "ParsedHosts", "parse_hosts", "parse_line"]

_MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class Host:
    """A host of the registry: where its harpd listens, and the credentials to call it with.

    Attributes:
        hostname: the name that jobs are submitted for.
        address: name, IPv4 or IPv6 address to connect to.
        port: TCP port, 1 to 65535.
        user: whom harpd is to authenticate.
        password: never shown in a `repr`.
    """

    hostname: str
    address: str
    port: int
    user: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class InvalidLine:
    """A line that is no host: its number, from 1, and what is wrong with it. Never quotes the line."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class ParsedHosts:
    """What the lines gave.

    Attributes:
        hosts: the hosts by their names, in the order of the lines.
        skipped: the lines that are no host.
        repeated: how many lines were replaced by a later one with the same hostname.
    """

    hosts: Mapping[str, Host]
    invalid_lines: tuple[InvalidLine, ...] = ()
    duplicates: int = 0


def parse_hosts(lines: Iterable[bytes]) -> ParsedHosts:
    """Read the lines that a `host_db_script` printed or a `hosts_file` holds.

    A line that is no host is skipped and told; an empty one is just skipped. Of two hosts of one name the last wins.
    """
    hosts: dict[str, Host] = {}
    skipped: list[InvalidLine] = []
    repeated = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            host = parse_line(line)
        except ProtocolError as error:
            skipped.append(InvalidLine(number, error.message))
            continue
        repeated += hosts.pop(host.hostname, None) is not None
        hosts[host.hostname] = host
    return ParsedHosts(hosts, tuple(skipped), repeated)


def parse_line(line: bytes) -> Host:
    """Read one host.

    Raises:
        ProtocolError: the line is no host; the message says why and never quotes a value.
    """
    members = opened(line, open_decoded)
    within(members, ("hostname", "address", "port", "credentials"))
    credentials = _object(members, "credentials")
    within(credentials, ("user", "password"))
    return Host(
        _name(members, "hostname"),
        _name(members, "address"),
        _port(members),
        string(credentials, "user"),
        string(credentials, "password"),
    )


def _object(members: Members, key: str) -> Members:
    found = members.members(key) if key in members else None
    check(found is not None, f"{key}: expected an object")
    assert found is not None
    return found


def _name(members: Members, key: str) -> str:
    name = string(members, key)
    check(name != "", f"{key}: expected a name, got an empty string")
    return name


def _port(members: Members) -> int:
    port: Any = value(members, "port") if "port" in members else None
    check(type(port) is int and 0 < port <= _MAX_PORT, f"port: expected an integer from 1 to {_MAX_PORT}")
    return int(port)
