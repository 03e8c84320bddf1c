"""The metrics of harpd: as text of a command, and over HTTP from a listener that bounds what it reads."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from harp_daemon.sockets import listen_tcp
from harpd.frontend.metrics_listener import MetricsListener, check_request
from support.deadline import wait_until
from support.harpd import Harpd

DOCS = Path(__file__).parents[2] / "docs/monitoring.md"
PROCEDURES = """
from harpd.proc import procedure

@procedure
def echo(value):
    return value

@procedure
def fail():
    raise ValueError("no")
"""


def documented() -> set[str]:
    part = DOCS.read_text().partition("\n## Metrics of harpd\n")[2].partition("\n## ")[0]
    rows = [line for line in part.splitlines() if re.match(r"\| `(harpd|process|python)_", line)]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def parsed(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Return the samples by the name of their metric and the values of their labels, without the supervisor."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in parse_text(text):
        samples = found.setdefault(family.name + ("_total" if family.type == "counter" else ""), {})
        for sample in family.samples:
            labels = tuple(value for name, value in sorted(sample.labels.items()) if name != "supervisor")
            samples[labels] = sample.value
    return found


def test_harpd_metrics_by_command_and_listener(tmp_path: Path) -> None:
    with Harpd(tmp_path, PROCEDURES, {"metrics": {"port": 0}}) as harpd:
        harpd.call("echo", 1)
        harpd.call("echo", 2)
        harpd.call("fail")
        harpd.call("missing")
        wait_until(lambda: harpd.status()["calls"] == 0, what="the end of all calls")
        with harpd.connect() as client:
            client.send({"harp": 1, "procedure": "echo", "arguments": [1], "auth": {"user": "x", "password": "y"}})
            client.lines()
        done = subprocess.run(harpd.command("status", "--metrics"), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        event = harpd.wait_event("harpd serves metrics")
        with urllib.request.urlopen(f"http://127.0.0.1:{event['port']}/metrics", timeout=30) as reply:
            assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            scraped = reply.read().decode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{event['port']}/metrics", headers={"Accept": "application/openmetrics-text"}
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            text = reply.read().decode()
    assert list(parse_openmetrics(text))  # type: ignore[no-untyped-call]
    by_command, over_http = parsed(done.stdout), parsed(scraped)
    assert over_http.keys() == documented()
    assert by_command.keys() < over_http.keys()
    for found in (by_command, over_http):
        assert found["harpd_up"] == {(): 1}
        assert found["harpd_calls_started_total"] == {(): 3}
        assert found["harpd_calls_ended_total"] == {("result",): 2, ("exception",): 1}
        assert found["harpd_calls_rejected_total"] == {("no_such_procedure",): 1}
        assert found["harpd_calls"] == {(): 0}
        assert found["harpd_procedures"] == {(): 2}
        assert all(end > 1e9 for end in found["harpd_certificate_expiry_timestamp_seconds"].values())
    assert over_http["harpd_auth_failures_total"] == {(): 1}


def test_harpd_metrics_without_a_supervisor(tmp_path: Path) -> None:
    harpd = Harpd(tmp_path, PROCEDURES)
    done = subprocess.run(harpd.command("status", "--metrics"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert parsed(done.stdout)["harpd_up"] == {(): 0}


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n", 200),
        (b"HEAD /metrics?x=1 HTTP/1.0\r\nhost: 127.0.0.1:4307\r\nAccept: */*\r\n", 200),
        (b"GET /metrics HTTP/1.1\r\nHost: [::1]:1\r\n", 200),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n", 404),
        (b"GET /metrics HTTP/1.1\r\nHost: evil.example\r\n", 403),
        (b"GET /metrics HTTP/1.1\r\nHost: localhost.evil.example\r\n", 403),
        (b"GET /metrics HTTP/1.1\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n", 400),
        (b"POST /metrics HTTP/1.1\r\nHost: localhost\r\n", 400),
        (b"GET /metrics HTTP/2.0\r\nHost: localhost\r\n", 400),
        (b"GET  /metrics HTTP/1.1\r\nHost: localhost\r\n", 400),
        (b"GET /metrics HTTP/1.1\nHost: localhost\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n folded\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost : localhost\r\n", 400),
        (b"\x16\x03\x01\r\n", 400),
        (b"\r\n", 400),
    ],
)
def test_request_of_another_form_is_refused(head: bytes, status: int) -> None:
    assert check_request(head)[0] == status


def test_header_with_many_spaces_is_checked_at_once() -> None:
    head = b"GET /metrics HTTP/1.1\r\nHost: \t localhost\t \r\n"
    assert check_request(head)[0] == 200
    began = time.process_time()
    assert check_request(head + b"X:" + b" " * 3000 + b"\x01\r\n")[0] == 400
    assert time.process_time() - began < 1


@asynccontextmanager
async def listener(seconds: float = 20.0) -> AsyncIterator[int]:
    async def scrape(openmetrics: bool) -> bytes:
        return b"x" * 100

    listeners = listen_tcp("127.0.0.1", 0)
    server = MetricsListener(listeners, scrape, seconds)
    server.open()
    try:
        yield int(str(listeners[0].fields["port"]))
    finally:
        await server.aclose()


async def exchange(port: int, *pieces: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.01)
        async with asyncio.timeout(20):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_listener_bounds_a_request(tmp_path: Path) -> None:
    good = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with listener() as port:
        whole = await exchange(port, good)
        assert whole.startswith(b"HTTP/1.1 200 OK\r\n")
        assert whole.endswith(b"\r\n\r\n" + b"x" * 100)
        assert await exchange(port, *(good[at : at + 1] for at in range(len(good)))) == whole
        assert (await exchange(port, good + good)) == whole, "one request for each connection"
        long = await exchange(port, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nX: ", b"y" * 20_000)
        assert long == b"" or long.startswith(b"HTTP/1.1 400")
    async with listener(seconds=0.2) as port:
        assert await exchange(port) == b"", "a silent client"
        assert await exchange(port, good[:10]) == b"", "a client that stops"


async def test_listener_bounds_its_connections() -> None:
    good = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with listener() as port:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        try:
            async with asyncio.timeout(20):
                while True:
                    await asyncio.sleep(0.02)
                    closed = 0
                    for one in silent:
                        one.setblocking(False)
                        try:
                            closed += one.recv(1) == b""
                        except ConnectionResetError:
                            closed += 1
                        except BlockingIOError:
                            pass
                    if closed == 24:
                        break
            assert (await exchange(port, good)).startswith(b"HTTP/1.1 200"), "a silent one gives way"
        finally:
            for one in silent:
                with closing(one):
                    pass
        async with asyncio.timeout(20):
            while not (await exchange(port, good)).startswith(b"HTTP/1.1 200"):
                await asyncio.sleep(0.02)
