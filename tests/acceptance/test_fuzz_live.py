"""The live servers reply to any bytes or close: never a hang, a crash or a traceback on the wire."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.procedures_file import PROCEDURES
from support.system import System, running

#: A server that has not answered and closed by then hangs. Both are set to give up on silence well before.
DEADLINE = 60.0

many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"
names = st.sampled_from(
    [
        *(
            "harpcaller",
            "harp",
            "host",
            "procedure",
            "arguments",
            "auth",
            "user",
            "password",
            "timeout",
            "queue",
            "name",
        ),
        *(
            "max_exec_time",
            "concurrency",
            "info",
            "cancel",
            "get_result",
            "wait",
            "get_status",
            "follow_stream",
            "since",
        ),
        *("read_stream", "recent", "", "\ud800"),
    ]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([1, JOB, "echo", "demo"]) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=8),
    max_leaves=12,
)
REQUESTS = [
    {"harpcaller": 1, "host": "h", "procedure": "p", "arguments": [1, {"a": "b"}], "queue": {"name": {"q": 1}}},
    {"harpcaller": 1, "get_result": JOB, "wait": False},
    {"harpcaller": 1, "follow_stream": JOB, "since": 3},
    {"harp": 1, "procedure": "echo", "arguments": [1, "two"], "auth": {"user": "u", "password": "p"}},
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A request of the protocol with bytes cut out, put in or repeated."""
    line = json.dumps(draw(st.sampled_from(REQUESTS))).encode()
    start = draw(st.integers(0, len(line)))
    end = draw(st.integers(start, min(len(line), start + 8)))
    return line[:start] + draw(st.binary(max_size=8)) * draw(st.integers(0, 2)) + line[end:]


@st.composite
def stretched(draw: st.DrawFn) -> bytes:
    """A request whose members were exchanged for others."""
    request = {**draw(st.sampled_from(REQUESTS)), **draw(st.dictionaries(names, values, max_size=3))}
    return json.dumps(request).encode()


lines = damaged() | stretched() | st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode())
deep = st.sampled_from([b"[" * 200_000, b'{"a":' * 50_000, b'"' + b"x" * 100_000, b"9" * 20_000])


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running(tmp_path_factory.mktemp("fuzz"), PROCEDURES) as system:
        yield system


def answers(connection: socket.socket, line: bytes) -> list[bytes]:
    """Send a line and half-close; return the received data until the server closes."""
    connection.settimeout(DEADLINE)
    try:
        connection.sendall(line + b"\n")
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    except (ConnectionError, ssl.SSLError):
        return []  # closed on us, which is an answer too
    return received.splitlines()


def check(replies: list[bytes]) -> None:
    for reply in replies:
        assert isinstance(json.loads(reply), dict)
        assert b"Traceback" not in reply
        assert b'File "' not in reply


@many
@given(line=lines | deep)
def test_dispatcher_fuzzed_request_is_answered_or_closed(system: System, line: bytes) -> None:
    with closing(socket.create_connection(("127.0.0.1", system.dispatcher.port), DEADLINE)) as connection:
        check(answers(connection, line))


@many
@given(line=lines | deep)
def test_harpd_fuzzed_request_is_answered_or_closed(system: System, line: bytes) -> None:
    context = ssl.create_default_context(cafile=str(system.harpd.ca_file))
    with socket.create_connection(("127.0.0.1", system.harpd.port), DEADLINE) as plain:
        with context.wrap_socket(plain, server_hostname="localhost") as connection:
            check(answers(connection, line))


@many
@given(data=st.binary(min_size=1, max_size=300))
def test_harpd_input_without_tls_is_survived(system: System, data: bytes) -> None:
    with closing(socket.create_connection(("127.0.0.1", system.harpd.port), DEADLINE)) as connection:
        connection.settimeout(DEADLINE)
        try:
            connection.sendall(data + b"\n")
            connection.shutdown(socket.SHUT_WR)
            received = b"".join(iter(lambda: connection.recv(65536), b""))
        except ConnectionError:
            return
        assert b"Traceback" not in received


def test_fuzzed_servers_still_run_jobs(system: System) -> None:
    assert system.server.echo(1, "two") == [1, "two"]
    assert system.rpc.web01.echo(1, "two").get() == [1, "two"]
    assert not [line for line in system.log_lines() if "Traceback" in line or "traceback" in line]
