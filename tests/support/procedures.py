"""The procedures file of tests. A module that needs more appends its own text: see `support.procedures_file`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

from harpd.proc import Result, procedure, streaming_procedure

VERSION = 1

#: Seconds between two checks for a file that a test creates.
PAUSE = 0.01


def wait_for_file(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(PAUSE)


def append(path: str, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


# Procedures that return immediately.


@procedure
def echo(*values: Any) -> list[Any]:
    """All arguments."""
    return list(values)


@procedure
def same(value: Any) -> Any:
    """The only argument."""
    return value


@procedure
def version() -> int:
    """The version of this file: 2 in `procedures_file.CHANGED`."""
    return VERSION


@procedure
def pid() -> int:
    return os.getpid()


@procedure
def mark(path: str, text: str) -> None:
    append(path, text)


@procedure
def unwritable() -> Any:
    """Return a value without a JSON form."""
    return {"x": [object()]}


@procedure
def fail(text: str) -> None:
    raise ValueError(text)


@procedure
def leave(code: int) -> None:
    """Exit without a result."""
    os._exit(code)


@procedure
def die(number: int) -> None:
    """Be killed by a signal."""
    os.kill(os.getpid(), number)


# Procedures that a test ends.


@procedure
def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@procedure(timeout=0.1)
def too_long() -> None:
    time.sleep(3600)


@procedure
def wait_for(path: str, value: Any = "there") -> Any:
    """The value, once the file is there."""
    wait_for_file(path)
    return value


@procedure
def pid_then_wait(path: str) -> str:
    """Write the pid to the file, and wait for the file with the added suffix `.go`."""
    with open(path + ".new", "w") as file:
        file.write(str(os.getpid()))
    os.rename(path + ".new", path)
    wait_for_file(path + ".go")
    return "seen"


@procedure
def resist(path: str) -> None:
    """Five processes that ignore SIGTERM and append their pids to the file: worker, two children, two grandchildren.

    Children and grandchildren have separate sessions.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for _ in range(2):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.setsid()
            break
    append(path, f"{os.getpid()}\n")
    while True:
        time.sleep(60)


# Streams.


@streaming_procedure
def count(numbers: int, path: str | None = None, pause: float = 0.0) -> Iterator[Any]:
    """So many numbers, with a pause after each; the result is how many, once the file is there if one is named."""
    for number in range(numbers):
        yield number
        time.sleep(pause)
    if path is not None:
        wait_for_file(path)
    yield Result(numbers)


@streaming_procedure
def count_until(path: str, pause: float = PAUSE) -> Iterator[Any]:
    """Numbers until the file is there; the result is how many."""
    number = 0
    while not os.path.exists(path):
        yield number
        number += 1
        time.sleep(pause)
    yield Result(number)


@streaming_procedure
def long_records(records: int, size: int) -> Iterator[Any]:
    for number in range(records):
        yield [number, "x" * size]


@streaming_procedure
def flood(size: int) -> Iterator[str]:
    """Records without end, as fast as they are read."""
    while True:
        yield "x" * size
