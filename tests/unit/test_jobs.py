"""The state machine of a job."""

from __future__ import annotations

from typing import get_args

import pytest

from harp.protocol.ends import Cancelled, End, Failed, Raised, Returned
from harp.protocol.jsontext import Raw
from harpcaller.jobs import ENDED, MISSING_RESULT, TRANSITIONS, NewJob, State, state_of

ENDS: list[End] = [Returned(Raw(b"1")), Raised("T", "m"), Failed("t", "m"), Cancelled()]


def test_every_state_has_its_row() -> None:
    assert set(TRANSITIONS) == set(State)


def test_every_state_is_reached_from_queued() -> None:
    reached = {State.QUEUED}
    while (more := reached.union(*(TRANSITIONS[state] for state in reached))) != reached:
        reached = more
    assert reached == set(State)


def test_no_state_comes_back() -> None:
    for state in State:
        later, seen = set(TRANSITIONS[state]), set[State]()
        while later:
            seen |= later
            later = set[State]().union(*(TRANSITIONS[following] for following in later))
        assert state not in seen


def test_what_has_ended_stays() -> None:
    assert frozenset({State.RETURNED, State.RAISED, State.FAILED, State.CANCELLED}) == ENDED


@pytest.mark.parametrize("end", ENDS)
def test_every_end_has_a_state_that_is_one(end: End) -> None:
    assert state_of(end) in ENDED


def test_the_states_that_are_ends_are_those_of_the_wire() -> None:
    assert {type(end) for end in ENDS} == set(get_args(End))
    assert {state_of(end) for end in ENDS} == ENDED


@pytest.mark.parametrize("end", ENDS)
def test_a_running_job_may_have_any_end(end: End) -> None:
    assert state_of(end) in TRANSITIONS[State.RUNNING]


def test_a_job_that_never_ran_has_no_end_of_its_procedure() -> None:
    assert {State.RETURNED, State.RAISED}.isdisjoint(TRANSITIONS[State.QUEUED])


def test_an_interrupted_job_may_have_failed() -> None:
    assert (MISSING_RESULT.type, state_of(MISSING_RESULT)) == ("missing_result", State.FAILED)


def test_without_queue_and_info() -> None:
    job = NewJob("id", "web01", "deploy", Raw(b"[]"), 1.0, 2.0)
    assert (job.queue, job.concurrency, job.info) == (None, 1, b"null")
