"""TLS towards the hosts: which certificates are accepted, and why one was not.

- `ca_file`: the certificate has a chain to one of its authorities and, unless `verify_hostname` is off, names the
  host as the registry does, by its name or by its address.
- `known_certs_file`: the certificate is, byte for byte, one of those in the file. These are never loaded as trust
  anchors: a certificate that one of them has signed is as unknown as any other.
- Both: either is enough. Neither: any certificate is accepted.

A handshake checks the chain or it does not; Python's `ssl` can't tell afterwards. So a host whose chain is refused
is connected to a second time, without that check, when its certificate may still be a known one. Nothing is sent
over a connection before `check_certificate` has accepted its certificate.

Spec: docs/settings-dispatcher.md, Certificates of hosts.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from harp_daemon.tls import set_floor
from harpcaller.config import Config, file_errors
from harpcaller.hosts.inventory import Host
from harpcaller.hosts.watched_file import WatchedFile

__all__ = ["CertificateRefused", "HostTLS", "names_host", "parse_ip", "server_name"]

#: What may be sent as a server's name; an address of another form is resolved as it is, without one.
_SERVER_NAME = re.compile(r"(?=.{1,253}\Z)\w([\w-]{0,62})(\.\w[\w-]{0,62})*", re.ASCII)

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


class CertificateRefused(Exception):
    """A host's certificate is none that the configuration accepts. The message says why and what to do."""


class HostTLS:
    """How connections to hosts are secured, by one configuration.

    Args:
        config: its `ca_file`, `verify_hostname`, `known_certs_file` and `tls_minimum` count.

    Raises:
        ConfigError: one of the files can't be used.
    """

    def __init__(self, config: Config) -> None:
        self._verify_hostname = config.verify_hostname
        self._ca_file = config.ca_file
        self._known_certs = _watch_known_certs(config)
        #: What an administrator should know about this configuration.
        self.warnings: list[str] = []
        #: The contexts to try, in this order; the next one only after `ssl.SSLCertVerificationError`.
        self.contexts: list[ssl.SSLContext] = []
        if config.ca_file is not None:
            self.contexts.append(_context(config, ssl.CERT_REQUIRED))
        if config.ca_file is None or self._known_certs is not None:
            self.contexts.append(_context(config, ssl.CERT_NONE))
        if config.ca_file is None and self._known_certs is None:
            self.warnings.append("certificates of hosts are not checked: set ca_file or known_certs_file")
        if config.tls_minimum in ("1.0", "1.1"):
            self.warnings.append("hosts are spoken to below TLS 1.2, at OpenSSL's security level 0: see tls_minimum")

    def check_certificate(self, connection: ssl.SSLObject, host: Host, chain_error: str | None = None) -> None:
        """Accept the certificate of a connection whose handshake is done.

        Args:
            connection: the connection.
            host: the host that was connected to.
            chain_error: why an earlier handshake with the host refused the certificate's chain, if one did.

        Raises:
            CertificateRefused: no rule of the configuration accepts it.
        """
        if self._known_certs is not None and connection.getpeercert(binary_form=True) in self._known_certs.value:
            return
        if chain_error is not None:
            raise self.chain_refused(chain_error)
        if self._ca_file is not None:
            self._check_name(connection.getpeercert() or {}, host)
        elif self._known_certs is not None:
            raise CertificateRefused(f"it is not in known_certs_file {self._known_certs.file}")

    def chain_refused(self, chain_error: str) -> CertificateRefused:
        """What it means that no handshake accepted the certificate's chain."""
        unknown = f", nor is it in known_certs_file {self._known_certs.file}" if self._known_certs else ""
        return CertificateRefused(f"it has no chain to an authority of ca_file {self._ca_file}: {chain_error}{unknown}")

    def _check_name(self, certificate: Mapping[str, Any], host: Host) -> None:
        if self._verify_hostname and not names_host(certificate, host):
            names = ", ".join(repr(name) for _, name in certificate.get("subjectAltName", ())) or "no host at all"
            raise CertificateRefused(
                f"it names {names}, and neither {host.hostname!r} nor {host.address!r}: issue one with one of these as "
                "subjectAltName, or correct the hosts registry, or set verify_hostname = false"
            )


def server_name(address: str) -> str:
    """The name that TLS tells the server: the address when it is a name, else empty, which sends none."""
    name = ".".join(_split_labels(address))
    return name if parse_ip(address) is None and _SERVER_NAME.fullmatch(name) else ""


def names_host(certificate: Mapping[str, Any], host: Host) -> bool:
    """Whether a certificate names a host, by its name in the registry or by its address.

    Names are compared without regard to case; a ``*`` that is the whole left-most label stands for one label.
    Only the subject's alternative names count, never its common name.

    Args:
        certificate: as `ssl.SSLObject.getpeercert` gives it.
        host: the host.
    """
    entries: list[tuple[str, str]] = list(certificate.get("subjectAltName", ()))
    return any(_matches(kind, entry, name) for kind, entry in entries for name in (host.hostname, host.address))


def _matches(kind: str, entry: str, name: str) -> bool:
    address = parse_ip(name)
    if kind == "IP Address":
        return address is not None and parse_ip(entry.strip()) == address
    return kind == "DNS" and address is None and _name_matches(_split_labels(entry), _split_labels(name))


def _name_matches(pattern: list[str], name: list[str]) -> bool:
    if pattern[0] == "*" and len(pattern) > 2 and len(name) == len(pattern):
        return pattern[1:] == name[1:]
    return pattern == name


def _split_labels(name: str) -> list[str]:
    if not name.isascii():
        try:
            name = name.encode("idna").decode("ascii")
        except UnicodeError:
            pass  # then it is in no certificate
    return name.rstrip(".").lower().split(".")


def parse_ip(text: str) -> IPv4Address | IPv6Address | None:
    """The address that a text is; None: it is a name."""
    try:
        return ip_address(text)
    except ValueError:
        return None


def _context(config: Config, mode: ssl.VerifyMode) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # `check_certificate` does: the registry's name or address may be in the certificate
    context.verify_mode = mode
    set_floor(context, config.tls_minimum)
    if mode is ssl.CERT_REQUIRED:
        with file_errors(config, "ca_file"):
            context.load_verify_locations(config.ca_file)
    return context


def _watch_known_certs(config: Config) -> WatchedFile[frozenset[bytes]] | None:
    if config.known_certs_file is None:
        return None
    with file_errors(config, "known_certs_file"):
        return WatchedFile(config.known_certs_file, _parse_certificates)


def _parse_certificates(text: bytes) -> frozenset[bytes]:
    ders = frozenset(ssl.PEM_cert_to_DER_cert(block.decode("ascii")) for block in _PEM.findall(text))
    for der in ders:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=der)  # only to see that it is one
    return ders
