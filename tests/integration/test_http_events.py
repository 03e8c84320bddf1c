"""Events over HTTP: live lists and counts, what each client gets, resume, and how responses end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from harpcaller.access.tokens import revoke_token
from harpcaller.changes import Position
from support.daemonlog import DEADLINE
from support.dispatcher import call, host_line
from support.http_api import RunningAPI, running_api
from support.http_streams import Response, ended, feeding, opened
from support.peers import Peer

EVENTS, LINES = "text/event-stream", "application/jsonl"


@pytest.fixture
async def api(tmp_path: Path, peer: Peer) -> AsyncIterator[RunningAPI]:
    async with running_api(tmp_path, host_line(peer.port), rules=None) as api:
        yield api


async def next_of(events: Response, name: str) -> Any:
    """Return the data of the next event of this name."""
    async with asyncio.timeout(DEADLINE):
        while (event := await events.event())["event"] != name:
            pass
    return json.loads(event["data"])


async def states_of(events: Response, job: str, last: str) -> list[str]:
    """Return the states that the events show of a job, up to one of them."""
    seen: list[str] = []
    async with asyncio.timeout(DEADLINE):
        while last not in seen:
            rows = (await next_of(events, "jobs"))["rows"]
            seen += [row["state"] for row in rows if row["job"] == job]
    return seen


async def test_events_show_each_job_that_fits(api: RunningAPI, peer: Peer) -> None:
    async with opened(api, "/events?procedure=feed") as events:
        assert events.response.headers["content-type"].startswith(EVENTS)
        assert events.response.headers["x-accel-buffering"] == "no"
        assert await events.line() == "retry: 1000"
        hello = await events.event()
        assert hello["event"] == "hello"
        assert hello["id"].startswith(json.loads(hello["data"])["boot"] + "-")
        await ended(api, "count", 1)  # another procedure
        job, conn = await feeding(api, peer, 0)
        assert await states_of(events, job, "running") == ["running"]
        conn.reply({"stream": 1}, {"result": None})
        await api.dispatcher.result(job)
        seen = await states_of(events, job, "returned")
        assert set(seen) <= {"running", "returned"}
        listed = (await api.client.get(f"/jobs?id={job}")).json()["jobs"]
        async with opened(api, "/events", last_event_id=hello["id"]) as again:
            rows = (await next_of(again, "jobs"))["rows"]
            assert {row["job"] for row in rows} >= {job}
            assert [row for row in rows if row["job"] == job] == listed


async def test_lines_for_programs_and_jobs_that_leave_the_filter(api: RunningAPI, peer: Peer) -> None:
    async with opened(api, "/events?state=running&topics=jobs", accept=LINES) as lines:
        assert lines.response.headers["content-type"] == LINES
        assert (await lines.message())["event"] == "hello"
        job, conn = await feeding(api, peer, 0)
        message = await lines.message()
        while not message["data"]["rows"]:  # the queued job may have been left out before
            message = await lines.message()
        assert (message["event"], [row["job"] for row in message["data"]["rows"]]) == ("jobs", [job])
        conn.reply({"result": None})
        while job not in message["data"]["left"]:
            message = await lines.message()
        assert [row["job"] for row in message["data"]["rows"]] == []


async def test_names_of_queues_may_be_shown_as_text(api: RunningAPI) -> None:
    async with opened(api, "/events?payloads=text") as text, opened(api, "/events") as raw:
        await next_of(text, "hello")
        await next_of(raw, "hello")
        job = call("count", arguments=[1], queue={"n": 1.50, "big": 2**70})
        await api.dispatcher.submit(job, "test")
        assert (await next_of(text, "jobs"))["rows"][0]["queue"]["name"] == '{"n": 1.5, "big": 1180591620717411303424}'
        assert (await next_of(raw, "jobs"))["rows"][0]["queue"]["name"] == {"n": 1.5, "big": 2**70}


async def test_counts_are_sent_when_they_change(api: RunningAPI, peer: Peer) -> None:
    def numbers(counts: Any) -> dict[str, int]:
        return {each["value"]: each["count"] for each in counts["by"]["state"] if each["count"]}

    async with opened(api, "/events?topics=counts") as events:
        assert numbers(await next_of(events, "counts")) == {}
        job, conn = await feeding(api, peer, 0)
        while numbers(counts := await next_of(events, "counts")) != {"running": 1}:
            assert numbers(counts) == {"queued": 1}
        conn.reply({"result": None})
        await api.dispatcher.result(job)
        counts = await next_of(events, "counts")
        assert numbers(counts) == {"returned": 1}
        assert (await api.client.get("/jobs/counts?by=state")).json()["by"] == counts["by"]


@pytest.mark.parametrize("reason", ["restart", "gap"])
async def test_reader_of_unknown_position_asks_again(api: RunningAPI, reason: str) -> None:
    changes = api.dispatcher.changes
    after = "00000000-1" if reason == "restart" else changes.encode_position(Position(changes.boot, 999))
    async with opened(api, "/events", last_event_id=after) as events:
        assert await next_of(events, "reset") == {"reason": reason}
        job = await ended(api, "count", 1)
        assert await states_of(events, job, "returned")


async def test_refused_requests(api: RunningAPI) -> None:
    wrong = {"topics=x": "topics", "state=open&state=bad": "state", "stat=open": "stat", "state=x": "state"}
    for query, named in wrong.items():
        reply = await api.client.get(f"/events?{query}")
        assert (reply.status_code, reply.json()["code"]) == (400, "invalid_request"), query
        assert named in reply.json()["detail"]
    for after in ("x", f"{api.dispatcher.changes.boot}-0"):  # an id that the client has made
        assert (await api.client.get("/events", headers={"Last-Event-ID": after})).status_code == 400
    assert (await api.client.get("/events", headers={"Accept": "text/html"})).status_code == 406
    assert (await api.client.get("/events", headers={"Authorization": ""})).status_code == 401
    assert api.api.service.streams.kinds.total() == 0


async def test_stop_and_revoked_token_end_events(tmp_path: Path, peer: Peer) -> None:
    async with running_api(tmp_path, host_line(peer.port), rules=None) as api:
        async with (
            opened(api, "/events", **api.headers_of("guest")) as guest,
            opened(api, "/events") as other,
        ):
            await next_of(guest, "hello")
            await next_of(other, "hello")
            revoke_token(api.directory / "tokens", "guest")
            api.api.service.identities().refresh()
            assert await next_of(guest, "reset") == {"reason": "access"}
            assert await guest.rest() == []
            async with asyncio.timeout(4):
                await api.api.aclose()
            assert await next_of(other, "reset") == {"reason": "restart"}


_RULES = """
[roles]
user = []

