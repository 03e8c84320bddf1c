"""Certificates for the tests, made as users make them."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import trustme

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
