"""The spool: numbered records, read from any number on, deleted only when they are acknowledged."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from harpd.supervisor.spool import GUARANTEED_BYTES, Spool, SpoolQuota


def lines(first: int, count: int) -> bytes:
    return b"".join(b'{"stream":%d}\n' % number for number in range(first, first + count))


def read(spool: Spool, number: int) -> bytes:
    found = b""
    while number < spool.end:
        piece = spool.chunk_from(number)
        assert piece.first == number
        found += piece.lines
        number = piece.first + piece.count
    return found


@given(st.lists(st.integers(1, 5), max_size=8), st.data())
def test_spool_has_unacknowledged_records_from_any_number(counts: list[int], data: st.DataObject) -> None:
    spool = Spool()
    for at, count in enumerate(counts):
        spool.append(lines(spool.end, count), count, float(at))
    acknowledged = data.draw(st.integers(0, spool.end))
    before = spool.size
    given_back = spool.acknowledge(acknowledged)
    assert before - spool.size == given_back
    assert spool.first <= acknowledged <= spool.end == sum(counts)
    since = data.draw(st.integers(acknowledged, spool.end))
    assert read(spool, since) == lines(since, spool.end - since)


def test_acknowledge_frees_whole_chunks_only() -> None:
    spool = Spool()
    spool.append(lines(0, 2), 2, 1.0)
    spool.append(lines(2, 2), 2, 2.0)
    assert (spool.acknowledge(1), spool.first) == (0, 0)
    assert (spool.acknowledge(2), spool.first) == (len(lines(0, 2)), 2)
    assert (spool.acknowledge(4), spool.first, spool.size) == (len(lines(2, 2)), 4, 0)


def test_chunk_has_arrival_time() -> None:
    spool = Spool()
    spool.append(lines(0, 3), 3, 12.5)
    spool.append(lines(3, 1), 1, 13.5)
    pieces = [spool.chunk_from(1), spool.chunk_from(3)]
    assert [(piece.first, piece.count, piece.time) for piece in pieces] == [(1, 2, 12.5), (3, 1, 13.5)]


def test_quota_used_up_pauses_large_spools() -> None:
    memory = SpoolQuota(3 * GUARANTEED_BYTES)
    woken: list[str] = []
    memory.reserve(3 * GUARANTEED_BYTES)
    assert not memory.may_grow(lambda: woken.append("large"))
    memory.release(0)
    assert woken == []
    memory.release(1)
    memory.release(1)
    assert woken == ["large"]
    assert memory.may_grow(lambda: woken.append("again"))
