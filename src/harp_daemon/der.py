"""Parts of an encoded certificate (DER), read without the library `cryptography`, which the daemons do without.

Spec: RFC 5280, 4.1.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

_VERSION, _EXTENSIONS = 0xA0, 0xA3
_COMMON_NAME, _ALTERNATIVE_NAMES = bytes.fromhex("550403"), bytes.fromhex("551d11")
_DNS_NAME, _ADDRESS = 0x82, 0x87
#: The place of the subject among the fields.
_SUBJECT = 4


def elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tag and contents of each element of a DER encoding. Raises IndexError if it is cut."""
    at = 0
    while at < len(data):
        tag, length = data[at], data[at + 1]
        at += 2
        if length & 0x80:
            octets = length & 0x7F
            length = int.from_bytes(data[at : at + octets], "big")
            at += octets
        yield tag, data[at : at + length]
        at += length


def certificate_fields(der: bytes) -> list[tuple[int, bytes]]:
    """Return the fields of a certificate without its version: serial number, algorithm, issuer, validity, subject, ...

    Raises IndexError or StopIteration if it is not a certificate.
    """
    certificate = next(elements(der))[1]
    return [field for field in elements(next(elements(certificate))[1]) if field[0] != _VERSION]


def certificate_names(der: bytes) -> frozenset[str]:
    """Return the DNS names and addresses that a certificate has, in lower case, and its common name.

    What cannot be read is omitted.
    """
    found: set[str] = set()
    try:
        fields = certificate_fields(der)
        for _, attributes in elements(fields[_SUBJECT][1]):
            for _, attribute in elements(attributes):
                (_, kind), (_, value) = elements(attribute)
                if kind == _COMMON_NAME:
                    found.add(value.decode("utf-8", "replace").lower())
        extensions = next((contents for tag, contents in fields[_SUBJECT + 1 :] if tag == _EXTENSIONS), b"")
        for _, extension in elements(next(elements(extensions), (0, b""))[1]):
            (_, kind), *_, (_, value) = elements(extension)
            if kind == _ALTERNATIVE_NAMES:
                for tag, name in elements(next(elements(value))[1]):
                    if tag == _DNS_NAME:
                        found.add(name.decode("ascii", "replace").lower())
                    elif tag == _ADDRESS:
                        found.add(socket.inet_ntop(socket.AF_INET if len(name) == 4 else socket.AF_INET6, name))
    except (IndexError, StopIteration, ValueError, OSError):
        pass
    return frozenset(found)
