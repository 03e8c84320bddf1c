"""A small certificate authority for the tests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Certificates:
    """Files in PEM form."""

    ca_file: Path
    certfile: Path
    keyfile: Path


@cache
def authority() -> trustme.CA:
    """The authority of this test run."""
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


def server_files(directory: Path, names: tuple[str, ...] = ("localhost", "127.0.0.1")) -> Certificates:
    """Issue a server certificate for these names and addresses; write it, its key and the authority's."""
    issued = authority().issue_cert(*names, key_type=trustme.KeyType.ECDSA)
    files = Certificates(directory / "ca.pem", directory / "server.pem", directory / "server.key")
    authority().cert_pem.write_to_path(str(files.ca_file))
    files.certfile.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(files.keyfile))
    files.keyfile.chmod(0o600)
    return files
