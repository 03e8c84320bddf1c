"""TLS to the dispatcher, tokens and refusals of the client. Each test uses both shells, unless it says otherwise."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import harp
from harp import aio
from harp._core.connections import DispatcherTLS
from harp._net.sockets import dispatcher_context
from harp_daemon.certificates import make_certificate
from support.certificates import Certificates, server_files
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd
from support.peers import Peer, PeerConnection, answering, keeping, server_context
from support.scripted import scripted_harpd
from support.shells import Shell

JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"
TOKEN = "harp_shop_" + "5e" * 32
SUBMITTED = {"harpcaller": 1, "job_id": JOB}


class Dispatcher(Harpcallerd):
    """A dispatcher with tokens, and with TLS, plain and Unix listeners."""

    def __init__(self, directory: Path, hosts: dict[str, int], **tls: str) -> None:
        pki = directory / "pki"
        pki.mkdir()
        self.files = server_files(pki)
        listen = ["tls:127.0.0.1:0", "127.0.0.1:0", f"unix:{directory / 'calls'}"]
        certificates = {"certfile": str(self.files.certfile), "keyfile": str(self.files.keyfile), **tls}
        super().__init__(directory, hosts, settings={"listen": listen, "tls": certificates, "tokens_file": "tokens"})

    def address(self, kind: str) -> tuple[str, int]:
        """Return host and port of the listener ``tls``, ``plain`` or ``unix``."""
        tls, plain, _ = self.events("harpcallerd is serving")
        if kind == "unix":
            return f"unix:{self.directory / 'calls'}", 3502
        return "localhost", (tls if kind == "tls" else plain)["port"]

    def add_token(self, name: str) -> str:
        done = self.control("token", "add", name)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def revoke(self, name: str) -> None:
        done = self.control("token", "revoke", name)
        assert done.returncode == 0, done.stderr

    def make_client(self, name: str) -> tuple[Path, Path]:
        """Issue a client's certificate; return it and its key."""
        make_certificate(self.files.ca_file.parent, [name], client=True)
        return self.files.ca_file.with_name(f"{name}.pem"), self.files.ca_file.with_name(f"{name}.key")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    with scripted_harpd(tmp_path_factory.mktemp("harpd")) as peer:
        yield peer


@pytest.fixture(scope="module")
def dispatcher(tmp_path_factory: pytest.TempPathFactory, host: Peer) -> Iterator[Dispatcher]:
    with Dispatcher(tmp_path_factory.mktemp("d"), {"web01": host.port}) as found:
        yield found


@pytest.fixture
def files(tmp_path: Path) -> Certificates:
    return server_files(tmp_path)


# TLS.


@pytest.mark.parametrize("keep_alive", [None, True, False])
@pytest.mark.parametrize("kind", ["tls", "plain", "unix"])
def test_client_with_token_can_do_everything(
    shell: Shell, dispatcher: Dispatcher, kind: str, keep_alive: bool | None
) -> None:
    token = dispatcher.add_token(f"{type(shell).__name__}-{kind}-{keep_alive}")
    tls: dict[str, Any] = {"ca_file": dispatcher.files.ca_file} if kind == "tls" else {}
    rpc = shell.caller_at(*dispatcher.address(kind), token=token, keep_alive=keep_alive, **tls)
    job = rpc.web01.count(3)
    assert job.follow(since=0).all() == [0, 1, 2]
    assert rpc.job(job.id()).get() == "counted"
    assert rpc.job(job.id()).stream().all() == [0, 1, 2]
    assert job.procedure() == "count"
    assert job.cancel() is False
    assert rpc.request({"get_result": job.id(), "wait": False}) == {"result": "counted"}
    assert len(rpc.submit_many([harp.Call("web01", "echo", [1])] * 2)) == 2
    with rpc.connect() as conn:
        conn.send({"harpcaller": 1, "auth": {"token": token}, "get_result": job.id()})
        assert conn.receive() == {"result": "counted"}


