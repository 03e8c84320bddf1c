"""The pool of idle connections to hosts: which connection is returned, when one expires, how many the pool stores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from harp_daemon.timer_wheel import TimerWheel
from harpcaller.config import Config
from harpcaller.hosts import pool as pool_module
from harpcaller.hosts.connection import HarpdConnection
from harpcaller.hosts.pool import ConnectionPool
from harpcaller.hosts.registry import Host
from harpcaller.hosts.tls import HostTLS
from support.deadline import eventually

WEB01 = Host("web01", "127.0.0.1", 4306, "u", "p")
WEB02 = Host("web02", "127.0.0.2", 4306, "u", "p")
TLS = HostTLS(Config())


class FakeConnection:
    """A connection that records how the pool uses it."""

    def __init__(self, keep_alive: float | None = 60.0, opened_at: float | None = None) -> None:
        self.keep_alive = keep_alive
        self.opened_at = cast(Any, pool_module).time.monotonic() if opened_at is None else opened_at
        self.tls_version: tuple[int, ...] = ()
        self.is_reusable = True
        self.end: str | None = None

    def close(self) -> None:
        self.end = "closed"

    def abort(self) -> None:
        self.end = "aborted"


def put(pool: ConnectionPool, conn: FakeConnection, host: Host = WEB01, tls: HostTLS = TLS) -> FakeConnection:
    pool.put(host, tls, cast(HarpdConnection, conn))
    return conn


def get(pool: ConnectionPool, host: Host = WEB01, tls: HostTLS = TLS) -> FakeConnection | None:
    return cast("FakeConnection | None", pool.get(host, tls))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(pool_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


async def test_pool_returns_the_last_used_connection_first() -> None:
    pool = ConnectionPool(TimerWheel())
    first, second = put(pool, FakeConnection()), put(pool, FakeConnection())
    assert [get(pool) for _ in range(3)] == [second, first, None]
    assert first.end is None
    pool.close()


async def test_pool_separates_hosts_and_tls_settings() -> None:
    pool = ConnectionPool(TimerWheel())
    conn = put(pool, FakeConnection())
    assert get(pool, WEB02) is None
    assert get(pool, tls=HostTLS(Config())) is None
    assert get(pool) is conn
    pool.close()


@pytest.mark.parametrize(("keep_alive", "seconds"), [(4.0, 2.0), (20.0, 10.0), (3600.0, 10.0)])
async def test_pool_expires_after_half_of_the_grant_or_10_s(clock: Any, keep_alive: float, seconds: float) -> None:
    pool = ConnectionPool(TimerWheel())
    young = put(pool, FakeConnection(keep_alive))
    clock.now += seconds - 0.01
    assert get(pool) is young
    old = put(pool, FakeConnection(keep_alive))
    clock.now += seconds
    assert get(pool) is None
    assert old.end == "aborted"
    pool.close()


async def test_pool_closes_old_connections(clock: Any) -> None:
    pool = ConnectionPool(TimerWheel())
    conn = put(pool, FakeConnection(opened_at=clock.now))
    for _ in range(37):  # a call each 8 seconds
        assert get(pool) is conn
        clock.now += 8.0
        put(pool, conn)
    assert get(pool) is conn
    clock.now += 8.0
    assert put(pool, conn).end == "closed"
    assert get(pool) is None


async def test_pool_skips_connections_that_broke() -> None:
    pool = ConnectionPool(TimerWheel())
    good, broken = put(pool, FakeConnection()), put(pool, FakeConnection())
    broken.is_reusable = False
    assert get(pool) is good
    assert broken.end == "aborted"
    pool.close()


async def test_pool_closes_connections_without_keep_alive() -> None:
    pool = ConnectionPool(TimerWheel())
    assert put(pool, FakeConnection(None)).end == "closed"
    broken = FakeConnection()
    broken.is_reusable = False
    assert put(pool, broken).end == "closed"
    assert get(pool) is None


async def test_pool_is_limited_per_host_and_in_total() -> None:
    pool = ConnectionPool(TimerWheel())
    web01 = [put(pool, FakeConnection()) for _ in range(257)]
    web02 = [put(pool, FakeConnection(), WEB02) for _ in range(256)]
    web03 = put(pool, FakeConnection(), Host("web03", "127.0.0.3", 4306, "u", "p"))
    assert [conn.end for conn in web01] == [None] * 256 + ["closed"]
    assert all(conn.end is None for conn in web02)
    assert web03.end == "closed"
    pool.close()
    assert all(conn.end == "closed" for conn in (*web01, *web02))


async def test_pool_closes_expired_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_MAX_IDLE", 0.05)
    pool = ConnectionPool(TimerWheel())
    conn = put(pool, FakeConnection())
    await eventually(lambda: conn.end == "closed", what="the expired connection closed")
    assert get(pool) is None
    pool.close()
