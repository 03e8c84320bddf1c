"""The frontend over real sockets: requests and rejections, phases and limits, users, invalid data.

The transcripts quote docs/protocol.md, harpd.
"""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpd import Harpd
from support.procedures_file import PROCEDURES

ACKNOWLEDGED = {"harp": 1, "stream_result": False}


@pytest.fixture(scope="module")
def harpd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpd]:
    limits = {"request_line": 100_000, "write_timeout": 1}
    with Harpd(tmp_path_factory.mktemp("frontend"), PROCEDURES, {"limits": limits}) as harpd:
        yield harpd


def error(type: str, message: str) -> list[dict[str, Any]]:
    return [{"harp": 1, "error": {"type": type, "message": message}}]


def exchange(harpd: Harpd, data: bytes) -> list[Any]:
    with harpd.connect() as client:
        client.send(data)
        return client.lines()


def serves(harpd: Harpd) -> bool:
    """Return whether a call succeeds now."""
    try:
        return "result" in harpd.call("echo")[-1]
    except OSError:  # closed because of the limit
        return False


def test_call_is_acknowledged_and_returns_its_value(harpd: Harpd) -> None:
    assert harpd.call("echo", 1, "two") == [ACKNOWLEDGED, {"result": [1, "two"]}]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("end", ["\n", "\r\n", " \t\n", "\n\n", "\n \r\n"])
def test_request_with_any_key_order_and_spaces_is_accepted(harpd: Harpd, order: int, end: str) -> None:
    request = dict(list(harpd.request("echo", [1]).items())[::order])
    text = " " + json.dumps(request, indent=1).replace("\n", "\r") + end
    assert exchange(harpd, text.encode()) == [ACKNOWLEDGED, {"result": [1]}]


def test_request_byte_by_byte_is_accepted(harpd: Harpd) -> None:
    with harpd.connect() as client:
        for byte in json.dumps(harpd.request("echo", [1])).encode() + b"\n":
            client.send(bytes([byte]))
        assert client.lines() == [ACKNOWLEDGED, {"result": [1]}]


AUTH = {"user": "u", "password": "p"}
GOOD = {"harp": 1, "procedure": "echo", "arguments": [], "auth": AUTH}


@pytest.mark.parametrize(
    ("request_", "type", "message"),
    [
        (b"", "parse_error", "Expecting value at column 1"),
        (b"GET / HTTP/1.1", "parse_error", "Expecting value at column 1"),
        (b"\xff", "parse_error", "not UTF-8 at byte 0"),
        (b"[]", "invalid_request", "expected an object"),
        (b'{"harp":1,"harp":1}', "invalid_request", 'repeated key "harp"'),
        ({}, "invalid_protocol", "harp: expected 1, got None"),
        ({**GOOD, "harp": 2}, "invalid_protocol", "harp: expected 1, got 2"),
        ({**GOOD, "harp": True}, "invalid_protocol", "harp: expected 1, got True"),
        ({**GOOD, "more": 1}, "invalid_request", "unknown key more"),
        ({**GOOD, "arguments": 5}, "invalid_request", "arguments: expected an array or an object"),
        ({**GOOD, "procedure": ""}, "invalid_request", "procedure: expected a name of 1 to 255 characters, got ''"),
        ({**GOOD, "auth": None}, "invalid_request", "auth: expected an object with user and password"),
        ({**GOOD, "auth": {"user": "u"}}, "invalid_request", "password: missing"),
        ({"harp": 1, "procedure": "echo"}, "invalid_request", "arguments: missing"),
    ],
)
def test_invalid_request_is_rejected(harpd: Harpd, request_: Any, type: str, message: str) -> None:
    data = request_ if isinstance(request_, bytes) else json.dumps(request_).encode()
    assert exchange(harpd, data + b"\n") == error(type, message)


