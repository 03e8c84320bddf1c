"""Answers that many ask for: computed once, kept for a while, and errors not at all."""

from __future__ import annotations

import asyncio

import pytest

from harpcaller.shared_answers import SharedAnswers, SharedReads


async def test_an_answer_is_computed_once_for_all_who_ask() -> None:
    answers, asked, may_answer = SharedAnswers(), 0, asyncio.Event()

    async def compute() -> int:
        nonlocal asked
        asked += 1
        await may_answer.wait()
        return asked

    waiting = [asyncio.ensure_future(answers.get("question", compute)) for _ in range(5)]
    cancelled = asyncio.ensure_future(answers.get("question", compute))
    await asyncio.sleep(0)
    cancelled.cancel()
    may_answer.set()
    assert await asyncio.gather(*waiting) == [1] * 5
    assert await answers.get("question", compute) == 1, "it is kept for a second"
    assert await answers.get("another", compute) == 2


async def test_an_error_is_raised_to_all_and_not_kept() -> None:
    answers, errors = SharedAnswers(), [ValueError("first"), None]

    async def compute() -> str:
        if (error := errors.pop(0)) is not None:
            raise error
        return "second"

    waiting = [asyncio.ensure_future(answers.get(1, compute)) for _ in range(2)]
    for each in waiting:
        with pytest.raises(ValueError, match="first"):
            await each
    assert await answers.get(1, compute) == "second"


async def test_the_number_of_answers_is_limited() -> None:
    answers, computed = SharedAnswers(), 0

    async def compute() -> None:
        nonlocal computed
        computed += 1

    for question in range(3000):
        await answers.get(question, compute)
    assert len(answers) <= 1000
    assert computed == 3000


class Read:
    """A read that ends when it is let; the number of each is its answer."""

    def __init__(self) -> None:
        self.begun = 0
        self.may_end = asyncio.Event()

    async def __call__(self) -> int:
        self.begun += 1
        number = self.begun
        await self.may_end.wait()
        return number


async def test_reads_that_come_during_a_read_share_the_next_one() -> None:
    reads, read = SharedReads(), Read()
    first = asyncio.create_task(reads.get("q", read))
    await asyncio.sleep(0)
    later = [asyncio.create_task(reads.get("q", read)) for _ in range(3)]
    other = asyncio.create_task(reads.get("other", read))
    await asyncio.sleep(0)
    assert read.begun == 2, "the first one, and that of another question"
    later[0].cancel()  # a client that goes away takes the answer from nobody
    read.may_end.set()
    assert (await first, await other) == (1, 2)
    assert await asyncio.gather(*later[1:]) == [3, 3]
    assert await reads.get("q", read) == 4, "nothing is kept"


async def test_shared_read_that_fails_is_read_again() -> None:
    reads, read = SharedReads(), Read()

    async def fail() -> int:
        raise OSError("no disk")

    first = asyncio.create_task(reads.get("q", read))
    await asyncio.sleep(0)
    later = [asyncio.create_task(reads.get("q", fail)) for _ in range(2)]
    await asyncio.sleep(0)
    read.may_end.set()
    assert await first == 1
    assert [type(each) for each in await asyncio.gather(*later, return_exceptions=True)] == [OSError, OSError]
    assert await reads.get("q", read) == 2
