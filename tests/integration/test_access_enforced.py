"""Rules over the wire: tokens, legacy clients, keep-alive connections, changes of the rules, restarts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.deadline import wait_until
from support.harpcallerd import Harpcallerd, LineClient
from support.jobs import new_id
from support.legacy import legacy_client
from support.peers import Peer

RULES = """\
[[rule]]
who = ["token:small"]
allow = ["call", "read"]
procedures = ["hang"]
running = 1
queued = 1

[[rule]]
who = ["token:shop", "token:other", "anonymous@*"]
allow = ["call", "read", "cancel"]
procedures = ["hang", "echo", "feed"]

[[rule]]
who = ["token:ops"]
allow = ["read", "cancel"]
jobs = "any"
"""


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    file = tmp_path / "access.toml"
    file.write_text(RULES)
    return file


class Client:
    """A client of a dispatcher, with a token or without."""

    def __init__(self, dispatcher: Harpcallerd, name: str | None = None) -> None:
        self.dispatcher = dispatcher
        self.auth: dict[str, Any] = {}
        if name is not None:
            done = dispatcher.control("token", "add", name)
            assert done.returncode == 0, done.stderr
            self.auth = {"auth": {"token": done.stdout.strip()}}

    def ask(self, **request: Any) -> list[Any]:
        return self.dispatcher.ask(**request, **self.auth)

    def submit(self, procedure: str, *arguments: Any, **options: Any) -> str:
        return self.dispatcher.submit("web01", procedure, *arguments, **options, **self.auth)

    def state(self, job: str) -> str:
        [reply] = self.ask(get_details=job)
        return str(reply["details"]["state"])

    def wait_running(self, job: str) -> None:
        wait_until(lambda: self.state(job) == "running", what="a running job")


@pytest.fixture
def dispatcher(tmp_path: Path, peer: Peer, rules: Path) -> Iterator[Harpcallerd]:
    settings = {"tokens_file": "tokens", "access_file": rules.name}
    with Harpcallerd(tmp_path, {"web01": peer.port}, settings=settings) as dispatcher:
        yield dispatcher


REQUESTS: list[dict[str, Any]] = [
    {"get_result": None, "wait": True},
    {"get_result": None, "wait": False},
    {"get_status": None},
    {"get_details": None},
    {"follow_stream": None, "since": 0},
    {"read_stream": None},
    {"cancel": None},
    {"cancel": None, "wait": True},
]


def about(request: dict[str, Any], job: str) -> dict[str, Any]:
    return {key: job if value is None else value for key, value in request.items()}


def test_job_of_another_owner_is_like_an_unknown_one(dispatcher: Harpcallerd) -> None:
    shop, other, legacy = Client(dispatcher, "shop"), Client(dispatcher, "other"), Client(dispatcher)
    hanging, ended, unknown = shop.submit("hang"), shop.submit("echo", 1), new_id()
    assert shop.ask(get_result=ended) == [{"result": [1]}]
    shop.wait_running(hanging)
    for client in (other, legacy):
        for request in REQUESTS:
            replies = {job: json.dumps(client.ask(**about(request, job))) for job in (hanging, ended, unknown)}
            assert replies[hanging] == replies[ended].replace(ended, hanging)
            assert replies[hanging] == replies[unknown].replace(unknown, hanging)
            assert '{"cancelled": false}' in replies[hanging] or '"invalid_jobid"' in replies[hanging], request
    assert shop.ask(get_result=hanging, wait=False) == [{"no_result": True}], "nobody has cancelled it"
    ops = Client(dispatcher, "ops")
    assert ops.ask(get_status=ended)[0]["call"]["arguments"] == [1]
    assert ops.ask(cancel=hanging) == [{"cancelled": True}]
    assert shop.ask(get_result=hanging) == [{"cancelled": True}]


def test_full_queue_shows_no_id_of_another_client(dispatcher: Harpcallerd) -> None:
    """Any client could read, and cancel, the jobs whose ids it found in the explanation of a full queue."""
    shop, legacy = Client(dispatcher, "shop"), Client(dispatcher)
    queue = {"queue": {"name": {"q": 1}}}
    holder = shop.submit("hang", "secret", **queue)
    shop.wait_running(holder)
    waiting = legacy.submit("hang", **queue)
    [reply] = legacy.ask(get_details=waiting)
    assert (
        reply["details"]["why"] == 'queue {"q": 1} is full (1 of 1: 1 of other owners), position 1 of its owner\'s jobs'
    )
    assert holder not in json.dumps(reply)
    assert legacy.ask(cancel=holder) == [{"cancelled": False}]
    assert shop.state(holder) == "running"


def test_denied_call(dispatcher: Harpcallerd, peer: Peer) -> None:
    shop = Client(dispatcher, "shop")
    [refusal] = shop.ask(host="web01", procedure="reboot", arguments=[])
    message = "token:shop may not call reboot on host web01"
    assert refusal == {"error": {"type": "access_denied", "message": message, "refused": True}}
    [refusal] = Client(dispatcher).ask(submit_many=[{"host": "web01", "procedure": "reboot", "arguments": []}])
    assert refusal["error"]["type"] == "access_denied"
    event = dispatcher.wait_event("access denied")
    assert (event["principal"], event["action"], event["procedure"]) == ("token:shop", "call", "reboot")
    assert dispatcher.listed("list", "--all") == []
    assert peer.connections == []


def test_legacy_client_gets_a_job_that_has_ended(dispatcher: Harpcallerd) -> None:
    [accepted] = legacy_client(dispatcher.port, host="web01", procedure="reboot", arguments=[])
    job = accepted["job_id"]
    [reply] = legacy_client(dispatcher.port, get_result=job, wait=True)
    assert reply["error"]["type"] == "access_denied"
    assert reply["error"]["message"].endswith("may not call reboot on host web01")
    assert legacy_client(dispatcher.port, follow_stream=job, since=0) == [reply]
    [status] = legacy_client(dispatcher.port, get_status=job)
    assert status["call"]["procedure"] == "reboot"
    assert status["time"]["start"] is None
    assert status["time"]["end"] is not None
    [accepted] = legacy_client(dispatcher.port, host="web01", procedure="echo", arguments=[2])
    assert legacy_client(dispatcher.port, get_result=accepted["job_id"], wait=True) == [{"result": [2]}]


def converse(client: LineClient, **request: Any) -> Any:
    client.send({"harpcaller": 1, "keep_alive": True, **request})
    return client.message()


def test_changed_rules_apply_to_open_connections(dispatcher: Harpcallerd, rules: Path) -> None:
    shop = Client(dispatcher, "shop")
    call = {"host": "web01", "procedure": "echo", "arguments": [3]}
    with dispatcher.connect() as client:
        job = converse(client, **call, **shop.auth)["job_id"]
        assert converse(client, get_result=job)["result"] == [3]
        rules.write_text(RULES.replace('"echo", ', ""))
        dispatcher.reload()
        assert converse(client, get_result=job)["error"]["type"] == "invalid_jobid"
    with dispatcher.connect() as client:
        assert converse(client, **call, **shop.auth)["error"]["type"] == "access_denied"


def test_requests_that_wait_end_within_a_second_after_a_change(dispatcher: Harpcallerd, rules: Path) -> None:
    shop, legacy = Client(dispatcher, "shop"), Client(dispatcher)
    jobs = [owner.submit("feed", number) for number, owner in enumerate((shop, shop, legacy))]
    for owner, job in zip((shop, shop, legacy), jobs, strict=True):
        owner.wait_running(job)
    clients = [dispatcher.connect() for _ in range(4)]
    requests: list[dict[str, Any]] = [
        {"follow_stream": jobs[0], "since": 0, **shop.auth},
        {"get_result": jobs[0], **shop.auth},
        {"get_result": jobs[2]},
        {"follow_stream": jobs[2], "since": 0},
    ]
    try:
        for client, request in zip(clients, requests, strict=True):
            client.send({"harpcaller": 1, **request})
        assert clients[0].message() == {"packet": 0, "data": 0}
        assert clients[3].message() == {"packet": 0, "data": 2}
        dispatcher.ask(get_status=jobs[2])  # so that the other requests have arrived
        rules.write_text(RULES.replace('"token:shop", ', "").replace(', "anonymous@*"', ""))
        dispatcher.reload()
        began = time.monotonic()
        ends = [client.messages() for client in clients]
        assert time.monotonic() - began < 1
        message = "the right to read this job was revoked"
        revoked = {"error": {"type": "access_denied", "message": message, "refused": True}}
        unknown = {"error": {"type": "invalid_jobid", "message": f"there is no job {jobs[2]}"}}
        assert ends == [[revoked], [revoked], [unknown], [unknown]]
    finally:
        for client in clients:
            client.close()
    assert [dispatcher.control("cancel", job).returncode for job in jobs] == [0, 0, 0]


def test_revoked_token_ends_the_requests_that_wait(dispatcher: Harpcallerd) -> None:
    shop = Client(dispatcher, "shop")
    job = shop.submit("hang")
    shop.wait_running(job)
    with dispatcher.connect() as follower, dispatcher.connect() as waiting:
        follower.send({"harpcaller": 1, "follow_stream": job, **shop.auth})
        waiting.send({"harpcaller": 1, "get_result": job, **shop.auth})
        dispatcher.wait_events(1, "job submitted")
        assert dispatcher.control("token", "revoke", "shop").returncode == 0
        began = time.monotonic()
        assert [client.message()["error"]["type"] for client in (follower, waiting)] == ["auth_error"] * 2
        assert time.monotonic() - began < 1.5


@pytest.mark.parametrize("kill", [False, True], ids=["stop", "kill"])
def test_owners_and_limits_survive_a_restart(dispatcher: Harpcallerd, kill: bool) -> None:
    small, other = Client(dispatcher, "small"), Client(dispatcher, "other")
    first = small.submit("feed", 1, request_id="r", start_within=60)
    # Until its host has acknowledged the call, a restart queues the job again.
    wait_until(lambda: "packet" in small.ask(read_stream=first)[0], what="a record of the first job")
    second = small.submit("hang")
    other_job = other.submit("echo", request_id="r")
    dispatcher.restart(kill)
    assert small.state(second) in ("queued", "running")
    assert small.submit("feed", 1, request_id="r", start_within=60) == first
    assert other.submit("echo", request_id="r") == other_job
    for job in (first, second):
        [reply] = other.ask(get_status=job)
        assert reply["error"]["type"] == "invalid_jobid"
    small.wait_running(second)
    third = small.submit("hang")
    [reply] = small.ask(get_details=third)
    assert reply["details"]["why"] == "its owner has reached its limit (1 of 1 jobs), position 1 of its owner's jobs"
    [refusal] = small.ask(host="web01", procedure="hang", arguments=[])
    assert refusal["error"]["type"] == "rate_limited"
    assert refusal["error"]["retry_after"] == 1.0
    dispatcher.restart(kill)
    [refusal] = small.ask(submit_many=[{"host": "web01", "procedure": "hang", "arguments": []}] * 2)
    assert refusal["error"]["type"] == "rate_limited"
    assert "retry_after" not in refusal["error"], "two jobs never fit"


def test_reused_request_id_names_no_job_of_another_owner(dispatcher: Harpcallerd) -> None:
    shop, other = Client(dispatcher, "shop"), Client(dispatcher, "other")
    mine, foreign = shop.submit("echo", 1, request_id="r"), other.submit("echo", 2, request_id="r")
    [refusal] = shop.ask(host="web01", procedure="echo", arguments=[3], request_id="r")
    assert refusal["error"]["message"] == f"request_id 'r' was used for another call: job {mine}"
    assert foreign != mine


def test_administrator_on_the_machine_has_all_rights(dispatcher: Harpcallerd) -> None:
    shop = Client(dispatcher, "shop")
    job = shop.submit("hang", 7)
    shop.wait_running(job)
    assert [listed["job"] for listed in dispatcher.listed("list")] == [job]
    [info] = dispatcher.listed("info", job)
    assert info["call"]["arguments"] == [7]
    assert dispatcher.control("cancel", job).returncode == 0