def test_request_line_over_the_limit_is_rejected_immediately(harpd: Harpd) -> None:
    expected = error("invalid_request", "the request line is longer than 100000 bytes")
    assert exchange(harpd, b"x" * 100_001) == expected
    assert exchange(harpd, json.dumps(harpd.request("echo", ["x" * 5_000_000])).encode() + b"\n") == expected


def test_request_with_data_after_its_line_is_rejected(harpd: Harpd) -> None:
    data = json.dumps(harpd.request("echo", [1])).encode() + b"\n{}"
    assert exchange(harpd, data) == error("invalid_request", "data after the request line")


def test_call_is_stopped_when_the_client_sends_data(harpd: Harpd) -> None:
    with harpd.connect() as client:
        client.send(harpd.request("sleep", [3600]))
        assert client.message() == ACKNOWLEDGED
        client.send(b"x")
        assert client.lines() == error("invalid_request", "data after the request line")
    assert harpd.status()["calls"] == 0


def test_unknown_procedure_error_names_it(harpd: Harpd) -> None:
    (rejection,) = harpd.call("nowhere")
    assert rejection["harp"] == 1
    assert rejection["error"]["type"] == "no_such_procedure"
    assert rejection["error"]["data"] == {"procedure": "nowhere"}


@pytest.mark.parametrize("changes", [{"password": "wrong"}, {"user": "nobody"}, {"user": "", "password": ""}])
def test_authentication_errors_do_not_reveal_user_names(harpd: Harpd, changes: dict[str, str]) -> None:
    request = harpd.request("echo", [], auth={**harpd.auth, **changes})
    assert exchange(harpd, json.dumps(request).encode() + b"\n") == error(
        "auth_error", "unknown user or wrong password"
    )


def test_log_contains_no_password(harpd: Harpd) -> None:
    for password in (harpd.password, "a wrong password"):
        with harpd.connect() as client:
            client.send(harpd.request("echo", [], auth={"user": harpd.user, "password": password}))
            client.lines()
    assert not [line for line in harpd.log_lines() if "a wrong password" in line or harpd.password in line]


def test_call_is_stopped_when_the_client_disconnects(harpd: Harpd) -> None:
    with harpd.connect() as client:
        client.send(harpd.request("sleep", [3600]))
        assert client.message() == ACKNOWLEDGED
        assert harpd.status()["calls"] == 1
    wait_until(lambda: harpd.status()["calls"] == 0, DEADLINE, "the end of the call")
    harpd.wait_event("client disconnected; call stopped")


def test_client_that_does_not_read_is_disconnected(harpd: Harpd) -> None:
    with harpd.connect() as client:
        client.send(harpd.request("flood", [10_000]))
        assert client.message() == {"harp": 1, "stream_result": True}
        harpd.wait_event("client does not read")
        wait_until(lambda: harpd.status()["calls"] == 0, DEADLINE, "the end of the call")


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"x" * 100, b"\0" * 1000, b"{}\n", b"\x16"]
)
def test_data_without_tls_is_logged_once(harpd: Harpd, data: bytes) -> None:
    seen = len(harpd.events())
    with socket.create_connection((harpd.host, harpd.port), DEADLINE) as client:
        own = client.getsockname()[1]
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        try:
            received = b"".join(iter(lambda: client.recv(65536), b""))
        except ConnectionError:
            received = b""
    assert b"Traceback" not in received
    harpd.wait_event("TLS handshake failed", peer=f"127.0.0.1:{own}")
    events = [event for event in harpd.events()[seen:] if event.get("peer", "").endswith(f":{own}")]
    assert [event["level"] for event in events] == ["info"]
    assert harpd.call("echo") == [ACKNOWLEDGED, {"result": []}]


def test_handshake_cut_in_the_middle_is_logged(harpd: Harpd) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    hello = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        hello.do_handshake()
    with socket.create_connection((harpd.host, harpd.port), DEADLINE) as client:
        own = client.getsockname()[1]
        client.sendall(outgoing.read()[:50])
    harpd.wait_event("TLS handshake failed", peer=f"127.0.0.1:{own}")


