"""The operations on jobs over HTTP, with a real dispatcher."""

from __future__ import annotations

import json
from pathlib import Path

from support.dispatcher import call
from support.http_api import running_api


async def test_http_get_job_shows_all_of_it(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        job_id = await api.dispatcher.submit(call("p", "nohost", [1, "1.50"]), "test")
        await api.dispatcher.result(job_id)
        reply = await api.client.get(f"/jobs/{job_id}")
        assert reply.status_code == 200
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["etag"] == 'W/"failed.-.0"'
        assert len(reply.headers["harp-request"]) == 16
        job = reply.json()
        assert (job["job"], job["state"], job["host"]) == (job_id, "failed", "nohost")
        assert job["arguments"] == [1, "1.50"]
        assert job["end"]["error"]["type"] == "unknown_host"
        assert (await api.client.get(f"/jobs/{job_id}?payloads=text")).json()["arguments"] == '[1, "1.50"]'
        assert "arguments" not in (await api.client.get(f"/jobs/{job_id}?payloads=none")).json()
        unknown = await api.client.get("/jobs/00000000-0000-0000-0000-000000000000")
        assert unknown.status_code == 404
        assert unknown.headers["content-type"] == "application/problem+json"
        assert unknown.json()["code"] == "invalid_jobid"
        assert json.loads(unknown.content)["request"] == unknown.headers["harp-request"]
