"""Listening addresses with TLS: handshakes, certificates of clients, hostile peers, changed files."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from support.certificates import give_unreadable_name, make_client, server_files, write_revocations
from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd, LineClient
from support.key_updates import key_updates
from support.peers import Peer
from support.scripted import scripted_harpd

UNKNOWN = "00000000-0000-4000-8000-000000000000"
CANCEL = json.dumps({"harpcaller": 1, "cancel": UNKNOWN}).encode() + b"\n"


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    with scripted_harpd(tmp_path_factory.mktemp("harpd")) as peer:
        yield peer


def settings(directory: Path, **more: Any) -> dict[str, Any]:
    """Return settings with a TLS listener and a plain one; more members of the section `tls`."""
    directory.mkdir(exist_ok=True)
    files = server_files(directory)
    return {
        "listen": ["tls:127.0.0.1:0"],
        "tls": {"certfile": str(files.certfile), "keyfile": str(files.keyfile), **more},
    }


class TLS(Harpcallerd):
    """A dispatcher whose only listener has TLS."""

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.directory / "pki" / "ca.pem")
        context.hostname_checks_common_name = False
        return context

    def connect(self) -> LineClient:
        return self.connect_with(self.context())

    def connect_with(self, context: ssl.SSLContext) -> LineClient:
        plain = socket.create_connection((self.host, self.port), DEADLINE)
        return LineClient(context.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False))

    def configure(self, settings: Any) -> None:
        lines = dict(settings)
        tls = lines.pop("tls", None)
        super().configure(lines)
        self._settings = settings
        if tls is not None:
            members = ", ".join(f"{key} = {json.dumps(value)}" for key, value in tls.items())
            with self.config_file.open("a") as file:
                file.write(f"tls = {{{members}}}\n")


@pytest.fixture(scope="module")
def dispatcher(tmp_path_factory: pytest.TempPathFactory, peer: Peer) -> Iterator[TLS]:
    directory = tmp_path_factory.mktemp("tls")
    directory.mkdir(exist_ok=True)
    keys = {**settings(directory / "pki"), "idle_timeout": 3}
    with TLS(directory, {"web01": peer.port}, settings=keys) as dispatcher:
        yield dispatcher


def test_tls_client_submits_follows_and_gets_results(dispatcher: TLS) -> None:
    job = dispatcher.submit("web01", "count", 3)
    assert dispatcher.ask(get_result=job) == [{"result": "counted"}]  # without a ragged end
    packets = [{"packet": number, "data": number} for number in range(3)]
    assert dispatcher.ask(follow_stream=job, since=0) == [*packets, {"result": "counted"}]


def test_tls_connection_serves_many_requests(dispatcher: TLS) -> None:
    with dispatcher.connect() as client:
        for _ in range(5):
            client.send({"harpcaller": 1, "cancel": UNKNOWN, "keep_alive": True})
            assert client.message() == {"cancelled": False, "keep_alive": 3}


def test_tls_long_values_pass_both_ways(dispatcher: TLS) -> None:
    text = "x" * 3_000_000
    job = dispatcher.submit("web01", "echo", text)
    assert dispatcher.ask(get_result=job) == [{"result": [text]}]


def test_tls_slow_reader_gets_everything(dispatcher: TLS) -> None:
    text = "x" * 3_000_000
    job = dispatcher.submit("web01", "echo", text)
    with dispatcher.connect() as client:
        client.send({"harpcaller": 1, "get_result": job})
        received = b""
        while data := client.socket.recv(5_000):
            received += data
            if len(received) % 1_000_000 < 5_000:
                time.sleep(0.01)  # the kernel's buffers fill
        assert json.loads(received) == {"result": [text]}


def test_tls_request_byte_by_byte_is_accepted(dispatcher: TLS) -> None:
    with dispatcher.connect() as client:
        for at in range(len(CANCEL)):
            client.send(CANCEL[at : at + 1])
        assert client.messages() == [{"cancelled": False}]


def test_tls_request_sent_with_the_handshake_is_answered(dispatcher: TLS) -> None:
    """The last data of the handshake and the request arrive together."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = dispatcher.context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with socket.create_connection((dispatcher.host, dispatcher.port), DEADLINE) as sock:
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                sock.sendall(outgoing.read())
                incoming.write(sock.recv(65536))
        client.write(CANCEL)
        sock.sendall(outgoing.read())
        reply = b""
        while b"\n" not in reply:
            try:
                reply += client.read()
            except ssl.SSLWantReadError:
                incoming.write(sock.recv(65536))
        assert json.loads(reply) == {"cancelled": False}


