"""The state machine of a job."""

from __future__ import annotations

from typing import get_args

import pytest

from harp.protocol.ends import Cancelled, End, Failed, Raised, Returned
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import ENDED, TRANSITIONS, Identity, NewJob, Records, State, state_of

ENDS: list[End] = [Returned(Raw(b"1")), Raised("T", "m"), Failed("t", "m"), Cancelled()]


def test_transitions_have_a_row_for_every_state() -> None:
    assert set(TRANSITIONS) == set(State)


def test_transitions_reach_every_state_from_queued() -> None:
    reached = {State.QUEUED}
    while (more := reached.union(*(TRANSITIONS[state] for state in reached))) != reached:
        reached = more
    assert reached == set(State)


def test_transitions_lead_back_only_from_running_to_queued() -> None:
    order = list(State)
    back = {
        (state, next_) for state in State for next_ in TRANSITIONS[state] if order.index(next_) <= order.index(state)
    }
    assert back == {(State.RUNNING, State.QUEUED)}


def test_ended_states_have_no_transition() -> None:
    assert frozenset({State.RETURNED, State.RAISED, State.FAILED, State.CANCELLED}) == ENDED


@pytest.mark.parametrize("end", ENDS)
def test_state_of_every_end_is_an_ended_state(end: End) -> None:
    assert state_of(end) in ENDED


def test_ended_states_are_named_like_the_closing_lines() -> None:
    assert {type(end) for end in ENDS} == set(get_args(End))
    assert {state_of(end) for end in ENDS} == ENDED


@pytest.mark.parametrize("end", ENDS)
def test_running_job_may_have_any_end(end: End) -> None:
    assert state_of(end) in TRANSITIONS[State.RUNNING]


def test_queued_job_cannot_return_or_raise() -> None:
    assert {State.RETURNED, State.RAISED}.isdisjoint(TRANSITIONS[State.QUEUED])


def test_new_job_without_queue_and_info_has_defaults() -> None:
    job = NewJob("id", "web01", "deploy", Raw(b"[]"), 1.0, 2.0)
    assert (job.queue, job.concurrency, job.info) == (None, 1, b"null")


def test_len_of_records_is_the_number_of_values() -> None:
    assert len(Records()) == 0
    assert len(Records([Raw(b"1"), Raw(b"2")], [1.0, 1.5])) == 2


JOB = "6f1d7d4e-3c1c-4d6e-8a55-0d9d3d1b6c11"


# Output of `openssl dgst -sha256 -hmac key`: the values that hosts have must not change with an upgrade.
SHARED_SECRET = "7c816ddf42644b21c3f256c0cd89a52d4792c0772404ed426dce204a7278eb72"
SECRET = "a90b909e1df4771a9afa1484db83499746479f503008d69e9ec4ba845c1b83e4"
OWNER_AT_WEB01 = "72198ed606287b39018ec1c75f9280753abebeb7921ead714d2c3516f1d6bd03"


def test_identity_secret_depends_on_key_job_and_host() -> None:
    assert Identity("me", b"key").secret(JOB, "web01", 1.0) == SECRET
    others = [(b"other key", JOB, "web01"), (b"key", JOB.replace("6", "7"), "web01"), (b"key", JOB, "web02")]
    secrets = {Identity("me", key).secret(job, host, 1.0) for key, job, host in others}
    assert len(secrets - {SECRET}) == len(others)


def test_identity_secret_of_earlier_job_is_unchanged() -> None:
    identity = Identity("me", b"key", shared_secrets_until=5.0)
    assert identity.secret(JOB, "web01", 5.0) == SHARED_SECRET
    assert identity.secret(JOB, "web01", 5.1) == SECRET


def test_identity_owner_at_differs_for_each_host() -> None:
    assert Identity("me", b"key").owner_at("web01") == OWNER_AT_WEB01
    others = [
        ("me", b"key", "web02"),
        ("you", b"key", "web01"),
        ("me", b"other key", "web01"),
        ("me", b"key", "web\ud800"),
    ]
    names = {Identity(owner, key).owner_at(host) for owner, key, host in others}
    assert len(names - {OWNER_AT_WEB01}) == len(others)


def test_identity_repr_hides_its_values() -> None:
    shown = repr(Identity("the owner", b"the key"))
    assert "owner'" not in shown
    assert "key" not in shown