def test_tls_1_1_is_rejected_and_1_2_accepted(harpd: Harpd) -> None:
    with harpd.connect(maximum_version=ssl.TLSVersion.TLSv1_2) as client:
        assert client.socket.version() == "TLSv1.2"
        client.send(harpd.request("echo", [1]))
        assert client.lines() == [ACKNOWLEDGED, {"result": [1]}]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection((harpd.host, harpd.port), DEADLINE) as plain, pytest.raises((ssl.SSLError, OSError)):
        context.wrap_socket(plain)
    assert "network.tls_minimum" in harpd.wait_event("TLS handshake failed", reason="UNSUPPORTED_PROTOCOL")["hint"]


def test_connections_leave_no_descriptors_or_threads(harpd: Harpd) -> None:
    frontend = psutil.Process(harpd.pid)
    harpd.call("echo")
    wait_until(lambda: harpd.status()["calls"] == 0 and not frontend.net_connections()[1:], DEADLINE, "the end of all")
    before = frontend.num_fds(), frontend.num_threads()
    for number in range(20):
        harpd.call("echo")
        with harpd.connect() as client:
            client.send(harpd.request("sleep", [3600]))
            if number % 2:
                client.message()
        with harpd.connect() as client:
            client.send(b"x\n" if number % 2 else b"x")
        with socket.create_connection((harpd.host, harpd.port), DEADLINE) as plain:
            plain.sendall(b"x")
    wait_until(
        lambda: (frontend.num_fds(), frontend.num_threads()) == before, DEADLINE, "descriptors and threads as before"
    )
    wait_until(lambda: harpd.status()["calls"] == 0, DEADLINE, "the end of all calls")


def test_connection_phases_have_deadlines(tmp_path: Path) -> None:
    limits = {"handshake_timeout": 0.5, "request_timeout": 0.5}
    with Harpd(tmp_path, PROCEDURES, {"limits": limits}) as harpd:
        with socket.create_connection((harpd.host, harpd.port), DEADLINE) as silent:
            assert silent.recv(1) == b""
        with harpd.connect() as silent_after_handshake:
            assert silent_after_handshake.lines() == error("invalid_request", "no complete request line within 0.5 s")
        with harpd.connect() as slow:
            slow.send(b'{"harp":')
            assert slow.lines() == error("invalid_request", "no complete request line within 0.5 s")
        assert harpd.call("echo") == [ACKNOWLEDGED, {"result": []}]


def test_silent_clients_do_not_delay_others(tmp_path: Path) -> None:
    with Harpd(tmp_path, PROCEDURES, {"limits": {"max_connections_per_peer": 1000}}) as harpd:
        silent = [socket.create_connection((harpd.host, harpd.port), DEADLINE) for _ in range(100)]
        half = [harpd.connect() for _ in range(50)]
        try:
            for client in half:
                client.send(b'{"harp":1,')
            assert harpd.call("echo") == [ACKNOWLEDGED, {"result": []}]
        finally:
            for connection in (*silent, *(client.socket for client in half)):
                connection.close()


def test_connection_over_the_limit_gets_an_error(tmp_path: Path) -> None:
    with Harpd(tmp_path, PROCEDURES, {"limits": {"max_connections": 3}}) as harpd:
        open_clients = [harpd.connect() for _ in range(3)]
        try:
            for client in open_clients:  # a connection without an authenticated request would give way to a new one
                client.send(harpd.request("wait_for", [str(tmp_path / "never")]))
                assert client.message() == ACKNOWLEDGED
            with harpd.connect() as surplus:
                surplus.send(harpd.request("echo", []))
                (rejection,) = surplus.lines()
            assert rejection["error"]["type"] == "too_many_connections"
            open_clients.pop().close()
            wait_until(lambda: serves(harpd), DEADLINE, "a free connection")
            assert len(harpd.wait_events(1, "too many connections")) == 1
        finally:
            for client in open_clients:
                client.close()


