"""The HTTP API, compared with the client protocol on the same dispatcher and with a bare answer of its server.

CPU times are those of the dispatcher. Their ratio to the bare answer of the same run hardly depends on other programs.
"""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

import harp
from bench import searches
from bench.harp_client import connect_queue
from bench.load import SETTINGS, Figures, Ready, jobs, quantiles, together
from bench.processes import free_port, listens, program
from harpcaller.access.tokens import add_token
from harpcaller.store.sqlite import FILE_NAME
from support.harpcallerd import Harpcallerd

_CLIENTS = 4
_LISTERS, _SUBMITTERS = 8, 16  #: Clients that list jobs, and that submit them.
_PAGE = 50  #: Jobs of a page.
_CALLS = 10_000  #: Calls of one request with many.
_SCRAPES = 10
_PAIRS = 3  #: Measurements beside viewers, and without them, in turn.
_FOLLOWERS = 100  #: Followers of one job that read its stored records at the same time.
_RATE = 20  #: Records in a second of the job that many browsers follow.
_PROCESSES = 2  #: Processes that receive events.
_WATCHED, _IDLE = 10, 3.0  #: Jobs that idle streams follow; seconds during which nothing happens.
_MANY = 6000
_RECORD = b'{"packet":'  #: The beginning of a record.
_TIMEOUT = 60.0
_TICK = 1 / os.sysconf("SC_CLK_TCK")  #: Seconds of CPU that the kernel counts at once.


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

    def post(self, path: str, body: object) -> bytes:
        """Return the bytes of a request with a body."""
        text = json.dumps(body).encode()
        kind = f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n"
        head = f"Host: localhost\r\nAuthorization: Bearer {self.token}\r\n{kind}"
        return f"POST /api/v1{path} HTTP/1.1\r\n{head}\r\n".encode() + text

    @property
    def rpc(self) -> harp.HarpCaller:
        return harp.HarpCaller("127.0.0.1", self.dispatcher.port)


@contextmanager
def _running(name: str, stored: int = 0) -> Iterator[_API]:
    """Run a dispatcher with an HTTP API, whose host is the harpd of all workloads, and that many jobs in its store."""
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
    if stored:
        store = directory / "dispatcher" / "jobs"
        asyncio.run(searches.create(store))
        searches.fill(store / FILE_NAME, stored, has_open=False)
    with Harpcallerd(directory / "dispatcher", {"web01": SETTINGS["harpd"]}, credentials, settings) as dispatcher:
        yield _API(dispatcher, port, token)


@dataclass(frozen=True)
class _Exchanges:
    """What some clients and a server needed for requests: rate, CPU of the server for each in us, and times in s."""

    rate: float
    cpu: float
    took: Sequence[float]


def _exchange(
    pid: int,
    port: int,
    requests: Sequence[bytes],
    is_complete: Callable[[bytes], bool],
    seconds: float,
) -> _Exchanges:
    """Measure clients, each of which sends its own request again and again on a connection that it keeps."""

    def body(client: int, ready: Ready) -> list[float]:
        with socket.create_connection(("127.0.0.1", port), _TIMEOUT) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def exchange() -> None:
                sock.sendall(requests[client])
                reply = b""
                while not is_complete(reply):
                    data = sock.recv(1 << 18)
                    if not data:
                        raise RuntimeError(f"the connection was closed after {reply[:200]!r}")
                    reply += data

            exchange()
            ready()
            took = [began := time.monotonic()]
            while took[-1] - began < seconds:
                exchange()
                took.append(time.monotonic())
            return took

    before = _cpu(pid)
    times, _ = together(len(requests), body)
    count = sum(len(each) - 1 for each in times) + len(requests)
    rate = sum((len(each) - 1) / (each[-1] - each[0]) for each in times)
    took = [after - before for each in times for before, after in pairwise(each)]
    return _Exchanges(rate, 1e6 * _cpu_since(pid, before) / count, took)


def _cpu(pid: int) -> float:
    """Return the seconds of CPU that a process has needed so far."""
    return sum(psutil.Process(pid).cpu_times()[:2])


def _cpu_since(pid: int, before: float) -> float:
    """Return what it has needed since; at least a tick, below which the kernel's books have nothing."""
    return max(_cpu(pid) - before, _TICK)


