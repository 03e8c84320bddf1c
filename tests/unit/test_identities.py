"""The principals of clients: of real TLS connections, and of users of Unix sockets."""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
import socket
import ssl
import threading
from pathlib import Path

import pytest

from harp_daemon.sockets import Listener
from harpcaller.access import AuthError
from harpcaller.access.accounts import Accounts, find_principals
from harpcaller.access.client import Client
from harpcaller.access.identities import Identities, anonymous, certified
from harpcaller.access.tokens import add_token
from harpcaller.config import Config, TLSFiles
from support.certificates import make_client, server_files
from support.deadline import eventually

TLS_CLIENT = Client(("anonymous@tls:*:3503",), "tls:*:3503", "192.0.2.1:5000")


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> ssl.SSLSocket:
    """Return the server's side of a connection, whose client has closed it."""
    left, right = socket.socketpair()

    def connect() -> None:
        with client.wrap_socket(right, server_hostname="localhost") as connection:
            connection.recv(1)  # TLS 1.3 sends the certificate's acceptance later

    thread = threading.Thread(target=connect)
    thread.start()
    try:
        accepted = server.wrap_socket(left, server_side=True)
        accepted.send(b"x")
        return accepted
    finally:
        thread.join()


@pytest.mark.parametrize(
    ("names", "principals"),
    [
        (["DNS:Alice.ops.example.net"], ["cert:alice.ops.example.net"]),
        (["email:alice@example.net", "DNS:a.example.net"], ["cert:alice@example.net", "cert:a.example.net"]),
        (["URI:spiffe://example.net/shop"], ["cert:spiffe://example.net/shop"]),
        (["DNS:*.ops.example.net"], ["cert:*.ops.example.net"]),
        (["URI:a b", "IP:192.0.2.1", "DNS:a", "DNS:a"], ["cert:a"]),
        # A name with the form of another kind: the rules for that kind would match it.
        (["URI:a.ops.example.net", "email:a.ops.example.net", "DNS:a@ops.example.net", "DNS:spiffe://a"], []),
        (["URI:a@ops.example.net", "URI:/a", "email:spiffe://a@b", "email:@b", "email:a@b@c"], []),
        (["IP:192.0.2.1"], []),
    ],
)
def test_certificate_of_a_client_has_its_names_as_principals(
    tmp_path: Path, names: list[str], principals: list[str]
) -> None:
    files = server_files(tmp_path)
    tls = TLSFiles(certfile=files.certfile, keyfile=files.keyfile, client_ca_file=files.ca_file)
    identities = Identities(Config(tls=tls))
    assert identities.tls is not None
    context = ssl.create_default_context(cafile=files.ca_file)
    with shake_hands(identities.tls.context, context) as connection:
        assert certified(TLS_CLIENT, connection) == TLS_CLIENT  # without a certificate
    context.load_cert_chain(*make_client(tmp_path, *names))
    with shake_hands(identities.tls.context, context) as connection:
        client = certified(TLS_CLIENT, connection)
    assert client.principals == (*principals, "anonymous@tls:*:3503")
    assert client.authenticated


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.root
def test_user_of_a_unix_socket_has_its_name_and_all_its_groups() -> None:
    user = next(user for user in pwd.getpwall() if user.pw_uid not in (0, 65534))
    groups = {grp.getgrgid(gid).gr_name for gid in os.getgrouplist(user.pw_name, user.pw_gid)}
    principals = find_principals(user.pw_uid)
    assert principals[0] == f"uid:{user.pw_name}"
    assert principals[1] == f"gid:{grp.getgrgid(user.pw_gid).gr_name}"
    assert set(principals[1:]) == {f"gid:{name}" for name in groups}


def test_user_without_a_name_has_its_number() -> None:
    assert find_principals(4_000_000) == ("uid:4000000",)


async def test_accounts_are_looked_up_once_for_many_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    release = threading.Event()

    def answer(uid: int) -> object:
        asked.append(uid)
        release.wait(30)
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", answer)  # as a directory service that is slow
    accounts = Accounts()
    lookups = [accounts.look_up(1234) for _ in range(5)]
    await eventually(lambda: bool(asked), what="the lookup")
    assert accounts.get_cached(1234) is None
    release.set()
    assert await asyncio.gather(*lookups) == [("uid:1234",)] * 5
    assert asked == [1234]
    assert accounts.get_cached(1234) == ("uid:1234",)


async def test_slow_directory_gets_few_renewals(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    release = threading.Event()

    def answer(uid: int) -> object:
        asked.append(uid)
        release.wait(30)
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", answer)
    accounts = Accounts()
    for uid in range(20):
        accounts.renew(uid)
    last = accounts.look_up(2000)  # a new client waits for its own
    await eventually(lambda: len(asked) == 3, what="the lookups")
    release.set()
    assert await last == ("uid:2000",)
    assert sorted(asked) == [0, 1, 2000]


def test_token_is_the_strongest_principal_and_has_roles(tmp_path: Path) -> None:
    config = Config(tokens_file=tmp_path / "tokens")
    text, _ = add_token(tmp_path / "tokens", "shop", ["web"])
    identities = Identities(config)
    local = Client(("uid:alice", "gid:users", "anonymous@unix:/x"), "unix:/x", "uid:1000")
    client, token = identities.of_token(local, text)
    assert client == Client(("token:shop", *local.principals), "unix:/x", "uid:1000", True, ("web",))
    assert client.owner == "token:shop"
    assert token.name == "shop"
    assert text not in repr(client)
    with pytest.raises(AuthError) as caught:
        identities.of_token(local, text[:-1])
    assert caught.value.delay == 0.1
    assert text[10:-1] not in f"{caught.value} {caught.value.reason} {caught.value.token}"


@pytest.mark.parametrize(
    ("listener", "peer", "accepted"),
    [
        ("127.0.0.1:3502", "127.0.0.1:1", True),
        ("*:3502", "127.3.2.1:1", True),
        ("*:3502", "[::1]:1", True),
        ("*:3502", "192.0.2.1:1", False),
        ("*:3502", "[2001:db8::1]:1", False),
        ("*:3502", "[fe80::1%eth0]:1", False),
        ("tls:*:3503", "192.0.2.1:1", True),
        ("unix:/x", "uid:1000", True),
    ],
)
def test_token_is_accepted_where_nobody_can_read_it(tmp_path: Path, listener: str, peer: str, accepted: bool) -> None:
    text, _ = add_token(tmp_path / "tokens", "shop")
    identities = Identities(Config(tokens_file=tmp_path / "tokens"))
    with socket.socket() as unused:
        client = anonymous(peer, Listener(unused, name=listener))
    if accepted:
        assert identities.of_token(client, text)[0].owner == "token:shop"
    else:
        with pytest.raises(AuthError, match="over TLS, Unix sockets and from loopback"):
            identities.of_token(client, text)


def test_reload_with_the_same_files_keeps_open_what_was_proven(tmp_path: Path) -> None:
    files = server_files(tmp_path)
    config = Config(tls=TLSFiles(certfile=files.certfile, keyfile=files.keyfile), tokens_file=tmp_path / "tokens")
    first = Identities(config)
    second = Identities(config, first)
    assert (second.tls, second.tokens) == (first.tls, first.tokens)
    other = Config(tls=config.tls, tokens_file=tmp_path / "others")
    assert Identities(other, second).tokens is not first.tokens
