"""The memory of long replies to all clients."""

from __future__ import annotations

import asyncio

from harpcaller.reply_memory import ReplyMemory, ReplyShare

KIB = 1024
FREE = 64 * KIB


class Client:
    """A client with its share; `retries` counts how often it was to build its reply again."""

    def __init__(self, memory: ReplyMemory) -> None:
        self.share = ReplyShare(memory)
        self.retries = 0

    def reserve(self, size: int) -> bool:
        """Reserve memory for a reply with this size beyond the free bytes."""
        return self.share.reserve(FREE + size, self._retry)

    def _retry(self) -> None:
        self.retries += 1


async def test_replies_share_the_limit_in_order_of_requests() -> None:
    memory = ReplyMemory(lambda: 100)
    first, second, long, later = (Client(memory) for _ in range(4))
    assert first.reserve(60)
    assert second.reserve(40)
    assert not memory.has_waiting
    assert not long.reserve(50)
    assert not later.reserve(10)
    second.share.release()
    await asyncio.sleep(0)
    assert (long.retries, later.retries) == (0, 0)  # the earlier one comes first
    first.share.release()
    await asyncio.sleep(0)
    assert (long.retries, later.retries) == (1, 1)
    assert long.reserve(50)
    assert later.reserve(10)
    assert not memory.has_waiting


async def test_short_replies_never_wait() -> None:
    memory = ReplyMemory(lambda: 100)
    assert Client(memory).reserve(100)
    assert not Client(memory).reserve(1)
    assert all(Client(memory).reserve(0) for _ in range(10_000))


async def test_reply_above_the_limit_is_sent_alone() -> None:
    memory = ReplyMemory(lambda: 100)
    small, huge, other = (Client(memory) for _ in range(3))
    assert small.reserve(1)
    assert not huge.reserve(1000)
    small.share.release()
    await asyncio.sleep(0)
    assert huge.retries == 1
    assert huge.reserve(1000)
    assert not other.reserve(1)
    huge.share.release()
    await asyncio.sleep(0)
    assert other.reserve(1)


async def test_client_that_leaves_the_queue_does_not_block_others() -> None:
    memory = ReplyMemory(lambda: 100)
    first, leaving, other = (Client(memory) for _ in range(3))
    assert first.reserve(60)
    assert not leaving.reserve(100)
    assert not other.reserve(40)
    leaving.share.release()
    await asyncio.sleep(0)
    assert (leaving.retries, other.retries) == (0, 1)


async def test_reply_that_has_become_longer_or_shorter() -> None:
    memory = ReplyMemory(lambda: 100)
    first, second, third = (Client(memory) for _ in range(3))
    assert first.reserve(50)
    assert second.reserve(50)
    assert not third.reserve(30)
    assert first.reserve(20)
    await asyncio.sleep(0)
    assert third.retries == 1
    assert third.reserve(30)
    assert not second.reserve(60)
    third.share.release()
    await asyncio.sleep(0)
    assert second.retries == 1
    assert second.reserve(60)
