"""Certificates for the tests, made as users make them."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from harp_daemon.certificates import make_authority, make_certificate


@dataclass(frozen=True)
class Certificates:
    """Files in PEM form."""

    ca_file: Path
    certfile: Path
    keyfile: Path


@cache
def _authority() -> tempfile.TemporaryDirectory[str]:
    """The directory of the authority of this test run."""
    directory = tempfile.TemporaryDirectory(prefix="harp-ca-", ignore_cleanup_errors=True)
    make_authority(Path(directory.name))
    return directory


def server_files(directory: Path, names: tuple[str, ...] = ("localhost", "127.0.0.1")) -> Certificates:
    """Issue a server certificate for these names and addresses; write it, its key and the authority's."""
    for suffix in ("pem", "key"):
        shutil.copy(Path(_authority().name, f"ca.{suffix}"), directory)
        (directory / f"{names[0]}.{suffix}").unlink(missing_ok=True)
    make_certificate(directory, names)
    files = Certificates(directory / "ca.pem", directory / "server.pem", directory / "server.key")
    (directory / f"{names[0]}.pem").replace(files.certfile)
    (directory / f"{names[0]}.key").replace(files.keyfile)
    return files


@cache
def authority() -> trustme.CA:
    """Another authority of this test run, in memory."""
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


def make_client(directory: Path, *names: str, expires: datetime | None = None) -> tuple[Path, Path]:
    """Issue a client certificate with alternative names, such as ``DNS:a``, by the authority ``ca`` of a directory.

    It expires in two days, or at a UTC time. Return the certificate and its key.
    """
    base = directory / re.sub(r"\W", "_", names[0])
    extension = base.with_suffix(".ext")
    extension.write_text(f"subjectAltName={','.join(names)}\nextendedKeyUsage=clientAuth\n")
    key, request, certificate = (base.with_suffix(f".{kind}") for kind in ("key", "csr", "crt"))
    for command in (
        f"openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {key} -out {request} -subj /CN=x",
        f"openssl x509 -req -in {request} -CA {directory}/ca.pem -CAkey {directory}/ca.key -CAcreateserial "
        f"-days 2 -extfile {extension} -out {certificate}",
    ):
        subprocess.run(command.split(), check=True, capture_output=True)
    if expires is not None:
        _sign_again(directory, certificate, expires=expires)
    return certificate, key


def give_unreadable_name(directory: Path, file: Path) -> None:
    """Replace the alternative names of a certificate, of the authority of a directory, by one that is no text."""
    _sign_again(directory, file, names=bytes.fromhex("30048202fffe"))  # a DNS name of two bytes that are not UTF-8


def _sign_again(directory: Path, file: Path, expires: datetime | None = None, names: bytes | None = None) -> None:
    """Replace a certificate by one that expires at a time, or has other alternative names, encoded as DER."""
    found = x509.load_pem_x509_certificate(file.read_bytes())
    builder = x509.CertificateBuilder(found.issuer, found.subject, found.public_key(), found.serial_number)
    builder = builder.not_valid_before(found.not_valid_before_utc).not_valid_after(expires or found.not_valid_after_utc)
    for extension in found.extensions:
        value = extension.value
        if names is not None and isinstance(value, x509.SubjectAlternativeName):
            value = x509.UnrecognizedExtension(value.oid, names)
        builder = builder.add_extension(value, extension.critical)
    key = serialization.load_pem_private_key((directory / "ca.key").read_bytes(), None)
    assert isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey)
    file.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


def write_revocations(directory: Path, *revoked: Path) -> None:
    """Write a revocation list of the authority that contains these certificates."""
    database = directory / "index.txt"
    database.touch()
    configuration = directory / "ca.conf"
    configuration.write_text(
        f"[ca]\ndefault_ca=own\n[own]\ndatabase={database}\ndefault_md=sha256\ndefault_crl_days=2\n"
        f"certificate={directory}/ca.pem\nprivate_key={directory}/ca.key\n"
    )
    base = ["openssl", "ca", "-config", str(configuration)]
    for certificate in revoked:
        subprocess.run([*base, "-revoke", str(certificate)], check=True, capture_output=True)
    new = directory / "new.crl"
    subprocess.run([*base, "-gencrl", "-out", str(new)], check=True, capture_output=True)
    new.replace(directory / "crl.pem")