[[rule]]
who = ["role:user"]
allow = ["call", "read", "list"]
"""


async def test_clients_get_events_of_their_jobs_only(tmp_path: Path, peer: Peer) -> None:
    access = tmp_path / "access.toml"
    async with running_api(tmp_path, host_line(peer.port), rules=_RULES) as api:
        alice, bob = api.headers_of("alice", "user"), api.headers_of("bob", "user")

        async def submit_as(headers: dict[str, str]) -> str:
            body = {"host": "web01", "procedure": "count", "arguments": [1]}
            reply = await api.client.post("/jobs", json=body, headers=headers)
            assert reply.status_code == 201, reply.text
            return str(reply.json()["job"])

        async with opened(api, "/events?topics=jobs,counts", **alice) as events:
            first = await submit_as(alice)
            assert await states_of(events, first, "returned")
            hidden = await submit_as(bob)
            await api.dispatcher.result(hidden)
            second = await submit_as(alice)
            seen: list[Any] = []
            async with asyncio.timeout(DEADLINE):
                while not any(row["job"] == second and row["state"] == "returned" for row in seen):
                    data = await next_of(events, "jobs")
                    assert (data["left"], data["more"]) == ([], 0)
                    seen += data["rows"]
            assert hidden not in {row["job"] for row in seen}
            access.write_text(_RULES.replace('"list"', '"cancel"'))
            assert await next_of(events, "reset") == {"reason": "access"}
            assert await events.rest() == []
        assert (await api.client.get("/events", headers=alice)).status_code == 403
