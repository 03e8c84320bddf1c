"""The calls that a dead warden has left: their processes are killed, and it is known when none is left.

Nobody has watched them for a while, so only what is surely theirs is killed. There are no steps and no grace: their end
was decided by the warden's death. Nothing here waits: each round is a look and the signals that follow from it.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Collection
from typing import Any

from harpd.processes.process_tree import CallTree, Snapshot, kill_group, send_signal, take_snapshot
from harpd.processes.stop_report import StopReport

__all__ = ["OrphanedCall", "kill_orphans"]

log = logging.getLogger("harpd.supervisor")

#: Seconds after which what is still there counts as what can't be killed.
_DEATH = 2.0


class OrphanedCall:
    """A call of a dead warden, of which processes may be left.

    Args:
        call_id: its id.
        tree: its processes.

    Attributes:
        gone: whether a look has found nothing more of it.
    """

    def __init__(self, call_id: str, tree: CallTree) -> None:
        self.call_id = call_id
        self.gone = False
        self._tree = tree
        self._findings = StopReport((tree.pid, tree.start))
        self._began = time.time()
        self._since = time.monotonic()
        self._logged = False

    @property
    def is_fresh(self) -> bool:
        """Whether it is known so short a time that what was killed may go any moment."""
        return time.monotonic() - self._since < _DEATH

    @property
    def survives(self) -> bool:
        """Whether the last look has found something."""
        return bool(self._findings.remaining)

    def stop_report(self) -> dict[str, Any]:
        """The receipt. What had left its parents and its mark behind may have escaped."""
        return self._findings.to_json(main_ended=True, complete=False, began=self._began)

    def scan(self, processes: Snapshot) -> int:
        """Note what is left; how many processes are new."""
        known = self._findings.remaining.keys()
        self._findings.record(self._tree.members(processes, known, late=True))
        group = self._tree.cgroup
        self.gone = processes.complete and not self.survives and not (group is not None and group.populated)
        if self.survives and not self.is_fresh and not self._logged:
            self._logged = True
            fields = {"call": self.call_id, "left": len(self._findings.remaining)}
            log.error("processes of a dead warden's call can't be killed", extra=fields)
        if self.gone and group is not None:
            group.remove()
        return len(self._findings.remaining.keys() - known)

    def halt(self) -> None:
        """Halt what is left, so that none of it forks while the others are killed."""
        for identity in self._findings.remaining:
            send_signal(signal.SIGSTOP, identity)

    def kill(self) -> None:
        """Kill what is left, and what that has forked since."""
        for identity in self._findings.remaining:
            if send_signal(signal.SIGKILL, identity):
                self._findings.record_signal(signal.SIGKILL, identity)
        for group in self._tree.process_groups(self._findings.remaining.values()):
            kill_group(group)
        if self._tree.cgroup is not None:
            self._tree.cgroup.kill()


def kill_orphans(calls: Collection[OrphanedCall]) -> int:
    """Look what is left of these calls, and kill it; how many processes of theirs the look has found newly."""
    processes = take_snapshot()
    found = sum(call.scan(processes) for call in calls)
    left = [call for call in calls if not call.gone]
    for call in left:
        call.halt()
    for call in left:
        call.kill()
    return found
