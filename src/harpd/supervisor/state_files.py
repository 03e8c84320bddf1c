"""State files: they let a new supervisor stop and report the calls of a killed one.

Each supervisor has one file in ``calls/`` of the runtime directory, locked while it lives, with an entry for each call.
It is not synced: it has to survive the supervisor, not the machine. When an entry is read, it may be old, and its pid
may belong to another process. So it counts only until the next boot, and only processes that certainly belong to the
call are killed. A damaged entry is rejected alone: the others of its file stay valid.

An entry has two purposes and is cleared when both are done: to stop processes of the call, and to report its end to its
dispatcher. Space is reserved before a call starts. So no later change of an entry can find the disk full.

The supervisor that finds the file of a dead one locks it until all processes of its calls have ended. Processes that
cannot be killed are reported once, as survivors, and every clean-up tries again.

Spec: docs/state-file.md.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from harp.protocol.json_text import InvalidJSON, Raw, dumps, loads
from harpd.processes.cgroup import Cgroup
from harpd.processes.cookie import cookie_for
from harpd.processes.orphans import OrphanedCall, kill_orphans
from harpd.processes.process_tree import CallTree
from harpd.supervisor.runtime_directory import is_open

log = logging.getLogger("harpd.supervisor")

#: The version of the format, at the end of the name of each file; the first character of a name before it is locked.
_SUFFIX, _UNLOCKED = ".1", "."
#: Bytes of an entry: one page of memory, which the kernel writes in one piece.
ENTRY_SIZE = 4096
#: How many entries are reserved in one step, and how many are read at most.
_GROWTH, _MAX_ENTRIES = 16, 1 << 18
#: The part of an entry that is overwritten to clear it: purpose and checksum.
_CLEARED = bytes(10)
#: A call's id is an entry of the environment and the name of a cgroup. The frontend uses UUIDs.
CALL_ID = re.compile(r"[0-9A-Za-z-]{1,36}")
_ENTRY = re.compile(rb"([RES]) ([0-9a-f]{8}) ([^\n]*)\n")
#: Seconds between the scans of a clean-up that finds a dead supervisor: usually all processes die within this time.
_SCAN_INTERVALS = (0.005, 0.01, 0.02, 0.04)
#: The shortest time in seconds between two rounds of killing.
_ROUND_INTERVAL = 0.02


class Purpose(Enum):
    """The work of a later supervisor for a call."""

    STOP_AND_REPORT = b"R"
    ONLY_REPORT = b"E"
    ONLY_STOP = b"S"


class InvalidEntry(ValueError):
    """An entry that is not valid. The message has the reason."""


@dataclass(frozen=True, slots=True)
class CallState:
    """The state of a call, as a later supervisor finds it."""

    call_id: str
    tree: CallTree
    session: Mapping[str, Any] | None  # the members of its session, not checked; None: it is connection-bound


def encode_state(call_id: str, boot: str, tree: CallTree, session: Raw | None) -> bytes:
    """Return the content of a call's entry. Processes are identified until the next boot, so it has the boot id."""
    cgroup = b"" if tree.cgroup is None else b',"cgroup":%b' % dumps(tree.cgroup.path)
    resumable = b"" if session is None else b',"resumable":%b' % session
    uid = b"" if tree.uid is None else b',"uid":%d' % tree.uid
    head = f'{{"call":"{call_id}","boot":"{boot}","pid":{tree.pid},"start":{tree.start}'
    return b"%b%b%b%b}" % (head.encode(), uid, cgroup, resumable)


def encode_entry(purpose: Purpose, content: bytes) -> bytes:
    """Return the bytes of an entry, of which there are at most `ENTRY_SIZE`."""
    letter = purpose.value
    return b"%b %08x %b\n" % (letter, zlib.crc32(content, zlib.crc32(letter)), content)


