"""Certificates of hosts: real handshakes, and the comparison of names."""

from __future__ import annotations

import os
import ssl
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import trustme

from harp_daemon.der import certificate_names
from harp_daemon.settings import ConfigError
from harp_daemon.timer_wheel import TimerWheel
from harpcaller.config import Config
from harpcaller.hosts.connecting import open_connection, to_failed
from harpcaller.hosts.registry import Host
from harpcaller.hosts.resolving import Resolver
from harpcaller.hosts.tls import CertificateRefused, HostTLS, names_host, server_name
from support.certificates import Certificates, authority, give_unreadable_name, server_files
from support.deadline import eventually
from support.peers import Peer, server_context


@dataclass(frozen=True)
class Issued:
    """Return the files of a server certificate and of its authority."""

    files: Certificates

    @property
    def pem(self) -> bytes:
        return self.files.certfile.read_bytes()


def issue(directory: Path, *names: str, ca: trustme.CA | None = None, **validity: Any) -> Issued:
    directory.mkdir()
    ca = ca or authority()
    leaf = ca.issue_cert(*names, **validity)
    files = Certificates(directory / "ca.pem", directory / "server.pem", directory / "server.key")
    ca.cert_pem.write_to_path(str(files.ca_file))
    leaf.cert_chain_pems[0].write_to_path(str(files.certfile))
    leaf.private_key_pem.write_to_path(str(files.keyfile))
    return Issued(files)


@contextmanager
def host(issued: Issued, hostname: str = "web01", address: str = "127.0.0.1") -> Iterator[Host]:
    with Peer(always=lambda conn: conn.until_closed(), tls=server_context(issued.files)) as peer:
        yield Host(hostname, address, peer.port, "u", "topsecret")


async def outcome(tls: HostTLS, host: Host) -> str | None:
    """Return None if the host's certificate is accepted, otherwise the message of the job's error."""
    try:
        conn = await open_connection(host, tls, Config(), TimerWheel(), Resolver())
    except (CertificateRefused, OSError) as error:
        end = to_failed(error, host, "connecting")
        assert end.type == ("certificate_error" if isinstance(error, CertificateRefused) else "network_error")
        return end.message
    conn.abort()
    return None


async def test_host_tls_without_files_refuses_unless_told(tmp_path: Path) -> None:
    with host(issue(tmp_path / "a", "elsewhere", ca=trustme.CA())) as found:
        for verify, error in ((True, "nothing verifies it; set ca_file, "), (False, None)):
            tls = HostTLS(Config(verify=verify))
            message = await outcome(tls, found)
            assert message is None if error is None else error in str(message)
            assert len(tls.warnings) == 1
            assert "ca_file" in tls.warnings[0]


async def test_certificate_sha256_accepts_one_certificate_only(tmp_path: Path) -> None:
    ca = authority()
    pinned, other = issue(tmp_path / "a", "elsewhere", ca=trustme.CA()), issue(tmp_path / "b", "web01", ca=ca)
    known = tmp_path / "known.pem"
    known.write_bytes(other.pem)
    digest = sha256(ssl.PEM_cert_to_DER_cert(pinned.pem.decode())).hexdigest()
    for config in (Config(), Config(ca_file=other.files.ca_file), Config(known_certs_file=known)):
        with host(pinned) as found:
            assert await outcome(HostTLS(config), found._replace(certificate_sha256=digest)) is None
        with host(other) as found:
            message = await outcome(HostTLS(config), found._replace(certificate_sha256=digest))
            assert f"certificate_sha256 of the host is {digest}" in str(message)


async def test_certificate_with_an_unreadable_name_is_refused(tmp_path: Path) -> None:
    files = server_files(tmp_path)
    give_unreadable_name(tmp_path, files.certfile)
    with host(Issued(files)) as found:
        assert "it has a name that is not valid text" in str(
            await outcome(HostTLS(Config(ca_file=files.ca_file)), found)
        )


