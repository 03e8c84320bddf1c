"""Procedures that are coroutines or asynchronous generators."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.calls import error, nothing_is_left, printed, result
from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpd import Harpd
from support.procedures_file import PROCEDURES

OWN = r"""
import asyncio, functools
from harpd.proc import Cancelled, Procedure, StreamingProcedure, TimeLimit

@procedure
async def add(a, b=1):
    await asyncio.sleep(0)
    return a + b

added = procedure(functools.partial(add.function, 5))

class Own(Procedure):
    async def __call__(self, word):
        return 2 * await super().__call__(word)

async def upper(word):
    return word.upper()

own = Own(upper)

@procedure
async def raises_async(kind):
    if kind == "cancelled":
        raise asyncio.CancelledError("by itself")
    if kind == "exit":
        raise SystemExit(3)
    if kind == "group":
        async with asyncio.TaskGroup() as group:
            group.create_task(raises_async.function("key"))
    raise KeyError("k")

@procedure
async def unencodable_async():
    return object()

@procedure
def returns_generator():
    return (number for number in range(3))

@procedure
async def leaves_tasks(path):
    async def background():
        try:
            await asyncio.sleep(3600)
        finally:
            append(path, "task ended")
    task = asyncio.create_task(background())
    asyncio.get_running_loop().run_in_executor(None, append, path, "in a thread, ")
    await asyncio.sleep(0.05)
    return "done"

@streaming_procedure
async def count_async(numbers, how="yield"):
    try:
        for number in range(numbers):
            yield number
            await asyncio.sleep(0)
        if how == "yield":
            yield Result(numbers)
            yield "never"
        elif how == "raise":
            raise ValueError("late")
        elif how == "bad":
            yield object()
    finally:
        await asyncio.sleep(0)
        print("cleaned up", how)

@streaming_procedure
async def returns_records(how):
    await asyncio.sleep(0)
    return {"list": [1, 2], "generator": count_async.function(1), "result": Result(7), "none": None}[how]

class Wrapped(StreamingProcedure):
    def __call__(self, *arguments):
        return self.wrap(super().__call__(*arguments))
    async def wrap(self, records):
        async for record in records:
            yield {"record": record}

    def result(self):
        return {"end": super().result()}

wrapped = Wrapped(count_async.function)

async def clean_up(wait):
    try:
        await wait
    except asyncio.CancelledError:
        print("cancelled")
        raise
    finally:
        await asyncio.sleep(0)
        print("cleaned up")

@procedure(timeout=0.2)
async def limited():
    await clean_up(asyncio.sleep(3600))

@procedure(timeout=0.2)
async def limited_in_task():
    async with asyncio.TaskGroup() as group:
        group.create_task(clean_up(asyncio.sleep(3600)))

@procedure(timeout=0.2)
async def limited_in_callbacks():
    def again():
        asyncio.get_running_loop().call_soon(again)
    again()
    await clean_up(asyncio.sleep(3600))

@procedure(timeout=0.2)
async def limited_blocking():
    try:
        time.sleep(3600)
    except Cancelled:
        print("second signal")
        raise

@procedure(timeout=0.2)
async def suppresses():
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        return "suppressed"

@streaming_procedure(timeout=0.3)
async def limited_stream(pause):
    try:
        while True:
            yield "x" * 1000
            if pause:
                await asyncio.sleep(3600)
    except asyncio.CancelledError:
        print("cancelled")
        raise
    finally:
        print("cleaned up")

@procedure
async def wait_async(path):
    append(path, "there")
    await clean_up(asyncio.sleep(3600))

@procedure(max_calls_per_process=10)
async def many():
    return os.getpid()