def test_connection_far_over_the_limit_is_closed(tmp_path: Path) -> None:
    with Harpd(tmp_path, PROCEDURES, {"limits": {"max_connections": 1}}) as harpd:
        silent = [socket.create_connection((harpd.host, harpd.port), DEADLINE) for _ in range(60)]
        try:
            silent[-1].settimeout(DEADLINE)
            try:
                assert silent[-1].recv(1) == b""
            except ConnectionResetError:
                pass  # also closed
        finally:
            for connection in silent:
                connection.close()
        wait_until(lambda: serves(harpd), DEADLINE, "a free connection")


def test_client_lost_within_a_line_frees_its_connection(tmp_path: Path) -> None:
    with Harpd(tmp_path, PROCEDURES, {"limits": {"max_connections": 1}}) as harpd:
        with harpd.connect() as client:
            client.send(harpd.request("echo", ["x" * 8_000_000]))
            assert client.message() == ACKNOWLEDGED
            assert client.socket.recv(65536)
        wait_until(lambda: serves(harpd), DEADLINE, "a free connection")


def test_request_memory_limits_all_long_requests(tmp_path: Path) -> None:
    limits = {"request_line": 1_000_000, "request_memory": 1_000_000}
    with Harpd(tmp_path, PROCEDURES, {"limits": limits}) as harpd:
        with ExitStack() as held:
            rejected: list[Any] = []

            def turned_away() -> bool:
                with harpd.connect() as second:
                    second.send(harpd.request("echo", ["x" * 900_000]))
                    rejected[:] = second.lines()
                return "error" in rejected[0]

            def turned_away_beside_another() -> bool:
                first = held.enter_context(harpd.connect())
                with suppress(OSError):  # it is rejected if the other one is read first
                    first.send(b'{"harp":1,"arguments":["' + b"x" * 900_000)
                return turned_away()

            wait_until(turned_away_beside_another, DEADLINE, "the rejection of the second")
            assert rejected[0]["error"]["type"] == "too_many_connections"
            assert harpd.call("echo", "x" * 60_000) == [ACKNOWLEDGED, {"result": ["x" * 60_000]}]
        wait_until(lambda: not turned_away(), DEADLINE, "the memory's return")


def test_call_over_the_limit_gets_an_error(tmp_path: Path) -> None:
    with Harpd(tmp_path, PROCEDURES, {"limits": {"max_calls": 1}}) as harpd:
        with harpd.connect() as running:
            running.send(harpd.request("sleep", [3600]))
            assert running.message() == ACKNOWLEDGED
            (rejection,) = harpd.call("echo")
            assert rejection["error"]["type"] == "too_many_calls"
        wait_until(lambda: serves(harpd), DEADLINE, "the end of the first call")


def test_accept_without_descriptors_waits_and_resumes(tmp_path: Path) -> None:
    with Harpd(tmp_path, PROCEDURES, descriptors=40) as harpd:
        clients = [socket.create_connection((harpd.host, harpd.port), DEADLINE) for _ in range(60)]
        try:
            harpd.wait_event("cannot accept connections")
        finally:
            for client in clients:
                client.close()
        harpd.wait_event("accepting connections again")
        assert harpd.call("echo") == [ACKNOWLEDGED, {"result": []}]
        assert len(harpd.events("cannot accept connections")) < 10


OWN = """
import threading, time

class Users:
    def authenticate(self, user, password):
        if user == "raises":
            raise ValueError(password)
        if user == "exits":
            raise SystemExit(password)
        if user == "hangs":
            threading.Event().wait()
        if user == "truthy":
            return password
        if user == "falsy":
            return ""
        if user == "async":
            return self.authenticate_later(password)
        if user == "generator":
            return (each for each in password)
        if user == "not implemented":
            return NotImplemented
        if user == "method":
            return self.authenticate_later
        return user == "good"

    async def authenticate_later(self, password):
        return False

def create(config):
    assert config == {"module": "own_users", "colour": "red"}, config
    return Users()
"""


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Harpd]:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "own_users.py").write_text(OWN)
    configuration = {
        "python": {"path": str(tmp_path / "lib")},
        "authentication": {"module": "own_users", "colour": "red"},
        "limits": {"authentication_timeout": 1, "authentication_threads": 2},
    }
    with Harpd(tmp_path / "harpd", PROCEDURES, configuration) as harpd:
        yield harpd


