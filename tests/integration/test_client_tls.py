"""What of TLS is used again by further connections, and what it must never be used for."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import trustme

import harp
from harp._net import tls
from support.certificates import Certificates, server_files
from support.deadline import wait_until
from support.peers import Conversation, Peer, answering, reserved_port, server_context, silent
from support.shells import Shell, nothing_left, shell_of

ANSWER = [{"harp": 1, "stream_result": False}, {"result": 1}]


@pytest.fixture(params=["sync", "aio"])
def shell(request: pytest.FixtureRequest) -> Iterator[Shell]:
    with shell_of(request.param) as found:
        yield found


@pytest.fixture
def files(tmp_path: Path) -> Certificates:
    """Files that have been as they are for a while."""
    found = server_files(tmp_path)
    wait_until(lambda: tls.tls_context(found.ca_file) is tls.tls_context(found.ca_file), what="the age of the file")
    return found


def server(peer: Peer, ca_file: Path | None, host: str = "127.0.0.1") -> harp.HarpServer:
    return harp.HarpServer(host, "u", "secret", peer.port, ca_file)


class Handshakes:
    """A script that answers one call, and notes of each connection whether its session was resumed."""

    def __init__(self) -> None:
        self.resumed: list[bool] = []

    def __call__(self, talk: Conversation) -> None:
        assert isinstance(talk.sock, ssl.SSLSocket)
        self.resumed.append(talk.sock.session_reused is True)
        answering(*ANSWER)(talk)


# Sessions.


@pytest.mark.parametrize("verified", [True, False])
def test_a_session_is_resumed(files: Certificates, verified: bool) -> None:
    handshakes = Handshakes()
    with nothing_left(), Peer(always=handshakes, tls=server_context(files)) as peer:
        for _ in range(4):  # whoever asks
            assert server(peer, files.ca_file if verified else None).p() == 1
    assert handshakes.resumed == [False, True, True, True]


def test_threads_resume_a_session_at_once(files: Certificates) -> None:
    handshakes, threads = Handshakes(), 8
    with nothing_left(), Peer(always=handshakes, tls=server_context(files)) as peer:
        assert server(peer, files.ca_file).p() == 1
        start = threading.Barrier(threads)

        def work() -> list[object]:
            start.wait(30)
            return [server(peer, files.ca_file).p() for _ in range(10)]

        with ThreadPoolExecutor(threads) as pool:
            assert all(call.result() == [1] * 10 for call in [pool.submit(work) for _ in range(threads)])
    assert handshakes.resumed == [False] + [True] * (10 * threads)


def test_a_session_is_of_one_name_one_port_and_one_context(files: Certificates) -> None:
    handshakes, others = Handshakes(), Handshakes()
    context = server_context(files)  # whose tickets all these servers take
    with nothing_left(), Peer(always=handshakes, tls=context) as peer, Peer(always=others, tls=context) as other:
        assert server(peer, files.ca_file).p() == 1
        assert server(peer, None).p() == 1
        assert server(peer, files.ca_file, host="localhost").p() == 1
        assert server(other, files.ca_file).p() == 1
        assert handshakes.resumed == [False] * 3
        assert others.resumed == [False]
        assert server(peer, files.ca_file, host="localhost").p() == 1
        assert handshakes.resumed[3:] == [True]


def test_trust_in_a_session_ends(files: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not prolonged by being resumed."""
    handshakes = Handshakes()
    with nothing_left(), Peer(always=handshakes, tls=server_context(files)) as peer:
        now = 0.0
        monkeypatch.setattr(tls, "time", SimpleNamespace(monotonic=lambda: now, time_ns=time.time_ns))
        for now in (0.0, 0.9, 1.1, 2.0):
            now *= tls.TRUST_IN_SESSION
            assert server(peer, files.ca_file).p() == 1
    assert handshakes.resumed == [False, True, False, True]


def test_a_server_that_was_started_anew(files: Certificates) -> None:
    before, after = Handshakes(), Handshakes()
    with nothing_left(), reserved_port() as port:
        with Peer(always=before, tls=server_context(files), port=port) as peer:
            assert server(peer, files.ca_file).p() == 1
        with Peer(always=after, tls=server_context(files), port=port) as peer:
            assert [server(peer, files.ca_file).p() for _ in range(3)] == [1, 1, 1]
    assert (before.resumed, after.resumed) == ([False], [False, True, True])


def test_a_stranger_in_the_servers_place_is_refused(files: Certificates, tmp_path: Path) -> None:
    """Who knows nothing of the session has to show a certificate."""
    strange = trustme.CA().issue_cert("127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    strange.configure_cert(context)
    with nothing_left(), reserved_port() as port:
        with Peer(always=Handshakes(), tls=server_context(files), port=port) as peer:
            assert server(peer, files.ca_file).p() == 1
        with Peer(silent, tls=context, port=port) as peer:
            with pytest.raises(harp.CommunicationError, match="certificate is not accepted"):
                server(peer, files.ca_file).p()


def test_sessions_of_tls_1_2_are_not_resumed(files: Certificates) -> None:
    handshakes, context = Handshakes(), server_context(files)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with nothing_left(), Peer(always=handshakes, tls=context) as peer:
        assert [server(peer, files.ca_file).p() for _ in range(2)] == [1, 1]
    assert handshakes.resumed == [False, False]


def test_a_server_without_sessions(files: Certificates) -> None:
    handshakes, context = Handshakes(), server_context(files)
    context.num_tickets = 0
    with nothing_left(), Peer(always=handshakes, tls=context) as peer:
        assert [server(peer, files.ca_file).p() for _ in range(2)] == [1, 1]
    assert handshakes.resumed == [False, False]


def test_only_so_many_sessions_are_remembered(files: Certificates) -> None:
    with nothing_left(), Peer(answering(*ANSWER), always=silent, tls=server_context(files)) as peer:
        context = tls.tls_context(None)
        with context.secured(socket.create_connection((peer.host, peer.port)), peer.host, peer.port) as sock:
            sock.sendall(b"{}\n")
            assert sock.recv(1)
            for number in range(300):
                context.remember(sock, f"host{number}", 1)
        resumed = []
        for number in (0, 43, 44, 299):
            with context.secured(socket.create_connection((peer.host, peer.port)), f"host{number}", 1) as sock:
                resumed.append(sock.session_reused)
    assert resumed == [False, False, True, True]


# Authorities.


def test_a_context_is_made_once(files: Certificates) -> None:
    assert tls.tls_context(files.ca_file) is tls.tls_context(str(files.ca_file))
    assert tls.tls_context(None) is tls.tls_context(None) is not tls.tls_context(files.ca_file)


@pytest.mark.parametrize("how", ["replaced", "written over"])
def test_a_renewed_ca_file_counts_at_once(shell: Shell, tmp_path: Path, files: Certificates, how: str) -> None:
    ca_file, other = tmp_path / "trusted.pem", tmp_path / "new.pem"
    right = files.ca_file.read_bytes()
    wrong = trustme.CA(key_type=trustme.KeyType.ECDSA).cert_pem.bytes()

    def renew(content: bytes) -> None:
        if how == "replaced":
            other.write_bytes(content)
            os.replace(other, ca_file)
        else:
            ca_file.write_bytes(content)

    with Peer(always=Handshakes(), tls=server_context(files)) as peer:
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


def test_a_ca_file_that_changes_twice_within_a_tick(
    files: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system's clock is coarse, neither times nor size may tell."""
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
            context = tls.tls_context(ca_file)
        assert context.get_ca_certs(binary_form=True) == [ssl.PEM_cert_to_DER_cert(content.decode().strip())]
