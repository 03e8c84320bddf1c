"""The pool of waiting connections: which one is used next, which are closed, and that no connection is used twice."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

from harp._core.connections import Connection, ConnectionPool


class Conn(Connection):
    """A connection that counts its users."""

    def __init__(self) -> None:
        self.fit = True
        self.closed = False
        self.users = 0

    def is_idle(self) -> bool:
        return self.fit

    def close_threadsafe(self) -> None:
        self.closed = True


def test_pool_returns_most_recently_used_first() -> None:
    pool, conns = ConnectionPool[Conn](True), [Conn() for _ in range(3)]
    for conn in conns:
        pool.put(conn, 60, now=0)
    assert [pool.get(1) for _ in range(4)] == [*reversed(conns), None]
    assert not any(conn.closed for conn in conns)


def test_pool_uses_half_of_the_granted_time() -> None:
    pool, conn = ConnectionPool[Conn](True), Conn()
    pool.put(conn, 60, now=100)
    assert pool.get(129.9) is conn
    pool.put(conn, 60, now=100)
    assert pool.get(130) is None
    assert conn.closed


def test_pool_closes_connection_that_is_not_idle() -> None:
    pool, good, bad = ConnectionPool[Conn](True), Conn(), Conn()
    for conn in (good, bad):
        pool.put(conn, 60, now=0)
    bad.fit = False
    assert pool.get(1) is good
    assert (good.closed, bad.closed) == (False, True)


def test_pool_over_capacity_closes_the_oldest() -> None:
    pool, conns = ConnectionPool[Conn](True), [Conn() for _ in range(40)]
    for conn in conns:
        pool.put(conn, 60, now=0)
    assert [conn.closed for conn in conns] == [True] * 8 + [False] * 32


def test_pool_closes_expired_connection_on_put() -> None:
    pool, first, second = ConnectionPool[Conn](True), Conn(), Conn()
    pool.put(first, 60, now=0)
    pool.put(second, 60, now=20)
    assert pool.get(29) is second
    pool.put(second, 60, now=31)
    assert (first.closed, second.closed) == (True, False)


def test_closed_pool_can_be_used_again() -> None:
    pool, conns = ConnectionPool[Conn](True), [Conn(), Conn()]
    for _ in range(2):
        for conn in conns:
            conn.closed = False
            pool.put(conn, 60, now=0)
        pool.close()
        assert pool.get(1) is None
        assert all(conn.closed for conn in conns)


def test_pool_closes_connections_when_deleted() -> None:
    pool, conn = ConnectionPool[Conn](True), Conn()
    pool.put(conn, 60, now=0)
    del pool
    gc.collect()
    assert conn.closed


def test_threads_never_share_a_connection() -> None:
    threads, rounds = 8, 2000
    pool = ConnectionPool[Conn](True)
    made: list[Conn] = []
    shared: list[Conn] = []
    start = threading.Barrier(threads)

    def work() -> None:
        start.wait(30)
        for number in range(rounds):
            conn = pool.get(number)
            if conn is None:
                conn = Conn()
                made.append(conn)
            conn.users += 1
            if conn.users > 1:
                shared.append(conn)
            conn.users -= 1
            pool.put(conn, 1e6, number)

    with ThreadPoolExecutor(threads) as executor:
        for done in [executor.submit(work) for _ in range(threads)]:
            done.result()
    assert not shared
    assert len(made) <= threads
    pool.close()
    assert all(conn.closed for conn in made)
