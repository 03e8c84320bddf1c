"""How long a host may be away: counted on the system's own clock, across restarts, never on the wall's."""

from __future__ import annotations

import json
import time

import pytest

from harp.protocol.json_text import Raw
from harpcaller.runs.outage import LostContact, Pace


def boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def test_the_deadline_counts_from_what_was_heard() -> None:
    lost = LostContact.begin(30.0, 1000.0)
    assert lost.wall == 970.0
    assert lost.deadline(300.0) == pytest.approx(time.monotonic() + 270.0, abs=5.0)


def test_an_earlier_dispatchers_count_goes_on_whatever_the_wall_clock_says() -> None:
    before = LostContact.begin(30.0, 1000.0)
    before.attempts = 7
    before.failed("refused")
    after = LostContact.resumed(Raw(json.dumps(before.fact()).encode()), wall=5.0)
    assert (after.wall, after.attempts, after.error, after.noted) == (970.0, 7, "refused", True)
    assert after.deadline(300.0) == pytest.approx(before.deadline(300.0), abs=1.0)


@pytest.mark.parametrize("fact", [None, b"null", b'{"boot": "another", "boottime": 1, "since": 1, "attempts": 1}'])
def test_what_is_not_of_this_start_of_the_system_counts_anew(fact: bytes | None) -> None:
    lost = LostContact.resumed(None if fact is None else Raw(fact), wall=50.0)
    assert (lost.wall, lost.attempts, lost.noted) == (50.0, 0, False)
    assert lost.since == pytest.approx(boottime(), abs=5.0)


def test_pauses_grow_up_to_a_bound_and_differ() -> None:
    pace = Pace()
    assert pace.pause() == 0.0
    pauses = []
    for _ in range(40):
        pace.tried()
        pauses.append(pace.pause())
    assert 0.2 <= pauses[0] <= 0.4
    assert all(2.5 <= pause <= 5.0 for pause in pauses[5:])
    assert len(set(pauses)) > 30
    pace.progress()
    assert 0.1 <= pace.pause() <= 0.2  # it was asked a moment ago


def test_it_says_since_when_and_what_was_tried() -> None:
    lost = LostContact.begin(0.0, 1000.0)
    assert lost.told() == "since 1970-01-01T00:16:40+00:00; nothing was tried; the last error: none"
    lost.attempts = 3
    lost.failed("refused")
    assert lost.told().endswith("3 attempts to reach it again; the last error: refused")


def test_an_error_is_kept_up_to_a_bound() -> None:
    lost = LostContact.begin(0.0, 1000.0)
    lost.failed("x" * 1_000_000)
    assert len(lost.told()) < 2000