@pytest.mark.parametrize("tls", ["ca_file", "context", "default authorities"])
def test_tls_server_is_verified(shell: Shell, files: Certificates, tls: str) -> None:
    """The name in the certificate must be that of the server, and its authority must be trusted."""
    options: dict[str, Any] = {"ca_file": files.ca_file}
    if tls == "context":
        options = {"tls": ssl.create_default_context(cafile=files.ca_file)}
    elif tls == "default authorities":
        options = {"tls": True}
    with Peer(always=answering(SUBMITTED), tls=server_context(files)) as peer:
        if tls == "default authorities":
            with pytest.raises(harp.CommunicationError, match=r"certificate is not accepted: .*ca_file"):
                shell.caller(peer, token=TOKEN, **options).web01.p()
        else:
            assert shell.caller(peer, token=TOKEN, **options).web01.p().id() == JOB
    make_certificate(files.ca_file.parent, ["other.example.net"])
    other = Certificates(
        files.ca_file, *(files.ca_file.with_name(f"other.example.net.{end}") for end in ("pem", "key"))
    )
    with Peer(always=answering(SUBMITTED), tls=server_context(other)) as peer:
        with pytest.raises(harp.CommunicationError, match="certificate is not accepted"):
            shell.caller(peer, token=TOKEN, **options).web01.p()
        assert not peer.requests


def test_tls_versions_below_1_2_are_refused(shell: Shell, files: Certificates) -> None:
    context = server_context(files)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with Peer(always=answering(SUBMITTED), tls=context) as peer:
        with pytest.raises(harp.CommunicationError, match="TLS handshake"):
            shell.caller(peer, ca_file=files.ca_file).web01.p()
        assert not peer.requests


def test_tls_on_one_side_only_is_explained(shell: Shell, dispatcher: Dispatcher) -> None:
    plain = shell.caller_at(*dispatcher.address("tls"))
    with pytest.raises(harp.RequestRefused, match="this listening address requires TLS; see ca_file"):
        plain.web01.echo()
    with pytest.raises(harp.CommunicationError, match="TLS handshake"):
        shell.caller_at(*dispatcher.address("plain"), ca_file=dispatcher.files.ca_file, request_timeout=5).web01.echo()


def test_tls_client_certificate_proves_the_client(shell: Shell, tmp_path: Path, files: Certificates) -> None:
    make_certificate(tmp_path, ["client.example.net"], client=True)
    certfile, keyfile = tmp_path / "client.example.net.pem", tmp_path / "client.example.net.key"
    both = tmp_path / "both.pem"
    both.write_bytes(certfile.read_bytes() + keyfile.read_bytes())
    context = server_context(files)
    context.load_verify_locations(files.ca_file)
    context.verify_mode = ssl.CERT_REQUIRED
    with Peer(always=answering(SUBMITTED), tls=context) as peer:
        certificates: list[dict[str, Any]] = [{"certfile": certfile, "keyfile": str(keyfile)}, {"certfile": both}]
        for options in certificates:
            assert shell.caller(peer, ca_file=files.ca_file, **options).web01.p().id() == JOB
        with pytest.raises(harp.CommunicationError, match=r"use certfile|closed the connection|reset"):
            shell.caller(peer, ca_file=files.ca_file).web01.p()


def test_tls_changed_client_certificate_is_used(shell: Shell, tmp_path: Path, files: Certificates) -> None:
    """A waiting connection of the old certificate is not used."""
    pair = tmp_path / "client.pem", tmp_path / "client.key"

    def renew(name: str) -> None:
        make_certificate(tmp_path, [name], client=True)
        for suffix, path in zip(("pem", "key"), pair, strict=True):
            shutil.copy(tmp_path / f"{name}.{suffix}", path)

    context = server_context(files)
    context.load_verify_locations(files.ca_file)
    context.verify_mode = ssl.CERT_REQUIRED
    granted = {**SUBMITTED, "keep_alive": 60}
    names: list[str] = []

    def serve(conn: PeerConnection) -> None:
        assert isinstance(conn.sock, ssl.SSLSocket)
        names.append(str(conn.sock.getpeercert()))
        keeping([granted], [granted])(conn)

    with Peer(always=serve, tls=context) as peer:
        options = {"certfile": pair[0], "keyfile": pair[1], "ca_file": files.ca_file, "keep_alive": True}
        renew("first.example.net")
        files_of_client = DispatcherTLS(str(files.ca_file), *map(str, pair))
        wait_until(
            lambda: dispatcher_context(files_of_client) is dispatcher_context(files_of_client),
            what="the age of the files",
        )
        rpc = shell.caller(peer, **options)
        rpc.web01.p()
        rpc.web01.p()
        assert len(names) == 1
        renew("second.example.net")
        rpc.web01.p()
        assert ["first.example.net" in name for name in names] == [True, False]


