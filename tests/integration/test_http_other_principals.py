"""What a client gets over HTTP does not depend on the jobs of others: the same requests in two worlds.

In one of them, an administrator has jobs that the client may not see. Ids of own jobs, times and tags are replaced.
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

from support.dispatcher import host_line
from support.http_api import RunningAPI, running_api
from support.scripted import scripted_harpd

#: Clients with rights to their own jobs, to the jobs of a host, and to the jobs of some queues.
RULES = """\
[[rule]]
who = ["token:admin"]
allow = ["call", "read", "cancel", "list", "manage", "admin", "metrics"]
jobs = "any"

[[rule]]
who = ["token:own"]
allow = ["call", "read", "cancel", "list", "manage"]

[[rule]]
who = ["token:host"]
allow = ["call", "read", "cancel", "list", "manage"]
hosts = ["web01"]
jobs = "any"

[[rule]]
who = ["token:queue"]
allow = ["call", "read", "cancel", "list", "manage"]
queues = [{q = "*"}]
jobs = "any"
"""
CLIENTS = ("own", "host", "queue")
UNKNOWN_JOB, UNKNOWN_QUEUE = "01a22a05-ea2e-7790-969a-d87b0dd101bb", "0" * 32
JOBS = "&order=oldest", "&limit=1", "&id={job}", "&id={beginning}", "&host=db", "&procedure=count", "&state=open"
MORE_JOBS = "&state=bad", "&queue=-", "&queue={queue}", "&q=merger", "&owner=token:admin", "&rerun_of={job}"
READS = (
    *(f"/jobs?{parameter[1:]}" for parameter in ("&", *JOBS, *MORE_JOBS)),
    "/jobs/counts?by=state,host,procedure,queue,owner,end_type",
    "/jobs/counts?by=owner&host=db",
    "/jobs/stats?from=-1h",
    *("/queues", "/queues?limit=1", "/queues?q=sec", "/queues?state=full", "/queues/{queue}"),
    '/queues?name={{"secret":"merger"}}',
    *("/hosts", "/hosts/db", "/hosts/web01", "/hosts?q=d", "/hosts?limit=1", "/me", "/sessions", "/audit"),
    *("/jobs/{job}", "/jobs/{job}/end", "/jobs/{job}/result", "/jobs/{job}/records"),
    *("/jobs/{job}/records?grep=1", "/jobs/{job}/records?follow=true&form=sse", "/records?jobs={job}"),
)
WRITES: tuple[tuple[str, Any], ...] = (
    *((f"/jobs/{{job}}/{verb}", {}) for verb in ("cancel", "release", "rerun")),
    ("/jobs/{job}/rerun", {"host": "nowhere"}),
    ("/me/can", {"action": "read", "job": "{job}"}),
    ("/me/can", {"action": "call", "host": "db", "procedure": "echo"}),
    ("/records", {"jobs": {"{job}": 0}}),
)
#: What differs between two runs. Whether a host can be reached is no secret, and is known after a connection.
_VARYING = (
    (r"\b1[0-9]{9}(\.[0-9]+)?\b|[0-9]{4}-[0-9-]+T[0-9:.+Z]+", "TIME"),
    (
        r'"(connect_seconds|connect|wait|other|run|fork|request|next|sha256|id|boot|age)": ?("[^"]*"|[0-9.e-]+)',
        r'"\1":-',
    ),
    (r'"etag": "[^}]*?"(, |})|cursor=[^>]+', "TAG"),
    (r'"port":[0-9]+|[a-z]+ [0-9]+\)', "PORT"),
    (r'"state":"(up|unknown)"', '"state":-'),
    (r'"certificate":(null|{[^}]*})', '"certificate":-'),
    (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]+", "ID"),
    (r"[0-9a-f]{32}", "QUEUE"),
)


def normal(text: str) -> str:
    for pattern, replacement in _VARYING:
        text = re.sub(pattern, replacement, text)
    return text


async def submit(api: RunningAPI, name: str, procedure: str, *arguments: Any, host: str = "web01", **call: Any) -> str:
    body = {"host": host, "procedure": procedure, "arguments": list(arguments), **call}
    reply = await api.client.post("/jobs", json=body, headers=api.headers_of(name, "some"))
    job: str = reply.json()["job"]
    return job


async def follow(api: RunningAPI, name: str, begun: asyncio.Event) -> str:
    """Return the procedures of the jobs in the events of a client, until the end of its job that raises."""
    headers = {**api.headers_of(name, "some"), "Accept": "application/jsonl"}
    lines: list[str] = []
    async with api.client.stream("GET", "/events?topics=jobs,counts", headers=headers) as stream:
        async for line in stream.aiter_lines():
            lines += [line] if line else []
            begun.set()
            if f'"owner":"token:{name}"' in line and '"procedure":"raise"' in line and '"state":"raised"' in line:
                break
    events = [event for event in map(json.loads, lines) if event["event"] == "jobs"]
    shown = sorted({row["procedure"] for event in events for row in event["data"]["rows"]})
    return json.dumps([shown, sorted({(bool(event["data"]["left"]), event["data"]["more"]) for event in events})])


async def answers(directory: Path, has_others: bool) -> dict[tuple[str, ...], str]:
    """Return the normal form of all replies, by client and request."""
    directory.mkdir()
    found: dict[tuple[str, ...], str] = {}
    with scripted_harpd(directory) as peer:
        async with running_api(directory, host_line(peer.port), host_line(peer.port, "db"), rules=RULES) as api:
            for name in CLIENTS:
                api.headers_of(name, "some")
            api.refresh()
            job, queue = UNKNOWN_JOB, UNKNOWN_QUEUE
            secret: dict[str, Any] = {"host": "db", "queue": {"name": {"secret": "merger"}}}
            own = [await submit(api, name, "echo", name) for name in ("own", "host")]
            if has_others:
                hanging = await submit(api, "admin", "hang", "merger", **secret)
                for _ in range(3):
                    await submit(api, "admin", "hang", "merger", **secret)
                    job = await submit(api, "admin", "count", 3, host="db")
                shown = (await api.client.get(f"/jobs/{hanging}")).json()
                queue = shown["queue"]["id"]
                assert (await api.client.get(f"/jobs/{job}/end?wait=10")).status_code == 200
            own += [await submit(api, name, "count", 2, queue={"name": {"q": name}}) for name in ("own", "queue")]
            for each in own:
                assert (await api.client.get(f"/jobs/{each}/end?wait=10")).status_code == 200
            values = {"job": job, "queue": queue, "beginning": job[:13]}
            for name in CLIENTS:
                headers = api.headers_of(name, "some")

                async def ask(method: str, path: str, more: dict[str, str] | None = None, body: Any = None) -> Any:
                    asked = {**headers, **(more or {})}  # noqa: B023 - it is awaited at once
                    sent = None if body is None else json.loads(json.dumps(body).replace("{job}", job))
                    reply = await api.client.request(method, path.format(**values), headers=asked, json=sent)
                    assert reply.status_code not in (400, 405, 422), (path, reply.text)
                    kept = {key: value for key, value in reply.headers.items() if key in ("etag", "link", "allow")}
                    text = (
                        reply.text.replace(str(directory), "DIRECTORY")
                        .replace(job, "JOB")
                        .replace(queue, "QUEUE")
                        .replace(job[:13], "BEGINNING")
                    )
                    key = name, method, path, *(more or {}), json.dumps(body)  # noqa: B023
                    found[key] = normal(f"{reply.status_code} {json.dumps(kept)} {text}")
                    return reply

                for path in READS:
                    reply = await ask("GET", path)
                    if "etag" in reply.headers:
                        await ask("GET", path, {"If-None-Match": reply.headers["etag"]})
                await ask("HEAD", "/jobs/{job}")
                await ask("GET", "/jobs/{job}", {"If-None-Match": "*"})
                for path, body in WRITES:
                    await ask("POST", path, None, body)
                begun = asyncio.Event()
                events = asyncio.create_task(follow(api, name, begun))
                await begun.wait()
                if has_others:
                    await submit(api, "admin", "echo", "merger", host="db")
                await submit(api, name, "raise", queue={"name": {"q": name}})
                async with asyncio.timeout(20):
                    found[name, "events"] = await events
    return found


async def test_replies_do_not_depend_on_jobs_of_others(tmp_path: Path) -> None:
    alone = await answers(tmp_path / "alone", has_others=False)
    beside_others = await answers(tmp_path / "beside", has_others=True)
    assert alone.keys() == beside_others.keys()
    assert len(alone) > 150
    differing = {key: (alone[key], beside_others[key]) for key in alone if alone[key] != beside_others[key]}
    assert differing == {}
