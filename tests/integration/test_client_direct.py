"""The client with a scripted harpd over TLS; each test uses both shells."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

import harp
from support.certificates import Certificates, server_files
from support.peers import Peer, PeerConnection, answering, line_of, server_context, silent, single_bytes
from support.shells import Shell

PLAIN = {"harp": 1, "stream_result": False}
STREAM = {"harp": 1, "stream_result": True}
BROKEN_OFF = "closed the connection before the reply was complete"


def request(arguments: Any, procedure: str = "p") -> dict[str, Any]:
    return {"harp": 1, "procedure": procedure, "arguments": arguments, "auth": {"user": "u", "password": "secret"}}


@pytest.mark.parametrize(
    ("args", "kwargs", "arguments"),
    [((), {}, []), ((1, "two"), {}, [1, "two"]), ((), {"a": None, "self": 2}, {"a": None, "self": 2})],
)
@pytest.mark.parametrize("value", [None, 5, {"a": [1]}, 10**40])
def test_direct_call_returns_result(
    shell: Shell, tls: ssl.SSLContext, args: tuple[Any, ...], kwargs: dict[str, Any], arguments: Any, value: Any
) -> None:
    script = answering(PLAIN, {"result": value}, request=request(arguments), pieces=single_bytes)
    with Peer(script, tls=tls) as peer:
        found = shell.server(peer).p(*args, **kwargs)
    assert found == value
    assert not isinstance(found, harp.Result)


@pytest.mark.parametrize("records", [[], ["a", None, {"b": [1]}]])
def test_direct_stream_ends_with_a_result(shell: Shell, tls: ssl.SSLContext, records: list[Any]) -> None:
    script = answering(STREAM, *({"stream": record} for record in records), {"result": 7}, pieces=single_bytes)
    with Peer(script, script, tls=tls) as peer:
        server = shell.server(peer)
        assert server.p().all() == [*records, harp.Result(7)]
        iterator = server.p()
        items = list(iterator)
        assert isinstance(items[-1], harp.Result)
        assert items[-1].value == 7
        assert list(iterator) == []


def test_direct_stream_is_a_harp_stream_iterator(tls: ssl.SSLContext) -> None:
    with Peer(answering(STREAM, {"result": 7}), tls=tls) as peer:
        iterator = harp.HarpServer(peer.host, "u", "secret", peer.port).p()
        assert isinstance(iterator, harp.HarpStreamIterator)
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            iterator.__reduce__()
        assert iterator.all() == [harp.Result(7)]


def test_harp_stream_iterator_wraps_any_iterator() -> None:
    closed = []

    def items() -> Iterator[int]:
        try:
            yield from (1, 2, 3)
        finally:
            closed.append(True)

    assert harp.HarpStreamIterator(iter([1, 2])).all() == [1, 2]
    with harp.HarpStreamIterator(items()) as iterator:
        assert next(iterator) == 1
    assert closed == [True]
    harp.HarpStreamIterator(iter([1])).close()


RAISED = {"exception": {"type": "ValueError", "message": "no", "data": {"class": "ValueError", "module": "builtins"}}}
FAILED = {"harp": 1, "error": {"type": "timeout", "message": "m"}}
ERRORS: list[tuple[list[object], type[harp.HarpException], str]] = [
    ([{"harp": 1, "error": {"type": "no_such_procedure", "message": "m"}}], harp.RemoteError, "no_such_procedure"),
    ([PLAIN, RAISED], harp.RemoteException, "ValueError: no"),
    ([PLAIN, FAILED], harp.RemoteError, "timeout: m"),
    ([], harp.CommunicationError, BROKEN_OFF),
    ([PLAIN], harp.CommunicationError, BROKEN_OFF),
    ([PLAIN, b'{"resu'], harp.CommunicationError, "6 bytes into a line"),
    ([{"result": 1}], harp.CommunicationError, "received while waiting for the acknowledgement"),
    ([PLAIN, {"stream": 1}], harp.CommunicationError, "received while waiting for the result"),
    ([PLAIN, PLAIN], harp.CommunicationError, "received while waiting for the result"),
    ([{"harp": 2, "stream_result": False}], harp.CommunicationError, "harp: expected 1, got 2"),
    ([{"harp": 1, "stream_result": 1}], harp.CommunicationError, "stream_result: expected true or false"),
    ([b"HTTP/1.0 400 Bad Request\r\n"], harp.CommunicationError, "column 1"),
    ([b"[1]\n"], harp.CommunicationError, "expected an object"),
    ([{"x": 1}], harp.CommunicationError, "not a message of harpd"),
    ([PLAIN, {"error": {"type": "x", "message": "m"}}], harp.CommunicationError, "harp: expected 1"),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "kind", "message"), ERRORS)
def test_direct_call_raises_errors(
    shell: Shell, tls: ssl.SSLContext, lines: list[object], kind: type[harp.HarpException], message: str
) -> None:
    with Peer(answering(*lines), tls=tls) as peer:
        with pytest.raises(kind, match=message) as caught:
            shell.server(peer).p()
        assert type(caught.value) is kind
        if kind is harp.CommunicationError:
            assert str(caught.value).startswith(f"{peer.host}:{peer.port}: ")
            assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("end", "kind", "message"),
    [
        (RAISED, harp.RemoteException, "ValueError: no"),
        (FAILED, harp.RemoteError, "timeout: m"),
        (b"", harp.CommunicationError, BROKEN_OFF),
        (b"{", harp.CommunicationError, "1 bytes into a line"),
        (b"garbage\n", harp.CommunicationError, "column 1"),
        (PLAIN, harp.CommunicationError, "received while waiting for records"),
    ],
)
def test_direct_stream_raises_errors(
    shell: Shell, tls: ssl.SSLContext, end: object, kind: type[harp.HarpException], message: str
) -> None:
    with Peer(answering(STREAM, {"stream": 1}, end), tls=tls) as peer:
        iterator = shell.server(peer).p()
        assert next(iterator) == 1
        for _ in range(2):
            with pytest.raises(kind, match=message):
                next(iterator)


def endless(conn: PeerConnection) -> None:
    conn.expect()
    conn.send(b"".join(map(line_of, (STREAM, {"stream": 1}, {"stream": 2}))))
    conn.until_closed()


@pytest.mark.parametrize("how", ["close", "with", "forget"])
def test_direct_stream_closed_early_cancels_the_call(shell: Shell, tls: ssl.SSLContext, how: str) -> None:
    with Peer(endless, tls=tls) as peer:
        iterator = shell.server(peer).p()
        assert next(iterator) == 1
        match how:
            case "close":
                iterator.close()
            case "with":
                with iterator:
                    assert next(iterator) == 2
            case "forget":
                del iterator
        assert peer.connections[0].closed.wait(30)


def test_direct_stream_returns_records_before_a_break(shell: Shell, tls: ssl.SSLContext) -> None:
    """Many records arrive together, then the connection ends without an end of TLS, before the reader has read them."""
    count = 20_000

    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.send(line_of(STREAM), b"".join(line_of({"stream": number}) for number in range(count)))

    with Peer(script, tls=tls) as peer:
        iterator = shell.server(peer).p()
        assert [next(iterator) for _ in range(count)] == list(range(count))
        with pytest.raises(harp.CommunicationError):
            next(iterator)


# Certificates.


def other_authority(directory: Path) -> Path:
    path = directory / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(path))
    return path


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST"])
def test_tls_valid_certificate_is_accepted(shell: Shell, tls: ssl.SSLContext, files: Certificates, host: str) -> None:
    with Peer(answering(PLAIN, {"result": 1}), tls=tls) as peer:
        assert shell.server(peer, host=host, ca_file=files.ca_file).p() == 1
        assert str(files.ca_file) in repr(shell.server(peer, ca_file=str(files.ca_file)))


def test_tls_certificate_of_other_authority_is_refused(shell: Shell, tls: ssl.SSLContext, tmp_path: Path) -> None:
    with Peer(answering(), tls=tls) as peer:
        with pytest.raises(
            harp.CommunicationError, match=r"not accepted: .* \(ca_file must contain the authority"
        ) as caught:
            shell.server(peer, ca_file=str(other_authority(tmp_path))).p()
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
    assert peer.requests == []


@pytest.mark.parametrize(("names", "host"), [(("example.net",), "localhost"), (("localhost",), "127.0.0.1")])
def test_tls_certificate_for_other_name_is_refused(
    shell: Shell, tmp_path: Path, names: tuple[str, ...], host: str
) -> None:
    files = server_files(tmp_path, names)
    with Peer(answering(), answering(PLAIN, {"result": 1}), tls=server_context(files)) as peer:
        with pytest.raises(harp.CommunicationError, match=r"not accepted: .* \(call the host by a name that"):
            shell.server(peer, host=host, ca_file=files.ca_file).p()
        assert shell.server(peer, host=host, ca_file=None).p() == 1
    assert len(peer.requests) == 1


def test_tls_without_ca_file_accepts_any_certificate(shell: Shell, tmp_path: Path) -> None:
    selfmade = server_files(tmp_path, ("nobody.invalid",))
    with Peer(answering(PLAIN, {"result": 1}), tls=server_context(selfmade)) as peer:
        assert shell.server(peer).p() == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "none.pem", "none.pem.*No such file"),
        (lambda path: path, "ca_file"),
        (lambda path: (path / "empty.pem").write_text("") or path / "empty.pem", "empty.pem.*no certificate"),
        (lambda path: (path / "broken.pem").write_text("x") and path / "broken.pem", "broken.pem.*no certificate"),
        (lambda path: 5, "ca_file 5"),
    ],
)
def test_tls_invalid_ca_file_is_named_in_error(shell: Shell, tmp_path: Path, make: Any, message: str) -> None:
    with Peer() as peer:
        with pytest.raises(harp.HarpException, match=message):
            shell.server(peer, ca_file=make(tmp_path)).p()


def test_tls_1_2_is_accepted(shell: Shell, files: Certificates) -> None:
    context = server_context(files)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with Peer(answering(PLAIN, {"result": 1}), tls=context) as peer:
        assert shell.server(peer, ca_file=files.ca_file).p() == 1


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1:DeprecationWarning")
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_tls_legacy_version_needs_tls_minimum(shell: Shell, files: Certificates, version: str) -> None:
    context = server_context(files)
    context.set_ciphers("ALL:@SECLEVEL=0")
    legacy = ssl.TLSVersion.TLSv1 if version == "1.0" else ssl.TLSVersion.TLSv1_1
    context.minimum_version = context.maximum_version = legacy
    with Peer(silent, answering(PLAIN, {"result": 1}), tls=context) as peer:
        with pytest.raises(harp.CommunicationError, match=r"TLS handshake: .*\(tls_minimum allows older versions\)"):
            shell.server(peer).p()
        assert shell.server(peer, ca_file=files.ca_file, tls_minimum=version).p() == 1
    assert peer.connections[0].handshake_error is not None


def test_tls_unknown_minimum_is_refused(shell: Shell) -> None:
    with Peer() as peer, pytest.raises(harp.HarpException, match=r"tls_minimum: expected one of 1\.0, .*, got '1'"):
        shell.server(peer, tls_minimum="1").p()


def test_tls_verify_hostname_accepts_other_names_only(shell: Shell, tmp_path: Path) -> None:
    files = server_files(tmp_path, ("other.invalid",))
    with Peer(silent, answering(PLAIN, {"result": 1}), silent, tls=server_context(files)) as peer:
        with pytest.raises(harp.CommunicationError, match="or use verify_hostname"):
            shell.server(peer, ca_file=files.ca_file).p()
        assert shell.server(peer, ca_file=files.ca_file, verify_hostname=False).p() == 1
        with pytest.raises(harp.CommunicationError, match="ca_file must contain the authority"):
            shell.server(peer, ca_file=other_authority(tmp_path), verify_hostname=False).p()


def test_json_ssl_connection_sends_and_receives(tls: ssl.SSLContext, files: Certificates) -> None:
    with Peer(answering({"a": 1}), answering({"b": 2}), tls=tls) as peer:
        with harp.JSONSSLConnection(peer.host, peer.port, files.ca_file) as conn:
            assert repr(conn) == f"<JSONSSLConnection {peer.host}:{peer.port} connected>"
            conn.send([1])
            assert conn.receive() == {"a": 1}
            conn.close()
            for use in (conn.receive, lambda: conn.send(1)):
                with pytest.raises(harp.CommunicationError, match="not connected"):
                    use()
            conn.connect()
            conn.send([2])
            assert conn.receive() == {"b": 2}
        assert repr(conn) == f"<JSONSSLConnection {peer.host}:{peer.port} closed>"
