"""The lines of the hosts registry and the hosts in them. Pure: no clock, no input or output.

Spec: docs/settings-dispatcher.md, Hosts registry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harp.protocol.fields import (
    ProtocolError,
    check,
    decode_object,
    member_value,
    reject_unknown_keys,
    required_object,
    required_string,
)
from harp.protocol.json_text import JSONObject, decode_values

_MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class Host:
    """A host of the registry: where its harpd listens, and the credentials to call it with.

    Attributes:
        hostname: the name in submitted jobs.
        address: the name, IPv4 or IPv6 address to connect to.
        port: the TCP port, 1 to 65535.
        user: the user name for harpd's authentication.
        password: the password; not part of the `repr`.
    """

    hostname: str
    address: str
    port: int
    user: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class InvalidLine:
    """A line that is not a valid host: its number, from 1, and the error, which never quotes the line."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class ParsedHosts:
    """The hosts of a file or of a script's output.

    Attributes:
        hosts: the hosts by name, in the order of the lines.
        invalid_lines: the lines that are not valid hosts.
        duplicates: number of lines that were replaced by a later line with the same hostname.
    """

    hosts: Mapping[str, Host]
    invalid_lines: tuple[InvalidLine, ...] = ()
    duplicates: int = 0


def parse_hosts(lines: Iterable[bytes]) -> ParsedHosts:
    """Parse the output of `host_db_script` or the lines of `hosts_file`.

    Empty lines are skipped. If two lines have the same hostname, the last one is used.
    """
    hosts: dict[str, Host] = {}
    invalid_lines: list[InvalidLine] = []
    duplicates = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            host = parse_line(line)
        except ProtocolError as error:
            invalid_lines.append(InvalidLine(number, error.message))
            continue
        duplicates += hosts.pop(host.hostname, None) is not None
        hosts[host.hostname] = host
    return ParsedHosts(hosts, tuple(invalid_lines), duplicates)


def parse_line(line: bytes) -> Host:
    """Parse one host.

    Raises:
        ProtocolError: the line is not a valid host; the message never quotes a value.
    """
    members = decode_object(line, decode_values)
    reject_unknown_keys(members, ("hostname", "address", "port", "credentials"))
    credentials = required_object(members, "credentials")
    reject_unknown_keys(credentials, ("user", "password"))
    return Host(
        _name(members, "hostname"),
        _name(members, "address"),
        _port(members),
        required_string(credentials, "user"),
        required_string(credentials, "password"),
    )


def _name(members: JSONObject, key: str) -> str:
    name = required_string(members, key)
    check(name != "", f"{key}: expected a name, got an empty string")
    return name


def _port(members: JSONObject) -> int:
    port: Any = member_value(members, "port") if "port" in members else None
    check(type(port) is int and 0 < port <= _MAX_PORT, f"port: expected an integer from 1 to {_MAX_PORT}")
    return int(port)
