"""State files: orphans that the next supervisor kills and reports, survivors, and the purposes of a file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harpd.processes.cgroup import create_cgroup
from harpd.processes.cookie import cookie_for
from harpd.processes.process_tree import CallTree, take_snapshot
from harpd.processes.procfs import start_time
from harpd.supervisor.state_files import CallState, CleanupResult, StateDir
from support.cgroups import freezer, own_cgroup
from support.deadline import wait_until
from support.hopper import group_lives, hopping

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


class Supervisors:
    """The state files of several supervisors in one runtime directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._alive: dict[StateDir, str] = {}

    def begin(self, name: str) -> StateDir:
        """Return the state directory of a new supervisor."""
        records = StateDir(self._directory, name)
        self._alive[records] = name
        return records

    def kill(self, records: StateDir) -> None:
        """Close the locks of a supervisor, as its death does: on its own directory and on those of dead ones."""
        del self._alive[records]
        calls = self._directory / "calls"
        living = {str(calls / name) for name in self._alive.values()}
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
                target = os.readlink(f"/proc/self/fd/{number}")
                if target.startswith(f"{calls}/") and target not in living:
                    os.close(int(number))

    def kill_all(self) -> None:
        """Close all that are open."""
        for records in tuple(self._alive):
            self.kill(records)


@pytest.fixture
def supervisors(tmp_path: Path) -> Iterator[Supervisors]:
    supervisors = Supervisors(tmp_path)
    yield supervisors
    supervisors.kill_all()


@pytest.fixture
def old(supervisors: Supervisors) -> StateDir:
    """The state directory of a supervisor that will die."""
    return supervisors.begin("old")


@pytest.fixture
def new(supervisors: Supervisors) -> StateDir:
    """The state directory of its successor."""
    return supervisors.begin("new")


def names(tmp_path: Path) -> set[str]:
    """Return the names of all state files."""
    return {file.name for file in tmp_path.glob("calls/*/*")}


@contextlib.contextmanager
def process(call_id: str) -> Iterator[int]:
    """A process with a call's cookie, in its own session; it ignores SIGTERM."""
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code]
    environment = {"HARPD_CALL": call_id}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            yield child.pid
        finally:
            child.kill()


def lives(pid: int) -> bool:
    found = take_snapshot().get(pid)
    return found is not None and found.alive


def record(call_id: str, pid: int, **more: Any) -> CallState:
    return CallState(CallTree(pid, start_time(pid), cookie_for(call_id)), more)


def clean_up_fully(records: StateDir, until_gone: bool = True) -> list[CleanupResult]:
    """Clean up until it need not be repeated soon; return all results."""
    found = [records.clean_up()]
    while until_gone and found[-1].again:
        time.sleep(0.02)
        found.append(records.clean_up())
    return found


def test_clean_up_kills_and_reports_once(
    supervisors: Supervisors, tmp_path: Path, old: StateDir, new: StateDir
) -> None:
    with process("a") as pid:
        old.write("a", record("a", pid, resumable=1))
        assert new.clean_up() == CleanupResult()  # the supervisor lives
        supervisors.kill(old)
        found = clean_up_fully(new)
        assert not lives(pid)
        assert sum(result.killed for result in found) == 1
        assert [result.calls["a"].session["resumable"] for result in found if result.calls] == [1]
        assert new.clean_up() == CleanupResult()
        assert names(tmp_path) == set()


def test_clean_up_ignores_state_of_an_earlier_boot(
    supervisors: Supervisors, tmp_path: Path, old: StateDir, new: StateDir
) -> None:
    """Its pid may belong to another process now."""
    call_id = str(uuid.uuid4())
    with process(call_id) as pid:
        old.write(call_id, record(call_id, pid))
        [file] = tmp_path.rglob(call_id)
        members = json.loads(file.read_text())
        file.write_text(json.dumps({**members, "boot": str(uuid.uuid4())}))
        supervisors.kill(old)
        result = new.clean_up()
        assert (result.killed, result.calls, lives(pid)) == (0, {}, True)


def test_clean_up_reports_ended_call_without_kill(supervisors: Supervisors, old: StateDir, new: StateDir) -> None:
    with process("a") as pid:
        old.write("a", record("a", pid))
        old.mark_ended("a")
        supervisors.kill(old)
        assert list(new.clean_up().calls) == ["a"]
        assert lives(pid)


def test_clean_up_kills_reported_call_silently(supervisors: Supervisors, old: StateDir, new: StateDir) -> None:
    with process("a") as pid:
        old.write("a", record("a", pid))
        old.mark_reported("a")
        supervisors.kill(old)
        found = clean_up_fully(new)
        assert sum(result.killed for result in found) == 1
        assert not any(result.calls for result in found)
        assert not lives(pid)


