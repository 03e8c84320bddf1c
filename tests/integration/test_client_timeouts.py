"""Time-outs of the client: a dispatcher does not reply, does not read, or is halted. Each test uses both shells."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import harp
from support.harpcallerd import Harpcallerd
from support.peers import Peer, PeerConnection, answering, keeping, silent, unless_closed
from support.scripted import scripted_harpd
from support.shells import Shell

JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"
SHORT = 0.3
#: Far more than the time-outs of the tests, and far less than the usual time-outs.
LONG = 20.0

REQUESTS: list[Callable[[Any], Any]] = [
    lambda rpc: rpc.web01.p(),
    lambda rpc: rpc.submit_many([harp.Call("web01", "p")]),
    lambda rpc: rpc.job(JOB).cancel(),
    lambda rpc: rpc.job(JOB).get(wait=False),
    lambda rpc: rpc.job(JOB).get(timeout=0),
    lambda rpc: rpc.job(JOB).host(),
    lambda rpc: rpc.job(JOB).details(),
    lambda rpc: rpc.job(JOB).stream().all(),
    lambda rpc: rpc.request({"get_status": JOB}),
    lambda rpc: rpc.request({"get_result": JOB, "wait": False}),
    lambda rpc: rpc.request({"cancel": JOB}),
]


@contextmanager
def taking_at_most(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


# Requests that do not wait.


@pytest.mark.parametrize("ask", REQUESTS)
def test_request_without_reply_times_out(shell: Shell, ask: Callable[[Any], Any]) -> None:
    with Peer(always=silent) as peer, taking_at_most(LONG):
        with pytest.raises(harp.CommunicationError, match=r"no reply within 0.3 s; see request_timeout|timed out"):
            ask(shell.caller(peer, request_timeout=SHORT))


@pytest.mark.parametrize("ask", [REQUESTS[0], REQUESTS[5]])
def test_request_with_slow_pieces_times_out(shell: Shell, ask: Callable[[Any], Any]) -> None:
    def script(conn: PeerConnection) -> None:
        conn.expect()
        while not conn.closed.wait(0.05):
            try:
                conn.send(b" ")
            except OSError:
                return

    with Peer(script) as peer, taking_at_most(LONG), pytest.raises(harp.CommunicationError, match=r"no reply within"):
        ask(shell.caller(peer, request_timeout=SHORT))


def test_long_request_that_is_not_read_times_out(shell: Shell) -> None:
    def script(conn: PeerConnection) -> None:
        conn.sock.recv(1)
        conn.closed.wait(5)

    with Peer(script) as peer, taking_at_most(LONG), pytest.raises(harp.CommunicationError, match=r"no reply within"):
        shell.caller(peer, request_timeout=SHORT).web01.p("x" * 15_000_000)


def test_question_and_request_share_the_time(shell: Shell) -> None:
    """The second request asks first whether the dispatcher supports keep-alive."""
    submitted = answering({"harpcaller": 1, "job_id": JOB})
    with Peer(submitted, silent, submitted, silent) as peer, taking_at_most(LONG):
        rpc = shell.caller(peer, keep_alive=None, request_timeout=SHORT)
        rpc.web01.p()
        with pytest.raises(harp.CommunicationError, match="no reply within"):
            rpc.web01.p()
        rpc = shell.caller(peer, keep_alive=None)
        rpc.web01.p()
        assert rpc.job(JOB).get(timeout=SHORT) is harp.CALL_NOT_FINISHED


def test_keep_alive_request_without_reply_is_sent_once(shell: Shell) -> None:
    end = {"result": 1, "keep_alive": 60}
    with Peer(keeping([end], [])) as peer, taking_at_most(LONG):
        rpc = shell.caller(peer, keep_alive=True, request_timeout=SHORT)
        assert rpc.job(JOB).get(wait=False) == 1
        with pytest.raises(harp.CommunicationError, match="no reply within"):
            rpc.job(JOB).get(wait=False)


def test_connection_that_is_not_accepted_times_out(shell: Shell) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        try:
            for sock in waiting:
                sock.setblocking(False)
                sock.connect_ex(("127.0.0.1", port))
            rpc = shell.caller_at("127.0.0.1", port, request_timeout=SHORT)
            for ask in (
                lambda: rpc.web01.p(),
                lambda: rpc.job(JOB).get(),
                lambda: rpc.job(JOB).follow().all(),
                rpc.connect,
            ):
                with taking_at_most(LONG), pytest.raises(harp.CommunicationError, match="cannot connect: timed out"):
                    ask()
        finally:
            for sock in waiting:
                sock.close()


def test_requests_that_wait_have_no_time_limit(shell: Shell) -> None:
    def late(*replies: object) -> Any:
        def script(conn: PeerConnection) -> None:
            conn.expect()
            for reply in replies:
                conn.closed.wait(SHORT * 2)
                conn.reply(reply)

        return script

    scripts = [
        late({"result": 5}),
        late({"packet": 0, "data": "a"}, {"result": 5}),
        late({"cancelled": True}),
        late({"result": 5}),
        late({"packet": 0, "data": "a"}),
    ]
    with Peer(*scripts) as peer:
        rpc = shell.caller(peer, request_timeout=SHORT)
        assert rpc.job(JOB).get() == 5
        assert rpc.job(JOB).follow(since=0).all() == ["a"]
        assert rpc.job(JOB).cancel(wait=True) is True
        assert rpc.request({"get_result": JOB}) == {"result": 5}
        assert rpc.request({"follow_stream": JOB}) == {"packet": 0, "data": "a"}


def test_connection_of_the_caller_has_no_time_limit(shell: Shell) -> None:
    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.closed.wait(SHORT * 2)
        conn.reply({"result": 5})

    with Peer(script) as peer, shell.caller(peer, request_timeout=SHORT).connect() as conn:
        conn.send({"any": "thing"})
        assert conn.receive() == {"result": 5}


def test_dispatcher_that_never_replies_ends_the_repetitions(shell: Shell) -> None:
    with Peer(always=silent) as peer, taking_at_most(LONG):
        rpc = shell.caller(peer, request_timeout=SHORT, reconnect=SHORT / 2)
        with pytest.raises(harp.CommunicationError, match=r"no reply within 0.3 s.*; gave up after "):
            rpc.web01(request_id="order 1").p()
        with pytest.raises(harp.CommunicationError, match=r"no reply within 0.3 s.*; gave up after "):
            rpc.job(JOB).follow().all()


def test_request_timeout_none_is_no_limit(shell: Shell) -> None:
    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.closed.wait(SHORT)
        conn.reply({"no_result": True})

    with Peer(script) as peer:
        assert shell.caller(peer, request_timeout=None).job(JOB).result() is harp.CALL_NOT_FINISHED


@pytest.mark.parametrize("seconds", [0, -1, True, "5", float("nan")])
def test_invalid_timeouts_are_refused(shell: Shell, seconds: Any) -> None:
    with pytest.raises(harp.HarpException, match="request_timeout: expected a positive number of seconds"):
        shell.caller_at("127.0.0.1", 1, request_timeout=seconds)
    if seconds != 0:
        job = shell.caller_at("127.0.0.1", 1).job(JOB)
        for wait in (job.get, job.result):
            with pytest.raises(harp.HarpException, match="timeout: expected seconds of at least 0"):
                wait(timeout=seconds)


@pytest.mark.parametrize("seconds", [30 * 86400, 1e300, 10**400])
def test_long_timeouts_are_no_error(shell: Shell, seconds: float) -> None:
    """A socket of the system has a time-out of 24 days at most."""
    with Peer(answering({"no_result": True}), answering({"result": 1}), answering({"result": 2})) as peer:
        job = shell.caller(peer, request_timeout=seconds).job(JOB)
        assert job.result() is harp.CALL_NOT_FINISHED
        assert job.result(timeout=seconds) == 1
        assert shell.caller(peer).job(JOB).get(timeout=seconds) == 2


# Waiting for a result for some time.


@pytest.mark.parametrize("method", ["get", "result"])
def test_wait_with_timeout_gives_not_finished(shell: Shell, method: str) -> None:
    with Peer(keeping([]), answering({"result": 5})) as peer, taking_at_most(LONG):
        job = shell.caller(peer).job(JOB)
        began = time.monotonic()
        assert getattr(job, method)(timeout=SHORT) is harp.CALL_NOT_FINISHED
        assert time.monotonic() - began >= SHORT
        assert peer.connections[0].closed.wait(30)
        assert getattr(job, method)(timeout=LONG) == 5
        assert getattr(job, method)(timeout=LONG) == 5
    assert peer.requests == [{"harpcaller": 1, "get_result": JOB, "wait": True}] * 2


def test_wait_with_timeout_ends_in_an_outage(shell: Shell) -> None:
    """The dispatcher closes, refuses, and sends a part of a reply; the time ends in a pause or an attempt."""
    refused = {"error": {"type": "too_many_connections", "message": "m"}}
    for script in (answering(), answering(refused), answering(b'{"result": ')):
        with Peer(always=unless_closed(script)) as peer, taking_at_most(LONG):
            assert shell.caller(peer).job(JOB).get(timeout=SHORT) is harp.CALL_NOT_FINISHED


def test_wait_with_timeout_returns_the_end(shell: Shell) -> None:
    ends = [
        {"exception": {"type": "E", "message": "m"}},
        {"cancelled": True},
        {"error": {"type": "timeout", "message": "m"}},
    ]
    with Peer(*map(answering, ends)) as peer:
        rpc = shell.caller(peer)
        assert isinstance(rpc.job(JOB).result(timeout=LONG), harp.RemoteException)
        with pytest.raises(harp.CancelledException):
            rpc.job(JOB).get(timeout=LONG)
        assert isinstance(rpc.job(JOB).result(timeout=LONG), harp.RemoteError)


def test_wait_with_timeout_that_cannot_ask_raises(shell: Shell) -> None:
    with Peer(answering(b"garbage\n"), answering({"error": {"type": "invalid_jobid", "message": "m"}})) as peer:
        rpc = shell.caller(peer)
        with pytest.raises(harp.CommunicationError, match="column 1"):
            rpc.job(JOB).get(timeout=LONG)
        with pytest.raises(harp.RemoteError, match="invalid_jobid"):
            rpc.job(JOB).get(timeout=LONG)
    with pytest.raises(harp.CommunicationError, match="cannot connect"):
        rpc.job(JOB).get(timeout=LONG)


# A real dispatcher that is halted.


def test_halted_dispatcher_does_not_block_requests(tmp_path: Path, shell: Shell) -> None:
    with scripted_harpd(tmp_path) as peer, Harpcallerd(tmp_path / "d", {"web01": peer.port}) as dispatcher:
        rpc = shell.caller_at("127.0.0.1", dispatcher.port, request_timeout=SHORT, keep_alive=None)
        job = rpc.web01.count(3)
        assert rpc.job(job.id()).get(timeout=LONG) == "counted"
        fresh = rpc.job(job.id())
        os.kill(dispatcher.pid, signal.SIGSTOP)
        try:
            for ask in (fresh.host, fresh.cancel, fresh.why, lambda: fresh.stream().all(), lambda: rpc.web01.count(1)):
                with taking_at_most(LONG), pytest.raises(harp.CommunicationError):
                    ask()
            assert isinstance(fresh.result(), harp.CommunicationError)
            assert fresh.result(timeout=SHORT) is harp.CALL_NOT_FINISHED
        finally:
            os.kill(dispatcher.pid, signal.SIGCONT)
        assert fresh.get(timeout=LONG) == "counted"
        assert fresh.follow(since=0).all() == [0, 1, 2]
