"""The HTTP API of a real harpcallerd: its addresses, TLS, reloads, and a death between commit and response."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.certificates import server_files
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd

TESTS = Path(__file__).resolve().parent.parent
CALL = {"host": "nohost", "procedure": "p", "arguments": []}


class Daemon(Harpcallerd):
    """A harpcallerd with HTTP on a TCP address, with TLS, and on a Unix socket."""

    def __init__(self, directory: Path, **http: Any) -> None:
        directory.mkdir(exist_ok=True)
        self.files = server_files(directory)
        self.path = directory / "http"
        self.token = ""
        listen = ["127.0.0.1:0", "tls:127.0.0.1:0", f"unix:{self.path}"]
        keys = {"certfile": "server.pem", "keyfile": "server.key", "listen": listen, **http}
        self.keys: dict[str, Any] = {"tokens_file": "tokens", "http": keys}
        super().__init__(directory, settings=self.keys)

    @property
    def http_ports(self) -> list[int]:
        return [event["port"] for event in self.events("harpcallerd is serving HTTP") if "port" in event][-2:]

    def client(self, at: int = 0, path: Path | None = None, **options: Any) -> httpx.Client:
        """Return a client of the plain address (0), the one with TLS (1), or the Unix socket."""
        if not self.token:
            self.token = self.control("token", "add", "shop", "--role=admin").stdout.strip()
        context = ssl.create_default_context(cafile=self.files.ca_file)
        scheme = "https" if at else "http"
        url = "http://localhost" if path is not None else f"{scheme}://127.0.0.1:{self.http_ports[at]}"
        transport = None if path is None else httpx.HTTPTransport(uds=str(path))
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.Client(
            base_url=f"{url}/api/v1", headers=headers, verify=context, transport=transport, timeout=20, **options
        )


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("http")) as running:
        yield running


def test_http_is_the_same_on_all_addresses(daemon: Daemon) -> None:
    with daemon.client() as plain, daemon.client(1) as encrypted, daemon.client(path=daemon.path) as local:
        job = plain.post("/jobs?wait=20", json=CALL).json()
        assert job["state"] == "failed"
        assert job["owner"] == "token:shop"
        for client in (encrypted, local):
            assert client.get(f"/jobs/{job['job']}").json() == job
    mode = daemon.path.stat().st_mode & 0o777
    assert mode == 0o660


def test_http_me_names_the_port_of_the_client_api(daemon: Daemon) -> None:
    with daemon.client() as client:
        server = client.get("/me").json()["server"]
    assert (server["port"], server["tls"]) == (daemon.port, False)


def test_http_tls_clients_without_tls_are_closed(daemon: Daemon) -> None:
    port = daemon.http_ports[1]
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"HTTP" not in connection.recv(1000)
    wait_until(lambda: bool(daemon.events("TLS handshake failed")), what="the log of the handshake")
    context = ssl.create_default_context(cafile=daemon.files.ca_file)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        with context.wrap_socket(connection, server_hostname="127.0.0.1") as wrapped:
            wrapped.sendall(b"GET /api/v1/openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            assert wrapped.recv(15) == b"HTTP/1.1 200 OK"


def test_http_reload_is_all_or_nothing(daemon: Daemon) -> None:
    settings, http = daemon.keys, daemon.keys["http"]
    try:
        with daemon.client() as client:
            for broken, error in (
                ({**http, "certfile": "missing"}, "http.certfile: "),
                ({**http, "waits": 0}, "http.waits: "),
                ({**http, "listen": ["0.0.0.0:0"]}, "http.listen: "),
            ):
                daemon.configure({**settings, "http": broken})
                event = daemon.reload()
                assert event["event"] == "reload failed; nothing is changed"
                assert error in event["reason"]
                tested = daemon.control("--test", f"--config={daemon.config_file}")
                assert tested.returncode == 1
                assert error in tested.stderr
                assert client.get("/openapi.json").status_code == 200
            daemon.configure({**settings, "http": {**http, "base_path": "/harp"}, "request_line": 2000})
            assert daemon.reload()["event"] == "reloaded"
            daemon.wait_event("a changed setting needs a restart", key="http.base_path")
            long = client.post("/jobs", json={**CALL, "info": "x" * 3000})
            assert (long.status_code, long.json()["code"]) == (413, "too_long")
            daemon.configure({**settings, "http": None})
            assert daemon.reload()["event"] == "reloaded"
            daemon.wait_event("a changed setting needs a restart", key="http")
            assert client.get("/openapi.json").status_code == 200
    finally:
        daemon.configure(settings)
        daemon.reload()


class KilledAfterCommit(Daemon):
    """The same; while the file `mark` exists, the next commit of a submission kills it."""

    @property
    def mark(self) -> Path:
        return self.directory / "mark"

    def command(self, *arguments: str) -> list[str]:
        program, options, _, _, *more = super().command(*arguments)
        if arguments[0] != "start":
            return super().command(*arguments)
        return [program, options, "-m", "support.killed_after_commit", str(self.mark), *more]


def test_http_key_is_of_one_job_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
    with KilledAfterCommit(tmp_path / "dispatcher") as daemon:
        key = {"Idempotency-Key": "order-7"}
        bodies = {"/jobs": CALL, "/jobs/many": {"calls": [CALL, CALL]}}
        for path, body in bodies.items():
            with daemon.client() as client:
                daemon.mark.touch()
                with pytest.raises(httpx.TransportError):
                    client.post(path, json=body, headers=key)
            assert daemon.wait() == -9
            daemon.start()
        with daemon.client() as client:
            replies = [client.post(path, json=body, headers=key) for path, body in bodies.items()]
            assert [reply.status_code for reply in replies] == [201, 201]
            assert all(reply.headers["idempotency-replayed"] == "true" for reply in replies)
            jobs = {replies[0].json()["job"], *replies[1].json()["jobs"]}
        assert jobs == {job["job"] for job in daemon.listed("list", "--all")}
        assert len(jobs) == 3
