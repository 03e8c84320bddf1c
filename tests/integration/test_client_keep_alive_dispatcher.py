"""Keep-alive connections to a dispatcher; each test uses both shells."""

from __future__ import annotations

import copy
import gc
import pickle
import socket
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import harp
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd
from support.peers import Peer, PeerConnection, Script, answering, keeping
from support.scripted import scripted_harpd
from support.shells import Shell

JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"
SUBMITTED = {"harpcaller": 1, "job_id": JOB, "keep_alive": 60}
UNKNOWN = "it is not known whether the call ran"


def counts(peer: Peer) -> list[int]:
    """Return how many requests were sent on each connection."""
    return [len(conn.received) for conn in peer.connections]


def wait_until_closed(conn: PeerConnection) -> None:
    """Wait until the peer has closed a connection."""
    wait_until(lambda: conn.sock.fileno() < 0, what="the end of the peer's script")


def test_keep_alive_sends_requests_on_one_connection(shell: Shell) -> None:
    with Peer(keeping([SUBMITTED], [{"no_result": True, "keep_alive": 60}], [{"result": 5, "keep_alive": 60}])) as peer:
        with shell.caller(peer, keep_alive=True) as rpc:
            job = rpc.web01.p(1)
            assert job.result() is harp.CALL_NOT_FINISHED
            assert job.get() == 5
            assert job.get() == 5  # is stored: no request
        assert peer.connections[0].closed.wait(30)
    assert [request.get("keep_alive") for request in peer.requests] == [True, True, True]


def test_client_without_keep_alive_does_not_request_it(shell: Shell) -> None:
    with Peer(answering(SUBMITTED), answering({"result": 1, "keep_alive": 60})) as peer:
        assert shell.caller(peer, keep_alive=False).web01.p().get() == 1
    assert not any("keep_alive" in request for request in peer.requests)


# The default: keep-alive if the dispatcher supports it.

QUESTION = {"harpcaller": 1, "submit_many": [], "keep_alive": True}
MANY = {"harpcaller": 1, "job_ids": []}
CALL = {"harpcaller": 1, "host": "web01", "procedure": "p", "arguments": []}
GET = {"harpcaller": 1, "get_result": JOB, "wait": True}


def test_default_sends_question_before_the_second_request(shell: Shell) -> None:
    answers: list[list[object]] = [[{**MANY, "keep_alive": 60}], [{"result": 5, "keep_alive": 60}], [SUBMITTED]]
    with Peer(answering(SUBMITTED), keeping(*answers)) as peer:
        with shell.caller(peer, keep_alive=None) as rpc:
            assert rpc.web01.p().get() == 5
            assert rpc.web01.p().id() == JOB
        assert peer.connections[1].closed.wait(30)
    assert peer.requests == [CALL, QUESTION, {**GET, "keep_alive": True}, {**CALL, "keep_alive": True}]


def test_default_on_legacy_dispatcher_sends_question_once(shell: Shell) -> None:
    """It closes without a reply, as for each unknown key; no request of the caller fails."""
    answers = [answering(SUBMITTED), answering(), answering({"result": 5}), answering(SUBMITTED)]
    with Peer(*answers) as peer:
        rpc = shell.caller(peer, keep_alive=None)
        assert rpc.web01.p().get() == 5
        assert rpc.web01.p().id() == JOB
    assert peer.requests == [CALL, QUESTION, GET, CALL]


def test_default_on_full_dispatcher_closes_each_connection(shell: Shell) -> None:
    """It supports the key and does not grant keep-alive, because it has nearly `max_connections`."""
    with Peer(answering(SUBMITTED), keeping([MANY]), answering({"result": 5})) as peer:
        assert shell.caller(peer, keep_alive=None).web01.p().get() == 5
        assert peer.connections[1].closed.wait(30)


def test_default_on_replaced_dispatcher_fails_once(shell: Shell) -> None:
    granted = {**MANY, "keep_alive": 0}
    with Peer(answering(SUBMITTED), answering(granted), answering(), answering(SUBMITTED)) as peer:
        rpc = shell.caller(peer, keep_alive=None)
        rpc.web01.p()
        with pytest.raises(harp.CommunicationError, match="closed the connection"):
            rpc.web01.p()
        assert rpc.web01.p().id() == JOB
    assert [request.get("keep_alive", False) for request in peer.requests] == [False, True, True, False]