@pytest.mark.parametrize(
    ("names", "address", "is_accepted"),
    [
        (("web01",), "127.0.0.1", True),
        (("web01.example.net",), "127.0.0.1", True),
        (("127.0.0.1",), "127.0.0.1", True),
        (("web01", "web02"), "127.0.0.1", True),
        (("anything",), "127.0.0.1", True),
        (("*.example.net",), "localhost", True),
        (("web02",), "127.0.0.1", False),
        (("WEB02.example.net",), "127.0.0.1", False),
        (("10.0.0.2",), "127.0.0.1", False),
        (("web02", "10.0.0.2"), "localhost", False),
        (("*.example.org",), "localhost", False),
        (("*.example.org", "web01"), "localhost", True),
        (("2001:db8::9",), "localhost", False),
    ],
)
async def test_known_certificate_of_another_host_is_refused(
    tmp_path: Path, names: tuple[str, ...], address: str, is_accepted: bool
) -> None:
    """The certificate of a known host, presented at another one: the password is not sent."""
    issued = issue(tmp_path / "a", *names)
    known = tmp_path / "known.pem"
    known.write_bytes(issued.pem)
    with host(issued, address=address) as found:
        hosts = [found, Host("web02", "10.0.0.2", 4306, "u", "p"), Host("10.0.0.7", "10.0.0.7", 4306, "u", "p")]
        hosts += [Host("db.example.org", "10.0.0.8", 4306, "u", "p"), Host("db2", "2001:DB8:0:0::9", 4306, "u", "p")]
        message = await outcome(HostTLS(Config(known_certs_file=known), lambda: hosts), found)
        assert message is None if is_accepted else "it is the certificate of host " in str(message)


def test_names_of_a_certificate_are_read_as_openssl_does(tmp_path: Path) -> None:
    issued = issue(tmp_path / "a", "Web01.example.net", "10.0.0.7", "::1", "*.example.org")
    der = ssl.PEM_cert_to_DER_cert(issued.pem.decode())
    names = certificate_names(der)
    assert names >= {"web01.example.net", "10.0.0.7", "::1", "*.example.org"}
    for end in range(0, len(der), 7):
        certificate_names(der[:end])  # an incomplete one raises nothing
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    file = tmp_path / "named.pem"
    subprocess.run([*command, "-subj", "/O=x/CN=Web02", "-keyout", "/dev/null", "-out", file], check=True)
    assert certificate_names(ssl.PEM_cert_to_DER_cert(file.read_text())) == {"web02"}


async def test_ca_file_requires_chain_and_name(tmp_path: Path) -> None:
    named = issue(tmp_path / "named", "web01")
    addressed = issue(tmp_path / "addressed", "127.0.0.1")
    other = issue(tmp_path / "other", "web02")
    foreign = issue(tmp_path / "foreign", "web01", ca=trustme.CA())
    tls = HostTLS(Config(ca_file=named.files.ca_file))
    assert tls.warnings == []
    for good in (named, addressed):
        with host(good) as found:
            assert await outcome(tls, found) is None
    with host(other) as found:
        message = await outcome(tls, found)
        assert message is not None
        for part in ("web01", "127.0.0.1", "'web02'", "subjectAltName", "verify_hostname = false"):
            assert part in message
        assert await outcome(HostTLS(Config(ca_file=named.files.ca_file, verify_hostname=False)), found) is None
    with host(foreign) as found:
        for verify in (True, False):
            message = await outcome(HostTLS(Config(ca_file=named.files.ca_file, verify_hostname=verify)), found)
            assert message is not None
            assert str(named.files.ca_file) in message
            assert "self-signed" in message or "unable to get" in message


async def test_certificate_invalid_now_is_reported(tmp_path: Path) -> None:
    day, now = timedelta(days=1), datetime.now()
    expired = issue(tmp_path / "expired", "web01", not_before=now - 9 * day, not_after=now - 2 * day)
    future = issue(tmp_path / "future", "web01", not_before=now + 2 * day, not_after=now + 9 * day)
    for issued, reason in ((expired, "it has expired, "), (future, "it is not valid yet; compare the clocks")):
        with host(issued) as found:
            message = await outcome(HostTLS(Config(ca_file=issued.files.ca_file)), found)
        assert message is not None
        assert f"certificate refused: {reason}" in message


