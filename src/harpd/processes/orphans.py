"""Orphaned calls: their supervisor has died. Their processes are killed, until a scan finds none.

They were not watched for a while, so only processes that certainly belong to the call are killed. There are no steps
and no grace period: the supervisor's death has ended the calls. This module does not wait: a round is a scan and its
signals.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Collection
from typing import Any

from harpd.processes.process_tree import CallTree, Process, Snapshot, kill_group, send_signal, take_snapshot
from harpd.processes.stop_report import StopReport

log = logging.getLogger("harpd.supervisor")

#: Seconds after which processes that remain count as unkillable.
_DEATH_TIMEOUT = 2.0


class OrphanedCall:
    """A call of a dead supervisor, of which processes may remain."""

    def __init__(self, call_id: str, tree: CallTree) -> None:
        self.call_id = call_id
        #: Whether a scan has shown that no process remains.
        self.ended = False
        self._tree = tree
        self._report = StopReport((tree.pid, tree.start))
        self._started_at = time.time()
        self._found_at = time.monotonic()
        self._logged = False
        self._groups: dict[int, Process | None] = {}  # those that the last scan has found, with their leaders

    @property
    def is_fresh(self) -> bool:
        """Whether it was found less than `_DEATH_TIMEOUT` ago: its processes may still be dying."""
        return time.monotonic() - self._found_at < _DEATH_TIMEOUT

    @property
    def survives(self) -> bool:
        """Whether the last scan has found a process of it."""
        return bool(self._report.remaining)

    def stop_report(self) -> dict[str, Any]:
        """Return the stop report. It is never complete: a process without parent and cookie may have escaped."""
        return self._report.to_json(main_ended=True, complete=False, started_at=self._started_at)

    def scan(self, processes: Snapshot) -> int:
        """Record the processes that remain; return how many of them are new."""
        previous, cgroup = self._report.remaining.keys(), self._tree.cgroup
        self._report.record(self._tree.members(processes, previous, ignore_session=True))
        remaining = self._report.remaining
        groups = self._tree.process_groups(remaining.values(), remaining, processes)
        self._groups = {group: processes.get(group) for group in groups}
        self.ended = processes.complete and not self.survives and not (cgroup is not None and cgroup.populated)
        if self.survives and not self.is_fresh and not self._logged:
            self._logged = True
            fields = {"call": self.call_id, "remaining": len(self._report.remaining)}
            log.error("cannot kill orphaned processes", extra=fields)
        if self.ended and cgroup is not None:
            cgroup.remove()
        return len(self._report.remaining.keys() - previous)

    def kill(self) -> None:
        """Kill the found processes, and those that they have forked since the scan."""
        for identity in self._report.remaining:
            if send_signal(signal.SIGKILL, identity):
                self._report.record_signal(signal.SIGKILL, identity)
        for group, leader in self._groups.items():
            kill_group(group, leader)
        if self._tree.cgroup is not None:
            self._tree.cgroup.kill()


def kill_orphans(calls: Collection[OrphanedCall]) -> int:
    """Scan for the processes of these calls and kill them; return how many were found for the first time."""
    processes = take_snapshot()
    found = sum(call.scan(processes) for call in calls)
    remaining = [call for call in calls if not call.ended]
    for call in remaining:  # so that no process forks while others are killed
        for identity in call._report.remaining:
            send_signal(signal.SIGSTOP, identity)
    for call in remaining:
        call.kill()
    return found
