"""TLS connections to hosts: the rules by which a certificate is accepted, and the reason if it is not.

The rules are in docs/settings-dispatcher.md, Certificates of hosts. The certificates of `known_certs_file` are never
loaded as trust anchors: certificates that they have signed are not accepted.

Python's `ssl` either checks the chain in the handshake or cannot check it at all. If a chain is refused, but
`known_certs_file` may have the certificate, a second connection is opened without that check. No data is sent over a
connection before `check_certificate` has accepted its certificate.

A changed file is read again. Idle connections are then not used again, because their certificates may now be refused.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

from harp_daemon.der import certificate_names
from harp_daemon.settings import set_minimum_version
from harp_daemon.watched_file import WatchedFile
from harpcaller.config import Config, file_errors
from harpcaller.hosts.connects import HostConnects
from harpcaller.hosts.registry import Host

#: Names that may be sent to the server. Other addresses are resolved, but not sent.
_SERVER_NAME = re.compile(r"(?=.{1,253}\Z)\w([\w-]{0,62})(\.\w[\w-]{0,62})*", re.ASCII)
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


class CertificateRefused(Exception):
    """A host's certificate that the configuration does not accept. The message has the reason and a remedy."""


class HostTLS:
    """The TLS settings of one configuration. Raises `ConfigError` if one of the files cannot be used."""

    def __init__(
        self,
        config: Config,
        list_hosts: Callable[[], Iterable[Host]] = lambda: (),
        connects: HostConnects | None = None,
    ) -> None:
        self.connects = connects  #: What connections have shown; None: it is not kept.
        self._verify_hostname = config.verify_hostname
        self._verify = config.verify
        self._list_hosts = list_hosts
        self._authorities: WatchedFile[ssl.SSLContext] | None = None
        self._known_certs: WatchedFile[frozenset[bytes]] | None = None
        self._unverified = _context(config)
        self.warnings: list[str] = []  #: Warnings for the log.
        if config.ca_file is not None:
            with file_errors(config, "ca_file"):
                self._authorities = WatchedFile(config.ca_file, lambda _: _context(config, config.ca_file))
        if config.known_certs_file is not None:
            with file_errors(config, "known_certs_file"):
                # As in the legacy dispatcher, it may be created later. Until then, it contains no certificate.
                self._known_certs = WatchedFile(
                    config.known_certs_file, _parse_certificates, if_missing=frozenset[bytes]()
                )
            if self._known_certs.is_missing:
                self.warnings.append(
                    f"known_certs_file {config.known_certs_file} does not exist; it accepts no certificate"
                )
        if config.ca_file is None and self._known_certs is None:
            self.warnings.append(
                "hosts without certificate_sha256 are refused; set ca_file or known_certs_file"
                if config.verify
                else "certificates of hosts are not checked; set ca_file or known_certs_file"
            )
        if config.tls_minimum in ("1.0", "1.1"):
            self.warnings.append("tls_minimum allows insecure TLS versions")

    def list_contexts(self, host: Host) -> list[ssl.SSLContext]:
        """Return the contexts to try in this order, each after a `ssl.SSLCertVerificationError` of the previous one."""
        if host.certificate_sha256 is not None:
            return [self._unverified]
        verified = [] if self._authorities is None else [self._authorities.value]
        return verified if verified and self._known_certs is None else [*verified, self._unverified]

    @property
    def version(self) -> tuple[int, ...]:
        """A value that changes with the contents of the files."""
        versions = []
        for file in (self._authorities, self._known_certs):
            if file is not None:
                _ = file.value  # reads a changed file
                versions.append(file.version)
        return tuple(versions)

    def check_certificate(self, connection: ssl.SSLObject, host: Host, chain_error: str | None = None) -> None:
        """Raise `CertificateRefused` if no rule accepts the certificate; `chain_error`: of an earlier handshake."""
        known_certs, der = self._known_certs, connection.getpeercert(binary_form=True) or b""
        if host.certificate_sha256 is not None:
            _check_digest(der, host.certificate_sha256)
            return
        if known_certs is not None and (der in known_certs.value or der in known_certs.newest_value):
            if (other := self._find_other(der, host)) is not None:
                raise CertificateRefused(
                    f"it is the certificate of host {other!r}, and does not name {host.hostname!r} or "
                    f"{host.address!r}; correct the hosts registry, or set certificate_sha256 of the host there"
                )
            return
        if chain_error is not None:
            raise self.chain_refused(chain_error)
        certificate: Mapping[str, Any] = connection.getpeercert() or {}
        if self._authorities is not None and self._verify_hostname and not names_host(certificate, host):
            names = ", ".join(repr(name) for _, name in certificate.get("subjectAltName", ())) or "no host at all"
            raise CertificateRefused(
                f"it names {names}, and neither {host.hostname!r} nor {host.address!r}; issue a certificate with "
                "one of these as subjectAltName, correct the hosts registry, or set verify_hostname = false"
            )
        if self._authorities is None and known_certs is not None:
            raise CertificateRefused(f"it is not in {_name_file(known_certs)}")
        if self._authorities is None and self._verify:
            raise CertificateRefused(
                "nothing verifies it; set ca_file, known_certs_file, or certificate_sha256 of the host in the hosts "
                "registry; or accept any certificate with verify = false"
            )

    def _find_other(self, der: bytes, host: Host) -> str | None:
        """Return another host of the registry that a certificate names, unless it names this host, too."""
        names = certificate_names(der)
        forms = set[str]().union(*map(_name_forms, names))
        wildcards = {"subjectAltName": [("DNS", name) for name in names if name.startswith("*")]}

        def is_named(one: Host) -> bool:
            return not forms.isdisjoint(_host_forms(one)) or names_host(wildcards, one)

        return None if is_named(host) else next((one.hostname for one in self._list_hosts() if is_named(one)), None)

    def chain_refused(self, chain_error: str) -> CertificateRefused:
        """Return the error for a certificate with a chain that no handshake accepted."""
        authorities = self._authorities.file if self._authorities else None
        unknown = f", nor is it in {_name_file(self._known_certs)}" if self._known_certs else ""
        if chain_error in _INVALID_NOW:
            return CertificateRefused(_INVALID_NOW[chain_error] + unknown)
        return CertificateRefused(f"it has no chain to an authority of ca_file {authorities}: {chain_error}{unknown}")