def _p99(seconds: Sequence[float]) -> float:
    """Return the 99th percentile of durations, in milliseconds."""
    return quantiles(seconds)["p99"]


@contextmanager
def _floor(directory: Path) -> Iterator[tuple[int, int]]:
    """Run the bare server; return its process id and its port."""
    port = free_port()
    command = [sys.executable, "-P", "-m", "bench.http_floor", str(port)]
    with program(command, directory / "floor.log", ready=lambda: listens(port)) as process:
        yield process.pid, port


def _compare(api: _API, requests: Sequence[bytes], seconds: float) -> tuple[_Exchanges, Figures]:
    """Return what requests need, and their figures: ``rate``, ``floor``, ``cpu``, and ``cpu_floor``.

    The floors are ratios to as many clients of the bare server: of the rates, and of the CPU times.
    """
    bare = [api.request("/jobs/x")] * len(requests)
    with _floor(api.dispatcher.directory) as (pid, port):
        found = _exchange(api.dispatcher.pid, api.port, requests, _is_response, seconds)
        floor = _exchange(pid, port, bare, _is_response, seconds)
    ratios = {"floor": found.rate / floor.rate, "cpu_floor": found.cpu / floor.cpu}
    return found, {"rate": found.rate, "cpu": found.cpu, **ratios}


def _is_response(reply: bytes) -> bool:
    head, end, body = reply.partition(b"\r\n\r\n")
    if not end:
        return False
    if not head.startswith(b"HTTP/1.1 20"):
        raise RuntimeError(f"got {head[:200]!r}")
    return len(body) == int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])


def _is_line(reply: bytes) -> bool:
    return reply.endswith(b"\n")


def http_get(seconds: float) -> Figures:
    """Return what a GET of a job needs: the figures of `_compare`, and ``lines``, its ratio to the client protocol."""
    with _running("http-get") as api:
        job = api.rpc.web01.echo(1)
        job.get()
        _, figures = _compare(api, [api.request(f"/jobs/{job.id()}")] * _CLIENTS, seconds)
        line = json.dumps({"harpcaller": 1, "get_details": job.id(), "keep_alive": True}).encode() + b"\n"
        lines = _exchange(api.dispatcher.pid, api.dispatcher.port, [line] * _CLIENTS, _is_line, seconds)
    return {**figures, "lines": figures["rate"] / lines.rate}


def http_list(stored: int, seconds: float) -> Figures:
    """Return what the first page of a list needs in a store with many jobs.

    The figures of `_compare` for clients that each ask for another page, so that no two share one; ``p99`` of a single
    client; ``same``: the rate of clients that all ask for the same page.
    """
    with _running("http-list", stored) as api:
        requests = [api.request(f"/jobs?limit={_PAGE + client}") for client in range(_LISTERS)]
        one = _exchange(api.dispatcher.pid, api.port, requests[:1], _is_response, seconds)
        _, figures = _compare(api, requests, seconds)
        same = _exchange(api.dispatcher.pid, api.port, requests[:1] * _LISTERS, _is_response, seconds)
    return {**figures, "p99": _p99(one.took), "same": same.rate}


def http_post(seconds: float) -> Figures:
    """Return what a submission needs: the figures of `_compare`; ``many``: jobs a second in long requests."""
    call = {"host": "web01", "procedure": "wait", "arguments": [60], "queue": {"name": {"of": "http"}}}
    with _running("http-post") as api:
        first = api.rpc.web01(queue={"of": "http"}).wait(60)  # the others wait for it
        _, figures = _compare(api, [api.post("/jobs", call)] * _SUBMITTERS, seconds)
        many = api.post("/jobs/many", {"calls": [call] * _CALLS})
        found = _exchange(api.dispatcher.pid, api.port, [many], _is_response, seconds)
        first.cancel()
    return {**figures, "many": found.rate * _CALLS}


