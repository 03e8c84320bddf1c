"""State files of running calls: they let a new supervisor stop and report the calls of one that was killed.

Each supervisor has a directory in ``calls/`` of the runtime directory, locked while it lives, with a small file for
each call. The files are not synced: they have to survive the supervisor, not the machine. When a state file is read, it
may be old, and its pid may belong to another process. So it counts only until the next boot, and only processes that
certainly belong to the call are killed.

A state file has two purposes and is deleted when neither is left: to stop processes of the call, and to report its end
to its dispatcher. The file's name shows which of them is left:

    CALL                both
    CALL.reported       processes have to be stopped
    CALL.ended          the end has to be reported

The supervisor that finds the directory of a dead one keeps it locked until no process of its calls is left. Processes
that cannot be killed are reported once, as survivors, and every clean-up tries again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harpd.processes.cgroup import Cgroup
from harpd.processes.cookie import cookie_for
from harpd.processes.orphans import OrphanedCall, kill_orphans
from harpd.processes.process_tree import CallTree

log = logging.getLogger("harpd.supervisor")

#: Suffixes of state files of which only the end has to be reported, or only processes have to be stopped.
_ENDED, _REPORTED = ".ended", ".reported"
#: The prefix in the name of a directory that is not locked yet.
_UNLOCKED = "."
#: Seconds between the scans of a clean-up that finds a dead supervisor: usually all processes die within this time.
_SCAN_INTERVALS = (0.005, 0.01, 0.02, 0.04)
#: The shortest time in seconds between two rounds of killing.
_ROUND_INTERVAL = 0.02


@dataclass(frozen=True, slots=True)
class CallState:
    """The state of a call: its processes, and its resumable session, as values that JSON can represent."""

    tree: CallTree
    session: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CleanupResult:
    """The result of a clean-up.

    Attributes:
        killed: how many processes were killed for the first time.
        calls: the calls of dead supervisors whose ends may have to be reported, by id; each once.
        stop_reports: by id: of each call with a surviving process, and once more when none of its processes is left.
        again: whether processes were killed so recently that they may still be dying: clean up again soon.
    """

    killed: int = 0
    calls: Mapping[str, CallState] = field(default_factory=dict)
    stop_reports: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    again: bool = False


class StateDir:
    """The state files of one supervisor.

    Args:
        runtime_directory: the runtime directory; ``calls`` is created in it.

    Raises:
        OSError: the directory cannot be created.
    """

    def __init__(self, runtime_directory: Path, instance: str) -> None:
        self._all = runtime_directory / "calls"
        self._all.mkdir(mode=0o700, exist_ok=True)
        self._directory = self._all / instance
        unlocked = self._all / (_UNLOCKED + instance)
        unlocked.mkdir(mode=0o700)
        self._lock = os.open(unlocked, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unlocked.rename(self._directory)  # no other supervisor has seen it without its lock
        self._boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._suffixes: dict[str, str] = {}  # of the state files, by call id
        self._dead: dict[Path, int] = {}  # directories of dead supervisors, with the descriptors that lock them
        self._pending: list[OrphanedCall] = []
        self._last_round = 0.0

    def write(self, call_id: str, state: CallState) -> None:
        """Write the state file of a call. Raises OSError."""
        tree = state.tree
        members = {"boot": self._boot, "pid": tree.pid, "start": tree.start, **state.session}
        if tree.cgroup is not None:
            members["cgroup"] = tree.cgroup.path
        self._suffixes[call_id] = ""
        descriptor = os.open(call_id, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=self._lock)
        with open(descriptor, "wb", buffering=0) as file:
            file.write(json.dumps(members).encode())

    def mark_ended(self, call_id: str) -> None:
        """Record that no process of the call has to be stopped; its end may still have to be reported."""
        self._mark(call_id, _ENDED, _REPORTED)

    def mark_reported(self, call_id: str) -> None:
        """Record that the call's end need not be reported; processes of it may still have to be stopped."""
        self._mark(call_id, _REPORTED, _ENDED)

    def _mark(self, call_id: str, suffix: str, other: str) -> None:
        """Give a state file a suffix; delete it if it has the other one."""
        current = self._suffixes.get(call_id)
        if current == other:
            self.remove(call_id)
        elif current == "":
            self._suffixes[call_id] = suffix
            with contextlib.suppress(OSError):
                os.rename(call_id, call_id + suffix, src_dir_fd=self._lock, dst_dir_fd=self._lock)

    def remove(self, call_id: str) -> None:
        """Delete a state file: nothing has to be stopped or reported."""
        suffix = self._suffixes.pop(call_id, None)
        if suffix is not None:
            with contextlib.suppress(OSError):
                os.unlink(call_id + suffix, dir_fd=self._lock)

    def close(self) -> None:
        """Delete the state files of ended calls, at a normal exit. The next supervisor reads the files of survivors."""
        for file in self._directory.glob(f"*{_ENDED}"):
            with contextlib.suppress(OSError):
                file.unlink()
        with contextlib.suppress(OSError):  # survivors are left
            self._directory.rmdir()

    def clean_up(self) -> CleanupResult:
        """Kill the remaining processes of dead supervisors' calls. It blocks for at most some tens of milliseconds."""
        calls: dict[str, CallState] = {}
        found: list[OrphanedCall] = []
        for directory in self._find_dead():
            for file, suffix, state in self._read(directory):
                call_id = file.name.removesuffix(suffix)
                if suffix != _REPORTED:
                    calls[call_id] = state
                if suffix != _ENDED:
                    found.append(OrphanedCall(call_id, state.tree, file, to_report=suffix != _REPORTED))
        self._pending += found
        killed = self._kill(found)
        stop_reports = self._update_pending()
        return CleanupResult(killed, calls, stop_reports, any(call.is_fresh for call in self._pending))

    def _find_dead(self) -> Iterator[Path]:
        """Lock the directories of dead supervisors, and yield them."""
        for directory in sorted(self._all.iterdir()):
            if directory not in self._dead and not directory.name.startswith(_UNLOCKED):
                lock = _lock(directory)
                if lock is not None:
                    self._dead[directory] = lock
                    yield directory

    def _read(self, directory: Path) -> Iterator[tuple[Path, str, CallState]]:
        """Yield the state files of a dead supervisor: file, suffix, state."""
        for file in list(directory.iterdir()):
            suffix = file.suffix if file.suffix in (_ENDED, _REPORTED) else ""
            try:
                members = json.loads(file.read_text())
                cgroup = Cgroup(members["cgroup"]) if "cgroup" in members else None
                cookie = cookie_for(file.name.removesuffix(suffix))
                tree = CallTree(int(members["pid"]), int(members["start"]), cookie, cgroup)
                if members["boot"] == self._boot:
                    yield file, suffix, CallState(tree, members)
            except (OSError, ValueError, KeyError, TypeError):
                log.warning("cannot read state file", extra={"call": file.name})

    def _kill(self, found: list[OrphanedCall]) -> int:
        """Scan for the processes of all pending orphans, and kill them; return how many are new."""
        if not self._pending or (not found and time.monotonic() - self._last_round < _ROUND_INTERVAL):
            return 0
        killed = kill_orphans(self._pending)
        for interval in _SCAN_INTERVALS:
            if all(call.gone for call in found):
                break
            time.sleep(interval)
            killed += kill_orphans(self._pending)
        self._last_round = time.monotonic()
        return killed

    def _update_pending(self) -> dict[str, Mapping[str, Any]]:
        """Update the state files after a round of killing; return the stop reports that result from it."""
        stop_reports: dict[str, Mapping[str, Any]] = {}
        for call in self._pending:
            if call.to_report:
                call.to_report, call.reported_survivors = False, call.survives
            elif not call.gone:
                continue
            if call.reported_survivors:
                stop_reports[call.call_id] = call.stop_report()
            with contextlib.suppress(OSError):
                if call.gone:
                    call.file.unlink()
                else:  # this supervisor reports the end, and writes its own state file for that
                    call.file = call.file.rename(f"{call.file}{_REPORTED}")
        self._pending = [call for call in self._pending if not call.gone]
        in_use = {call.file.parent for call in self._pending}
        for directory in self._dead.keys() - in_use:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(self._dead.pop(directory))
        return stop_reports


def _lock(directory: Path) -> int | None:
    """Lock a supervisor's directory; return None if the supervisor lives, or another one has cleaned up."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if directory.exists():
            return descriptor
    os.close(descriptor)
    return None