def decode_entry(data: bytes, boot: str) -> tuple[Purpose, bytes, CallState] | None:
    """Return purpose, content and state of an entry; None: it is unused, or of another boot. Raises `InvalidEntry`."""
    if not data or data.startswith(b"\0"):
        return None
    found = _ENTRY.match(data)
    if found is None:
        raise InvalidEntry("it is not an entry")
    purpose, checksum, content = found.groups()
    if int(checksum, 16) != zlib.crc32(content, zlib.crc32(purpose)):
        raise InvalidEntry("the checksum is wrong")
    try:
        members = loads(content)
        call_id, pid, start, cgroup = members["call"], members["pid"], members["start"], members.get("cgroup")
        uid = members.get("uid")
        numbers = (pid, start, 0 if uid is None else uid)
        valid = all(type(number) is int and number >= 0 for number in numbers) and pid > 1
        # Its own cgroup and no other one: all processes in it are killed.
        if not (valid and CALL_ID.fullmatch(call_id)) or not (cgroup is None or cgroup.endswith(f"/call-{call_id}")):
            raise InvalidEntry("it does not describe a call")
        if members["boot"] != boot:
            return None
    except (InvalidJSON, KeyError, TypeError, AttributeError) as error:
        raise InvalidEntry(f"it does not describe a call: {error!r}") from error
    tree = CallTree(pid, start, cookie_for(call_id), None if cgroup is None else Cgroup(cgroup), uid)
    return Purpose(purpose), content, CallState(call_id, tree, members.get("resumable"))


@dataclass(slots=True)
class _Entry:
    """An entry of a file; no purpose: it is reserved."""

    number: int
    content: bytes = b""
    purpose: Purpose | None = None


