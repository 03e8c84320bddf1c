"""Who gets what from each operation of the HTTP API: one table, to be read by eye.

An operation without a row fails the first test. A foreign job must not differ from one that does not exist, neither in
the response nor in its time.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from harp.protocol.json_text import Raw
from harpcaller.http.app import OPERATIONS
from harpcaller.model.ids import new_job_id
from harpcaller.model.lanes import queue_lane
from support.deadline import eventually
from support.dispatcher import host_line
from support.http_api import RunningAPI, running_api
from support.peers import Peer

CLIENTS = ("anonymous", "viewer", "operator", "admin", "owner", "other")

#: The statuses for each of `CLIENTS`. `owner` owns the job, `other` another one; both may use only their own jobs.
TABLE = """
    operation           anonymous  viewer  operator  admin  owner  other
    list_jobs                 401     200       200    200    200    200
    count_jobs                401     200       200    200    200    200
    get_statistics            401     200       200    200    200    200
    submit_job                401     403       201    201    201    201
    submit_many               401     403       201    201    201    201
    get_job                   401     200       200    200    200    404
    get_end                   401     200       200    200    200    404
    get_result                401     200       200    200    200    404
    cancel_job                401     403       200    200    200    404
    release_job               401     403       200    200    403    403
    rerun_job                 401     403       201    201    201    404
    read_records              401     200       200    200    200    404
    follow_records            401     200       200    200    200    404
    resume_records            401     200       200    200    200    404
    follow_events             401     200       200    200    200    200
    list_queues               401     200       200    200    200    200
    get_queue                 401     200       200    200    200    404
    list_hosts                401     200       200    200    200    200
    get_host                  401     200       200    200    200    200
    list_audit                401     403       403    200    403    403
    begin_session             201     201       201    201    201    201
    end_session               401     204       204    204    404    404
    list_sessions             401     200       200    200    200    200
    end_other_session         401     204       404    204    404    404
    get_me                    401     200       200    200    200    200
    ask_me                    401     200       200    200    200    404
    get_openapi               200     200       200    200    200    200
"""
ROWS = {name: dict(zip(CLIENTS, map(int, row), strict=True)) for name, *row in map(str.split, TABLE.split("\n")[2:-1])}

RULES = """\
[roles]
viewer = []
operator = []
admin = []
web = []

[[rule]]
who = ["role:viewer"]
allow = ["read", "list"]
jobs = "any"

[[rule]]
who = ["role:operator"]
allow = ["read", "list", "call", "cancel", "manage"]
jobs = "any"

[[rule]]
who = ["role:admin"]
allow = ["read", "list", "call", "cancel", "manage", "admin"]
jobs = "any"

