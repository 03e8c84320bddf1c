"""Each problem of the HTTP API, produced by the fault that it is for: one row of the table is one test.

Faults of the machine, such as a full disk and a killed dispatcher, are in test_http_faults; the forms of invalid bodies
and heads in test_http_problems, test_http_limits and test_http_login.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from harpcaller.access.client import Client
from harpcaller.acting import ActingAs
from harpcaller.config import HTTPSettings
from harpcaller.http.problems import CODES
from support.certificates import server_files
from support.dispatcher import call, host_line, until
from support.http_api import RULES, RunningAPI, running_api
from support.http_streams import opened
from support.peers import Peer, PeerConnection, server_context
from support.scripted import scripted_harpd

UNKNOWN = "00000000-0000-0000-0000-000000000000"
CALL: dict[str, Any] = {"host": "nohost", "procedure": "p", "arguments": []}
HANG = {**CALL, "host": "web01", "procedure": "hang"}
OTHERS = ("other", "role")
ONLY_ADMIN = RULES.partition("\n\n")[0] + "\n"
LIMITED = f"""
[[rule]]
who = ["token:slow"]
allow = ["call"]
rate = "1/h"

[[rule]]
who = ["token:few"]
allow = ["call"]
queued = 1

{RULES}"""


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    problem: Any


Produce = Callable[["Fault"], Awaitable[httpx.Response | bytes]]


@dataclass(frozen=True)
class Fault:
    """What a row needs: the API, and a stack that ends what it has begun."""

    api: RunningAPI
    directory: Path
    stack: AsyncExitStack

    async def submit(self, body: Mapping[str, Any] = CALL, **headers: str) -> str:
        reply = await self.api.client.post("/jobs", json=body, headers=headers)
        assert reply.status_code == 201, reply.text
        job: str = reply.json()["job"]
        return job

    async def wait_for(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)


@dataclass(frozen=True)
class Row:
    name: str
    status: int
    code: str
    produce: Produce
    detail: str = ""
    retries: bool = False  #: Whether the response has Retry-After.
    http: HTTPSettings = field(default_factory=HTTPSettings)
    rules: str = RULES
    settings: Mapping[str, Any] = field(default_factory=dict)
    closes: bool = False  #: Whether the server writes the response itself, and closes the connection.


async def body_without_json(fault: Fault) -> httpx.Response:
    return await fault.api.client.post("/jobs", content=b'{"host":', headers={"Content-Type": "application/json"})


async def unknown_parameter(fault: Fault) -> httpx.Response:
    return await fault.api.client.get("/jobs?sate=bad")


async def wrong_member(fault: Fault) -> httpx.Response:
    reply = await fault.api.client.post("/jobs", json={**CALL, "timeout": "soon"})
    assert reply.json()["errors"][0]["pointer"] == "/timeout"
    return reply


async def cursor_of_another_filter(fault: Fault) -> httpx.Response:
    for _ in range(2):
        await fault.submit()
    cursor = (await fault.api.client.get("/jobs?limit=1")).json()["next"]
    assert (await fault.api.client.get(f"/jobs?limit=1&cursor={cursor}")).status_code == 200
    return await fault.api.client.get(f"/jobs?host=nohost&cursor={cursor}")


async def no_token(fault: Fault) -> httpx.Response:
    return await fault.api.client.get("/jobs", headers={"Authorization": ""})


async def nothing_as_proof(fault: Fault) -> httpx.Response:
    del fault.api.client.headers["authorization"]
    return await fault.api.client.get("/jobs")


async def denied_call(fault: Fault) -> httpx.Response:
    return await fault.api.client.post("/jobs", json=CALL, headers=fault.api.headers_of("slow", "slow"))


async def foreign_page(fault: Fault) -> httpx.Response:
    api = fault.api
    async with httpx.AsyncClient(base_url=api.client.base_url, headers={"Sec-Fetch-Site": "same-origin"}) as browser:
        secret = api.api.make_login_link("alice", ("admin",), None).partition("#k=")[2]
        assert (await browser.post("/session", json={"link": secret})).status_code == 201
        return await browser.post("/jobs", json=CALL, headers={"Sec-Fetch-Site": "cross-site"})


async def foreign_name(fault: Fault) -> httpx.Response:
    return await fault.api.client.get("/jobs", headers={"Host": "evil.example"})


async def unknown_job(fault: Fault) -> httpx.Response:
    return await fault.api.client.get(f"/jobs/{UNKNOWN}")


async def foreign_job(fault: Fault) -> httpx.Response:
    job = await fault.submit()
    return await fault.api.client.get(f"/jobs/{job}/records", headers=fault.api.headers_of(*OTHERS))


async def unknown_path(fault: Fault) -> httpx.Response:
    return await fault.api.client.get("/nothing")


async def unknown_queue(fault: Fault) -> httpx.Response:
    return await fault.api.client.get("/queues/" + "0" * 32)


async def unknown_host(fault: Fault) -> httpx.Response:
    return await fault.api.client.get("/hosts/nohost")


async def no_audit_file(fault: Fault) -> httpx.Response:
    return await fault.api.client.get("/audit")


async def wrong_method(fault: Fault) -> httpx.Response:
    reply = await fault.api.client.put("/jobs", json=CALL)
    assert reply.headers["allow"] == "GET, HEAD, OPTIONS, POST"
    return reply


async def unacceptable_type(fault: Fault) -> httpx.Response:
    return await fault.api.client.get("/jobs", headers={"Accept": "application/xml"})


async def slow_body(fault: Fault) -> bytes:
    head = f"POST /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\n{fault.api.authorization}Content-Length: 9\r\n\r\n{{"
    return await fault.api.send(head.encode())


async def refused_call_again(fault: Fault) -> httpx.Response:
    anonymous = ActingAs(fault.api.dispatcher, Client(("anonymous@line",), "127.0.0.1:1", "127.0.0.1:2"))
    refused = await anonymous.submit(call("p", host="nohost"))
    assert (await fault.api.client.get(f"/jobs/{refused}")).json()["end_type"] == "access_denied"
    return await fault.api.client.post(f"/jobs/{refused}/rerun")


async def result_of_a_cancelled_job(fault: Fault) -> httpx.Response:
    job = await fault.submit(HANG)
    assert (await fault.api.client.get(f"/jobs/{job}/result")).status_code == 202
    await fault.api.client.post(f"/jobs/{job}/cancel")
    reply = await fault.api.client.get(f"/jobs/{job}/result")
    assert reply.json()["end"] == {"cancelled": True}
    return reply


async def result_of_a_job_whose_host_is_held(fault: Fault) -> httpx.Response:
    """The host accepts connections and never replies."""
    job = await fault.submit({**HANG, "host": "held01"})
    reply = await fault.api.client.get(f"/jobs/{job}/result?wait=30")
    assert "error" in reply.json()["end"], reply.text
    return reply


async def long_body(fault: Fault) -> httpx.Response:
    return await fault.api.client.post("/jobs", json={**CALL, "info": "x" * 2000})


async def long_url(fault: Fault) -> bytes:
    return await fault.api.send(b"GET /%b HTTP/1.1\r\nHost: localhost\r\n\r\n" % (b"x" * 9000))


async def long_head(fault: Fault) -> bytes:
    return await fault.api.send(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: %b\r\n\r\n" % (b"x" * 40_000))


async def form_of_a_page(fault: Fault) -> httpx.Response:
    return await fault.api.client.post("/jobs", data={"host": "web01"})


async def key_for_another_body(fault: Fault) -> httpx.Response:
    await fault.submit(CALL, **{"Idempotency-Key": "k"})
    return await fault.api.client.post("/jobs", json={**CALL, "procedure": "q"}, headers={"Idempotency-Key": "k"})


async def rate_of_a_rule(fault: Fault) -> httpx.Response:
    slow = fault.api.headers_of("slow", "slow")
    assert (await fault.api.client.post("/jobs", json=CALL, headers=slow)).status_code == 201
    reply = await fault.api.client.post("/jobs", json=CALL, headers=slow)
    assert 3000 < int(reply.headers["retry-after"]) <= 3600
    return reply


async def queued_jobs_of_a_rule(fault: Fault) -> httpx.Response:
    few = fault.api.headers_of("few", "few")
    queue = {"name": {"q": 1}}
    await fault.submit({**HANG, "queue": queue})  # the others wait behind it
    assert (await fault.api.client.post("/jobs", json={**HANG, "queue": queue}, headers=few)).status_code == 201
    return await fault.api.client.post("/jobs", json={**HANG, "queue": queue}, headers=few)


async def rate_of_requests(fault: Fault) -> httpx.Response:
    other = fault.api.headers_of(*OTHERS)
    replies = [await fault.api.client.get("/me") for _ in range(5)]
    assert [reply.status_code for reply in replies] == [200, 200, 429, 429, 429]
    assert (await fault.api.client.get("/me", headers=other)).status_code == 200, "each client has its own"
    return replies[-1]


async def waits(fault: Fault) -> httpx.Response:
    return await _second_wait(fault)


async def waits_of_a_client(fault: Fault) -> httpx.Response:
    reply = await _second_wait(fault)
    other = fault.api.headers_of("second", "admin")
    job = (await fault.api.client.post("/jobs", json=CALL, headers=other)).json()["job"]
    found = await fault.api.client.get(f"/jobs/{job}?wait=20", headers=other)
    assert (found.status_code, found.json()["state"]) == (200, "failed"), "others may wait"
    return reply


async def _second_wait(fault: Fault) -> httpx.Response:
    job = await fault.submit(HANG)
    waiting = asyncio.create_task(fault.api.client.get(f"/jobs/{job}?wait=60"))
    fault.stack.callback(waiting.cancel)
    await fault.wait_for(lambda: fault.api.api.service.waits)
    return await fault.api.client.get(f"/jobs/{job}/end?wait=60")


async def streams_of_a_client(fault: Fault) -> httpx.Response:
    await fault.stack.enter_async_context(opened(fault.api, "/events"))
    return await fault.api.client.get("/events")


async def long_bodies_of_a_client(fault: Fault) -> httpx.Response:
    """The client is sending long bodies, and sends one more."""

    async def body(end: asyncio.Event) -> AsyncIterator[bytes]:
        yield b'{"host":"nohost","procedure":"p","arguments":["' + b"x" * 300_000
        await end.wait()
        yield b'"]}'

    end = asyncio.Event()
    headers = {"Content-Type": "application/json"}
    held = asyncio.create_task(fault.api.client.post("/jobs", content=body(end), headers=headers))
    memory, most = fault.api.api.service.memory, fault.api.dispatcher.config.request_memory
    await fault.wait_for(lambda: memory.available <= most - 300_000 + 64 * 1024)
    refused = await fault.api.client.post("/jobs", json={**CALL, "info": "x" * 300_000})
    other = fault.api.headers_of("second", "admin")
    reply = await fault.api.client.post("/jobs", json={**CALL, "info": "x" * 300_000}, headers=other)
    assert reply.status_code == 201, "each client has its share"
    end.set()
    assert (await held).status_code == 201
    assert memory.available == most
    assert fault.api.api.service.bodies_of == {}
    return refused


async def connections_of_a_peer(fault: Fault) -> bytes:
    for _ in range(2):
        _, writer = await asyncio.open_connection("127.0.0.1", fault.api.port)
        fault.stack.callback(writer.close)
    return await fault.api.send(b"")


async def locked_store(fault: Fault) -> httpx.Response:
    """Another program holds the lock of the store."""
    with closing(sqlite3.connect(fault.api.dispatcher.store.path)) as other:
        other.execute("BEGIN IMMEDIATE")
        reply = await fault.api.client.post("/jobs", json=CALL)
        other.rollback()
    await fault.submit()
    return reply


async def no_room_on_the_disk(fault: Fault) -> httpx.Response:
    return await fault.api.client.post("/jobs/many", json={"calls": [CALL]})


async def stopping_dispatcher(fault: Fault) -> httpx.Response:
    """The dispatcher begins to stop while a body is being sent."""
    entered = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b'{"host":"nohost",'
        entered.set()
        await fault.api.api.service.stopping.wait()
        yield b'"procedure":"p","arguments":[]}'

    headers = {"Content-Type": "application/json"}
    request = asyncio.create_task(fault.api.client.post("/jobs", content=body(), headers=headers))
    await entered.wait()
    await fault.wait_for(lambda: fault.api.api.service.bodies_of)
    await fault.api.api.aclose()
    return await request


async def damaged_row(fault: Fault) -> httpx.Response:
    """Somebody has written a value into the store that no dispatcher writes."""
    job = await fault.submit()
    await until(fault.api.dispatcher, job, lambda found: found.end is not None, "the end")
    with closing(sqlite3.connect(fault.api.dispatcher.store.path)) as other:
        other.execute("UPDATE outcomes SET body = 'no JSON'")
        other.commit()
    return await fault.api.client.get(f"/jobs/{job}")


FEW = HTTPSettings(requests_per_client=1)
ROWS = (
    Row("a body that is no JSON", 400, "invalid_request", body_without_json),
    Row("an unknown query parameter", 400, "invalid_request", unknown_parameter, "did you mean state?"),
    Row("a member of the wrong kind", 422, "invalid_request", wrong_member),
    Row("a cursor of another filter", 400, "invalid_cursor", cursor_of_another_filter),
    Row("an empty header", 401, "auth_error", no_token, "`harpcallerd token add NAME --role=operator` makes"),
    Row("no proof", 401, "auth_error", nothing_as_proof, "`harpcallerd token add NAME --role=operator` makes"),
    Row("a call that no rule allows", 403, "access_denied", denied_call, rules=ONLY_ADMIN),
    Row("a page of another site", 403, "cross_origin", foreign_page),
    Row("a name of another host", 421, "wrong_host", foreign_name, "http.hosts"),
    Row("an unknown job", 404, "invalid_jobid", unknown_job),
    Row("a foreign job", 404, "invalid_jobid", foreign_job),
    Row("an unknown path", 404, "not_found", unknown_path, "/docs"),
    Row("an unknown queue", 404, "not_found", unknown_queue),
    Row("an unknown host", 404, "not_found", unknown_host),
    Row("a dispatcher without an audit file", 404, "not_found", no_audit_file),
    Row("a wrong method", 405, "method_not_allowed", wrong_method),
    Row("a type that it does not have", 406, "not_acceptable", unacceptable_type),
    Row("a body that stops", 408, "request_timeout", slow_body, settings={"idle_timeout": 0.5}, closes=True),
    Row("a refused call submitted again", 409, "cannot_rerun", refused_call_again, rules=ONLY_ADMIN),
    Row("a cancelled job", 409, "no_result", result_of_a_cancelled_job),
    Row(
        "a host that is held", 409, "no_result", result_of_a_job_whose_host_is_held,
        settings={"acknowledgement_timeout": 0.5, "start_within": 0.0, "connect_timeout": 1.0},
    ),
    Row("a long body", 413, "too_long", long_body, "request_line, which is 1000", settings={"request_line": 1000}),
    Row("a long URL", 414, "url_too_long", long_url, closes=True),
    Row("a form", 415, "unsupported_media_type", form_of_a_page),
    Row("a key for another body", 422, "key_reused", key_for_another_body),
    Row("the rate of a rule", 429, "rate_limited", rate_of_a_rule, "1/h", retries=True, rules=LIMITED),
    Row("the queued jobs of a rule", 429, "rate_limited", queued_jobs_of_a_rule, retries=True, rules=LIMITED),
    Row(
        "the rate of requests", 429, "too_many_requests", rate_of_requests, "http.requests_per_client",
        retries=True, http=FEW,
    ),
    Row(
        "the waits", 429, "too_many_requests", waits, "http.waits", retries=True, http=HTTPSettings(waits=1),
    ),
    Row(
        "the waits of a client", 429, "too_many_requests", waits_of_a_client, "http.waits_per_client",
        retries=True, http=HTTPSettings(waits_per_client=1),
    ),
    Row(
        "the streams of a client", 429, "too_many_requests", streams_of_a_client, "http.streams_per_client",
        retries=True, http=HTTPSettings(streams_per_client=1),
    ),
    Row(
        "the long bodies of a client", 429, "too_many_requests", long_bodies_of_a_client, retries=True,
        settings={"request_line": 400_000, "request_memory": 1_000_000},
    ),
    Row(
        "the connections of a peer", 429, "too_many_connections", connections_of_a_peer, retries=True,
        http=HTTPSettings(connections_per_peer=2), closes=True,
    ),
    Row("a long head", 431, "head_too_long", long_head, closes=True),
    Row("a damaged row of the store", 500, "internal_error", damaged_row),
    Row("a locked store", 503, "storage_error", locked_store, "locked", retries=True),
    Row(
        "too little room on the disk", 503, "storage_error", no_room_on_the_disk, "disk_reserve", retries=True,
        settings={"disk_reserve": 2**62},
    ),
    Row("a dispatcher that stops", 503, "stopping", stopping_dispatcher, retries=True),
)  # fmt: skip


def _never_replies(conn: PeerConnection) -> None:
    conn.until_closed()


@asynccontextmanager
async def _hosts(directory: Path) -> AsyncIterator[tuple[str, str]]:
    with scripted_harpd(directory) as peer:
        with Peer(always=_never_replies, tls=server_context(server_files(directory))) as held:
            yield host_line(peer.port), host_line(held.port, "held01")


def _parse(answer: bytes) -> Reply:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Reply(int(first.split()[1]), headers, json.loads(body))


@pytest.mark.parametrize("row", ROWS, ids=[row.name.replace(" ", "-") for row in ROWS])
async def test_http_fault_is_its_problem(tmp_path: Path, row: Row) -> None:
    async with AsyncExitStack() as stack:
        lines = await stack.enter_async_context(_hosts(tmp_path))
        api = await stack.enter_async_context(
            running_api(tmp_path, *lines, http=row.http, rules=row.rules, **row.settings)
        )
        inner = await stack.enter_async_context(AsyncExitStack())
        answer = await row.produce(Fault(api, tmp_path, inner))
    if isinstance(answer, bytes):
        reply = _parse(answer)
    else:
        reply = Reply(answer.status_code, answer.headers, answer.json())
    problem, headers = reply.problem, reply.headers
    assert (reply.status, problem["code"], problem["status"]) == (row.status, row.code, row.status), problem
    assert row.detail in problem["detail"]
    assert (problem["type"], problem["title"]) == (f"/docs/errors#{row.code}", CODES[row.code][1])
    assert headers["content-type"] == "application/problem+json"
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["harp-request"] == problem["request"]
    assert ("retry-after" in headers, "retry_after" in problem) == (row.retries, row.retries)
    assert headers.get("www-authenticate") == ('Bearer realm="harp"' if row.status == 401 else None)
    if row.status == 503:
        assert headers["retry-after"] == "5"
    if row.closes:
        assert headers["connection"] == "close"


def test_http_problem_table_has_each_code() -> None:
    assert {row.code for row in ROWS} == set(CODES)
    assert {(row.code, row.status) for row in ROWS} == {(code, status) for code, (status, _) in CODES.items()} | {
        ("invalid_request", 422)
    }
