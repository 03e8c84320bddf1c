"""Theirs: each peer with two workers, one a core, and else as its documentation recommends."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from bench import services
from bench.clients import Missing
from bench.contenders import Contender, Place
from bench.processes import Client, free_port, listens, program
from support.certificates import server_files

__all__ = ["DIRECT", "JOBS", "STREAM"]

#: Worker processes, one a core of the machine that this is measured on.
_WORKERS = "2"

_NOTHING = "nothing is stored"
_SNAPSHOTS = "Redis as it comes: in memory, a snapshot now and then"
_SYNCED_REDIS = "Redis with appendfsync always: synced at each write"


def _python(place: Place) -> str:
    if place.peers is None:
        raise Missing("the peers' packages are not installed")
    return str(place.peers)


@contextmanager
def _client(place: Place, module: str, settings: dict[str, Any]) -> Iterator[Client]:
    command = [_python(place), "-P", "-m", "bench.peers", module]
    with Client.running(command, place.directory / "client.log", _environment(settings)) as client:
        yield client


def _environment(settings: dict[str, Any]) -> dict[str, str]:
    return {"BENCH_SETTINGS": json.dumps(settings)}


def _workers(place: Place, settings: dict[str, Any], module: str, *arguments: str) -> Any:
    command = [_python(place), "-P", "-m", module, *arguments]
    return program(command, place.directory / "workers.log", environment=_environment(settings))


@contextmanager
def _direct(place: Place, module: str, **more: Any) -> Iterator[Client]:
    files = server_files(place.directory)
    paths = {"ca_file": str(files.ca_file), "certfile": str(files.certfile), "keyfile": str(files.keyfile)}
    port = free_port()
    settings = {"port": port, **paths, **more}
    server = [_python(place), "-P", "-m", f"bench.peers.{module}", "server"]
    environment, log = _environment(settings), place.directory / "server.log"
    with (
        program(server, log, environment=environment, ready=lambda: listens(port)),
        _client(place, module, settings) as client,
    ):
        yield client


@contextmanager
def _ssh(place: Place, *, multiplexed: bool) -> Iterator[Client]:
    with services.ssh_server(place.directory) as server:
        settings = {"options": server.options, "multiplexed": multiplexed, "directory": str(place.directory)}
        with _client(place, "ssh_calls", settings) as client:
            yield client


@contextmanager
def _on_redis(place: Place, module: str, arguments: Sequence[str], *, client: str, durable: bool) -> Iterator[Client]:
    """A queue of jobs on Redis; `{redis}` in the arguments is its port."""
    with services.redis(place.directory, durable=durable) as port:
        settings = {"redis": port, "durable": durable}
        given = [argument.format(redis=port) for argument in arguments]
        with _workers(place, settings, module, *given), _client(place, client, settings) as one:
            yield one


_rq = partial(
    _on_redis,
    module="rq.cli",
    arguments=("worker-pool", "-n", _WORKERS, "-u", "redis://127.0.0.1:{redis}", "work"),
    client="rq_jobs",
)
_celery = partial(
    _on_redis,
    module="celery",
    arguments=("-A", "bench.peers.celery_jobs", "worker", "--concurrency", _WORKERS),
    client="celery_jobs",
)
_dramatiq = partial(
    _on_redis,
    module="dramatiq",
    arguments=("bench.peers.dramatiq_jobs", "--processes", _WORKERS, "--queues", "default"),
    client="dramatiq_jobs",
)
_HUEY = ("bench.peers.huey_jobs.huey", "-w", _WORKERS, "-k", "process")
_huey = partial(_on_redis, module="huey.bin.huey_consumer", arguments=_HUEY, client="huey_jobs")


@contextmanager
def _huey_on_sqlite(place: Place) -> Iterator[Client]:
    settings = {"file": str(place.directory / "huey.sqlite")}
    # It polls: as often as makes sense where somebody waits.
    polling = ("--delay", "0.002", "--max-delay", "0.005")
    with (
        _client(place, "huey_jobs", settings) as client,
        _workers(place, settings, "huey.bin.huey_consumer", *_HUEY, *polling),
    ):
        yield client


@contextmanager
def _procrastinate(place: Place) -> Iterator[Client]:
    # The cluster is made once; each run has tables of its own.
    with services.postgres(place.shared / "postgres") as url:
        settings = {"postgres": url}
        with _client(place, "procrastinate_jobs", settings) as client:
            client.ask("prepare", 60.0)
            arguments = ("--app=bench.peers.procrastinate_jobs.app", "worker", "--queues=default", "--concurrency=8")
            with (
                _workers(place, settings, "procrastinate", *arguments),
                _workers(place, settings, "procrastinate", *arguments),
            ):
                yield client


@contextmanager
def _streams(place: Place, *, pipelined: bool, durable: bool) -> Iterator[Client]:
    with services.redis(place.directory, durable=durable) as port:
        settings = {"redis": port, "pipelined": pipelined}
        with (
            _workers(place, settings, "bench.peers.redis_streams", "worker"),
            _client(place, "redis_streams", settings) as client,
        ):
            yield client


_FRESH = {"fresh-1": "fresh", "fresh-16": "fresh"}
_REUSED = {"reused-1": "reused", "reused-16": "reused"}

DIRECT = (
    Contender("RPyC, forking", _NOTHING, {**_FRESH, **_REUSED}, partial(_direct, module="rpyc_calls", threads=False)),
    Contender(
        "RPyC, threads, TCP_NODELAY patched in", _NOTHING, _FRESH, partial(_direct, module="rpyc_calls", threads=True)
    ),
    Contender("gRPC, one process", _NOTHING, {**_FRESH, **_REUSED}, partial(_direct, module="grpc_calls")),
    Contender("ssh", _NOTHING, _FRESH, partial(_ssh, multiplexed=False)),
    Contender(
        "ssh, multiplexed", _NOTHING, {**_FRESH, "kept-1": "fresh", "kept-16": "fresh"}, partial(_ssh, multiplexed=True)
    ),
)

_FORKED = {"latency": "latency", "jobs": "jobs", "submit-1": "submissions", "submit-16": "submissions"}
_SHARED = {**_FORKED, "reused-jobs": "jobs"}
_MANY = {"submit-many": "submissions"}

JOBS = (
    Contender("RQ", _SNAPSHOTS, {**_FORKED, **_MANY}, partial(_rq, durable=False), losing=True),
    Contender("RQ, durable Redis", _SYNCED_REDIS, {**_FORKED, **_MANY}, partial(_rq, durable=True)),
    Contender("Celery", _SNAPSHOTS, _SHARED, partial(_celery, durable=False), losing=True),
    Contender("Celery, durable", f"{_SYNCED_REDIS}; acknowledged late", _SHARED, partial(_celery, durable=True)),
    Contender("Huey", _SNAPSHOTS, _SHARED, partial(_huey, durable=False), losing=True),
    Contender("Huey on SQLite", "each commit is synced", _SHARED, _huey_on_sqlite),
    Contender("Dramatiq", _SNAPSHOTS, _SHARED, partial(_dramatiq, durable=False), losing=True),
    Contender("Dramatiq, durable Redis", _SYNCED_REDIS, _SHARED, partial(_dramatiq, durable=True)),
    Contender("Procrastinate", "each commit is synced", {**_SHARED, **_MANY}, _procrastinate),
)

_STREAMS = {"stream": "follow", "long-stream": "follow", "slow-stream": "follow_slowly"}

STREAM = (
    Contender("gRPC, protobuf", _NOTHING, _STREAMS, partial(_direct, module="grpc_calls"), losing=True),
    Contender("gRPC, JSON", _NOTHING, {"stream": "follow_json"}, partial(_direct, module="grpc_calls"), losing=True),
    Contender(
        "RPyC, generator",
        _NOTHING,
        {"stream": "follow", "slow-stream": "follow_slowly"},
        partial(_direct, module="rpyc_calls", threads=False),
        losing=True,
    ),
    Contender(
        "Redis streams",
        _SNAPSHOTS,
        {"stream": "follow"},
        partial(_streams, pipelined=False, durable=False),
        losing=True,
    ),
    Contender(
        "Redis streams, pipelined", _SNAPSHOTS, _STREAMS, partial(_streams, pipelined=True, durable=False), losing=True
    ),
    Contender(
        "Redis streams, pipelined, durable", _SYNCED_REDIS, _STREAMS, partial(_streams, pipelined=True, durable=True)
    ),
)
