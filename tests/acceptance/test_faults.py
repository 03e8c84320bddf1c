"""Faults, each caused for real: kill -9 of every process, a host that is absent, silent, garbled, cut; a full disk."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import harp
from support.certificates import server_files
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd
from support.harpd import is_dead
from support.procedures_file import PROCEDURES
from support.system import System, running

OWN = """
import os, signal, time
from harpd.proc import streaming_procedure

@streaming_procedure
def pid_then_sleep(seconds=600, ignore=False, escape=False):
    if ignore:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if escape and not os.fork():
        os.setsid()
        os.execvp("sleep", ["sleep", "600"])
    yield os.getpid()
    time.sleep(seconds)
"""

#: Guaranteed maximum seconds from the death of a supervisor to the death of its calls.
DEAD_WITHIN = 2.0


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    with running(tmp_path, PROCEDURES + OWN, harpd={"limits": {"kill_grace": 0.5}}) as system:
        yield system


def started(job: harp.RemoteCall) -> psutil.Process:
    """Wait until the job's procedure runs; return its process."""
    follower = job.follow(since=0)
    pid = next(follower)
    follower.close()
    return psutil.Process(pid)


def wait_for_death(processes: list[psutil.Process], seconds: float = 60.0) -> None:
    """Wait until they have ended. Zombies count as ended: the time until init reaps them is unknown."""
    wait_until(lambda: all(is_dead(process.pid) for process in processes), seconds, f"the death of {processes}")


def family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def test_dispatcher_sigkill_loses_no_job(system: System, tmp_path: Path) -> None:
    host = system.rpc.host("web01", queue={"q": 1})
    first = host.pid_then_sleep()
    process = started(first)
    order = tmp_path / "order"
    waiting = [host.mark(str(order), str(number)) for number in range(5)]
    system.dispatcher.kill()
    system.dispatcher.restart()
    assert not is_dead(process.pid)  # its host has the call
    assert first.details()["state"] == "running"
    assert first.cancel(wait=True)
    assert is_dead(process.pid)
    for job in waiting:
        assert system.rpc.job(job.id()).get() is None
    assert order.read_text() == "01234"


def test_frontend_sigkill_ends_only_bound_calls(system: System) -> None:
    job = system.rpc.web01.pid_then_sleep(escape=True)
    processes = family(started(job))
    assert len(processes) == 2
    server = system.server
    direct = server.pid_then_sleep()  # a connection-bound call
    bound = psutil.Process(next(direct))
    system.harpd.kill()
    with pytest.raises(harp.CommunicationError):
        next(direct)
    wait_for_death([bound])
    system.harpd.start()
    assert not any(is_dead(process.pid) for process in processes)
    assert system.rpc.web01.echo(1).get() == [1]
    wait_until(lambda: job.details()["call"]["outage"] is None, what="contact")
    assert job.cancel(wait=True)
    assert all(is_dead(process.pid) for process in processes)


@pytest.mark.parametrize("escape", [False, True])
def test_supervisor_killed_fails_calls(system: System, escape: bool) -> None:
    jobs = [system.rpc.web01.pid_then_sleep(ignore=True, escape=escape) for _ in range(5)]
    processes = [member for job in jobs for member in family(started(job))]
    assert len(processes) == (10 if escape else 5)
    supervisor = system.harpd.supervisor
    os.kill(supervisor, signal.SIGKILL)
    wait_for_death(processes, DEAD_WITHIN)
    for job in jobs:
        error = job.result(wait=True)
        assert isinstance(error, harp.RemoteError)
        assert error.type == "call_died"
    assert system.rpc.web01.echo(1).get() == [1]
    assert system.harpd.supervisor != supervisor


def test_zygote_sigkill_fails_its_calls_and_is_replaced(system: System) -> None:
    job = system.rpc.web01.pid_then_sleep()
    process = started(job)
    os.kill(system.harpd.zygote, signal.SIGKILL)
    error = job.result(wait=True)
    assert isinstance(error, harp.RemoteError)
    assert error.type == "call_died"
    wait_for_death([process])
    wait_until(lambda: system.harpd.status()["zygote"], 60, "the next zygote")
    assert system.rpc.web01.echo(1).get() == [1]