@pytest.mark.parametrize(
    "data", [CANCEL, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"x" * 70_000, b"\0" * 100]
)
def test_plain_text_peer_on_a_tls_port_is_closed(dispatcher: TLS, data: bytes) -> None:
    seen = len(dispatcher.events("TLS handshake failed"))
    with socket.create_connection((dispatcher.host, dispatcher.port), DEADLINE) as client:
        client.sendall(data)
        received = b""
        try:
            while piece := client.recv(1000):
                received += piece
        except ConnectionResetError:
            pass
        assert b"harpcaller" not in received
        assert b"cancelled" not in received
    wait_until(lambda: len(dispatcher.events("TLS handshake failed")) > seen, DEADLINE, "the event")


@pytest.mark.parametrize("sent", [0, 5, 50])
def test_tls_handshake_is_limited_in_time(dispatcher: TLS, sent: int) -> None:
    outgoing = ssl.MemoryBIO()
    hello = dispatcher.context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        hello.do_handshake()
    with socket.create_connection((dispatcher.host, dispatcher.port), DEADLINE) as client:
        client.sendall(outgoing.read()[:sent])
        assert client.recv(1000) == b""
    wait_until(lambda: dispatcher.events("TLS handshake failed", reason="it took too long"), DEADLINE, "the event")


def test_tls_clients_that_vanish_in_the_handshake_leave_nothing(dispatcher: TLS) -> None:
    outgoing = ssl.MemoryBIO()
    hello = dispatcher.context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        hello.do_handshake()
    text = outgoing.read()
    for _ in range(50):
        with socket.create_connection((dispatcher.host, dispatcher.port), DEADLINE) as client:
            client.sendall(text)
    assert dispatcher.ask(cancel=UNKNOWN) == [{"cancelled": False}]


def test_tls_handshakes_of_many_do_not_delay_requests(dispatcher: TLS) -> None:
    """An open connection gets its replies while 200 clients shake hands."""
    outgoing = ssl.MemoryBIO()
    hello = dispatcher.context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        hello.do_handshake()
    text = outgoing.read()
    with ExitStack() as stack, dispatcher.connect() as client:
        crowd = [
            stack.enter_context(socket.create_connection((dispatcher.host, dispatcher.port), DEADLINE))
            for _ in range(200)
        ]
        for other in crowd:
            other.sendall(text)
        delays = []
        for _ in range(20):
            begin = time.monotonic()
            client.send({"harpcaller": 1, "cancel": UNKNOWN, "keep_alive": True})
            assert client.message()["cancelled"] is False
            delays.append(time.monotonic() - begin)
        assert sorted(delays)[10] < 0.5, delays  # all handshakes at once take longer on any machine


def test_tls_client_over_the_limit_gets_the_refusal(tmp_path: Path, peer: Peer) -> None:
    keys = {**settings(tmp_path / "pki"), "max_connections": 2}
    with TLS(tmp_path, {"web01": peer.port}, settings=keys) as dispatcher, ExitStack() as stack:
        job = dispatcher.submit("web01", "hang")

        def refusal() -> str | None:
            """Wait for the job with another client; return the type of the error that it gets at once, if any."""
            client = stack.enter_context(dispatcher.connect())
            client.send({"harpcaller": 1, "get_result": job})
            client.socket.settimeout(1)
            try:
                return str(client.message()["error"]["type"])
            except TimeoutError:
                return None  # it waits

        assert wait_until(refusal, DEADLINE, "the refusal") == "too_many_connections"


def test_listeners_with_and_without_tls_serve_side_by_side(tmp_path: Path, peer: Peer) -> None:
    keys = settings(tmp_path / "pki")
    keys["listen"] = ["127.0.0.1:0", "tls:127.0.0.1:0"]
    with TLS(tmp_path, {"web01": peer.port}, settings=keys) as dispatcher:
        plain, dispatcher.port = (event["port"] for event in dispatcher.events("harpcallerd is serving"))
        assert dispatcher.ask(cancel=UNKNOWN) == [{"cancelled": False}]
        with LineClient(socket.create_connection((dispatcher.host, plain), DEADLINE)) as client:
            client.send(CANCEL)
            assert client.messages() == [{"cancelled": False}]
        outcome = dispatcher.reload()
        assert outcome["event"] == "reloaded"
        assert dispatcher.ask(cancel=UNKNOWN) == [{"cancelled": False}]


