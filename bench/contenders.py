"""Who is measured: HARP, its peers, and floors; how each is started, and which workloads it does.

A peer has two worker processes, one for each core of the machine that this is usually measured on, and else the
configuration that its documentation recommends. docs/performance.md lists the configuration of each contender.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bench import services
from bench.load import Figures, Missing
from bench.processes import free_port, listens, program, run_client
from bench.results import F1, F2, F3, OURS
from bench.workloads import PARTS
from support.certificates import server_files
from support.harpcallerd import Harpcallerd
from support.harpd import Harpd

#: The procedures file of HARP.
PROCEDURES = Path(__file__).with_name("procedures.py")
#: Seconds until harpd takes a users file as settled, and a little more; see `harpd.auth.passfile`.
_SETTLED = 2.2
#: harpd's default log, in a format that `support.harpd` can read.
_LOGGING = {
    "version": 1,
    "formatters": {"json": {"()": "harp_daemon.logs.JSONFormatter"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
    "root": {"level": "INFO", "handlers": ["stderr"]},
}


@dataclass(frozen=True)
class Place:
    """Where a contender runs."""

    directory: Path  # empty, and its own
    peers: Path | None  # the Python that has the peers' packages; None: they are not installed

    @property
    def peers_python(self) -> str:
        """The peers' Python."""
        if self.peers is None:
            raise Missing("the peers' packages are not installed")
        return str(self.peers)


#: Runs a function of a contender's client: name, arguments, deadline in seconds.
Ask = Callable[[str, Mapping[str, Any], float], Figures]


@dataclass(frozen=True)
class Contender:
    """One way to do the workloads of a part."""

    name: str
    functions: Mapping[str, str]  # the client's function for each workload that the contender does
    start: Callable[[Place], AbstractContextManager[Ask]]  # runs its servers while the block runs
    durable: bool = False  # whether each job and record is synced to disk before it is acknowledged
    jobs: float = 1.0  # of the jobs of a workload, the share that it is given: its rate is the same with fewer


def _client(python: str, module: str, directory: Path, settings: Mapping[str, Any]) -> Ask:
    def ask(function: str, arguments: Mapping[str, Any], seconds: float) -> Figures:
        command = [python, "-P", "-m", "bench.client", module, function, json.dumps(arguments)]
        return run_client(command, directory, settings, seconds)

    return ask


@contextmanager
def _harp(place: Place) -> Iterator[Ask]:
    """Run harpd and harpcallerd with the defaults of their settings, and a users file of password hashes."""
    users = place.directory / "users"
    command = ["openssl", "passwd", "-6", Harpd.password]
    hashed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    users.write_text(f"{Harpd.user}:{hashed}")
    authentication = {"module": "harpd.auth.passfile", "file": str(users)}
    harpd = Harpd(place.directory / "harpd", PROCEDURES.read_text(), {"authentication": authentication})
    harpd.logging_file.write_text(yaml.safe_dump(_LOGGING))
    # Until a users file has settled, harpd reads it and checks the hash anew for each request.
    time.sleep(max(0.0, users.stat().st_ctime + _SETTLED - time.time()))
    with harpd:
        settings = {"ca_file": str(harpd.ca_file), "log_level": "info"}
        credentials = (Harpd.user, Harpd.password)
        with Harpcallerd(place.directory / "dispatcher", {"web01": harpd.port}, credentials, settings) as dispatcher:
            pids = {
                "dispatcher": dispatcher.pid,
                "frontend": harpd.pid,
                "supervisor": harpd.supervisor,
                "zygote": harpd.zygote,
                "workers": -harpd.zygote,
            }
            known = {
                "directory": str(place.directory),
                "user": Harpd.user,
                "password": Harpd.password,
                "harpd": harpd.port,
                "ca_file": str(harpd.ca_file),
                "dispatcher": dispatcher.port,
                "pids": pids,
            }
            yield _client(sys.executable, "bench.harp_only", place.directory, known)


def _tls_files(directory: Path) -> dict[str, str]:
    files = server_files(directory)
    return {"ca_file": str(files.ca_file), "certfile": str(files.certfile), "keyfile": str(files.keyfile)}


@contextmanager
def _floor(place: Place) -> Iterator[Ask]:
    yield _client(sys.executable, "bench.floors", place.directory, _tls_files(place.directory))


@contextmanager
def _server(place: Place, module: str) -> Iterator[Ask]:
    """Run the server of a peer that is called over TLS."""
    port = free_port()
    settings = {"port": port, **_tls_files(place.directory)}
    command = [place.peers_python, "-P", "-m", "bench.client", module, "server"]
    with program(command, place.directory / "server.log", settings=settings, ready=lambda: listens(port)) as server:
        pids = {"server": server.pid, "its children": -server.pid}
        yield _client(place.peers_python, module, place.directory, {**settings, "pids": pids})


