"""The program `harp-cert`: an authority of your own, and certificates for hosts and clients.

One directory has all files: ``ca.pem`` and ``ca.key``, and ``NAME.pem`` and ``NAME.key`` for each certificate. No file
is overwritten; `renew` replaces a certificate in one step and keeps its key. Keys have mode 0600.

Spec: docs/certificates.md.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes, PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from harp.protocol.printing import print_escaped
from harp_daemon.program import add_version, written_output
from harp_daemon.stable_files import replace_file, write_new

#: Days that a certificate is valid, unless an option changes it: an authority's, and any other.
_CA_DAYS, _DAYS = 3650, 365

#: A certificate is valid from this long before it was made, because clocks differ.
_CLOCK_DIFFERENCE = datetime.timedelta(hours=1)

#: A DNS name of ASCII letters, digits and hyphens; the first label may be an asterisk.
_LABEL = "[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_DNS_NAME = re.compile(rf"(?=.{{1,253}}\Z)(?:\*\.)?(?:{_LABEL}\.)*{_LABEL}")

_EXAMPLES = """\
examples:
  harp-cert ca pki                           make pki/ca.pem and pki/ca.key
  harp-cert host pki web01 192.0.2.11        make pki/web01.pem and pki/web01.key for a host and its address
  harp-cert client pki shop                  make pki/shop.pem and pki/shop.key for a client
  harp-cert renew pki web01                  renew pki/web01.pem; its key stays the same
  harp-cert show pki/*.pem                   print names and end of certificates
"""


class CertificateError(Exception):
    """A certificate cannot be made or read. The message has the action, the reason and advice."""


def make_authority(directory: Path, name: str = "HARP", days: int = _CA_DAYS) -> None:
    """Make ``ca.pem`` and ``ca.key`` in a directory, which is created with mode 0700 if it does not exist.

    Args:
        directory: where the files are made.
        name: the authority's common name, 1 to 64 characters.
        days: how long it is valid.

    Raises:
        CertificateError: a file exists or cannot be written, or an argument is invalid.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(name)
    usage = _key_usage(key_cert_sign=True, crl_sign=True)
    builder = _builder(subject, key.public_key(), days).issuer_name(subject)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(usage, critical=True)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CertificateError(f"cannot create directory {directory}: {error.strerror}") from None
    _write_new(directory / "ca", key, builder.sign(key, hashes.SHA256()))


def make_certificate(directory: Path, names: Sequence[str], days: int = _DAYS, client: bool = False) -> None:
    """Make ``NAME.pem`` and ``NAME.key``, signed by the authority of a directory. NAME is the first name.

    Args:
        directory: where ``ca.pem`` and ``ca.key`` are, and the files are made.
        names: DNS names and IP addresses of a host; the name of a client.
        days: how long it is valid.
        client: whether it is for a client.

    Raises:
        CertificateError: there is no usable authority, a file exists or cannot be written, or an argument is invalid.
    """
    alternatives = x509.SubjectAlternativeName([_general_name(name) for name in names])
    usage = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_subject(names[0]), key.public_key(), days)
    builder = builder.add_extension(alternatives, critical=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    _write_new(directory / names[0], key, _sign(directory, builder))


def renew_certificate(directory: Path, name: str, days: int = _DAYS) -> None:
    """Replace ``NAME.pem`` by a certificate for the same key, names and use.

    Args:
        directory: where the files and the authority's are.
        name: the first name of the certificate.
        days: how long the new one is valid.

    Raises:
        CertificateError: a file cannot be read or written, or the certificate is an authority, or not of this one.
    """
    path = directory / f"{name}.pem"
    old = read_certificate(path)
    if any(isinstance(each.value, x509.BasicConstraints) and each.value.ca for each in old.extensions):
        # It would be replaced by one that may not sign.
        raise CertificateError(f"cannot renew {path}: it is an authority; make a new one in another directory")
    try:
        old.verify_directly_issued_by(read_certificate(directory / "ca.pem"))
    except (InvalidSignature, ValueError, TypeError):
        raise CertificateError(f"cannot renew {path}: it was not issued by {directory / 'ca.pem'}") from None
    builder = _builder(old.subject, old.public_key(), days)
    for extension in old.extensions:
        if isinstance(extension.value, (x509.SubjectAlternativeName, x509.ExtendedKeyUsage)):
            builder = builder.add_extension(extension.value, extension.critical)
    try:
        replace_file(path, _sign(directory, builder).public_bytes(serialization.Encoding.PEM), 0o644)
    except OSError as error:
        raise CertificateError(f"cannot write {path}: {error.strerror}") from None


def read_certificate(path: Path) -> x509.Certificate:
    """Return the first certificate of a PEM file.

    Raises:
        CertificateError: the file cannot be read or has no certificate.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        hint = "; `harp-cert ca` makes an authority" if path.name == "ca.pem" else ""
        raise CertificateError(f"cannot read {path}: {error.strerror}{hint}") from None
    except ValueError:
        raise CertificateError(f"cannot read {path}: it has no certificate in PEM format") from None


def describe_certificate(path: Path) -> str:
    """Return one line about a certificate: file, names, use and end.

    Raises:
        CertificateError: the file cannot be read or has no certificate.
    """
    found = read_certificate(path)
    (common, *_) = [str(name.value) for name in found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] or ["-"]
    names, use = [common], "any"
    for extension in found.extensions:
        match extension.value:
            case x509.SubjectAlternativeName() as alternatives:
                names = [str(name.value) for name in alternatives]
            case x509.BasicConstraints(ca=True):
                use = "authority"
            case x509.ExtendedKeyUsage() as usages:
                use = ", ".join("host" if usage == ExtendedKeyUsageOID.SERVER_AUTH else "client" for usage in usages)
    days = (found.not_valid_after_utc - datetime.datetime.now(datetime.UTC)).days
    state = f"{days} days left" if days >= 0 else "EXPIRED"
    return f"{path}: {use} {' '.join(names)}, valid until {found.not_valid_after_utc:%Y-%m-%d} ({state})"


def _subject(name: str) -> x509.Name:
    try:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    except ValueError:
        raise CertificateError(f"invalid name {name!r}: expected 1 to 64 characters") from None


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    is_mistyped_address = "." in name and name.replace(".", "").isdecimal()
    if is_mistyped_address or not _DNS_NAME.fullmatch(name):
        raise CertificateError(
            f"invalid name {name!r}: expected a DNS name in ASCII (xn--... for others) or an IP address"
        )
    return x509.DNSName(name)


def _key_usage(**used: bool) -> x509.KeyUsage:
    kinds = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
        *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{kind: used.get(kind, False) for kind in kinds})


def _builder(subject: x509.Name, key: object, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    try:
        ends = now + datetime.timedelta(days=days)
    except OverflowError:
        raise CertificateError(f"invalid number of days {days}: the end is after the year 9999") from None
    if days < 1:
        raise CertificateError(f"invalid number of days {days}: expected at least 1")
    builder = x509.CertificateBuilder(subject_name=subject, public_key=key, serial_number=x509.random_serial_number())  # type: ignore[arg-type]
    builder = builder.not_valid_before(now - _CLOCK_DIFFERENCE).not_valid_after(ends)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)  # type: ignore[arg-type]


def _sign(directory: Path, builder: x509.CertificateBuilder) -> x509.Certificate:
    """Complete a certificate that is not an authority, and sign it by the authority of a directory."""
    ca, key = read_certificate(directory / "ca.pem"), _read_key(directory / "ca.key")
    if key.public_key() != ca.public_key():
        raise CertificateError(f"cannot sign: {directory / 'ca.key'} does not belong to {directory / 'ca.pem'}")
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(digital_signature=True), critical=True)
    builder = builder.issuer_name(ca.subject).add_extension(authority, critical=False)
    try:
        signed = builder.sign(key, hashes.SHA256())
    except (TypeError, ValueError):
        raise CertificateError(f"cannot sign: {directory / 'ca.key'}: expected a key for RSA or ECDSA") from None
    if signed.not_valid_after_utc > ca.not_valid_after_utc:
        raise CertificateError(
            f"cannot sign: the authority is valid until {ca.not_valid_after_utc:%Y-%m-%d} only; choose fewer --days,"
            " or make a new authority"
        )
    return signed


def _read_key(path: Path) -> CertificateIssuerPrivateKeyTypes:
    try:
        key: PrivateKeyTypes = serialization.load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise CertificateError(f"cannot read {path}: {error.strerror}; `harp-cert ca` makes an authority") from None
    except (ValueError, TypeError):
        raise CertificateError(f"cannot read {path}: it has no private key in PEM format without a password") from None
    return key  # type: ignore[return-value]  # any other type fails in `_sign`


def _write_new(stem: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    """Write a certificate and its key into new files; if one cannot be written, both are removed."""
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    contents = ((".key", secret, 0o600), (".pem", certificate.public_bytes(pem), 0o644))
    created: list[Path] = []
    try:
        for suffix, content, mode in contents:
            path = stem.with_name(stem.name + suffix)
            write_new(path, content, mode)
            created.append(path)
    except OSError as error:
        for written in created:
            written.unlink()
        hint = ""
        if isinstance(error, FileExistsError):
            hint = "; choose another directory" if stem.name == "ca" else "; `harp-cert renew` replaces a certificate"
        raise CertificateError(f"cannot write {path}: {error.strerror}{hint}") from None


def _directory(text: str) -> Path:
    if not text:  # as of a variable that is not set: the keys would be written to the working directory
        raise argparse.ArgumentTypeError("expected a directory, got an empty text")
    return Path(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="harp-cert",
        description="Make an authority of your own, and certificates for hosts and clients.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, days: int) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "directory", type=_directory, metavar="DIRECTORY", help="where all certificates and keys are"
        )
        command.add_argument("--days", type=int, default=days, help="days that it is valid (default: %(default)s)")
        return command

    add("ca", "make an authority", _CA_DAYS).add_argument("--name", default="HARP", help="default: %(default)s")
    host = add("host", "make a certificate for a host", _DAYS)
    host.add_argument("names", nargs="+", metavar="NAME", help="DNS names and IP addresses by which clients connect")
    add("client", "make a certificate for a client", _DAYS).add_argument("name", metavar="NAME")
    add("renew", "replace a certificate by one that is valid longer", _DAYS).add_argument("name", metavar="NAME")
    show = commands.add_parser("show", help="print names and end of certificates")
    show.add_argument("files", nargs="+", type=Path, metavar="FILE")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status: 0, or 1 after an error, which is printed."""
    with written_output("harp-cert"):
        return _run(_parser().parse_args(arguments))


def _run(options: argparse.Namespace) -> int:
    try:
        match options.command:
            case "ca":
                make_authority(options.directory, options.name, options.days)
            case "host":
                make_certificate(options.directory, options.names, options.days)
            case "client":
                make_certificate(options.directory, [options.name], options.days, client=True)
            case "renew":
                renew_certificate(options.directory, options.name, options.days)
            case "show":
                for path in options.files:
                    print_escaped(describe_certificate(path))
    except CertificateError as error:
        print_escaped(f"harp-cert: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