def http_probes(seconds: float) -> Figures:
    """Return ``health``: p99 of ``/healthz`` beside clients that get jobs; ``metrics``: p50 of a scrape, both in ms."""
    with _running("http-probes") as api:
        job = api.rpc.web01.echo(1)
        job.get()
        took: list[float] = []
        is_over = threading.Event()

        def ask(path: str) -> float:
            began = time.monotonic()
            request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            with socket.create_connection(("127.0.0.1", api.port), _TIMEOUT) as sock:
                sock.sendall(f"{request}Authorization: Bearer {api.token}\r\n\r\n".encode())
                reply = sock.recv(65536)
                while sock.recv(1 << 18):
                    pass
            if not reply.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"got {reply[:200]!r}")
            return time.monotonic() - began

        def probe() -> None:
            while not is_over.is_set():
                took.append(ask("/healthz"))
                time.sleep(0.01)

        prober = threading.Thread(target=probe)
        prober.start()
        try:
            requests = [api.request(f"/jobs/{job.id()}"), api.request(f"/jobs?limit={_PAGE}")] * 2
            _exchange(api.dispatcher.pid, api.port, requests, _is_response, seconds)
        finally:
            is_over.set()
            prober.join()
        metrics = [ask("/metrics") for _ in range(_SCRAPES)]
    return {"health": _p99(took), "metrics": 1000 * statistics.median(metrics)}


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

    All follow one job with 20 records a second. ``cpu_floor``: the ratio to the bare server, which sends as many events
    of a fixed text.
    """
    with _running("http-events") as api:
        job = api.rpc.web01.slowly(records, 1 / _RATE)
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

        before = _cpu(api.dispatcher.pid)
        found, _ = together(_PROCESSES, body)
        cpu = 1e6 * _cpu_since(api.dispatcher.pid, before) / (viewers * records)
        with _floor(api.dispatcher.directory) as (pid, port):
            before = _cpu(pid)
            together(_PROCESSES, partial(_drain, api, port, viewers, records))
            floor = 1e6 * _cpu_since(pid, before) / (viewers * records)
    return {"cpu": cpu, "cpu_floor": cpu / floor, **quantiles([each for took in found for each in took])}


def _drain(api: _API, port: int, viewers: int, records: int, client: int, ready: Ready) -> None:
    """Receive the events of the bare server."""
    path = f"/events/{records}/{_RATE}"
    followers = dict.fromkeys((api.connect(path, port=port) for _ in range(client, viewers, _PROCESSES)), 0)
    ready()
    with selectors.DefaultSelector() as selector:
        for opened in followers:
            selector.register(opened, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select(_TIMEOUT):
                sock: Any = key.fileobj
                data = sock.recv(1 << 16)
                followers[sock] += data.count(b"event: record")
                if b"0\r\n\r\n" in data[-7:] or not data:
                    selector.unregister(sock)
    if set(followers.values()) - {records}:
        raise RuntimeError(f"expected {records} events, got {set(followers.values())}")


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
    """Return what viewers of a live list cost jobs. As the console does, they ask for the list again where it says so.

    ``ratio``: the rate of jobs beside them to the rate without them; ``cpu``: the same of the dispatcher's CPU.
    """
    with _running("http-viewers") as api:

        def measure() -> tuple[float, float]:
            before = _cpu(api.dispatcher.pid)
            rate = jobs(partial(connect_queue, port=api.dispatcher.port), clients, count)["rate"]
            return rate, _cpu_since(api.dispatcher.pid, before)

        def measure_beside(number: int) -> tuple[float, float]:
            drain = [sys.executable, "-P", "-m", "bench.http_viewers", str(api.port), api.token, str(viewers)]
            ready = api.dispatcher.directory / f"viewers{number}"
            with program([*drain, str(ready)], api.dispatcher.directory / "viewers.log", ready=ready.exists):
                return measure()

        measure()
        pairs = [(measure(), measure_beside(number)) for number in range(_PAIRS)]
    ratios = [(beside[0] / without[0], beside[1] / without[1]) for without, beside in pairs]
    return {
        name: statistics.median(each) for name, each in zip(("ratio", "cpu"), zip(*ratios, strict=True), strict=True)
    }


FUNCTIONS: dict[str, Callable[..., Figures]] = {
    "http-get": http_get,
    "http-list": http_list,
    "http-post": http_post,
    "http-probes": http_probes,
    "http-follow": http_follow,
    "http-events": http_events,
    "http-idle": http_idle,
    "http-viewers": http_viewers,
}
