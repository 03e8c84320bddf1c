"""The operations on jobs over HTTP, with a real dispatcher and scripted hosts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harp.protocol.dispatcher import COUNTED_BY
from harpcaller.http.lists import JobFilterQuery
from harpcaller.model.job_filters import KEYS
from harpcaller.model.jobs import State
from harpcaller.store.sqlite.counting import FACETS as STORED_FACETS
from support.deadline import eventually
from support.dispatcher import host_line, until
from support.http_api import RunningAPI, running_api
from support.peers import Peer
from support.scripted import scripted_harpd

UNKNOWN = "00000000-0000-0000-0000-000000000000"


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    with scripted_harpd(tmp_path_factory.mktemp("peer")) as peer:
        yield peer


def a_call(procedure: str = "echo", *arguments: Any, **members: Any) -> dict[str, Any]:
    return {"host": "web01", "procedure": procedure, "arguments": list(arguments), **members}


async def submitted(api: RunningAPI, procedure: str = "echo", *arguments: Any, **members: Any) -> str:
    reply = await api.client.post("/jobs", json=a_call(procedure, *arguments, **members))
    assert reply.status_code == 201, reply.text
    job_id: str = reply.json()["job"]
    return job_id


async def running_job(api: RunningAPI, **members: Any) -> str:
    job_id = await submitted(api, "hang", **members)
    await until(api.dispatcher, job_id, lambda job: job.state is State.RUNNING, "a running job")
    return job_id


async def test_http_submit_answers_with_the_stored_job(tmp_path: Path, peer: Peer) -> None:
    async with running_api(tmp_path, host_line(peer.port)) as api:
        call = a_call("echo", 1, "two", queue={"name": {"q": 1}, "concurrency": 3}, info={"order": 7}, timeout=30)
        reply = await api.client.post("/jobs", json=call, params={"wait": 20})
        job = reply.json()
        assert reply.status_code == 201
        assert reply.headers["location"] == f"/api/v1/jobs/{job['job']}" == job["links"]["self"]
        assert (job["state"], job["end"]) == ("returned", {"result": [1, "two"]})
        assert (job["arguments"], job["info"], job["limits"]["timeout"]) == ([1, "two"], {"order": 7}, 30)
        assert job["queue"]["name"] == {"q": 1}
        assert len(job["queue"]["id"]) == 32
        assert (job["owner"], job["can"], job["rerun_of"]) == ("token:admin", ["read", "rerun"], None)
        stored = await api.client.get(f"/jobs/{job['job']}")
        assert stored.json() == job
        assert stored.headers["etag"] == 'W/"returned.-.0"'
        assert stored.headers["content-type"] == "application/json"
        same = await api.client.get(f"/jobs/{job['job']}", headers={"If-None-Match": stored.headers["etag"]})
        assert (same.status_code, same.content) == (304, b"")


async def test_http_unknown_host_is_accepted(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        reply = await api.client.post("/jobs?wait=20", json=a_call(host="nohost"))
        job = reply.json()
        assert reply.status_code == 201
        assert (job["state"], job["end_type"], job["end"]["error"]["type"]) == ("failed", *["unknown_host"] * 2)
        assert job["end_message"] == job["end"]["error"]["message"]


async def test_http_submit_many_is_all_or_none(tmp_path: Path, peer: Peer) -> None:
    async with running_api(tmp_path, host_line(peer.port)) as api:
        reply = await api.client.post("/jobs/many", json={"calls": [a_call("echo", number) for number in range(50)]})
        assert reply.status_code == 201
        ids = reply.json()["jobs"]
        assert len(set(ids)) == 50
        last = (await api.client.get(f"/jobs/{ids[-1]}/end?wait=20")).json()
        assert last == {"result": [49]}
        faulty = {"calls": [a_call(), a_call(), {"host": "web01", "procedure": 5, "arguments": []}]}
        refused = await api.client.post("/jobs/many", json=faulty)
        assert refused.status_code == 422
        assert refused.json()["errors"][0]["pointer"] == "/calls/2/procedure"
        page = (await api.client.get("/jobs?limit=500")).json()
        assert len(page["jobs"]) == 50


async def test_http_wait_ends_with_the_job_or_the_time(tmp_path: Path, peer: Peer) -> None:
    async with running_api(tmp_path, host_line(peer.port)) as api:
        earlier = len(peer.requests)
        job_id = await running_job(api)
        await eventually(lambda: len(peer.requests) > earlier, what="the call: before it, a stop would be confirmed")
        loop = asyncio.get_running_loop()
        before = loop.time()
        late = await api.client.get(f"/jobs/{job_id}/end?wait=0.3")
        assert (late.status_code, late.json()) == (202, {"no_result": True})
        assert loop.time() - before >= 0.3
        waiting = asyncio.create_task(api.client.get(f"/jobs/{job_id}?wait=60"))
        while not api.api.service.waits:
            await asyncio.sleep(0.01)
        cancelled = await api.client.post(f"/jobs/{job_id}/cancel", json={})
        assert cancelled.json() == {"cancelled": True, "stop": None}
        ended = (await waiting).json()
        assert (ended["state"], ended["end"]) == ("cancelled", {"cancelled": True})
        assert api.api.service.waits == 0
        again = await api.client.post(f"/jobs/{job_id}/cancel", json={"wait": 20})
        assert again.json()["cancelled"] is False
        assert again.json()["stop"]["state"] == "unknown"  # the host is a legacy one


async def test_http_wait_with_a_tag_ends_with_its_change(tmp_path: Path, peer: Peer) -> None:
    async with running_api(tmp_path, host_line(peer.port)) as api:
        queue = {"name": {"q": 1}}
        first = await running_job(api, queue=queue)
        job_id = await submitted(api, "hang", queue=queue)
        tag = (await api.client.get(f"/jobs/{job_id}")).headers["etag"]
        assert tag == 'W/"queued.-.0"'
        headers = {"If-None-Match": tag}
        same = await api.client.get(f"/jobs/{job_id}?wait=0.2", headers=headers)
        assert (same.status_code, same.headers["etag"]) == (304, tag)
        waiting = asyncio.create_task(api.client.get(f"/jobs/{job_id}?wait=60", headers=headers))
        while not api.api.service.waits:
            await asyncio.sleep(0.01)
        await api.client.post(f"/jobs/{first}/cancel")
        started = await waiting
        assert (started.json()["state"], started.headers["etag"]) == ("running", 'W/"running.-.1"')
        unknown = await api.client.get(f"/jobs/{UNKNOWN}?wait=60", headers=headers)
        assert unknown.status_code == 404
        assert api.api.service.waits == 0


async def test_http_result_is_the_returned_value_only(tmp_path: Path, peer: Peer) -> None:
    async with running_api(tmp_path, host_line(peer.port)) as api:
        job_id = await submitted(api, "echo", "x")
        reply = await api.client.get(f"/jobs/{job_id}/result?wait=20&download=1")
        assert (reply.status_code, reply.json()) == (200, ["x"])
        assert reply.headers["content-disposition"] == f'attachment; filename="{job_id}.json"'
        raised = await submitted(api, "raise")
        refused = await api.client.get(f"/jobs/{raised}/result?wait=20")
        assert (refused.status_code, refused.json()["code"]) == (409, "no_result")
        assert refused.json()["end"]["exception"]["type"] == "ValueError"
        assert (await api.client.get(f"/jobs/{raised}/end")).json() == refused.json()["end"]


async def test_http_long_end_is_omitted_from_the_job(tmp_path: Path, peer: Peer) -> None:
    async with running_api(tmp_path, host_line(peer.port)) as api:
        job_id = await submitted(api, "echo", "x" * 300_000)
        job = (await api.client.get(f"/jobs/{job_id}?wait=20")).json()
        assert (job["end"], job["end_omitted"]["href"]) == (None, f"/api/v1/jobs/{job_id}/end")
        assert (
            len((await api.client.get(job["end_omitted"]["href"].removeprefix("/api/v1"))).json()["result"][0])
            == 300_000
        )


async def test_http_release_frees_a_slot(tmp_path: Path, peer: Peer) -> None:
    async with running_api(tmp_path, host_line(peer.port)) as api:
        job_id = await submitted(api, "echo", 1)
        await api.client.get(f"/jobs/{job_id}?wait=20")
        reply = await api.client.post(f"/jobs/{job_id}/release", json={})
        assert (reply.status_code, reply.json()) == (200, {"released": False})


async def test_http_rerun_copies_the_call(tmp_path: Path, peer: Peer) -> None:
    async with running_api(tmp_path, host_line(peer.port)) as api:
        body = '{"host":"web01","procedure":"echo","arguments":[1.50,1e400],"info":{"b":1,"a":2}}'
        headers = {"Content-Type": "application/json"}
        old = (await api.client.post("/jobs?wait=20", content=body, headers=headers)).text
        job_id = json.loads(old)["job"]
        again = await api.client.post(f"/jobs/{job_id}/rerun", json={"info": None, "timeout": 5})
        assert again.status_code == 201
        assert '"arguments":[1.50,1e400]' in again.text
        assert (again.json()["rerun_of"], again.json()["info"]) == (job_id, None)
        assert again.json()["limits"]["timeout"] == 5
        plain = await api.client.post(f"/jobs/{job_id}/rerun")
        assert '"info":{"b":1,"a":2}' in plain.text
        refused = await api.client.post(f"/jobs/{job_id}/rerun", json={"hosts": "web02"})
        assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/hosts")


async def test_http_list_has_pages_and_filters(tmp_path: Path, peer: Peer) -> None:
    async with running_api(tmp_path, host_line(peer.port)) as api:
        calls = [a_call("echo", number, queue={"name": {"n": number % 2}}) for number in range(7)]
        ids = (await api.client.post("/jobs/many", json={"calls": calls})).json()["jobs"]
        bad = await submitted(api, "raise")
        await asyncio.gather(*(api.client.get(f"/jobs/{job_id}?wait=20") for job_id in (*ids, bad)))
        found, address, pages = [], "/jobs?limit=3&state=returned&order=oldest", 0
        while address:
            reply = await api.client.get(address)
            found += [row["job"] for row in reply.json()["jobs"]]
            link = reply.headers.get("link", "")
            assert bool(link) == (reply.json()["next"] is not None)
            address, pages = link.removeprefix("</api/v1").partition(">")[0], pages + 1
        assert (found, reply.json()["complete"], pages) == (ids, True, 3)
        [row] = (await api.client.get("/jobs", params={"state": "bad", "q": "raise"})).json()["jobs"]
        assert (row["job"], row["end_type"], row["end_message"]) == (bad, "ValueError", "no")
        [queue] = {row["queue"]["id"] for row in (await api.client.get("/jobs?arguments=[1]")).json()["jobs"]}
        rows = (await api.client.get("/jobs", params={"queue": queue, "payloads": "text"})).json()["jobs"]
        assert [json.loads(row["queue"]["name"]) for row in rows] == [{"n": 1}] * 3
        for query, named in (("hots=web01", "host?"), ("state=bda", "state"), ("from=someday", "from")):
            refused = await api.client.get(f"/jobs?{query}")
            assert (refused.status_code, refused.json()["code"]) == (400, "invalid_request")
            assert named in refused.json()["detail"]
        other = (await api.client.get("/jobs?limit=1")).json()["next"]
        for cursor in (other, "x", ""):
            refused = await api.client.get("/jobs", params={"state": "returned", "cursor": cursor})
            assert (refused.status_code, refused.json()["code"]) == (400, "invalid_cursor")


async def test_http_counts_and_statistics(tmp_path: Path, peer: Peer) -> None:
    async with running_api(tmp_path, host_line(peer.port)) as api:
        ids = [await submitted(api, name) for name in ("echo", "echo", "raise")]
        await asyncio.gather(*(api.client.get(f"/jobs/{job_id}?wait=20") for job_id in ids))
        counts = (await api.client.get("/jobs/counts?by=state,procedure&state=raised")).json()
        assert {value["value"]: value["count"] for value in counts["by"]["state"]} == {"returned": 2, "raised": 1}
        assert counts["by"]["procedure"] == [{"value": "raise", "count": 1, "more": False}]
        found = (await api.client.get("/jobs/stats?from=-10m&step=60")).json()
        assert [sum(bucket[name] for bucket in found["buckets"]) for name in ("submitted", "returned", "raised")] == [
            3,
            2,
            1,
        ]
        for query in ("counts?by=colour", "counts?most=0", "stats?step=7", "stats?from=-400d&step=60", "stats?state=x"):
            assert (await api.client.get(f"/jobs/{query}")).status_code == 400


def test_http_filter_has_all_parts_and_facets() -> None:
    assert set(JobFilterQuery.__struct_encode_fields__) == {*KEYS, "q"}
    assert set(COUNTED_BY) == set(STORED_FACETS)


# Idempotency-Key.


async def test_http_same_key_is_the_same_job(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        key = {"Idempotency-Key": "order-7"}
        first = await api.client.post("/jobs", json=a_call("echo", 1), headers=key)
        again = await api.client.post("/jobs?wait=1", json=a_call("echo", 1), headers=key)
        assert again.status_code == 201
        assert first.json()["job"] == again.json()["job"]
        assert "idempotency-replayed" not in first.headers
        assert again.headers["idempotency-replayed"] == "true"
        other = await api.client.post("/jobs", json=a_call("echo", 2), headers=key)
        assert (other.status_code, other.json()["code"]) == (422, "key_reused")
        both = await api.client.post("/jobs", json=a_call("echo", 1, request_id="x"), headers=key)
        assert (both.status_code, both.json()["errors"][0]["pointer"]) == (422, "/request_id")
        # Another client, and another path, has keys of its own.
        foreign = await api.client.post("/jobs", json=a_call("echo", 1), headers={**key, **api.headers_of("other")})
        assert foreign.json()["job"] != first.json()["job"]
        for wrong in ("", "a b", "x" * 256):
            refused = await api.client.post("/jobs", json=a_call(), headers={"Idempotency-Key": wrong})
            assert refused.status_code == 400


async def test_http_same_key_is_for_all_calls_together(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        key = {"Idempotency-Key": "k"}
        calls = [a_call("echo", 1), a_call("echo", 2)]
        first = await api.client.post("/jobs/many", json={"calls": calls}, headers=key)
        again = await api.client.post("/jobs/many", json={"calls": calls}, headers=key)
        assert first.json() == again.json()
        assert again.headers["idempotency-replayed"] == "true"
        for changed in (calls[:1], [*calls, a_call("echo", 3)], calls[::-1]):
            refused = await api.client.post("/jobs/many", json={"calls": changed}, headers=key)
            assert (refused.status_code, refused.json()["code"]) == (422, "key_reused")
        assert len((await api.client.get("/jobs")).json()["jobs"]) == 2


async def test_http_key_of_a_rerun_is_of_one_new_job(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        job_id = await submitted(api, "echo", 1)
        replies = [
            await api.client.post(f"/jobs/{job_id}/rerun", headers={"Idempotency-Key": "again"}) for _ in range(2)
        ]
        assert len({reply.json()["job"] for reply in replies}) == 1
        assert len((await api.client.get("/jobs")).json()["jobs"]) == 2
