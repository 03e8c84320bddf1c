"""The memory that all long request lines share."""

from __future__ import annotations

from harp_daemon.memory_quota import MemoryQuota, Reservation

#: Bytes of each reservation that are not counted.
FREE = 64 * 1024


def available(quota: MemoryQuota, size: int) -> bool:
    """Return whether exactly these bytes are left."""
    if not quota.try_reserve(size):
        return False
    more = quota.try_reserve(1)
    quota.release(size + more)
    return not more


def test_quota_reserves_up_to_its_limit() -> None:
    quota = MemoryQuota(100)
    assert quota.try_reserve(60)
    assert not quota.try_reserve(41)
    assert quota.try_reserve(40)
    quota.release(100)
    assert available(quota, 100)


def test_reservation_counts_bytes_beyond_the_free_ones() -> None:
    quota = MemoryQuota(100)
    with Reservation(quota) as reservation:
        assert reservation.grow(FREE)
        assert available(quota, 100)
        assert reservation.grow(30)
        assert reservation.grow(20)
        assert available(quota, 50)
    assert available(quota, 100)


def test_reservation_refused_reserves_nothing() -> None:
    quota = MemoryQuota(100)
    with Reservation(quota) as first, Reservation(quota) as second:
        assert first.grow(FREE + 60)
        assert not second.grow(FREE + 41)
        assert available(quota, 40)
    assert available(quota, 100)


def test_reservation_released_twice_frees_its_bytes_once() -> None:
    """A request is released when its call was accepted, and again at the end of its connection."""
    quota = MemoryQuota(100)
    with Reservation(quota) as reservation:
        assert reservation.grow(FREE + 60)
        reservation.release()
        assert available(quota, 100)
    assert available(quota, 100)
