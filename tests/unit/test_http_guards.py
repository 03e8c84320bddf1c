"""Requests that a foreign page may have caused: other names of the host, other origins, forms."""

from __future__ import annotations

from itertools import product

import pytest

from harpcaller.http.guards import CrossOrigin, WrongHost, check_host, check_origin

JSON = {"content-type": "application/json"}
HOST = {"host": "127.0.0.1:3580"}


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:3580",
        "localhost:8080",
        "LOCALHOST",
        "localhost.",
        "[::1]:3580",
        "harp.example.net",
        "Harp.Example.Net:443",
        "192.0.2.7:3580",
    ],
)
def test_own_host_is_accepted(host: str) -> None:
    check_host([host], {"harp.example.net"}, "192.0.2.7")


def test_client_without_a_host_is_no_browser() -> None:
    check_host([], set(), None)


@pytest.mark.parametrize(
    "hosts",
    [
        [""],
        ["evil.example"],
        ["localhost.evil.example"],
        ["127.0.0.1.evil.example"],
        ["evil.example:3580"],
        ["localhost", "localhost"],
        ["localhost,evil.example"],
        ["user@localhost"],
        ["localhost:3580:1"],
        ["localhost/"],
        [" localhost"],
        ["localhost\n"],
        ["192.0.2.8"],
        ["2130706433"],
        ["0x7f000001"],
        ["\u212aelvin"],
        ["x" * 100_000],
    ],
)
def test_foreign_host_is_refused(hosts: list[str]) -> None:
    with pytest.raises(WrongHost) as refusal:
        check_host(hosts, {"harp.example.net"}, "192.0.2.7")
    assert len(str(refusal.value)) < 400
    with pytest.raises(WrongHost):
        check_host(hosts, {"harp.example.net"}, None)


def test_safe_methods_need_no_origin() -> None:
    for method in ("GET", "HEAD", "OPTIONS"):
        check_origin(method, "http", {**HOST, "origin": "http://evil.example", "sec-fetch-site": "cross-site"}, True)


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "same-origin", "origin": "http://127.0.0.1:3580"},
        {"origin": "http://127.0.0.1:3580"},
        {"origin": "http://127.0.0.1:3580", "content-type": "application/json; charset=utf-8"},
    ],
)
def test_own_page_is_accepted(headers: dict[str, str]) -> None:
    for has_cookie in (True, False):
        check_origin("POST", "http", {**HOST, **JSON, **headers}, has_cookie)


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "none"},
        {"sec-fetch-site": "cross-site", "origin": "http://127.0.0.1:3580"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "https://127.0.0.1:3580"},
        {"origin": "http://127.0.0.1:3581"},
        {"origin": "http://127.0.0.1:3580.evil.example"},
        {"origin": "http://evil.example"},
    ],
)
def test_foreign_page_is_refused(headers: dict[str, str]) -> None:
    for method, has_cookie in product(("POST", "DELETE", "PATCH", "PUT", "X"), (True, False)):
        with pytest.raises(CrossOrigin):
            check_origin(method, "http", {**HOST, **JSON, **headers}, has_cookie)


def test_form_is_refused() -> None:
    forms = (
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "text/plain",
        "text/plain; application/json",
        "",
    )
    for place in ({"sec-fetch-site": "same-origin"}, {"origin": "http://127.0.0.1:3580"}):
        for kind, has_cookie in product(forms, (True, False)):
            with pytest.raises(CrossOrigin, match="Content-Type"):
                check_origin("POST", "http", {**HOST, **place, "content-type": kind}, has_cookie)
        check_origin("DELETE", "http", {**HOST, **place}, True)


def test_program_with_a_cookie_needs_an_origin() -> None:
    check_origin("POST", "http", {**HOST, **JSON}, False)
    with pytest.raises(CrossOrigin):
        check_origin("POST", "http", {**HOST, **JSON}, True)
