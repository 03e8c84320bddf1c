"""The time limits of a call, on a clock of the test."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from harp.protocol.json_text import Raw
from harpcaller.model.jobs import Job, State
from harpcaller.runs import deadlines as limits
from harpcaller.runs.deadlines import Deadlines

NULL = Raw(b"null")


class Clock:
    """A clock that only `pass_` advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(limits, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def of_a_job(timeout: float = 600.0, max_exec_time: float = 60.0, acknowledgement: float = 30.0) -> Deadlines:
    job = Job(
        "id", State.RUNNING, "web01", "p", NULL, timeout, max_exec_time, None, NULL, 0.0, 0.0, None, None, 0, True
    )
    return Deadlines(job, acknowledgement)


def end(limits: Deadlines, ended: bool = False) -> str | None:
    failed = limits.expired("host web01", ended)
    return failed.type if failed else None


def test_deadlines_resumable_call_has_a_margin(clock: Clock) -> None:
    watched = of_a_job()
    watched.on_request_sent()
    watched.on_acknowledged(0.0)
    clock.pass_(74.0)
    assert end(watched) is None
    clock.pass_(2.0)
    assert end(watched) == "timeout"


def test_deadlines_bound_call_has_no_margin(clock: Clock) -> None:
    watched = of_a_job()
    watched.on_request_sent()
    watched.on_acknowledged(None)
    watched.postpone()  # for resumable calls only
    clock.pass_(61.0)
    assert end(watched) == "timeout"


@pytest.mark.parametrize("timeout", [5.0, 600.0])
@pytest.mark.parametrize("ended", [False, True])
def test_deadlines_attach_waits_for_the_acknowledgement(clock: Clock, timeout: float, ended: bool) -> None:
    watched = of_a_job(timeout)
    clock.pass_(10_000.0)
    watched.on_request_sent(reattach=True)
    clock.pass_(29.0)
    assert end(watched, ended) is None
    clock.pass_(2.0)
    assert end(watched, ended) == "network_error"


def test_deadlines_late_attach_has_time_to_deliver(clock: Clock) -> None:
    watched = of_a_job()
    watched.on_request_sent(reattach=True)
    watched.on_acknowledged(10_000.0)
    clock.pass_(14.0)
    assert end(watched) is None
    watched.on_record()
    clock.pass_(14.0)
    assert end(watched) is None
    clock.pass_(2.0)
    assert end(watched) == "timeout"


def test_deadlines_delivery_time_is_bounded(clock: Clock) -> None:
    watched = of_a_job()
    for _ in range(100):
        watched.on_request_sent(reattach=True)
        watched.on_acknowledged(0.0)
        watched.on_record()
        if end(watched) is not None:
            break
        clock.pass_(10.0)
    assert 60 + 15 + 600 <= clock.now - 1000.0 <= 60 + 15 + 600 + 20


def test_deadlines_are_postponed_while_the_store_fails(clock: Clock) -> None:
    watched = of_a_job()
    watched.on_request_sent()
    watched.on_acknowledged(0.0)
    for _ in range(500):
        clock.pass_(10.0)
        watched.on_message()  # a heartbeat
        watched.postpone()
        assert end(watched) is None
    clock.pass_(16.0)
    assert end(watched) == "timeout"


def test_deadlines_host_cannot_extend_them(clock: Clock) -> None:
    watched = of_a_job()
    watched.on_request_sent()
    watched.on_acknowledged(0.0)
    clock.pass_(50.0)
    watched.on_request_sent(reattach=True)
    watched.on_acknowledged(0.0)
    clock.pass_(26.0)
    assert end(watched) == "timeout"


def test_deadlines_silent_resumable_call_times_out(clock: Clock) -> None:
    """The host enforces `timeout`; the fallback waits for `max_exec_time` more, as a bound call would not."""
    watched = of_a_job(timeout=1.0, max_exec_time=5.0)
    watched.on_request_sent()
    watched.on_acknowledged(0.0)
    clock.pass_(5.9)
    assert end(watched) is None
    watched.on_message()
    clock.pass_(5.9)
    assert end(watched) is None
    clock.pass_(0.2)
    failed = watched.expired("host web01", False)
    assert failed is not None
    assert (failed.type, failed.message) == ("timeout", "reading the result: no message from host web01 for 1 s")