#: Messages for OpenSSL's errors of chain verification that concern only the validity period.
_INVALID_NOW = {
    "certificate has expired": "it has expired, or its authority's has; renew it, copy it to the host and reload harpd",
    "certificate is not yet valid": "it is not valid yet; compare the clocks of the host and of the dispatcher",
}


def _check_digest(der: bytes, expected: str) -> None:
    digest = sha256(der).hexdigest()
    if digest != expected:
        raise CertificateRefused(
            f"its SHA-256 is {digest}, and certificate_sha256 of the host is {expected}; if the certificate was "
            "renewed, correct the hosts registry"
        )


def _host_forms(host: Host) -> set[str]:
    address = parse_ip(host.address)
    return {*_name_forms(host.hostname.lower()), host.address.lower() if address is None else str(address)}


def _name_forms(name: str) -> set[str]:
    """Return a name and its first label: a certificate and the registry may have the short or the long name.

    An address has one form.
    """
    address = parse_ip(name)
    return {name, name.partition(".")[0]} if address is None else {str(address)}


def _name_file(known_certs: WatchedFile[frozenset[bytes]]) -> str:
    return f"known_certs_file {known_certs.file}{', which does not exist' if known_certs.is_missing else ''}"


def server_name(address: str) -> str:
    """Return the name to send to the server: the address if it is a name, otherwise an empty string."""
    name = ".".join(_split_labels(address))
    return name if parse_ip(address) is None and _SERVER_NAME.fullmatch(name) else ""


def names_host(certificate: Mapping[str, Any], host: Host) -> bool:
    """Return whether the subject's alternative names in a result of `getpeercert` match the host's name or address."""
    entries: list[tuple[str, str]] = list(certificate.get("subjectAltName", ()))
    return any(_matches(kind, entry, name) for kind, entry in entries for name in (host.hostname, host.address))


def _matches(kind: str, entry: str, name: str) -> bool:
    address = parse_ip(name)
    if kind == "IP Address":
        return address is not None and parse_ip(entry.strip()) == address
    if kind != "DNS" or address is not None:
        return False
    pattern, labels = _split_labels(entry), _split_labels(name)  # in lower case
    if pattern[0] == "*" and len(pattern) > 2 and len(labels) == len(pattern):
        return pattern[1:] == labels[1:]
    return pattern == labels


def _split_labels(name: str) -> list[str]:
    if not name.isascii():
        try:
            name = name.encode("idna").decode("ascii")
        except UnicodeError:
            pass  # a certificate cannot contain such a name
    return name.rstrip(".").lower().split(".")


def parse_ip(text: str) -> IPv4Address | IPv6Address | None:
    """Return the IP address in a text; None if the text is a name."""
    try:
        return ip_address(text)
    except ValueError:
        return None


def _context(config: Config, authorities: Path | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # `check_certificate` checks the name or the address
    context.verify_mode = ssl.CERT_NONE if authorities is None else ssl.CERT_REQUIRED
    set_minimum_version(context, config.tls_minimum)
    if authorities is not None:
        context.load_verify_locations(authorities)
    return context


def _parse_certificates(text: bytes) -> frozenset[bytes]:
    ders = frozenset(ssl.PEM_cert_to_DER_cert(block.decode("ascii")) for block in _PEM.findall(text))
    for der in ders:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=der)  # raises if it is not a certificate
    return ders
