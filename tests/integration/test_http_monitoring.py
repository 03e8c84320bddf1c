"""Metrics and health over HTTP: who may read them, in which format, and when the dispatcher is ready."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from harpcaller.config import HTTPSettings
from harpcaller.health import Health
from harpcaller.store.sqlite import open_store
from support.deadline import eventually
from support.dispatcher import Switched, call, host_line, running
from support.http_api import running_api
from support.scripted import scripted_harpd

SCRAPER = """
[roles]
scraper = []
viewer = []
[[rule]]
who = ["role:scraper"]
allow = ["metrics"]
[[rule]]
who = ["role:viewer"]
allow = ["list", "read"]
"""


async def test_local_scraper_needs_no_token(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        root = str(api.client.base_url).partition("/api/")[0]
        reply = await api.client.get(f"{root}/metrics", headers={"Authorization": ""})
        assert reply.status_code == 401, "what is sent is checked"
        del api.client.headers["authorization"]
        reply = await api.client.get(f"{root}/metrics")
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        names = {family.name for family in text_string_to_metric_families(reply.text)}
        assert {"harp_jobs", "process_resident_memory_bytes"} <= names
        reply = await api.client.get(f"{root}/metrics", headers={"Accept": "application/openmetrics-text;q=0.9"})
        assert reply.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        assert reply.text.endswith("# EOF\n")
        assert (await api.client.get(f"{root}/healthz")).json() == {"status": "ok"}


async def test_metrics_without_anonymous_need_the_right(tmp_path: Path) -> None:
    http = HTTPSettings(metrics_anonymous="none")
    async with running_api(tmp_path, http=http, rules=SCRAPER) as api:
        root = str(api.client.base_url).partition("/api/")[0]
        scraper, viewer = api.headers_of("prometheus", "scraper"), api.headers_of("eye", "viewer")
        del api.client.headers["authorization"]
        statuses = [
            (await api.client.get(f"{root}/metrics", headers=headers)).status_code for headers in (scraper, viewer, {})
        ]
        assert statuses == [200, 403, 401]
        text = (await api.client.get(f"{root}/metrics", headers=scraper)).text
        assert 'harp_access_denied_total{action="metrics"} 1\n' in text
        assert 'harp_auth_failures_total{api="http"} 1\n' in text
        assert (await api.client.get(f"{root}/healthz")).status_code == 200


async def test_requests_are_counted_by_the_template_of_their_path(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        root = str(api.client.base_url).partition("/api/")[0]
        for number in range(5):
            await api.client.get(f"/jobs/00000000-0000-0000-0000-00000000000{number}")
            await api.client.get(f"/nothing/{number}")
        families = text_string_to_metric_families((await api.client.get(f"{root}/metrics")).text)
        [requests] = [family for family in families if family.name == "harp_http_requests"]
        found = {(one.labels["route"], one.labels["code"]): one.value for one in requests.samples}
        assert found == {("/api/v1/jobs/{job}", "404"): 5, ("other", "404"): 5}


async def test_readyz_names_what_is_not_ready(tmp_path: Path) -> None:
    async with running_api(tmp_path, host_line(1)) as api:
        root = str(api.client.base_url).partition("/api/")[0]
        health = api.api.service.health
        assert health is not None
        reply = await api.client.get(f"{root}/readyz")
        assert (reply.status_code, reply.json()) == (200, {"ready": True})
        health.is_stopping = True
        reply = await api.client.get(f"{root}/readyz")
        assert reply.status_code == 503
        failed = [check for check in reply.json()["checks"] if not check["ok"]]
        assert failed == [{"name": "serving", "ok": False, "detail": "the dispatcher stops"}]


async def test_store_that_cannot_be_written_is_not_ready(tmp_path: Path) -> None:
    async with running(tmp_path, host_line(1)) as dispatcher:
        assert all(check.ok for check in await Health(dispatcher, recent_commit=0.0).check())
        with closing(sqlite3.connect(dispatcher.store.path)) as other:
            other.execute("BEGIN IMMEDIATE")
            health = Health(dispatcher, recent_commit=0.0, write_timeout=0.2)
            [failed] = [check for check in await health.check() if not check.ok]
            assert failed == ("store", False, "no write within 0.2 s")
            other.rollback()
        assert all(check.ok for check in await Health(dispatcher, recent_commit=0.0).check())


async def test_writes_that_are_repeated_are_not_ready(tmp_path: Path) -> None:
    with scripted_harpd(tmp_path) as host:
        store = Switched(await open_store(tmp_path / "store"), "finish_job")
        async with running(tmp_path, host_line(host.port), store=store) as dispatcher:
            store.off = True
            job = await dispatcher.submit(call("echo"), "test")
            await eventually(lambda: dispatcher.waiting_writes, what="a write that failed")
            [failed] = [check for check in await Health(dispatcher).check() if not check.ok]
            assert failed == ("store", False, "1 writes have failed and are repeated")
            store.off = False
            await dispatcher.result(job)
        await store.close()


async def test_service_manager_waits_for_a_slow_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        script = tmp_path / "script"
        script.write_text(f"#!/bin/sh\nuntil test -e {tmp_path}/go; do sleep 0.05; done\necho\n")
        script.chmod(0o755)
        async with running(tmp_path, hosts_file=None, host_db_script=script) as dispatcher:
            waiting = asyncio.create_task(Health(dispatcher).notify_when_ready(patience=0.0))
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(20):
                first = await loop.sock_recv(manager, 1000)
                assert first == b"EXTEND_TIMEOUT_USEC=30000000\nSTATUS=not ready: the hosts registry is not loaded yet"
                (tmp_path / "go").touch()
                while not (message := await loop.sock_recv(manager, 1000)).startswith(b"READY=1"):
                    assert message == first
                await waiting
        assert message == b"READY=1\nSTATUS="
