"""Records over HTTP: forms, pages, searches, followers, and how responses end. With a real dispatcher."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from harpcaller.access.tokens import revoke_token
from harpcaller.config import HTTPSettings
from harpcaller.http.app import OPERATIONS
from support.daemonlog import DEADLINE
from support.dispatcher import host_line
from support.http_api import RunningAPI, running_api
from support.http_streams import ended, feeding, opened
from support.peers import Peer

UNKNOWN = "00000000-0000-0000-0000-000000000000"


@pytest.fixture
async def api(tmp_path: Path, peer: Peer) -> AsyncIterator[RunningAPI]:
    async with running_api(tmp_path, host_line(peer.port), rules=None) as api:
        yield api


async def lines_of(api: RunningAPI, path: str) -> list[Any]:
    reply = await api.client.get(path)
    assert reply.status_code == 200, reply.text
    assert reply.text.endswith("\n")
    return [json.loads(line) for line in reply.text.splitlines()]


# Pages


async def test_pages_of_json_lines(api: RunningAPI) -> None:
    job = await ended(api, "count", 2500)
    path = f"/jobs/{job}/records"
    reply = await api.client.get(path)
    assert reply.headers["content-type"] == "application/jsonl"
    lines = reply.text.splitlines()
    assert lines[0].startswith('{"packet":0,"time":')
    assert lines[0].endswith(',"data":0}')
    assert [json.loads(line)["data"] for line in lines[:-1]] == list(range(1000))
    assert json.loads(lines[-1]) == {"continue": True, "next": 1000}
    last = await lines_of(api, f"{path}?since=2000&timed=0")
    assert last[0] == {"packet": 2000, "data": 2000}
    assert (len(last), last[-1]) == (501, {"result": "counted"})
    recent = await lines_of(api, f"{path}?recent=3&timed=false")
    assert [line.get("packet") for line in recent] == [2497, 2498, 2499, None]
    back = await lines_of(api, f"{path}?before=1500&limit=2")
    assert [line["packet"] for line in back[:-1]] == [1498, 1499]
    assert back[-1] == {"continue": True, "next": 1500}
    assert [line["packet"] for line in (await lines_of(api, f"{path}?before=2&limit=5"))[:-1]] == [0, 1]
    assert await lines_of(api, f"{path}?before=0") == [{"continue": True, "next": 0}]
    assert await lines_of(api, f"{path}?since=9999999") == [{"result": "counted"}]
    assert len(await lines_of(api, f"{path}?download=1")) == 2501
    some = await lines_of(api, f"{path}?bytes=1024&limit=10000")
    total = sum(len(str(line["data"])) for line in some[:-1])
    assert 1000 <= total <= 1024
    assert some[-1] == {"continue": True, "next": len(some) - 1}


async def test_response_has_a_long_record_whatever_its_limit(api: RunningAPI) -> None:
    job = await ended(api, "repeat", 3, "x" * 5000)
    lines = await lines_of(api, f"/jobs/{job}/records?bytes=1024")
    assert [line.get("packet") for line in lines] == [0, None]
    assert lines[-1] == {"continue": True, "next": 1}


async def test_text_and_names_of_files(api: RunningAPI) -> None:
    job = await ended(api, "repeat", 2, "tea \u2028 <b>")
    reply = await api.client.get(f"/jobs/{job}/records?form=text&download=1")
    assert reply.text == "tea \u2028 <b>\n" * 2
    assert reply.headers["content-type"].startswith("text/plain")
    assert reply.headers["content-disposition"] == f'attachment; filename="{job}.txt"'
    lines = await api.client.get(f"/jobs/{job}/records?download=1")
    assert lines.headers["content-disposition"] == f'attachment; filename="{job}.jsonl"'
    values = await ended(api, "repeat", 1, {"a": 1})
    assert (await api.client.get(f"/jobs/{values}/records", headers={"Accept": "text/plain"})).text == '{"a": 1}\n'


async def test_refused_parameters(api: RunningAPI) -> None:
    job = await ended(api, "count", 1)
    for query, named in {
        "since=1&recent=1": "recent",
        "follow=1&limit=5": "limit",
        "follow=1&grep=x": "grep",
        "recent=1&grep=x": "recent",
        "fold=1": "fold",
        "limit=0": "limit",
        "limit=10001": "limit",
        "bytes=5": "bytes",
        "since=-1": "since",
        "form=xml": "form",
        "sinse=1": "sinse",
        "grep=": "grep",
    }.items():
        reply = await api.client.get(f"/jobs/{job}/records?{query}")
        assert (reply.status_code, reply.json()["code"]) == (400, "invalid_request"), query
        assert reply.json()["detail"].startswith(named), reply.json()
    wrong = await api.client.get(f"/jobs/{job}/records", headers={"Accept": EVENTS, "Last-Event-ID": "x"})
    assert wrong.status_code == 400
    assert (await api.client.get(f"/jobs/{job}/records", headers={"Accept": "image/png"})).status_code == 406
    for query in ("", "?follow=1", "?grep=x"):
        assert (await api.client.get(f"/jobs/{UNKNOWN}/records{query}")).status_code == 404
    assert (await api.client.head(f"/jobs/{job}/records?follow=1")).status_code == 200


# Searches


async def test_search_finds_every_spelling(api: RunningAPI, peer: Peer) -> None:
    records = ["plain", 'say "hi"', "na\u00efve", {"key": [1, 2]}, "PLAIN"]
    job, conn = await feeding(api, peer, *records)
    conn.reply(b'{"stream": "na\xc3\xafve too"}\n', {"result": None})
    await api.dispatcher.result(job)

    async def found(query: str, **parameters: str) -> list[int]:
        reply = await api.client.get(f"/jobs/{job}/records", params={"grep": query, **parameters})
        lines = [json.loads(line) for line in reply.text.splitlines()]
        assert lines[-1] == {"result": None}
        return [line["packet"] for line in lines[:-1]]

    assert await found("plain") == [0]
    assert await found("plain", fold="1") == [0, 4]
    assert await found('say "hi"') == [1]
    assert await found("na\u00efve") == [2, 5]
    assert await found('"key"') == [3]
    assert await found("plain", since="1") == []
    assert await found("a\nb") == []


async def test_search_is_bounded_and_goes_on(api: RunningAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    job = await ended(api, "count", 30_000)
    path = f"/jobs/{job}/records"
    lines = await lines_of(api, f"{path}?grep=99&limit=5")
    assert [line["data"] for line in lines[:-1]] == [99, 199, 299, 399, 499]
    assert lines[-1] == {"continue": True, "next": 500, "scanned": 500, "matches": 5}
    monkeypatch.setattr("harpcaller.http.records._MAX_SEARCHED", 50_000)
    monkeypatch.setattr("harpcaller.http.records._STEP_BYTES", 10_000)
    found: list[int] = []
    since, requests = 0, 0
    while True:
        lines = await lines_of(api, f"{path}?grep=99&limit=10000&since={since}")
        found += [line["data"] for line in lines[:-1]]
        requests += 1
        if "next" not in lines[-1]:
            break
        assert lines[-1]["scanned"] == lines[-1]["next"] - since > 0
        since = lines[-1]["next"]
    assert found == [number for number in range(30_000) if "99" in str(number)]
    assert requests >= 3


# Followers

EVENTS = "text/event-stream"


async def test_follow_sends_records_when_they_come_then_the_end(api: RunningAPI, peer: Peer) -> None:
    job, conn = await feeding(api, peer, 0)
    async with opened(api, f"/jobs/{job}/records?follow=1&since=0") as lines:
        assert lines.response.headers["x-accel-buffering"] == "no"
        assert lines.response.headers["cache-control"] == "no-store"
        assert (await lines.message())["data"] == 0
        for number in range(1, 4):
            conn.reply({"stream": {"number": number}})
            assert (await lines.message())["data"] == {"number": number}
        conn.reply({"result": 1.50})
        assert await lines.message() == {"result": 1.5}
        assert await lines.rest() == []


async def test_events_have_numbers_and_stop_browsers_at_the_end(api: RunningAPI, peer: Peer) -> None:
    job, conn = await feeding(api, peer, "a", "b")
    path = f"/jobs/{job}/records?follow=1&since=0"
    async with opened(api, path, accept=EVENTS) as events:
        assert events.response.headers["content-type"].startswith(EVENTS)
        assert await events.line() == "retry: 1000"
        first = await events.event()
        assert (first["id"], first["event"], json.loads(first["data"])["data"]) == ("0", "record", "a")
    async with opened(api, path, accept=EVENTS, last_event_id="0") as events:
        assert (await events.event())["id"] == "1"
        conn.reply(b'{"stream": {"a":\r1}}\n', {"result": None})  # a carriage return would end the line of an event
        record = await events.event()
        assert (record["id"], json.loads(record["data"])["data"]) == ("2", {"a": 1})
        assert await events.event() == {"id": "3", "event": "end", "data": '{"result":null}'}
        assert await events.rest() == []
    again = await api.client.get(path, headers={"Accept": EVENTS, "Last-Event-ID": "3"})
    assert (again.status_code, again.content) == (204, b"")
    async with opened(api, path, accept=EVENTS, last_event_id="2") as events:
        assert (await events.event())["event"] == "end"


async def test_follow_without_a_start_sends_no_stored_record(api: RunningAPI, peer: Peer) -> None:
    job, conn = await feeding(api, peer, "a", "b")
    conn.reply({"result": None})
    assert (await api.client.get(f"/jobs/{job}/end?wait=30")).status_code == 200
    path = f"/jobs/{job}/records?follow=1"
    for form, expected in ("jsonl", [{"result": None}]), ("jsonl&since=1", ["b", {"result": None}]):
        lines = await lines_of(api, f"{path}&form={form}")
        assert [line.get("data", line) for line in lines] == expected
    events = (await api.client.get(f"{path}&form=sse")).text
    assert re.findall("^event: (.*)$", events, re.MULTILINE) == ["end"]
    [operation] = [one for one in OPERATIONS if one.operation_id == "read_records"]
    assert "follow=1&since=0" in operation.description


async def test_rows_of_the_job_come_with_its_records(api: RunningAPI, peer: Peer) -> None:
    job, conn = await feeding(api, peer, 0)
    path = f"/jobs/{job}/records?follow=1&since=0&state=1"
    async with opened(api, path) as lines, opened(api, path, accept=EVENTS) as events:
        first = [await lines.message() for _ in range(2)]
        [row] = [line["job"] for line in first if "job" in line]
        assert (row["job"], row["state"], row["records"]) == (job, "running", 1)
        assert row["can"] == ["read", "cancel", "rerun"]
        conn.reply({"result": 2})
        rest = [json.loads(line) for line in await lines.rest()]
        assert rest[-1] == {"result": 2}
        assert rest[-2]["job"]["state"] == "returned"
        names = [(await events.event()) for _ in range(2)]
        assert {event["event"] for event in names} == {"job", "record"}
        assert all("id" not in event for event in names if event["event"] == "job")
    [row] = [line["job"] for line in await lines_of(api, f"/jobs/{job}/records?state=1") if "job" in line]
    assert row["state"] == "returned"


async def test_heartbeats_on_idle_streams(api: RunningAPI, peer: Peer) -> None:
    api.api.service.streams.heartbeat = 0.05
    job, conn = await feeding(api, peer, 0)
    path = f"/jobs/{job}/records?follow=1"
    async with opened(api, path) as lines, opened(api, f"{path}&form=sse") as events:
        assert [await lines.line() for _ in range(3)] == [""] * 3
        assert await events.line() == "retry: 1000"
        assert ": hb" in [await events.line() for _ in range(3)]
        conn.reply({"stream": 7}, {"result": None})
        assert (await lines.message())["data"] == 7
        assert json.loads((await events.event())["data"])["data"] == 7


async def test_stop_ends_streams_with_a_last_line(tmp_path: Path, peer: Peer) -> None:
    async with running_api(tmp_path, host_line(peer.port), rules=None) as api:
        job, _ = await feeding(api, peer, 0, 1)
        path = f"/jobs/{job}/records?follow=1&since=0"
        async with opened(api, path) as lines, opened(api, path, accept=EVENTS) as events:
            assert (await lines.message())["data"] == 0
            assert (await events.event())["id"] == "0"
            async with asyncio.timeout(4):  # it does not wait for its deadline
                await api.api.aclose()
            assert (await lines.rest())[-1] == '{"interrupted":"stopping","next":2}'
            assert 'data: {"interrupted":"stopping","next":2}' in await events.rest()


async def test_revoked_token_ends_streams(api: RunningAPI, peer: Peer) -> None:
    job, _ = await feeding(api, peer, 0)
    headers = api.headers_of("guest")
    path = f"/jobs/{job}/records?follow=1&since=0"
    async with opened(api, path, **headers) as lines, opened(api, path) as other:
        assert (await lines.message())["data"] == 0
        revoke_token(api.directory / "tokens", "guest")
        api.api.service.identities().refresh()
        assert (await lines.rest())[-1] == '{"interrupted":"access","next":1}'
        assert (await other.message())["data"] == 0
    assert (await api.client.get(path, headers=headers)).status_code == 401


async def test_too_many_streams_are_refused(tmp_path: Path, peer: Peer) -> None:
    settings = HTTPSettings(streams=3, streams_per_client=2)
    async with running_api(tmp_path, host_line(peer.port), http=settings, rules=None) as api:
        job, conn = await feeding(api, peer, 0)
        path = f"/jobs/{job}/records?follow=1&since=0"
        one, two = api.headers_of("one"), api.headers_of("two")
        async with opened(api, path, **one), opened(api, path, **one) as lines:
            refused = await api.client.get(path, headers=one)
            assert (refused.status_code, refused.json()["code"]) == (429, "too_many_requests")
            assert int(refused.headers["retry-after"]) > 0
            assert (await api.client.get(f"/jobs/{job}/records", headers=one)).status_code == 200
            async with opened(api, path, **two):
                assert (await api.client.get(path, headers=two)).status_code == 429
            conn.reply({"result": None})
            await lines.rest()
        assert (await api.client.get(path, headers=one)).status_code == 200
        assert api.api.service.streams.kinds.total() == 0


async def test_reader_that_does_not_read_costs_little(api: RunningAPI) -> None:
    """It gets all records when it reads again."""
    job = await ended(api, "repeat", 3000, "x" * 10_000)
    path = f"GET /api/v1/jobs/{job}/records?download=1 HTTP/1.1\r\nHost: localhost\r\n{api.authorization}\r\n"
    stuck = []
    for _ in range(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port, limit=1024)
        writer.write(path.encode())
        stuck.append((reader, writer))
    total = 0
    async with asyncio.timeout(DEADLINE), api.client.stream("GET", f"/jobs/{job}/records?download=1") as response:
        async for chunk in response.aiter_bytes():
            total += len(chunk)
    assert total > 30_000_000
    for connection in api.api.server.acceptor.connections.values():
        assert connection.transport.get_write_buffer_size() <= 300_000
    received = 0
    async with asyncio.timeout(DEADLINE):
        while received < 30_000_000:
            received += len(await stuck[0][0].read(1_000_000))
    for _, writer in stuck:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


# Several jobs


async def test_records_of_several_jobs(api: RunningAPI, peer: Peer) -> None:
    counted = await ended(api, "count", 3)
    fed, conn = await feeding(api, peer, "first")
    async with opened(api, f"/records?jobs={counted},{fed}&follow=1&timed=0") as lines:
        seen = [await lines.message() for _ in range(5)]
        assert [line for line in seen if line["job"] == counted] == [
            *({"job": counted, "packet": number, "data": number} for number in range(3)),
            {"job": counted, "end": {"result": "counted"}},
        ]
        assert [line for line in seen if line["job"] == fed] == [{"job": fed, "packet": 0, "data": "first"}]
        conn.reply({"stream": "}\n{"}, {"result": None})
        assert await lines.message() == {"job": fed, "packet": 1, "data": "}\n{"}
        assert await lines.message() == {"job": fed, "end": {"result": None}}
        assert await lines.message() == {"done": True}
        assert await lines.rest() == []
    resumed = await api.client.post("/records?timed=0", json={"jobs": {counted: 2, fed: 1}})
    lines_seen = [json.loads(line) for line in resumed.text.splitlines()]
    assert sorted(str(line.get("packet")) for line in lines_seen) == ["1", "2", "None", "None", "None"]
    for jobs in (UNKNOWN, f"{counted},{UNKNOWN}", "x"):
        assert (await api.client.get(f"/records?jobs={jobs}")).status_code == 404
    assert (await api.client.get(f"/records?jobs={','.join([counted] * 3)}")).status_code == 200
    assert (await api.client.post("/records", json={"jobs": {counted: "1"}})).status_code == 422
    assert (await api.client.post("/records", json={"jobs": {}})).status_code == 400