INVALID: list[tuple[dict[str, Any], str]] = [
    ({"keyfile": "k.pem"}, "keyfile: it needs certfile"),
    ({"ca_file": 5}, "ca_file: expected the path of a file, got 5"),
    ({"tls": False, "ca_file": "ca.pem"}, "ca_file: it cannot be used: tls is False"),
    ({"tls": ssl.create_default_context(), "certfile": "c.pem"}, "certfile: it cannot be used: the context of tls"),
    ({"tls": "yes"}, "tls: expected True, False or an ssl.SSLContext, got 'yes'"),
    ({"host": "unix:/calls", "tls": True}, "tls: a Unix socket has no TLS"),
    ({"token": ""}, "token: expected 1 to 200 characters"),
    ({"token": TOKEN + "\n"}, "token: expected 1 to 200 characters without white space"),
    ({"token": TOKEN * 4}, "token: expected 1 to 200 characters"),
    ({"token": 5}, "token: expected a string, got int"),
]


@pytest.mark.parametrize("kind", [harp.HarpCaller, aio.AsyncHarpCaller])
@pytest.mark.parametrize(("options", "message"), INVALID)
def test_invalid_option_is_named(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(harp.HarpException, match=f"^{message}") as caught:
        kind(**{"host": "localhost", **options})
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ca_file": "absent"}, "ca_file 'absent': No such file"),
        ({"ca_file": "empty"}, "ca_file 'empty': contains no certificate in PEM form"),
        ({"certfile": "absent", "keyfile": "client.key"}, "certfile 'absent': No such file"),
        ({"certfile": "ca.pem"}, "certfile 'ca.pem': has no certificate with its key"),
        ({"certfile": "ca.pem", "keyfile": "client.key"}, "certfile 'ca.pem': .*keyfile 'client.key' is not its key"),
        ({"certfile": "client.pem", "keyfile": "locked.key"}, "keyfile: the key has a passphrase"),
    ],
)
def test_unusable_file_is_named(
    shell: Shell,
    tmp_path: Path,
    files: Certificates,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, str],
    message: str,
) -> None:
    make_certificate(tmp_path, ["client"], client=True)
    (tmp_path / "empty").touch()
    lock = ["openssl", "ec", "-in", "client.key", "-aes128", "-passout", "pass:x", "-out", "locked.key"]
    subprocess.run(lock, cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    with Peer(tls=server_context(files)) as peer, pytest.raises(harp.HarpException, match=message):
        shell.caller(peer, **options).web01.p()


# Tokens.


def test_token_is_in_the_first_request_of_each_connection(shell: Shell) -> None:
    granted = {**SUBMITTED, "keep_alive": 60}
    auth = {"auth": {"token": TOKEN}}
    with Peer(keeping([granted]), answering({"error": {"type": "internal_error", "message": "m"}})) as peer:
        other = shell.caller(peer, keep_alive=True)
        rpc = shell.caller(peer, keep_alive=True, token=TOKEN)
        rpc.web01.p()
        with pytest.raises(harp.RequestRefused):
            other.web01.p()  # does not use the connection of a token
        assert [request.get("auth") for request in peer.requests] == [auth["auth"], None]
    with Peer(keeping([granted], [granted]), always=answering({"packet": 0, "data": 0}, {"result": 1})) as peer:
        rpc = shell.caller(peer, keep_alive=True, token=TOKEN)
        rpc.web01.p()
        rpc.web01.p()
        assert rpc.job(JOB).follow(since=0).all() == [0]
        assert rpc.request({"get_result": JOB}) == {"packet": 0, "data": 0}
        expected = [auth["auth"], None, auth["auth"], auth["auth"]]
        assert [request.get("auth") for request in peer.requests] == expected


def test_token_is_sent_again_after_a_lost_connection(shell: Shell) -> None:
    """The first connection waits and is then cut; so is a stream."""
    status = {"call": {"host": "h", "procedure": "p", "arguments": []}, "time": {"submit": 1}, "info": None}

    def first(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply({"cancelled": True, "keep_alive": 60})
        conn.expect()

    with Peer(first, answering({"packet": 0, "data": 0}), always=answering({"result": 1})) as peer:
        rpc = shell.caller(peer, keep_alive=True, token=TOKEN)
        assert rpc.job(JOB).cancel()
        assert rpc.job(JOB).follow(since=0).all() == [0]
        peer.play_next(answering(status))
        assert rpc.job(JOB).host() == "h"
    auths = [request["auth"]["token"] for conn in peer.connections for request in [json.loads(conn.received[0])]]
    assert auths == [TOKEN] * len(auths)
    assert len(auths) == 4


_ON_A_NETWORK = """
import asyncio, socket, sys, threading
import harp
from harp import aio

async def ask(rpc):
    return await rpc.web01.p()

with socket.create_server(("192.0.2.1", 0)) as server:
    port = server.getsockname()[1]
    received = []
    def serve():
        while True:
            connection, _ = server.accept()
            with connection:
                received.append(connection.recv(100))
    threading.Thread(target=serve, daemon=True).start()
    calls = lambda rpc: rpc.web01.p(), lambda rpc: rpc.job("x").follow(since=0).all(), lambda rpc: rpc.request({})
    for call in calls:
        try:
            call(harp.HarpCaller("192.0.2.1", port, token=sys.argv[1], keep_alive=False))
        except harp.HarpException as error:
            print(type(error).__name__, error)
    try:
        harp.HarpCaller("192.0.2.1", port).web01.p(harp.Secret(sys.argv[1]))
    except harp.HarpException as error:
        print(type(error).__name__, str(error).replace("secret value", "token"))
    try:
        asyncio.run(ask(aio.AsyncHarpCaller("192.0.2.1", port, token=sys.argv[1])))
    except harp.HarpException as error:
        print(type(error).__name__, error)
    socket.create_connection(("192.0.2.1", port)).close()
    while len(received) < 6:
        pass
    assert not any(received), received
"""


def test_token_is_not_sent_over_a_network_without_tls() -> None:
    """Once for both shells, in a network namespace: other addresses than loopback do not leave it."""
    network = "ip link set lo up && ip address add 192.0.2.1/32 dev lo || exit 99\n"
    command = ["unshare", "--net", "sh", "-c", network + 'exec "$@"', "sh", sys.executable, "-c", _ON_A_NETWORK, TOKEN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"PATH": os.defpath})
    if done.returncode in (1, 99) and "Traceback" not in done.stderr:
        pytest.skip(f"no network namespace: {done.stderr}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    for line in lines:
        assert line.startswith("HarpException 192.0.2.1:")
        assert "the token was not sent: the connection has no TLS; use ca_file or tls=True" in line
    assert TOKEN not in done.stdout


def test_revoked_token_ends_reading_with_a_clear_error(shell: Shell, dispatcher: Dispatcher) -> None:
    """A stream in progress, a wait for a result, and later requests; none is a job's end."""
    name = f"leaver-{type(shell).__name__}"
    token = dispatcher.add_token(name)
    rpc = shell.caller_at(*dispatcher.address("tls"), token=token, ca_file=dispatcher.files.ca_file, keep_alive=None)
    job = rpc.web01.hang()
    records = job.follow(since=0)
    wait_until(lambda: job.start_time() is not None, what="the start")
    dispatcher.revoke(name)
    begin = time.monotonic()
    for read in (lambda: next(records), lambda: next(records), job.get, rpc.web01.echo, job.why):
        with pytest.raises(harp.AuthenticationFailed, match=r"^auth_error: the token") as caught:
            read()
        assert token not in str(caught.value)
    assert time.monotonic() - begin < 60  # reconnecting would take 300 s
    assert isinstance(job.result(wait=True), harp.AuthenticationFailed)
    colleague = shell.caller_at(*dispatcher.address("plain"), token=dispatcher.add_token(f"not-{name}"))
    assert colleague.job(job.id()).result() is harp.CALL_NOT_FINISHED
    assert colleague.job(job.id()).cancel()


def test_wrong_token_is_refused_without_repetition(shell: Shell, dispatcher: Dispatcher) -> None:
    rpc = shell.caller_at(*dispatcher.address("plain"), token=TOKEN)
    with pytest.raises(harp.AuthenticationFailed) as caught:
        rpc.job(JOB).get()
    assert TOKEN not in repr(caught.value)
    assert isinstance(caught.value, harp.RequestRefused)


def test_follower_with_certificate_survives_changed_authorities(
    shell: Shell, tmp_path: Path, host: Peer, request: pytest.FixtureRequest
) -> None:
    """The dispatcher closes all connections with certificates when its list of authorities has changed."""
    with ExitStack() as stack:
        pki = tmp_path / "d" / "pki"
        directory = tmp_path / "d"
        directory.mkdir()
        authorities = directory / "authorities.pem"
        shutil.copy(server_files(tmp_path).ca_file, authorities)
        dispatcher = stack.enter_context(Dispatcher(directory, {"web01": host.port}, client_ca_file=str(authorities)))
        certfile, keyfile = dispatcher.make_client("alice.example.net")
        options: dict[str, Any] = {"ca_file": pki / "ca.pem", "certfile": certfile, "keyfile": keyfile}
        rpc = shell.caller_at(*dispatcher.address("tls"), **options)
        job = rpc.web01.feed(1)
        records = job.follow(since=0)
        assert next(records) == 1
        with authorities.open("ab") as file:
            file.write(b"\n# changed\n")
        with pytest.raises(harp.AuthenticationFailed) as caught:
            shell.caller_at(*dispatcher.address("tls"), **options, reconnect=0).job(job.id()).get()
        assert caught.value.retry_after == 0  # and the follower gets the same refusal
        assert job.cancel()
        assert records.all() == []
        assert job.result() is harp.CALL_CANCELLED


# Refusals.


REFUSALS = {
    "auth_error": harp.AuthenticationFailed,
    "access_denied": harp.AccessDenied,
    "rate_limited": harp.RateLimited,
}


def refusing(kind: str, *before: object, **members: Any) -> Any:
    return answering(*before, {"error": {"type": kind, "message": "no", "refused": True, **members}})


WAITS: list[Callable[[Any], Any]] = [lambda job: job.get(), lambda job: job.follow(since=0).all()]


@pytest.mark.parametrize("kind", ["auth_error", "access_denied"])
@pytest.mark.parametrize("wait", WAITS)
def test_refused_reader_without_permission_is_not_repeated(shell: Shell, kind: str, wait: Callable[[Any], Any]) -> None:
    with Peer(refusing(kind)) as peer, pytest.raises(REFUSALS[kind], match=f"^{kind}: no$") as caught:
        wait(shell.caller(peer, token=TOKEN).job(JOB))
    assert caught.value.retry_after is None


@pytest.mark.parametrize("kind", REFUSALS)
@pytest.mark.parametrize("wait", WAITS)
def test_refused_reader_is_repeated_after_retry_after(shell: Shell, kind: str, wait: Callable[[Any], Any]) -> None:
    scripts = refusing(kind, retry_after=0.5), answering({"result": 5})
    with Peer(*scripts) as peer:
        begin = time.monotonic()
        wait(shell.caller(peer, token=TOKEN).job(JOB))
        assert time.monotonic() - begin >= 0.5


@pytest.mark.parametrize("kind", REFUSALS)
def test_refusal_is_never_an_end(shell: Shell, kind: str) -> None:
    """Not stored as the end of the job, nor the end of a stream; and the same error as a job's end is one."""
    packet = {"packet": 0, "data": 0}
    end = {"error": {"type": kind, "message": "of harpd"}}
    scripts = refusing(kind), refusing(kind, packet, retry_after=2.5), refusing(kind), answering(end)
    with Peer(*scripts) as peer:
        job = shell.caller(peer, token=TOKEN, reconnect=0).job(JOB)
        assert isinstance(job.result(wait=True), REFUSALS[kind])
        records = job.follow(since=0)
        assert next(records) == 0
        for _ in range(2):
            with pytest.raises(REFUSALS[kind]) as caught:
                next(records)
            assert caught.value.retry_after == 2.5
        assert isinstance(job.result(), REFUSALS[kind])
        assert isinstance(job.result(), harp.RemoteError)
        assert isinstance(job.result(), harp.RemoteError)  # stored


def test_rate_limited_request_id_is_repeated_after_lost_reply(shell: Shell) -> None:
    scripts = [answering(), refusing("rate_limited", retry_after=0.1), answering(SUBMITTED)]
    asked = answering({"harpcaller": 1, "job_ids": []})
    with Peer(scripts[0], asked, *scripts[1:]) as peer:
        assert shell.caller(peer, token=TOKEN).host("web01", request_id="r").p().id() == JOB
    with Peer(answering(), asked, refusing("access_denied")) as peer:
        with pytest.raises(harp.AccessDenied) as caught:
            shell.caller(peer, token=TOKEN).host("web01", request_id="r").p()
        assert caught.value.__notes__ == ["the submission was repeated: an earlier request may have become a job"]
    with Peer(refusing("rate_limited", retry_after=7)) as peer:
        with pytest.raises(harp.RateLimited) as limited:
            shell.caller(peer, token=TOKEN).host("web01", request_id="r").p()
        assert limited.value.retry_after == 7


def test_request_on_a_connection_that_is_void_is_sent_again(shell: Shell) -> None:
    """The dispatcher uses other certificates now: it refuses requests on the connections of before."""
    granted, void = {**SUBMITTED, "keep_alive": 60}, {"error": {"type": "auth_error", "message": "m", "refused": True}}
    again = {"error": {**void["error"], "retry_after": 0}}
    with Peer(keeping([granted], [again]), keeping([granted], [granted], [void])) as peer:
        rpc = shell.caller(peer, keep_alive=True, token=TOKEN)
        for _ in range(3):
            assert rpc.web01.p().id() == JOB
        with pytest.raises(harp.AuthenticationFailed):
            rpc.web01.p()
    assert [len(conn.received) for conn in peer.connections] == [2, 3]
    with Peer(answering(again)) as peer, pytest.raises(harp.AuthenticationFailed):
        shell.caller(peer, keep_alive=True, token=TOKEN).web01.p()


def test_legacy_dispatcher_is_named_as_too_old_for_tokens(shell: Shell) -> None:
    with Peer(answering()) as peer, pytest.raises(harp.CommunicationError, match="may be too old for tokens"):
        shell.caller(peer, token=TOKEN).web01.p()


# Where a token must not be.


@pytest.mark.parametrize("kind", [harp.HarpCaller, aio.AsyncHarpCaller])
def test_token_is_in_no_repr_and_no_pickle(kind: Any) -> None:
    rpc = kind("localhost", token=TOKEN, tls=ssl.create_default_context())
    for each in (rpc, rpc.web01, rpc.web01.p, rpc.job(JOB)):
        assert TOKEN not in repr(each)
        assert TOKEN not in repr(vars(rpc))
        with pytest.raises(TypeError):
            pickle.dumps(each)
        assert "token='***', tls=True" in repr(copy.copy(each))
        assert "token='***', tls=True" in repr(copy.deepcopy(each))
    with pytest.raises(TypeError, match="cannot be pickled: a pickle would contain it"):
        pickle.dumps(kind("localhost", token=TOKEN))
    same = pickle.loads(pickle.dumps(kind("localhost", ca_file="ca.pem")))
    assert "tls=True" in repr(same)


@pytest.mark.parametrize("kind", REFUSALS)
def test_refusal_can_be_pickled(kind: str) -> None:
    error = REFUSALS[kind](kind, "no")
    error.retry_after = 2.0
    same = pickle.loads(pickle.dumps(error))
    assert (type(same), str(same), same.retry_after) == (type(error), f"{kind}: no", 2.0)


# Rules of a real dispatcher.

RULES = """
[[rule]]
who = ["token:limited"]
allow = ["call", "read"]
procedures = ["count"]
rate = "1/h"

[[rule]]
who = ["token:shop"]
allow = ["call", "read", "cancel"]
procedures = ["echo"]
"""


@pytest.fixture(scope="module")
def ruled(tmp_path_factory: pytest.TempPathFactory, host: Peer) -> Iterator[Harpcallerd]:
    directory = tmp_path_factory.mktemp("ruled")
    (directory / "access.toml").write_text(RULES)
    settings = {"tokens_file": "tokens", "access_file": str(directory / "access.toml")}
    with Harpcallerd(directory, {"web01": host.port}, settings=settings) as found:
        yield found


def test_rules_of_a_dispatcher_raise_their_errors(shell: Shell, ruled: Harpcallerd) -> None:
    """A call that no rule allows, in one and in many; jobs of others; a limit; a client without a token."""

    def caller(name: str | None) -> Any:
        token = None if name is None else ruled.control("token", "add", name).stdout.strip()
        return shell.caller_at(ruled.host, ruled.port, token=token)

    try:
        shop, limited = caller("shop"), caller("limited")
        job = shop.web01.echo(5)
        assert job.get() == [5]
        for submit in (shop.web01.count, lambda _: shop.submit_many([harp.Call("web01", "count", [1])])):
            with pytest.raises(harp.AccessDenied, match=r"^access_denied: ") as denied:
                submit(1)
            assert denied.value.retry_after is None
        for read in (limited.job(job.id()).get, limited.job(job.id()).follow(since=0).all):
            with pytest.raises(harp.RemoteError, match="invalid_jobid"):
                read()
        with pytest.raises(harp.RateLimited, match=r"^rate_limited: ") as refused:
            for _ in range(3):
                limited.web01.count(1)
        assert refused.value.retry_after is not None
        assert 0 < refused.value.retry_after <= 3600
        end = caller(None).web01.echo(5).result(wait=True)  # such a job ends when it is submitted
        assert (type(end), end.type) == (harp.RemoteError, "access_denied")
    finally:
        for name in ("shop", "limited"):
            ruled.control("token", "revoke", name)
