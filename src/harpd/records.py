"""Which calls there are, on disk: so that the next warden can end what a killed one left behind, and can say so.

A directory for each warden in ``calls/`` of the runtime directory, locked while the warden lives, with a small file for
each call. They are not synced: they have to outlive the warden, not the machine. A record may be old when it is read,
and its numbers may be others' by then: so it counts only before the system starts anew, and finds only what is surely
the call's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harpd.cgroup import Cgroup
from harpd.mark import entry
from harpd.processes import Tree, send, snapshot

__all__ = ["CallRecords", "Record", "Swept"]

log = logging.getLogger("harpd.warden")

#: What the name of a record ends with whose call has ended.
_OVER = ".over"
#: How often, and how many seconds apart, the sweep looks for what is left.
_SWEEPS, _PAUSE = 100, 0.02


@dataclass(frozen=True, slots=True)
class Record:
    """A call's record: its processes, and what else the next warden should know. Values that JSON can carry."""

    tree: Tree
    more: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep found.

    Attributes:
        killed: how many processes were killed.
        calls: the records of the dead wardens' calls, by their ids.
    """

    killed: int
    calls: Mapping[str, Record]


class CallRecords:
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
        self._directory.mkdir(mode=0o700)
        self._lock = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def add(self, call_id: str, record: Record) -> None:
        """Record a call. Raises OSError."""
        tree = record.tree
        text = {"boot": self._boot, "pid": tree.pid, "start": tree.start, **record.more}
        if tree.group is not None:
            text["cgroup"] = tree.group.path
        (self._directory / call_id).write_text(json.dumps(text))

    def over(self, call_id: str) -> None:
        """The call has ended, and its end is still to be told: what it has left running is not ours to stop."""
        with contextlib.suppress(OSError):
            os.rename(self._directory / call_id, self._directory / (call_id + _OVER))

    def remove(self, call_id: str) -> None:
        """Forget a call: nothing of it is left that is ours to stop or to tell."""
        for name in (call_id, call_id + _OVER):
            with contextlib.suppress(OSError):
                os.unlink(self._directory / name)

    def close(self) -> None:
        """Remove the directory, with what is left in it: this warden ends in order."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def sweep(self) -> Swept:
        """Kill what is left of the calls of wardens that have died, and forget them there."""
        calls: dict[str, Record] = {}
        killed = 0
        for directory in sorted(self._all.iterdir()):
            with _locked(directory) as dead:
                if dead:
                    found = dict(self._read(directory))
                    killed += _kill([record.tree for name, record in found.items() if not name.endswith(_OVER)])
                    calls.update({name.removesuffix(_OVER): record for name, record in found.items()})
                    shutil.rmtree(directory, ignore_errors=True)
        return Swept(killed, calls)

    def _read(self, directory: Path) -> Iterator[tuple[str, Record]]:
        for file in directory.iterdir():
            try:
                record = json.loads(file.read_text())
                group = Cgroup(record["cgroup"]) if "cgroup" in record else None
                tree = Tree(int(record["pid"]), int(record["start"]), entry(file.name.removesuffix(_OVER)), group)
                if record["boot"] == self._boot:
                    yield file.name, Record(tree, record)
            except (OSError, ValueError, KeyError, TypeError):
                log.warning("a record of a call can't be read", extra={"call": file.name})


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Lock a warden's directory; whether that could be done, which means that the warden is dead."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _kill(trees: list[Tree]) -> int:
    killed: set[tuple[int, int]] = set()
    for _ in range(_SWEEPS if trees else 0):
        processes = snapshot()
        left = {member.identity for tree in trees for member in tree.members(processes, killed, late=True)}
        if not left:
            break
        for number in (signal.SIGSTOP, signal.SIGKILL):  # none forks while the others are killed
            for identity in left:
                send(number, identity)
        killed |= left
        time.sleep(_PAUSE)
    else:
        if trees:
            log.error("processes of dead calls can't be killed", extra={"left": len(left)})
    for tree in trees:
        if tree.group is not None:
            tree.group.remove()
    return len(killed)
