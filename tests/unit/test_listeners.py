"""What both daemons bind for a configured address, and that an error leaves no socket."""

from __future__ import annotations

import errno
import socket
from typing import Any

import pytest

from harp_daemon.sockets import ListenError, ResolveError, listen_tcp, resolve

V4, V6 = socket.AF_INET, socket.AF_INET6
EVERYWHERE = [(V6, "::")] if socket.has_dualstack_ipv6() else [(V4, "0.0.0.0")]


class SocketWithoutIPv6(socket.socket):
    """A socket on a machine whose kernel has no IPv6."""

    def __init__(self, family: int = -1, *arguments: Any, **more: Any) -> None:
        if family == V6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        super().__init__(family, *arguments, **more)


def resolve_to(monkeypatch: pytest.MonkeyPatch, *places: tuple[int, str]) -> None:
    found = [(family, socket.SOCK_STREAM, 6, "", (address, 0)) for family, address in places]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (None, EVERYWHERE),
        ("*", EVERYWHERE),
        ("0.0.0.0", [(V4, "0.0.0.0")]),
        ("::", [(V6, "::")]),
        ("127.0.0.1", [(V4, "127.0.0.1")]),
        ("192.0.2.1", [(V4, "192.0.2.1")]),
    ],
)
def test_resolve_of_addresses_returns_them(address: str | None, expected: list[Any]) -> None:
    assert resolve(address) == expected


def test_resolve_of_localhost_returns_loopback() -> None:
    found = resolve("localhost")
    assert found
    assert set(found) <= {(V4, "127.0.0.1"), (V6, "::1")}


@pytest.mark.parametrize("name", ["no-such-host.invalid", "a..b", "x" * 80, "a b", "", "[::1]", "localhost:80"])
def test_resolve_of_garbage_raises(name: str) -> None:
    with pytest.raises(ResolveError) as caught:
        resolve(name)
    assert str(caught.value).startswith(f"cannot resolve {name!r}: ")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_resolve_of_name_returns_each_address_once(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, (V6, "::1"), (V4, "127.0.0.1"), (V4, "127.0.0.1"))
    assert resolve("localhost") == [(V6, "::1"), (V4, "127.0.0.1")]


def test_resolve_without_ipv6_returns_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", SocketWithoutIPv6)
    assert resolve(None) == [(V4, "0.0.0.0")]
    resolve_to(monkeypatch, (V6, "::1"), (V4, "127.0.0.1"))
    assert resolve("localhost") == [(V4, "127.0.0.1")]


def test_resolve_without_ipv6_returns_sole_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of listening on it says more than an empty list."""
    monkeypatch.setattr(socket, "socket", SocketWithoutIPv6)
    resolve_to(monkeypatch, (V6, "2001:db8::1"))
    assert resolve("web01") == [(V6, "2001:db8::1")]


def test_listen_with_one_address_in_use_closes_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, (V4, "127.0.0.1"), (V4, "127.0.0.2"))
    with socket.create_server(("127.0.0.2", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ListenError) as caught:
            listen_tcp("web01", port)
        assert caught.value.in_use
        socket.create_server(("127.0.0.1", port)).close()  # free, although the error and its traceback still exist
