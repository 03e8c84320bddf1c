"""Which calls there are, on disk: so that the next warden can end what a killed one left behind, and can say so.

A directory for each warden in ``calls/`` of the runtime directory, locked while the warden lives, with a small file for
each call. They are not synced: they have to outlive the warden, not the machine. A record may be old when it is read,
and its numbers may be others' by then: so it counts only before the system starts anew, and finds only what is surely
the call's.

A record says two things, and stays for as long as one of them holds: that processes of the call may have to be ended,
and that somebody may have to be told of its end. Its name says which: the call's id for both; ``.reported`` behind it
when only the first holds, ``.ended`` when only the second does.

Whoever finds a dead warden keeps its directory locked until no process of its calls is left. What can't be killed is
told once, like the survivors of any stop, and tried again with each sweep.
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

__all__ = ["CallState", "CleanupResult", "StateDir"]

log = logging.getLogger("harpd.supervisor")

#: What the name of a record ends with of which only the end has to be told, or only processes have to be ended.
_OVER, _TOLD = ".ended", ".reported"
#: What the name of a directory begins with that is not locked yet.
_UNLOCKED = "."
#: A sweep that finds a dead warden looks some times more, so many seconds apart: mostly all are dead by then.
_PAUSES = (0.005, 0.01, 0.02, 0.04)
#: Seconds between two rounds of killing at least, however often is swept.
_ROUND = 0.02


@dataclass(frozen=True, slots=True)
class CallState:
    """A call's record: its processes, and what else the next warden should know. Values that JSON can carry."""

    tree: CallTree
    session: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CleanupResult:
    """What a sweep found.

    Attributes:
        killed: how many processes were killed that were not before.
        calls: the dead wardens' calls of which somebody may have to be told, by their ids; each once, when it is found.
        receipts: of those calls of which something survives; and later, of each once more, when that is gone.
        again: whether something was killed so lately that it may go any moment: the next sweep should come soon.
    """

    killed: int = 0
    calls: Mapping[str, CallState] = field(default_factory=dict)
    stop_reports: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    again: bool = False


@dataclass(slots=True)
class _PendingOrphan:
    """A call of a dead warden that is not known to be gone.

    Attributes:
        call: it.
        file: its record.
        to_tell: whether somebody has still to be told of its end.
        told: whether that was told, with survivors.
    """

    call: OrphanedCall
    file: Path
    to_tell: bool
    told: bool = False