def test_reload_reports_changed_listen_refuses_invalid_files(tmp_path: Path, peer: Peer) -> None:
    keys = settings(tmp_path / "pki")
    with TLS(tmp_path, {"web01": peer.port}, settings=keys) as dispatcher:
        dispatcher.configure({**keys, "listen": ["127.0.0.1:0"]})
        done = dispatcher.control("reload")
        assert "the change of listen needs a restart" in done.stderr
        tls = {**keys["tls"], "certfile": str(tmp_path / "none")}
        dispatcher.configure({**keys, "tls": tls})
        done = dispatcher.control("reload")
        assert done.returncode == 1
        assert "tls.certfile" in done.stderr
        dispatcher.configure({"listen": ["127.0.0.1:0"]})  # without the section: the listener stays until a restart
        assert dispatcher.control("reload").returncode == 0
        assert dispatcher.ask(cancel=UNKNOWN) == [{"cancelled": False}]


@pytest.mark.parametrize("requested", [False, True])
def test_tls_messages_without_data_do_not_delay_others(tmp_path: Path, requested: bool) -> None:
    """60,000 of them take OpenSSL more than 2 s."""
    pki = tmp_path / "pki"
    with (
        TLS(tmp_path, settings=settings(pki)) as dispatcher,
        socket.create_connection((dispatcher.host, dispatcher.port), DEADLINE) as hostile,
    ):
        records = key_updates(hostile, pki / "ca.pem", tmp_path / "keys", 60_000, requested)
        with dispatcher.connect() as client:
            hostile.settimeout(0.1)
            with suppress(OSError):
                hostile.sendall(records)  # as much as the kernel takes
            delays: list[float] = []
            end = time.monotonic() + DEADLINE
            while not dispatcher.events("TLS client sends no data") or len(delays) < 10:
                begin = time.monotonic()
                assert begin < end
                client.send({"harpcaller": 1, "cancel": UNKNOWN, "keep_alive": True})
                assert client.message()["cancelled"] is False
                delays.append(time.monotonic() - begin)
    assert max(delays) < 0.5, sorted(delays)[-3:]


# Certificates of clients.


@pytest.fixture
def certified(tmp_path: Path, peer: Peer) -> Iterator[TLS]:
    """A dispatcher that accepts certificates of clients, with a revocation list."""
    pki = tmp_path / "pki"
    files = {"client_ca_file": str(pki / "ca.pem"), "crl_file": str(pki / "crl.pem")}
    keys = settings(pki, **files)
    write_revocations(pki)
    with TLS(tmp_path, {"web01": peer.port}, settings=keys) as dispatcher:
        yield dispatcher


def client_context(dispatcher: TLS, certificate: Path, key: Path) -> ssl.SSLContext:
    context = dispatcher.context()
    context.load_cert_chain(certificate, key)
    return context


def lines_until_closed(client: LineClient) -> list[bytes]:
    found = []
    try:
        while line := client.line():
            found.append(line)
    except ssl.SSLEOFError:
        pass
    return found


def ask(dispatcher: TLS, context: ssl.SSLContext) -> Any:
    with dispatcher.connect_with(context) as client:
        client.send(CANCEL)
        return client.message()


def make_authority(directory: Path) -> Path:
    directory.mkdir()
    key = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=ca".split()
    files = f"-keyout {directory}/ca.key -out {directory}/ca.pem".split()
    subprocess.run([*key, *files], check=True, capture_output=True)
    return directory


def test_tls_authority_in_the_revocation_file_is_refused(certified: TLS) -> None:
    other = make_authority(certified.directory / "other")
    stranger = client_context(certified, *make_client(other, "DNS:alice.ops.example.net"))
    revocations = certified.directory / "pki/crl.pem"
    lists = revocations.read_text()
    revocations.write_text(lists + (other / "ca.pem").read_text())
    error = certified.wait_event("cannot use changed file")["error"]
    assert f"expected revocation lists only, got {revocations} with certificates" in error
    with pytest.raises(OSError):
        ask(certified, stranger)
    revocations.write_text((certified.directory / "pki/ca.pem").read_text() + lists)
    wait_until(lambda: certified.events("changed file read"), DEADLINE, "a file without other authorities")
    with pytest.raises(OSError):
        ask(certified, stranger)