[[rule]]
who = ["role:web"]
allow = ["read", "list", "call", "cancel"]
"""
CALL = {"host": "web01", "procedure": "echo", "arguments": [1]}
QUEUE = {"name": {"held": 1}}


class Ask(NamedTuple):
    """A request: its method, its path with a query, and its body."""

    method: str
    path: str
    body: Any = None


def ask(name: str, job: str, session: str, link: str) -> Ask:
    """Return the request for an operation, about a job that has ended, a session and a link."""
    queue_id = queue_lane(Raw(json.dumps(QUEUE["name"]).encode())).removeprefix("queue:")
    of_name = {
        "submit_job": CALL,
        "submit_many": {"calls": [CALL]},
        "cancel_job": {},
        "release_job": {},
        "rerun_job": {},
        "resume_records": {"jobs": {job: 0}},
        "begin_session": {"link": link},
        "ask_me": {"action": "read", "job": job},
    }
    queries = {"follow_records": f"?jobs={job}", "resume_records": "?follow=0"}
    operation = next(each for each in OPERATIONS if each.operation_id == name)
    path = operation.path.format(job=job, session=session, queue=queue_id, host="web01")
    return Ask(operation.method, path + queries.get(name, ""), of_name.get(name))


def test_http_access_table_has_each_operation() -> None:
    assert sorted(ROWS) == sorted(operation.operation_id for operation in OPERATIONS)


class Clients:
    """The clients of the table, with the requests that they send."""

    def __init__(self, api: RunningAPI, stack: AsyncExitStack) -> None:
        self.api = api
        self._stack = stack
        self._clients: dict[str, httpx.AsyncClient] = {}

    async def of(self, name: str) -> httpx.AsyncClient:
        """Return a client: roles log in by a link, owners have a token."""
        if name not in self._clients:
            headers = {"Sec-Fetch-Site": "same-origin"}
            if name in ("owner", "other"):
                headers = self.api.headers_of(name, "web")
            client = httpx.AsyncClient(base_url=self.api.client.base_url, headers=headers, timeout=60)
            self._clients[name] = await self._stack.enter_async_context(client)
            if name in ("viewer", "operator", "admin"):
                await self.log_in(client, name)
        return self._clients[name]

    def new_link(self, name: str) -> str:
        return self.api.api.make_login_link(name, (name,), None).partition("#k=")[2]

    async def log_in(self, client: httpx.AsyncClient, name: str) -> None:
        client.cookies.clear()
        reply = await client.post("/session", json={"link": self.new_link(name)})
        assert reply.status_code == 201, reply.text

    async def send(self, name: str, request: Ask) -> httpx.Response:
        client = await self.of(name)
        body = None if request.body is None else json.dumps(request.body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        message = client.build_request(request.method, request.path, content=body, headers=headers)
        reply = await client.send(message, stream=True)
        if reply.headers.get("content-type", "").startswith("text/event-stream"):
            await reply.aclose()  # it has no end
        else:
            await reply.aread()
        return reply


@asynccontextmanager
async def running(tmp_path: Path, peer: Peer, rules: str | None) -> AsyncIterator[tuple[Clients, str]]:
    """Run a dispatcher; yield the clients, and a job of the owner that has ended. A job of its queue is running."""
    audit_file = tmp_path / "audit.jsonl"
    async with (
        running_api(tmp_path, host_line(peer.port), rules=rules, audit_file=audit_file) as api,
        AsyncExitStack() as stack,
    ):
        clients = Clients(api, stack)
        owner = "owner" if rules is not None else "operator"
        job = await submit(clients, owner, CALL)
        await submit(clients, owner, {**CALL, "procedure": "hang", "queue": QUEUE})
        assert (await (await clients.of(owner)).get(f"/jobs/{job}/end?wait=60")).status_code == 200
        yield clients, job


async def submit(clients: Clients, name: str, call: Any) -> str:
    reply = await (await clients.of(name)).post("/jobs", json=call)
    assert reply.status_code == 201, reply.text
    job: str = reply.json()["job"]
    return job


async def statuses(clients: Clients, job: str, names: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """Return the status of each operation for each of these clients."""
    found: dict[str, dict[str, int]] = {}
    for operation in ROWS:
        found[operation] = {}
        for name in names:
            session = await begin_session(clients, "viewer")
            reply = await clients.send(name, ask(operation, job, session, clients.new_link(name)))
            found[operation][name] = reply.status_code
            if reply.status_code in (401, 403, 404):
                code = {401: "auth_error", 403: "access_denied"}.get(reply.status_code, reply.json()["code"])
                assert reply.json()["code"] == code, (operation, name)
            if operation in ("begin_session", "end_session"):
                client = await clients.of(name)
                client.cookies.clear()
                if name in ("viewer", "operator", "admin"):
                    await clients.log_in(client, name)
    return found


async def begin_session(clients: Clients, name: str) -> str:
    """Begin a session that nobody uses; return its id."""
    _, session = await clients.api.api.service.sessions.begin(f"user:{name}", (name,))
    return session.id


async def test_http_access_is_as_in_the_table(tmp_path: Path, peer: Peer) -> None:
    async with running(tmp_path, peer, RULES) as (clients, job):
        assert await statuses(clients, job, CLIENTS) == ROWS
        rows = (await (await clients.of("other")).get("/jobs?limit=500")).json()["jobs"]
        assert {row["owner"] for row in rows} == {"token:other"}, "its own jobs only"
        own: int = len(rows)

        async def are_counted() -> bool:  # an answer is kept for a while
            counts = (await (await clients.of("other")).get("/jobs/counts")).json()["by"]["state"]
            return sum(int(each["count"]) for each in counts) == own

        predicate: Callable[[], bool | Awaitable[bool]] = are_counted
        await eventually(predicate, what="the count of its own jobs only")
        rows = (await (await clients.of("viewer")).get("/jobs?limit=500")).json()["jobs"]
        assert {row["owner"] for row in rows} > {"token:other", "token:owner"}
        assert {right for row in rows for right in row["can"]} == {"read"}


async def test_http_without_access_file_uses_built_in_roles(tmp_path: Path, peer: Peer) -> None:
    names = ("anonymous", "viewer", "operator", "admin")
    async with running(tmp_path, peer, None) as (clients, job):
        expected = {operation: {name: row[name] for name in names} for operation, row in ROWS.items()}
        assert await statuses(clients, job, names) == expected


async def test_http_viewer_changes_nothing(tmp_path: Path, peer: Peer) -> None:
    async with running(tmp_path, peer, None) as (clients, _):
        queued = await submit(clients, "operator", {**CALL, "queue": QUEUE})
        before = [job.id async for job in clients.api.dispatcher.list_jobs(ended=True)]
        for operation in ("submit_job", "submit_many", "cancel_job", "release_job", "rerun_job"):
            reply = await clients.send("viewer", ask(operation, queued, "", ""))
            assert (reply.status_code, reply.json()["code"]) == (403, "access_denied"), operation
        assert [job.id async for job in clients.api.dispatcher.list_jobs(ended=True)] == before
        state = (await (await clients.of("viewer")).get(f"/jobs/{queued}")).json()["state"]
        assert state == "queued"
        reply = await clients.send("operator", ask("cancel_job", queued, "", ""))
        assert reply.json()["cancelled"]


#: The operations that name a job.
ON_JOBS = tuple(name for name, row in ROWS.items() if row["other"] == 404 and "session" not in name)
#: Those that find the job in different ways.
TIMED = ("get_job", "get_result", "cancel_job", "rerun_job", "read_records", "ask_me")
_PAIRS, _ATTEMPTS, _MOST = 30, 12, 0.002


def comparable(reply: httpx.Response, job: str) -> tuple[Any, ...]:
    """Return all of a response that must not depend on the job: all but its id, and what each request has."""
    request = reply.headers["harp-request"]
    headers = {name: value for name, value in reply.headers.items() if name not in ("date", "harp-request")}
    return reply.status_code, headers, reply.text.replace(job, "JOB").replace(request, "REQUEST")


async def test_http_foreign_job_is_like_an_unknown_one(tmp_path: Path, peer: Peer) -> None:
    assert set(ON_JOBS) > set(TIMED)
    async with running(tmp_path, peer, RULES) as (clients, ended):
        queued = await submit(clients, "owner", {**CALL, "queue": QUEUE, "info": {"x": "y" * 50_000}})
        for operation in ON_JOBS:
            for foreign in (ended, queued):
                unknown = new_job_id(time.time())
                replies = [
                    comparable(await clients.send("other", ask(operation, job, "", "")), job)
                    for job in (foreign, unknown)
                ]
                assert replies[0] == replies[1], operation
            malformed = await clients.send("other", ask(operation, "x" * 36, "", ""))
            assert malformed.status_code in (404, 422), operation


async def test_http_foreign_job_takes_the_time_of_an_unknown_one(tmp_path: Path, peer: Peer) -> None:
    async with running(tmp_path, peer, RULES) as (clients, foreign):
        for operation in TIMED:

            def send(job: str, name: str = operation) -> Awaitable[httpx.Response]:
                return clients.send("other", ask(name, job, "", ""))

            differences: list[float] = []
            # On a loaded machine a single median may be wrong; a difference that is real stays.
            while not differences or (abs(differences[-1]) > _MOST and len(differences) < _ATTEMPTS):
                differences.append(await median_difference(send, foreign))
            assert abs(differences[-1]) <= _MOST, (operation, differences)


async def median_difference(send: Callable[[str], Awaitable[Any]], foreign: str) -> float:
    """Return the median of how many seconds longer a request takes for a foreign job than for an unknown one."""
    loop, found = asyncio.get_running_loop(), []
    for number in range(_PAIRS):
        jobs = [foreign, new_job_id(time.time())]
        times = {}
        for job in jobs if number % 2 else reversed(jobs):
            began = loop.time()
            await send(job)
            times[job] = loop.time() - began
        found.append(times[foreign] - times[jobs[1]])
    return statistics.median(found)