@contextmanager
def _ssh(place: Place, *, multiplexed: bool) -> Iterator[Ask]:
    with services.ssh_server(place.directory) as (server, options):
        pids = {"server": server, "its children": -server}
        settings = {"options": options, "multiplexed": multiplexed, "directory": str(place.directory), "pids": pids}
        yield _client(place.peers_python, "bench.peers.ssh_calls", place.directory, settings)


@contextmanager
def _redis(place: Place, client: str, command: str, *, durable: bool) -> Iterator[Ask]:
    """Run Redis and the workers of a peer: a module with arguments, in which ``{redis}`` becomes the port."""
    with services.redis(place.directory, durable=durable) as (server, port):
        settings = {"redis": port, "durable": durable}
        command = command.format(redis=port)
        with program(
            [place.peers_python, "-P", "-m", *command.split()], place.directory / "workers.log", settings=settings
        ) as workers:
            pids = {"redis": server, "parent": workers.pid, "workers": -workers.pid}
            yield _client(place.peers_python, client, place.directory, {**settings, "pids": pids})


_rpyc = partial(_server, module="bench.peers.rpyc_calls")
_grpc = partial(_server, module="bench.peers.grpc_calls")
_streams = partial(_redis, client="bench.peers.redis_streams", command="bench.client bench.peers.redis_streams worker")
_rq = partial(_redis, client="bench.peers.rq_jobs", command="rq.cli worker-pool -n 2 -u redis://127.0.0.1:{redis} work")
_celery = partial(
    _redis, client="bench.peers.celery_jobs", command="celery -A bench.peers.celery_jobs worker --concurrency 2"
)
_dramatiq = partial(
    _redis,
    client="bench.peers.dramatiq_jobs",
    command="dramatiq bench.peers.dramatiq_jobs --processes 2 --queues default",
)

_FRESH = {"fresh-1": "fresh", "fresh-16": "fresh"}
_KEPT = {"kept-1": "kept", "kept-4": "kept", "kept-16": "kept"}
_CALLS = {**_FRESH, "reused-1": "kept", "reused-16": "kept"}
_SUBMIT = {"submit-1": "submissions", "submit-16": "submissions"}
_QUEUE = {"latency": "latency", "jobs": "jobs", "reused-jobs": "jobs", **_SUBMIT}
_BULK = {**_QUEUE, "submit-many": "submissions"}
_STREAMS = {"long-stream": "follow", "slow-stream": "follow_slowly"}
_HARP = {
    **_FRESH,
    **_KEPT,
    "reused-1": "reused",
    "reused-16": "reused",
    **_BULK,
    "reused-jobs": "reused_jobs",
    **_STREAMS,
    **{name: name for name in ("memory", "simulated-cpu", "access", "idle", "trace", "store", "wide", "flood", "soak")},
    **{workload.key: workload.key for workload in PARTS["http"].workloads},
    **{workload.key: "neighbours" for workload in PARTS["neighbours"].workloads},
}

#: All contenders, HARP first.
CONTENDERS = (
    Contender(OURS, _HARP, _harp, durable=True),
    Contender(F1, {"kept-4": "fork"}, _floor),
    Contender(F2, {"kept-4": "zygote"}, _floor),
    Contender(F3, {"reused-1": "echo", "reused-16": "echo"}, _floor),
    Contender("RPyC, forking", {**_CALLS, **_STREAMS}, _rpyc),
    Contender("gRPC, one process", {**_CALLS, **_STREAMS}, _grpc),
    Contender("ssh", _FRESH, partial(_ssh, multiplexed=False)),
    Contender("ssh, multiplexed", _KEPT, partial(_ssh, multiplexed=True)),
    Contender("RQ", _BULK, partial(_rq, durable=False), jobs=0.25),
    Contender("RQ, durable", _BULK, partial(_rq, durable=True), durable=True, jobs=0.25),
    Contender("Celery", _QUEUE, partial(_celery, durable=False)),
    Contender("Celery, durable", _QUEUE, partial(_celery, durable=True), durable=True),
    Contender("Dramatiq", _QUEUE, partial(_dramatiq, durable=False)),
    Contender("Dramatiq, durable", _QUEUE, partial(_dramatiq, durable=True), durable=True),
    Contender("Redis streams", _STREAMS, partial(_streams, durable=False)),
    Contender("Redis streams, durable", _STREAMS, partial(_streams, durable=True), durable=True),
)
