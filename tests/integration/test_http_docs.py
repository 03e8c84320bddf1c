"""The pages for people: their commands work as they are, and nothing in them runs in a browser."""

from __future__ import annotations

import asyncio
import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from harpcaller.config import HTTPSettings
from harpcaller.http.app import OPERATIONS
from harpcaller.http.docs_pages import make_docs
from harpcaller.http.problems import CODES
from support.daemonlog import DEADLINE
from support.dispatcher import host_line
from support.http_api import running_api
from support.peers import Peer
from support.scripted import scripted_harpd

_COMMANDS = re.compile(r"<pre[^>]*><code>(.*?)</code></pre>", re.DOTALL)


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    with scripted_harpd(tmp_path) as peer:
        yield peer


def commands_of(page: str) -> list[str]:
    return [html.unescape(found) for found in _COMMANDS.findall(page)]


async def run(script: str, **environment: str) -> str:
    """Run a script in a shell; return its output."""
    process = await asyncio.create_subprocess_exec(
        *("sh", "-euc", script),
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    async with asyncio.timeout(DEADLINE):
        output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode()


async def test_http_docs_lead_to_a_job_that_is_followed(tmp_path: Path, peer: Peer) -> None:
    """The commands of the first steps, one after the other, with a procedure and a token of this system."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    async with running_api(tmp_path, host_line(peer.port), http=HTTPSettings(console=False, base_path="/harp")) as api:
        root = f"http://127.0.0.1:{api.port}/harp"
        reply = await api.client.get(f"{root}/docs", headers={"Authorization": ""})
        assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
        token, *steps = commands_of(reply.text.partition('id="operations"')[0])
        assert "harpcallerd token add" in token
        call = '"disk_usage", "arguments": ["/var"]'
        assert sum(call in step for step in steps) == 2
        assert '"count", "arguments": [5]' in steps[2]
        assert f"API={root}/api/v1\n" in steps[0]
        counting = "\n".join(steps).replace(call, '"count", "arguments": [3]')
        output = await run(counting, TOKEN=api.token)
        me, hosts, waited, *followed, once, listed = output.splitlines()
        assert json.loads(me)["principal"] == "token:admin"
        assert [host["name"] for host in json.loads(hosts)["hosts"]] == ["web01"]
        assert json.loads(waited)["end"] == {"result": "counted"}
        assert [json.loads(line).get("data") for line in followed] == [0, 1, 2, 3, 4, None]
        assert json.loads(followed[-1]) == {"result": "counted"}
        assert json.loads(once)["procedure"] == "count"
        assert json.loads(listed)["jobs"] == []
        jobs = (await api.client.get("/jobs")).json()["jobs"]
        assert [job["owner"] for job in jobs] == ["token:admin"] * 3


async def test_http_docs_name_the_address_of_the_browser(tmp_path: Path) -> None:
    http = HTTPSettings(console=False, hosts=("harp.example.net",), behind_proxy=True)
    async with running_api(tmp_path, http=http) as api:
        reply = await api.client.get(f"http://127.0.0.1:{api.port}/docs", headers={"Host": "harp.example.net:8443"})
        assert "API=https://harp.example.net:8443/api/v1\n" in commands_of(reply.text)[1]
        foreign = await api.client.get(f"http://127.0.0.1:{api.port}/docs", headers={"Host": 'x"><script>'})
        assert foreign.status_code == 421


def test_http_docs_have_each_operation_and_no_script() -> None:
    page = make_docs(OPERATIONS, "/harp")
    assert "<script" not in page
    assert not re.search(r"<\w[^>]*\son\w+=", page), "an attribute with a handler"
    for operation in OPERATIONS:
        assert f'<section id="{operation.operation_id}">' in page
        assert f"<code>{operation.method} {operation.path}</code>" in page
    assert len(commands_of(page)) == len(OPERATIONS) + 6
    for command in commands_of(page):
        subprocess.run(["sh", "-nc", command], check=True, timeout=DEADLINE)
    targets = set(re.findall(r'href="#(\w+)"', page))
    assert targets == {operation.operation_id for operation in OPERATIONS}


async def test_http_docs_need_no_proof_and_load_nothing(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        for path in ("/docs", "/docs/errors"):
            address = f"http://127.0.0.1:{api.port}{path}"
            reply = await api.client.get(address, headers={"Authorization": ""})
            assert reply.status_code == 200
            policy = reply.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; style-src 'sha256-")
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
            assert re.findall(r'(?:src|href)="(?!#|/)', reply.text) == [], "only addresses of the dispatcher"
            assert (await api.client.head(address, headers={"Authorization": ""})).content == b""
        errors = (await api.client.get(f"http://127.0.0.1:{api.port}/docs/errors")).text
        assert all(f'<tr id="{code}">' in errors for code in CODES)
