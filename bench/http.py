"""The HTTP API, compared with the client protocol on the same dispatcher and with a bare answer of its server."""

from __future__ import annotations

import json
import selectors
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

import harp
from bench.harp_client import connect_queue
from bench.load import SETTINGS, Figures, Ready, jobs, quantiles, together
from bench.processes import free_port, listens, program
from harpcaller.access.tokens import add_token
from support.harpcallerd import Harpcallerd

_CLIENTS = 4
_FOLLOWERS = 100  #: Followers of one job that read its stored records at the same time.
_RATE = 20  #: Records in a second of the job that many browsers follow.
_PROCESSES = 2  #: Processes that receive events.
_WATCHED, _IDLE = 10, 3.0  #: Jobs that idle streams follow; seconds during which nothing happens.
_MANY = 6000
_RECORD = b'{"packet":'  #: The beginning of a record.
_TIMEOUT = 60.0


@dataclass(frozen=True)
class _API:
    """A dispatcher with its HTTP API."""

    dispatcher: Harpcallerd
    port: int
    token: str

    def connect(self, path: str, accept: str = "*/*", port: int | None = None) -> socket.socket:
        """Send a request on a new connection."""
        sock = socket.create_connection(("127.0.0.1", self.port if port is None else port), _TIMEOUT)
        sock.sendall(self.request(path, accept))
        return sock

    def request(self, path: str, accept: str = "*/*") -> bytes:
        """Return the bytes of a request."""
        headers = f"Host: localhost\r\nAuthorization: Bearer {self.token}\r\nAccept: {accept}\r\n"
        return f"GET /api/v1{path} HTTP/1.1\r\n{headers}\r\n".encode()

    @property
    def rpc(self) -> harp.HarpCaller:
        return harp.HarpCaller("127.0.0.1", self.dispatcher.port)


@contextmanager
def _running(name: str) -> Iterator[_API]:
    """Run a dispatcher with an HTTP API, whose host is the harpd of all workloads."""
    directory = Path(tempfile.mkdtemp(prefix=name, dir=SETTINGS["directory"]))
    token, _ = add_token(directory / "tokens", "bench", ["admin"])
    port = free_port()
    limits = dict.fromkeys(("connections", "connections_per_peer", "streams", "streams_per_client"), _MANY)
    http = {"listen": [f"127.0.0.1:{port}"], "requests_per_client": 1_000_000, **limits}
    settings = {
        "ca_file": SETTINGS["ca_file"],
        "log_level": "info",
        "tokens_file": str(directory / "tokens"),
        "http": http,
    }
    credentials = SETTINGS["user"], SETTINGS["password"]
    with Harpcallerd(directory / "dispatcher", {"web01": SETTINGS["harpd"]}, credentials, settings) as dispatcher:
        yield _API(dispatcher, port, token)


def _exchanges(port: int, request: bytes, is_complete: Callable[[bytes], bool], seconds: float) -> float:
    """Return how many requests a second some clients get answered, each on a connection that it keeps."""

    def body(client: int, ready: Ready) -> float:
        with socket.create_connection(("127.0.0.1", port), _TIMEOUT) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def exchange() -> None:
                sock.sendall(request)
                reply = b""
                while not is_complete(reply):
                    data = sock.recv(65536)
                    if not data:
                        raise RuntimeError(f"the connection was closed after {reply[:200]!r}")
                    reply += data

            exchange()
            ready()
            count, began = 0, time.monotonic()
            while time.monotonic() - began < seconds:
                exchange()
                count += 1
            return count / (time.monotonic() - began)

    rates, _ = together(_CLIENTS, body)
    return sum(rates)


def _is_response(reply: bytes) -> bool:
    head, end, body = reply.partition(b"\r\n\r\n")
    if not end:
        return False
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"got {head[:200]!r}")
    return len(body) == int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])


def _is_line(reply: bytes) -> bool:
    return reply.endswith(b"\n")


