"""The problems of the HTTP API, each produced by the fault that it is for. See also test_http_limits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from harpcaller.config import HTTPSettings
from harpcaller.http.problems import CODES
from support.deadline import eventually
from support.dispatcher import host_line, until
from support.http_api import running_api
from support.peers import Peer
from support.scripted import scripted_harpd

UNKNOWN = "00000000-0000-0000-0000-000000000000"
JSON = {"Content-Type": "application/json"}
CALL: dict[str, Any] = {"host": "nohost", "procedure": "p", "arguments": []}


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    with scripted_harpd(tmp_path_factory.mktemp("peer")) as peer:
        yield peer


def is_problem(reply: httpx.Response, status: int, code: str, detail: str = "") -> bool:
    """Return whether a response is this problem, in the form of RFC 9457."""
    problem = reply.json()
    assert (reply.status_code, problem["code"]) == (status, code), reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    assert problem["request"] == reply.headers["harp-request"]
    assert problem["type"].endswith(f"/docs/errors#{code}")
    assert problem["status"] == status
    assert reply.headers["cache-control"] == "no-store"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert ("retry-after" in reply.headers) == ("retry_after" in problem)
    return detail in problem["detail"]


async def test_http_parameter_of_a_path_may_look_like_its_template(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        assert is_problem(await api.client.get("/jobs/%7Bjob%7D"), 404, "invalid_jobid")
        assert is_problem(await api.client.get("/hosts/%7Bhost%7D"), 404, "not_found")


async def test_http_invalid_bodies_are_problems(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:

        async def post(body: str | bytes, path: str = "/jobs", **headers: str) -> httpx.Response:
            return await api.client.post(path, content=body, headers={**JSON, **headers})

        call = '{"host":"a","procedure":"b","arguments":%s%s}'
        for body in (
            *("", "{", "x", '{"host":"a"', "\ufeff{}", '{"host":"a","host":"a"}', call % ("[NaN]", "")),
            *(call % ("[" * 1001 + "]" * 1001, ""), call % ("[]", ',"queue":{"name":{},"name":{}}'), b"\xff{}"),
            *(call % ("[]", "") + " 1", call % ("[Infinity]", ""), call % ("[01]", "")),
        ):
            assert is_problem(await post(body), 400, "invalid_request"), body
        for body, pointer in (
            ('{"procedure":"b","arguments":[]}', "/host"),
            (call % ("[]", ',"colour":1'), "/colour"),
            (call % ("5", ""), "/arguments"),
            (call % ("[]", ',"timeout":-1'), "/timeout"),
            (call % ("[]", ',"queue":{"name":5}'), "/queue/name"),
            (call % ("[]", ',"queue":{"name":{},"size":5}'), "/queue/size"),
            ('{"host":7,"procedure":"b","arguments":[]}', "/host"),
            ('{"host":"%s","procedure":"b","arguments":[]}' % ("x" * 256), "/host"),
            ('{"harpcaller":1,"host":"a","procedure":"b","arguments":[]}', "/harpcaller"),
            ("[]", ""),
            ("5", ""),
        ):
            reply = await post(body)
            assert is_problem(reply, 422, "invalid_request"), body
            assert reply.json()["errors"][0]["pointer"].startswith(pointer), reply.text
        many = '{"calls":[' + call % ("[]", "") + "," + call % ("[]", ',"timeout":"x"') + "]}"
        assert (await post(many, "/jobs/many")).json()["errors"][0]["pointer"] == "/calls/1/timeout"
        for query, detail in (("wiat=1", "did you mean wait?"), ("wait=61", "wait"), ("wait=nan", "wait")):
            assert is_problem(await post(call % ("[]", ""), f"/jobs?{query}"), 400, "invalid_request", detail)
        for query in (
            "wait=1&wait=2",
            "wait=%ff",
            "&".join(f"x{number}=1" for number in range(200)),
            "payloads=all",
            "wait=null",
        ):
            assert is_problem(await api.client.get(f"/jobs/{UNKNOWN}?{query}"), 400, "invalid_request")
        kind = {"Content-Type": "text/plain"}
        assert is_problem(await post(call % ("[]", ""), **kind), 415, "unsupported_media_type")
        latin = {"Content-Type": "application/json; charset=latin1"}
        assert is_problem(await post(call % ("[]", ""), **latin), 415, "unsupported_media_type")
        assert (await api.client.get("/jobs")).json()["jobs"] == []


async def test_http_wrong_paths_and_methods_are_problems(tmp_path: Path) -> None:
    async with running_api(tmp_path, http=HTTPSettings(console=False, base_path="/harp")) as api:
        reply = await api.client.get("/nothing")
        assert is_problem(reply, 404, "not_found")
        assert reply.json()["type"] == "/harp/docs/errors#not_found"
        page = await api.client.get(f"http://127.0.0.1:{api.port}{reply.json()['type']}", headers={"Authorization": ""})
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert all(f'id="{code}"' in page.text for code in CODES)
        assert is_problem(await api.client.get(f"http://127.0.0.1:{api.port}/api/v1/jobs"), 404, "not_found")
        for path in ("/api", "/api/v1", "/api/v1/", "/openapi.json", "/api/openapi.json"):
            reply = await api.client.get(f"http://127.0.0.1:{api.port}/harp{path}")
            assert is_problem(reply, 404, "not_found"), path
            assert "/harp/docs" in reply.json()["detail"]
        for job in (UNKNOWN, "x", UNKNOWN.upper(), "x" * 2000, "%00", "../x%2f"):
            reply = await api.client.get(f"/jobs/{job}/end")
            assert is_problem(reply, 404, "not_found" if "/" in job else "invalid_jobid"), job
        for path in ("cancel", "release", "rerun"):
            assert is_problem(await api.client.post(f"/jobs/{UNKNOWN}/{path}", json={}), 404, "invalid_jobid")
        reply = await api.client.delete("/jobs")
        assert is_problem(reply, 405, "method_not_allowed")
        assert reply.headers["allow"] == "GET, HEAD, OPTIONS, POST"
        options = await api.client.options("/jobs")
        assert (options.status_code, options.headers["allow"]) == (204, "GET, HEAD, OPTIONS, POST")
        reply = await api.client.get("/jobs", headers={"Accept": "text/html, image/png"})
        assert is_problem(reply, 406, "not_acceptable", "application/json")
        for accepted in ("application/json", "text/html, application/*;q=0.5", "*/*"):
            assert (await api.client.get("/jobs", headers={"Accept": accepted})).status_code == 200
        head = await api.client.head("/jobs")
        assert (head.status_code, head.content) == (200, b"")


async def test_http_missing_rights_are_problems(tmp_path: Path) -> None:
    rules = '[[rule]]\nwho = ["token:slow"]\nallow = ["call", "read"]\nrate = "2/h"\n'
    async with running_api(tmp_path, rules=rules) as api:
        for wrong in ("Bearer harp_x_y", "Basic eDp5", "Bearer", api.token):
            reply = await api.client.get("/jobs", headers={"Authorization": wrong})
            assert is_problem(reply, 401, "auth_error")
            assert reply.headers["www-authenticate"] == 'Bearer realm="harp"'
        assert is_problem(await api.client.post("/jobs", json=CALL), 403, "access_denied", "token:admin may not call p")
        slow = api.headers_of("slow", "none")
        mine = (await api.client.post("/jobs", json=CALL, headers=slow)).json()["job"]
        assert is_problem(await api.client.get("/jobs", headers=slow), 403, "access_denied")
        assert is_problem(await api.client.get(f"/jobs/{mine}"), 404, "invalid_jobid")  # it is of another owner
        assert (await api.client.post("/jobs", json=CALL, headers=slow)).status_code == 201
        reply = await api.client.post("/jobs", json=CALL, headers=slow)
        assert is_problem(reply, 429, "rate_limited")
        assert int(reply.headers["retry-after"]) > 1000


async def test_http_jobs_in_the_wrong_state_are_problems(tmp_path: Path, peer: Peer) -> None:
    async with running_api(tmp_path, host_line(peer.port), http=HTTPSettings(waits=1)) as api:
        job = (await api.client.post("/jobs", json={**CALL, "host": "web01", "procedure": "hang"})).json()["job"]
        waiting = asyncio.create_task(api.client.get(f"/jobs/{job}?wait=60"))
        while not api.api.service.waits:
            await asyncio.sleep(0.01)
        for path in ("", "/end", "/result"):
            assert is_problem(await api.client.get(f"/jobs/{job}{path}?wait=1"), 429, "too_many_requests", "http.waits")
        for path, body in (("/jobs?wait=1", CALL), (f"/jobs/{job}/cancel", {"wait": 1})):  # they have no effect
            assert is_problem(await api.client.post(path, json=body), 429, "too_many_requests", "http.waits")
        assert len((await api.client.get("/jobs?state=open")).json()["jobs"]) == 1
        assert len((await api.client.get("/jobs")).json()["jobs"]) == 1
        await until(api.dispatcher, job, lambda found: found.started is not None, "a started job")
        await api.client.post(f"/jobs/{job}/cancel")
        assert (await waiting).json()["state"] == "cancelled"
        reply = await api.client.get(f"/jobs/{job}/result")
        assert is_problem(reply, 409, "no_result")
        assert reply.json()["end"] == {"cancelled": True}


async def test_http_failing_store_is_a_problem(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        api.dispatcher.config = msgspec.structs.replace(api.dispatcher.config, disk_reserve=2**62)  # more than any disk
        for path, body in (("/jobs", CALL), ("/jobs/many", {"calls": [CALL]})):
            reply = await api.client.post(path, json=body)
            assert is_problem(reply, 503, "storage_error")
            assert reply.headers["retry-after"] == "5"


async def test_http_stopping_dispatcher_is_a_problem(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        entered = asyncio.Event()

        async def body() -> Any:
            yield b'{"host":"nohost",'
            entered.set()
            await api.api.service.stopping.wait()
            yield b'"procedure":"p","arguments":[]}'

        request = asyncio.create_task(api.client.post("/jobs", content=body(), headers=JSON))
        await entered.wait()
        await eventually(lambda: api.api.service.bodies_of, what="the request in progress")
        await api.api.aclose()
        assert is_problem(await request, 503, "stopping")
        with pytest.raises(httpx.ConnectError):
            await api.client.get("/jobs")
