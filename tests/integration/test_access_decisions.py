"""The decisions of a running dispatcher against the reference, for every kind of request and of connection.

No job starts: the hosts registry waits for a script that does not end. So each job stays queued until it is cancelled,
and a cancel has an effect that shows whether it was allowed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from harp.protocol.json_text import Raw, loads
from harp_daemon.certificates import make_certificate
from harpcaller.access.accounts import find_principals
from harpcaller.access.client import Client
from harpcaller.access.policy import Target
from harpcaller.access.tokens import add_token
from harpcaller.api.control_client import ControlClient
from support import access
from support.certificates import server_files
from support.daemonlog import DEADLINE
from support.harpcallerd import Harpcallerd, LineClient

UNKNOWN = "00000000-0000-4000-8000-000000000000"
ALL = {"roles": {}, "rule": [{"who": ["*"], "allow": ["call", "read", "cancel"], "jobs": "any"}]}
MAX_REFUSED = 16 * 1024  # bytes of a refused call that becomes a job; no call of these tests is near it
_SCRIPT = "#!/bin/sh\nexec sleep 3600\n"


@dataclass(frozen=True)
class Door:
    """A way to connect to the dispatcher: the principals that it gives, and the token of the requests, if any."""

    client: Client
    connect: Callable[[], socket.socket]
    token: str | None = None

    def open(self) -> LineClient:
        return LineClient(self.connect())

    def with_token(self, file: Path, name: str, *roles: str) -> Door:
        """Return this door for a client with a new token."""
        text, _ = add_token(file, name, roles)
        principals = (f"token:{name}", *self.client.principals)
        client = dataclasses.replace(self.client, principals=principals, authenticated=True, roles=roles)
        return Door(client, self.connect, text)

    def line(self, request: str, keep_alive: bool = False, with_token: bool = True) -> bytes:
        """Return the line of a request: the text of its members."""
        options = [', "keep_alive": true'] if keep_alive else []
        if self.token is not None and with_token:
            options.append(f', "auth": {json.dumps({"token": self.token})}')
        return b'{"harpcaller": 1, %b%b}\n' % (request.encode(), "".join(options).encode())


class Kept:
    """A keep-alive connection; it is opened again when the dispatcher has closed it."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._client: LineClient | None = None

    def ask(self, request: str) -> list[Any]:
        """Send a request; return the replies."""
        client = self._client
        is_first = client is None
        client = self._client = client or self._door.open()
        client.send(self._door.line(request, keep_alive=True, with_token=is_first))
        replies = []
        while line := client.line():
            replies.append(json.loads(line))
            if "keep_alive" in replies[-1]:
                return replies
        self.close()
        return replies

    def is_open(self) -> bool:
        return self._client is not None

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


def ask(door: Door, request: str) -> list[Any]:
    """Send a request on a connection of its own; return the replies."""
    with door.open() as client:
        client.send(door.line(request))
        return client.messages()


def _client(listener: str, *principals: str, is_certified: bool = False) -> Client:
    return Client((*principals, f"anonymous@{listener}"), listener, "", authenticated=is_certified)


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), DEADLINE)


