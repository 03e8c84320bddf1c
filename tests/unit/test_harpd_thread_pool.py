"""The bounded thread pool: number of threads, deadlines, exceptions."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from harp_daemon.memory_quota import MemoryQuota, Reservation
from harpd.frontend.authenticator import BoundedThreadPool, TaskFailed
from support.deadline import eventually

LONG = 60.0


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """The event that the hanging functions of a test wait for."""
    event = threading.Event()
    yield event
    event.set()


async def test_thread_pool_returns_the_functions_value() -> None:
    here = threading.current_thread()
    assert await BoundedThreadPool(1).run(lambda: threading.current_thread() is not here, LONG)


@pytest.mark.parametrize(
    "kind", [ValueError, SystemExit, KeyboardInterrupt, StopIteration, TimeoutError, GeneratorExit]
)
async def test_thread_pool_passes_any_exception_as_cause(kind: type[BaseException]) -> None:
    def fail() -> None:
        raise kind("secret")

    with pytest.raises(TaskFailed) as caught:
        await BoundedThreadPool(1).run(fail, LONG)
    assert isinstance(caught.value.__cause__, kind)
    assert "secret" not in str(caught.value)


async def test_thread_pool_hanging_function_occupies_its_slot(release: threading.Event) -> None:
    threads = BoundedThreadPool(2)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await threads.run(release.wait, 0.01)
    ran = threading.Event()
    with pytest.raises(TimeoutError):
        await threads.run(ran.set, 0.01)
    assert not ran.is_set()
    release.set()
    await threads.run(ran.set, LONG)
    assert ran.is_set()


async def test_thread_pool_limits_running_functions(release: threading.Event) -> None:
    threads, running, lock = BoundedThreadPool(3), [0, 0], threading.Lock()

    def work() -> None:
        with lock:
            running[0] += 1
            running[1] = max(running)
        release.wait()
        with lock:
            running[0] -= 1

    tasks = [asyncio.create_task(threads.run(work, LONG)) for _ in range(10)]
    await eventually(lambda: running[0] == 3)
    release.set()
    await asyncio.gather(*tasks)
    assert running == [0, 3]


async def test_thread_pool_cancelled_wait_frees_the_slot(release: threading.Event) -> None:
    threads = BoundedThreadPool(1)
    first = asyncio.create_task(threads.run(release.wait, LONG))
    await asyncio.sleep(0)
    second = asyncio.create_task(threads.run(release.wait, LONG))
    await asyncio.sleep(0)
    second.cancel()
    release.set()
    await first
    assert await threads.run(lambda: 5, LONG) == 5


def test_memory_quota_counts_long_requests_only() -> None:
    allowance = MemoryQuota(100_000)
    long, longer, small = Reservation(allowance), Reservation(allowance), Reservation(allowance)
    assert long.grow(64 * 1024 + 60_000)
    assert longer.grow(64 * 1024)
    assert not longer.grow(40_001)
    assert small.grow(64 * 1024)
    long.release()
    longer.release()
    assert longer.grow(64 * 1024 + 100_000)
    assert not small.grow(1)
