"""`harpd.supervisor.tombstones`: ids that can't start any more."""

from __future__ import annotations

from harpd.supervisor.tombstones import TombstoneSet


def test_an_id_is_barred_for_its_owner_alone() -> None:
    barred = TombstoneSet(10.0, 0.0)
    barred.add("one", "id", 1.0)
    assert barred.contains("one", "id")
    assert not barred.contains("other", "id")
    assert not barred.contains("one", "other")
    assert not barred.contains("onei", "d")
    assert not barred.contains("1 one", "id")


def test_each_id_is_barred_for_its_time_and_all_are_forgotten_in_the_end() -> None:
    barred = TombstoneSet(10.0, 0.0)
    most = 0
    for second in range(1000):
        barred.add("one", str(second), float(second))
        most = max(most, len(barred))
        assert all(barred.contains("one", str(earlier)) for earlier in range(max(0, second - 10), second + 1))
    assert most <= 23
    assert not barred.contains("one", "900")


def test_after_a_long_pause_nothing_old_is_left() -> None:
    barred = TombstoneSet(10.0, 0.0)
    barred.add("one", "old", 1.0)
    barred.add("one", "new", 100.0)
    assert (len(barred), barred.contains("one", "new")) == (1, True)


def test_any_text_is_an_id() -> None:
    barred = TombstoneSet(10.0, 0.0)
    barred.add("\ud800", "\udfff" * 1000, 1.0)
    assert barred.contains("\ud800", "\udfff" * 1000)
