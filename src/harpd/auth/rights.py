"""The rights of users: which procedures each may call, and from which addresses it may connect.

The frontend checks addresses, because only it sees them. The supervisor checks procedures, because it does not trust
the frontend. Spec: docs/settings-harpd.md, Rights.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

__all__ = ["EVERY_OTHER_USER", "UserRights", "parse_network"]

#: The key of the rights of users that have no entry of their own.
EVERY_OTHER_USER = "*"

_Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class _Rights:
    """The rights of one user; None: no restriction."""

    procedures: Sequence[str] | None = None  # patterns of names
    peers: Sequence[_Network] | None = None


_NO_PROCEDURES, _ALL = _Rights(procedures=()), _Rights()


class UserRights:
    """The section `rights` of the configuration: procedures and peers by user. An empty one restricts no user."""

    def __init__(self, section: Mapping[str, Mapping[str, Any]]) -> None:
        self._rights = {user: _decode_rights(rights) for user, rights in section.items()}
        self._others = self._rights.get(EVERY_OTHER_USER, _NO_PROCEDURES if section else _ALL)

    def may_call(self, user: str, procedure: str) -> bool:
        """Return whether a user may call the procedure of this name."""
        patterns = self._rights.get(user, self._others).procedures
        return patterns is None or any(fnmatchcase(procedure, pattern) for pattern in patterns)

    def describe_unmatched(self, procedures: Collection[str]) -> list[str]:
        """Return a warning for each pattern that none of these procedures matches: it may be a typing error."""
        return [
            f"rights.{user}.procedures: {pattern!r} matches no procedure"
            for user, rights in self._rights.items()
            for pattern in rights.procedures or ()
            if not any(fnmatchcase(name, pattern) for name in procedures)
        ]

    def may_connect(self, user: str, address: str) -> bool:
        """Return whether a user may send requests from an IP address."""
        networks = self._rights.get(user, self._others).peers
        if networks is None:
            return True
        peer = ipaddress.ip_address(address.partition("%")[0])  # without the zone of a link-local address
        if isinstance(peer, ipaddress.IPv6Address) and peer.ipv4_mapped is not None:
            peer = peer.ipv4_mapped
        return any(peer in network for network in networks)


def _decode_rights(rights: Mapping[str, Any]) -> _Rights:
    peers = rights.get("peers")
    return _Rights(rights.get("procedures"), None if peers is None else tuple(map(parse_network, peers)))


def parse_network(text: str) -> _Network:
    """Return the network of a text such as ``192.0.2.0/24`` or ``2001:db8::7``. Raises ValueError."""
    return ipaddress.ip_network(text)
