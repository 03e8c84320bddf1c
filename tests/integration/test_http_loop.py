"""No request to the HTTP API keeps the event loop busy for long: other clients, and calls, would wait for it."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from harp.protocol.dispatcher import MAX_CALLS
from harpcaller.access.rules import Action
from support.http_api import RunningAPI, running_api

#: Maximum seconds of CPU of one step of the loop. CPU time hardly depends on what else the machine does.
MOST = 0.1
LONG = "x" * 4_000_000
ROWS = 500


@contextmanager
def measured_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[float, str]]]:
    """Collect the CPU time of each step of the loop that takes longer than `MOST`, with its name.

    As in a daemon, a full garbage collection does not visit what was there before: here, all objects of the tests.
    """
    found: list[tuple[float, str]] = []
    run = asyncio.Handle._run  # noqa: SLF001 - of asyncio: only this has every step

    def measure(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        run(handle)
        if (took := time.thread_time() - began) > MOST:
            found.append((took, repr(handle)))

    gc.freeze()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(asyncio.Handle, "_run", measure)
            yield found
    finally:
        gc.unfreeze()


async def submit(api: RunningAPI, **members: Any) -> str:
    call = {"host": "nohost", "procedure": "p", "arguments": [], **members}
    reply = await api.client.post("/jobs?wait=20", json=call)
    assert reply.status_code == 201, reply.text
    job_id: str = reply.json()["job"]
    return job_id


@asynccontextmanager
async def filled_api(directory: Path) -> AsyncIterator[tuple[RunningAPI, str]]:
    """Run an API with many jobs; also yield the id of one with long payloads."""
    async with running_api(directory) as api:
        call = {"host": "nohost", "procedure": "p", "arguments": ["a" * 300], "info": {"b": "c" * 300}}
        reply = await api.client.post("/jobs/many", json={"calls": [call] * ROWS})
        assert reply.status_code == 201, reply.text
        yield api, await submit(api, arguments=[LONG], info=LONG)


NOW = 1_790_000_000
REQUESTS = {
    "list": f"/jobs?limit={ROWS}",
    "list as text": f"/jobs?limit={ROWS}&payloads=text",
    "counts": "/jobs/counts?by=state,host,procedure,queue,owner,end_type",
    "short buckets": f"/jobs/stats?from={NOW - 14_990}&to={NOW}&step=10",
    "long buckets": f"/jobs/stats?from={NOW - 1_499 * 86_400}&to={NOW}&step=86400",
    "many words": "/jobs?q=" + "ab+" * 2_600,
    "many hosts": "/jobs?host=" + "ab," * 2_600,
    "a long parameter": "/jobs?" + "p" * 7_900 + "=1",
    "a job": "/jobs/{job}",
    "a job as text": "/jobs/{job}?payloads=text",
    "records": "/jobs/{job}/records?grep=" + "a" * 900,
}


@pytest.mark.parametrize("role", ["admin", "own"])
async def test_http_gets_take_short_steps(tmp_path: Path, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a client whose rights are decided job by job."""
    async with filled_api(tmp_path) as (api, job):
        rights = await api.client.get("/me")
        assert Action.ADMIN in rights.json()["can"]
        headers = api.headers_of("admin" if role == "admin" else "other", "viewer")
        with measured_steps(monkeypatch) as slow:
            for name, path in REQUESTS.items():
                async with api.client.stream("GET", path.replace("{job}", job), headers=headers) as reply:
                    assert reply.status_code in (200, 400, 404), name
                    async for _ in reply.aiter_raw():
                        pass
                assert not slow, (name, slow)


async def test_http_posts_take_short_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"host": "nohost", "procedure": "p", "arguments": [1, {"a": "b"}]}
    bodies = {
        "many calls": ("/jobs/many", {"calls": [call] * MAX_CALLS}),
        "invalid calls": ("/jobs/many", {"calls": [{}] * MAX_CALLS}),
        "many members": ("/jobs", {f"k{number}": 1 for number in range(100_000)}),
        "deep arguments": ("/jobs", {**call, "arguments": json.loads("[" * 900 + "]" * 900)}),
    }
    contents = {name: (path, json.dumps(body).encode()) for name, (path, body) in bodies.items()}
    async with running_api(tmp_path) as api:
        with measured_steps(monkeypatch) as slow:
            for name, (path, content) in contents.items():
                reply = await api.client.post(path, content=content, headers={"Content-Type": "application/json"})
                assert reply.status_code in (201, 400, 422), (name, reply.text)
                assert not slow, (name, slow)
