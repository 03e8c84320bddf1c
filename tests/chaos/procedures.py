"""The procedures that the hosts of a chaos run offer. Each marks its start, its records, its children and its end.

What they say is a function of their token, so that whoever sees a record or a result knows whether it is right. Some
have processes of many calls.
"""

from __future__ import annotations

import hashlib
import os
import select
import signal
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from chaos.marks import VARIABLE, Writer
from harpd.proc import Result, procedure, streaming_procedure

#: Seconds after which a process that nobody stopped ends by itself, so that a failed run leaves nothing for long.
_LONGEST = 150.0

_marks = Writer(os.environ.get(VARIABLE, os.devnull))


def record(token: str, number: int, size: int) -> Any:
    """The record with this number of the job with this token."""
    return [token, number, "x" * size]


def result(token: str) -> str:
    """What a job with this token returns."""
    return hashlib.sha256(token.encode()).hexdigest()


def _returned(token: str) -> str:
    value = result(token)
    _marks.write(token, "end", value)
    return value


@procedure
def work(token: str, seconds: float) -> str:
    """Take some time and return."""
    _marks.write(token, "start")
    time.sleep(seconds)
    return _returned(token)


@procedure(max_calls_per_process=5)
def fail(token: str, seconds: float) -> NoReturn:
    """Take some time and raise."""
    _marks.write(token, "start")
    time.sleep(seconds)
    _marks.write(token, "raise")
    _marks.write(token, "rest")
    raise ValueError(token)


@procedure
def die(token: str, number: int) -> NoReturn:
    """Die by a signal, or leave with status 3 for 0."""
    _marks.write(token, "start")
    if number:
        os.kill(os.getpid(), number)
        time.sleep(_LONGEST)
    os._exit(3)


@procedure(timeout=1)
def late(token: str) -> str:
    """Take longer than is allowed here."""
    _marks.write(token, "start")
    time.sleep(_LONGEST)
    return _returned(token)


@streaming_procedure
def stream(token: str, records: int, size: int, pause: float) -> Iterator[Any]:
    """Say records, and mark each once it was handed over."""
    _marks.write(token, "start")
    for number in range(records):
        yield record(token, number, size)
        _marks.write(token, "record", number)
        time.sleep(pause)
    yield Result(_returned(token))


@procedure(max_calls_per_process=5)
def family(token: str, seconds: float) -> str:
    """Take some time in company: a child, a grandchild whose parent is gone, a stranger in a session of its own."""
    _marks.write(token, "start")
    gates = [_descendant(token, steps) for steps in ((), (os.fork,), (os.fork, os.setsid))]
    time.sleep(seconds)
    for gate in gates:
        os.write(gate, b"x")
    os.wait()
    value = _returned(token)
    _marks.write(token, "rest")
    return value


@procedure
def stubborn(token: str) -> str:
    """Ignore TERM, leave a grandchild in another session that does so too, and say nothing."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _marks.write(token, "start")
    _descendant(token, (os.fork, os.setsid))
    until = time.monotonic() + _LONGEST
    while time.monotonic() < until:
        try:
            time.sleep(1)
        except BaseException:  # noqa: BLE001 - what is raised in it to stop it as well
            continue
    return _returned(token)


def _descendant(token: str, steps: tuple[Any, ...]) -> int:
    """Make a process; return, once it has marked itself, what to write a byte to for it to end.

    The end of this process does not end it.
    """
    ready, say_ready = os.pipe()
    go, say_go = os.pipe()
    if not (child := os.fork()):
        os.close(say_go)
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what harpd has set there is for the main process
        for step in steps:
            if step():  # the process in between
                os._exit(0)
        _marks.write(token, "child")
        os.write(say_ready, b"x")
        until = time.monotonic() + _LONGEST
        while time.monotonic() < until:
            if select.select([go], [], [], 1.0)[0]:
                if os.read(go, 1):
                    os._exit(0)
                time.sleep(1)  # its maker is gone, and it has not been told to go
        os._exit(0)
    os.close(say_ready)
    os.close(go)
    os.read(ready, 1)
    os.close(ready)
    if os.fork in steps:
        os.waitpid(child, 0)
    return say_go
