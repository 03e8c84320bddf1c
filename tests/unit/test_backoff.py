"""The delays between repeated attempts."""

from __future__ import annotations

from harp_daemon.timer_wheel import Backoff


def test_backoff_repeated_attempts_double_the_delay() -> None:
    backoff = Backoff(0.2, 5.0)
    assert backoff.next_delay() == 0.0
    pauses = []
    for _ in range(40):
        backoff.record_attempt()
        pauses.append(backoff.next_delay())
    assert 0.2 <= pauses[0] <= 0.4
    assert all(2.5 <= pause <= 5.0 for pause in pauses[5:])
    assert len(set(pauses)) > 30
    backoff.reset()
    assert 0.1 <= backoff.next_delay() <= 0.2  # the last attempt was a moment ago
