"""The lines of the hosts registry: valid hosts, and the errors of invalid lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harp.protocol.schema import ProtocolError
from harpcaller.hosts.registry import Host, parse_hosts, parse_line

LINE: dict[str, Any] = {
    "hostname": "web01",
    "address": "10.0.0.1",
    "port": 4306,
    "credentials": {"user": "deploy", "password": "s3cret"},
}
WEB01 = Host("web01", "10.0.0.1", 4306, "deploy", "s3cret")


def line(**changes: Any) -> bytes:
    return json.dumps({**LINE, **changes}).encode()


def without(key: str) -> bytes:
    return json.dumps({name: value for name, value in LINE.items() if name != key}).encode()


def test_parse_line_returns_a_host() -> None:
    assert parse_line(line()) == WEB01


def test_parse_line_ignores_key_order_and_space() -> None:
    reordered = {name: LINE[name] for name in reversed(LINE)}
    assert parse_line(b"  " + json.dumps(reordered, indent=1).replace("\n", "\r").encode() + b" \r\n") == WEB01


@pytest.mark.parametrize("address", ["10.0.0.1", "::1", "web01.example.net"])
def test_addresses_are_parsed(address: str) -> None:
    assert parse_line(line(address=address)).address == address


BROKEN = [
    (b"", "Expecting value"),
    (b"hello", "Expecting value"),
    (b"[]", "expected an object"),
    (b"\xff", "not UTF-8"),
    (b'{"hostname": NaN}', "NaN is not JSON"),
    (line()[:-1], "Expecting ',' delimiter"),
    (b'{"port": 1, "port": 2}', "repeated key"),
    (without("hostname"), "hostname: missing"),
    (without("address"), "address: missing"),
    (without("port"), "port: missing"),
    (without("credentials"), "credentials: expected an object"),
    (line(hostname=""), "hostname: expected a name"),
    (line(hostname=5), "hostname: expected a string, got a number"),
    (line(address=None), "address: expected a string, got null"),
    (line(port=0), "port: expected"),
    (line(port=65536), "port: expected"),
    (line(port=-1), "port: expected"),
    (line(port=4306.0), "port: expected"),
    (line(port=True), "port: expected"),
    (line(port="4306"), "port: expected"),
    (line(port=10**40), "port: expected"),
    (line(credentials="s3cret"), "credentials: expected an object"),
    (line(credentials={"user": "s3cret"}), "password: missing"),
    (line(credentials={"password": "s3cret"}), "user: missing"),
    (line(credentials={"user": "u", "password": ["s3cret"]}), "password: expected a string, got an array"),
    (line(credentials={"user": "u", "password": "s3cret", "realm": "s3cret"}), "unknown key realm"),
    (line(note="s3cret"), "unknown key note"),
]


@pytest.mark.parametrize(("text", "reason"), BROKEN)
def test_parse_line_error_quotes_no_value(text: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError) as raised:
        parse_line(text)
    assert raised.value.message.startswith(reason)
    assert "s3cret" not in raised.value.message


def test_parse_line_huge_port_is_refused() -> None:
    with pytest.raises(ProtocolError):
        parse_line(line().replace(b"4306", b"9" * 5000))


def test_host_repr_has_no_password() -> None:
    assert "s3cret" not in repr(WEB01) + str(WEB01) + repr(parse_hosts([line()], "script"))


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[Any, ...]]]:
    """Return a function that returns the logged invalid lines and errors, and the counts."""

    def read() -> list[tuple[Any, ...]]:
        assert all(record.__dict__["source"] == "script" for record in caplog.records)
        keys = ("line", "error", "invalid", "duplicates")
        return [tuple(record.__dict__[key] for key in keys if key in record.__dict__) for record in caplog.records]

    return read


def test_parse_hosts_returns_hosts_and_logs_errors(logged: Callable[[], list[tuple[Any, ...]]]) -> None:
    lines = [line(), b"", b"oops\n", line(hostname="web02"), b" \r\n", without("port")]
    assert parse_hosts(lines, "script") == {"web01": WEB01, "web02": parse_line(line(hostname="web02"))}
    (first, error), *others = logged()
    assert (first, error.split(":")[0]) == (3, "Expecting value at column 1")
    assert others == [(6, "port: missing"), (2, 0)]


def test_parse_hosts_duplicate_uses_the_last_line(logged: Callable[[], list[tuple[Any, ...]]]) -> None:
    hosts = parse_hosts([line(port=1), line(hostname="web02"), line(port=2), line(port=3)], "script")
    assert [(host.hostname, host.port) for host in hosts.values()] == [("web02", 4306), ("web01", 3)]
    assert logged() == [(0, 2)]


def test_parse_hosts_invalid_line_replaces_no_host(logged: Callable[[], list[tuple[Any, ...]]]) -> None:
    assert parse_hosts([line(), line(port=0)], "script") == {"web01": WEB01}
    assert logged() == [(2, "port: expected an integer from 1 to 65535"), (1, 0)]


def test_parse_hosts_without_lines_is_empty(logged: Callable[[], list[tuple[Any, ...]]]) -> None:
    assert (parse_hosts([], "script"), logged()) == ({}, [])


VALID = {"web01": line(), "web02": line(hostname="web02")}


@given(st.lists(st.binary() | st.sampled_from(list(VALID.values())), max_size=10))
def test_parse_hosts_any_bytes_are_hosts_or_errors(lines: list[bytes]) -> None:
    assert set(parse_hosts(lines, "script")) == {name for name, text in VALID.items() if text in lines}
