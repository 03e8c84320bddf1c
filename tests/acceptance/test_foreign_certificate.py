"""A host that presents the known certificate of another host: it gets no password, and the other host has its jobs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from support.certificates import server_files
from support.harpcallerd import Harpcallerd
from support.peers import Peer, PeerConnection, server_context
from support.resumable_host import EXIT_INFO, acknowledgement, ends


def test_known_certificate_of_another_host_gets_no_password(tmp_path: Path) -> None:
    certificates = {}
    for name in ("web01", "web02"):
        (tmp_path / name).mkdir()
        certificates[name] = server_files(tmp_path / name, (name,))
    known = tmp_path / "known.pem"
    known.write_bytes(b"".join(files.certfile.read_bytes() for files in certificates.values()))
    received: list[bytes] = []

    def steal(conn: PeerConnection) -> None:
        with suppress(OSError, AssertionError):
            received.append(conn.line())

    def serve(conn: PeerConnection) -> None:
        if "calls" in conn.expect():
            conn.reply({"harp": 1, "calls": [], "instance": "w1"})
            return
        conn.reply(acknowledgement())
        ends(conn, EXIT_INFO, {"result": 1})

    context = server_context(certificates["web02"])
    with Peer(always=steal, tls=context) as thief, Peer(always=serve, tls=context) as honest:
        hosts = {"web01": thief.port, "web02": honest.port}
        settings = {"known_certs_file": str(known), "start_within": 0}
        with Harpcallerd(tmp_path / "dispatcher", hosts, settings=settings) as dispatcher:
            [stolen] = dispatcher.ask(get_result=dispatcher.submit("web01", "p"))
            assert "it is the certificate of host 'web02'" in stolen["error"]["message"], stolen
            assert dispatcher.ask(get_result=dispatcher.submit("web02", "p")) == [{"result": 1}]
    assert not any(received)
