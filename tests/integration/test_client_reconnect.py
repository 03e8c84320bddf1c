"""Interrupted readers, with dispatchers that disconnect, refuse and restart; each test uses both shells."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest

import harp
from harp import aio
from harp.cli import Exit
from support.deadline import eventually, wait_until
from support.legacy import LegacyDispatcher, server
from support.peers import (
    Peer,
    PeerConnection,
    Script,
    answering,
    line_of,
    reserved_port,
    resetting,
    single_bytes,
    unless_closed,
)
from support.shells import Shell

JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"
UNKNOWN = "00000000-0000-4000-8000-000000000000"

STORAGE_ERROR = {"error": {"type": "storage_error", "message": "the disk is full"}}


def closing(conn: PeerConnection) -> None:
    """Close the connection between two lines."""


def tearing(conn: PeerConnection) -> None:
    """Close the connection in the middle of a line."""
    conn.send(b'{"packet": 1, "da')


def ending(conn: PeerConnection) -> None:
    conn.reply({"result": "end"})


def going_on(conn: PeerConnection) -> None:
    conn.reply({"continue": True})


def single_piece(data: bytes) -> list[bytes]:
    return [data]


def serving(until: int, leave: Script, pieces: Callable[[bytes], list[bytes]] = single_piece) -> Script:
    """Return a script that serves the requested records of a job with `until` records, then disconnects."""

    def script(conn: PeerConnection) -> None:
        request = conn.expect()
        newest = request.get("recent", 0 if "follow_stream" in request else until)
        numbers = range(request.get("since", max(until - newest, 0)), until)
        lines = [
            {"packet": number, "data": f"r{number}", **({"time": number + 0.5} if "timed" in request else {})}
            for number in numbers
        ]
        conn.send(*pieces(b"".join(map(line_of, lines))))
        leave(conn)

    return script


def records(*numbers: int) -> list[str]:
    return [f"r{number}" for number in numbers]


def since(peer: Peer) -> list[int | None]:
    return [request.get("since") for request in peer.requests]


# Streams.


@pytest.mark.parametrize("pieces", [single_piece, single_bytes])
def test_follow_continues_after_five_breaks(shell: Shell, pieces: Any) -> None:
    scripts = [
        serving(3, closing, pieces),
        serving(3, tearing, pieces),
        serving(5, lambda conn: conn.reset(), pieces),
        answering(STORAGE_ERROR),
        resetting,
        serving(9, tearing),
        serving(10, ending),
    ]
    with Peer(*scripts) as peer:
        job = shell.caller(peer).job(JOB)
        assert list(job.follow(since=0)) == records(*range(10))
        assert job.result() == "end"  # the end was received with the stream
    # After a reset, the network may lose some of the sent records, but the client never goes back.
    begun = since(peer)
    assert (begun[:3], begun[-1]) == ([0, 3, 3], 9)
    assert begun == sorted(begun)  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("options", "items"),
    [
        ({"numbered": True}, [(number, f"r{number}") for number in range(6)]),
        ({"timed": True}, [(number, number + 0.5, f"r{number}") for number in range(6)]),
        ({"timed": True, "numbered": True}, [(number, number + 0.5, f"r{number}") for number in range(6)]),
    ],
)
def test_follow_continues_with_numbers_and_times(shell: Shell, options: dict[str, Any], items: list[Any]) -> None:
    with Peer(serving(2, closing), serving(4, tearing), serving(6, ending)) as peer:
        assert list(shell.caller(peer).job(JOB).follow(since=0, **options)) == items
    assert [request.get("timed") for request in peer.requests] == [options.get("timed")] * 3


@pytest.mark.parametrize(
    ("options", "given"),
    [({}, records(5, 6, 7)), ({"recent": 0}, records(5, 6, 7)), ({"recent": 2}, records(3, 4, 5, 6, 7))],
)
def test_follow_reads_the_number_first(shell: Shell, options: dict[str, int], given: list[str]) -> None:
    """The connection breaks before the first new record, and records are created during the outage."""
    with Peer(serving(5, going_on), serving(5, closing), serving(7, closing), serving(8, ending)) as peer:
        assert list(shell.caller(peer).job(JOB).follow(**options)) == given
    assert list(peer.requests[0]) == ["harpcaller", "read_stream", "recent"]
    assert since(peer)[1:] == [5, 5, 7]


def test_follow_break_while_reading_the_number(shell: Shell) -> None:
    with Peer(serving(5, tearing), serving(7, ending)) as peer:
        assert list(shell.caller(peer).job(JOB).follow(recent=2)) == records(3, 4, 5, 6)
    with Peer(tearing_at_once, serving(0, going_on), serving(2, ending)) as peer:
        assert list(shell.caller(peer).job(JOB).follow()) == records(0, 1)


def tearing_at_once(conn: PeerConnection) -> None:
    conn.expect()
    tearing(conn)


def test_follow_of_ended_job_sends_one_request(shell: Shell) -> None:
    with Peer(serving(5, ending)) as peer:
        job = shell.caller(peer).job(JOB)
        assert list(job.follow()) == []
        assert job.result() == "end"


def test_follow_waits_for_restart_of_dispatcher(shell: Shell, attempts: list[Any]) -> None:
    """The dispatcher ends, its port refuses connections, and another dispatcher starts."""
    with reserved_port() as port, ThreadPoolExecutor(1) as pool:
        with Peer(serving(3, closing), always=closing, port=port) as first:
            iterator = shell.caller(first).job(JOB).follow(since=0)
            assert [next(iterator) for _ in range(3)] == records(0, 1, 2)
            rest = pool.submit(list, iterator)
        before = len(attempts)
        wait_until(lambda: len(attempts) > before + 1, what="attempts in vain")
        with Peer(serving(6, ending), port=port) as second:
            assert rest.result(60) == records(3, 4, 5)
        assert since(second) == [3]


def test_follow_gives_up_after_reconnect_seconds(shell: Shell) -> None:
    with reserved_port() as port:
        with Peer(serving(2, closing), always=closing, port=port) as peer:
            iterator = shell.caller(peer, reconnect=0.2).job(JOB).follow(since=0)
            assert [next(iterator), next(iterator)] == records(0, 1)
        with pytest.raises(
            harp.CommunicationError, match=rf"^127.0.0.1:{port}: .*; gave up after \d+ attempts in 0.2 s"
        ) as caught:
            next(iterator)
        assert isinstance(caught.value.__cause__, harp.CommunicationError)
        with pytest.raises(harp.CommunicationError, match="gave up"):
            next(iterator)


@pytest.mark.parametrize("off", [0, None, False])
@pytest.mark.parametrize("leave", [closing, tearing])
def test_follow_without_reconnect_fails_immediately(shell: Shell, off: float | None, leave: Script) -> None:
    with Peer(serving(2, leave)) as peer:
        iterator = shell.caller(peer, reconnect=off).job(JOB).follow(since=0)
        assert [next(iterator), next(iterator)] == records(0, 1)
        with pytest.raises(harp.CommunicationError, match="the peer closed the connection"):
            next(iterator)


@pytest.mark.parametrize(
    ("again", "kind", "message"),
    [
        (answering({"error": {"type": "invalid_jobid", "message": "pruned"}}), harp.RemoteError, "invalid_jobid"),
        (answering(b"SSH-2.0-OpenSSH_9.2\r\n"), harp.CommunicationError, "column 1"),
        (answering({"packet": 0, "data": "r0"}), harp.CommunicationError, "packet 0: expected number 2"),
        (answering({"packet": 3, "data": "r3"}), harp.CommunicationError, "packet 3: expected number 2"),
        (answering({"no_result": True}), harp.CommunicationError, "does not answer this request"),
    ],
)
def test_follow_error_reply_is_raised(shell: Shell, again: Script, kind: type[Exception], message: str) -> None:
    with Peer(serving(2, closing), again) as peer:
        iterator = shell.caller(peer).job(JOB).follow(since=0)
        assert [next(iterator), next(iterator)] == records(0, 1)
        with pytest.raises(kind, match=message):
            next(iterator)


@pytest.mark.parametrize("options", [{}, {"since": 0}, {"recent": 2}, {"timed": True}])
def test_follow_of_unknown_job_on_legacy_dispatcher(shell: Shell, options: dict[str, Any]) -> None:
    old = LegacyDispatcher()
    with server(old) as port:
        rpc = shell.caller_at("127.0.0.1", port)
        message = "too old for timed=True" if options.get("timed") else "closed the connection before"
        with pytest.raises(harp.CommunicationError, match=message):
            list(rpc.job(UNKNOWN).follow(**options))
    assert len(old.requests) >= 2  # on a slow machine, the first close may count as an outage


def test_stream_break_is_raised(shell: Shell) -> None:
    with Peer(serving(2, closing)) as peer, pytest.raises(harp.CommunicationError):
        shell.caller(peer).job(JOB).stream().all()


# Results.


def test_result_waits_through_breaks(shell: Shell) -> None:
    def torn(conn: PeerConnection) -> None:
        conn.expect()
        conn.send(b'{"result": ')

    for method in ("get", "result"):
        with Peer(answering(), resetting, answering(STORAGE_ERROR), torn, answering({"result": "end"})) as peer:
            assert getattr(shell.caller(peer).job(JOB), method)(wait=True) == "end"
        assert peer.requests == [{"harpcaller": 1, "get_result": JOB, "wait": True}] * 5


def test_result_gives_up_after_reconnect_seconds(shell: Shell) -> None:
    with Peer(always=answering()) as peer:
        job = shell.caller(peer, reconnect=0.2).job(JOB)
        assert "attempts in 0.2 s" in str(job.result(wait=True))
        with pytest.raises(harp.CommunicationError, match=r"attempts in 0\.2 s"):
            job.get()


@pytest.mark.parametrize(
    "operation",
    [
        lambda rpc: rpc.web01.p(),
        lambda rpc: rpc.request({"get_result": JOB, "wait": True}),
        lambda rpc: rpc.job(JOB).cancel(),
        lambda rpc: rpc.job(JOB).cancel(wait=True),
        lambda rpc: rpc.job(JOB).get(wait=False),
        lambda rpc: rpc.job(JOB).host(),
        lambda rpc: rpc.job(JOB).details(),
    ],
)
def test_reconnect_does_not_repeat_other_requests(shell: Shell, operation: Callable[[Any], Any]) -> None:
    with Peer(answering()) as peer, pytest.raises(harp.CommunicationError):
        operation(shell.caller(peer))


# Closing during an outage.


@pytest.fixture
def full() -> Iterator[Callable[[int], socket.socket]]:
    """A listener whose queue is full and never accepted, so that further connections wait."""
    sockets: list[socket.socket] = []

    def listen(port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port), backlog=0)
        sockets.append(listener)
        for _ in range(4):
            waiting = socket.socket()
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
            sockets.append(waiting)
        return listener

    yield listen
    for sock in sockets:
        sock.close()


def away(shell: Shell, pool: ThreadPoolExecutor, port: int) -> tuple[Any, Future[list[Any]]]:
    """An iterator after two records, and a thread that waits in it for the restart of the dispatcher."""
    with Peer(serving(2, closing), always=closing, port=port) as peer:
        iterator = shell.caller(peer).job(JOB).follow(since=0)
        assert [next(iterator), next(iterator)] == records(0, 1)
        return iterator, pool.submit(list, iterator)


def test_close_ends_the_pause(shell: Shell, attempts: list[Any]) -> None:
    with reserved_port() as port, ThreadPoolExecutor(1) as pool:
        iterator, rest = away(shell, pool, port)
        before = len(attempts)
        wait_until(lambda: len(attempts) > before + 4, what="the longer pauses")
        iterator.close()
        assert rest.result(60) == []


def test_close_ends_an_attempt_to_connect(shell: Shell, full: Callable[[int], socket.socket]) -> None:
    with reserved_port() as port, ThreadPoolExecutor(1) as pool:
        iterator, rest = away(shell, pool, port)
        listener = full(port)
        wait_until(lambda: _connecting(listener) > 4, what="the attempt that hangs")
        iterator.close()
        assert rest.result(20) == []  # an attempt would take 30 seconds


def _connecting(listener: socket.socket) -> int:
    """Return how many connections to the listener's port are not yet accepted."""
    remote = f"0100007F:{listener.getsockname()[1]:04X}"
    with open("/proc/net/tcp") as table:
        return sum(line.split()[2] == remote for line in table)


