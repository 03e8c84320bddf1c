"""Long lines are decoded in a thread, one at a time."""

from __future__ import annotations

import asyncio
import threading

import pytest

from harp_daemon.event_loop import decode_in_thread


async def test_long_lines_are_decoded_one_at_a_time() -> None:
    decoding, most = 0, 0
    may_end = threading.Event()

    def decode(line: bytes) -> int:
        nonlocal decoding, most
        decoding += 1
        most = max(most, decoding)
        assert may_end.wait(60)
        decoding -= 1
        return len(line)

    results = [decode_in_thread(decode, b"x" * size) for size in range(4)]
    await asyncio.sleep(0)  # the loop continues meanwhile
    may_end.set()
    assert await asyncio.gather(*results) == [0, 1, 2, 3]
    assert most == 1


async def test_long_line_that_is_invalid_raises() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        await decode_in_thread(int, b"x")
    assert await decode_in_thread(int, b"1") == 1