def http_get(seconds: float) -> Figures:
    """Return how often a second clients get a job: ``rate``, and its ratios to the client protocol and to the floor."""
    with _running("http-get") as api:
        job = api.rpc.web01.echo(1)
        job.get()
        over_http = _exchanges(api.port, api.request(f"/jobs/{job.id()}"), _is_response, seconds)
        line = json.dumps({"harpcaller": 1, "get_details": job.id(), "keep_alive": True}).encode() + b"\n"
        over_lines = _exchanges(api.dispatcher.port, line, _is_line, seconds)
        floor_port = free_port()
        command = [sys.executable, "-P", "-m", "bench.http_floor", str(floor_port)]
        log = api.dispatcher.directory / "floor.log"
        with program(command, log, ready=lambda: listens(floor_port)):
            floor = _exchanges(floor_port, api.request(f"/jobs/{job.id()}"), _is_response, seconds)
    return {"rate": over_http, "lines": over_http / over_lines, "floor": over_http / floor}


def http_follow(records: int) -> Figures:
    """Return how fast stored records are read.

    ``rate``: one reader; ``lines``: its ratio to the client protocol; ``many``: deliveries to 100 followers of one job.
    """
    with _running("http-follow") as api:
        job = api.rpc.web01.count(records)
        job.get()
        path = f"/jobs/{job.id()}/records?since=0"

        def over_lines() -> socket.socket:
            sock = socket.create_connection(("127.0.0.1", api.dispatcher.port), _TIMEOUT)
            request = {"harpcaller": 1, "read_stream": job.id(), "since": 0, "timed": True}
            sock.sendall(json.dumps(request).encode() + b"\n")
            return sock

        one = _receive([partial(api.connect, f"{path}&download=1")], records)
        lines = _receive([over_lines], records, is_http=False)
        many = _receive([partial(api.connect, f"{path}&follow=1")] * _FOLLOWERS, records)
    return {"rate": one, "lines": one / lines, "many": many}


class _Chunks:
    """The body of a response, which arrives in chunks; or what arrives, without HTTP."""

    def __init__(self, is_http: bool) -> None:
        self._is_in_head = is_http
        self._left = 0 if is_http else sys.maxsize
        self._pending = b""

    def feed(self, data: bytes) -> bytes:
        """Return the part of the body that these bytes have."""
        data, self._pending = self._pending + data, b""
        if self._is_in_head:
            _, end, data_of_body = data.partition(b"\r\n\r\n")
            if not end:
                self._pending = data
                return b""
            self._is_in_head, data = False, data_of_body
        found = []
        while data:
            if self._left:
                part = data[: self._left]
                found.append(part)
                self._left -= len(part)
                data = data[len(part) :]
                continue
            size, end, rest = data.lstrip(b"\r\n").partition(b"\r\n")
            if not end:
                self._pending = data
                break
            self._left, data = int(size, 16), rest
        return b"".join(found)


def _receive(connects: Sequence[Callable[[], socket.socket]], records: int, is_http: bool = True) -> float:
    """Return how many records a second some readers of one process receive together."""

    def body(client: int, ready: Ready) -> float:
        ready()
        began = time.monotonic()
        counts: dict[Any, int] = dict.fromkeys((connect() for connect in connects), 0)
        bodies = {sock: _Chunks(is_http) for sock in counts}
        ends = dict.fromkeys(counts, b"")  # the last bytes, in which a record may begin
        with selectors.DefaultSelector() as selector:
            for opened in counts:
                selector.register(opened, selectors.EVENT_READ)
            waiting = len(counts)
            while waiting:
                for key, _ in selector.select(_TIMEOUT):
                    sock: Any = key.fileobj
                    data = sock.recv(1 << 18)
                    text = ends[sock] + bodies[sock].feed(data)
                    counts[sock] += text.count(_RECORD)
                    ends[sock] = text[1 - len(_RECORD) :]
                    if not data or counts[sock] >= records:
                        selector.unregister(sock)
                        sock.close()
                        waiting -= 1
        if set(counts.values()) != {records}:
            raise RuntimeError(f"expected {records} records, got {set(counts.values())}")
        return len(connects) * records / (time.monotonic() - began)

    [rate], _ = together(1, body)
    return rate


