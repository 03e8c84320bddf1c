"""Long lines are decoded in a thread, one at a time."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from harp.protocol.json_text import InvalidJSON
from harp.protocol.lines import LongLine
from harp.protocol.schema import ProtocolError
from harp_daemon import event_loop, json_pieces
from harp_daemon.event_loop import Turns, UrgentWork, long_lines, run, run_in_turn
from support.deadline import eventually


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

    results = [run_in_turn(decode, b"x" * size) for size in range(4)]
    await asyncio.sleep(0)  # the loop continues meanwhile
    may_end.set()
    assert await asyncio.gather(*results) == [0, 1, 2, 3]
    assert most == 1


async def test_long_line_that_is_invalid_raises() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        await run_in_turn(int, b"x")
    assert await run_in_turn(int, b"1") == 1


async def test_pieces_of_long_line_are_joined_in_a_thread() -> None:
    assert await run_in_turn(bytes.upper, LongLine([b"ab", b"c"], 3)) == b"ABC"


async def test_invalid_long_line_that_nobody_waits_for_is_no_unexpected_error() -> None:
    """A peer that sends such lines and goes away filled the log with tracebacks."""
    unexpected: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unexpected.append(context))
    may_end, has_ended = threading.Event(), threading.Event()

    def decode(line: bytes) -> int:
        assert may_end.wait(60)
        has_ended.set()
        return int(line)

    abandoned = run_in_turn(decode, b"x")
    abandoned.cancel()
    may_end.set()
    assert await run_in_turn(int, b"1") == 1  # which comes after the other one
    assert has_ended.is_set()
    del abandoned
    await asyncio.sleep(0)
    gc.collect()
    assert not unexpected


def expensive_decoder() -> tuple[Callable[[bytes], int], threading.Event]:
    """Give the loop as many threads as a daemon has; return a decoder, and what lets it end."""
    may_end = threading.Event()

    def decode(line: bytes) -> int:
        while not may_end.is_set():
            json_pieces.between_pieces()
        return int(line)

    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(64))
    return decode, may_end


async def test_long_lines_of_a_peer_leave_threads_to_others() -> None:
    """With all threads, a peer made others wait until one of its lines was decoded, which took up to a minute."""
    decode_expensive, may_end = expensive_decoder()
    expensive = [run_in_turn(decode_expensive, b"%d" % number, "attacker") for number in range(70)]
    abandoned = run_in_turn(decode_expensive, b"0", "attacker")
    abandoned.cancel()
    try:
        async with asyncio.timeout(30):
            assert await run_in_turn(int, b"1", "other") == 1
            assert await asyncio.to_thread(int, "2") == 2
        assert not any(one.done() for one in expensive)
    finally:
        may_end.set()
    assert await asyncio.gather(*expensive) == list(range(70))


async def test_long_lines_of_many_peers_leave_threads_to_other_work() -> None:
    decode_expensive, may_end = expensive_decoder()
    expensive = [run_in_turn(decode_expensive, b"%d" % number, f"attacker {number % 10}") for number in range(100)]
    others = [run_in_turn(int, b"%d" % number, f"client {number}") for number in range(3)]
    try:
        async with asyncio.timeout(30):
            assert await asyncio.to_thread(int, "2") == 2
    finally:
        may_end.set()
    assert await asyncio.gather(*expensive) == list(range(100))
    assert await asyncio.gather(*others) == [0, 1, 2]


async def test_long_lines_are_decoded_in_turn() -> None:
    """A short one waits for a piece of each other line only."""
    turns: list[bytes] = []
    has_begun, may_continue = threading.Event(), threading.Event()

    def decode(line: bytes) -> int:
        for _ in range(len(line)):
            turns.append(line)
            if line == b"x" * 100 and not may_continue.is_set():
                has_begun.set()
                assert may_continue.wait(60)
            json_pieces.between_pieces()
        return len(line)

    long = run_in_turn(decode, b"x" * 100)
    await asyncio.to_thread(has_begun.wait, 60)
    short = run_in_turn(decode, b"yy")
    await eventually(lambda: long_lines.waiting == 1, what="the short line")
    may_continue.set()
    assert [*await asyncio.gather(long, short)] == [100, 2]
    assert turns[:4] == [b"x" * 100, b"yy", b"x" * 100, b"yy"]


def test_turn_is_passed_on_by_its_owner_only() -> None:
    turns = Turns()
    turns.pass_on()
    with turns:
        turns.pass_on()
    with turns:
        thread = threading.Thread(target=turns.pass_on)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()


class Pieces:
    """A long line of two pieces."""

    def __init__(self) -> None:
        self.first, self.second = threading.Event(), threading.Event()

    def decode(self, line: bytes) -> bytes:
        self.first.set()
        json_pieces.between_pieces()
        self.second.set()
        return line


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread with a long line waits as long as there is urgent work."""
    monkeypatch.setattr(event_loop, "_MAX_WAIT", 60)


