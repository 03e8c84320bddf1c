"""The supervisor's side of a zygote: when a zygote that does not reply is abandoned, and what becomes of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import pytest

import harp
from harpd.supervisor import zygote_client
from harpd.supervisor.event_loop import EventLoop
from harpd.supervisor.worker_process import OutputCollector
from harpd.supervisor.zygote_client import ZygoteClient
from support.daemonlog import DEADLINE

PROCEDURES = """
import os, time
from harpd.proc import procedure
@procedure
def same(value):
    return value
"""
#: The zygote halts in its next fork, before it closes a descriptor that is the worker's.
HALTING_FORK = (
    PROCEDURES
    + """
own, close, file = os.getpid(), os.close, __file__ + ".halt"
def close_halting(descriptor):
    if os.getpid() == own and os.path.exists(file):
        os.unlink(file)
        os.kill(own, 19)
    close(descriptor)
os.close = close_halting
"""
)
HANGING_FORK = PROCEDURES + "os.register_at_fork(before=lambda: time.sleep(3600))\n"
#: How many workers are forked ahead.
PREFORKED = 4


class IdleCall:
    """A call that only notes what happens to its worker."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.statuses: list[int] = []  # of its worker

    def on_forked(self) -> None:
        pass

    def on_fork_failed(self, reason: str) -> None:
        self.failures.append(reason)

    def on_reaped(self, status: int, cpu: float | None, memory: int | None) -> None:
        self.statuses.append(status)


class Clock:
    """A loop whose clock a test sets forward, and a zygote in it."""

    def __init__(self, directory: Path, procedures: str) -> None:
        file = directory / "procedures.py"
        file.write_text(procedures)
        settings: dict[str, Any] = {
            "procedures": str(file),
            "python_path": {"prepend": [], "append": []},
            "default_user": None,
            "dynamic_uids": None,
            "rights": {},
            "environment": {},
            "default_group": None,
            "descriptors": 1000,
        }
        self.halt = file.with_name(f"{file.name}.halt")  # see `HALTING_FORK`
        self.loop = EventLoop()
        self.offset = 0.0
        boot_time = self.loop.now
        self.loop.now = lambda: boot_time() + self.offset
        self.loaded: list[str | None] = []
        self.lost: list[bool] = []
        output = OutputCollector(self.loop, 0, (1000, 1 << 18))
        self.zygote = ZygoteClient(settings, output, self.loaded.append, lambda: self.lost.append(True))

    def run(self, steps: Iterator[Callable[[], object]]) -> None:
        """Run the loop until each condition that a step yields has become true, one after the other."""
        steps = chain(steps, self._end())
        deadline, condition, failed = time.monotonic() + DEADLINE, next(steps), list[BaseException]()

        def check() -> None:
            nonlocal condition
            try:
                while condition():
                    condition = next(steps)
                assert time.monotonic() < deadline
                self.loop.call_later(0.005, check)
            except StopIteration:
                self.loop.stop()
            except BaseException as error:  # noqa: BLE001 - the test raises it
                failed.append(error)
                self.loop.stop()

        check()
        try:
            self.loop.run()
        finally:
            os.kill(self.zygote.pid, signal.SIGKILL)
            os.waitpid(self.zygote.pid, 0)
        if failed:
            raise failed[0]

    def _end(self) -> Iterator[Callable[[], object]]:
        os.kill(self.zygote.pid, signal.SIGKILL)
        yield lambda: not self.zygote.worker_identities()
        yield self.turns(0.1)

    def turns(self, seconds: float) -> Callable[[], object]:
        """Return a condition that becomes true after this time."""
        end = time.monotonic() + seconds
        return lambda: time.monotonic() >= end


@pytest.fixture(autouse=True)
def quick_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygote_client, "_CHECK_INTERVAL", 0.2)
    monkeypatch.setattr(zygote_client, "_FORK_TIMEOUT", 1.0)