def test_task_cancelled_in_pause_leaves_nothing(attempts: list[Any]) -> None:
    async def main(port: int) -> None:
        with Peer(serving(2, closing), always=closing, port=port) as peer:
            iterator: Any = aio.AsyncHarpCaller(peer.host, peer.port).job(JOB).follow(since=0)
            assert [await anext(iterator), await anext(iterator)] == records(0, 1)
        task = asyncio.create_task(iterator.all())
        before = len(attempts)
        await eventually(lambda: len(attempts) > before + 2, what="attempts in vain")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await iterator.close()
        assert await iterator.all() == []

    with reserved_port() as port:
        asyncio.run(main(port), debug=True)


def test_task_cancelled_while_waiting_closes() -> None:
    async def main() -> None:
        with Peer(always=closing) as peer:
            task = asyncio.create_task(aio.AsyncHarpCaller(peer.host, peer.port).job(JOB).get())
            await eventually(lambda: len(peer.connections) > 2, what="attempts")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main(), debug=True)


# An interrupted wait for an item.

RECORD = {"packet": 1, "data": "r1"}


def waiting(*messages: object) -> Script:
    """Return a script that replies to a request, then waits until the client closes."""

    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply(*messages)
        conn.until_closed()

    return script


async def cancel_next(iterator: Any, peer: Peer) -> None:
    """Cancel the wait for an item when a request was sent; the connection is closed."""
    task = asyncio.ensure_future(anext(iterator))
    await eventually(lambda: peer.requests, what="the request")
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(peer.connections[0].closed.wait, 30)