def test_tls_client_certificate_is_optional_but_must_be_valid(certified: TLS) -> None:
    pki = certified.directory / "pki"
    good = client_context(certified, *make_client(pki, "DNS:alice.ops.example.net", "email:alice@example.net"))
    assert ask(certified, good) == {"cancelled": False}
    assert ask(certified, certified.context()) == {"cancelled": False}
    other = make_authority(certified.directory / "other")
    stranger = client_context(certified, *make_client(other, "DNS:alice.ops.example.net"))
    with pytest.raises(OSError):
        ask(certified, stranger)
    certified.wait_event("TLS handshake failed")


def test_tls_certificate_with_an_unreadable_name_stops_nobody(certified: TLS) -> None:
    """Python cannot decode the name: the error must not end the handshakes of others."""
    pki = certified.directory / "pki"
    odd = make_client(pki, "DNS:odd.example.net")
    give_unreadable_name(pki, odd[0])
    good = client_context(certified, *make_client(pki, "DNS:alice.ops.example.net"))
    for _ in range(3):
        with pytest.raises((OSError, json.JSONDecodeError)):
            ask(certified, client_context(certified, *odd))
        assert ask(certified, good) == {"cancelled": False}
    reason = "the certificate of the client has a name that is not valid text"
    assert len(certified.events("TLS handshake failed", reason=reason)) == 3


def test_tls_client_with_many_certificates_is_disconnected(certified: TLS) -> None:
    """OpenSSL needs 112 ms to check 300 certificates, also those of a stranger."""
    pki = certified.directory / "pki"
    certificate, key = make_client(pki, "DNS:odd.example.net")
    chain = pki / "chain.pem"
    chain.write_bytes(certificate.read_bytes() + 150 * (pki / "ca.pem").read_bytes())
    with pytest.raises((OSError, json.JSONDecodeError)):
        ask(certified, client_context(certified, chain, key))
    assert certified.wait_event("TLS client sends no data")["bytes"] < 40_000


def test_tls_revoked_certificate_closes_its_connection(certified: TLS) -> None:
    pki = certified.directory / "pki"
    leaver, colleague = (make_client(pki, f"DNS:{name}.example.net") for name in ("leaver", "colleague"))
    of_leaver, of_colleague = client_context(certified, *leaver), client_context(certified, *colleague)
    job = certified.submit("web01", "hang")
    with certified.connect_with(of_leaver) as idle, certified.connect_with(of_leaver) as following:
        idle.send({"harpcaller": 1, "cancel": UNKNOWN, "keep_alive": True})
        assert idle.message()["cancelled"] is False
        following.send({"harpcaller": 1, "follow_stream": job})
        write_revocations(pki, leaver[0])
        assert lines_until_closed(idle) == []
        [line] = lines_until_closed(following)
        assert json.loads(line)["error"]["type"] == "auth_error"
    with pytest.raises(OSError):
        ask(certified, of_leaver)
    assert ask(certified, of_colleague) == {"cancelled": False}


def test_tls_expired_client_certificate_ends_its_connections(certified: TLS) -> None:
    pki = certified.directory / "pki"
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=5)
    context = client_context(certified, *make_client(pki, "DNS:guest.example.net", expires=expires))
    job = certified.submit("web01", "hang")
    with certified.connect_with(context) as idle, certified.connect_with(context) as following:
        idle.send({"harpcaller": 1, "cancel": UNKNOWN, "keep_alive": True})
        assert idle.message()["cancelled"] is False
        following.send({"harpcaller": 1, "follow_stream": job})
        assert lines_until_closed(idle) == []
        assert datetime.now(UTC) >= expires
        [line] = lines_until_closed(following)
        refusal = {"type": "auth_error", "message": "the certificate of the client has expired", "refused": True}
        assert json.loads(line)["error"] == refusal
    with pytest.raises(OSError):
        ask(certified, context)


def test_tls_changed_certificate_is_used_for_new_connections(certified: TLS) -> None:
    pki = certified.directory / "pki"

    def serial() -> str:
        with certified.connect() as client:
            client.send(CANCEL)
            assert isinstance(client.socket, ssl.SSLSocket)
            return str((client.socket.getpeercert() or {})["serialNumber"])

    before = serial()
    new = certified.directory / "new"
    new.mkdir()
    files = server_files(new)
    shutil.copy(files.certfile, pki / "server.pem")  # with the old key: it stays unused
    certified.wait_event("cannot use changed file")
    assert serial() == before
    shutil.copy(files.keyfile, pki / "server.key")
    wait_until(lambda: serial() != before, DEADLINE, "the new certificate")