def test_keep_alive_not_granted_closes(shell: Shell) -> None:
    """The key must be the last member of the reply, and not part of the result."""
    replies: list[dict[str, object]] = [
        {"result": {"a": 1, "keep_alive": 5}},
        {"keep_alive": 5, "result": 1},
        {"result": '","keep_alive":5}'},
    ]
    for reply in replies:
        with Peer(keeping([SUBMITTED], [reply]), answering({"cancelled": False})) as peer:
            rpc = shell.caller(peer, keep_alive=True)
            job = rpc.web01.p()
            assert job.get() == reply["result"]
            assert peer.connections[0].closed.wait(30)
            assert job.cancel() is False
        assert counts(peer) == [2, 1]


def test_keep_alive_waiting_request_needs_earlier_grant(shell: Shell) -> None:
    """A legacy dispatcher closes without a reply, which a waiting request would take for an outage of minutes."""
    with Peer(answering({"result": 1}), keeping([SUBMITTED], [{"result": 2, "keep_alive": 60}])) as peer:
        rpc = shell.caller(peer, keep_alive=True)
        assert rpc.job(JOB).get() == 1
        assert rpc.web01.p().get() == 2
    assert ["keep_alive" in request for request in peer.requests] == [False, True, True]


def test_keep_alive_on_legacy_dispatcher_names_feature(shell: Shell) -> None:
    with Peer(answering(), answering()) as peer:
        rpc = shell.caller(peer, keep_alive=True)
        for ask in (rpc.web01.p, rpc.job(JOB).cancel):
            with pytest.raises(harp.CommunicationError, match="the dispatcher may be too old for keep_alive=True"):
                ask()
    assert len(peer.requests) == 2


def test_keep_alive_break_after_a_grant_does_not_name_it(shell: Shell) -> None:
    with Peer(answering(SUBMITTED), answering()) as peer:
        rpc = shell.caller(peer, keep_alive=True)
        rpc.web01.p()
        wait_until_closed(peer.connections[0])
        with pytest.raises(harp.CommunicationError, match="closed the connection") as caught:
            rpc.web01.p()
    assert "too old" not in str(caught.value)


def test_keep_alive_closed_connection_is_not_used(shell: Shell) -> None:
    with Peer(answering(SUBMITTED), answering(SUBMITTED)) as peer:
        rpc = shell.caller(peer, keep_alive=True)
        rpc.web01.p()
        wait_until_closed(peer.connections[0])
        assert rpc.web01.p().id() == JOB
    assert counts(peer) == [1, 1]


def closing_unread(conn: PeerConnection) -> None:
    """Grant keep-alive, then read the next request and close; a script."""
    conn.expect()
    conn.reply(SUBMITTED)
    conn.expect()


def test_keep_alive_break_repeats_a_reading_request(shell: Shell) -> None:
    with Peer(closing_unread, answering({"result": 3})) as peer:
        assert shell.caller(peer, keep_alive=True).web01.p().get() == 3
    assert counts(peer) == [2, 1]


def test_keep_alive_break_never_repeats_a_submission(shell: Shell) -> None:
    with Peer(closing_unread, closing_unread) as peer:
        rpc = shell.caller(peer, keep_alive=True)
        job = rpc.web01.p()
        with pytest.raises(harp.CommunicationError, match=UNKNOWN):
            rpc.web01.p()
        assert rpc.web01.p().id() == JOB
        with pytest.raises(harp.CommunicationError, match=UNKNOWN):
            job.cancel()
    assert counts(peer) == [2, 2]


def test_keep_alive_refusal_closes_the_connection(shell: Shell) -> None:
    refusal = {"error": {"type": "storage_error", "message": "the disk is full"}}
    with Peer(keeping([SUBMITTED], [refusal]), answering(SUBMITTED)) as peer:
        rpc = shell.caller(peer, keep_alive=True)
        rpc.web01.p()
        with pytest.raises(harp.RequestRefused, match="the disk is full"):
            rpc.web01.p()
        assert peer.connections[0].closed.wait(30)
        rpc.web01.p()
    assert counts(peer) == [2, 1]