@pytest.mark.parametrize(
    ("call", "data"),
    [
        (lambda host: host.die(int(signal.SIGKILL)), {"signal": "SIGKILL"}),
        (lambda host: host.die(int(signal.SIGSEGV)), {"signal": "SIGSEGV"}),
        (lambda host: host.leave(3), {"code": 3}),
    ],
)
def test_call_process_killed_fails_only_its_job(
    system: System, call: Callable[[Any], harp.RemoteCall], data: dict[str, object]
) -> None:
    error = call(system.rpc.web01).result(wait=True)
    assert isinstance(error, harp.RemoteError)
    assert (error.type, error.data) == ("call_died", data)
    assert system.rpc.web01.echo(1).get() == [1]


@contextmanager
def strange_host(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A listener that treats each connection in its own thread, until the block ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()
    threads: list[threading.Thread] = []

    def treat(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            answer(connection)
            over.wait()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threads.append(threading.Thread(target=treat, args=(connection,)))
                threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield listener.getsockname()[1]
    finally:
        over.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in [accepting, *threads]:
            thread.join()


def tls_answer(directory: Path, answer: bytes, close: bool = True) -> Callable[[socket.socket], None]:
    files = server_files(directory)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certfile, files.keyfile)

    def speak(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as tls:
            tls.makefile("rb").readline()
            tls.sendall(answer)
            if not close:
                tls.recv(1)

    return speak


ACKNOWLEDGED = b'{"harp":1,"stream_result":true}\n'


def silent(connection: socket.socket) -> None:
    """Accept the connection, and be silent."""


def no_tls(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 400 Bad\r\n\r\n")


Behaviour = Callable[[socket.socket], None]

STRANGE: dict[str, tuple[Callable[[Path], Behaviour], str]] = {
    "silent before TLS": (lambda _: silent, "network_error"),
    "no TLS": (lambda _: no_tls, "protocol_error"),
    "silent after the request": (lambda d: tls_answer(d, b"", close=False), "network_error"),
    "closes at once": (lambda d: tls_answer(d, b""), "network_error"),
    "closes after the acknowledgement": (lambda d: tls_answer(d, ACKNOWLEDGED), "network_error"),
    "cut in a line": (lambda d: tls_answer(d, ACKNOWLEDGED + b'{"stream": 1}\n{"stre'), "network_error"),
    "no JSON": (lambda d: tls_answer(d, b"hello\n"), "protocol_error"),
    "another protocol's JSON": (lambda d: tls_answer(d, b'{"jsonrpc":"2.0"}\n'), "protocol_error"),
    "records after no announcement": (
        lambda d: tls_answer(d, b'{"harp":1,"stream_result":false}\n{"stream":1}\n'),
        "protocol_error",
    ),
    "an endless line": (lambda d: tls_answer(d, b"x" * 10_000), "protocol_error"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_hostile_host_ends_only_its_job(tmp_path: Path, what: str) -> None:
    make, type_ = STRANGE[what]
    settings = {"connect_timeout": 1, "acknowledgement_timeout": 1, "record_line": 4096, "start_within": 0}
    with strange_host(make(tmp_path)) as port:
        with Harpcallerd(tmp_path, hosts={"strange": port}, settings=settings) as dispatcher:
            error = harp.HarpCaller("127.0.0.1", dispatcher.port).strange.p().result(wait=True)
            assert isinstance(error, harp.RemoteError)
            assert error.type == type_, error
            assert "strange" in error.message
            assert str(port) in error.message


def test_host_without_listener_ends_job_as_network_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with Harpcallerd(tmp_path, hosts={"absent": port}, settings={"start_within": 0}) as dispatcher:
        error = harp.HarpCaller("127.0.0.1", dispatcher.port).absent.p().result(wait=True)
        assert isinstance(error, harp.RemoteError)
        assert error.type == "network_error"
        assert error.data == {"errno": "ECONNREFUSED"}


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("program", ["full_dispatcher.py", "full_audit.py", "full_harpd_audit.py"])
def test_daemon_with_full_disk_recovers(tmp_path: Path, program: str) -> None:
    """The daemon runs in a mount namespace, so that the small file system ends with the test."""
    probe = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("mount namespaces are not allowed here")
    here = Path(__file__).parents[1]
    command = ["unshare", "--mount", sys.executable, "-P", str(here / "support" / program), str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(here)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout + done.stderr
