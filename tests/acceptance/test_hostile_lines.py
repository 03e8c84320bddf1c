"""Long lines of any content from unauthenticated peers, clients and hosts: others wait for a moment at most.

`./dev bench neighbours` measures the delays exactly. The limits here are generous, because other programs use the
processors, too.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from support.bad_lines import BAD_VALUES, bad_lines
from support.harpcallerd import Harpcallerd
from support.harpd import OWNER, Harpd
from support.peers import Peer, PeerConnection
from support.procedures_file import PROCEDURES
from support.resumable_host import acknowledgement, playing

_SIZE = 15 * 1024 * 1024
#: Maximum seconds of a small request of another peer. Before lines were decoded in steps, it took up to 36 s.
_LONGEST = 2.0
_MIB = 1024 * 1024
#: Maximum bytes of the event of a request of others.
_MAX_EVENT = 400


def peak(pid: int) -> int:
    """Return the peak memory of a process in bytes, since `forget_peak`."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def forget_peak(pid: int) -> int:
    """Let the peak memory of a process be its present memory, and return this."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak(pid)


@contextmanager
def others(request: Callable[[], object]) -> Iterator[list[float]]:
    """Repeat a small request of another peer meanwhile; yield a list of the seconds that each one took."""
    took: list[float] = []
    ending = threading.Event()

    def repeat() -> None:
        while not ending.is_set():
            began = time.monotonic()
            request()
            took.append(time.monotonic() - began)
            ending.wait(0.01)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield took
    finally:
        ending.set()
        thread.join()


class Lines:
    """A connection for small requests, one after the other."""

    def __init__(self, connection: socket.socket, request: dict[str, Any]) -> None:
        self._connection = connection
        self._request = json.dumps(request).encode() + b"\n"

    def __call__(self) -> object:
        self._connection.sendall(self._request)
        received = b""
        while not received.endswith(b"\n"):
            data = self._connection.recv(65536)
            assert data, received
            received += data
        return received


@pytest.fixture(scope="module")
def harpd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpd]:
    with Harpd(tmp_path_factory.mktemp("harpd"), PROCEDURES, services=True) as harpd:
        yield harpd


@pytest.fixture(scope="module")
def dispatcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpcallerd]:
    with Harpcallerd(tmp_path_factory.mktemp("dispatcher")) as dispatcher:
        yield dispatcher


def attack_harpd(harpd: Harpd, line: bytes) -> bytes:
    """Send a line without a valid password; return the reply."""
    with suppress(OSError), harpd.connect() as client:
        client.socket.settimeout(60)
        client.send(line)
        return client.line()
    return b""


def attack_dispatcher(dispatcher: Harpcallerd, line: bytes) -> bytes:
    with suppress(OSError), dispatcher.connect() as client:
        client.send(line)
        return client.line()
    return b""


HARPD_TEMPLATE = b'{"harp":1,"procedure":"echo","arguments":%b,"auth":{"user":"nobody","password":"wrong"}}'
CLIENT_TEMPLATE = b'{"harpcaller":1,"host":"nowhere","procedure":"p","arguments":%b}'


def check_attack(log: Path, pid: int, took: list[float], memory: int, size: int, lines: int, log_size: int) -> None:
    assert took
    assert max(took) < _LONGEST, max(took)
    assert peak(pid) - memory < 4 * size + 24 * _MIB, (peak(pid) - memory) / size
    added = log.read_bytes()[log_size:]
    assert max(map(len, added.split(b"\n")), default=0) <= 4096
    # Each request of the others has an event, too.
    assert len(added) < 64 * 1024 + 4096 * lines + _MAX_EVENT * len(took), len(added)


@pytest.mark.parametrize("name", BAD_VALUES)
def test_line_to_harpd_delays_no_other(harpd: Harpd, name: str) -> None:
    size = _SIZE if name == "empty arrays" else 4 * _MIB
    memory, log_size = forget_peak(harpd.pid), harpd.log_file.stat().st_size
    with harpd.connect() as client:
        request = {"harp": 1, "calls": OWNER, "auth": harpd.auth, "keep_alive": True}
        with others(Lines(client.socket, request)) as took:
            lines = bad_lines(name, size, HARPD_TEMPLATE)
            for line in lines:
                reply = attack_harpd(harpd, line)
                assert b'"error"' in reply or not reply
                assert len(reply) < 4096
    check_attack(harpd.log_file, harpd.pid, took, memory, size, len(lines), log_size)


def test_many_lines_at_once_to_harpd_delay_no_other(harpd: Harpd) -> None:
    [line, *_] = bad_lines("empty arrays", _SIZE, b'{"harp":%b}')
    log_size = harpd.log_file.stat().st_size
    with harpd.connect() as client:
        request = {"harp": 1, "calls": OWNER, "auth": harpd.auth, "keep_alive": True}
        attackers = [threading.Thread(target=attack_harpd, args=(harpd, line)) for _ in range(14)]
        with others(Lines(client.socket, request)) as took:
            for attacker in attackers:
                attacker.start()
            for attacker in attackers:
                attacker.join()
    assert max(took) < 2 * _LONGEST, max(took)
    assert harpd.log_file.stat().st_size - log_size < 14 * 4096 + 64 * 1024 + _MAX_EVENT * len(took)


@pytest.mark.parametrize("name", BAD_VALUES)
def test_line_to_dispatcher_delays_no_other(dispatcher: Harpcallerd, name: str) -> None:
    size = 4 * _MIB
    memory, log_size = forget_peak(dispatcher.pid), dispatcher.log_file.stat().st_size
    with socket.create_connection((dispatcher.host, dispatcher.port)) as client:
        client.settimeout(60)
        request = {"harpcaller": 1, "cancel": "3f22e0d4-c8ed-11e5-8d66-001e8c140268", "keep_alive": True}
        with others(Lines(client, request)) as took:
            lines = bad_lines(name, size, CLIENT_TEMPLATE.replace(b'{"harpcaller":1', b'{"harpcaller":2'))
            for line in lines:
                assert len(attack_dispatcher(dispatcher, line)) < 4096
    check_attack(dispatcher.log_file, dispatcher.pid, took, memory, size, len(lines), log_size)


def host_that_sends(line: bytes) -> Callable[[PeerConnection], None]:
    """Return a script of a host that sends this line instead of an acknowledgement, and then again."""

    def script(conn: PeerConnection) -> None:
        with suppress(OSError, AssertionError):
            request = conn.expect()
            if "calls" in request:
                conn.reply({"harp": 1, "calls": [], "instance": "w1"})
                return
            conn.send(line)
            conn.until_closed()

    return script


@pytest.mark.parametrize(
    "line",
    [
        json.dumps(acknowledgement()).encode().replace(b'"w1"', BAD_VALUES["empty arrays"](_SIZE)),
        b'{"harp":1,"error":{"type":"no_such_call","message":"","data":%b}}' % BAD_VALUES["empty arrays"](_SIZE),
        b'{"heartbeat":%b}' % BAD_VALUES["digits"](_SIZE),
    ],
    ids=["acknowledgement", "error", "heartbeat"],
)
def test_line_of_host_before_acknowledgement_is_refused(tmp_path: Path, line: bytes) -> None:
    with playing(tmp_path, always=host_that_sends(line + b"\n")) as peer:
        check_host(tmp_path, peer, {"start_within": 0, "host_timeout": 11, "disconnect_timeout": 1})


def check_host(directory: Path, peer: Peer, settings: dict[str, Any]) -> None:
    with Harpcallerd(directory / "dispatcher", {"web01": peer.port}, settings=settings) as dispatcher:
        memory = forget_peak(dispatcher.pid)
        with socket.create_connection((dispatcher.host, dispatcher.port)) as client:
            client.settimeout(60)
            request = {"harpcaller": 1, "cancel": "3f22e0d4-c8ed-11e5-8d66-001e8c140268", "keep_alive": True}
            with others(Lines(client, request)) as took:
                job = dispatcher.submit("web01", "p")
                [end] = dispatcher.ask(get_result=job)
        assert end["error"]["type"] in ("protocol_error", "host_lost"), end
        assert max(took) < _LONGEST, max(took)
        assert peak(dispatcher.pid) - memory < 16 * _MIB
        assert max(map(len, dispatcher.log_file.read_bytes().split(b"\n"))) <= 4096
