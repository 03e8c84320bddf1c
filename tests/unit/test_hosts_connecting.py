"""The end of a job after each kind of connection error."""

from __future__ import annotations

import errno
import json
import socket
import ssl

import pytest

from harpcaller.hosts.connecting import to_failed
from harpcaller.hosts.registry import Host
from harpcaller.hosts.tls import CertificateRefused

WEB01 = Host("web01", "10.0.0.1", 4306, "u", "p")


def tls_error(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(ssl.SSL_ERROR_SSL, "failed")  # its errno is 1, the number of EPERM
    error.reason = reason
    return error


@pytest.mark.parametrize(
    ("error", "type", "name"),
    [
        (OSError(errno.ECONNREFUSED, "refused"), "network_error", "ECONNREFUSED"),
        (OSError(errno.EHOSTUNREACH, "unreachable"), "network_error", "EHOSTUNREACH"),
        (OSError(errno.EMFILE, "too many"), "os_error", "EMFILE"),
        (OSError(errno.EADDRNOTAVAIL, "not available"), "os_error", "EADDRNOTAVAIL"),
        (TimeoutError(), "network_error", "ETIMEDOUT"),
        (ConnectionResetError(), "network_error", "ECONNRESET"),
        (socket.gaierror(socket.EAI_NONAME, "unknown"), "network_error", "EAI_NONAME"),
        (tls_error("TLSV1_ALERT_INTERNAL_ERROR"), "network_error", None),
        (tls_error("WRONG_VERSION_NUMBER"), "protocol_error", None),
        (UnicodeError("label too long"), "network_error", None),
        (CertificateRefused("unknown"), "certificate_error", None),
    ],
)
def test_to_failed_maps_errors_to_ends(error: Exception, type: str, name: str | None) -> None:
    end = to_failed(error, WEB01, "connecting")
    assert (end.type, end.data and json.loads(end.data)) == (type, name and {"errno": name})
    assert end.message.startswith("host web01 (10.0.0.1, port 4306): ")
