"""Lists of jobs, hosts and queues in the client, against scripted dispatchers; each test uses both shells."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

import harp
from support.legacy import LegacyDispatcher, server
from support.peers import Peer, PeerConnection, answering
from support.shells import Shell

JOB = "019ad1c6-7e24-7c3b-b6f7-d9be8a4b5d39"


def row(number: int = 0, **members: Any) -> dict[str, Any]:
    return {
        "job": f"{JOB[:-3]}{number:03}",
        "state": "returned",
        "host": "web01",
        "procedure": "p",
        "queue": None,
        "owner": "anonymous@127.0.0.1:3502",
        "time": {"submit": 1700000000.25, "start": 1700000001, "end": None},
        "records": 3,
        "end_type": None,
        "end_message": None,
        "stop": None,
        "holds_slot": False,
        "unreachable_since": None,
        "arguments_preview": "[]",
        "info_preview": "null",
        "rerun_of": None,
        "can": ["read", "cancel"],
        **members,
    }


def page(*numbers: int, next: str | None = None, examined: int = 10, searched_to: float | None = 5.5) -> dict[str, Any]:
    return {"jobs": [row(number) for number in numbers], "next": next, "examined": examined, "searched_to": searched_to}


def asked(filter: str = "", **members: Any) -> dict[str, Any]:
    return {"harpcaller": 1, "list_jobs": filter, "limit": 100, **members}


def numbers(jobs: list[harp.JobSummary]) -> list[int]:
    return [int(job.id[-3:]) for job in jobs]


def test_jobs_of_several_pages_are_one_list(shell: Shell) -> None:
    scripts = [
        answering(page(1, 2, next="a"), request=asked("state:bad")),
        answering(page(next="b"), request=asked("state:bad", cursor="a")),  # an empty page is not the end
        answering(page(3), request=asked("state:bad", cursor="b")),
    ]
    with Peer(*scripts) as peer:
        jobs = shell.caller(peer).jobs("state:bad")
        assert numbers(jobs.all()) == [1, 2, 3]
        assert (jobs.cursor, jobs.examined, jobs.searched_to) == (None, 30, 5.5)
        assert jobs.all() == []


def test_job_summary_has_typed_frozen_values(shell: Shell) -> None:
    failed = row(
        state="failed", end_type="timeout", end_message="m", queue={"id": "0a", "name": '{"q":1}'}, added_later=[1]
    )
    with Peer(answering({"jobs": [failed, {"job": JOB, "state": "queued", "host": "h", "procedure": "p"}]})) as peer:
        first, least = shell.caller(peer).jobs().all()
    assert (first.state, first.end_type, first.queue_id, first.queue) == ("failed", "timeout", "0a", '{"q":1}')
    assert (first.submitted, first.started, first.ended) == (1700000000.25, 1700000001.0, None)
    assert first.can == ("read", "cancel")
    assert (least.submitted, least.records, least.arguments_preview, least.can) == (None, 0, "", ())
    assert "_row" not in repr(first)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.state = "returned"
    assert len({first, least}) == 2


def test_jobs_with_limit_asks_for_no_more(shell: Shell) -> None:
    scripts = [
        answering(page(1, 2, next="a"), request=asked(limit=3)),
        answering(page(3, next="b"), request=asked(limit=1, cursor="a")),
    ]
    with Peer(*scripts) as peer:
        jobs = shell.caller(peer).jobs(limit=3)
        assert numbers(jobs.all()) == [1, 2, 3]
        assert jobs.cursor == "b"
    with Peer(answering(page(4), request=asked(cursor="b", oldest_first=True))) as peer:
        assert numbers(shell.caller(peer).jobs(oldest_first=True, cursor="b").all()) == [4]
    with Peer() as peer:
        assert shell.caller(peer).jobs(limit=0).all() == []


def test_jobs_are_requested_when_they_are_needed(shell: Shell) -> None:
    with Peer(answering(page(1, 2, next="a"))) as peer:
        jobs = shell.caller(peer).jobs()
        assert not peer.connections
        assert next(iter(jobs)).id.endswith("001")
        assert len(peer.connections) == 1
        jobs.close()
        assert jobs.all() == []


def test_page_is_requested_again_after_an_interruption(shell: Shell) -> None:
    def reset(conn: PeerConnection) -> None:
        conn.expect(asked(cursor="a"))
        conn.reset()

    scripts = [
        answering(page(1, next="a")),
        reset,
        answering(request=asked(cursor="a")),
        answering({"error": {"type": "storage_error", "message": "full"}}, request=asked(cursor="a")),
        answering(page(2), request=asked(cursor="a")),
    ]
    with Peer(*scripts) as peer:
        assert numbers(shell.caller(peer).jobs().all()) == [1, 2]


def test_first_page_interrupted_raises_and_stays_an_error(shell: Shell) -> None:
    def reset(conn: PeerConnection) -> None:
        conn.expect()
        conn.reset()

    with Peer(reset) as peer:
        jobs = shell.caller(peer).jobs()
        for _ in range(2):
            with pytest.raises(harp.CommunicationError):
                jobs.all()


def test_invalid_filter_raises_without_further_requests(shell: Shell) -> None:
    refusal = {"error": {"type": "invalid_filter", "message": "stat: no such filter; did you mean state?"}}
    with Peer(answering(refusal), answering(page(1, next="a")), answering(refusal)) as peer:
        caller = shell.caller(peer)
        for _ in range(2):
            with pytest.raises(harp.HarpException, match="did you mean state") as caught:
                caller.jobs("stat:bad").all()
            assert type(caught.value) is harp.HarpException


UNKNOWN = "expected exactly one of procedure, submit_many, cancel, get_result, get_status, get_details, follow_stream"


@pytest.mark.parametrize("method", ["jobs", "hosts", "queues", "count_jobs"])
def test_older_dispatcher_raises_not_supported(shell: Shell, method: str) -> None:
    def call(peer: Any) -> None:
        found = getattr(shell.caller_at(peer.host, peer.port), method)()
        if method != "count_jobs":
            found.all()

    with Peer(answering({"error": {"type": "invalid_request", "message": UNKNOWN}})) as peer:
        with pytest.raises(harp.NotSupported, match=r"the dispatcher is too old for (lists|counts of jobs)"):
            call(peer)


def test_legacy_dispatcher_raises_not_supported(shell: Shell) -> None:
    with server(LegacyDispatcher()) as port:
        for method in ("jobs", "hosts"):
            with pytest.raises(harp.NotSupported, match="may be too old for lists"):
                getattr(shell.caller_at("127.0.0.1", port), method)().all()
        with pytest.raises(harp.NotSupported, match="may be too old for counts of jobs"):
            shell.caller_at("127.0.0.1", port).count_jobs()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": None}, r"jobs\[1\]\.state: missing"),
        ({"records": "3"}, r"jobs\[1\]\.records: a value of another type"),
        ({"records": True}, r"jobs\[1\]\.records: a value of another type"),
        ({"time": {"submit": "now"}}, r"jobs\[1\]\.time\.submit: a value of another type"),
        ({"can": "read"}, r"jobs\[1\]\.can: a value of another type"),
    ],
)
def test_invalid_row_raises_and_is_named(shell: Shell, change: dict[str, Any], message: str) -> None:
    with Peer(answering({"jobs": [row(), row(1, **change)], "next": None})) as peer:
        with pytest.raises(harp.CommunicationError, match=message):
            shell.caller(peer).jobs().all()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("jobs", {"limit": -1}, "limit: expected an integer of at least 0"),
        ("jobs", {"limit": True}, "limit"),
        ("jobs", {"filter": 5}, "list_jobs: expected a text"),
        ("jobs", {"filter": "x" * 5000}, "list_jobs: expected a text of at most 4096"),
        ("jobs", {"cursor": 5}, "cursor: expected a text"),
        ("hosts", {"text": None}, "list_hosts: expected a text"),
        ("count_jobs", {"by": "password"}, "by: expected an array of some of state"),
        ("count_jobs", {"by": []}, "by: expected"),
        ("count_jobs", {"most": 0}, "most: expected an integer from 1"),
    ],
)
def test_invalid_argument_raises_before_a_request(
    shell: Shell, method: str, options: dict[str, Any], message: str
) -> None:
    with Peer() as peer, pytest.raises(harp.HarpException, match=message):
        getattr(shell.caller(peer), method)(**options)


def test_hosts_and_queues_have_values(shell: Shell) -> None:
    host = {
        "name": "web01",
        "address": "192.0.2.1",
        "port": 4306,
        "state": "down",
        "since": 5,
        "running": 1,
        "queued": 2,
    }
    queue = {"id": "0a", "name": '{"q":1}', "concurrency": 2, "running": 1, "queued": 7, "oldest_submit": 1.5}
    scripts = [
        answering({"hosts": [host], "next": None}, request={"harpcaller": 1, "list_hosts": "web", "limit": 100}),
        answering({"queues": [queue], "next": None}, request={"harpcaller": 1, "list_queues": "", "limit": 5}),
    ]
    with Peer(*scripts) as peer:
        (found,) = shell.caller(peer).hosts("web").all()
        assert (found.name, found.port, found.state, found.since, found.queued) == ("web01", 4306, "down", 5.0, 2)
        (waiting,) = shell.caller(peer).queues(limit=5).all()
        assert (waiting.id, waiting.concurrency, waiting.queued, waiting.oldest_submit) == ("0a", 2, 7, 1.5)


def test_counts_have_values(shell: Shell) -> None:
    counts = {"by": {"state": [{"value": "failed", "count": 3, "more": False}, {"value": None, "count": 1}]}, "at": 5}
    request = {"harpcaller": 1, "count_jobs": "web", "by": ["state"], "most": 10}
    with Peer(answering({"counts": counts}, request=request), answering({"counts": {"by": {"state": [1]}}})) as peer:
        found = shell.caller(peer).count_jobs("web", most=10)
        assert [(each.value, each.count, each.more) for each in found.by["state"]] == [
            ("failed", 3, False),
            (None, 1, False),
        ]
        assert (found.exact, found.at) == (False, 5.0)
        with pytest.raises(harp.CommunicationError, match=r"counts\.by\.state\[0\]: expected an object"):
            shell.caller(peer).count_jobs()


def test_access_denied_is_raised_as_such(shell: Shell) -> None:
    refusal = {"error": {"type": "access_denied", "message": "x does not have the right: list", "refused": True}}
    with Peer(answering(refusal)) as peer, pytest.raises(harp.AccessDenied, match="the right: list"):
        shell.caller(peer).jobs().all()


def test_iterator_of_all_threads_returns_each_job_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    pages = [page(*range(first, first + 10), next=str(first) if first < 90 else None) for first in range(0, 100, 10)]
    with Peer(*map(answering, pages)) as peer:
        jobs = harp.HarpCaller(peer.host, peer.port, keep_alive=False).jobs()
        with ThreadPoolExecutor(4) as pool:
            found = list(itertools.chain.from_iterable(pool.map(lambda _: list(jobs), range(4))))
    assert sorted(numbers(found)) == list(range(100))
