"""The procedures of the hosts of a chaos run. Each writes marks for its start, records, children and end.

Records and results are functions of the token, so that each can be checked. Some procedures use one process for many
calls.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from chaos.marks import SABOTAGE_FILE, VARIABLE, Identity, Writer, read_stat
from harpd.proc import Result, procedure, streaming_procedure

#: Seconds after which every process exits, so that a failed run leaves none for long.
_LONGEST = 150.0

_marks = Writer(os.environ.get(VARIABLE, os.devnull))


def record(token: str, number: int, size: int) -> Any:
    """Return a record of the job with this token."""
    return [token, number, "x" * size]


def result(token: str) -> str:
    """Return the result of the job with this token."""
    return hashlib.sha256(token.encode()).hexdigest()


def _sabotage(token: str) -> None:
    """Break a promise in HARP's name, if this run has to detect that: in the first jobs that return, until it is done.

    The run may kill this process at any moment.
    """
    if token.startswith("d"):  # a direct call; its client may not receive its end
        return
    file = Path(os.environ.get(VARIABLE, os.devnull)).with_name(SABOTAGE_FILE)
    with contextlib.suppress(FileNotFoundError):  # the order does not exist, or another job was faster
        kind, bystander = file.read_text().split()
        found = read_stat(int(bystander))
        if kind == "wrong-kill" and found is not None:
            os.kill(int(bystander), signal.SIGKILL)
        elif found is not None:  # it survives the stop of the call to which it seems to belong
            _marks.write(token, "child", process=Identity(int(bystander), found[1]))
        file.unlink()


def _returned(token: str) -> str:
    _sabotage(token)
    value = result(token)
    _marks.write(token, "end", value)
    return value


@procedure
def work(token: str, seconds: float) -> str:
    """Sleep and return."""
    _marks.write(token, "start")
    time.sleep(seconds)
    return _returned(token)


@procedure(max_calls_per_process=20)
def share(token: str, seconds: float) -> str:
    """Sleep and return, in a process of many calls."""
    _marks.write(token, "start")
    time.sleep(seconds)
    value = _returned(token)
    _marks.write(token, "idle")
    return value


@procedure(max_calls_per_process=5)
def fail(token: str, seconds: float) -> NoReturn:
    """Sleep and raise an exception."""
    _marks.write(token, "start")
    time.sleep(seconds)
    _marks.write(token, "raise")
    _marks.write(token, "idle")
    raise ValueError(token)


@procedure
def die(token: str, number: int) -> NoReturn:
    """Die by a signal; for 0, exit with status 3."""
    _marks.write(token, "start")
    if number:
        os.kill(os.getpid(), number)
        time.sleep(_LONGEST)
    os._exit(3)


@procedure(timeout=1)
def late(token: str) -> str:
    """Take longer than the time limit."""
    _marks.write(token, "start")
    time.sleep(_LONGEST)
    return _returned(token)


@streaming_procedure
def stream(token: str, records: int, size: int, pause: float) -> Iterator[Any]:
    """Yield records, and write a mark after each."""
    _marks.write(token, "start")
    for number in range(records):
        yield record(token, number, size)
        _marks.write(token, "record", number)
        time.sleep(pause)
    yield Result(_returned(token))


@procedure(max_calls_per_process=5)
def family(token: str, seconds: float) -> str:
    """Sleep beside other processes: a child, an orphaned grandchild, and one in another session."""
    _marks.write(token, "start")
    writers = [_descendant(token, steps) for steps in ((), (os.fork,), (os.fork, os.setsid))]
    time.sleep(seconds)
    for frontend in writers:
        os.write(frontend, b"x")
    os.wait()
    value = _returned(token)
    _marks.write(token, "idle")
    return value


@procedure
def stubborn(token: str) -> str:
    """Ignore SIGTERM, with a grandchild in another session that ignores it too, and never return."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _marks.write(token, "start")
    _descendant(token, (os.fork, os.setsid))
    until = time.monotonic() + _LONGEST
    while time.monotonic() < until:
        try:
            time.sleep(1)
        except BaseException:  # noqa: BLE001 - also ignores `Cancelled`
            continue
    return _returned(token)


def _descendant(token: str, steps: tuple[Any, ...]) -> int:
    """Create a process; when it has written its mark, return a descriptor. A byte written to it ends the process.

    The process survives the end of its worker.
    """
    ready, ready_writer = os.pipe()
    go, go_writer = os.pipe()
    if not (child := os.fork()):
        os.close(go_writer)
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the handler of harpd is for the main process
        for step in steps:
            if step():  # the intermediate process
                os._exit(0)
        _marks.write(token, "child")
        os.write(ready_writer, b"x")
        until = time.monotonic() + _LONGEST
        while time.monotonic() < until:
            if select.select([go], [], [], 1.0)[0]:
                if os.read(go, 1):
                    os._exit(0)
                time.sleep(1)  # its creator has exited without a byte
        os._exit(0)
    os.close(ready_writer)
    os.close(go)
    os.read(ready, 1)
    os.close(ready)
    if os.fork in steps:
        os.waitpid(child, 0)
    return go_writer
