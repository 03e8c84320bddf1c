"""An outage of a host: its deadline, the delays between attempts, its description."""

from __future__ import annotations

import time

import pytest

from harpcaller.runs.deadlines import Outage


def test_outage_deadline_counts_from_the_last_message() -> None:
    outage = Outage.started_ago(30.0, 1000.0)
    assert outage.since == 970.0
    assert outage.deadline(300.0) == pytest.approx(time.monotonic() + 270.0, abs=5.0)


def test_outage_description_has_start_attempts_and_error() -> None:
    outage = Outage.started_ago(0.0, 1000.0)
    assert outage.describe() == "since 1970-01-01T00:16:40+00:00; no attempt to reach it again; last error: none"
    outage.attempts = 3
    outage.record_error("refused")
    assert outage.describe().endswith("3 attempts to reach it again; last error: refused")
    assert outage.as_json() == {"since": 1000.0, "attempts": 3, "error": "refused"}


def test_outage_with_a_long_error_cuts_it() -> None:
    outage = Outage.started_ago(0.0, 1000.0)
    outage.record_error("x" * 1_000_000)
    assert len(outage.describe()) < 2000
