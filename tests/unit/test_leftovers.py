"""What tests leave behind is found, and what belongs to longer-lived fixtures is not taken for it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading

import pytest

from support import leftovers
from support.deadline import wait_until
from support.leftovers import left_since, new_since, snapshot, tasks_left_since


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "DEADLINE", 0.0)


def test_left_since_open_descriptor_is_named() -> None:
    before = snapshot()
    with open("/dev/zero") as file:
        assert left_since(before) == [f"descriptor {file.fileno()}: /dev/zero"]
    assert left_since(before) == []


def test_left_since_running_thread_is_named() -> None:
    before, end = snapshot(), threading.Event()
    thread = threading.Thread(target=end.wait, name="left")
    thread.start()
    (left,) = left_since(before)
    assert "<Thread(left, started" in left
    end.set()
    thread.join()


def test_left_since_orphaned_process_is_named() -> None:
    before = snapshot()
    subprocess.run(["setsid", "--fork", "sleep", "600"], check=True)
    (left,) = left_since(before)
    assert left.endswith(": sleep 600 ")
    os.kill(int(left.split()[1]), 9)
    wait_until(lambda: not new_since(before, snapshot()), what="the end of the process")


def test_left_since_child_without_environment_is_named() -> None:
    before = snapshot()
    with subprocess.Popen(["/bin/sleep", "600"], env={}) as child:
        assert [left.split()[1] for left in left_since(before)] == [str(child.pid)]
        child.kill()


def test_left_since_child_of_an_older_process_is_not_counted() -> None:
    with subprocess.Popen(["sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as shell:
        assert shell.stdin is not None
        assert shell.stdout is not None
        before = snapshot()
        shell.stdin.write(b"sleep 600 &\necho started\n")
        shell.stdin.flush()
        shell.stdout.readline()
        assert len(snapshot().processes) == len(before.processes) + 1
        assert left_since(before) == []
        shell.stdin.write(b"kill $!\nwait\n")
        shell.stdin.close()


async def test_tasks_left_since_unfinished_task_is_named() -> None:
    before = asyncio.all_tasks()
    task = asyncio.create_task(asyncio.sleep(600), name="left")
    (left,) = await tasks_left_since(before)
    assert "name='left'" in left
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await tasks_left_since(before) == []