class StateDir:
    """The records of one warden.

    Args:
        runtime_directory: the runtime directory; ``calls`` is made in it.
        warden: this warden's incarnation.

    Raises:
        OSError: the directory can't be made.
    """

    def __init__(self, runtime_directory: Path, warden: str) -> None:
        self._all = runtime_directory / "calls"
        self._all.mkdir(mode=0o700, exist_ok=True)
        self._directory = self._all / warden
        unlocked = self._all / (_UNLOCKED + warden)
        unlocked.mkdir(mode=0o700)
        self._lock = os.open(unlocked, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unlocked.rename(self._directory)  # nobody has seen it without its lock
        self._boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._endings: dict[str, str] = {}  # what the names of the records end with, by call
        self._dead: dict[Path, int] = {}  # directories of dead wardens, with the descriptors that lock them
        self._left: list[_PendingOrphan] = []
        self._round_at = 0.0

    def write(self, call_id: str, record: CallState) -> None:
        """Record a call. Raises OSError."""
        tree = record.tree
        text = {"boot": self._boot, "pid": tree.pid, "start": tree.start, **record.session}
        if tree.cgroup is not None:
            text["cgroup"] = tree.cgroup.path
        self._endings[call_id] = ""
        descriptor = os.open(call_id, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=self._lock)
        with open(descriptor, "wb", buffering=0) as file:
            file.write(json.dumps(text).encode())

    def mark_ended(self, call_id: str) -> None:
        """Nothing of the call has to be ended any more; its end may still have to be told."""
        self._settle(call_id, _OVER, _TOLD)

    def mark_reported(self, call_id: str) -> None:
        """Nobody has to be told of the call's end any more; processes of it may still have to be ended."""
        self._settle(call_id, _TOLD, _OVER)

    def _settle(self, call_id: str, this: str, other: str) -> None:
        """One of the two things that the record says holds no more; forget it if the other doesn't either."""
        ending = self._endings.get(call_id)
        if ending == other:
            self.remove(call_id)
        elif ending == "":
            self._endings[call_id] = this
            with contextlib.suppress(OSError):
                os.rename(call_id, call_id + this, src_dir_fd=self._lock, dst_dir_fd=self._lock)

    def remove(self, call_id: str) -> None:
        """Forget a call: nothing of it has to be ended, and nobody to be told."""
        ending = self._endings.pop(call_id, None)
        if ending is not None:
            with contextlib.suppress(OSError):
                os.unlink(call_id + ending, dir_fd=self._lock)

    def close(self) -> None:
        """This warden ends in order: there is nobody to be told. What survives is left to the next one."""
        for file in self._directory.glob(f"*{_OVER}"):
            with contextlib.suppress(OSError):
                file.unlink()
        with contextlib.suppress(OSError):  # there is something left
            self._directory.rmdir()

    def clean_up(self) -> CleanupResult:
        """Kill what is left of the calls of wardens that have died. It takes some tens of milliseconds at the most."""
        calls: dict[str, CallState] = {}
        found: list[_PendingOrphan] = []
        for directory in self._find_dead():
            for file, ending, record in self._read(directory):
                call_id = file.name.removesuffix(ending)
                if ending != _TOLD:
                    calls[call_id] = record
                if ending != _OVER:
                    found.append(_PendingOrphan(OrphanedCall(call_id, record.tree), file, ending != _TOLD))
        self._left += found
        killed = self._end(found)
        receipts = self._settle_left()
        return CleanupResult(killed, calls, receipts, any(left.call.is_fresh for left in self._left))

    def _find_dead(self) -> Iterator[Path]:
        """Lock the directories of wardens that have died."""
        for directory in sorted(self._all.iterdir()):
            if directory not in self._dead and not directory.name.startswith(_UNLOCKED):
                lock = _lock(directory)
                if lock is not None:
                    self._dead[directory] = lock
                    yield directory

    def _read(self, directory: Path) -> Iterator[tuple[Path, str, CallState]]:
        """A dead warden's records: file, what its name ends with, record."""
        for file in list(directory.iterdir()):
            ending = file.suffix if file.suffix in (_OVER, _TOLD) else ""
            try:
                record = json.loads(file.read_text())
                group = Cgroup(record["cgroup"]) if "cgroup" in record else None
                tree = CallTree(
                    int(record["pid"]), int(record["start"]), cookie_for(file.name.removesuffix(ending)), group
                )
                if record["boot"] == self._boot:
                    yield file, ending, CallState(tree, record)
            except (OSError, ValueError, KeyError, TypeError):
                log.warning("a record of a call can't be read", extra={"call": file.name})

    def _end(self, found: list[_PendingOrphan]) -> int:
        """Look for what is left, and kill it; how much of it is new."""
        if not self._left or (not found and time.monotonic() - self._round_at < _ROUND):
            return 0
        calls = [left.call for left in self._left]
        killed = kill_orphans(calls)
        for pause in _PAUSES:
            if all(left.call.gone for left in found):
                break
            time.sleep(pause)
            killed += kill_orphans(calls)
        self._round_at = time.monotonic()
        return killed

    def _settle_left(self) -> dict[str, Mapping[str, Any]]:
        """Bring the records up to what the last round has found; the receipts that follow from it."""
        receipts: dict[str, Mapping[str, Any]] = {}
        for left in self._left:
            if left.to_tell:
                left.to_tell, left.told = False, left.call.survives
            elif not left.call.gone:
                continue
            if left.told:
                receipts[left.call.call_id] = left.call.stop_report()
            with contextlib.suppress(OSError):
                if left.call.gone:
                    left.file.unlink()
                else:  # whoever sweeps tells it, and makes a record of that if need be
                    left.file = left.file.rename(f"{left.file}{_TOLD}")
        self._left = [left for left in self._left if not left.call.gone]
        waiting = {left.file.parent for left in self._left}
        for directory in self._dead.keys() - waiting:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(self._dead.pop(directory))
        return receipts


def _lock(directory: Path) -> int | None:
    """Lock a warden's directory; None: that can't be done, for the warden lives, or another has swept it."""
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
