"""The example of a web application: it distinguishes a failed job, an unknown job and a missing reply."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.peers import Peer, PeerConnection

WEBAPP = Path(__file__).parents[2] / "examples" / "webapp.py"

#: The replies of the dispatcher, by the id of the job. Without a reply it closes the connection.
REPLIES: dict[str, list[Any]] = {
    "done": [{"result": 5}],
    "failed": [{"error": {"type": "unknown_host", "message": "m"}}],
    "crowded": [{"error": {"type": "too_many_connections", "message": "m", "data": None}}],
    "raised": [{"exception": {"type": "ValueError", "message": "m"}}],
    "cancelled": [{"cancelled": True}],
    "unknown": [{"error": {"type": "invalid_jobid", "message": "there is no job"}}],
    "refused": [{"error": {"type": "too_many_connections", "message": "m"}}],
    "garbage": [b"garbage\n"],
    "cut": [],
}


def dispatcher(conn: PeerConnection) -> None:
    request = conn.expect()
    conn.reply(*REPLIES.get(request.get("get_result"), []))


def get(address: str, method: str = "GET") -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method=method), timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            assert (error.headers["Retry-After"] is not None) is (error.code == 503)
            return error.code, json.load(error)


@pytest.fixture(scope="module")
def application() -> Iterator[str]:
    with Peer(always=dispatcher) as peer:
        command = [sys.executable, "-P", str(WEBAPP), "--port=0", f"--dispatcher={peer.host}:{peer.port}"]
        source = str(WEBAPP.parents[1] / "src")
        environment = {**os.environ, "PYTHONPATH": source}
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            try:
                assert process.stdout is not None
                yield process.stdout.readline().strip().rstrip("/")
            finally:
                process.terminate()


@pytest.mark.parametrize(
    ("job", "status", "body"),
    [
        ("done", 200, {"state": "done", "result": 5}),
        ("failed", 200, {"state": "failed", "error": "unknown_host: m"}),
        ("crowded", 200, {"state": "failed", "error": "too_many_connections: m"}),
        ("raised", 200, {"state": "failed", "error": "ValueError: m"}),
        ("cancelled", 200, {"state": "cancelled"}),
        ("unknown", 404, {"error": "invalid_jobid: there is no job"}),
        ("refused", 503, {"error": "cannot ask the dispatcher: too_many_connections: m"}),
    ],
)
def test_webapp_distinguishes_outcomes(application: str, job: str, status: int, body: dict[str, Any]) -> None:
    assert get(f"{application}/jobs/{job}") == (status, body)


@pytest.mark.parametrize("page", ["jobs/garbage", "jobs/cut"])
def test_webapp_without_valid_reply_is_unavailable(application: str, page: str) -> None:
    status, body = get(f"{application}/{page}")
    assert status == 503
    assert body["error"].startswith("cannot ask the dispatcher: 127.0.0.1:")


def test_webapp_submission_without_reply_is_unavailable(application: str) -> None:
    assert get(f"{application}/disk-usage/web01", "POST")[0] == 503


def test_webapp_refuses_a_name_that_is_too_long(application: str) -> None:
    status, body = get(f"{application}/disk-usage/{'x' * 300}", "POST")
    assert (status, body["error"][:40]) == (400, "host: expected a name of 1 to 255 charac")
