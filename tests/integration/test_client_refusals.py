"""Refused requests: never a job's end, never stored, never the end of a stream. Each test uses both shells."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import harp
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd
from support.peers import Peer, answering
from support.scripted import scripted_harpd
from support.shells import Shell

JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"
REFUSALS = ["too_many_connections", "internal_error", "invalid_request", "storage_error"]


def refusing(kind: str, *before: object) -> Any:
    """Return a script that sends replies, then refuses."""
    return answering(*before, {"error": {"type": kind, "message": "not now"}})


def packet(number: int) -> dict[str, Any]:
    return {"packet": number, "data": number}


# Where reconnecting is on.


@pytest.mark.parametrize("kind", REFUSALS)
def test_refused_wait_for_result_is_repeated(shell: Shell, kind: str) -> None:
    with Peer(refusing(kind), refusing(kind), answering({"result": 5})) as peer:
        job = shell.caller(peer).job(JOB)
        assert job.get() == 5
        assert job.result() == 5


@pytest.mark.parametrize("kind", REFUSALS)
@pytest.mark.parametrize("options", [{"since": 0}, {}])
def test_refused_follow_continues(shell: Shell, kind: str, options: dict[str, int]) -> None:
    """The first request is refused, a later one, and a stream in the middle."""
    first = [] if options else [answering({"continue": True})]
    scripts = [refusing(kind), *first, refusing(kind, packet(0), packet(1)), refusing(kind)]
    with Peer(*scripts, answering(packet(2), {"result": "end"})) as peer:
        job = shell.caller(peer).job(JOB)
        assert list(job.follow(**options)) == [0, 1, 2]
        assert job.result() == "end"


WAITS: list[Callable[[Any], Any]] = [lambda job: job.get(), lambda job: job.follow(since=0).all()]


@pytest.mark.parametrize("wait", WAITS)
def test_refusal_is_raised_after_reconnect_seconds(shell: Shell, wait: Callable[[Any], Any]) -> None:
    gave_up = r"^storage_error: not now; gave up after \d+ attempts"
    with Peer(always=refusing("storage_error")) as peer, pytest.raises(harp.RequestRefused, match=gave_up) as caught:
        wait(shell.caller(peer, reconnect=0.2).job(JOB))
    assert caught.value.type == "storage_error"


@pytest.mark.parametrize("ask", [*WAITS, lambda job: job.host()])
def test_refusal_for_unknown_job_is_not_repeated(shell: Shell, ask: Callable[[Any], Any]) -> None:
    unknown = answering({"error": {"type": "invalid_jobid", "message": "there is no job"}})
    with Peer(unknown) as peer, pytest.raises(harp.RemoteError, match="invalid_jobid: there is no job"):
        ask(shell.caller(peer).job(JOB))


# Where it is off, and for requests that do not wait.


@pytest.mark.parametrize("kind", REFUSALS)
@pytest.mark.parametrize(
    "ask",
    [
        lambda rpc: rpc.web01.p(),
        lambda rpc: rpc.job(JOB).get(wait=False),
        lambda rpc: rpc.job(JOB).stream().all(),
        lambda rpc: rpc.job(JOB).stream(recent=3).all(),
        lambda rpc: rpc.job(JOB).cancel(),
        lambda rpc: rpc.job(JOB).cancel(wait=True),
        lambda rpc: rpc.job(JOB).end_time(),
        lambda rpc: rpc.job(JOB).why(),
    ],
)
def test_refused_request_raises(shell: Shell, kind: str, ask: Callable[[Any], Any]) -> None:
    with Peer(refusing(kind)) as peer, pytest.raises(harp.RequestRefused, match=f"{kind}: not now") as caught:
        ask(shell.caller(peer))
    assert isinstance(caught.value, harp.CommunicationError)
    assert not isinstance(caught.value, harp.RemoteError)
    assert (caught.value.type, caught.value.message, caught.value.data) == (kind, "not now", None)


@pytest.mark.parametrize("kind", REFUSALS)
def test_refusal_without_reconnect_is_raised_and_not_stored(shell: Shell, kind: str) -> None:
    with Peer(refusing(kind), refusing(kind, packet(0)), refusing(kind), answering({"result": 5})) as peer:
        job = shell.caller(peer, reconnect=0).job(JOB)
        assert isinstance(job.result(wait=True), harp.RequestRefused)
        iterator = job.follow(since=0)
        assert next(iterator) == 0
        for _ in range(2):
            with pytest.raises(harp.RequestRefused):
                next(iterator)
        assert isinstance(job.result(), harp.RequestRefused)
        assert job.result() == 5


# An error of the same type as a job's end.


@pytest.mark.parametrize("kind", [*REFUSALS, "invalid_jobid"])
@pytest.mark.parametrize("data", [None, [1]])
def test_end_of_refusal_type_is_stored(shell: Shell, kind: str, data: Any) -> None:
    end = {"error": {"type": kind, "message": "harpd's own", "data": data}}
    with Peer(answering(packet(0), end), answering(end)) as peer:
        rpc = shell.caller(peer)
        job, followed = rpc.job(JOB), rpc.job(JOB)
        assert list(followed.follow(since=0)) == [0]
        for outcome in (job.result(), job.result(wait=True), followed.result()):
            assert type(outcome) is harp.RemoteError
            assert outcome.args == (kind, "harpd's own", data)


@pytest.mark.parametrize("kind", [*REFUSALS, "invalid_jobid"])
def test_error_of_harpd_stays_remote_error(tmp_path: Path, shell: Shell, kind: str) -> None:
    with scripted_harpd(tmp_path) as peer, Harpcallerd(tmp_path / "d", {"web01": peer.port}) as dispatcher:
        rpc = shell.caller_at("127.0.0.1", dispatcher.port)
        job = rpc.web01.fail(kind)
        with pytest.raises(harp.RemoteError, match=f"^{kind}: harpd's own$"):
            job.get()
        again = rpc.job(job.id())
        assert list(again.follow(since=0)) == list(again.stream()) == []
        for outcome in (again.result(), rpc.job(job.id()).result()):
            assert type(outcome) is harp.RemoteError
            assert (outcome.type, outcome.data) == (kind, None)


# A real dispatcher at its connection limit.


def is_refused(outcome: Any) -> Any:
    return outcome if isinstance(outcome, harp.RequestRefused) else None


def test_full_dispatcher_does_not_end_jobs(tmp_path: Path, shell: Shell, attempts: list[Any]) -> None:
    settings = {"max_connections": 4}
    with (
        scripted_harpd(tmp_path) as peer,
        Harpcallerd(tmp_path / "d", {"web01": peer.port}, settings=settings) as dispatcher,
    ):
        rpc = shell.caller_at("127.0.0.1", dispatcher.port, keep_alive=False)
        job = rpc.web01.count(60)
        assert job.get() == "counted"
        fresh = rpc.job(job.id())
        outcomes: dict[str, Any] = {}
        endless = dispatcher.submit("web01", "feed", 1)
        with ExitStack() as crowd:
            for _ in range(settings["max_connections"]):  # a connection without a request would give way to a new one
                client = crowd.enter_context(dispatcher.connect())
                client.send({"harpcaller": 1, "follow_stream": endless, "since": 0})
                assert client.message() == {"packet": 0, "data": 1}
            refused = wait_until(lambda: is_refused(fresh.result()), what="the full dispatcher")
            assert refused.type == "too_many_connections"
            with pytest.raises(harp.RequestRefused):
                list(fresh.stream())
            waits = [
                Thread(target=lambda: outcomes.update(records=list(fresh.follow(since=0)))),
                Thread(target=lambda: outcomes.update(result=rpc.job(job.id()).get())),
            ]
            for wait in waits:
                wait.start()
            before = len(attempts)
            wait_until(lambda: len(attempts) > before + 5, what="attempts in vain")
            assert outcomes == {}
        for wait in waits:
            wait.join(60)
        assert outcomes == {"records": list(range(60)), "result": "counted"}
        assert fresh.result() == "counted"
