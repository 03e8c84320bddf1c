"""The jobs and calls of others while one peer misbehaves: it floods, spins, or sends long data without end.

Quiet periods and such in which the peer misbehaves take turns, so that a slow period of the machine affects both. What
the peer runs itself stands for another machine: it gets the processors only when nothing else needs them. Processes
that it makes harpd run compete as usual.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import selectors
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import harp
from bench.harp_client import connect_server
from bench.load import SETTINGS, Figures, payload, quantiles
from harpcaller.api.control_client import ControlClient, ControlError
from support.bad_lines import BAD_VALUES
from support.certificates import Certificates
from support.harpcallerd import Harpcallerd
from support.peers import Peer, PeerConnection, server_context
from support.resumable_host import NO_SUCH_CALL, TERMS

#: Quiet periods, and jobs and calls that each of the others makes in a second.
_PERIODS, _RATE = 2, 50
#: Seconds that a peer has before the measurement begins, and for its end.
_BEGIN, _END = 0.3, 10.0
#: A value of about 2.7 MB, and one that has as many bytes in few parts.
_LONG = [[number, {"key": "x" * 20, "more": [1.5, None, True]}] for number in range(40_000)]
#: Bytes of a line that is expensive to decode.
_BAD_LINE = 15 * 1024 * 1024
#: Bytes that are sent at once. The kernel may not interrupt a system call: one that copies megabytes would delay the
#: programs of this machine, which another machine does not.
_PIECE = 64 * 1024
#: Jobs that are cancelled at once, and clients that follow one job.
_CANCELLED, _FOLLOWERS = 5_000, 1_000
_OWNER, _QUEUE = "neighbour", {"neighbour": 1}

_fork = multiprocessing.get_context("fork")


def _connect() -> ssl.SSLSocket:
    """Return a connection to harpd."""
    context = ssl.create_default_context(cafile=SETTINGS["ca_file"])
    sock = socket.create_connection(("127.0.0.1", SETTINGS["harpd"]))
    return context.wrap_socket(sock, server_hostname="127.0.0.1")


def _encode(request: dict[str, Any], password: str | None = None) -> bytes:
    auth = {"user": SETTINGS["user"], "password": password or SETTINGS["password"]}
    return json.dumps({"harp": 1, **request, "auth": auth}).encode() + b"\n"


def _exchange(line: bytes) -> bytes:
    with _connect() as sock, suppress(OSError):
        sock.sendall(line)
        return sock.recv(1 << 16)
    return b""


def _call(procedure: str, *arguments: Any) -> Callable[[], object]:
    return partial(connect_server(procedure, keep_alive=True), *arguments)


# What peers do, again and again. Each function makes the connections that it needs, and returns one round of its work.


def _spin(rpc: harp.HarpCaller) -> Callable[[], object]:
    return lambda: [job.get() for job in [rpc.web01.spin(0.2) for _ in range(4)]]


def _stop(rpc: harp.HarpCaller) -> Callable[[], object]:
    """Stop calls: harpd looks for the processes of each."""

    def stop() -> None:
        jobs = [rpc.web01.wait(2) for _ in range(4)]
        time.sleep(0.1)
        for job in jobs:
            job.cancel()

    return stop


def _command(rpc: harp.HarpCaller) -> Callable[[], object]:
    instance = json.loads(_exchange(_encode({"calls": _OWNER})))["instance"]
    terms = {"id": str(uuid.uuid4()), "owner": _OWNER, "secret": "s" * 32, "instance": instance}
    limits = {"disconnect_timeout": 60, "result_ttl": 1, "timeout": 60, "max_exec_time": 60}
    sock = _connect()
    sock.sendall(_encode({"procedure": "wait", "arguments": [60], "call": {**terms, **limits}}))
    sock.recv(1 << 16)
    return lambda: sock.sendall(100 * b'{"heartbeat":0.0}\n{ "ack" : 0 }\n')


def _stream(rpc: harp.HarpCaller) -> Callable[[], object]:
    """Have a stream of tiny records stored, and follow it."""
    return lambda: sum(1 for _ in rpc.web01.numbers(200_000).follow(since=0))


def _wrong_password(rpc: harp.HarpCaller) -> Callable[[], object]:
    line = _encode({"procedure": "reused_echo", "arguments": [_LONG]}, password="wrong")  # noqa: S106
    return lambda: _exchange(line)


def _bad_line_to_harpd(rpc: harp.HarpCaller) -> Callable[[], object]:
    line = b'{"harp":%b}\n' % BAD_VALUES["empty arrays"](_BAD_LINE)
    return lambda: _exchange(line)


def _bad_line_to_dispatcher(rpc: harp.HarpCaller) -> Callable[[], object]:
    line = b'{"harpcaller":%b}\n' % BAD_VALUES["empty arrays"](_BAD_LINE)
    address = ("127.0.0.1", rpc._endpoint.port)

    def send() -> None:
        with socket.create_connection(address) as sock, suppress(OSError):
            pieces = memoryview(line)
            for at in range(0, len(line), _PIECE):
                sock.sendall(pieces[at : at + _PIECE])
            sock.recv(1 << 16)

    return send


def _long_job(rpc: harp.HarpCaller) -> Callable[[], object]:
    return lambda: rpc.web01.reused_echo(_LONG).get()


def _long_call(rpc: harp.HarpCaller) -> Callable[[], object]:
    return _call("reused_echo", _LONG)


def _many_jobs(rpc: harp.HarpCaller) -> Callable[[], object]:
    jobs = [harp.Call("web01", "wait", [1], queue=_QUEUE) for _ in range(10_000)]
    return lambda: rpc.submit_many(jobs)


def _cancel(rpc: harp.HarpCaller) -> Callable[[], object]:
    """Cancel thousands of jobs at once."""
    jobs = [harp.Call("web01", "wait", [1], queue=_QUEUE) for _ in range(_CANCELLED)]

    def cancel() -> None:
        rpc.submit_many(jobs)
        _cancel_queue()

    return cancel


def _cancel_queue() -> None:
    list(ControlClient(Path(SETTINGS["control"])).send_command("queue-cancel", queue=_QUEUE))


def _followers(rpc: harp.HarpCaller) -> Callable[[], object]:
    """Have many clients follow a job that has a record now and then, and read what is sent."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    job = rpc.host("web01", queue=_QUEUE).slowly(1_000_000, 0.2)
    line = json.dumps({"harpcaller": 1, "follow_stream": job.id(), "since": 0}).encode() + b"\n"
    selector = selectors.DefaultSelector()
    for _ in range(_FOLLOWERS):
        sock = socket.create_connection(("127.0.0.1", rpc._endpoint.port))
        sock.sendall(line)
        selector.register(sock, selectors.EVENT_READ)  # which also refers to it
    return lambda: [os.read(key.fd, 1 << 16) for key, _ in selector.select()]


