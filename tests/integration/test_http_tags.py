"""Tags of lists: a client gets 304 until the list is another one, and learns nothing of foreign jobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.deadline import eventually
from support.dispatcher import call, host_line, until
from support.http_api import RunningAPI, running_api
from support.peers import Peer
from support.scripted import scripted_harpd

RULES = """\
[[rule]]
who = ["token:admin"]
allow = ["call", "read", "cancel", "list", "admin"]
jobs = "any"

[[rule]]
who = ["token:*"]
allow = ["call", "read", "list"]
"""


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    with scripted_harpd(tmp_path) as peer:
        yield peer


async def tag_of(api: RunningAPI, path: str, **headers: str) -> str:
    reply = await api.client.get(path, headers=headers)
    assert reply.status_code == 200, reply.text
    tag: str = reply.headers["etag"]
    assert tag.startswith('W/"')
    return tag


async def status_of(api: RunningAPI, path: str, tag: str, **headers: str) -> int:
    reply = await api.client.get(path, headers={"If-None-Match": tag, **headers})
    if reply.status_code == 304:
        assert reply.content == b""
        assert reply.headers["etag"].removeprefix("W/") in tag
    return reply.status_code


async def test_http_list_is_unchanged_until_a_job_changes(tmp_path: Path, peer: Peer) -> None:
    async with running_api(tmp_path, host_line(peer.port)) as api:
        job = await api.dispatcher.submit(call("hang", queue={"q": 1}), "test")
        await until(api.dispatcher, job, lambda found: found.started is not None, "the start")
        paths = ("/jobs", "/jobs?state=open&limit=5", "/queues", "/hosts", "/hosts/web01", "/jobs/counts?by=host,state")
        tags = {path: await tag_of(api, path) for path in paths}
        assert tags["/jobs"] != tags["/jobs?state=open&limit=5"]
        for path, tag in tags.items():
            assert await status_of(api, path, tag) == 304, path
            assert await status_of(api, path, f'"x", {tag}') == 304, path
            assert await status_of(api, path, tag.removeprefix("W/")) == 304, path
            assert await status_of(api, path, 'W/"x"') == 200, path
        assert await status_of(api, "/jobs?limit=6", tags["/jobs?state=open&limit=5"]) == 200
        await api.dispatcher.cancel(job)
        await until(api.dispatcher, job, lambda found: found.end is not None and not found.holds_slot, "the end")
        for path in ("/jobs", "/jobs?state=open&limit=5", "/queues"):
            assert await status_of(api, path, tags[path]) == 200, path
        again = await tag_of(api, "/jobs")
        assert (await api.client.head("/jobs", headers={"If-None-Match": again})).status_code == 304


async def test_http_unchanged_list_reads_nothing_from_the_store(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        job = await api.dispatcher.submit(call("p", host="nohost"), "test")
        await api.dispatcher.result(job)
        root = str(api.client.base_url).partition("/api/")[0]

        async def reads() -> list[str]:
            text = (await api.client.get(f"{root}/metrics")).text
            return [line for line in text.splitlines() if 'verb="find_jobs"' in line and "_count" in line]

        tag = await tag_of(api, "/jobs?procedure=p")
        before = await reads()
        assert before
        for _ in range(5):
            assert await status_of(api, "/jobs?procedure=p", tag) == 304
        assert await reads() == before


async def test_http_relative_times_are_another_list_each_time(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        tag = await tag_of(api, "/jobs?from=-1h")
        assert await status_of(api, "/jobs?from=-1h", tag) == 200


async def test_http_tag_shows_no_changes_of_foreign_jobs(tmp_path: Path) -> None:
    async with running_api(tmp_path, rules=RULES) as api:
        own = api.headers_of("own", "role")
        mine = {"host": "nohost", "procedure": "mine", "arguments": []}
        assert (await api.client.post("/jobs?wait=20", json=mine, headers=own)).status_code == 201
        tag = await tag_of(api, "/jobs", **own)
        foreign = await api.client.post("/jobs?wait=20", json={**mine, "procedure": "foreign"})
        assert foreign.status_code == 201
        assert await status_of(api, "/jobs", tag, **own) == 304
        assert (await api.client.post("/jobs?wait=20", json=mine, headers=own)).status_code == 201
        assert await status_of(api, "/jobs", tag, **own) == 200


async def test_http_tag_is_of_one_client_and_its_rights(tmp_path: Path) -> None:
    rules = RULES.replace('"admin", "list"', '"list"')
    async with running_api(tmp_path, rules=rules) as api:
        tag = await tag_of(api, "/jobs")
        other = api.headers_of("other", "role")
        assert await status_of(api, "/jobs", tag, **other) == 200
        access = tmp_path / "access.toml"
        access.write_text(rules.replace('"call", "read", "cancel", "list", "admin"', '"call", "read", "list"'))
        before = api.dispatcher.access.policy
        await eventually(lambda: api.dispatcher.access.policy is not before, what="the new rules")
        assert await status_of(api, "/jobs", tag) == 200
        access.write_text('[[rule]]\nwho = ["token:other"]\nallow = ["list"]\n')
        before = api.dispatcher.access.policy
        await eventually(lambda: api.dispatcher.access.policy is not before, what="the new rules")
        assert await status_of(api, "/jobs", tag) == 403