def test_zygote_of_another_version_reports_the_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an installation below a running supervisor, whose messages the new zygote may not know."""
    monkeypatch.setattr(zygote_client, "__version__", "0.9")
    clock = Clock(tmp_path, PROCEDURES)

    def steps() -> Iterator[Callable[[], object]]:
        yield lambda: clock.loaded

    clock.run(steps())
    (error,) = clock.loaded
    assert error == f"harpd 0.9 runs, and {harp.__version__} is installed; reload harpd-supervisor, or restart harpd"


def test_zygote_is_not_abandoned_after_a_suspension(tmp_path: Path) -> None:
    """The machine was suspended before the zygote could reply, and it gets the processor late."""
    clock, call = Clock(tmp_path, PROCEDURES), IdleCall()
    zygote = clock.zygote

    def steps() -> Iterator[Callable[[], object]]:
        yield lambda: len(zygote.worker_identities()) == PREFORKED
        os.kill(zygote.pid, signal.SIGSTOP)
        worker = zygote.assign(call, "a call", "same")
        yield clock.turns(0.05)
        clock.offset = 3600.0
        yield clock.turns(0.3)
        os.kill(zygote.pid, signal.SIGCONT)
        yield lambda: len(zygote.worker_identities()) == PREFORKED + 1
        yield clock.turns(0.5)
        assert (clock.lost, call.failures) == ([], [])
        worker.release()

    clock.run(steps())


def test_zygote_that_forks_slowly_is_not_abandoned(tmp_path: Path) -> None:
    """Each fork takes long, because the machine is slow or the zygote large; but it replies to one after the other."""
    clock = Clock(tmp_path, PROCEDURES + "os.register_at_fork(before=lambda: time.sleep(0.3))\n")
    calls = [IdleCall() for _ in range(10)]

    def steps() -> Iterator[Callable[[], object]]:
        yield lambda: clock.loaded
        workers = [clock.zygote.assign(call, "a call", "same") for call in calls]
        yield lambda: len(clock.zygote.worker_identities()) >= len(calls) or clock.lost
        assert (clock.lost, [call.failures for call in calls]) == ([], [[] for _ in calls])
        for worker in workers:
            worker.release()

    clock.run(steps())


def test_zygote_that_hangs_in_its_first_fork_is_killed(tmp_path: Path) -> None:
    """It has no worker whose end would lead to its own."""
    clock = Clock(tmp_path, HANGING_FORK)

    def steps() -> Iterator[Callable[[], object]]:
        yield lambda: clock.lost
        assert clock.loaded == [None]
        yield lambda: os.waitid(os.P_PID, clock.zygote.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)

    clock.run(steps())


def test_zygote_halted_in_a_fork_has_no_dead_worker_get_a_call(tmp_path: Path) -> None:
    """A worker that was reported to the supervisor has the only copy of its channel's end, which shows its death."""
    clock, before, late = Clock(tmp_path, HALTING_FORK), IdleCall(), IdleCall()

    def steps() -> Iterator[Callable[[], object]]:
        yield lambda: len(clock.zygote.worker_identities()) == PREFORKED
        clock.halt.touch()
        zygote = psutil.Process(clock.zygote.pid)
        used = clock.zygote.assign(before, "a call", "same")  # so that the next one is forked
        yield lambda: zygote.status() == psutil.STATUS_STOPPED
        preforked = [process for process in zygote.children() if process.pid != used.identity[0]]
        assert len(preforked) == PREFORKED
        for process in preforked:
            process.kill()
        yield lambda: all(process.status() == psutil.STATUS_ZOMBIE for process in preforked)
        abandoned = clock.zygote.assign(late, "a call", "same")
        yield lambda: late.failures or late.statuses
        assert (len(late.failures), late.statuses) == (1, [])
        assert before.statuses == []
        for worker in (used, abandoned):
            worker.release()

    clock.run(steps())