async def test_follow_continues_after_cancelled_wait() -> None:
    with Peer(waiting(RECORD), serving(4, ending)) as peer:
        iterator: Any = aio.AsyncHarpCaller(peer.host, peer.port).job(JOB).follow(since=1)
        assert await anext(iterator) == "r1"
        await cancel_next(iterator, peer)
        assert await iterator.all() == records(2, 3)
    assert since(peer) == [1, 2]
    with Peer(waiting(), serving(3, going_on), serving(4, ending)) as peer:  # it has no number before its first record
        iterator = aio.AsyncHarpCaller(peer.host, peer.port).job(JOB).follow()
        await cancel_next(iterator, peer)
        assert await iterator.all() == records(3)


@pytest.mark.parametrize("method", ["follow", "stream"])
async def test_iterator_raises_after_cancelled_wait(method: str) -> None:
    """Without `reconnect` it cannot continue; its end would be wrong."""
    with Peer(waiting(RECORD)) as peer:
        job = aio.AsyncHarpCaller(peer.host, peer.port, reconnect=0).job(JOB)
        iterator: Any = getattr(job, method)(since=1)
        assert await anext(iterator) == "r1"
        await cancel_next(iterator, peer)
        with pytest.raises(harp.CommunicationError, match="closed on this side"):
            await anext(iterator)