class _OpenFile:
    """A state file that this process has open and locked."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._reserved = 0

    @classmethod
    def create(cls, directory: Path, instance: str) -> _OpenFile:
        """Create the file of this supervisor. It is locked before other supervisors can find it. Raises OSError."""
        unlocked, path = directory / f"{_UNLOCKED}{instance}", directory / f"{instance}{_SUFFIX}"
        descriptor = os.open(unlocked, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        unlocked.rename(path)
        return cls(path, descriptor)

    @classmethod
    def lock_dead(cls, path: Path) -> _OpenFile | None:
        """Lock the file of a dead supervisor; None if it lives, another supervisor has cleaned up, or it is no file."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if stat.S_ISREG(os.fstat(descriptor).st_mode) and is_open(path, descriptor):
                return cls(path, descriptor)
        os.close(descriptor)
        return None

    def read(self, boot: str) -> Iterator[tuple[_Entry, CallState]]:
        """Yield the valid entries since this boot, each with the state of its call."""
        invalid: list[str] = []
        for number in range(min(-(-os.fstat(self._descriptor).st_size // ENTRY_SIZE), _MAX_ENTRIES)):
            try:
                found = decode_entry(os.pread(self._descriptor, ENTRY_SIZE, number * ENTRY_SIZE), boot)
            except (InvalidEntry, OSError) as error:
                invalid.append(str(error))
                continue
            if found is not None:
                purpose, content, state = found
                yield _Entry(number, content, purpose), state
        if invalid:
            fields = {"file": str(self.path), "entries": len(invalid), "reason": invalid[0]}
            log.warning("cannot read state of calls", extra=fields)

    def grow(self) -> list[int]:
        """Reserve space for more entries; return their numbers. Raises OSError."""
        first = self._reserved
        try:  # reserved, not sparse: a later write would fail on a full disk
            os.posix_fallocate(self._descriptor, first * ENTRY_SIZE, _GROWTH * ENTRY_SIZE)
        except OSError as error:
            raise OSError(error.errno, f"state file {self.path}: {error.strerror}") from error
        self._reserved += _GROWTH
        return [*range(first, self._reserved)]

    def write(self, entry: _Entry) -> None:
        assert entry.purpose is not None
        data = encode_entry(entry.purpose, entry.content)
        if len(data) > ENTRY_SIZE:
            raise OSError(errno.ENAMETOOLONG, f"state file {self.path}: an entry has at most {ENTRY_SIZE} bytes")
        os.pwrite(self._descriptor, data, entry.number * ENTRY_SIZE)

    def clear(self, entry: _Entry) -> None:
        """Clear an entry. If that fails, a later supervisor looks for an ended call."""
        try:
            os.pwrite(self._descriptor, _CLEARED, entry.number * ENTRY_SIZE)
        except OSError:
            pass

    def exists(self) -> bool:
        return is_open(self.path, self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


@dataclass(frozen=True, slots=True)
class CleanupResult:
    """The result of a clean-up."""

    killed: int = 0  # how many processes were killed for the first time
    #: Calls of dead supervisors, by id, each once: their ends may have to be reported.
    calls: Mapping[str, CallState] = field(default_factory=dict)
    #: By id: of each call with a surviving process, and again when its last process has ended.
    stop_reports: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    repeat_soon: bool = False  # whether killed processes may still be dying: clean up again soon


class _Orphan(OrphanedCall):
    """A call of a dead supervisor of which processes may remain, and its entry."""

    def __init__(self, state: CallState, file: _OpenFile, entry: _Entry) -> None:
        super().__init__(state.call_id, state.tree)
        self.file = file
        self.entry = entry
        self.reported_survivors = False


class StateFiles:
    """The state file of one supervisor, and those of dead supervisors. Raises OSError if the file cannot be created."""

    def __init__(self, runtime_directory: Path, instance: str) -> None:
        self._directory = runtime_directory / "calls"
        self._instance = instance
        self._closed = False
        self._directory.mkdir(mode=0o700, exist_ok=True)
        self._file = _OpenFile.create(self._directory, instance)
        self._boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._entries: dict[str, _Entry] = {}
        self._free: list[int] = []
        self._dead: dict[str, _OpenFile] = {}  # files of dead supervisors, by name
        self._orphans: list[_Orphan] = []
        self._last_round = 0.0

    def restore(self) -> bool:
        """Create the file again, with all entries, if it has been removed; return whether. Raises OSError."""
        if self._closed or self._file.exists():
            return False
        self._directory.mkdir(mode=0o700, exist_ok=True)
        file, free = _OpenFile.create(self._directory, self._instance), list[int]()
        try:
            for entry in self._entries.values():
                free = free or file.grow()
                entry.number = free.pop()
                if entry.purpose is not None:
                    file.write(entry)
        except OSError:  # the numbers do not matter: the present file is missing
            file.delete()
            raise
        self._file.close()
        self._file, self._free = file, free
        return True

    # The calls of this supervisor.

    def reserve(self, call_id: str) -> None:
        """Reserve an entry for a call that is to start. Raises OSError: the file cannot grow."""
        if not self._free:
            self._free = self._file.grow()
        self._entries[call_id] = _Entry(self._free.pop())

    def write(
        self, call_id: str, tree: CallTree, session: Raw | None, purpose: Purpose = Purpose.STOP_AND_REPORT
    ) -> None:
        """Write the entry of a call: its processes and its resumable session. Raises OSError."""
        if call_id not in self._entries:
            self.reserve(call_id)
        entry = self._entries[call_id]
        entry.content, entry.purpose = encode_state(call_id, self._boot, tree, session), purpose
        self._file.write(entry)

    def mark_ended(self, call_id: str) -> None:
        """Record that no process of the call has to be stopped; its end may still have to be reported."""
        self._reduce_entry(call_id, Purpose.ONLY_REPORT)

    def mark_reported(self, call_id: str) -> None:
        """Record that the call's end need not be reported; processes of it may still have to be stopped."""
        self._reduce_entry(call_id, Purpose.ONLY_STOP)

    def _reduce_entry(self, call_id: str, purpose: Purpose) -> None:
        """Reduce an entry to one purpose; clear it if it had only the other purpose."""
        entry = self._entries.get(call_id)
        if entry is None or entry.purpose is purpose:
            return
        if entry.purpose is not Purpose.STOP_AND_REPORT:
            self.remove(call_id)
            return
        entry.purpose = purpose
        try:
            self._file.write(entry)
        except OSError:
            pass  # a later supervisor repeats work then, without harm

    def remove(self, call_id: str) -> None:
        """Clear the entry of a call, if it has one: its processes have ended, and its end is reported."""
        entry = self._entries.pop(call_id, None)
        if entry is not None:
            self._free.append(entry.number)
            if entry.purpose is not None:
                self._file.clear(entry)

    def close(self) -> None:
        """Clear the entries of ended calls, at a normal exit. The next supervisor reads those of survivors."""
        for call_id, entry in [*self._entries.items()]:
            if entry.purpose in (Purpose.ONLY_REPORT, None):
                self.remove(call_id)
        self._closed = True
        if not self._entries:
            self._file.delete()

    # The calls of dead supervisors.

    def clean_up(self, adopt: Callable[[CleanupResult], None] = lambda result: None) -> CleanupResult:
        """Kill the remaining processes of dead supervisors' calls. It blocks for at most some tens of milliseconds.

        `adopt` writes entries for the ends that this supervisor reports from now on; those of dead
        supervisors are cleared afterwards, so that no end is lost if this supervisor is killed, too.
        """
        calls: dict[str, CallState] = {}
        found: list[_Orphan] = []
        for file in self._lock_dead():
            for entry, state in file.read(self._boot):
                if entry.purpose is not Purpose.ONLY_STOP:
                    calls[state.call_id] = state
                if entry.purpose is not Purpose.ONLY_REPORT:
                    found.append(_Orphan(state, file, entry))
        self._orphans += found
        killed = self._kill_orphans(found)
        repeat_soon = any(orphan.is_fresh for orphan in self._orphans if not orphan.ended)
        result = CleanupResult(killed, calls, self._stop_reports(), repeat_soon)
        adopt(result)
        self._update_orphans()
        return result

    def _lock_dead(self) -> Iterator[_OpenFile]:
        for name in sorted(os.listdir(self._directory)):
            is_locked = name in self._dead or name == self._file.path.name
            if not is_locked and name.endswith(_SUFFIX) and not name.startswith(_UNLOCKED):
                file = _OpenFile.lock_dead(self._directory / name)
                if file is not None:
                    self._dead[name] = file
                    yield file

    def _kill_orphans(self, found: list[_Orphan]) -> int:
        """Scan for the processes of all orphans, and kill them; return how many were found for the first time."""
        if not self._orphans or (not found and time.monotonic() - self._last_round < _ROUND_INTERVAL):
            return 0
        killed = kill_orphans(self._orphans)
        for interval in _SCAN_INTERVALS:
            if all(orphan.ended for orphan in found):
                break
            time.sleep(interval)
            killed += kill_orphans(self._orphans)
        self._last_round = time.monotonic()
        return killed

    def _stop_reports(self) -> dict[str, Mapping[str, Any]]:
        """Return the stop reports that result from a round of killing."""
        stop_reports: dict[str, Mapping[str, Any]] = {}
        for orphan in self._orphans:
            if not orphan.ended:
                if orphan.entry.purpose is not Purpose.STOP_AND_REPORT:
                    continue
                orphan.reported_survivors = orphan.survives
            if orphan.reported_survivors:
                stop_reports[orphan.call_id] = orphan.stop_report()
        return stop_reports

    def _update_orphans(self) -> None:
        """Update the state files after a round of killing."""
        for orphan in self._orphans:
            if orphan.ended:
                orphan.file.clear(orphan.entry)
            elif orphan.entry.purpose is Purpose.STOP_AND_REPORT:
                # This supervisor reports the end, and has written its own entry.
                orphan.entry.purpose = Purpose.ONLY_STOP
                with contextlib.suppress(OSError):
                    orphan.file.write(orphan.entry)
        self._orphans = [orphan for orphan in self._orphans if not orphan.ended]
        for name in self._dead.keys() - {orphan.file.path.name for orphan in self._orphans}:
            self._dead.pop(name).delete()
