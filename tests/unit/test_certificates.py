"""`harp-cert`: authorities and certificates that OpenSSL accepts as strictly as Python 3.13 and later check them."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from harp_daemon.certificates import main


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    directory = tmp_path / "pki"
    assert main(["ca", str(directory)]) == 0
    return directory


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def shake_hands(pki: Path, certificate: str, name: str, client: str | None = None) -> None:
    """Connect to a server with a certificate, checking it strictly; raise what the client's side raises."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pki / f"{certificate}.pem", pki / f"{certificate}.key")
    trusting = ssl.create_default_context(cafile=str(pki / "ca.pem"))
    trusting.verify_flags |= ssl.VERIFY_X509_STRICT
    if client is not None:
        server.load_verify_locations(pki / "ca.pem")
        server.verify_mode = ssl.CERT_REQUIRED
        trusting.load_cert_chain(pki / f"{client}.pem", pki / f"{client}.key")
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            with server.wrap_socket(theirs, server_side=True) as connection:
                connection.sendall(connection.recv(1))
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with trusting.wrap_socket(ours, server_hostname=name) as connection:
            connection.sendall(b"x")
            assert connection.recv(1) == b"x"
    finally:
        ours.close()
        thread.join()


def test_host_certificate_each_name_and_address_is_accepted(pki: Path) -> None:
    assert (
        main(["host", str(pki), "web01", "web01.example.net", "*.pool.example.net", "192.0.2.11", "2001:db8::1"]) == 0
    )
    for name in ("web01", "web01.example.net", "a.pool.example.net", "192.0.2.11", "2001:db8::1"):
        shake_hands(pki, "web01", name)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake_hands(pki, "web01", "web02")


def test_client_certificate_is_accepted_as_client_only(pki: Path) -> None:
    assert main(["host", str(pki), "web01"]) == 0
    assert main(["client", str(pki), "shop"]) == 0
    shake_hands(pki, "web01", "web01", client="shop")
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        shake_hands(pki, "shop", "shop")
    with pytest.raises(OSError):  # an alert, or the end of the connection
        shake_hands(pki, "web01", "web01", client="web01")


def test_authority_may_sign_certificates_but_no_authorities(pki: Path) -> None:
    found = load(pki / "ca.pem")
    assert found.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    usage = found.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert not usage.value.digital_signature


@pytest.mark.parametrize(
    ("arguments", "files"),
    [(["ca"], ["ca.pem", "ca.key"]), (["host", "web01"], ["web01.pem", "web01.key"])],
    ids=["authority", "host"],
)
@pytest.mark.parametrize("kept", [0, 1])
def test_existing_file_is_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], files: list[str], kept: int
) -> None:
    command, *names = arguments
    assert main(["ca", str(tmp_path)]) == 0
    assert command == "ca" or main([command, str(tmp_path), *names]) == 0
    (tmp_path / files[1 - kept]).unlink()
    before = (tmp_path / files[kept]).read_bytes()
    everything = sorted(path.name for path in tmp_path.iterdir())
    capsys.readouterr()
    assert main([command, str(tmp_path), *names]) == 1
    assert f"{files[kept]}: File exists" in capsys.readouterr().err
    assert (tmp_path / files[kept]).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == everything


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_keys_are_for_their_owner_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    script = (
        f"import os, sys; os.umask({mask}); from harp_daemon.certificates import main; sys.exit(main(sys.argv[1:]))"
    )
    for arguments in (["ca", tmp_path / "pki"], ["host", tmp_path / "pki", "web01"]):
        subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True)
    assert stat.S_IMODE((tmp_path / "pki").stat().st_mode) == 0o700
    for name in ("ca.key", "web01.key"):
        assert stat.S_IMODE((tmp_path / "pki" / name).stat().st_mode) == 0o600


