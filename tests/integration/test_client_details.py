"""HARP's extensions of the protocol: details, confirmed stops, times of records; each test uses both shells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import harp
from support.harpcallerd import Harpcallerd
from support.legacy import LegacyDispatcher, server
from support.peers import Peer, answering
from support.scripted import scripted_harpd
from support.shells import Shell

JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"

GET_DETAILS = {"harpcaller": 1, "get_details": JOB}
CANCEL = {"harpcaller": 1, "cancel": JOB, "wait": True}
DETAILS = {"job": JOB, "state": "queued", "position": 7, "why": 'queue {"db": "prod"} is full', "stop_report": None}


def stop(state: Any, report: Any = None) -> dict[str, Any]:
    return {"state": state, "stop_report": report}


def test_details_are_requested_each_time(shell: Shell) -> None:
    running = {**DETAILS, "state": "running", "why": "it runs"}
    replies = [answering({"details": found}, request=GET_DETAILS) for found in (DETAILS, running, running)]
    with Peer(*replies) as peer:
        job = shell.caller(peer).job(JOB)
        assert job.details() == DETAILS
        assert job.details()["state"] == "running"
        assert job.why() == "it runs"


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"details": [1]}, "details: expected an object"),
        ({"details": {"job": JOB}}, r"details\.why: expected a string"),
        ({"details": {"why": ["a", "b"]}}, r"details\.why: expected a string"),
        ({"result": 1}, "does not answer this request"),
    ],
)
def test_details_of_wrong_type_raise(shell: Shell, reply: Any, message: str) -> None:
    with Peer(answering(reply), answering(reply)) as peer:
        job = shell.caller(peer).job(JOB)
        for method in (job.details, job.why):
            with pytest.raises(harp.CommunicationError, match=message):
                method()


def test_details_of_unknown_job_raise(shell: Shell) -> None:
    with Peer(answering({"error": {"type": "invalid_jobid", "message": "there is no job x"}})) as peer:
        with pytest.raises(harp.RemoteError, match="invalid_jobid"):
            shell.caller(peer).job(JOB).why()


@pytest.mark.parametrize(
    ("reply", "cancelled"),
    [
        ({"cancelled": True, "stop": stop("confirmed", {"survivors": [], "complete": True})}, True),
        ({"cancelled": True, "stop": None}, True),  # it was still queued
        ({"cancelled": True}, True),
        ({"cancelled": False}, False),  # it had ended
        ({"cancelled": False, "stop": stop("confirmed")}, False),  # another client had cancelled it
    ],
)
def test_cancel_with_confirmed_stop_returns_true(shell: Shell, reply: Any, cancelled: bool) -> None:
    with Peer(answering(reply, request=CANCEL)) as peer:
        assert shell.caller(peer).job(JOB).cancel(wait=True) is cancelled


SURVIVORS = {"survivors": [{"pid": 4711, "command": "python3"}, {"pid": 4712, "command": "sleep"}]}


@pytest.mark.parametrize(
    ("found", "kind", "message"),
    [
        (stop("failed", SURVIVORS), "stop_failed", r"processes of job .* survive: 4711 \(python3\), 4712 \(sleep\)"),
        (stop("failed"), "stop_failed", "has not confirmed that job .* is stopped"),  # the host was declared lost
        (stop("failed", {"survivors": []}), "stop_failed", "has not confirmed"),
        (stop("failed", {"survivors": ["odd", {"odd": 1}]}), "stop_failed", r"survive: odd, \{'odd': 1\}"),
        (stop("unknown"), "stop_unknown", "may still run"),
        (stop("pending"), "stop_unknown", "may still run"),
    ],
)
def test_cancel_with_unconfirmed_stop_raises(shell: Shell, found: Any, kind: str, message: str) -> None:
    with Peer(answering({"cancelled": True, "stop": found})) as peer:
        with pytest.raises(harp.RemoteError, match=message) as caught:
            shell.caller(peer).job(JOB).cancel(wait=True)
    assert (caught.value.type, caught.value.data) == (kind, found)


def test_cancel_with_legacy_harpd_reports_unknown_stop(shell: Shell, tmp_path: Path) -> None:
    with scripted_harpd(tmp_path) as peer, Harpcallerd(tmp_path / "dispatcher", {"web01": peer.port}) as dispatcher:
        job = shell.caller_at(dispatcher.host, dispatcher.port).web01.feed("running")
        with job.follow(since=0) as records:
            assert next(records) == "running"
        with pytest.raises(harp.RemoteError) as caught:
            job.cancel(wait=True)
    assert (caught.value.type, caught.value.data) == ("stop_unknown", {"state": "unknown", "stop_report": None})


@pytest.mark.parametrize("found", [[], {"stop_report": None}, stop(1)])
def test_cancel_with_invalid_stop_raises(shell: Shell, found: Any) -> None:
    with Peer(answering({"cancelled": True, "stop": found})) as peer:
        with pytest.raises(harp.CommunicationError, match=r"stop(\.state)?: expected"):
            shell.caller(peer).job(JOB).cancel(wait=True)


def test_cancel_without_wait_ignores_stop(shell: Shell) -> None:
    reply = {"cancelled": True, "stop": stop("failed")}
    with Peer(answering(reply, request={"harpcaller": 1, "cancel": JOB})) as peer:
        assert shell.caller(peer).job(JOB).cancel() is True


@pytest.mark.parametrize("method", ["follow", "stream"])
@pytest.mark.parametrize("numbered", [True, False])
def test_timed_records_have_times(shell: Shell, method: str, numbered: bool) -> None:
    lines = [{"packet": 3, "time": 1700000000.25, "data": "x"}, {"packet": 4, "time": 1700000001, "data": None}]
    kind = "follow_stream" if method == "follow" else "read_stream"
    request = {"harpcaller": 1, kind: JOB, "since": 3, "timed": True}
    with Peer(answering(*lines, {"result": 1}, request=request)) as peer:
        records = list(getattr(shell.caller(peer).job(JOB), method)(since=3, numbered=numbered, timed=True))
    assert records == [(3, 1700000000.25, "x"), (4, 1700000001.0, None)]
    assert all(type(time) is float for _, time, _ in records)


def test_timed_record_without_time_raises(shell: Shell) -> None:
    with Peer(answering({"packet": 0, "data": "x"})) as peer:
        with pytest.raises(harp.CommunicationError, match="time: missing"):
            list(shell.caller(peer).job(JOB).follow(since=0, timed=True))


def test_extension_on_legacy_dispatcher_names_feature(shell: Shell) -> None:
    old = LegacyDispatcher()
    with server(old) as port:
        rpc = shell.caller_at("127.0.0.1", port)
        job = rpc.job(old.JOB)
        operations = [
            (job.details, r"details\(\) and why\(\)"),
            (job.why, r"details\(\) and why\(\)"),
            (lambda: job.cancel(wait=True), r"cancel\(wait=True\)"),
            (lambda: list(job.stream(timed=True)), "timed=True"),
            (lambda: list(job.follow(since=0, timed=True)), "timed=True"),
        ]
        for operation, feature in operations:
            with pytest.raises(harp.CommunicationError, match=f"the dispatcher may be too old for {feature}"):
                operation()
        assert job.cancel() is True


def test_extension_on_unreachable_dispatcher_does_not(shell: Shell) -> None:
    rpc = shell.caller_at("127.0.0.1", 1)
    with pytest.raises(harp.CommunicationError) as caught:
        rpc.job(JOB).details()
    assert "too old" not in str(caught.value)
