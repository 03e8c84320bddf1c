"""How an interrupted reader continues, decided from errors, lines and times alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from harp._core.retry import ReconnectPolicy, parse_reconnect
from harp._core.streams import StreamReader
from harp.errors import CommunicationError, HarpException, RemoteError, RequestRefused
from harp.protocol.dispatcher import FollowStream, ReadStream

JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"


def error_of(cause: BaseException | None) -> CommunicationError:
    error = CommunicationError("h:1: reading: it broke")
    error.__cause__ = cause
    return error


LOST = error_of(ConnectionResetError())
SILENCE = error_of(EOFError())
REFUSED = RequestRefused("storage_error", "the disk is full")


def policy_of(seconds: float = 300.0, connected: float | None = 0.0) -> ReconnectPolicy:
    made = ReconnectPolicy(seconds)
    if connected is not None:
        made.connected(connected)
    return made


@pytest.mark.parametrize("cause", [OSError(), ConnectionRefusedError(), TimeoutError(), EOFError()])
def test_policy_interruption_gives_a_pause(cause: Exception) -> None:
    assert 0.05 <= policy_of().next_pause(error_of(cause), 1.0) <= 0.1


@pytest.mark.parametrize(
    ("error", "made"),
    [
        (error_of(ValueError("garbage")), policy_of),
        (error_of(None), policy_of),  # closed on this side
        (RemoteError("invalid_jobid", "m"), policy_of),
        (HarpException("wrong use"), policy_of),
        (LOST, lambda: policy_of(0)),
        (LOST, lambda: policy_of(connected=None)),  # the first connection
    ],
)
def test_policy_other_error_is_raised_unchanged(error: HarpException, made: Callable[[], ReconnectPolicy]) -> None:
    with pytest.raises(type(error)) as caught:
        made().next_pause(error, 1.0)
    assert caught.value is error


def test_policy_pauses_grow_and_vary() -> None:
    runs = []
    for _ in range(20):
        policy = policy_of()
        runs.append([policy.next_pause(LOST, float(now)) for now in range(8)])
    for pauses in zip(*runs, strict=True):
        assert len(set(pauses)) > 1
    for pause, most in zip(zip(*runs, strict=True), [0.1, 0.2, 0.4, 0.8, 1.6, 2, 2, 2], strict=True):
        assert all(most / 2 <= found <= most for found in pause)


def test_policy_time_limit_raises_with_last_error() -> None:
    policy = policy_of(5)
    assert policy.next_pause(LOST, 100.0)
    assert policy.next_pause(LOST, 104.99) <= 0.011  # the last attempt is at the end of the time
    with pytest.raises(CommunicationError, match=r"it broke; gave up after 2 attempts in 5 s") as caught:
        policy.next_pause(LOST, 105.0)
    assert caught.value.__cause__ is LOST


def test_policy_refusal_is_part_of_the_outage() -> None:
    policy = policy_of(5)
    policy.next_pause(LOST, 0.0)
    policy.connected(1.0)
    assert policy.next_pause(REFUSED, 1.0)
    with pytest.raises(RequestRefused, match=r"storage_error: the disk is full; gave up after 2 attempts") as caught:
        policy.next_pause(REFUSED, 5.0)
    assert caught.value.__cause__ is REFUSED


def test_policy_reply_ends_the_outage() -> None:
    policy = policy_of(5)
    policy.next_pause(LOST, 0.0)
    policy.connected(1.0)
    policy.end_outage()
    assert policy.attempts == 0
    assert policy.next_pause(LOST, 100.0) <= 0.1


def test_policy_stable_connection_ends_the_outage() -> None:
    policy = policy_of(300)
    policy.next_pause(LOST, 0.0)
    policy.connected(10.0)
    policy.next_pause(LOST, 20.0)  # too short: the outage continues
    assert policy.attempts == 2
    policy.connected(20.0)
    assert policy.next_pause(LOST, 1000.0)  # long enough
    assert policy.attempts == 1


def test_policy_short_time_limit_has_shorter_stable_time() -> None:
    policy = policy_of(2)
    policy.next_pause(LOST, 0.0)
    policy.connected(1.0)
    assert policy.next_pause(LOST, 4.0)  # connected for longer than an outage may last
    assert policy.attempts == 1


def test_policy_gives_up_if_dispatcher_only_accepts() -> None:
    policy, now = policy_of(10), 0.0
    with pytest.raises(CommunicationError, match="in 10 s"):
        for _ in range(100):
            now += policy.next_pause(SILENCE, now)
            policy.connected(now)
    assert now <= 10.1


def test_policy_gives_up_if_dispatcher_never_replies_in_time() -> None:
    policy, now = policy_of(300), 0.0
    with pytest.raises(CommunicationError, match="in 300 s"):
        for _ in range(100):
            now += 30.0
            now += policy.next_pause(error_of(TimeoutError()), now)
            policy.connected(now)
    assert now <= 361


@pytest.mark.parametrize(
    ("option", "seconds"), [(None, 0), (False, 0), (0, 0), (2.5, 2.5), (math.inf, math.inf), (10**400, math.inf)]
)
def test_reconnect_option_is_parsed(option: Any, seconds: float) -> None:
    assert parse_reconnect(option) == seconds


# A reader, line by line: its requests and its items.


def reader_of(request: FollowStream | ReadStream, numbered: bool) -> StreamReader:
    return StreamReader(request, numbered, 300, lambda reply, line: None)


def next_request(reader: StreamReader) -> dict[str, Any] | None:
    if not reader.has_request:
        return None
    request: dict[str, Any] = json.loads(reader.pop_request(0.0))
    assert request.pop("harpcaller") == 1
    return request


def packet(number: int) -> bytes:
    return json.dumps({"packet": number, "data": f"r{number}"}).encode()


CONTINUE = b'{"continue": true}'
END = b'{"result": 1}'


def test_reader_continues_from_its_number() -> None:
    reader = reader_of(FollowStream(JOB, since=3), numbered=True)
    assert next_request(reader) == {"follow_stream": JOB, "since": 3}
    assert next_request(reader) is None
    assert reader.read(packet(3)) == ((3, "r3"),)
    reader.interrupted(LOST, 1.0)
    assert next_request(reader) == {"follow_stream": JOB, "since": 4}
    reader.interrupted(SILENCE, 2.0)  # after a reply, a silent close is an outage
    assert next_request(reader) == {"follow_stream": JOB, "since": 4}
    assert reader.read(packet(4)) == ((4, "r4"),)
    assert reader.read(END) == ()
    assert reader.finished


@pytest.mark.parametrize("recent", [None, 0])
def test_reader_without_number_reads_it_first(recent: int | None) -> None:
    reader = reader_of(FollowStream(JOB, recent=recent), numbered=True)
    assert next_request(reader) == {"read_stream": JOB, "recent": 1}
    assert reader.read(packet(6)) == ()  # older than the request
    assert reader.read(packet(7)) == ((7, "r7"),)  # created since the request
    assert reader.read(CONTINUE) == ()
    assert not reader.finished
    assert next_request(reader) == {"follow_stream": JOB, "since": 8}


def test_reader_returns_recent_records_before_following() -> None:
    reader = reader_of(FollowStream(JOB, recent=3), numbered=False)
    assert next_request(reader) == {"read_stream": JOB, "recent": 3}
    assert reader.read(packet(6)) == ("r6",)
    reader.interrupted(LOST, 1.0)
    assert next_request(reader) == {"follow_stream": JOB, "since": 7}


def test_reader_without_records_follows_from_zero() -> None:
    reader = reader_of(FollowStream(JOB), numbered=False)
    next_request(reader)
    reader.interrupted(LOST, 1.0)
    assert next_request(reader) == {"read_stream": JOB, "recent": 1}
    assert reader.read(CONTINUE) == ()
    assert next_request(reader) == {"follow_stream": JOB, "since": 0}
    assert reader.read(packet(0)) == ("r0",)


def test_reader_of_ended_job_finishes_immediately() -> None:
    reader = reader_of(FollowStream(JOB), numbered=False)
    next_request(reader)
    assert reader.read(packet(9)) == ()
    assert reader.read(END) == ()
    assert reader.finished


@pytest.mark.parametrize("since", [None, 4])
def test_reader_second_silent_close_raises(since: int | None) -> None:
    reader = reader_of(FollowStream(JOB, since=since), numbered=False)
    next_request(reader)
    reader.interrupted(SILENCE, 0.1)
    again = next_request(reader)
    assert again == ({"read_stream": JOB, "recent": 1} if since is None else {"read_stream": JOB, "since": 4})
    with pytest.raises(CommunicationError) as caught:
        reader.interrupted(SILENCE, 0.2)
    assert caught.value is SILENCE


def test_reader_late_silent_close_is_an_outage() -> None:
    """The job has no records for an hour; then the dispatcher is killed twice."""
    reader = reader_of(FollowStream(JOB, since=0), numbered=False)
    next_request(reader)
    reader.interrupted(SILENCE, 3600.0)
    for _ in range(2):
        assert next_request(reader) == {"follow_stream": JOB, "since": 0}
        reader.interrupted(SILENCE, 3600.0)


def test_reader_follows_after_a_reply() -> None:
    reader = reader_of(FollowStream(JOB, since=4), numbered=False)
    next_request(reader)
    reader.interrupted(SILENCE, 0.1)
    assert next_request(reader) == {"read_stream": JOB, "since": 4}
    assert reader.read(packet(4)) == ("r4",)
    assert reader.read(CONTINUE) == ()
    assert next_request(reader) == {"follow_stream": JOB, "since": 5}


def test_reader_of_read_stream_never_reconnects() -> None:
    reader = reader_of(ReadStream(JOB), numbered=False)
    assert next_request(reader) == {"read_stream": JOB}
    reader.read(packet(0))
    with pytest.raises(CommunicationError):
        reader.interrupted(LOST, 1.0)
