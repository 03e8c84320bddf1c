"""The principals of clients decide by the rules of the access file, on each kind of listener."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import pytest

from support.certificates import make_client, server_files
from support.daemonlog import DEADLINE
from support.harpcallerd import Harpcallerd, LineClient
from support.peers import Peer
from support.scripted import scripted_harpd

RULES = """
[roles]
web = []

[[rule]]
who = ["token:shop"]
allow = ["call", "read"]
procedures = ["echo", "shop"]

[[rule]]
who = ["role:web"]
allow = ["call", "read"]
procedures = ["web"]

[[rule]]
who = ["cert:*.ops.example.net"]
allow = ["call", "read"]
procedures = ["ops"]

[[rule]]
who = ["uid:root"]
allow = ["call", "read"]
procedures = ["local"]

[[rule]]
who = ["anonymous@127.0.0.1:*"]
allow = ["call", "read"]
procedures = ["free"]
"""


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    with scripted_harpd(tmp_path_factory.mktemp("harpd")) as peer:
        yield peer


class Listeners(Harpcallerd):
    """A dispatcher with a plain listener, one with TLS, and a Unix socket."""

    def configure(self, settings: Any) -> None:
        super().configure(settings)
        pki = self.directory / "pki"
        tls = (
            f'tls = {{certfile = "{pki}/server.pem", keyfile = "{pki}/server.key", client_ca_file = "{pki}/ca.pem"}}\n'
        )
        with self.config_file.open("a") as file:
            file.write(tls)

    def start(self) -> Listeners:
        super().start()
        tcp = [event["port"] for event in self.events("harpcallerd is serving") if "port" in event]
        self.plain_port, self.tls_port = tcp
        return self

    @contextmanager
    def plain(self) -> Iterator[LineClient]:
        with LineClient(socket.create_connection((self.host, self.plain_port), DEADLINE)) as client:
            yield client

    @contextmanager
    def unix(self) -> Iterator[LineClient]:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(DEADLINE)
        connection.connect(str(self.directory / "calls"))
        with LineClient(connection) as client:
            yield client

    @contextmanager
    def tls(self, *names: str) -> Iterator[LineClient]:
        context = ssl.create_default_context(cafile=self.directory / "pki" / "ca.pem")
        if names:
            context.load_cert_chain(*make_client(self.directory / "pki", *names))
        connection = socket.create_connection((self.host, self.tls_port), DEADLINE)
        with LineClient(context.wrap_socket(connection, server_hostname="localhost")) as client:
            yield client


@pytest.fixture(scope="module")
def dispatcher(tmp_path_factory: pytest.TempPathFactory, peer: Peer) -> Iterator[Listeners]:
    directory = tmp_path_factory.mktemp("principals")
    (directory / "pki").mkdir()
    server_files(directory / "pki")
    (directory / "access.toml").write_text(RULES)
    listen = ["127.0.0.1:0", "tls:127.0.0.1:0", f"unix:{directory}/calls"]
    settings = {"listen": listen, "access_file": "access.toml", "tokens_file": "tokens"}
    with Listeners(directory, {"web01": peer.port}, settings=settings) as dispatcher:
        yield dispatcher


def add(dispatcher: Listeners, name: str, *options: str) -> str:
    done = dispatcher.control("token", "add", name, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def may_call(client: LineClient, procedure: str, token: str | None) -> bool:
    """Return whether a client may call a procedure."""
    call = {"host": "web01", "procedure": procedure, "arguments": []}
    auth = {} if token is None else {"auth": {"token": token}}
    client.send({"harpcaller": 1, "submit_many": [call], **auth})
    reply = client.message()
    assert "job_ids" in reply or reply["error"]["type"] == "access_denied", reply
    return "job_ids" in reply


PROCEDURES = ("echo", "shop", "web", "ops", "local", "free")


def test_each_principal_may_call_what_its_rules_allow(dispatcher: Listeners) -> None:
    tokens = {"nobody": None, "shop": add(dispatcher, "shop"), "web": add(dispatcher, "w1", "--role=web")}
    connect: dict[str, Callable[[], AbstractContextManager[LineClient]]] = {
        "plain": dispatcher.plain,
        "unix": dispatcher.unix,
        "ops": partial(dispatcher.tls, "DNS:alice.ops.example.net"),
        "other": partial(dispatcher.tls, "DNS:alice.example.net"),
    }
    allowed: dict[tuple[str, str], set[str]] = {}
    for name, token in tokens.items():
        for way in connect:
            allowed[name, way] = set()
            for procedure in PROCEDURES:
                with connect[way]() as client:
                    if may_call(client, procedure, token):
                        allowed[name, way].add(procedure)
    by_token: dict[str, set[str]] = {"nobody": set(), "shop": {"echo", "shop"}, "web": {"web"}}
    user = {"local"} if os.geteuid() == 0 else set()
    by_way: dict[str, set[str]] = {"plain": {"free"}, "unix": user, "ops": {"ops"}, "other": set()}
    assert allowed == {(name, way): by_token[name] | by_way[way] for name in by_token for way in by_way}


def test_job_belongs_to_the_token_on_every_listener(dispatcher: Listeners) -> None:
    """A job is read with the token that submitted it, and is unknown to others."""
    mine, other = add(dispatcher, "mine", "--role=web"), add(dispatcher, "theirs", "--role=web")
    with dispatcher.plain() as client:
        call = {"host": "web01", "procedure": "web", "arguments": []}
        client.send({"harpcaller": 1, **call, "auth": {"token": mine}})
        job = client.message()["job_id"]
    for connect in (dispatcher.plain, dispatcher.unix, dispatcher.tls):
        for token, expected in ((mine, "call"), (other, "error")):
            with connect() as client:
                client.send({"harpcaller": 1, "get_status": job, "auth": {"token": token}})
                reply = client.message()
            assert expected in reply
            assert reply.get("error", {}).get("type") in (None, "invalid_jobid")
