"""The lines of the hosts registry: valid hosts, and the errors of invalid lines."""

from __future__ import annotations

import json
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


def test_parse_line_accepts_both_forms_of_a_digest() -> None:
    expected = WEB01._replace(certificate_sha256="ab" * 32)
    for text in ("ab" * 32, ":".join(["AB"] * 32)):
        assert parse_line(line(certificate_sha256=text)) == expected


def test_parse_line_ignores_key_order_and_space() -> None:
    reordered = {name: LINE[name] for name in reversed(LINE)}
    assert parse_line(b"  " + json.dumps(reordered, indent=1).replace("\n", "\r").encode() + b" \r\n") == WEB01


@pytest.mark.parametrize("address", ["10.0.0.1", "::1", "fe80::1%eth0", "web01.example.net", "bücher.example"])
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
    (without("credentials"), "credentials: expected an object"),
    (line(hostname=""), "hostname: expected a name"),
    (line(hostname=5), "hostname: expected a string, got a number"),
    (line(address=None), "address: expected a string, got null"),
    *(
        (line(address=text), "address: expected a name or an address of 1 to 255 characters, without brackets and port")
        for text in ("web01:4306", "[::1]", "[::1]:4306", "https://web01", "")
    ),
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
    (line(port=None), "port: expected"),
    (line(certificate_sha256=None), "certificate_sha256: expected a string"),
    (line(certificate_sha256="ab" * 31), "certificate_sha256: expected the SHA-256 of a certificate"),
    (line(certificate_sha256="xy" * 32), "certificate_sha256: expected the SHA-256 of a certificate"),
    (line(hostname="h" * 256), "hostname: expected a name of 1 to 255 characters"),
]


@pytest.mark.parametrize(("text", "reason"), BROKEN)
def test_parse_line_error_quotes_no_value(text: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError) as raised:
        parse_line(text)
    assert raised.value.message.startswith(reason)
    assert "s3cret" not in raised.value.message


def test_parse_line_without_port_has_the_default() -> None:
    assert parse_line(without("port")) == WEB01


def test_parse_line_accepts_other_keys() -> None:
    credentials = {**LINE["credentials"], "realm": "x"}
    assert parse_line(line(comment="rack 7", labels={"site": ["a"]}, credentials=credentials)) == WEB01


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ([], ()),
        (["prod", "eu-west"], ("prod", "eu-west")),
        ({"site": ["a"]}, None),  # of a legacy line
        (["prod", 1], None),
        (["t" * 256], None),
        ("prod", None),
        (None, None),
    ],
)
def test_parse_line_with_other_tags_than_texts_has_unknown_tags(tags: Any, expected: tuple[str, ...] | None) -> None:
    assert parse_line(line(tags=tags)) == WEB01._replace(tags=expected)


def test_parse_line_huge_port_is_refused() -> None:
    with pytest.raises(ProtocolError):
        parse_line(line().replace(b"4306", b"9" * 5000))


def test_host_repr_has_no_password() -> None:
    assert "s3cret" not in repr(WEB01) + str(WEB01) + repr(parse_hosts([line()], "script"))


def rejected(lines: list[bytes]) -> list[tuple[int, str]]:
    return [(line.number, line.error) for line in parse_hosts(lines, "script").rejected]


def test_parse_hosts_returns_hosts_and_rejected_lines() -> None:
    found = parse_hosts([line(), b"", b"oops\n", line(hostname="web02"), b" \r\n", without("address")], "script")
    assert found.hosts == {"web01": WEB01, "web02": parse_line(line(hostname="web02"))}
    first, second = found.rejected
    assert str(first).startswith("script:3: Expecting value at column 1")
    assert str(second) == "script:6: address: missing"


def test_parse_hosts_rejects_a_repeated_hostname() -> None:
    lines = [line(port=1), line(hostname="web02"), line(port=2), line(port=3)]
    assert {name: host.port for name, host in parse_hosts(lines, "script").hosts.items()} == {"web01": 1, "web02": 4306}
    assert rejected(lines) == [(number, "hostname 'web01' is repeated; line 1 counts") for number in (3, 4)]


def test_parse_hosts_invalid_line_counts_for_no_host() -> None:
    assert parse_hosts([line(port=0), line()], "script").hosts == {"web01": WEB01}
    assert rejected([line(port=0), line()]) == [(1, "port: expected an integer from 1 to 65535")]


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        (b"", False),
        (line(), False),
        (line() + b"\n" + line()[:-1], True),
        (line() + b"\n" + line()[:-1] + b"\n", False),
        (line() + b"\n" + without("address"), False),
        (b"{", True),
    ],
)
def test_parse_hosts_notices_a_cut_last_line(text: bytes, cut: bool) -> None:
    assert parse_hosts(text.split(b"\n"), "script").is_cut == cut


def test_parse_hosts_without_lines_is_empty() -> None:
    found = parse_hosts([], "script")
    assert (found.hosts, found.rejected) == ({}, [])


def test_log_rejected_is_bounded_and_counts(caplog: pytest.LogCaptureFixture) -> None:
    parse_hosts([b"s3cret"] * 50, "script").log_rejected("script")
    lines = [record.__dict__ for record in caplog.records if "line" in record.__dict__]
    assert [fields["line"] for fields in lines] == list(range(1, 11))
    assert caplog.records[-1].__dict__["rejected"] == 50
    assert "s3cret" not in str([record.__dict__ for record in caplog.records])


VALID = {"web01": line(), "web02": line(hostname="web02")}


@given(st.lists(st.binary() | st.sampled_from(list(VALID.values())), max_size=10))
def test_parse_hosts_any_bytes_are_hosts_or_errors(lines: list[bytes]) -> None:
    assert set(parse_hosts(lines, "script").hosts) == {name for name, text in VALID.items() if text in lines}