async def test_known_certs_are_compared_byte_for_byte(tmp_path: Path) -> None:
    ca = trustme.CA()
    known, other = issue(tmp_path / "known", "anything", ca=ca), issue(tmp_path / "other", "web01", ca=ca)
    file = tmp_path / "known.pem"
    # The authority's certificate in the file does not make its other certificates known.
    file.write_bytes(b"a comment\n" + known.pem + known.files.ca_file.read_bytes())
    tls = HostTLS(Config(known_certs_file=file))
    with host(known) as found:
        assert await outcome(tls, found) is None
    with host(other) as found:
        message = await outcome(tls, found)
        assert message is not None
        assert str(file) in message


async def test_host_tls_with_both_files_accepts_either(tmp_path: Path) -> None:
    signed = issue(tmp_path / "signed", "web01")
    misnamed = issue(tmp_path / "misnamed", "web02")
    known = issue(tmp_path / "known", "web03", ca=trustme.CA())
    neither = issue(tmp_path / "neither", "web01", ca=trustme.CA())
    file = tmp_path / "known.pem"
    file.write_bytes(known.pem + misnamed.pem)
    tls = HostTLS(Config(ca_file=signed.files.ca_file, known_certs_file=file))
    for good in (signed, misnamed, known):
        with host(good) as found:
            assert await outcome(tls, found) is None
    with host(neither) as found:
        message = await outcome(tls, found)
        assert message is not None
        assert str(file) in message
        assert str(signed.files.ca_file) in message


