"""How an interrupted reader goes on, decided from errors, lines and times alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from harp._core.operations import Job
from harp._core.retry import ReconnectPolicy, parse_reconnect
from harp._core.streams import StreamReader
from harp.errors import CommunicationError, HarpException, RemoteError
from harp.protocol.requests import FollowStream, ReadStream

JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"


def error_of(cause: BaseException | None) -> CommunicationError:
    error = CommunicationError("h:1: reading: it broke")
    error.__cause__ = cause
    return error


LOST = error_of(ConnectionResetError())
SILENCE = error_of(EOFError())
STORAGE = RemoteError("storage_error", "the disk is full")


def patience(seconds: float = 300.0, connected: float | None = 0.0) -> ReconnectPolicy:
    made = ReconnectPolicy(seconds)
    if connected is not None:
        made.connected(connected)
    return made


@pytest.mark.parametrize("cause", [OSError(), ConnectionRefusedError(), TimeoutError(), EOFError()])
def test_an_interruption_is_waited_out(cause: Exception) -> None:
    assert 0.05 <= patience().next_pause(error_of(cause), 1.0) <= 0.1


@pytest.mark.parametrize(
    ("error", "made"),
    [
        (error_of(ValueError("garbage")), patience),
        (error_of(None), patience),  # closed on this side
        (RemoteError("invalid_jobid", "m"), patience),
        (STORAGE, patience),  # there is no interruption
        (HarpException("wrong use"), patience),
        (LOST, lambda: patience(0)),
        (LOST, lambda: patience(connected=None)),  # the first connection
    ],
)
def test_everything_else_is_raised_as_it_is(error: HarpException, made: Callable[[], ReconnectPolicy]) -> None:
    with pytest.raises(type(error)) as caught:
        made().next_pause(error, 1.0)
    assert caught.value is error


def test_pauses_grow_and_are_spread() -> None:
    runs = []
    for _ in range(20):
        tried = patience()
        runs.append([tried.next_pause(LOST, float(now)) for now in range(8)])
    for pauses in zip(*runs, strict=True):
        assert len(set(pauses)) > 1
    for pause, most in zip(zip(*runs, strict=True), [0.1, 0.2, 0.4, 0.8, 1.6, 2, 2, 2], strict=True):
        assert all(most / 2 <= found <= most for found in pause)


def test_the_time_over_is_told_with_the_last_error() -> None:
    tried = patience(5)
    assert tried.next_pause(LOST, 100.0)
    assert tried.next_pause(LOST, 104.99) <= 0.011  # the last attempt comes when the time is over
    with pytest.raises(CommunicationError, match=r"it broke; gave up after 2 attempts in 5 s") as caught:
        tried.next_pause(LOST, 105.0)
    assert caught.value.__cause__ is LOST


def test_storage_that_is_away_passes_while_reconnecting() -> None:
    tried = patience(5)
    tried.next_pause(LOST, 0.0)
    tried.connected(1.0)
    assert tried.next_pause(STORAGE, 1.0)
    with pytest.raises(RemoteError) as caught:
        tried.next_pause(STORAGE, 5.0)
    assert caught.value is STORAGE


def test_success_starts_the_clock_anew() -> None:
    tried = patience(5)
    tried.next_pause(LOST, 0.0)
    tried.connected(1.0)
    tried.end_outage()
    assert tried.attempts == 0
    assert tried.next_pause(LOST, 100.0) <= 0.1


def test_a_connection_that_stood_was_a_success() -> None:
    tried = patience(300)
    tried.next_pause(LOST, 0.0)
    tried.connected(10.0)
    tried.next_pause(LOST, 20.0)  # not long enough: the outage goes on
    assert tried.attempts == 2
    tried.connected(20.0)
    assert tried.next_pause(LOST, 1000.0)  # long enough
    assert tried.attempts == 1


def test_a_dispatcher_that_only_accepts_is_given_up() -> None:
    tried, now = patience(10), 0.0
    with pytest.raises(CommunicationError, match="in 10 s"):
        for _ in range(100):
            now += tried.next_pause(SILENCE, now)
            tried.connected(now)
    assert now <= 10.1


@pytest.mark.parametrize(
    ("option", "seconds"), [(None, 0), (False, 0), (0, 0), (2.5, 2.5), (math.inf, math.inf), (10**400, math.inf)]
)
def test_the_option(option: Any, seconds: float) -> None:
    assert parse_reconnect(option) == seconds


# A reader, line by line: what it asks, and what it gives.


def asked(reader: StreamReader) -> dict[str, Any] | None:
    line = reader.take_request()
    if line is None:
        return None
    reader.connected(0.0)
    request: dict[str, Any] = json.loads(line)
    assert request.pop("harpcaller") == 1
    return request


def packet(number: int) -> bytes:
    return json.dumps({"packet": number, "data": f"r{number}"}).encode()


CONTINUE = b'{"continue": true}'
END = b'{"result": 1}'


def test_a_number_is_gone_on_from() -> None:
    reader = StreamReader(Job(JOB), FollowStream(JOB, since=3), numbered=True, reconnect=300)
    assert asked(reader) == {"follow_stream": JOB, "since": 3}
    assert asked(reader) is None
    assert reader.read(packet(3)) == ((3, "r3"),)
    reader.interrupted(LOST, 1.0)
    assert asked(reader) == {"follow_stream": JOB, "since": 4}
    reader.interrupted(SILENCE, 2.0)  # heard before: silence is an outage
    assert asked(reader) == {"follow_stream": JOB, "since": 4}
    assert reader.read(packet(4)) == ((4, "r4"),)
    assert reader.read(END) == ()
    assert reader.finished


@pytest.mark.parametrize("recent", [None, 0])
def test_the_number_is_learned_first(recent: int | None) -> None:
    reader = StreamReader(Job(JOB), FollowStream(JOB, recent=recent), numbered=True, reconnect=300)
    assert asked(reader) == {"read_stream": JOB, "recent": 1}
    assert reader.read(packet(6)) == ()  # it was there before
    assert reader.read(packet(7)) == ((7, "r7"),)  # it came meanwhile
    assert reader.read(CONTINUE) == ()
    assert not reader.finished
    assert asked(reader) == {"follow_stream": JOB, "since": 8}


def test_recent_records_are_given_while_the_number_is_learned() -> None:
    reader = StreamReader(Job(JOB), FollowStream(JOB, recent=3), numbered=False, reconnect=300)
    assert asked(reader) == {"read_stream": JOB, "recent": 3}
    assert reader.read(packet(6)) == ("r6",)
    reader.interrupted(LOST, 1.0)
    assert asked(reader) == {"follow_stream": JOB, "since": 7}


def test_no_record_so_far() -> None:
    reader = StreamReader(Job(JOB), FollowStream(JOB), numbered=False, reconnect=300)
    asked(reader)
    reader.interrupted(LOST, 1.0)
    assert asked(reader) == {"read_stream": JOB, "recent": 1}
    assert reader.read(CONTINUE) == ()
    assert asked(reader) == {"follow_stream": JOB, "since": 0}
    assert reader.read(packet(0)) == ("r0",)


def test_the_end_may_come_at_once() -> None:
    reader = StreamReader(Job(JOB), FollowStream(JOB), numbered=False, reconnect=300)
    asked(reader)
    assert reader.read(packet(9)) == ()
    assert reader.read(END) == ()
    assert reader.finished


@pytest.mark.parametrize("since", [None, 4])
def test_the_second_silence_is_the_answer(since: int | None) -> None:
    reader = StreamReader(Job(JOB), FollowStream(JOB, since=since), numbered=False, reconnect=300)
    asked(reader)
    reader.interrupted(SILENCE, 0.1)
    again = asked(reader)
    assert again == ({"read_stream": JOB, "recent": 1} if since is None else {"read_stream": JOB, "since": 4})
    with pytest.raises(CommunicationError) as caught:
        reader.interrupted(SILENCE, 0.2)
    assert caught.value is SILENCE


def test_a_silence_that_lasted_is_no_answer() -> None:
    """The job had no records for a while; then the dispatcher was killed twice."""
    reader = StreamReader(Job(JOB), FollowStream(JOB, since=0), numbered=False, reconnect=300)
    asked(reader)
    reader.interrupted(SILENCE, 3600.0)
    for _ in range(2):
        assert asked(reader) == {"follow_stream": JOB, "since": 0}
        reader.interrupted(SILENCE, 3600.0)


def test_a_question_that_is_answered_is_followed() -> None:
    reader = StreamReader(Job(JOB), FollowStream(JOB, since=4), numbered=False, reconnect=300)
    asked(reader)
    reader.interrupted(SILENCE, 0.1)
    assert asked(reader) == {"read_stream": JOB, "since": 4}
    assert reader.read(packet(4)) == ("r4",)
    assert reader.read(CONTINUE) == ()
    assert asked(reader) == {"follow_stream": JOB, "since": 5}


def test_what_is_read_only_is_never_asked_again() -> None:
    reader = StreamReader(Job(JOB), ReadStream(JOB), numbered=False, reconnect=300)
    assert asked(reader) == {"read_stream": JOB}
    reader.read(packet(0))
    with pytest.raises(CommunicationError):
        reader.interrupted(LOST, 1.0)