def test_renew_keeps_key_names_and_use(pki: Path) -> None:
    assert main(["host", str(pki), "web01", "192.0.2.11", "--days", "3"]) == 0
    old, key = load(pki / "web01.pem"), (pki / "web01.key").read_bytes()
    (pki / ".web01.pem.new").write_text("left by a renewal that was killed")
    assert main(["renew", str(pki), "web01", "--days", "30"]) == 0
    new = load(pki / "web01.pem")
    assert (pki / "web01.key").read_bytes() == key
    assert new.public_key() == old.public_key()
    assert new.serial_number != old.serial_number
    assert new.not_valid_after_utc - old.not_valid_after_utc >= datetime.timedelta(days=26)
    names = new.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == ["web01", ipaddress.ip_address("192.0.2.11")]
    usage = new.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    shake_hands(pki, "web01", "192.0.2.11")
    assert sorted(path.name for path in pki.iterdir()) == ["ca.key", "ca.pem", "web01.key", "web01.pem"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["host", "PKI", "web 01"], "invalid name 'web 01': expected a DNS name in ASCII"),
        (["host", "PKI", "müller.example"], "xn--"),
        (["host", "PKI", "../web01"], "invalid name '../web01'"),
        (["host", "PKI", "web01", "192.0.2.300/"], "invalid name '192.0.2.300/'"),
        (["host", "PKI", "web01", "192.0.2.300"], "invalid name '192.0.2.300'"),
        (["host", "PKI", ""], "invalid name ''"),
        (["host", "PKI", "web01\n"], "invalid name 'web01\\n'"),
        (["host", "PKI", "a" * 64], "invalid name"),
        (["host", "PKI", ".".join(["a" * 40] * 3)], "1 to 64 characters"),
        (["client", "PKI", "a/b"], "invalid name 'a/b'"),
        (["host", "PKI", "ca"], "ca.key: File exists"),
        (["ca", "PKI"], "ca.key: File exists; choose another directory"),
        (["host", "PKI", "web01", "--days", "0"], "invalid number of days 0: expected at least 1"),
        (["host", "PKI", "web01", "--days", "99999999"], "year 9999"),
        (["host", "PKI", "web01", "--days", "4000"], "the authority is valid until"),
        (["renew", "PKI", "web02"], "web02.pem: No such file or directory"),
        (["host", "PKI/none", "web01"], "none/ca.pem: No such file or directory; `harp-cert ca` makes"),
        (["show", "PKI/ca.key"], "it has no certificate in PEM format"),
        (["ca", "PKI/ca.pem/x"], "cannot create directory"),
    ],
)
def test_invalid_argument_is_refused_without_a_file(
    pki: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert main([argument.replace("PKI", str(pki)) for argument in arguments]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("harp-cert: ")
    assert reason in printed
    assert sorted(path.name for path in pki.iterdir()) == ["ca.key", "ca.pem"]


def test_empty_directory_is_not_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["ca", ""])
    assert "expected a directory, got an empty text" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_foreign_authority_is_refused(pki: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["host", str(pki), "web01"]) == 0
    other = tmp_path / "other"
    assert main(["ca", str(other)]) == 0
    (other / "web01.pem").write_bytes((pki / "web01.pem").read_bytes())
    assert main(["renew", str(other), "web01"]) == 1
    assert "it was not issued by" in capsys.readouterr().err
    (other / "ca.key").write_bytes((pki / "ca.key").read_bytes())
    assert main(["host", str(other), "web02"]) == 1
    assert "ca.key does not belong to" in capsys.readouterr().err
    (other / "ca.key").write_text("no key")
    assert main(["host", str(other), "web02"]) == 1
    assert "it has no private key in PEM format" in capsys.readouterr().err


def test_renew_of_an_authority_is_refused(pki: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would become a certificate that may not sign: that of every host would not be accepted any more."""
    before = (pki / "ca.pem").read_bytes()
    assert main(["renew", str(pki), "ca"]) == 1
    assert "ca.pem: it is an authority; make a new one in another directory" in capsys.readouterr().err
    assert (pki / "ca.pem").read_bytes() == before


def test_authority_that_cannot_sign_is_refused(pki: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An operator may bring an authority of another program, with a key of any kind."""
    files = ["-keyout", str(pki / "ca.key"), "-out", str(pki / "ca.pem")]
    make = ["openssl", "req", "-x509", "-newkey", "ed25519", "-noenc", "-subj", "/CN=other", "-days", "900", *files]
    subprocess.run(make, check=True, capture_output=True)
    assert main(["host", str(pki), "web01"]) == 1
    assert "ca.key: expected a key for RSA or ECDSA" in capsys.readouterr().err


def test_write_that_fails_leaves_no_file(pki: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pki / "web01.pem").symlink_to("/dev/full")
    assert main(["host", str(pki), "web01"]) == 1
    assert "web01.pem: File exists" in capsys.readouterr().err
    assert not (pki / "web01.key").exists()


def test_show_prints_use_names_and_days(pki: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["host", str(pki), "web01", "192.0.2.11", "--days", "90"]) == 0
    assert main(["client", str(pki), "shop"]) == 0
    capsys.readouterr()
    assert main(["show", *(str(pki / f"{name}.pem") for name in ("ca", "web01", "shop"))]) == 0
    ca, web01, shop = capsys.readouterr().out.splitlines()
    assert "ca.pem: authority HARP, valid until " in ca
    assert "web01.pem: host web01 192.0.2.11, valid until " in web01
    assert web01.endswith(("(90 days left)", "(89 days left)"))
    assert "shop.pem: client shop, valid until " in shop