"""


@pytest.fixture(scope="module")
def harpd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpd]:
    with Harpd(
        tmp_path_factory.mktemp("coroutines"), PROCEDURES + OWN, {"limits": {"max_calls": 300, "kill_grace": 2}}
    ) as harpd:
        yield harpd
        nothing_is_left(harpd)


def test_coroutine_returns_its_value(harpd: Harpd) -> None:
    assert result(harpd, "add", 1, 2) == 3
    assert result(harpd, "added") == 6
    assert result(harpd, "own", "ab") == "ABAB"
    assert error(harpd, "add")["type"] == "invalid_argument_list"
    assert result(harpd, "many") == result(harpd, "many")


@pytest.mark.parametrize(
    ("kind", "type"),
    [("key", "KeyError"), ("cancelled", "CancelledError"), ("exit", "SystemExit"), ("group", "ExceptionGroup")],
)
def test_coroutine_exception_is_sent(harpd: Harpd, kind: str, type: str) -> None:
    assert harpd.call("raises_async", kind)[-1]["exception"]["type"] == type


def test_value_without_json_form_is_invalid_message(harpd: Harpd) -> None:
    assert "type object has no form in JSON" in error(harpd, "unencodable_async")["message"]
    assert "expose it with @streaming_procedure" in error(harpd, "returns_generator")["message"]


def test_unfinished_tasks_are_cancelled_before_result(harpd: Harpd, tmp_path: Path) -> None:
    assert result(harpd, "leaves_tasks", str(tmp_path / "path")) == "done"
    assert (tmp_path / "path").read_text() == "in a thread, task ended"


def stream(harpd: Harpd, procedure: str, *arguments: Any) -> list[Any]:
    first, *lines = harpd.call(procedure, *arguments)
    assert first == {"harp": 1, "stream_result": True}
    return lines


def test_asynchronous_generator_streams(harpd: Harpd) -> None:
    records = [{"stream": 0}, {"stream": 1}]
    assert stream(harpd, "count_async", 2) == [*records, {"result": 2}]
    assert stream(harpd, "count_async", 2, "no result") == [*records, {"result": None}]
    *lines, end = stream(harpd, "count_async", 2, "raise")
    assert (lines, end["exception"]["message"]) == (records, "late")
    *lines, end = stream(harpd, "count_async", 2, "bad")
    assert (lines, end["error"]["message"][:20]) == (records, "cannot encode record")
    for how in ("yield", "bad"):
        harpd.wait_event("call printed", procedure="count_async", text=f"cleaned up {how}")
    assert stream(harpd, "wrapped", 1) == [{"stream": {"record": 0}}, {"result": {"end": 1}}]


def test_coroutine_returns_records(harpd: Harpd) -> None:
    assert stream(harpd, "returns_records", "list") == [{"stream": 1}, {"stream": 2}, {"result": None}]
    assert stream(harpd, "returns_records", "generator") == [{"stream": 0}, {"result": 1}]
    assert stream(harpd, "returns_records", "result") == [{"result": 7}]
    assert stream(harpd, "returns_records", "none")[0]["exception"]["type"] == "TypeError"


@pytest.mark.parametrize(
    ("procedure", "arguments", "lines"),
    [
        ("limited", [], ["cancelled", "cleaned up"]),
        ("limited_in_task", [], ["cancelled", "cleaned up"]),
        ("limited_in_callbacks", [], ["cancelled", "cleaned up"]),
        ("limited_blocking", [], ["second signal"]),
        ("suppresses", [], []),
        ("limited_stream", [True], ["cancelled", "cleaned up"]),
        ("limited_stream", [False], ["cancelled", "cleaned up"]),
    ],
)
def test_limit_cancels_the_task(harpd: Harpd, procedure: str, arguments: list[Any], lines: list[str]) -> None:
    assert error(harpd, procedure, *arguments)["type"] == "timeout"
    call = harpd.last_call()
    wait_until(lambda: printed(harpd, call) == lines, DEADLINE, "the output")


def test_cancellation_cancels_the_task(harpd: Harpd, tmp_path: Path) -> None:
    with harpd.connect() as client:
        client.send(harpd.request("wait_async", [str(tmp_path / "there")]))
        client.message()
        wait_until((tmp_path / "there").exists, DEADLINE, "the call")
    harpd.wait_event("call printed", procedure="wait_async", text="cleaned up")
