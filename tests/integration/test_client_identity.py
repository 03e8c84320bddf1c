"""Who a client is: tokens over each kind of listener, users of Unix sockets, and the loss of rights."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.daemonlog import DEADLINE
from support.harpcallerd import Harpcallerd, LineClient
from support.peers import Peer
from support.scripted import scripted_harpd

UNKNOWN = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    with scripted_harpd(tmp_path_factory.mktemp("harpd")) as peer:
        yield peer


@pytest.fixture
def dispatcher(tmp_path: Path, peer: Peer) -> Iterator[Harpcallerd]:
    with Harpcallerd(tmp_path, {"web01": peer.port}, settings={"tokens_file": "tokens"}) as dispatcher:
        yield dispatcher


def add(dispatcher: Harpcallerd, name: str, *options: str) -> str:
    """Add a token; return its text."""
    done = dispatcher.control("token", "add", name, *options)
    assert done.returncode == 0, done.stderr
    assert "not shown again" in done.stderr
    return done.stdout.strip()


def revoke(dispatcher: Harpcallerd, name: str) -> None:
    done = dispatcher.control("token", "revoke", name)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def request(token: str | None = None, **members: Any) -> dict[str, Any]:
    auth = {} if token is None else {"auth": {"token": token}}
    return {"harpcaller": 1, **members, **auth}


def error_type(reply: Any) -> str:
    assert reply["error"]["refused"] is True
    return str(reply["error"]["type"])


def test_token_authenticates_each_kind_of_request(dispatcher: Harpcallerd) -> None:
    token = add(dispatcher, "shop")
    (submitted,) = dispatcher.ask(host="web01", procedure="count", arguments=[2], auth={"token": token})
    job = submitted["job_id"]
    for members, expected in (
        ({"get_result": job}, [{"result": "counted"}]),
        ({"cancel": job}, [{"cancelled": False}]),
        ({"get_result": job, "wait": False}, [{"result": "counted"}]),
        ({"follow_stream": job}, [{"result": "counted"}]),
        ({"submit_many": []}, [{"harpcaller": 1, "job_ids": []}]),
    ):
        assert dispatcher.ask(**members, auth={"token": token}) == expected
        [reply] = dispatcher.ask(**members, auth={"token": token[:-4] + "0000"})
        assert error_type(reply) == "auth_error"
    assert dispatcher.ask(cancel=job) == [{"cancelled": False}]  # a client without token is not affected


def test_wrong_tokens_are_refused_more_and_more_slowly(dispatcher: Harpcallerd) -> None:
    token = add(dispatcher, "shop")
    wrong = "harp_shop_" + "0" * 64
    times = []
    for _ in range(5):
        begin = time.monotonic()
        [reply] = dispatcher.ask(cancel=UNKNOWN, auth={"token": wrong})
        times.append(time.monotonic() - begin)
        assert reply["error"]["message"] == "the token is unknown, revoked or expired"
    assert times[4] >= 1.5
    with dispatcher.connect() as waiting:
        waiting.send(request(wrong, cancel=UNKNOWN))
        begin = time.monotonic()
        assert dispatcher.ask(cancel=UNKNOWN, auth={"token": token}) == [{"cancelled": False}]
        assert dispatcher.ask(cancel=UNKNOWN) == [{"cancelled": False}]
        assert time.monotonic() - begin < 3  # the wrong one waits for 3.2 s
        assert error_type(waiting.message()) == "auth_error"


def test_first_request_authenticates_the_connection(dispatcher: Harpcallerd) -> None:
    shop, other = add(dispatcher, "shop"), add(dispatcher, "other")
    usual = {"cancel": UNKNOWN, "keep_alive": True}
    accepted = {"cancelled": False, "keep_alive": 30}
    for second in (other, "x", shop[:-1]):
        with dispatcher.connect() as client:
            for token in (shop, None, shop):
                client.send(request(token, **usual))
                assert client.message() == accepted
            client.send(request(second, **usual))
            assert error_type(client.message()) == "auth_error"
            assert client.line() == b""
    with dispatcher.connect() as client:  # the first request was anonymous
        client.send(request(None, **usual))
        assert client.message() == accepted
        client.send(request(shop, **usual))
        assert error_type(client.message()) == "auth_error"


def test_revoked_token_loses_access_on_open_connections(dispatcher: Harpcallerd) -> None:
    leaver, colleague = add(dispatcher, "leaver"), add(dispatcher, "colleague")
    job = dispatcher.submit("web01", "hang")
    open_connections = []
    for token in (leaver, colleague):
        idle, following, waiting = (dispatcher.connect() for _ in range(3))
        idle.send(request(token, cancel=UNKNOWN, keep_alive=True))
        assert idle.message()["cancelled"] is False
        following.send(request(token, follow_stream=job))
        waiting.send(request(token, get_result=job))
        open_connections.append((idle, following, waiting))
    revoke(dispatcher, "leaver")
    begin = time.monotonic()
    idle, following, waiting = open_connections[0]
    assert idle.line() == b""
    for client in (following, waiting):
        reply = client.message()
        assert (error_type(reply), reply["error"]["message"]) == ("auth_error", "the token was revoked, or has expired")
        assert client.line() == b""
    assert time.monotonic() - begin < 1
    assert error_type(dispatcher.ask(cancel=job, auth={"token": leaver})[0]) == "auth_error"
    idle, following, waiting = open_connections[1]
    idle.send(request(None, cancel=job, keep_alive=True))
    assert idle.message()["cancelled"] is True
    assert following.message() == waiting.message() == {"cancelled": True}
    for client in (client for clients in open_connections for client in clients):
        client.close()


def test_revoked_token_is_refused_on_a_connection_that_sends(dispatcher: Harpcallerd) -> None:
    """Also in the time before the connection is closed."""
    token = add(dispatcher, "leaver")
    with dispatcher.connect() as client:
        client.send(request(token, cancel=UNKNOWN, keep_alive=True))
        assert client.message()["cancelled"] is False
        revoke(dispatcher, "leaver")
        try:
            client.send(request(token, cancel=UNKNOWN, keep_alive=True))
            line = client.line()
        except OSError:
            line = b""
        assert line == b"" or error_type(json.loads(line)) == "auth_error"


def test_expired_token_loses_access_on_open_connections(dispatcher: Harpcallerd) -> None:
    token = add(dispatcher, "guest", "--expires=0.0005h")
    job = dispatcher.submit("web01", "hang")
    with dispatcher.connect() as client:
        client.send(request(token, follow_stream=job))
        assert error_type(client.message()) == "auth_error"
    dispatcher.ask(cancel=job)


def test_token_is_changed_with_and_without_a_daemon(dispatcher: Harpcallerd) -> None:
    """As by an administrator whose control program does not reach the daemon."""

    def offline(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = dispatcher.command(*arguments, f"--config={dispatcher.config_file}", "--socket=/nonexistent/control")
        return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)

    done = offline("token", "add", "shop", "--role=web")
    token = done.stdout.strip()
    assert dispatcher.ask(cancel=UNKNOWN, auth={"token": token}) == [{"cancelled": False}]
    [listed] = [json.loads(line) for line in offline("token", "list").stdout.splitlines()]
    assert (listed["name"], listed["roles"], "sha256" in listed) == ("shop", ["web"], False)
    [listed] = dispatcher.listed("token", "list")
    assert listed["last_used"] is not None
    job = dispatcher.submit("web01", "hang")
    with dispatcher.connect() as following:
        following.send(request(token, follow_stream=job))
        assert offline("token", "revoke", "shop").returncode == 0
        assert error_type(following.message()) == "auth_error"
    done = offline("token", "revoke", "shop")
    assert (done.returncode, done.stderr) == (1, "harpcallerd: there is no token shop\n")
    dispatcher.ask(cancel=job)


def test_token_survives_a_restart_with_its_last_use(dispatcher: Harpcallerd) -> None:
    token = add(dispatcher, "shop")
    assert dispatcher.listed("token", "list")[0]["last_used"] is None
    dispatcher.ask(cancel=UNKNOWN, auth={"token": token})
    dispatcher.restart()
    assert dispatcher.listed("token", "list")[0]["last_used"] is not None
    assert dispatcher.ask(cancel=UNKNOWN, auth={"token": token}) == [{"cancelled": False}]


def test_token_appears_in_no_file_and_no_process(dispatcher: Harpcallerd) -> None:
    token = add(dispatcher, "shop")
    secret = token.rpartition("_")[2]
    wrong = "harp_shop_" + "5" * 64
    (submitted,) = dispatcher.ask(host="web01", procedure="echo", arguments=[1], auth={"token": token})
    dispatcher.ask(get_details=submitted["job_id"], auth={"token": token})
    dispatcher.ask(get_result=submitted["job_id"], auth={"token": token})
    for line in (
        request(wrong, cancel=UNKNOWN),
        request(secret, cancel=UNKNOWN),
        {**request(token), "host": 1},
        {"harpcaller": 1, "cancel": "x", "auth": {"token": [token]}},
        {"harpcaller": 1, "cancel": "x", "auth": {"token": token, "user": 1}},
        {"harpcaller": 1, "cancel": "x", "auth": token},
        json.dumps(request(token, cancel="x")).encode()[:-1] + b",\n",
        b'{"harpcaller":1,"cancel":"x","auth":{"token":"' + token.encode() + b'","token":"x"}}\n',
        b'{"harpcaller":1,"cancel":"x","auth":{"token":"' + token.encode() + b'\xff"}}\n',
    ):
        with dispatcher.connect() as client:
            client.send(line)
            assert secret not in str(client.lines())
    revoke(dispatcher, "shop")
    dispatcher.restart()
    for path in dispatcher.directory.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert secret.encode() not in data, path
            assert b"5" * 64 not in data, path
    assert secret not in str(psutil.Process(dispatcher.pid).cmdline())
    dispatcher.wait_event("client not authenticated", token="shop")


def test_token_over_plain_text_is_refused_and_reported(tmp_path: Path) -> None:
    """From an address that is not loopback, as in a network."""
    address = _own_address()
    settings = {"tokens_file": "tokens", "listen": ["127.0.0.1:0", f"{address}:0"]}
    with Harpcallerd(tmp_path, settings=settings) as dispatcher:
        token = add(dispatcher, "shop")
        port = dispatcher.wait_event("harpcallerd is serving", address=address)["port"]
        with LineClient(socket.create_connection((address, port), DEADLINE)) as client:
            client.send(request(token, cancel=UNKNOWN))
            reply = client.message()
        assert error_type(reply) == "auth_error"
        assert "over TLS, Unix sockets and from loopback addresses only" in reply["error"]["message"]
        dispatcher.wait_event("token sent in clear text; revoke it", token="shop")


def _own_address() -> str:
    """Return an address of this machine that is not loopback."""
    found = [one.address for nic in psutil.net_if_addrs().values() for one in nic if one.family == socket.AF_INET]
    others = [address for address in found if not address.startswith("127.")]
    if not others:
        pytest.skip("this machine has only loopback addresses")
    return others[0]


def test_token_without_tokens_file_is_refused(tmp_path: Path) -> None:
    with Harpcallerd(tmp_path) as dispatcher:
        [reply] = dispatcher.ask(cancel=UNKNOWN, auth={"token": "harp_shop_" + "0" * 64})
        assert "tokens_file is not set" in reply["error"]["message"]
        done = dispatcher.control("token", "add", "shop")
        assert (done.returncode, done.stderr) == (1, "harpcallerd: tokens_file is not set; set it and reload\n")
        dispatcher.configure({"tokens_file": "tokens"})
        assert dispatcher.reload()["event"] == "reloaded"
        token = add(dispatcher, "shop")
        with dispatcher.connect() as client:
            client.send(request(token, cancel=UNKNOWN, keep_alive=True))
            assert client.message()["cancelled"] is False
            assert dispatcher.reload()["event"] == "reloaded"  # open connections stay
            client.send(request(token, cancel=UNKNOWN, keep_alive=True))
            assert client.message()["cancelled"] is False
            (dispatcher.directory / "tokens").chmod(0o644)
            outcome = dispatcher.reload()
            assert "expected mode 0600" in outcome["reason"]
            client.send(request(token, cancel=UNKNOWN, keep_alive=True))
            assert client.message()["cancelled"] is False


# Unix sockets.


def test_unix_socket_serves_requests_and_tokens(tmp_path: Path) -> None:
    path = tmp_path / "calls"
    settings = {"tokens_file": "tokens", "listen": [f"unix:{path}"]}
    with Harpcallerd(tmp_path, settings=settings) as dispatcher:
        token = add(dispatcher, "shop")
        for number in range(3):  # the first one waits for the names of the user
            with LineClient(_connect_unix(path)) as client:
                client.send(request(token if number else None, cancel=UNKNOWN))
                client.half_close()
                assert client.messages() == [{"cancelled": False}]


def _connect_unix(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(DEADLINE)
    connection.connect(str(path))
    return connection