@pytest.mark.parametrize(
    "order",
    [
        "mark_ended mark_reported",
        "mark_reported mark_ended",
        "remove",
        "mark_ended remove",
        "mark_reported remove",
        "remove mark_ended mark_reported",
    ],
)
def test_state_file_is_deleted_when_done(tmp_path: Path, new: StateDir, order: str) -> None:
    new.write("a", CallState(CallTree(1, 2, cookie_for("a")), {}))
    for step in order.split():
        assert step != "mark_ended" or names(tmp_path) <= {"a", "a.reported"}
        getattr(new, step)("a")
    assert names(tmp_path) == set()


def test_close_leaves_survivors_only(supervisors: Supervisors, tmp_path: Path, old: StateDir) -> None:
    for call_id in ("a", "b", "c"):
        old.write(call_id, CallState(CallTree(1, 2, cookie_for(call_id)), {}))
    old.mark_ended("b")
    old.mark_reported("c")
    old.close()
    assert names(tmp_path) == {"a", "c.reported"}
    other = supervisors.begin("other")
    other.close()
    assert not (tmp_path / "calls" / "other").exists()


def test_directory_is_locked_before_visible(tmp_path: Path, new: StateDir) -> None:
    """A directory that is just being created does not belong to a dead supervisor."""
    (tmp_path / "calls" / ".made").mkdir()
    assert new.clean_up() == CleanupResult()
    assert (tmp_path / "calls" / ".made").exists()


def test_clean_up_kills_fork_loop(supervisors: Supervisors, tmp_path: Path, old: StateDir, new: StateDir) -> None:
    with hopping(tmp_path, HARPD_CALL="a") as group:
        old.write("a", CallState(CallTree(group, 0, cookie_for("a")), {}))
        supervisors.kill(old)
        clean_up_fully(new)
        assert not group_lives(group)
        assert names(tmp_path) == set()


@pytest.mark.root
@ROOT
def test_clean_up_kills_fork_loop_in_cgroup(
    supervisors: Supervisors, tmp_path: Path, old: StateDir, new: StateDir
) -> None:
    with own_cgroup() as place, contextlib.ExitStack() as ending:
        group = create_cgroup(str(place), "a", os.getpid())
        assert group is not None
        try:
            ending.enter_context(hopping(tmp_path, session=True))
        finally:
            (place.parent / "cgroup.procs").write_text(str(os.getpid()))
        old.write("a", CallState(CallTree(os.getpid(), 0, cookie_for("a"), group), {}))
        supervisors.kill(old)
        clean_up_fully(new)
        assert not Path(group.path).exists()


@pytest.mark.root
@ROOT
def test_clean_up_survivors_are_reported_and_left(
    supervisors: Supervisors, tmp_path: Path, old: StateDir, new: StateDir, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "harpd.supervisor")
    with process("a") as pid, process("b") as other, freezer() as cold:
        cold.freeze(pid)
        for call_id, main in (("a", pid), ("b", other)):
            old.write(call_id, record(call_id, main))
        supervisors.kill(old)
        result = new.clean_up()
        assert result.calls.keys() == {"a", "b"}
        assert [one["pid"] for one in result.stop_reports["a"]["survivors"]] == [pid]
        for later in clean_up_fully(new):
            assert (later.killed, later.calls, later.stop_reports.keys() - {"b"}) == (0, {}, set())
        assert not lives(other)
        assert names(tmp_path) == {"a.reported"}
        wait_until(lambda: new.clean_up() == CleanupResult() and caplog.records, what="the log event")
        assert [event.message for event in caplog.records] == ["cannot kill orphaned processes"]
        for _ in range(3):
            assert new.clean_up() == CleanupResult()
        assert len(caplog.records) == 1
        third = supervisors.begin("third")
        assert third.clean_up() == CleanupResult()  # another supervisor has locked it
        supervisors.kill(new)
        result = third.clean_up()
        assert (result.killed, result.calls, result.stop_reports) == (1, {}, {})
        cold.thaw()
        wait_until(lambda: not third.clean_up().again, what="the last one's end")
        wait_until(lambda: third.clean_up() == CleanupResult() and not names(tmp_path), what="no record")


@pytest.mark.root
@ROOT
def test_clean_up_reports_end_of_survivors(supervisors: Supervisors, old: StateDir, new: StateDir) -> None:
    with process("a") as pid, freezer() as cold:
        cold.freeze(pid)
        old.write("a", record("a", pid))
        supervisors.kill(old)
        (first,) = clean_up_fully(new, until_gone=False)
        assert [one["pid"] for one in first.stop_reports["a"]["survivors"]] == [pid]
        cold.thaw()
        (last,) = wait_until(
            lambda: [result for result in clean_up_fully(new) if result.stop_reports], what="the last stop report"
        )
        assert (last.calls, last.again) == ({}, False)
        stop_report = last.stop_reports["a"]
        assert (stop_report["survivors"], stop_report["complete"]) == ([], False)
        assert (stop_report["processes"][0]["signals"], stop_report["processes"][0]["ended"]) == (
            [signal.SIGKILL.name],
            "gone after SIGKILL",
        )
