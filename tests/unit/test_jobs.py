"""The state machine of a job."""

from __future__ import annotations

from typing import get_args

import pytest

from harp.protocol.ends import Cancelled, End, Failed, Raised, Returned
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import ENDED, TRANSITIONS, Identity, NewJob, Records, State, state_of

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


def test_without_queue_and_info() -> None:
    job = NewJob("id", "web01", "deploy", Raw(b"[]"), 1.0, 2.0)
    assert (job.queue, job.concurrency, job.info) == (None, 1, b"null")


def test_records_are_as_many_as_their_values() -> None:
    assert len(Records()) == 0
    assert len(Records([Raw(b"1"), Raw(b"2")], [1.0, 1.5])) == 2


JOB = "6f1d7d4e-3c1c-4d6e-8a55-0d9d3d1b6c11"


# As `openssl dgst -sha256 -hmac key` makes them: what a host was told must be the same after any upgrade.
SECRET = "7c816ddf42644b21c3f256c0cd89a52d4792c0772404ed426dce204a7278eb72"
OWNER_AT_WEB01 = "72198ed606287b39018ec1c75f9280753abebeb7921ead714d2c3516f1d6bd03"


def test_the_secret_of_a_call_is_made_from_the_key_and_the_job() -> None:
    assert Identity("me", b"key").secret(JOB) == SECRET
    assert Identity("me", b"other key").secret(JOB) != SECRET
    assert Identity("me", b"key").secret(JOB.replace("6", "7")) != SECRET


def test_each_host_knows_the_owner_by_a_name_of_its_own() -> None:
    assert Identity("me", b"key").owner_at("web01") == OWNER_AT_WEB01
    others = [
        ("me", b"key", "web02"),
        ("you", b"key", "web01"),
        ("me", b"other key", "web01"),
        ("me", b"key", "web\ud800"),
    ]
    names = {Identity(owner, key).owner_at(host) for owner, key, host in others}
    assert len(names - {OWNER_AT_WEB01}) == len(others)


def test_an_identity_is_not_shown() -> None:
    shown = repr(Identity("the owner", b"the key"))
    assert "owner'" not in shown
    assert "key" not in shown