async def test_known_certs_file_is_read_after_a_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = issue(tmp_path / "first", "a"), issue(tmp_path / "second", "b")
    file = tmp_path / "known.pem"
    file.write_bytes(first.pem)
    tls = HostTLS(Config(known_certs_file=file))

    with host(second) as found:

        async def is_refused() -> bool:
            return await outcome(tls, found) is not None

        check: Callable[[], bool | Awaitable[bool]] = is_refused
        assert await is_refused()
        file.write_bytes(first.pem + second.pem)
        assert not await is_refused()  # at once
        status = file.stat()
        file.write_bytes(first.pem + b" " * len(second.pem))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        await eventually(check, what="the removed certificate refused")  # same size, time and inode
        version = tls.version
        file.write_bytes(second.pem)
        assert not await is_refused()
        await eventually(lambda: tls.version != version, what="the new contents")
        file.write_bytes(b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n")
        await eventually(lambda: tls.version and len(errors(caplog)) == 1, what="the error")
        assert not await is_refused()  # an invalid file changes nothing
        file.unlink()
        await eventually(lambda: tls.version and len(errors(caplog)) == 2, what="the error")
        assert not await is_refused()


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


async def test_known_certs_file_may_be_created_later(tmp_path: Path) -> None:
    issued = issue(tmp_path / "a", "web01")
    file = tmp_path / "known.pem"
    tls = HostTLS(Config(known_certs_file=file))
    assert tls.warnings == [f"known_certs_file {file} does not exist; it accepts no certificate"]
    with host(issued) as found:
        message = await outcome(tls, found)
        assert message is not None
        assert f"{file}, which does not exist" in message
        assert await outcome(HostTLS(Config(known_certs_file=file, ca_file=issued.files.ca_file)), found) is None
        file.write_bytes(issued.pem)
        assert await outcome(tls, found) is None


async def test_ca_file_is_read_after_a_change(tmp_path: Path) -> None:
    issued, other = issue(tmp_path / "a", "web01"), issue(tmp_path / "b", "web01", ca=trustme.CA())
    file = tmp_path / "ca.pem"
    file.write_bytes(issued.files.ca_file.read_bytes())
    tls = HostTLS(Config(ca_file=file))
    version = tls.version
    with host(issued) as found, host(other) as replaced:
        assert await outcome(tls, found) is None
        file.write_bytes(b"")  # in the middle of a rewrite
        assert (await outcome(tls, found), tls.version) == (None, version)
        file.write_bytes(other.files.ca_file.read_bytes())
        await eventually(lambda: tls.version != version, what="the new authority")
        assert await outcome(tls, found) is not None
        assert await outcome(tls, replaced) is None


async def test_credentials_are_sent_after_the_certificate_check(tmp_path: Path) -> None:
    issued = issue(tmp_path / "a", "web02")
    with Peer(always=lambda conn: conn.until_closed(), tls=server_context(issued.files)) as peer:
        found = Host("web01", "127.0.0.1", peer.port, "u", "topsecret")
        assert await outcome(HostTLS(Config(ca_file=issued.files.ca_file)), found) is not None
        assert peer.requests == []


@pytest.mark.parametrize("key", ["ca_file", "known_certs_file"])
def test_host_tls_invalid_file_is_config_error(tmp_path: Path, key: str) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_bytes(b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n")
    for file in (tmp_path / "none.pem", broken)[key == "known_certs_file" :]:
        options: dict[str, Any] = {"file": tmp_path / "h.toml", key: file}
        with pytest.raises(ConfigError) as caught:
            HostTLS(Config(**options))
        assert str(caught.value).startswith(f"{tmp_path / 'h.toml'}: {key}: expected ")
        assert str(file) in str(caught.value)


async def test_tls_minimum_is_enforced(tmp_path: Path) -> None:
    issued = issue(tmp_path / "a", "web01")
    context = server_context(issued.files)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with Peer(always=lambda conn: conn.until_closed(), tls=context) as peer:
        found = Host("web01", "127.0.0.1", peer.port, "u", "p")
        assert await outcome(HostTLS(Config(verify=False)), found) is None
        message = await outcome(HostTLS(Config(tls_minimum="1.3")), found)
        assert message is not None
        assert "tls_minimum" in message
    assert len(HostTLS(Config(tls_minimum="1.0")).warnings) == 2


def certificate(*names: str) -> dict[str, Any]:
    """Return a certificate in the form of `ssl`."""
    kinds = tuple(("IP Address" if name[0].isdigit() or ":" in name else "DNS", name) for name in names)
    return {"subject": ((("commonName", "web01"),),), "subjectAltName": kinds}


@pytest.mark.parametrize(
    ("names", "hostname", "address", "accepted"),
    [
        (("web01",), "web01", "10.0.0.1", True),
        (("10.0.0.1",), "web01", "10.0.0.1", True),
        (("web01.example.net",), "web01", "web01.example.net", True),
        (("WEB01.Example.net.",), "web01.EXAMPLE.net", "10.0.0.1", True),
        (("a", "b", "web01"), "web01", "10.0.0.1", True),
        (("2001:DB8:0:0:0:0:0:1\n",), "web01", "2001:db8::1", True),
        (("*.example.net",), "web01.example.net", "10.0.0.1", True),
        (("b\u00fccher.example".encode("idna").decode(),), "b\u00fccher.example", "10.0.0.1", True),
        ((), "web01", "10.0.0.1", False),  # the common name is not compared
        (("web02",), "web01", "10.0.0.1", False),
        (("10.0.0.2",), "web01", "10.0.0.1", False),
        (("*.example.net",), "example.net", "10.0.0.1", False),
        (("*.example.net",), "a.web01.example.net", "10.0.0.1", False),
        (("*.net",), "example.net", "10.0.0.1", False),
        (("*",), "web01", "10.0.0.1", False),
        (("w*.example.net",), "web01.example.net", "10.0.0.1", False),
        (("web01.*.net",), "web01.example.net", "10.0.0.1", False),
        (("*.0.0.1",), "web01", "10.0.0.1", False),
        (("web01.example.net",), "web01", "10.0.0.1", False),
        (("web01",), "\ud800", "a" * 70 + "\u00fc", False),
    ],
)
def test_names_host_matches_subject_alternative_names(
    names: tuple[str, ...], hostname: str, address: str, accepted: bool
) -> None:
    assert names_host(certificate(*names), Host(hostname, address, 1, "u", "p")) is accepted


def test_names_host_address_in_dns_entry_is_ignored() -> None:
    entry = {"subjectAltName": (("DNS", "10.0.0.1"), ("DNS", "*.0.0.1"))}
    assert not names_host(entry, Host("10.0.0.1", "10.0.0.1", 1, "u", "p"))


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("web01.example.net", "web01.example.net"),
        ("WEB_01", "web_01"),
        ("example.net.", "example.net"),
        ("b\u00fccher.example", "xn--bcher-kva.example"),
        ("10.0.0.1", ""),
        ("::1", ""),
        ("fe80::1%eth0", ""),
        (".example", ""),
        ("a b", ""),
        ("a" * 64 + ".b", ""),
        ("\ud800", ""),
    ],
)
def test_server_name_is_empty_for_addresses(address: str, name: str) -> None:
    assert server_name(address) == name
