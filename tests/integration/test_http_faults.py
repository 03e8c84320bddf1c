"""Faults of the machine under a real harpcallerd with HTTP: a full disk, SIGTERM, SIGKILL between request and answer.

HARP_LONG=1 kills the dispatcher at 200 moments instead of some 40.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.deadline import wait_until
from support.harpcallerd import Harpcallerd

CALL: dict[str, Any] = {"host": "nohost", "procedure": "p", "arguments": []}
SEED = 20_140
KILLS = 25 if os.environ.get("HARP_LONG") else 5
TOGETHER = 8  #: Requests that are under way when the dispatcher is killed.


class Daemon(Harpcallerd):
    """A harpcallerd with HTTP on a free port, and a token; `prefix` is a command that starts it."""

    def __init__(self, directory: Path, prefix: tuple[str, ...] = (), **settings: Any) -> None:
        http = {"listen": ["127.0.0.1:0"], "requests_per_client": 100_000}
        super().__init__(directory, settings={"tokens_file": "tokens", "http": http, **settings})
        self._prefix = prefix
        self.token = ""

    def command(self, *arguments: str) -> list[str]:
        command = super().command(*arguments)
        return [*self._prefix, *command] if arguments[0] == "start" else command

    def client(self) -> httpx.Client:
        if not self.token:
            self.token = self.control("token", "add", "shop", "--role=admin").stdout.strip()
        port = [event["port"] for event in self.events("harpcallerd is serving HTTP")][-1]
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", headers=headers, timeout=30)


@pytest.mark.root
def test_http_full_disk_is_a_storage_error_until_there_is_room(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs to be root, with the right to mount")
    directory = tmp_path / "dispatcher"
    jobs = directory / "jobs"
    jobs.mkdir(parents=True)
    script = f'mount -t tmpfs -o size=6m tmpfs {jobs} && head -c 2000000 /dev/zero > {jobs}/ballast && exec "$@"'
    with Daemon(directory, ("unshare", "-m", "sh", "-c", script, "sh"), disk_reserve=0) as daemon:
        with daemon.client() as client:
            accepted = []
            while (reply := client.post("/jobs", json={**CALL, "info": "x" * 200_000})).status_code == 201:
                accepted.append(reply.json()["job"])
                assert len(accepted) < 100
            problem = reply.json()
            assert (reply.status_code, problem["code"], reply.headers["retry-after"]) == (503, "storage_error", "5")
            assert reply.headers["content-type"] == "application/problem+json"
            many = client.post("/jobs/many", json={"calls": [{**CALL, "info": "x" * 200_000}] * 2})
            assert (many.status_code, many.json()["code"]) == (503, "storage_error")
            assert client.get(f"/jobs/{accepted[0]}").status_code == 200, "stored jobs can be read"
            listed = client.get("/jobs?limit=500").json()["jobs"]
            assert {row["job"] for row in listed} == set(accepted), "a refused job is not stored"
            (Path(f"/proc/{daemon.pid}/root") / jobs.relative_to("/") / "ballast").unlink()
            assert client.post("/jobs", json={**CALL, "info": "x" * 200_000}).status_code == 201


def test_http_request_at_sigterm_is_answered_that_it_stops(tmp_path: Path) -> None:
    with Daemon(tmp_path / "dispatcher") as daemon:
        with daemon.client() as client:
            port, token = client.base_url.port, daemon.token
            assert client.get("/me").status_code == 200
        with socket.create_connection(("127.0.0.1", port), 30) as sender:
            head = f"POST /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
            body = b'{"host":"nohost","procedure":"p","arguments":[]}'
            head += f"Content-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n"
            sender.sendall(head.encode())
            assert sender.recv(100).startswith(b"HTTP/1.1 100"), "the request is being read"
            os.kill(daemon.pid, signal.SIGTERM)
            wait_until(lambda: daemon.events("harpcallerd stops"), what="the stop")
            sender.sendall(body)
            answer = b""
            while data := sender.recv(65536):
                answer += data
        assert answer.startswith(b"HTTP/1.1 503"), answer
        assert b"retry-after: 5" in answer.lower()
        assert b'"code":"stopping"' in answer
        assert daemon.wait() == 0


@pytest.mark.timeout(120 + 30 * KILLS)
def test_http_key_is_of_one_job_after_kills_of_the_dispatcher(tmp_path: Path) -> None:
    """Kill -9 at random moments between request and answer, then send the same again."""
    moments = random.Random(SEED)
    sent: dict[str, dict[str, Any]] = {}
    jobs: dict[str, str] = {}
    outcomes = {"answered": 0, "stored": 0, "lost": 0}
    with Daemon(tmp_path / "dispatcher") as daemon, ThreadPoolExecutor(TOGETHER) as threads:
        for kill in range(KILLS):
            requests = {f"{kill}-{number}": {**CALL, "info": f"{kill}-{number}"} for number in range(TOGETHER)}
            sent |= requests
            after, delay = moments.randrange(TOGETHER), moments.random() * 0.003
            answered = threading.Semaphore(0)

            def post(key: str, body: dict[str, Any], answered: threading.Semaphore = answered) -> str | None:
                try:
                    with daemon.client() as client:
                        time.sleep(moments.random() * 0.005)
                        reply = client.post("/jobs", json=body, headers={"Idempotency-Key": key})
                        job: str = reply.json()["job"]
                        return job
                except (httpx.TransportError, ValueError):
                    return None
                finally:
                    answered.release()

            daemon.client().close()  # makes the token
            replies = {key: threads.submit(post, key, body) for key, body in requests.items()}
            for _ in range(after):
                assert answered.acquire(timeout=30)
            time.sleep(delay)
            daemon.kill()
            first = {key: reply.result(30) for key, reply in replies.items()}
            daemon.start()
            with daemon.client() as client:
                for key, body in requests.items():
                    reply = client.post("/jobs", json=body, headers={"Idempotency-Key": key})
                    assert reply.status_code == 201, reply.text
                    jobs[key] = reply.json()["job"]
                    is_replayed = reply.headers.get("idempotency-replayed") == "true"
                    if (job := first[key]) is not None:
                        assert (is_replayed, jobs[key]) == (True, job), "an answered submission is stored"
                    outcomes["answered" if job else "stored" if is_replayed else "lost"] += 1
        with daemon.client() as client:
            listed: list[dict[str, Any]] = []
            cursor: dict[str, str] | None = {}
            while cursor is not None:
                page = client.get("/jobs", params={"limit": "500", **cursor}).json()
                listed += page["jobs"]
                cursor = None if page["next"] is None else {"cursor": page["next"]}
    assert sorted(row["job"] for row in listed) == sorted(jobs.values()), outcomes
    assert len(set(jobs.values())) == len(sent) == KILLS * TOGETHER, outcomes
    assert sum(outcomes.values()) == len(sent)
