"""The client in odd programs: handlers of signals that raise, no more threads, and event loops that are abandoned."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

import harp
from harp import aio
from support.blackhole import black_hole
from support.certificates import Certificates
from support.deadline import eventually
from support.peers import Peer, PeerConnection, answering, server_context, silent

JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"


class ProgramTimeout(TimeoutError):
    """The exception of a program's handler."""


@contextmanager
def alarm(seconds: float, exception: type[Exception]) -> Iterator[None]:
    """Let a handler of SIGALRM raise an exception, as many programs limit the time of any function."""

    def on_alarm(number: int, frame: FrameType | None) -> None:
        raise exception

    previous = signal.signal(signal.SIGALRM, on_alarm)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def waiting(conn: PeerConnection) -> None:
    conn.expect()
    conn.until_closed()


def streaming(conn: PeerConnection) -> None:
    conn.expect()
    conn.reply({"packet": 0, "data": "r0"})
    conn.until_closed()


def taking(conn: PeerConnection) -> None:
    conn.sock.recv(1)
    conn.closed.wait(1)


WAITS: list[tuple[Callable[[PeerConnection], None], Callable[[harp.HarpCaller], Any]]] = [
    (waiting, lambda rpc: rpc.job(JOB).get()),
    (waiting, lambda rpc: rpc.job(JOB).result(wait=True)),
    (waiting, lambda rpc: rpc.job(JOB).get(timeout=60)),
    (waiting, lambda rpc: rpc.web01.p()),
    (waiting, lambda rpc: rpc.web01(request_id="r").p()),
    (waiting, lambda rpc: rpc.jobs().all()),
    (streaming, lambda rpc: rpc.job(JOB).follow(since=0).all()),
    (taking, lambda rpc: rpc.web01.p("x" * 15_000_000)),
]


@pytest.mark.parametrize(("script", "wait"), WAITS)
@pytest.mark.parametrize("exception", [TimeoutError, ProgramTimeout, RuntimeError])
def test_exception_of_a_signal_handler_is_raised(script: Any, wait: Any, exception: type[Exception]) -> None:
    """A `TimeoutError` of the program is no time-out of the connection, after which the client would wait again."""
    with Peer(always=script) as peer, alarm(0.3, exception), pytest.raises(exception) as caught:
        wait(harp.HarpCaller(peer.host, peer.port, keep_alive=False))
    assert type(caught.value) is exception


def test_exception_of_a_signal_handler_while_connecting(files: Certificates) -> None:
    with black_hole() as port, alarm(0.3, TimeoutError), pytest.raises(TimeoutError):
        harp.HarpCaller("127.0.0.1", port).job(JOB).get()
    with Peer(silent) as peer, alarm(0.3, TimeoutError), pytest.raises(TimeoutError):
        harp.HarpServer(peer.host, "u", "p", peer.port).p()
    with Peer(waiting, tls=server_context(files)) as peer, alarm(0.5, TimeoutError), pytest.raises(TimeoutError):
        harp.HarpServer(peer.host, "u", "p", peer.port).p()


def test_follow_continues_after_an_exception_of_a_signal_handler() -> None:
    with Peer(streaming, answering({"packet": 1, "data": "r1"}, {"result": 5})) as peer:
        records = harp.HarpCaller(peer.host, peer.port, keep_alive=False).job(JOB).follow(since=0)
        assert next(records) == "r0"
        with alarm(0.3, TimeoutError), pytest.raises(TimeoutError):
            next(records)
        assert list(records) == ["r1"]


class NoThread(threading.Thread):
    """A thread at a limit of the system."""

    def start(self) -> None:
        raise RuntimeError("can't start new thread")


def test_name_is_looked_up_without_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a limit of threads, and in functions of `atexit`, no thread starts."""
    with Peer(answering({"result": 1}), answering({"result": 2}), address="127.0.0.1") as peer:

        async def ask() -> Any:
            return await aio.AsyncHarpCaller("localhost", peer.port, keep_alive=False).job(JOB).get()

        monkeypatch.setattr("harp._net.connecting.threading", SimpleNamespace(Thread=NoThread))
        assert harp.HarpCaller("localhost", peer.port, keep_alive=False).job(JOB).get() == 1
        assert asyncio.run(ask()) == 2


def test_call_at_the_end_of_the_interpreter_is_sent() -> None:
    program = """
import atexit, harp, sys
job = harp.HarpCaller("localhost", int(sys.argv[1]), keep_alive=False).job(sys.argv[2])
atexit.register(lambda: print(job.get()))
"""
    with Peer(answering({"result": 5})) as peer:
        peer.host = "127.0.0.1"
        arguments = [sys.executable, "-c", program, str(peer.port), JOB]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("5\n", "")


def test_task_of_an_abandoned_loop_closes_its_connection() -> None:
    """The loop is closed while a task waits; the task is deleted without a loop."""
    with Peer(waiting) as peer:

        async def wait() -> None:
            await aio.AsyncHarpCaller(peer.host, peer.port, keep_alive=False).job(JOB).get()

        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda loop, context: None)  # asyncio reports that the task was pending
        task = loop.create_task(wait())
        loop.run_until_complete(eventually(lambda: peer.requests, what="the request"))
        loop.close()
        del task
        gc.collect()
        assert peer.connections[0].closed.wait(30)
