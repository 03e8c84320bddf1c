"""Long lines of any content from unauthenticated peers, clients and hosts: others wait for a moment at most.

Delays are measured as processor time of the daemon, because other programs use the processors, too: see
`support.delays`. Times by the clock have generous limits. `./dev bench neighbours` measures the delays by the clock.
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
from support.delays import Delays, measured
from support.harpcallerd import Harpcallerd
from support.harpd import OWNER, Harpd
from support.peers import Peer, PeerConnection
from support.procedures_file import PROCEDURES
from support.resumable_host import EXIT_INFO, acknowledgement, playing

_SIZE = 15 * 1024 * 1024
#: Maximum seconds of a small request of another peer. Before lines were decoded in steps, it took up to 36 s.
_LONGEST = 2.0
#: The same in processor time of the daemon: 0.015 s were measured, and 0.06 s with 14 lines of 15 MiB at once.
_LONGEST_CPU = 0.05
#: The same while something is passed on or stored: other threads do that on another processor, and it counts, too.
_LONGEST_CPU_STORED = 2 * _LONGEST_CPU
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
def delays() -> Iterator[Delays]:
    with measured() as delays:
        yield delays


@pytest.fixture(scope="module")
def harpd(delays: Delays, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpd]:
    with Harpd(tmp_path_factory.mktemp("harpd"), PROCEDURES, services=True) as harpd:
        yield harpd


@pytest.fixture(scope="module")
def dispatcher(delays: Delays, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpcallerd]:
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


def check_attack(
    delays: Delays, log: Path, pid: int, took: list[float], memory: int, size: int, lines: int, log_size: int
) -> None:
    assert took
    assert max(took) < _LONGEST, max(took)
    assert delays.longest(pid) < _LONGEST_CPU
    assert peak(pid) - memory < 4 * size + 24 * _MIB, (peak(pid) - memory) / size
    added = log.read_bytes()[log_size:]
    assert max(map(len, added.split(b"\n")), default=0) <= 4096
    # Each request of the others has an event, too.
    assert len(added) < 64 * 1024 + 4096 * lines + _MAX_EVENT * len(took), len(added)


@pytest.mark.parametrize("name", BAD_VALUES)
def test_line_to_harpd_delays_no_other(harpd: Harpd, delays: Delays, name: str) -> None:
    size = _SIZE if name == "empty arrays" else 4 * _MIB
    delays.forget(harpd.pid)
    memory, log_size = forget_peak(harpd.pid), harpd.log_file.stat().st_size
    with harpd.connect() as client:
        request = {"harp": 1, "calls": OWNER, "auth": harpd.auth, "keep_alive": True}
        with others(Lines(client.socket, request)) as took:
            lines = bad_lines(name, size, HARPD_TEMPLATE)
            for line in lines:
                reply = attack_harpd(harpd, line)
                assert b'"error"' in reply or not reply
                assert len(reply) < 4096
    check_attack(delays, harpd.log_file, harpd.pid, took, memory, size, len(lines), log_size)


def test_many_lines_at_once_to_harpd_delay_no_other(harpd: Harpd, delays: Delays) -> None:
    delays.forget(harpd.pid)
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
    assert delays.longest(harpd.pid) < 4 * _LONGEST_CPU
    assert harpd.log_file.stat().st_size - log_size < 14 * 4096 + 64 * 1024 + _MAX_EVENT * len(took)


@pytest.mark.parametrize("name", BAD_VALUES)
def test_line_to_dispatcher_delays_no_other(dispatcher: Harpcallerd, delays: Delays, name: str) -> None:
    size = 4 * _MIB
    delays.forget(dispatcher.pid)
    memory, log_size = forget_peak(dispatcher.pid), dispatcher.log_file.stat().st_size
    with socket.create_connection((dispatcher.host, dispatcher.port)) as client:
        client.settimeout(60)
        request = {"harpcaller": 1, "cancel": "3f22e0d4-c8ed-11e5-8d66-001e8c140268", "keep_alive": True}
        with others(Lines(client, request)) as took:
            lines = bad_lines(name, size, CLIENT_TEMPLATE.replace(b'{"harpcaller":1', b'{"harpcaller":2'))
            for line in lines:
                assert len(attack_dispatcher(dispatcher, line)) < 4096
    check_attack(delays, dispatcher.log_file, dispatcher.pid, took, memory, size, len(lines), log_size)


#: Values for the phases in which a peer has some rights.
_SOME = ("empty arrays", "keys", "levels", "backslashes")


@pytest.mark.parametrize("name", _SOME)
def test_line_of_user_delays_no_other(harpd: Harpd, delays: Delays, tmp_path: Path, name: str) -> None:
    """With a right password: as arguments, as a second request of a connection, and as a command of a call."""
    value = BAD_VALUES[name](4 * _MIB)
    delays.forget(harpd.pid)
    with harpd.connect() as other:
        request = {"harp": 1, "calls": OWNER, "auth": harpd.auth, "keep_alive": True}
        with others(Lines(other.socket, request)) as took:
            with harpd.connect() as client:
                client.socket.settimeout(60)
                client.send({**request, "keep_alive": True})
                assert "calls" in client.message()
                auth = json.dumps(harpd.auth).encode()
                client.send(b'{"harp":1,"procedure":"echo","arguments":[%b],"auth":%b}\n' % (value, auth))
                replies = iter(client.line, b"")
                assert any(line.startswith(b'{"result":') for line in replies)
            with harpd.start_resumable("wait_for", str(tmp_path / "go")) as client:
                client.message()
                with suppress(OSError):
                    client.send(b'{"ack":%b}\n' % value)
                    assert len(client.line()) < 4096
            (tmp_path / "go").touch()
            with harpd.attach(client.call) as client:
                assert client.closing_line() == {"result": "there"}
    assert took
    assert max(took) < 5 * _LONGEST, max(took)
    assert delays.longest(harpd.pid) < _LONGEST_CPU_STORED


@pytest.mark.parametrize("name", _SOME)
def test_line_of_client_delays_no_other(dispatcher: Harpcallerd, delays: Delays, name: str) -> None:
    """Requests that are accepted, or refused for one of their members, as the second one of a connection."""
    value = BAD_VALUES[name](4 * _MIB)
    call = b'"host":"nowhere","procedure":"p","arguments":'
    delays.forget(dispatcher.pid)
    cancel = {"harpcaller": 1, "cancel": "3f22e0d4-c8ed-11e5-8d66-001e8c140268", "keep_alive": True}
    with socket.create_connection((dispatcher.host, dispatcher.port)) as client:
        client.settimeout(60)
        with others(Lines(client, cancel)) as took:
            for line in (
                b'{"harpcaller":1,%b[%b]}\n' % (call, value),
                b'{"harpcaller":1,%b[],"info":%b}\n' % (call, value),
                b'{"harpcaller":1,%b[],"queue":{"name":{"a":%b}}}\n' % (call, value),
                b'{"harpcaller":1,"submit_many":[{%b[%b]},{%b[]}]}\n' % (call, value, call),
                b'{"harpcaller":1,"submit_many":%b}\n' % value,
                b'{"harpcaller":1,"get_result":%b}\n' % value,
                b'{"harpcaller":1,%b[],"auth":{"token":%b}}\n' % (call, value),
            ):
                with suppress(OSError), dispatcher.connect() as attacker:
                    attacker.send(cancel)
                    assert attacker.line().startswith(b'{"cancelled":false')
                    attacker.send(line)
                    assert len(attacker.line()) < 4096
    assert took
    assert max(took) < 5 * _LONGEST, max(took)
    assert delays.longest(dispatcher.pid) < _LONGEST_CPU_STORED


@pytest.mark.parametrize("name", _SOME)
@pytest.mark.parametrize("kind", ["stream", "result", "exit_info", "exception"])
def test_line_of_host_after_acknowledgement_delays_no_other(
    tmp_path: Path, delays: Delays, kind: str, name: str
) -> None:
    value = BAD_VALUES[name](8 * _MIB)
    line = (
        b'{"exception":{"type":"E","message":"","data":%b}}' if kind == "exception" else b'{"%b":%%b}' % kind.encode()
    )

    def script(conn: PeerConnection) -> None:
        with suppress(OSError, AssertionError):
            request = conn.expect()
            if "calls" in request:
                conn.reply({"harp": 1, "calls": [], "instance": "w1"})
                return
            conn.reply(acknowledgement(stream=True))
            conn.send(line % value + b"\n")
            conn.reply(EXIT_INFO, {"result": 1})
            conn.until_closed()

    with (
        playing(tmp_path, always=script) as peer,
        Harpcallerd(
            tmp_path / "dispatcher", {"web01": peer.port}, settings={"host_timeout": 11, "disconnect_timeout": 1}
        ) as dispatcher,
        socket.create_connection((dispatcher.host, dispatcher.port)) as client,
    ):
        client.settimeout(60)
        delays.forget(dispatcher.pid)
        request = {"harpcaller": 1, "cancel": "3f22e0d4-c8ed-11e5-8d66-001e8c140268", "keep_alive": True}
        with others(Lines(client, request)) as took:
            job = dispatcher.submit("web01", "p")
            with dispatcher.connect() as waiting:
                waiting.send({"harpcaller": 1, "get_result": job})
                assert waiting.line()
        assert max(took) < 5 * _LONGEST, max(took)
        assert delays.longest(dispatcher.pid) < _LONGEST_CPU_STORED


def test_repeated_key_in_auth_is_refused(harpd: Harpd, dispatcher: Harpcallerd) -> None:
    """Before anybody is authenticated, and without a traceback."""
    sizes = {daemon: daemon.log_file.stat().st_size for daemon in (harpd, dispatcher)}
    password = json.dumps(harpd.password).encode()
    call = b'{"harp":1,"procedure":"echo","arguments":[1],"auth":{"user":"tester","password":%b,"password":%b}}\n'
    for first, second in ((b'"wrong"', password), (password, b'"wrong"'), (password, password)):
        assert json.loads(attack_harpd(harpd, call % (first, second)))["error"]["type"] == "invalid_request"
    cancel = b'{"harpcaller":1,"cancel":"3f22e0d4-c8ed-11e5-8d66-001e8c140268","auth":{"token":"a","token":"b"}}\n'
    assert json.loads(attack_dispatcher(dispatcher, cancel))["error"]["type"] == "invalid_request"
    assert harpd.call("echo", 1)[-1] == {"result": [1]}
    for daemon, size in sizes.items():
        log = daemon.log_file.read_bytes()[size:]
        assert b"Traceback" not in log
        assert b"system_error" not in log


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
