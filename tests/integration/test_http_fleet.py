"""Lists of queues, hosts and audit entries over HTTP, with a real dispatcher."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from harp.protocol.json_text import Raw
from harpcaller.model.lanes import queue_lane
from support.dispatcher import CREDENTIALS, call, host_line
from support.http_api import RunningAPI, running_api
from support.peers import Peer, reserved_port


@pytest.fixture
def dead_port() -> Iterator[int]:
    with reserved_port() as port:
        yield port


async def get(api: RunningAPI, path: str) -> Any:
    reply = await api.client.get(path)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def all_pages(api: RunningAPI, path: str, key: str, limit: int = 2) -> list[Any]:
    found: list[Any] = []
    cursor = ""
    while True:
        page = await get(api, f"{path}{'&' if '?' in path else '?'}limit={limit}{cursor}")
        assert len(page[key]) <= limit
        found += page[key]
        if page["next"] is None:
            return found
        cursor = f"&cursor={page['next']}"


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await check():
            await asyncio.sleep(0.02)


async def refused(api: RunningAPI, path: str, **headers: str) -> tuple[int, str]:
    reply = await api.client.get(path, headers=headers)
    return reply.status_code, reply.json()["code"]


async def test_http_queues_are_listed_filtered_and_found(tmp_path: Path, peer: Peer) -> None:
    async with running_api(tmp_path, host_line(peer.port)) as api:
        jobs = []
        for number in range(5):
            queue = {"site": number, "big": 1 << 70}
            jobs += [
                await api.dispatcher.submit(call("feed", arguments=[number], queue=queue), "test") for _ in range(2)
            ]

        async def running() -> bool:
            return [queue["running"] for queue in await all_pages(api, "/queues", "queues")] == [1] * 5

        await until(running)
        listed = await all_pages(api, "/queues", "queues")
        assert [(queue["name"]["site"], queue["queued"], queue["concurrency"]) for queue in listed] == [
            (number, 1, 1) for number in range(5)
        ]
        first = listed[0]
        name = json.dumps({"big": 1 << 70, "site": 0.0}).encode()
        assert first["id"] == queue_lane(Raw(name)).removeprefix("queue:")
        assert str(1 << 70) in (await api.client.get(f"/queues/{first['id']}")).text, "the name is as it was sent"
        assert await get(api, f"/queues/{first['id']}") == first
        assert (await get(api, f"/queues?name={name.decode().replace(' ', '')}"))["queues"] == [first]
        assert (await get(api, '/queues?name={"site":7}')) == {"queues": [], "next": None}
        assert [queue["name"]["site"] for queue in await all_pages(api, '/queues?q="SITE": 3', "queues")] == [3]
        assert len(await all_pages(api, "/queues?state=full", "queues")) == 5
        assert len(await all_pages(api, "/queues?state=busy", "queues", 500)) == 5
        assert await all_pages(api, "/queues?state=idle", "queues") == []
        assert await refused(api, "/queues/" + "0" * 32) == (404, "not_found")
        assert await refused(api, "/queues/x") == (404, "not_found")
        assert await refused(api, "/queues?name=[]") == (400, "invalid_request")
        assert await refused(api, "/queues?name={") == (400, "invalid_request")
        assert await refused(api, "/queues?state=paused") == (400, "invalid_request")
        assert await refused(api, "/queues?limit=501") == (400, "invalid_request")
        assert await refused(api, "/queues?cursor=x") == (400, "invalid_cursor")


async def test_http_hosts_are_up_down_or_unknown(tmp_path: Path, peer: Peer, dead_port: int) -> None:
    lines = host_line(peer.port), host_line(dead_port, "dead01"), host_line(peer.port, "never01")
    async with running_api(tmp_path, *lines, start_within=60.0) as api:
        assert {host["state"] for host in await all_pages(api, "/hosts", "hosts")} == {"unknown"}
        await api.dispatcher.submit(call("feed", arguments=["x"]), "test")
        await api.dispatcher.submit(call("feed", host="dead01"), "test")

        async def states() -> dict[str, str]:
            return {host["name"]: host["state"] for host in await all_pages(api, "/hosts", "hosts")}

        async def is_known() -> bool:
            return await states() == {"dead01": "down", "never01": "unknown", "web01": "up"}

        await until(is_known)

        async def is_counted() -> bool:
            page = await get(api, "/hosts")
            return [(host["running"], host["queued"]) for host in page["hosts"]] == [(0, 1), (0, 0), (1, 0)]

        await until(is_counted)
        reply = await api.client.get("/hosts")
        page = reply.json()
        dead, never, up = page["hosts"]
        assert (dead["error"].startswith("network_error: "), dead["since"] <= dead["checked"]) == (True, True)
        assert dead["last_error"]["text"] == dead["error"]
        assert dead["next_attempt"] > dead["since"]
        assert (never["checked"], never["daemon"], never["error"], never["since"]) == (None,) * 4
        assert (up["contact"] is not None, up["error"], up["limit"], up["source"]) == (True, None, 250, "hosts_file")
        assert page["registry"]["count"] == 3
        assert page["registry"]["hosts_file"]["error"] is None
        for secret in CREDENTIALS.values():
            assert f'"{secret}"' not in reply.text, "user and password are shown to nobody"
        assert [host["name"] for host in await all_pages(api, "/hosts?q=ER0", "hosts")] == ["never01"]
        assert [host["name"] for host in await all_pages(api, "/hosts?state=down", "hosts")] == ["dead01"]
        assert (await get(api, "/hosts/web01"))["address"] == "127.0.0.1"
        assert await refused(api, "/hosts/nohost") == (404, "not_found")
        assert await refused(api, "/hosts?state=x") == (400, "invalid_request")
        assert await refused(api, "/hosts?cursor=%25") == (400, "invalid_cursor")


async def test_http_lists_have_only_what_the_client_may_list(tmp_path: Path, dead_port: int) -> None:
    rules = """
        [roles]
        web = []
        [[rule]]
        who = ["role:web"]
        allow = ["list"]
        hosts = ["web*"]
        [[rule]]
        who = ["role:web"]
        allow = ["list"]
        queues = [{site = "a"}]
        jobs = "any"
    """
    lines = host_line(dead_port), host_line(dead_port, "db01")
    async with running_api(tmp_path, *lines, rules=dedent(rules), start_within=60.0) as api:
        for site in ("a", "b"):
            await api.dispatcher.submit(call(queue={"site": site}), "test")
        headers = api.headers_of("shop", "web")
        hosts = (await api.client.get("/hosts", headers=headers)).json()
        assert [host["name"] for host in hosts["hosts"]] == ["web01"]
        queues = (await api.client.get("/queues", headers=headers)).json()
        assert [queue["name"] for queue in queues["queues"]] == [{"site": "a"}]
        hidden = queue_lane(Raw(b'{"site":"b"}')).removeprefix("queue:")
        unknown = await api.client.get("/queues/" + "0" * 32, headers=headers)
        for path in (f"/queues/{hidden}", "/hosts/db01", "/hosts/nohost"):
            reply = await api.client.get(path, headers=headers)
            assert reply.status_code == 404
            if path.startswith("/queues"):
                ids = {reply.json().pop("request"), unknown.json()["request"]}
                assert len(ids) == 2
                assert reply.json() | {"request": ""} == unknown.json() | {"request": ""}
        assert await refused(api, "/queues", **api.headers_of("none", "other")) == (403, "access_denied")
        assert await refused(api, "/audit", **headers) == (403, "access_denied")


async def test_http_audit_entries_are_paged_filtered_and_proven(tmp_path: Path) -> None:
    async with running_api(tmp_path, audit_file=tmp_path / "audit.jsonl") as api:
        for host in ("web01", "web02", "db01"):
            job = await api.dispatcher.submit(call(host=host), "test")
            await api.dispatcher.result(job)
        headers = api.headers_of("viewer", "viewer")
        for _ in range(3):
            assert await refused(api, "/audit", **headers) == (403, "access_denied")

        async def has_ends() -> bool:
            return len((await get(api, "/audit?action=end"))["entries"]) == 3

        await until(has_ends)
        page = await get(api, "/audit")
        assert page["chain"]["ok"]
        assert page["chain"]["entry"] == page["entries"][0]["seq"]
        assert {"seq", "at", "action"} <= page["entries"][0].keys()
        assert "previous" not in page["entries"][0]
        assert await all_pages(api, "/audit", "entries") == page["entries"]
        assert [entry["host"] for entry in await all_pages(api, "/audit?host=web*", "entries", 1)] == ["web02", "web01"]
        denied = await all_pages(api, "/audit?decision=denied&principal=token:view*&from=-1h", "entries")
        assert [entry["action"] for entry in denied] == ["admin"] * 3
        assert await all_pages(api, "/audit?to=-1h", "entries") == []
        assert await refused(api, "/audit?from=someday") == (400, "invalid_request")
        assert await refused(api, "/audit?cursor=1-2-x") == (400, "invalid_cursor")
        lines = (tmp_path / "audit.jsonl").read_bytes().replace(b'"host":"web01"', b'"host":"web09"')
        (tmp_path / "audit.jsonl").write_bytes(lines)
        changed = (await get(api, "/audit"))["chain"]
        assert (changed["ok"], "was changed" in changed["problem"]) == (False, True)


async def test_http_audit_without_an_audit_file_is_not_found(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        assert await refused(api, "/audit") == (404, "not_found")