def test_follow_continues_after_keyboard_interrupt() -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code.co_name == "receive_line":  # it waits
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with Peer(waiting(RECORD), serving(4, ending)) as peer:
            iterator = harp.HarpCaller(peer.host, peer.port).job(JOB).follow(since=1)
            assert next(iterator) == "r1"
            signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
            with pytest.raises(KeyboardInterrupt):
                next(iterator)
            assert list(iterator) == records(2, 3)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def interrupt_at(point: int) -> Callable[[FrameType, str, Any], None]:
    """Return a profile function that raises KeyboardInterrupt at a point in the client where Python handles signals.

    These are the beginning of a function, and the end of a call. Not the return of a record, which is lost there as in
    the loop of the caller.
    """
    seen = 0

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal seen
        name = frame.f_code.co_name if event == "return" else getattr(arg, "__name__", "")
        if f"{os.sep}harp{os.sep}" not in frame.f_code.co_filename or event not in ("call", "return", "c_return"):
            return
        if event != "call" and name in ("popleft", "__exit__", "_next_items", "run", "__next__"):
            return
        seen += 1
        if seen == point:
            sys.setprofile(None)
            raise KeyboardInterrupt

    return profile


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # a socket that was just being made
def test_follow_interrupted_at_any_point_loses_no_record() -> None:
    def script(conn: PeerConnection) -> None:
        with suppress(OSError):
            unless_closed(serving(4, ending))(conn)

    point, interrupted = 1, True
    with Peer(always=script) as peer:
        while interrupted:
            interrupted = False
            found: list[str] = []
            iterator = harp.HarpCaller(peer.host, peer.port).job(JOB).follow(since=1)
            sys.setprofile(interrupt_at(point))
            try:
                try:
                    found += iter(iterator.__next__, None)
                except KeyboardInterrupt:
                    interrupted = True
                    found += iterator
            finally:
                sys.setprofile(None)
            assert found == records(1, 2, 3), point
            point += 5
    assert point > 100


@pytest.mark.parametrize("command", ["follow", "result"])
def test_control_c_ends_the_wait(command: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HARP_")}
    # A process in the background of a shell ignores this signal, and the tests may be one.
    ctrl_c = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"import signal, sys; from harp.cli import main; {ctrl_c}; sys.exit(main())"
    with Peer(always=unless_closed(tearing_at_once)) as peer:  # the signal may come before a request
        with subprocess.Popen(
            [sys.executable, "-c", program, "--dispatcher", f"{peer.host}:{peer.port}", command, JOB], env=environment
        ) as child:
            try:
                wait_until(lambda: len(peer.connections) > 2, what="attempts")
                child.send_signal(signal.SIGINT)
                assert child.wait(60) == Exit.INTERRUPTED
            finally:
                child.kill()