def test_keep_alive_copies_have_their_own_connections() -> None:
    with Peer(keeping([SUBMITTED]), keeping([SUBMITTED]), keeping([SUBMITTED])) as peer:
        rpc = harp.HarpCaller(peer.host, peer.port, keep_alive=True)
        rpc.web01.p()
        others = [copy.copy(rpc), pickle.loads(pickle.dumps(rpc))]
        for other in others:
            assert repr(other) == repr(rpc) == f"HarpCaller('127.0.0.1', {peer.port}, keep_alive=True)"
            other.web01.p()
    assert counts(peer) == [1, 1, 1]


@pytest.mark.parametrize("kind", ["client", "iterator"])
def test_cyclic_garbage_closes_connections_without_warning(kind: str) -> None:
    """The garbage collector first finalizes the socket, which an earlier collection has moved before its owner."""
    script = keeping([SUBMITTED]) if kind == "client" else replying({"packet": 0, "data": 1})
    with Peer(script) as peer:
        rpc = harp.HarpCaller(peer.host, peer.port, keep_alive=True)
        if kind == "client":
            rpc.web01.p()
            cycle: list[object] = [rpc]
        else:
            cycle = [rpc.job(JOB).follow(since=0)]
        found = [each for each in gc.get_objects() if isinstance(each, socket.socket) and each.fileno() >= 0]
        sock = [each for each in found if is_connected_to(each, peer)]
        del rpc, found
        cycle.append(cycle)
        gc.collect()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del cycle, sock
            gc.collect()
        assert [str(warning.message) for warning in caught] == []
        assert peer.connections[0].closed.wait(30)


def is_connected_to(sock: socket.socket, peer: Peer) -> bool:
    try:
        return bool(sock.getpeername() == (peer.host, peer.port))
    except OSError:
        return False


def replying(*messages: object) -> Script:
    """Return a script that replies to a request and keeps the connection open."""

    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply(*messages)
        conn.until_closed()

    return script


FORKING = """
import os, sys, harp
rpc = harp.HarpCaller(sys.argv[1], int(sys.argv[2]))
rpc.web01.p(), rpc.web01.p()
child = os.fork()
if child == 0:
    os._exit(rpc.web01.p().id() != sys.argv[3])
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
rpc.web01.p()
"""


def test_default_in_forked_process_opens_a_connection() -> None:
    kept = [{**MANY, "keep_alive": 60}], [SUBMITTED], [SUBMITTED]
    with Peer(answering(SUBMITTED), keeping(*kept), keeping([SUBMITTED])) as peer:
        command = [sys.executable, "-X", "dev", "-W", "error", "-c", FORKING, peer.host, str(peer.port), JOB]
        done = subprocess.run(command, timeout=60, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert counts(peer) == [1, 3, 1]


@pytest.mark.parametrize("keep_alive", [True, None])
def test_keep_alive_with_real_dispatcher(shell: Shell, tmp_path: Path, keep_alive: bool | None) -> None:
    """Several threads, and a restart of the dispatcher."""
    with scripted_harpd(tmp_path) as peer, Harpcallerd(tmp_path / "dispatcher", {"web01": peer.port}) as dispatcher:
        caller = shell.caller_at(dispatcher.host, dispatcher.port, keep_alive=keep_alive)
        with caller as rpc, ThreadPoolExecutor(4) as pool:
            for _ in range(2):
                jobs = list(pool.map(rpc.web01.echo, range(40)))
                assert list(pool.map(lambda job: job.get(), jobs)) == [[number] for number in range(40)]
                calls = [harp.Call("web01", "echo", [number]) for number in range(40)]
                many = [rpc.job(job.id()) for job in rpc.submit_many(calls)]
                assert list(pool.map(lambda job: job.get(), many)) == [[number] for number in range(40)]
                assert many[0].details()["state"] == "returned"
                assert list(rpc.web01.count(3).follow(since=0)) == [0, 1, 2]
                dispatcher.restart()
