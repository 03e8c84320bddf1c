"""The memory that all long request lines share."""

from __future__ import annotations

from harp_daemon.memory_quota import MemoryQuota, Reservation

#: Bytes of each reservation that are not counted.
FREE = 64 * 1024


def test_reservation_counts_bytes_beyond_the_free_bytes() -> None:
    quota = MemoryQuota(100)
    reservation = Reservation(quota)
    assert reservation.grow(FREE)
    assert quota.available == 100
    assert reservation.grow(30)
    assert reservation.grow(20)
    assert quota.available == 50
    reservation.release()
    assert quota.available == 100


def test_reservation_refused_has_no_effect() -> None:
    quota = MemoryQuota(100)
    first, second = Reservation(quota), Reservation(quota)
    assert first.grow(FREE + 60)
    assert not second.grow(FREE + 41)
    assert quota.available == 40
    first.release()
    second.release()
    assert quota.available == 100


def test_reservation_released_twice_frees_its_bytes_once() -> None:
    """A request is released when its call was accepted, and again at the end of its connection."""
    quota = MemoryQuota(100)
    reservation = Reservation(quota)
    assert reservation.grow(FREE + 60)
    reservation.release()
    reservation.release()
    assert quota.available == 100