def ask_as(harpd: Harpd, user: str) -> Any:
    with harpd.connect() as client:
        client.send(harpd.request("echo", [], auth={"user": user, "password": "hush hush"}))
        return client.lines()[-1]


def test_authentication_module_failures_reject_the_user(own: Harpd) -> None:
    assert ask_as(own, "good") == {"result": []}
    rejected = error("auth_error", "unknown user or wrong password")[0]
    for user in ("bad", "raises", "exits", "falsy", "async", "generator", "not implemented", "method"):
        assert ask_as(own, user) == rejected
    assert ask_as(own, "hangs")["error"]["type"] == "authentication_timeout"
    own.wait_event("authentication timed out", user="hangs")
    assert [event["error"] for event in own.events("authentication module failed")] == ["ValueError", "SystemExit"]
    assert all("own_users.py:" in event["location"] for event in own.events("authentication module failed"))
    assert ask_as(own, "good") == {"result": []}  # one thread hangs, the other works
    assert not [line for line in own.log_lines() if "hush" in line]


def test_truthy_answer_of_a_module_counts_with_a_warning(own: Harpd) -> None:
    for user in ("truthy", "truthy", "good"):
        assert ask_as(own, user) == {"result": []}
    own.wait_event("authentication module returned no bool")
    (warning,) = own.events("authentication module returned no bool")
    assert (warning["level"], warning["user"], warning["type"]) == ("warning", "truthy", "str")
    own.reload()
    assert ask_as(own, "truthy") == {"result": []}
    own.wait_events(2, "authentication module returned no bool")


MISTAKES = ["alice:$5$saltsalt$0IyaXrmV7.sGNS6tirgqHLqX/G.FBvgkYA.lpPdS5sA"] * 2


def test_mistake_in_users_file_fails_the_test_and_warns(tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text(MISTAKES[0])
    users.chmod(0o600)
    configuration = {"authentication": {"module": "harpd.auth.passfile", "file": str(users)}}
    with Harpd(tmp_path / "harpd", PROCEDURES, configuration) as harpd:
        tested = subprocess.run(harpd.command("--test"), capture_output=True, text=True, check=False)
        assert (tested.returncode, tested.stdout) == (0, "config OK\n"), tested.stderr
        users.write_text("\n".join(MISTAKES))
        tested = subprocess.run(harpd.command("--test"), capture_output=True, text=True, check=False)
        problem = f"{users}:2: user alice has another line, 1, which counts; remove one of them"
        assert (tested.returncode, tested.stdout, tested.stderr) == (1, "", f"harpd: {problem}\n")
        assert harpd.reload()["event"] == "reloaded"
        harpd.wait_event("configuration has a mistake", problem=problem, level="warning")
        harpd.stop()
        harpd.start()
        assert len(harpd.wait_events(2, "configuration has a mistake")) == 2


def test_passfile_is_checked_at_every_request(tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text("")
    configuration = {"authentication": {"module": "harpd.auth.passfile", "file": str(users)}}
    with Harpd(tmp_path / "harpd", PROCEDURES, configuration) as harpd:
        assert ask_as(harpd, "alice")["error"]["type"] == "auth_error"
        with harpd.connect() as client:
            users.write_text("alice:$5$saltsalt$0IyaXrmV7.sGNS6tirgqHLqX/G.FBvgkYA.lpPdS5sA\n")
            client.send(harpd.request("echo", [], auth={"user": "alice", "password": "secret"}))
            assert client.lines() == [ACKNOWLEDGED, {"result": []}]
        users.unlink()
        assert ask_as(harpd, "alice")["error"]["type"] == "auth_error"
