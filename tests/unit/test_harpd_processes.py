"""Which processes are a call's, signals that never hit another, the event loop's timers, lines that are printed."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from harpd.eventloop import EventLoop
from harpd.output import Output
from harpd.processes import Process, Tree, send, snapshot, start_time

#: A tree whose main process is 100; no process of this system has these numbers and this environment.
TREE = Tree(100, 50, b"HARPD_CALL=none of this system")


def table(*processes: Process) -> dict[int, Process]:
    return {process.pid: process for process in processes}


def members(processes: dict[int, Process], *known: tuple[int, int], late: bool = False) -> set[int]:
    return {process.pid for process in TREE.members(processes, known, late)}


def process(
    pid: int, start: int = 60, state: str = "S", marked: bool = False, parent: int = 0, group: int = 0, session: int = 0
) -> Process:
    made = Process(pid, start, parent, group, session, state)
    made.__dict__["environment"] = {TREE.mark} if marked else set()  # so that it does not look into /proc
    return made


MAIN = process(100, 50, group=100, session=100)


def test_members() -> None:
    others = [process(1, 0), process(7, 20, session=7), process(200, parent=7, session=7)]
    in_session = process(101, session=100, parent=1)
    in_group = process(102, group=100, parent=1)
    child = process(103, parent=100, session=103)
    grandchild = process(104, parent=103, session=104)
    zombie = process(105, parent=100, state="Z")
    all_of_them = table(MAIN, in_session, in_group, child, grandchild, zombie, *others)
    assert members(all_of_them) == {100, 101, 102, 103, 104}


def test_a_marked_process_is_the_calls() -> None:
    marked = process(300, marked=True, session=300, parent=1)
    older = process(301, 49, marked=True, session=301, parent=1)
    assert members(table(marked, older, process(302, parent=300))) == {300, 302}


def test_what_was_known_once_still_is_with_its_children() -> None:
    escaped = process(300, 60, session=300, parent=1)
    later = process(301, 70, session=301, parent=300)
    assert members(table(escaped, later)) == set()
    assert members(table(escaped, later), (300, 60)) == {300, 301}
    assert members(table(escaped, later), (300, 59)) == set()


@pytest.mark.parametrize("late", [False, True])
def test_a_number_that_another_has_by_now(late: bool) -> None:
    stranger = process(100, 51, group=100, session=100)
    assert members(table(stranger, process(101, session=100, parent=100)), late=late) == set()


def test_a_session_without_a_leader_is_the_calls_unless_nobody_watched() -> None:
    child, marked = process(101, session=100, parent=1), process(102, marked=True, session=100, parent=1)
    assert members(table(child, marked)) == {101, 102}
    assert members(table(child, marked), late=True) == {102}
    assert members(table(MAIN, child, marked), late=True) == {100, 101, 102}


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "3600"], env={"MARK": "of the sleeper"}) as child:
        yield child
        child.kill()


def test_snapshot_and_signals(sleeper: subprocess.Popen[bytes]) -> None:
    found = snapshot()[sleeper.pid]
    assert (found.parent, found.start) == (os.getpid(), start_time(sleeper.pid))
    assert b"MARK=of the sleeper" in found.environment
    assert not send(signal.SIGKILL, (sleeper.pid, found.start + 1))
    assert sleeper.poll() is None
    assert send(signal.SIGKILL, found.identity)
    sleeper.wait()
    assert not send(signal.SIGKILL, found.identity)
    assert start_time(sleeper.pid) == 0


def test_a_name_may_hold_anything() -> None:
    program = "open('/proc/self/comm', 'w').write('a) S 1 (b\\n'); print(flush=True); import time; time.sleep(3600)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert snapshot()[child.pid].parent == os.getpid()
        child.kill()


def fail() -> None:
    raise RuntimeError


def test_timers_fire_in_order_and_cancelled_ones_are_gone() -> None:
    loop, fired = EventLoop(), list[int]()
    for number in (3, 1, 2):
        loop.after(number / 1000, lambda number=number: fired.append(number))  # type: ignore[misc]
    loop.after(0.0015, lambda: fired.append(9)).cancel()
    loop.after(0, fail)  # ends no other
    loop.after(0.004, loop.stop)
    loop.run()
    assert fired == [1, 2, 3]


def test_limits_of_calls_that_have_ended_do_not_pile_up() -> None:
    loop = EventLoop()
    kept = [loop.after(3600, loop.stop) for _ in range(10)]
    for _ in range(10_000):
        timer = loop.after(3600, loop.stop)
        timer.cancel()
        timer.cancel()
    assert len(loop._timers) < 300
    for timer in kept:
        timer.cancel()
    loop.after(0, loop.stop)
    loop.run()


def printed(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.__dict__["text"] for record in caplog.records]


def test_lines_of_pipes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    loop = EventLoop()
    output = Output(loop, 1)
    pipes = [output.open({"call": str(number)}, "stdout") for number in range(3)]
    for number, (_, writing) in enumerate(pipes):
        os.write(writing, f"begun {number}".encode())
    os.write(pipes[0][1], b"\n\nnext\nrest")
    loop.after(0.01, loop.stop)
    loop.run()
    assert printed(caplog) == ["begun 0", "", "next"]
    for reading, _ in pipes[:2]:
        output.leave(reading)  # one too many: the first is closed
    assert printed(caplog)[3:] == ["rest"]
    with pytest.raises(BrokenPipeError):
        os.write(pipes[0][1], b"more")
    os.write(pipes[1][1], b"!\n")
    for _, writing in pipes:
        os.close(writing)
    loop = loop_to_the_end(loop)
    assert sorted(printed(caplog)[4:]) == ["begun 1!", "begun 2"]


def loop_to_the_end(loop: EventLoop) -> EventLoop:
    loop._running = True
    loop.after(0.01, loop.stop)
    loop.run()
    return loop
