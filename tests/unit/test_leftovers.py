"""Leftovers of tests are found; resources of longer-lived fixtures do not count."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading

import pytest

from support import leftovers
from support.deadline import wait_until
from support.leftovers import find_leftover_tasks, find_leftovers, new_since, snapshot


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "DEADLINE", 0.0)


def test_find_leftovers_names_open_descriptor() -> None:
    before = snapshot()
    with open("/dev/zero") as file:
        assert find_leftovers(before) == [f"descriptor {file.fileno()}: /dev/zero"]
    assert find_leftovers(before) == []


def test_find_leftovers_names_running_thread() -> None:
    before, end = snapshot(), threading.Event()
    thread = threading.Thread(target=end.wait, name="left")
    thread.start()
    (left,) = find_leftovers(before)
    assert "<Thread(left, started" in left
    end.set()
    thread.join()


def test_find_leftovers_names_orphaned_process() -> None:
    before = snapshot()
    subprocess.run(["setsid", "--fork", "sleep", "600"], check=True)
    wait_until(lambda: find_leftovers(before)[0].endswith(": sleep 600 "), what="its program")
    (left,) = find_leftovers(before)
    os.kill(int(left.split()[1]), 9)
    wait_until(lambda: not new_since(before, snapshot()), what="the end of the process")


def test_find_leftovers_names_child_without_environment() -> None:
    before = snapshot()
    with subprocess.Popen(["/bin/sleep", "600"], env={}) as child:
        assert [left.split()[1] for left in find_leftovers(before)] == [str(child.pid)]
        child.kill()


def test_find_leftovers_ignores_child_of_an_older_process() -> None:
    with subprocess.Popen(["sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as shell:
        assert shell.stdin is not None
        assert shell.stdout is not None
        before = snapshot()
        shell.stdin.write(b"sleep 600 &\necho $!\n")
        shell.stdin.flush()
        assert int(shell.stdout.readline()) in snapshot().pids - before.pids
        assert find_leftovers(before) == []
        shell.stdin.write(b"kill $!\nwait\n")
        shell.stdin.close()


async def test_find_leftover_tasks_names_unfinished_task() -> None:
    before = asyncio.all_tasks()
    task = asyncio.create_task(asyncio.sleep(600), name="left")
    (left,) = await find_leftover_tasks(before)
    assert "name='left'" in left
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await find_leftover_tasks(before) == []
