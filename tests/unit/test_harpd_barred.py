"""`harpd.supervisor.tombstones`: ids that can't start any more."""

from __future__ import annotations

from harpd.supervisor.tombstones import BarredIds


def test_an_id_is_barred_for_its_owner_alone() -> None:
    barred = BarredIds(10.0, 0.0)
    barred.add("one", "id", 1.0)
    assert barred.has("one", "id")
    assert not barred.has("other", "id")
    assert not barred.has("one", "other")
    assert not barred.has("onei", "d")
    assert not barred.has("1 one", "id")


def test_each_id_is_barred_for_its_time_and_all_are_forgotten_in_the_end() -> None:
    barred = BarredIds(10.0, 0.0)
    most = 0
    for second in range(1000):
        barred.add("one", str(second), float(second))
        most = max(most, len(barred))
        assert all(barred.has("one", str(earlier)) for earlier in range(max(0, second - 10), second + 1))
    assert most <= 23
    assert not barred.has("one", "900")


def test_after_a_long_pause_nothing_old_is_left() -> None:
    barred = BarredIds(10.0, 0.0)
    barred.add("one", "old", 1.0)
    barred.add("one", "new", 100.0)
    assert (len(barred), barred.has("one", "new")) == (1, True)


def test_any_text_is_an_id() -> None:
    barred = BarredIds(10.0, 0.0)
    barred.add("\ud800", "\udfff" * 1000, 1.0)
    assert barred.has("\ud800", "\udfff" * 1000)
