"""Tombstones: ids that must not start."""

from __future__ import annotations

import pytest

from harpd.supervisor.registry import TombstoneSet


def test_tombstone_counts_for_its_owner_only() -> None:
    barred = TombstoneSet(10.0, 0.0)
    barred.add("one", "id", 1.0)
    assert barred.contains("one", "id")
    assert not barred.contains("other", "id")
    assert not barred.contains("one", "other")
    assert not barred.contains("onei", "d")
    assert not barred.contains("1 one", "id")


def test_tombstone_stays_for_ttl_then_expires() -> None:
    barred = TombstoneSet(10.0, 0.0)
    for second in range(1000):
        barred.add("one", str(second), float(second))
        assert all(barred.contains("one", str(earlier)) for earlier in range(max(0, second - 10), second + 1))
        assert not any(barred.contains("one", str(earlier)) for earlier in range(second - 22))


def test_tombstones_expire_after_long_pause() -> None:
    barred = TombstoneSet(10.0, 0.0)
    barred.add("one", "old", 1.0)
    barred.add("one", "new", 100.0)
    assert (barred.contains("one", "old"), barred.contains("one", "new")) == (False, True)


def test_tombstone_of_any_text() -> None:
    barred = TombstoneSet(10.0, 0.0)
    barred.add("\ud800", "\udfff" * 1000, 1.0)
    assert barred.contains("\ud800", "\udfff" * 1000)


def test_tombstones_of_a_period_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harpd.supervisor.registry._MAX_TOMBSTONES", 3)
    barred = TombstoneSet(10.0, 0.0)
    for number in range(3):
        assert not barred.is_full(1.0)
        barred.add("one", str(number), 1.0)
    assert barred.is_full(9.0)
    assert not barred.is_full(10.5), "the next period has room"
