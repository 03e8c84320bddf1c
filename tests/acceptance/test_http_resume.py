"""Followers over HTTP whose connections break at any byte, and whose dispatcher is killed: each record comes once."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from harpcaller.access.tokens import add_token
from support.deadline import wait_until
from support.peers import reserved_port
from support.system import running

RECORDS, CUTS, KILLS = 20_000, 100, 3
LONGEST = 10_000  #: Bytes until a connection is cut; each event has about 80.
SECONDS = 240.0

PROCEDURES = """
import time
from harpd.proc import streaming_procedure

@streaming_procedure
def count(most, pause):
    for number in range(most):
        if number % 500 == 0:
            time.sleep(pause)
        yield number
"""


class Cut(Exception):
    """The connection was cut."""


class Reader:
    """A follower that continues after what it has received, as a client does that reads lines."""

    accept = "application/jsonl"

    def __init__(self, port: int, token: str, job: str, chance: random.Random) -> None:
        self.received: list[tuple[int, Any]] = []
        self.end: Any = None
        self.cuts = self.connections = 0
        self._port, self._token, self._job, self._chance = port, token, job, chance

    @property
    def headers(self) -> dict[str, str]:
        return {}

    @property
    def since(self) -> int:
        return len(self.received)

    def run(self) -> None:
        """Read to the end of the job."""
        deadline = time.monotonic() + SECONDS
        while self.end is None:
            assert time.monotonic() < deadline, f"{len(self.received)} records, {self.cuts} cuts"
            left = self._chance.randrange(1, LONGEST) if self.cuts < CUTS else None
            try:
                self._read(left)
            except Cut:
                self.cuts += 1
            except OSError:
                time.sleep(0.02)  # the dispatcher was killed

    def _read(self, left: int | None) -> None:
        """Read one response, of which `left` bytes arrive; None: all."""
        self.connections += 1
        with socket.create_connection(("127.0.0.1", self._port), 10.0) as connection:
            headers = {"Host": "localhost", "Authorization": f"Bearer {self._token}", "Accept": self.accept}
            lines = "".join(f"{name}: {value}\r\n" for name, value in {**headers, **self.headers}.items())
            path = f"/api/v1/jobs/{self._job}/records?follow=1&since={self.since}"
            connection.sendall(f"GET {path} HTTP/1.1\r\n{lines}\r\n".encode())
            with connection.makefile("rb") as response:
                self.use(_body(response, left))

    def use(self, pieces: Iterator[bytes]) -> None:
        """Take the complete lines of a body."""
        pending = b""
        for piece in pieces:
            *lines, pending = (pending + piece).split(b"\n")
            for line in filter(None, lines):
                message = json.loads(line)
                if "packet" in message:
                    self.received.append((message["packet"], message["data"]))
                elif "interrupted" not in message:
                    self.end = message


class EventReader(Reader):
    """A follower that continues as a browser does: with the id of the last complete event."""

    accept = "text/event-stream"
    since = 0
    last_id = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"Last-Event-ID": self.last_id} if self.last_id else {}

    def use(self, pieces: Iterator[bytes]) -> None:
        pending = b""
        for piece in pieces:
            *events, pending = (pending + piece).split(b"\n\n")
            for event in events:
                fields = dict(line.split(b": ", 1) for line in event.split(b"\n") if not line.startswith(b":"))
                self.last_id = fields.get(b"id", self.last_id.encode()).decode()
                if fields.get(b"event") == b"record":
                    message = json.loads(fields[b"data"])
                    assert self.last_id == str(message["packet"])
                    self.received.append((message["packet"], message["data"]))
                elif fields.get(b"event") == b"end":
                    self.end = json.loads(fields[b"data"])


def _body(response: Any, left: int | None) -> Iterator[bytes]:
    """Yield the pieces of a chunked body as they arrive; raises `Cut` after `left` bytes of them."""
    status = response.readline()
    assert not status or status.startswith(b"HTTP/1.1 200"), status
    while response.readline() not in (b"\r\n", b""):
        pass
    while line := response.readline():
        size = int(line, 16)
        while size:
            piece = response.read1(size if left is None else min(size, left))
            if not piece:
                return
            size -= len(piece)
            yield piece
            if left is not None:
                left -= len(piece)
                if not left:
                    raise Cut
        response.readline()
    if not status:
        raise ConnectionError


def test_followers_get_every_record_once_whatever_breaks(tmp_path: Path) -> None:
    token, _ = add_token(tmp_path / "tokens", "reader", ["admin"])
    with reserved_port() as port:
        pass
    http = {"listen": [f"127.0.0.1:{port}"], "requests_per_client": 100_000}
    settings = {"tokens_file": str(tmp_path / "tokens"), "http": http}
    with running(tmp_path, PROCEDURES, dispatcher=settings) as system:
        base = f"http://127.0.0.1:{port}/api/v1"
        headers = {"Authorization": f"Bearer {token}"}
        body = {"host": "web01", "procedure": "count", "arguments": [RECORDS, 0.1]}
        reply = httpx.post(f"{base}/jobs", headers=headers, json=body)
        assert reply.status_code == 201, reply.text
        job = reply.json()["job"]
        chance = random.Random(7)
        readers = Reader(port, token, job, chance), EventReader(port, token, job, chance)
        threads = [threading.Thread(target=reader.run) for reader in readers]
        for thread in threads:
            thread.start()
        for kill in range(1, KILLS + 1):
            wait_until(
                lambda: max(len(reader.received) for reader in readers) > RECORDS * kill / (KILLS + 2),  # noqa: B023
                SECONDS,
                "the next records",
            )
            system.dispatcher.restart(kill=True)
        for thread in threads:
            thread.join(SECONDS)
        for reader in readers:
            assert reader.received == [(number, number) for number in range(RECORDS)]
            assert reader.end == {"result": None}
            assert reader.cuts == CUTS
            assert reader.connections > CUTS + KILLS
        again = {**headers, "Accept": "text/event-stream", "Last-Event-ID": str(RECORDS)}
        assert httpx.get(f"{base}/jobs/{job}/records?follow=1", headers=again).status_code == 204
