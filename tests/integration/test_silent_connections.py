"""Silent connections, as many as there may be: they lock nobody out."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd
from support.harpd import Harpd
from support.procedures_file import PROCEDURES

UNKNOWN = "00000000-0000-4000-8000-000000000000"
#: Seconds within which a request must be answered: much less than an attacker's connections last.
AT_ONCE = 5.0


@contextmanager
def silent_connections(port: int, address: str, number: int = 40) -> Iterator[list[socket.socket]]:
    """Open connections that send nothing."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), DEADLINE, (address, 0)))
            for _ in range(number)
        ]


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def is_refused(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return b"too_many_connections" in connection.recv(1000, socket.MSG_PEEK)
    except BlockingIOError:
        return False


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.9"])
def test_harpd_full_of_silent_connections_serves_others(tmp_path: Path, address: str) -> None:
    """From the address of others, and from another one."""
    limits = {"max_connections": 40, "handshake_timeout": 60}
    with Harpd(tmp_path, PROCEDURES, {"limits": limits}) as harpd:
        for _ in range(2):  # the second time from a known peer
            with silent_connections(harpd.port, address) as silent:
                begin = time.monotonic()
                for number in range(3):
                    assert harpd.call("echo", number)[-1] == {"result": [number]}
                assert time.monotonic() - begin < AT_ONCE
                assert sum(map(is_open, silent)) >= 37


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.9"])
def test_dispatcher_full_of_silent_connections_serves_others(tmp_path: Path, address: str) -> None:
    settings = {"max_connections": 40, "idle_timeout": 60}
    with Harpcallerd(tmp_path, settings=settings) as dispatcher:
        for _ in range(2):
            with silent_connections(dispatcher.port, address) as silent:
                begin = time.monotonic()
                for _ in range(3):
                    assert dispatcher.ask(cancel=UNKNOWN) == [{"cancelled": False}]
                assert time.monotonic() - begin < AT_ONCE
                assert sum(map(is_open, silent)) >= 37


def test_harpd_limits_the_connections_of_one_address(tmp_path: Path) -> None:
    limits = {"max_connections_per_peer": 5, "handshake_timeout": 60}
    with Harpd(tmp_path, PROCEDURES, {"limits": limits}) as harpd, silent_connections(harpd.port, "127.0.0.9", 20):
        harpd.wait_event("too many connections of a peer", peer="127.0.0.9")
        assert harpd.call("echo", 1)[-1] == {"result": [1]}


def test_dispatcher_limits_the_connections_of_one_address(tmp_path: Path) -> None:
    settings = {"max_connections_per_peer": 5, "idle_timeout": 60}
    with (
        Harpcallerd(tmp_path, settings=settings) as dispatcher,
        silent_connections(dispatcher.port, "127.0.0.9", 20) as silent,
    ):
        wait_until(lambda: sum(map(is_refused, silent)) == 15, DEADLINE, "the refusals")
        assert dispatcher.ask(cancel=UNKNOWN) == [{"cancelled": False}]
        with silent_connections(dispatcher.port, "127.0.0.1", 20) as known:  # one that has sent a valid request
            wait_until(lambda: dispatcher.ask(cancel=UNKNOWN) == [{"cancelled": False}], DEADLINE, "a reply")
            assert all(map(is_open, known))