def _hostile_host(rpc: harp.HarpCaller, size: int) -> Callable[[], object]:
    """Have a host send records of `size` bytes; 0: it acknowledges each start with a long line."""
    if not size:
        return lambda: rpc.hostile.flood(size).get()
    rpc.hostile.flood(size)
    return lambda: time.sleep(1)


_Work: TypeAlias = Callable[[harp.HarpCaller], Callable[[], object]]

_PEERS: dict[str, _Work] = {
    "spin": _spin,
    "stop": _stop,
    "command": _command,
    "stream": _stream,
    "password": _wrong_password,
    "line": _bad_line_to_harpd,
    "client-line": _bad_line_to_dispatcher,
    "long-job": _long_job,
    "long-call": _long_call,
    "many-jobs": _many_jobs,
    "cancel": _cancel,
    "followers": _followers,
    "host": partial(_hostile_host, size=100),
    "host-long": partial(_hostile_host, size=1_000_000),
    "host-line": partial(_hostile_host, size=0),
}


def _flood(conn: PeerConnection) -> None:
    """Serve a connection as a host that sends records without end."""
    with suppress(AssertionError, OSError):
        request = conn.expect()
        if "calls" in request:
            conn.reply({"harp": 1, "calls": [], "instance": "hostile"})
            conn.until_closed()
        elif "attach" in request:
            conn.reply(NO_SUCH_CALL)
        else:
            if not request["arguments"][0]:
                conn.send(b'{"harp":1,"stream_result":%b}\n' % BAD_VALUES["empty arrays"](_BAD_LINE))
                conn.until_closed()
                return
            conn.reply({"harp": 1, "stream_result": True, "call": TERMS})
            record = json.dumps({"stream": "x" * request["arguments"][0]}).encode() + b"\n"
            while True:
                conn.send(record * max(1, (1 << 16) // len(record)))


@contextmanager
def _background(work: Callable[[], object]) -> Iterator[None]:
    """Repeat work in a process that runs when the processors are idle."""

    def run() -> None:
        os.nice(19)
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        work()

    process = _fork.Process(target=run, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join(_END)


def _others(call: Callable[[Any], Any], seconds: float) -> list[float]:
    """Call at a modest rate; return the seconds that each call took."""
    took = []
    begin = time.monotonic()
    for number in range(max(1, round(seconds * _RATE))):
        time.sleep(max(0.0, begin + number / _RATE - time.monotonic()))
        value = payload(number)
        began = time.monotonic()
        if call(value) != value:
            raise RuntimeError("another value was returned")
        took.append(time.monotonic() - began)
    return took


def _other(kind: str, port: int, commands: Any) -> None:
    """Make the calls of one of the others, whenever a command with a number of seconds is received."""
    rpc = harp.HarpCaller("127.0.0.1", port, keep_alive=True)
    direct = connect_server("reused_echo", keep_alive=True)
    call: Callable[[Any], Any] = direct if kind == "calls" else lambda value: rpc.web01.reused_echo(value).get()
    while True:
        commands.send(_others(call, commands.recv()))


def neighbours(peer: str, seconds: float) -> Figures:
    """Measure the jobs and calls of others, quiet and while a peer misbehaves.

    Returns:
        ``jobs``, ``calls``: the 99th percentile while it lasts, divided by the quiet one; ``quiet KIND-SHARE`` and
        ``meanwhile KIND-SHARE``: both in milliseconds.
    """
    directory = Path(SETTINGS["directory"]) / peer
    directory.mkdir()
    credentials = (SETTINGS["user"], SETTINGS["password"])
    ca_file = Path(SETTINGS["ca_file"])
    files = Certificates(ca_file, ca_file.with_name("server.pem"), ca_file.with_name("server.key"))
    hostile = Peer(always=_flood, tls=server_context(files))
    hosts = {"web01": SETTINGS["harpd"], "hostile": hostile.port}
    settings = {"ca_file": SETTINGS["ca_file"], "log_level": "info"}

    def serve() -> None:
        with hostile:
            time.sleep(3600)

    took: dict[str, list[float]] = {}
    with Harpcallerd(directory, hosts, credentials, settings) as dispatcher:
        SETTINGS["control"] = str(dispatcher.socket)

        def misbehave() -> None:
            work = _PEERS[peer](harp.HarpCaller("127.0.0.1", dispatcher.port, keep_alive=True))
            while True:
                with suppress(harp.RemoteError):
                    work()

        others = {}
        for kind in ("jobs", "calls"):
            others[kind], theirs = _fork.Pipe()
            _fork.Process(target=_other, args=(kind, dispatcher.port, theirs), daemon=True).start()

        begin, periods = (_BEGIN, _PERIODS) if seconds >= 1 else (seconds, 1)  # the latter only shows that it works

        def measure(seconds: float) -> dict[str, list[float]]:
            time.sleep(begin)
            for pipe in others.values():
                pipe.send(seconds)
            return {kind: pipe.recv() for kind, pipe in others.items()}

        measure(begin)  # opens connections
        for period in range(2 * periods):
            when, misbehaving = ("meanwhile", _background(misbehave)) if period % 2 else ("quiet", nullcontext())
            with _background(serve), misbehaving:
                for kind, times in measure(seconds / 2 / periods).items():
                    took.setdefault(f"{when} {kind}", []).extend(times)
            with suppress(ControlError):  # there is no such queue
                _cancel_queue()
            control = ControlClient(dispatcher.socket)
            while any(control.send_command("list", newest=1, host="web01")):
                time.sleep(0.1)
    figures: Figures = {}
    for name, times in took.items():
        figures |= {f"{name}-{share}": value for share, value in quantiles(times).items()}
    ratios = {kind: figures[f"meanwhile {kind}-p99"] / figures[f"quiet {kind}-p99"] for kind in others}
    return {**ratios, **figures}
