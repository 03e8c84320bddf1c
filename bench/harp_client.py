"""Program: our client, asked by the harness as the peers' are. `BENCH_SETTINGS` says where the daemons are."""

from __future__ import annotations

import inspect
import json
import os
import selectors
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harp
from bench.clients import Figures, Missing, serve, together
from bench.load import Queue, calls, follow, follow_slowly, jobs, latency, submissions
from harpd import proc

SETTINGS: dict[str, Any] = json.loads(os.environ["BENCH_SETTINGS"])

#: Seconds.
_PATIENCE = 60.0


def _server(**options: Any) -> harp.HarpServer:
    lacking = options.keys() - inspect.signature(harp.HarpServer).parameters.keys()
    if lacking:
        raise Missing(f"harp.HarpServer has no {', '.join(lacking)} yet")
    user, password, port, ca_file = (SETTINGS[name] for name in ("user", "password", "harpd", "ca_file"))
    return harp.HarpServer("127.0.0.1", user, password, port, ca_file, **options)


def _rpc() -> harp.HarpCaller:
    return harp.HarpCaller("127.0.0.1", SETTINGS["harpcallerd"], keep=True)


def _asking(port: int, request: Mapping[str, Any]) -> socket.socket:
    """A connection to a dispatcher on which a request has been sent; for works in which a client is to cost nothing."""
    sock = socket.create_connection(("127.0.0.1", port), _PATIENCE)
    sock.sendall(json.dumps({"harpcaller": 1, **request}).encode() + b"\n")
    return sock


def follower(port: int, job: str) -> socket.socket:
    """A connection that follows a job from its first record on."""
    return _asking(port, {"follow_stream": job, "since": 0})


def lines_of(sock: socket.socket) -> Iterator[Any]:
    """What comes on a connection, decoded, line by line until it is closed."""
    rest = b""
    while data := sock.recv(1 << 16):
        *lines, rest = (rest + data).split(b"\n")
        yield from map(json.loads, lines)


def exchange(port: int, request: Mapping[str, Any]) -> list[Any]:
    """Ask a dispatcher; return all lines of its answer, decoded."""
    with _asking(port, request) as sock:
        return list(lines_of(sock))


def _fresh() -> Callable[[Any], Any]:
    return _server().echo


def _kept() -> Callable[[Any], Any]:
    return _server(keep=True).echo


def _reused() -> Callable[[Any], Any]:
    if "max_calls_per_process" not in inspect.signature(proc.procedure).parameters:
        raise Missing("@procedure has no max_calls_per_process yet")
    return _server(keep=True).reused_echo


class Client(Queue):
    """A client of the dispatcher.

    Args:
        procedure: the job.
        port: the dispatcher's; None: as the settings say.
    """

    def __init__(self, procedure: str = "echo", port: int | None = None) -> None:
        self._rpc = _rpc() if port is None else harp.HarpCaller("127.0.0.1", port, keep=True)
        self._procedure = getattr(self._rpc.web01, procedure)
        self._waiting: harp.RemoteProcedure | None = None

    def submit(self, value: Any) -> harp.RemoteCall:
        """Submit a job."""
        call: harp.RemoteCall = self._procedure(value)
        return call

    def submit_waiting(self, value: Any) -> harp.RemoteCall:
        """Submit a job to a queue that is full."""
        return self._fill()(value)

    def _fill(self) -> harp.RemoteProcedure:
        """Fill the queue; return the procedure behind it."""
        if self._waiting is None:
            host = self._rpc.host("web01", queue={"full": 1})
            host.wait("/there is no such file")
            self._waiting = host.echo
        return self._waiting

    def submit_many(self, values: Sequence[Any]) -> Any:
        """Submit jobs in one request, to a queue that is full."""
        self._fill()
        return self._rpc.submit_many([harp.Call("web01", "echo", [value], queue={"full": 1}) for value in values])

    def collect(self, handles: Sequence[harp.RemoteCall]) -> list[Any]:
        """Wait for results."""
        return [call.get() for call in handles]


def _reused_client() -> Client:
    if "max_calls_per_process" not in inspect.signature(proc.procedure).parameters:
        raise Missing("@procedure has no max_calls_per_process yet")
    return Client("reused_echo")


def _stream(records: int) -> Iterator[Any]:
    return _rpc().web01.count(records).follow(since=0)


def _slow_stream(records: int, pause: float) -> Iterator[Any]:
    return _rpc().web01.slowly(records, pause).follow(since=0)


def _crowd(followers: int, records: int) -> Figures:
    """Many followers of one stream, and one that never reads.

    They count lines and decode none: the clients' own work is not what is measured.
    """

    def body(client: int, start: Callable[[], object]) -> float:
        told = Path(SETTINGS["directory"]) / f"begin-{uuid.uuid4()}"
        job = _rpc().web01.count_when(str(told), records)
        deaf, *readers = (follower(SETTINGS["harpcallerd"], job.id()) for _ in range(1 + followers))
        _read(readers, 1)
        began = time.monotonic()
        told.touch()
        _read(readers, records)
        took = time.monotonic() - began
        for sock in (deaf, *readers):
            sock.close()
        return followers * records / took

    return {"rate": together(1, body)[0]}


def _read(readers: Sequence[socket.socket], records: int) -> None:
    """Read until each has been given so many records more."""
    missing = dict.fromkeys(readers, records)
    with selectors.DefaultSelector() as selector:
        for sock in readers:
            selector.register(sock, selectors.EVENT_READ)
        while missing:
            ready = selector.select(_PATIENCE)
            if not ready:
                raise RuntimeError(f"{len(missing)} followers wait in vain")
            for key, _ in ready:
                assert isinstance(key.fileobj, socket.socket)
                sock = key.fileobj
                data = sock.recv(1 << 18)
                if not data:
                    raise RuntimeError(f"a follower was closed {missing[sock]} records before the end")
                missing[sock] -= data.count(b"\n")
                if missing[sock] <= 0:
                    selector.unregister(sock)
                    del missing[sock]


if __name__ == "__main__":
    serve(
        {
            "fresh": partial(calls, _fresh),
            "kept": partial(calls, _kept),
            "reused": partial(calls, _reused),
            "jobs": partial(jobs, Client),
            "reused_jobs": partial(jobs, _reused_client),
            "submissions": partial(submissions, Client),
            "latency": partial(latency, Client),
            "follow": partial(follow, _stream),
            "follow_slowly": partial(follow_slowly, _slow_stream),
            "crowd": _crowd,
        }
    )
