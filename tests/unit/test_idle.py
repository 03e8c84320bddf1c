"""Connections that wait for another call: which is given, which is dropped, and that none is given twice."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

from harp._core.connection_pool import ConnectionPool


class Conn:
    """What waits: counts its users, and knows whether it was dropped."""

    def __init__(self) -> None:
        self.fit = True
        self.dropped = False
        self.users = 0

    def is_idle(self) -> bool:
        return self.fit

    def close_threadsafe(self) -> None:
        self.dropped = True


def test_the_one_used_last_is_given_first() -> None:
    idle, conns = ConnectionPool[Conn](True), [Conn() for _ in range(3)]
    for conn in conns:
        idle.put(conn, 60, now=0)
    assert [idle.take(1) for _ in range(4)] == [*reversed(conns), None]
    assert not any(conn.dropped for conn in conns)


def test_half_of_the_time_counts() -> None:
    idle, conn = ConnectionPool[Conn](True), Conn()
    idle.put(conn, 60, now=100)
    assert idle.take(129.9) is conn
    idle.put(conn, 60, now=100)
    assert idle.take(130) is None
    assert conn.dropped


def test_what_is_not_fit_is_dropped() -> None:
    idle, good, bad = ConnectionPool[Conn](True), Conn(), Conn()
    for conn in (good, bad):
        idle.put(conn, 60, now=0)
    bad.fit = False
    assert idle.take(1) is good
    assert (good.dropped, bad.dropped) == (False, True)


def test_there_is_a_bound_and_the_oldest_go() -> None:
    idle, conns = ConnectionPool[Conn](True), [Conn() for _ in range(40)]
    for conn in conns:
        idle.put(conn, 60, now=0)
    assert [conn.dropped for conn in conns] == [True] * 8 + [False] * 32


def test_what_has_waited_too_long_goes_though_others_are_used() -> None:
    idle, first, second = ConnectionPool[Conn](True), Conn(), Conn()
    idle.put(first, 60, now=0)
    idle.put(second, 60, now=20)
    assert idle.take(29) is second
    idle.put(second, 60, now=31)
    assert (first.dropped, second.dropped) == (True, False)


def test_drained_ones_are_the_callers() -> None:
    idle, conns = ConnectionPool[Conn](True), [Conn(), Conn()]
    for conn in conns:
        idle.put(conn, 60, now=0)
    assert set(idle.drain()) == set(conns)
    assert idle.drain() == []
    assert idle.take(1) is None
    assert not any(conn.dropped for conn in conns)


def test_the_rest_is_dropped_with_the_object() -> None:
    idle, conn = ConnectionPool[Conn](True), Conn()
    idle.put(conn, 60, now=0)
    del idle
    gc.collect()
    assert conn.dropped


def test_no_two_threads_have_one() -> None:
    threads, rounds = 8, 2000
    idle = ConnectionPool[Conn](True)
    made: list[Conn] = []
    shared: list[Conn] = []
    start = threading.Barrier(threads)

    def work() -> None:
        start.wait(30)
        for number in range(rounds):
            conn = idle.take(number)
            if conn is None:
                conn = Conn()
                made.append(conn)
            conn.users += 1
            if conn.users > 1:
                shared.append(conn)
            conn.users -= 1
            idle.put(conn, 1e6, number)

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work) for _ in range(threads)]:
            done.result()
    assert not shared
    assert len(made) <= threads
    assert set(idle.drain()) == set(made)