class Service:
    """The running dispatcher, its doors and its access file."""

    def __init__(self, directory: Path) -> None:
        script = directory / "hosts-script"
        script.write_text(_SCRIPT)
        script.chmod(0o700)
        self.rules = directory / "access.toml"
        self.rules.write_text("")
        files = server_files(directory)
        make_certificate(directory, ["a.ops.example.net"], client=True)
        tls = {"certfile": str(files.certfile), "keyfile": str(files.keyfile), "client_ca_file": str(files.ca_file)}
        tokens = directory / "tokens"
        listen = ["127.0.0.1:0", "localhost:0", f"unix:{directory}/calls", "tls:127.0.0.1:0"]
        keys = {"listen": listen, "tls": tls, "tokens_file": str(tokens), "access_file": str(self.rules)}
        hosts = {"hosts_file": None, "host_db_script": str(script)}
        self.daemon = Harpcallerd(directory, settings=keys | hosts)
        self.daemon.start()
        self.control = ControlClient(self.daemon.socket)
        serving = self.daemon.events("harpcallerd is serving")
        # A name may have an IPv6 address, too.
        first, second, encrypted = (event["port"] for event in serving if event["address"] == "127.0.0.1")
        context = ssl.create_default_context(cafile=files.ca_file)
        context.load_cert_chain(directory / "a.ops.example.net.pem", directory / "a.ops.example.net.key")

        def connect_tls() -> socket.socket:
            return context.wrap_socket(_connect(encrypted), server_hostname="localhost")

        def connect_unix() -> socket.socket:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(directory / "calls"))
            connection.settimeout(DEADLINE)
            return connection

        plain, other = (
            Door(_client(listen[0]), lambda: _connect(first)),
            Door(_client(listen[1]), lambda: _connect(second)),
        )
        unix = Door(_client(listen[2], *find_principals(os.getuid())), connect_unix)
        certified = Door(_client(listen[3], "cert:a.ops.example.net", is_certified=True), connect_tls)
        self.doors = [plain, other, unix, certified]
        self.doors.append(plain.with_token(tokens, "shop", "web"))
        self.doors.append(unix.with_token(tokens, "shop2"))
        self.doors.append(certified.with_token(tokens, "shop3", "ops"))
        #: The principals of the doors, which rules should name often.
        self.principals = sorted({principal for door in self.doors for principal in door.client.principals})

    def use(self, document: dict[str, Any]) -> None:
        """Write the access file and reload."""
        self.rules.write_text(access.to_toml(document))
        list(self.control.send_command("reload"))

    def submit(self, door: Door, target: Target) -> str:
        """Submit a job that is allowed; return its id."""
        [reply] = ask(door, call(target))
        return str(reply["job_id"])

    def cancel(self, job: str) -> None:
        list(self.control.send_command("cancel", job=job))

    def end_of(self, job: str) -> Any:
        [item] = self.control.send_command("info", job=job)
        return loads(item)["end"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    started = Service(tmp_path_factory.mktemp("access"))
    yield started
    assert started.daemon.stop() == 0
    assert not started.daemon.faults()


def call(target: Target) -> str:
    assert target.arguments is not None
    queue = "" if target.queue is None else f', "queue": {{"name": {target.queue.decode()}}}'
    names = f'"host": {json.dumps(target.host)}, "procedure": {json.dumps(target.procedure)}'
    return f'{names}, "arguments": {target.arguments.decode()}{queue}'


# The requests about a job, while it is queued and after its end. Text, because arguments may repeat names.
WHILE_QUEUED = ('"get_status": %s', '"get_details": %s', '"get_result": %s, "wait": false', '"read_stream": %s')
AFTER_END = (*WHILE_QUEUED, '"get_result": %s', '"follow_stream": %s, "since": 0', '"get_result": %s, "wait": true')


def is_refused(replies: list[Any], kind: str) -> bool:
    """Return whether the replies are the refusal of this type."""
    if not replies or "error" not in replies[0]:
        return False
    assert [reply["error"]["type"] for reply in replies] == [kind]
    return True


class Check:
    """The requests of one client under one access file, compared with the reference."""

    def __init__(self, service: Service, document: dict[str, Any], door: Door, kept: Kept) -> None:
        self.service = service
        self.document = document
        self.door = door
        self.kept = kept

    def allows(self, action: str, target: Target) -> bool:
        return access.reference(self.document, self.door.client, action, target)[0]

    def ask_both(self, request: str) -> list[list[Any]]:
        """Return the replies on the keep-alive connection and on a fresh one."""
        return [self.kept.ask(request), ask(self.door, request)]

    def check_call(self, target: Target) -> None:
        allowed = self.allows("call", target)
        request = call(target)
        for members in (request, f'"submit_many": [{{{request}}}]'):
            # Legacy clients send one call, and get a job for it unless it is long.
            knows_refusal = self.door.client.authenticated or members != request or len(request) > MAX_REFUSED
            for replies in self.ask_both(members):
                refused = is_refused(replies, "access_denied")
                assert refused == (not allowed and knows_refusal), replies
                if not refused:
                    [job] = replies[0].get("job_ids", [replies[0].get("job_id")])
                    end = self.service.end_of(job)
                    if allowed:
                        assert end is None
                        self.service.cancel(job)
                    else:
                        assert end["error"]["type"] == "access_denied"

    def check_job(self, job: str, target: Target, requests: tuple[str, ...]) -> None:
        allowed = self.allows("read", target)
        for request in requests:
            for replies in self.ask_both(request % json.dumps(job)):
                assert is_refused(replies, "invalid_jobid") == (not allowed), (request, replies)

    def check_cancel(self, job: str, target: Target, on_kept: bool) -> None:
        ask_once = self.kept.ask if on_kept else lambda request: ask(self.door, request)
        [reply] = ask_once(f'"cancel": {json.dumps(job)}')
        assert reply["cancelled"] == self.allows("cancel", target)


@pytest.mark.timeout(400)
@settings(
    max_examples=20,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a smaller example would take minutes
    suppress_health_check=[HealthCheck.too_slow],
)
@given(data=st.data())
def test_running_dispatcher_decides_as_the_reference(service: Service, data: st.DataObject) -> None:
    doors = st.sampled_from(service.doors)
    patterns = (*access.PATTERNS, *service.principals, "gid:*", "anonymous@tls:*")
    door, owner, target = data.draw(doors), data.draw(doors), data.draw(access.calls())
    of_job = replace(target, owner=owner.client.owner)
    kept = Kept(door)
    try:
        for document in data.draw(st.lists(access.documents(patterns), min_size=2, max_size=2)):
            service.use(ALL)
            job = service.submit(owner, target)
            assert kept.ask(f'"cancel": "{UNKNOWN}"')[0]["cancelled"] is False
            assert kept.is_open()  # the next request is on this connection, after the reload
            service.use(document)
            check = Check(service, document, door, kept)
            check.check_job(job, of_job, WHILE_QUEUED)
            check.check_call(target)
            check.check_cancel(job, of_job, data.draw(st.booleans()))
            service.cancel(job)
            check.check_job(job, of_job, AFTER_END)
    finally:
        kept.close()


@pytest.mark.parametrize("request_of", ['"get_result": %s', '"follow_stream": %s'])
def test_change_of_the_rules_reveals_no_job(service: Service, request_of: str) -> None:
    owner, client = service.doors[1], service.doors[4]
    own = {"roles": {}, "rule": [{"who": ["*"], "allow": ["call", "read"]}]}
    job = ""
    for _ in range(4):
        service.use(ALL)
        job = service.submit(owner, Target("web01", "clear_cache", Raw(b"{}")))
        service.use(own)
        end = time.monotonic() + 0.5  # until after the check of the requests that wait
        while time.monotonic() < end:
            with ExitStack() as stack:
                waiting = [stack.enter_context(client.open()) for _ in range(10)]
                for connection in waiting:
                    connection.send(client.line(request_of % json.dumps(job)))
                for connection in waiting:
                    assert is_refused(connection.messages(), "invalid_jobid")
        service.cancel(job)
    with client.open() as connection:  # it does not wait for the refusal
        connection.send(client.line(request_of % json.dumps(job)))
