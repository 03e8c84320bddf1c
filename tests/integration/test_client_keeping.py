"""Connections to a dispatcher that are kept for further requests; every test holds both shells."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import harp
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd
from support.peers import Conversation, Peer, answering, keeping
from support.scripted import scripted_harpd
from support.shells import Shell, shell_of

JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"
SUBMITTED = {"harpcaller": 1, "job_id": JOB, "keep_alive": 60}
UNKNOWN = "it is not known whether the call ran"


@pytest.fixture(params=["sync", "aio"])
def shell(request: pytest.FixtureRequest) -> Iterator[Shell]:
    with shell_of(request.param) as found:
        yield found


def counts(peer: Peer) -> list[int]:
    """How many requests came over each connection."""
    return [len(talk.received) for talk in peer.conversations]


def gone(talk: Conversation) -> None:
    """Wait until the peer has closed a connection."""
    wait_until(lambda: talk.sock.fileno() < 0, what="the end of the peer's script")


def test_requests_go_over_one_connection(shell: Shell) -> None:
    with Peer(keeping([SUBMITTED], [{"no_result": True, "keep_alive": 60}], [{"result": 5, "keep_alive": 60}])) as peer:
        with shell.caller(peer, keep_alive=True) as rpc:
            job = rpc.web01.p(1)
            assert job.result() is harp.CALL_NOT_FINISHED
            assert job.get() == 5
            assert job.get() == 5  # is known by now
        assert peer.conversations[0].closed.wait(30)
    assert [request.get("keep_alive") for request in peer.requests] == [True, True, True]


def test_without_keep_it_is_not_asked_for(shell: Shell) -> None:
    with Peer(answering(SUBMITTED), answering({"result": 1, "keep_alive": 60})) as peer:
        assert shell.caller(peer).web01.p().get() == 1
    assert not any("keep_alive" in request for request in peer.requests)


def test_what_is_not_granted_is_not_kept(shell: Shell) -> None:
    """Nor is a `keep` in the result, or one that is not the last."""
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
            assert peer.conversations[0].closed.wait(30)
            assert job.cancel() is False
        assert counts(peer) == [2, 1]


def test_a_waiting_request_asks_only_where_it_was_granted_before(shell: Shell) -> None:
    """A dispatcher of the field closes without a reply; waiting for the job's end would go on for minutes then."""
    with Peer(answering({"result": 1}), keeping([SUBMITTED], [{"result": 2, "keep_alive": 60}])) as peer:
        rpc = shell.caller(peer, keep_alive=True)
        assert rpc.job(JOB).get() == 1
        assert rpc.web01.p().get() == 2
    assert ["keep_alive" in request for request in peer.requests] == [False, True, True]


def test_a_dispatcher_that_does_not_know_it_may_be_too_old(shell: Shell) -> None:
    with Peer(answering(), answering()) as peer:
        rpc = shell.caller(peer, keep_alive=True)
        for ask in (rpc.web01.p, rpc.job(JOB).cancel):
            with pytest.raises(harp.CommunicationError, match="the dispatcher may be too old for keep_alive=True"):
                ask()
    assert len(peer.requests) == 2


def test_a_connection_that_was_closed_meanwhile_is_not_used(shell: Shell) -> None:
    with Peer(answering(SUBMITTED), answering(SUBMITTED)) as peer:
        rpc = shell.caller(peer, keep_alive=True)
        rpc.web01.p()
        gone(peer.conversations[0])
        assert rpc.web01.p().id() == JOB
    assert counts(peer) == [1, 1]


def closing_unread(talk: Conversation) -> None:
    """A script: grant a connection, then read the next request and close."""
    talk.expect()
    talk.reply(SUBMITTED)
    talk.expect()


def test_what_only_asks_is_asked_again_when_a_kept_connection_breaks(shell: Shell) -> None:
    with Peer(closing_unread, answering({"result": 3})) as peer:
        assert shell.caller(peer, keep_alive=True).web01.p().get() == 3
    assert counts(peer) == [2, 1]


def test_a_job_is_not_submitted_again_when_a_kept_connection_breaks(shell: Shell) -> None:
    with Peer(closing_unread, closing_unread) as peer:
        rpc = shell.caller(peer, keep_alive=True)
        job = rpc.web01.p()
        with pytest.raises(harp.CommunicationError, match=UNKNOWN):
            rpc.web01.p()
        assert rpc.web01.p().id() == JOB
        with pytest.raises(harp.CommunicationError, match=UNKNOWN):
            job.cancel()
    assert counts(peer) == [2, 2]


def test_a_refusal_is_raised_and_its_connection_closed(shell: Shell) -> None:
    refusal = {"error": {"type": "storage_error", "message": "the disk is full"}}
    with Peer(keeping([SUBMITTED], [refusal]), answering(SUBMITTED)) as peer:
        rpc = shell.caller(peer, keep_alive=True)
        rpc.web01.p()
        with pytest.raises(harp.RemoteError, match="the disk is full"):
            rpc.web01.p()
        assert peer.conversations[0].closed.wait(30)
        rpc.web01.p()
    assert counts(peer) == [2, 1]


def test_copies_have_connections_of_their_own() -> None:
    with Peer(keeping([SUBMITTED]), keeping([SUBMITTED]), keeping([SUBMITTED])) as peer:
        rpc = harp.HarpCaller(peer.host, peer.port, keep_alive=True)
        rpc.web01.p()
        others = [copy.copy(rpc), pickle.loads(pickle.dumps(rpc))]
        for other in others:
            assert repr(other) == repr(rpc) == f"HarpCaller('127.0.0.1', {peer.port}, keep_alive=True)"
            other.web01.p()
    assert counts(peer) == [1, 1, 1]


def test_with_our_dispatcher(shell: Shell, tmp_path: Path) -> None:
    """Threads at once, a restart in between, and connections only for those at once."""
    with scripted_harpd(tmp_path) as peer, Harpcallerd(tmp_path / "dispatcher", {"web01": peer.port}) as dispatcher:
        with shell.caller_at(dispatcher.host, dispatcher.port, keep_alive=True) as rpc, ThreadPoolExecutor(4) as pool:
            for _ in range(2):
                jobs = list(pool.map(rpc.web01.echo, range(40)))
                assert list(pool.map(lambda job: job.get(), jobs)) == [[number] for number in range(40)]
                calls = [harp.Call("web01", "echo", [number]) for number in range(40)]
                many = [rpc.job(job.id()) for job in rpc.submit_many(calls)]
                assert list(pool.map(lambda job: job.get(), many)) == [[number] for number in range(40)]
                assert many[0].details()["state"] == "returned"
                assert list(rpc.web01.count(3).follow(since=0)) == [0, 1, 2]
                dispatcher.restart()