@pytest.mark.usefixtures("patient")
async def test_long_line_waits_for_urgent_work() -> None:
    pieces, urgent = Pieces(), [UrgentWork(), UrgentWork()]
    for work in urgent:
        work.begin()
    decoding = run_in_turn(pieces.decode, b"x")
    for work in urgent:
        assert await asyncio.to_thread(pieces.first.wait, 60)
        assert not await asyncio.to_thread(pieces.second.wait, 0.05)
        work.end()
        work.end()  # has no effect
    assert await decoding == b"x"


@pytest.mark.usefixtures("patient")
def test_long_line_waits_for_a_turn_of_the_loop() -> None:
    pieces = Pieces()

    async def decode() -> bytes:
        await asyncio.sleep(0.001)  # the loop has waited for events, so this turn has begun
        decoding = run_in_turn(pieces.decode, b"x")
        assert pieces.first.wait(60)
        assert not pieces.second.wait(0.05)
        return await decoding

    assert run(decode()) == b"x"


async def test_long_line_leaves_time_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """After urgent work, its pauses are twice as long as its steps; they are short where nobody else works."""
    monkeypatch.setattr(event_loop, "_PAUSE", short := 0.00001)
    monkeypatch.setattr(event_loop, "_MAX_STEP", 60)
    monkeypatch.setattr(event_loop, "_MAX_WAIT", 0.001)
    monkeypatch.setattr(UrgentWork, "_seen_at", float("-inf"))
    pauses: list[float] = []

    def work_in_steps(_: bytes) -> list[float]:
        pauses.clear()
        for _step in range(4):
            threading.Event().wait(0.01)  # a step
            json_pieces.between_pieces()
        return pauses.copy()

    urgent = UrgentWork()
    monkeypatch.setattr(time, "sleep", pauses.append)
    assert set(await run_in_turn(work_in_steps, b"x")) == {short}
    urgent.begin()
    await run_in_turn(work_in_steps, b"x")
    urgent.end()
    monkeypatch.setattr(event_loop, "_SHARED_FOR", 1e9)
    assert min(await run_in_turn(work_in_steps, b"x")) >= 0.02
    monkeypatch.setattr(event_loop, "_SHARED_FOR", 0.0)
    assert set(await run_in_turn(work_in_steps, b"x")) == {short}


async def test_long_line_does_not_wait_for_ever() -> None:
    """Urgent work without end delays it, but does not stop it."""
    urgent = UrgentWork()
    urgent.begin()
    try:
        assert await asyncio.wait_for(run_in_turn(Pieces().decode, b"x"), 60) == b"x"
    finally:
        urgent.end()


def test_cancelled_lines_end_and_are_dropped() -> None:
    """A stranger that left filled the memory with lines that were still decoded, or waited for it."""
    started, ended = threading.Semaphore(0), threading.Semaphore(0)

    def decode_endlessly(_: bytes) -> None:
        started.release()
        try:
            while True:
                json_pieces.between_pieces()
        finally:
            ended.release()

    async def main() -> None:
        decoding = [run_in_turn(decode_endlessly, b"x", "peer") for _ in range(8)]
        line = LongLine([b"x"], 1)
        is_dropped = weakref.ref(line)
        waiting = run_in_turn(decode_endlessly, line, "peer")
        del line
        for _ in decoding:
            await asyncio.to_thread(started.acquire)
        waiting.cancel()
        await asyncio.wait([waiting])
        await eventually(lambda: is_dropped() is None, 20)
        for one in decoding:
            one.cancel()
        assert [await asyncio.to_thread(ended.acquire, timeout=20) for _ in decoding] == [True] * 8

    run(main())


def test_long_lines_do_not_delay_the_end() -> None:
    """Lines of an attacker that are being decoded, or wait for it, delayed the stop of a daemon by a minute."""
    started = threading.Event()

    def decode_endlessly(line: bytes) -> None:
        started.set()
        while True:
            json_pieces.between_pieces()

    async def main() -> list[asyncio.Future[None]]:
        decoding = [run_in_turn(decode_endlessly, b"x", number % 9) for number in range(100)]
        await asyncio.to_thread(started.wait)
        return decoding

    decoding = run(main())
    # Of a decoder that runs, which shows it as another error; of a line that waits, which is refused like others.
    errors = [type(one.exception()) for one in decoding]
    assert (errors.count(InvalidJSON), errors.count(ProtocolError)) == (32, 68)
    assert run(asyncio.sleep(0, "a later one")) == "a later one"
