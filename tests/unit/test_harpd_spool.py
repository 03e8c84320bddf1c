"""The spool: numbered records, read from any number on, deleted only when they are acknowledged."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from harpd.supervisor.fair_shares import Account, FairShares
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


ONE, OTHER = Account("one", "owner"), Account("other", "owner")


def test_quota_used_up_pauses_large_spools() -> None:
    memory = SpoolQuota(3 * GUARANTEED_BYTES)
    woken: list[str] = []
    memory.reserve(ONE, 3 * GUARANTEED_BYTES)
    assert not memory.may_grow(ONE, lambda: woken.append("large"))
    memory.release(ONE, 0)
    assert woken == []
    memory.release(ONE, 1)
    memory.release(ONE, 1)
    assert woken == ["large"]
    assert memory.may_grow(ONE, lambda: woken.append("again"))


def test_quota_used_up_by_one_user_has_a_share_for_others() -> None:
    memory = SpoolQuota(4 * GUARANTEED_BYTES)
    memory.reserve(ONE, 8 * GUARANTEED_BYTES)
    assert memory.is_exhausted(ONE)
    assert not memory.is_exhausted(OTHER)
    woken: list[str] = []
    memory.reserve(OTHER, 2 * GUARANTEED_BYTES - 1)
    assert memory.may_grow(OTHER, lambda: woken.append("other"))
    memory.reserve(OTHER, 1)
    assert not memory.may_grow(OTHER, lambda: woken.append("other"))
    assert not memory.is_exhausted(OTHER)
    memory.release(ONE, 1)
    assert woken == []
    memory.release(OTHER, 1)
    assert woken == ["other"]


def test_shares_are_equal_for_users_and_for_owners_of_a_user() -> None:
    shares, limit = FairShares(), 100

    def fill(user: str, owner: str) -> int:
        account, count = Account(user, owner), 0
        while shares.may_add(account, limit):
            shares.add(account, 1)
            count += 1
        return count

    assert fill("greedy", "a") == 100
    assert [fill("greedy", owner) for owner in "bcde"] == [50, 33, 17, 0]  # at most twice the share
    assert [fill("greedy", str(number)) for number in range(1000)] == [0] * 1000
    assert fill("second", "a") == 50
    assert fill("third", "a") == 33
    assert not shares.may_add(Account("greedy", "a"), limit)
    assert fill("fourth", "a") == 25


def test_shares_forget_users_without_amount() -> None:
    shares = FairShares()
    shares.add(ONE, 10)
    shares.add(OTHER, 5)
    shares.add(OTHER, -5)
    assert not shares.may_add(ONE, 10)
    shares.add(ONE, -1)
    assert shares.may_add(ONE, 10)
    assert shares.total == 9


def test_shares_of_many_owners_take_no_long_turn() -> None:
    shares, owners = FairShares(), 20_000
    for number in range(owners):
        shares.add(Account("user", str(number)), 10)
    began_at = time.process_time()  # of this process, so that others do not count
    for number in range(owners):
        assert not shares.may_add(Account("user", str(number)), 5 * owners + 5)
    assert time.process_time() - began_at < 1