def http_events(viewers: int, records: int) -> Figures:
    """Return what events to many browsers cost: ``cpu`` of the dispatcher in microseconds, ``p50``, ``p99`` to arrival.

    All follow one job with 20 records a second.
    """
    with _running("http-events") as api:
        job = api.rpc.web01.slowly(records, 1 / _RATE)
        process = psutil.Process(api.dispatcher.pid)
        path = f"/jobs/{job.id()}/records?follow=1&since=0"

        def body(client: int, ready: Ready) -> list[float]:
            mine = range(client, viewers, _PROCESSES)
            followers = {api.connect(path, "text/event-stream"): b"" for _ in mine}
            numbers: dict[Any, int] = dict.fromkeys(followers, 0)
            took: list[float] = []
            ready()
            with selectors.DefaultSelector() as selector:
                for opened in followers:
                    selector.register(opened, selectors.EVENT_READ)
                waiting = len(followers)
                while waiting:
                    for key, _ in selector.select(_TIMEOUT):
                        sock: Any = key.fileobj
                        data = sock.recv(1 << 16)
                        *events, followers[sock] = (followers[sock] + data).split(b"\n\n")
                        for event in events:
                            if b"event: record" in event:
                                message = json.loads(event.partition(b"\ndata: ")[2])
                                if message["packet"] != numbers[sock]:
                                    raise RuntimeError(f"expected record {numbers[sock]}, got {message}")
                                numbers[sock] += 1
                                took.append(time.time() - message["data"]["at"])
                            elif b"event: end" in event or not data:
                                selector.unregister(sock)
                                waiting -= 1
            if followers and set(numbers.values()) != {records}:
                raise RuntimeError(f"expected {records} records, got {set(numbers.values())}")
            return took[len(took) // 4 :]  # without the records from before all had connected

        before = sum(process.cpu_times()[:2])
        found, _ = together(_PROCESSES, body)
        cpu = sum(process.cpu_times()[:2]) - before
    return {"cpu": 1e6 * cpu / (viewers * records), **quantiles([each for took in found for each in took])}


def http_idle(streams: int) -> Figures:
    """Return what an idle stream adds to the dispatcher's memory (RSS), in kB."""
    with _running("http-idle") as api:
        watched = [api.rpc.web01.wait(60) for _ in range(_WATCHED)]

        def follow(number: int) -> socket.socket:
            sock = api.connect(f"/jobs/{watched[number % _WATCHED].id()}/records?follow=1&state=1", "text/event-stream")
            sock.recv(100)
            return sock

        for number in range(_WATCHED):  # not counted: the memory of a first stream
            follow(number).close()
        process = psutil.Process(api.dispatcher.pid)
        before = process.memory_info().rss
        following = [follow(number) for number in range(streams)]
        time.sleep(_IDLE)
        taken = process.memory_info().rss - before
        for job in watched:
            job.cancel()
        for sock in following:
            sock.close()
    return {"memory": max(0.0, taken / streams / 1e3)}


def http_viewers(viewers: int, clients: int, count: int) -> Figures:
    """Return what viewers of a live list cost jobs.

    ``ratio``: the rate of jobs beside them to the rate without them; ``cpu``: the same of the dispatcher's CPU.
    """
    with _running("http-viewers") as api:
        process = psutil.Process(api.dispatcher.pid)

        def rate() -> tuple[float, float]:
            before = sum(process.cpu_times()[:2])
            found = jobs(partial(connect_queue, port=api.dispatcher.port), clients, count)["rate"]
            return found, sum(process.cpu_times()[:2]) - before

        rate()
        without, cpu = rate()
        drain = [sys.executable, "-P", "-m", "bench.http_viewers", str(api.port), api.token, str(viewers)]
        ready = api.dispatcher.directory / "viewers"
        with program([*drain, str(ready)], api.dispatcher.directory / "viewers.log", ready=ready.exists):
            beside, more_cpu = rate()
    return {"ratio": beside / without, "cpu": more_cpu / cpu}


FUNCTIONS: dict[str, Callable[..., Figures]] = {
    "http-get": http_get,
    "http-follow": http_follow,
    "http-events": http_events,
    "http-idle": http_idle,
    "http-viewers": http_viewers,
}
