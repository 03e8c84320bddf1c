"""TLS contexts: created once for a `ca_file`, and again after it has changed."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from types import SimpleNamespace

import pytest
import trustme

import harp
from harp._net import sockets
from support.certificates import Certificates, server_files
from support.deadline import wait_until
from support.peers import Peer, answering, server_context
from support.shells import Shell

ANSWER = [{"harp": 1, "stream_result": False}, {"result": 1}]


@pytest.fixture
def files(tmp_path: Path) -> Certificates:
    """Return files that are older than a tick of the file system's clock."""
    found = server_files(tmp_path)
    wait_until(
        lambda: sockets.tls_context(found.ca_file) is sockets.tls_context(found.ca_file), what="the age of the file"
    )
    return found


def test_tls_context_is_created_once(files: Certificates) -> None:
    assert sockets.tls_context(files.ca_file) is sockets.tls_context(str(files.ca_file))
    assert sockets.tls_context(None) is sockets.tls_context(None) is not sockets.tls_context(files.ca_file)


@pytest.mark.parametrize("how", ["replaced", "written over"])
def test_tls_changed_ca_file_takes_effect_immediately(
    shell: Shell, tmp_path: Path, files: Certificates, how: str
) -> None:
    ca_file, other = tmp_path / "trusted.pem", tmp_path / "new.pem"
    right = files.ca_file.read_bytes()
    wrong = trustme.CA(key_type=trustme.KeyType.ECDSA).cert_pem.bytes()

    def renew(content: bytes) -> None:
        if how == "replaced":
            other.write_bytes(content)
            os.replace(other, ca_file)
        else:
            ca_file.write_bytes(content)

    with Peer(always=answering(*ANSWER), tls=server_context(files)) as peer:
        called = shell.server(peer, ca_file=ca_file)
        for _ in range(2):
            renew(wrong)
            with pytest.raises(harp.CommunicationError, match="certificate is not accepted"):
                called.p()
            renew(right)
            assert called.p() == 1
            renew(b"")
            with pytest.raises(harp.HarpException, match="no certificate"):
                called.p()
            ca_file.unlink()
            with pytest.raises(harp.HarpException, match="No such file"):
                called.p()


def test_tls_ca_file_changed_twice_within_a_clock_tick(
    files: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a coarse clock of the file system, neither its times nor its size change."""
    other = trustme.CA(key_type=trustme.KeyType.ECDSA).cert_pem.bytes()
    size = max(len(other), files.ca_file.stat().st_size)
    contents = [content.ljust(size, b"\n") for content in (files.ca_file.read_bytes(), other)]
    ca_file, exact, tick = tmp_path / "trusted.pem", os.stat, 10_000_000

    def coarse(path: str | int) -> SimpleNamespace:
        found = exact(path)
        times = {"st_mtime_ns": found.st_mtime_ns // tick * tick, "st_ctime_ns": found.st_ctime_ns // tick * tick}
        return SimpleNamespace(st_dev=found.st_dev, st_ino=found.st_ino, st_size=found.st_size, **times)

    for number in range(40):
        content = contents[number % 2]
        ca_file.write_bytes(content)
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", coarse)
            context = sockets.tls_context(ca_file)
        assert context.get_ca_certs(binary_form=True) == [ssl.PEM_cert_to_DER_cert(content.decode().strip())]
