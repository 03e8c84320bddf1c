"""Certificates that have expired, or expire soon: in the check and in the log of both daemons."""

from __future__ import annotations

import asyncio
import logging
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from harp_daemon.expiry import log_expiry, log_expiry_regularly, read_validities
from support.harpcallerd import Harpcallerd
from support.harpd import Harpd
from support.procedures_file import PROCEDURES

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)


def certificate(begins: datetime, ends: datetime, keyfile: Path | None = None) -> str:
    """Return a self-signed certificate, PEM; write its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), begins, ends)
    if keyfile is not None:
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        keyfile.write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


@pytest.mark.parametrize(
    ("begins", "ends"),
    [
        (NOW, NOW + DAY),
        (datetime(1950, 1, 1, tzinfo=UTC), datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)),
        (datetime(1999, 12, 31, tzinfo=UTC), datetime(2050, 1, 1, tzinfo=UTC)),
        (datetime(2051, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)),
    ],
)
def test_validities_are_those_of_the_certificates(tmp_path: Path, begins: datetime, ends: datetime) -> None:
    file = tmp_path / "chain.pem"
    texts = [certificate(begins, ends), "a comment\n", certificate(NOW, NOW + 2 * DAY)]
    file.write_text("".join(texts))
    found = [(each.file, each.number, each.begins, each.ends) for each in read_validities(file)]
    assert found == [(file, 1, begins, ends), (file, 2, NOW, NOW + 2 * DAY)]


def test_certificate_that_cannot_be_read_has_no_validity(tmp_path: Path) -> None:
    file = tmp_path / "broken.pem"
    file.write_text("-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n" + certificate(NOW, NOW + DAY))
    assert [each.number for each in read_validities(file)] == [2]


async def test_expiry_is_logged_again_and_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "all.pem"
    ends = [NOW - DAY, NOW + 29 * DAY, NOW + 31 * DAY]
    file.write_text("".join(certificate(NOW - 2 * DAY, end) for end in ends) + certificate(NOW + DAY, NOW + 90 * DAY))
    with caplog.at_level(logging.WARNING):
        log_expiry(read_validities(file))
        found = [(record.getMessage(), vars(record)["certificate"]) for record in caplog.records]
        assert found == [
            ("certificate has expired", 1),
            ("certificate expires soon", 2),
            ("certificate is not valid yet", 4),
        ]
        assert vars(caplog.records[0])["ended"] == f"{NOW - DAY:%Y-%m-%d}"
        assert vars(caplog.records[1])["ends"] == f"{NOW + 29 * DAY:%Y-%m-%d}"
        assert {vars(record)["file"] for record in caplog.records} == {str(file)}
        reporting = asyncio.create_task(log_expiry_regularly(lambda: read_validities(file), every=0.01))
        while len(caplog.records) < 9:
            await asyncio.sleep(0.01)
        reporting.cancel()
        await asyncio.wait([reporting])


def run_test(command: list[str]) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == ("config OK\n" if done.returncode == 0 else "")
    return done.returncode, done.stderr


def test_harpd_with_expired_certificate_fails_the_test_and_warns(tmp_path: Path) -> None:
    harpd = Harpd(tmp_path / "harpd", PROCEDURES)
    test = harpd.command("--test")
    harpd.certfile.write_text(certificate(NOW - DAY, NOW + 20 * DAY, harpd.keyfile))
    status, errors = run_test(test)
    soon = f"{harpd.certfile}: certificate 1 expires on {NOW + 20 * DAY:%Y-%m-%d}; replace it"
    assert (status, errors) == (0, f"harpd: warning: {soon}\n")
    with harpd:
        harpd.wait_event("certificate expires soon", file=str(harpd.certfile), ends=f"{NOW + 20 * DAY:%Y-%m-%d}")
        harpd.certfile.write_text(certificate(NOW - 2 * DAY, NOW - DAY, harpd.keyfile))
        assert harpd.reload()["event"] == "reloaded"
        harpd.wait_event("certificate has expired", file=str(harpd.certfile), level="warning")
    status, errors = run_test(test)
    expired = f"{harpd.certfile}: certificate 1 has expired on {NOW - DAY:%Y-%m-%d}; replace it"
    assert (status, errors) == (1, f"harpd: {harpd.config_file}: network.certfile: {expired}\n")
    harpd.certfile.write_text(certificate(NOW + DAY, NOW + 2 * DAY, harpd.keyfile))
    assert "is not valid before" in run_test(test)[1]


def test_dispatcher_with_expired_authority_fails_check_and_warns(tmp_path: Path) -> None:
    authorities, hosts = tmp_path / "ca.pem", tmp_path / "hosts.pem"
    expired, valid = certificate(NOW - 2 * DAY, NOW - DAY), certificate(NOW - DAY, NOW + 90 * DAY)
    authorities.write_text(expired)
    hosts.write_text(expired)
    files = {"ca_file": str(authorities), "known_certs_file": str(hosts), "max_age": 720}
    dispatcher = Harpcallerd(tmp_path / "d", {"web01": 1}, settings=files)
    test = [*dispatcher.command()[:-1], "--test", f"--config={dispatcher.config_file}"]
    status, errors = run_test(test)
    reason = f"{authorities}: certificate 1 has expired on {NOW - DAY:%Y-%m-%d}; replace it"
    assert (status, errors) == (1, f"harpcallerd: {dispatcher.config_file}: ca_file: {reason}\n")
    with dispatcher:
        for file in (authorities, hosts):
            dispatcher.wait_event("certificate has expired", file=str(file), ended=f"{NOW - DAY:%Y-%m-%d}")
    authorities.write_text(expired + valid)
    assert run_test(test)[0] == 0
