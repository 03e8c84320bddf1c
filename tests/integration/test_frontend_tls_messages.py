"""Messages of TLS without data, from a client that has not authenticated: they do not delay the calls of others."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest

from support.daemonlog import DEADLINE
from support.harpd import Harpd
from support.key_updates import key_updates
from support.procedures_file import PROCEDURES


@pytest.mark.parametrize("requested", [False, True])
def test_tls_messages_without_data_do_not_delay_calls(tmp_path: Path, requested: bool) -> None:
    """60,000 of them delayed each call of others by 1 s."""
    with (
        Harpd(tmp_path, PROCEDURES) as harpd,
        socket.create_connection((harpd.host, harpd.port), DEADLINE) as hostile,
    ):
        records = key_updates(hostile, harpd.ca_file, tmp_path / "keys", 60_000, requested)
        hostile.settimeout(0.1)
        with suppress(OSError):
            hostile.sendall(records)  # as much as the kernel takes
        delays: list[float] = []
        end = time.monotonic() + DEADLINE
        while not harpd.events("TLS peer sends no data") or len(delays) < 5:
            begin = time.monotonic()
            assert begin < end
            assert harpd.call("echo", 1)[-1] == {"result": [1]}
            delays.append(time.monotonic() - begin)
        [event] = harpd.events("TLS peer sends no data")
    assert event["bytes"] < 100_000


def test_tls_long_requests_and_results_pass(tmp_path: Path) -> None:
    """Records that arrive in parts, and a client that is not read for a while, do not count."""
    with Harpd(tmp_path, PROCEDURES) as harpd:
        text = "x" * 5_000_000
        assert harpd.call("echo", text)[-1] == {"result": [text]}
        assert not harpd.events("TLS peer sends no data")
