"""What clients of the HTTP API with few rights must not do: halt the event loop, keep rights, guess passwords."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from harpcaller.access.attempts import peer_of
from harpcaller.access.client import Client
from harpcaller.model.jobs import State
from support.deadline import eventually
from support.dispatcher import host_line
from support.http_api import RULES, RunningAPI, running_api

JSON = {"Content-Type": "application/json"}
QUOTES = "/jobs?host=" + '"\\' * 3900


async def measure(api: RunningAPI, method: str, path: str, **options: Any) -> tuple[float, httpx.Response]:
    """Return the processor seconds of the event loop for a request of a client with few rights, and the reply."""
    began = time.thread_time()
    reply = await api.client.request(method, path, headers=JSON | api.headers_of("stranger", "none"), **options)
    return time.thread_time() - began, reply


async def test_http_requests_of_a_stranger_do_not_halt_the_event_loop(tmp_path: Path) -> None:
    arrays = b"[" + b",".join([b"[]"] * 2_000_000) + b"]"
    words = "+".join(f"zz{chr(97 + at % 26)}{chr(97 + at // 26)}ed:1" for at in range(400))
    async with running_api(tmp_path) as api:
        await measure(api, "GET", "/me")
        seconds, reply = await measure(api, "POST", "/records", content=b'{"jobs":%b}' % arrays)
        assert reply.status_code == 413
        assert seconds < 0.4
        question = b'{"action":"call","host":"a","procedure":"b","arguments":%b}' % arrays
        seconds, reply = await measure(api, "POST", "/me/can", content=question)
        assert reply.status_code == 200
        assert seconds < 0.3
        seconds, _ = await measure(api, "GET", f"/jobs?q={words}")
        assert seconds < 0.1
        head = f"GET /api/v1{QUOTES} HTTP/1.1\r\nHost: localhost\r\n{api.authorization}Connection: close\r\n\r\n"
        began = time.thread_time()
        answer = await api.send(head.encode())
        assert b"expected a text in quotation marks" in answer
        assert time.thread_time() - began < 0.1


async def test_http_wait_for_a_tag_ends_with_the_right_to_the_job(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        async with running_api(tmp_path, host_line(port)) as api:
            call = {"host": "web01", "procedure": "p", "arguments": []}
            bob = api.headers_of("bob", "none")
            job = (await api.client.post("/jobs", json=call, headers=bob)).json()["job"]
            await eventually(lambda: is_running(api, job))
            tag = (await api.client.get(f"/jobs/{job}", headers=bob)).headers["etag"]
            waiting = asyncio.create_task(
                api.client.get(f"/jobs/{job}?wait=60", headers=bob | {"If-None-Match": tag}, timeout=90)
            )
            await eventually(lambda: api.api.service.waits == 1)
            before = api.dispatcher.access.policy
            (tmp_path / "access.toml").write_text(RULES.partition("\n\n")[0] + "\n")
            await eventually(lambda: api.dispatcher.access.policy is not before)
            assert (await api.client.post(f"/jobs/{job}/cancel", json={})).status_code == 200
            reply = await asyncio.wait_for(waiting, 30)
            assert (reply.status_code, reply.json()["code"]) == (404, "invalid_jobid")


def is_running(api: RunningAPI, job_id: str) -> bool:
    job = api.dispatcher.get_active_job(job_id)
    return job is not None and job.state is State.RUNNING


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        ("[2001:db8:1:2:3:4:5:6]:4000", "2001:db8:1:2::/64"),
        ("[2001:db8:1:2::7]:4001", "2001:db8:1:2::/64"),
        ("[::1]:4001", "::1"),
        ("192.0.2.1:5", "192.0.2.1"),
        ("uid:5", "uid:5"),
    ],
)
def test_failed_attempts_of_one_ipv6_network_count_together(peer: str, expected: str) -> None:
    assert peer_of(Client(("anonymous@x",), "x", peer)) == expected


async def test_http_event_lines_are_json_whatever_the_last_event_id_is(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        headers = {"Accept": "application/jsonl", "Last-Event-ID": 'a","event":"x"b-3'}
        async with api.client.stream("GET", "/events", headers=headers) as reply:
            assert reply.status_code == 400


async def test_http_deep_names_of_queues_are_no_internal_error(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        for start, end in ('{"":', "}"), ("[", "]"):
            for depth in 320, 500, 680, 900, 980:
                name = '{"":' + start * depth + "1" + end * depth + "}"
                call = '{"host":"nohost","procedure":"p","arguments":[],"queue":{"name":' + name + "}}"
                reply = await api.client.post("/jobs", content=call, headers=JSON)
                assert reply.status_code in (201, 400, 422), (depth, reply.text)
                reply = await api.client.get("/queues", params={"name": name})
                assert reply.status_code in (200, 400, 414), (depth, reply.text)
        assert (await api.client.get("/jobs")).status_code == 200


async def test_http_stranger_holds_no_memory_with_the_body_of_a_login(tmp_path: Path) -> None:
    head = b"POST /api/v1/session HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    async with running_api(tmp_path) as api:
        for more in (b"Content-Length: 1000000\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n2000\r\n" + b" " * 8192):
            assert b"413" in (await api.send(head + more)).split(b"\r\n")[0]


async def test_http_client_of_one_host_learns_nothing_of_the_others(tmp_path: Path) -> None:
    only = '[[rule]]\nwho = ["token:guest"]\nallow = ["list"]\nhosts = ["web01"]\n'
    rules = RULES.partition("\n\n")[0] + "\n" + only
    async with running_api(tmp_path, host_line(1, "web01"), host_line(1, "web02"), rules=rules) as api:
        found = (await api.client.get("/hosts", headers=api.headers_of("guest", "none"))).json()
        assert [host["name"] for host in found["hosts"]] == ["web01"]
        assert found["registry"] == {}
        assert (await api.client.get("/hosts")).json()["registry"]["count"] == 2


async def test_http_wrong_token_for_readiness_is_refused(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        assert api.api.service.health is not None
        api.api.service.health.is_stopping = True
        ready = f"http://127.0.0.1:{api.port}/readyz"
        assert (await api.client.get(ready, headers={"Authorization": "Bearer harp_x_y"})).status_code == 401
        assert (await api.client.get(ready)).status_code == 503
