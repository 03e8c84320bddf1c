"""The phases in a job's details, whatever the host reports."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from typing import Any

import pytest

from harp.protocol.ends import Cancelled, Failed, Raised, Returned
from harp.protocol.json_text import Raw, dumps
from harpcaller.config import Config
from harpcaller.explain import ExplainContext, describe_job
from harpcaller.model.jobs import NO_METADATA, Job, JobDetails, JobMetadata, QueuePosition, State, StopState
from harpcaller.model.phases import narrow_clock_skew
from harpcaller.runs.host_starts import FailingStarts

CONTEXT = ExplainContext(
    run=None,
    host=None,
    registry_loaded=True,
    config=Config(),
    active_calls=0,
    store_failing=False,
    now=200.0,
)
EXIT_INFO = {"by": "itself", "started": 5000.0, "ended": 5000.5, "authentication": 0.125, "fork": 0.25}
NOTHING = dict.fromkeys(("wait", "connect", "authenticate", "fork", "run", "other"))


def phases(started: float | None, ended: float | None, given: JobMetadata = NO_METADATA) -> dict[str, Any]:
    end = None if ended is None else Returned(Raw(b"1"))
    state = State.QUEUED if started is None else State.RUNNING if ended is None else State.RETURNED
    job = Job(
        "id", state, "web01", "p", Raw(b"[]"), 1.0, 1.0, None, Raw(b"null"), 100.0, started, ended, end, 0
    )  # fmt: skip
    found = describe_job(JobDetails(job, given, 0, None), CONTEXT)["phases"]
    assert isinstance(found, dict)
    return found


def metadata(exit_info: Any, call: Any = None) -> JobMetadata:
    return JobMetadata(
        call=Raw(json.dumps(call or {"connect_seconds": 0.0625}).encode()),
        exit_info=Raw(json.dumps(exit_info).encode()),
    )


def test_phases_of_a_job_add_up_to_its_duration() -> None:
    found = phases(101.5, 103.0, metadata(EXIT_INFO))
    assert found == {
        "wait": 1.5, "connect": 0.0625, "authenticate": 0.125, "fork": 0.25, "run": 0.25, "other": 0.8125,
    }  # fmt: skip
    assert sum(filter(None, found.values())) == 3.0, "from submission to end"


def test_phases_are_found_beside_half_a_character() -> None:
    found = phases(101.5, 103.0, metadata({**EXIT_INFO, "stderr": ["\ud800"]}))
    assert found == phases(101.5, 103.0, metadata(EXIT_INFO))


def test_phases_of_an_unfinished_job_are_none() -> None:
    assert phases(None, None) == NOTHING
    assert phases(102.0, None) == {**NOTHING, "wait": 2.0}


def test_phases_without_exit_info_have_no_other() -> None:
    older = {key: EXIT_INFO[key] for key in ("by", "started", "ended")}
    for given in (NO_METADATA, JobMetadata(call=Raw(b"{}")), JobMetadata(exit_info=Raw(json.dumps(older).encode()))):
        assert phases(100.0, 101.0, given) == {**NOTHING, "wait": 0.0}


def test_phases_with_disagreeing_clocks_are_not_negative() -> None:
    found = phases(99.0, 100.0, metadata({**EXIT_INFO, "ended": 4000.0}))
    assert (found["wait"], found["run"]) == (0.0, 0.0)
    assert phases(101.0, 101.25, metadata({**EXIT_INFO, "ended": 5001.0}))["other"] == 0.0


@pytest.mark.parametrize("value", ["1", None, True, [1], -1, 10**400, 1e300])
def test_phases_with_arbitrary_exit_info_do_not_raise(value: Any) -> None:
    found = phases(101.0, 102.0, metadata({**EXIT_INFO, "fork": value, "authentication": value}))
    assert (found["fork"], found["authenticate"], found["run"], found["other"]) == (None,) * 4


@pytest.mark.parametrize("exit_info", [b"[]", b'{"fork":1' + b"0" * 5000 + b"}", b'{"fork":1e999}'])
def test_phases_with_unreadable_exit_info_are_none(exit_info: bytes) -> None:
    assert phases(101.0, 102.0, JobMetadata(exit_info=Raw(exit_info))) == {**NOTHING, "wait": 1.0}


@pytest.mark.parametrize(
    ("held", "on_host", "why"),
    [
        (1, 1, 'queue {"n":1} is full (1 of 1: other), position 1'),
        (0, 100, "host web01 is full (100 of 100 calls), position 1"),
        (0, 99, "it is about to start"),
    ],
)
def test_why_of_a_queued_job_names_the_full_limit(held: int, on_host: int, why: str) -> None:
    job = Job(
        "id", State.QUEUED, "web01", "p", Raw(b"[]"), 1.0, 1.0, Raw(b'{"n":1}'), Raw(b"null"), 1.0, None, None, None, 0
    )  # fmt: skip
    position = QueuePosition(1, 1, held, ("other",) * held, on_host)
    context = replace(CONTEXT, config=Config(max_calls_per_host=100))
    assert describe_job(JobDetails(job, NO_METADATA, 0, position), context)["why"] == why


@pytest.mark.parametrize(
    ("requester", "found", "why"),
    [
        (
            {"by": "uid:0", "principal": "uid:root"},
            1,
            "by uid:root at 1970-01-01T00:00:09+00:00; its stop {} (1 process)",
        ),
        (
            {"by": "192.0.2.1:7", "principal": "anonymous@[::]:3502"},
            2,
            "by anonymous@[::]:3502 (192.0.2.1:7) at 1970-01-01T00:00:09+00:00; its stop {} (2 processes)",
        ),
        ({"by": "192.0.2.1:7"}, 0, "by 192.0.2.1:7 at 1970-01-01T00:00:09+00:00; its stop {}"),
        ({"by": None}, None, "at 1970-01-01T00:00:09+00:00; its stop {}"),
    ],
)
def test_why_of_a_cancelled_job_has_the_name_that_owners_have(
    requester: dict[str, Any], found: int | None, why: str
) -> None:
    call = "web01", "p", Raw(b"[]"), 1.0, 1.0, None, Raw(b"null"), 1.0, 2.0, 9.0
    job = Job("id", State.CANCELLED, *call, Cancelled(), 0, stop=StopState.CONFIRMED)
    given = JobMetadata(stop_request=dumps({"why": "cancelled", **requester}), stop_report=dumps({"found": found}))
    expected = f"it was cancelled {why.format('is confirmed')}"
    assert describe_job(JobDetails(job, given, 0, None), CONTEXT)["why"] == expected


def test_why_of_a_job_whose_owner_has_reached_its_limit() -> None:
    call = "web01", "p", Raw(b"[]"), 1.0, 1.0, None, Raw(b"null"), 1.0, None, None, None, 0
    job = Job("id", State.QUEUED, *call, owner="token:shop", max_running=2)
    position = QueuePosition(3, None, 2, ("other",), 2, slots_held_by_owner=2)
    found = describe_job(JobDetails(job, NO_METADATA, 0, position), CONTEXT)
    assert found["why"] == "its owner has reached its limit (2 of 2 jobs), position 3"
    assert (found["owner"], found["limits"]["running"]) == ("token:shop", 2)


def test_why_of_a_full_queue_counts_hidden_holders() -> None:
    call = "web01", "p", Raw(b"[]"), 1.0, 1.0, Raw(b'{"n":1}'), Raw(b"null"), 1.0, None, None, None, 0
    position = QueuePosition(1, 12, 12, ("own",), 1)
    context = replace(CONTEXT, hidden_holders=9)
    found = describe_job(JobDetails(Job("id", State.QUEUED, *call), NO_METADATA, 0, position), context)
    assert found["why"] == 'queue {"n":1} is full (12 of 12: own, 9 of other owners, ...), position 1'


def test_why_of_a_job_whose_host_accepts_no_starts() -> None:
    now = time.monotonic()
    failing = FailingStarts(now - 60, now - 2, now - 1, Failed("too_many_calls", "limit"), attempts=7, next_at=now + 4)
    job = Job("id", State.QUEUED, "web01", "p", Raw(b"[]"), 1.0, 1.0, None, Raw(b"null"), 100.0, None, None, None, 0)
    details = JobDetails(job, NO_METADATA, 0, QueuePosition(3, None, 0, (), 0))
    found = describe_job(details, replace(CONTEXT, failing=failing))
    assert re.fullmatch(
        r"host web01 accepts no starts since 1970-01-01T00:\d\d:\d\d\+00:00 "
        r"\(7 attempts, last error: too_many_calls: limit\); next attempt in [0-4]\.\d s, position 3",
        found["why"],
    )
    assert found["failed_starts"].keys() == {"since", "next", "attempts", "error"}
    assert describe_job(details, CONTEXT)["failed_starts"] is None
    failing.may_try = True
    assert describe_job(details, replace(CONTEXT, failing=failing))["why"] == "2 jobs are before it, position 3"


@pytest.mark.parametrize(
    ("end", "why"),
    [
        (Raised("KeyError", ""), "it raised KeyError after 1.000 s"),
        (Failed("host_lost", ""), "it failed after 1.000 s: host_lost"),
        (Raised("KeyError", "x" * 300), "it raised KeyError after 1.000 s: " + "x" * 300),
        (Failed("timeout", "x" * 301), "it failed after 1.000 s: timeout: " + "x" * 300 + "..."),
    ],
)
def test_why_of_an_end_shows_when_its_message_is_cut(end: Failed | Raised, why: str) -> None:
    state = State.RAISED if isinstance(end, Raised) else State.FAILED
    job = Job("id", state, "web01", "p", Raw(b"[]"), 1.0, 1.0, None, Raw(b"null"), 1.0, 2.0, 3.0, end, 0)
    assert describe_job(JobDetails(job, NO_METADATA, 0, None), CONTEXT)["why"] == why


@pytest.mark.parametrize(
    ("known", "began", "finished", "expected"),
    [
        (None, 101.0, 109.0, 0.0),  # between -1 and 1: the clocks may agree
        (0.5, 101.0, 109.0, 0.5),  # as far as is known already
        (None, 161.0, 169.0, 59.0),  # between 59 and 61
        (None, 41.0, 49.0, -59.0),  # between -61 and -59
        (59.0, 101.0, 109.0, 1.0),  # the clock was set
        (0.5, 101.0, 169.0, 0.5),  # it was set during the call
        (0.5, None, 109.0, 0.5),
        (None, 161.0, "x", None),
    ],
)
def test_clock_skew_is_the_nearest_that_fits(known: float | None, began: Any, finished: Any, expected: Any) -> None:
    exit_info = Raw(json.dumps({"started": began, "ended": finished}).encode())
    assert narrow_clock_skew(known, 100.0, 110.0, exit_info) == expected
