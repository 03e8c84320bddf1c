"""Stopping a call's processes: all of them, none else, and it is known when none is left.

SIGXCPU to the main process for a limit, which may clean up; then SIGTERM to the tree, then SIGKILL, `kill_grace`
seconds between the steps. Before they are killed all are halted by SIGSTOP, until a look finds no new one. The main
process is killed last: as their subreaper it keeps the others findable. What goes on forking faster than it is halted
is killed at once with all the rest, by process groups; what is in a cgroup always is, if the system can do that.

The call is gone when a look at the processes that is younger than the main process's death finds none of its own, its
cgroup is empty, and nothing may have escaped. A doubt of that is settled by further looks, if it can be, or it is told.

What was found, what it was sent and what became of it is the receipt. Whatever survives SIGKILL for `kill_grace`
seconds is told once, and watched on.

A look costs some milliseconds; steps begin in the loop's next turn, so that all calls that are stopped in this one
share it. Each step arranges for the next one first: whatever fails in it, the next one comes.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

from harpd.processes.process_tree import CallTree, Process, Snapshot, kill_group, send_signal
from harpd.processes.stop_report import StopReport
from harpd.supervisor.event_loop import EventLoop, Timer

__all__ = ["TerminationSequence"]

#: Seconds between two looks whether processes are gone: at first, and the most.
_LOOK, _LOOK_RARELY = 0.05, 1.0
#: Seconds that processes have at least to be gone after SIGKILL before they count as survivors.
_DEATH = 2.0
#: So often processes are halted before they are killed although there are ever new ones.
_MOST_HALTS = 20
#: How many further looks a doubt whether something has escaped is worth, and how many seconds apart.
_MOST_DOUBTS, _DOUBT = 5, 0.02
#: Seconds without a look after which the number of the main process's session may be another's.
_TRUSTED = 10.0


class TerminationSequence:
    """What ends the processes of one call.

    Args:
        loop: the event loop.
        tree: the call's processes.
        kill_grace: seconds between the steps.
        look: gives all processes as they were at this moment of the monotonic clock, or later.
        strays: whether among these processes is one that may be the call's and can't be told to be.
        on_survived: called once, when something has survived SIGKILL for `kill_grace` seconds.
        on_gone: called once, when the main process has ended and none of the others is left.
    """

    def __init__(
        self,
        loop: EventLoop,
        tree: CallTree,
        kill_grace: float,
        look: Callable[[float], Snapshot],
        strays: Callable[[Snapshot, CallTree], bool],
        on_survived: Callable[[], None],
        on_gone: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._tree = tree
        self._main = (tree.pid, tree.start)
        self._kill_grace = kill_grace
        self._look = look
        self._strays = strays
        self._on_survived = on_survived
        self._on_gone = on_gone
        self._step: Timer | None = None
        self._check: Timer | None = None
        self._survived: Timer | None = None
        self._findings = StopReport(self._main)
        self._processes = Snapshot()
        self._looked_at: float | None = None
        self._changed_at = 0.0  # a look must be younger than this to tell how things are
        self._halted: set[tuple[int, int]] = set()
        self._halts = self._doubts = 0
        self._pause = _LOOK
        self._main_ended = False
        self._complete = False
        self._began = 0.0
        self._ended: float | None = None

    def start(self, interrupt: bool) -> None:
        """Begin to stop everything. `interrupt`: by SIGXCPU to the main process."""
        self._began = time.time()
        self._changed_at = time.monotonic()
        self._step = self._loop.call_later(0, self._interrupt if interrupt else self._terminate)

    def expect_exit(self) -> None:
        """The main process is about to end by itself; it is killed if it does not."""
        self._step = self._loop.call_later(self._kill_grace, self._kill_main)

    def on_main_exit(self, status: int) -> None:
        """The main process has been reaped, with this wait status; what is left has to end, too."""
        self._main_ended = True
        self._looked_at = None  # it had its number until now
        self._findings.record_exit(status)
        self._began = self._began or time.time()
        self._changed_at = time.monotonic()
        self._check = self._loop.call_later(0, self._look_for_survivors)

    def cancel(self) -> None:
        """Do nothing more."""
        for timer in (self._step, self._check, self._survived):
            if timer is not None:
                timer.cancel()

    def stop_report(self) -> dict[str, Any] | None:
        """What was found, what it was sent, what became of it; None: nothing had to be stopped.

        Spec: docs/protocol.md, Kept calls.
        """
        if not self._began:
            return None
        return self._findings.to_json(self._main_ended, self._complete, self._began, self._ended)

    # The steps.

    def _kill_main(self) -> None:
        send_signal(signal.SIGKILL, self._main)

    def _interrupt(self) -> None:
        self._step = self._loop.call_later(self._kill_grace, self._terminate)
        self._find()  # what its end lets escape is known from now on
        self._send(signal.SIGXCPU, self._main)

    def _terminate(self) -> None:
        self._step = self._loop.call_later(self._kill_grace, self._kill)
        self._pause = _LOOK
        for identity in self._find():
            self._send(signal.SIGTERM, identity)

    def _kill(self) -> None:
        """Halt what is left, then kill it; again and again until nothing is."""
        self._step = self._loop.call_later(self._patience(), self._kill)
        members = self._find()
        new = members.keys() - self._halted
        if new and self._halts < _MOST_HALTS:
            for identity in new:
                send_signal(signal.SIGSTOP, identity)
            self._halted = set(members)
            self._halts += 1
            self._pause = _LOOK
            self._step.cancel()
            self._step = self._loop.call_later(0, self._kill)
        else:
            self._kill_members(members, outrun=bool(new))
            self._halts = 0
            if self._survived is None:
                self._survived = self._loop.call_later(max(self._kill_grace, _DEATH), self._tell_survivors)
        self._changed_at = time.monotonic()
        if self._is_gone():
            self._leave()

    def _kill_members(self, members: Mapping[tuple[int, int], Process], outrun: bool) -> None:
        """Kill what was halted. `outrun`: there were ever new ones, so all have to go at once, the main one too."""
        cgroup = self._tree.cgroup
        at_once = outrun or (cgroup is not None and cgroup.can_kill)
        main = members.keys() & {self._main}
        targets = members.keys() if at_once else (members.keys() - main or main)
        for identity in targets:
            self._send(signal.SIGKILL, identity)
        spared = {self._tree.pid} if main - targets else set()
        for group in self._tree.process_groups(members[identity] for identity in targets) - spared:
            kill_group(group)
        if cgroup is not None:
            cgroup.kill()

    def _send(self, number: signal.Signals, identity: tuple[int, int]) -> None:
        if send_signal(number, identity):
            self._findings.record_signal(number, identity)

    # What there is.

    def _find(self) -> Mapping[tuple[int, int], Process]:
        """Look, if need be, and note what is left; all of it that is known, by identity."""
        now = time.monotonic()
        late = self._looked_at is not None and now - self._looked_at > _TRUSTED
        self._looked_at = now
        self._processes = self._look(self._changed_at)
        self._findings.record(self._tree.members(self._processes, self._findings.remaining, late))
        return self._findings.remaining

    def _is_empty(self) -> bool:
        """Whether the last look has found nothing."""
        cgroup = self._tree.cgroup
        return self._main_ended and not self._findings.remaining and not (cgroup is not None and cgroup.populated)

    def _is_gone(self) -> bool:
        """Whether the last look has found nothing; if something may have escaped, some further ones as well."""
        if not self._is_empty():
            self._doubts = 0
            return False
        self._complete = not self._strays(self._processes, self._tree)
        self._doubts += 1
        return self._complete or self._doubts > _MOST_DOUBTS

    def _look_for_survivors(self) -> None:
        self._check = self._loop.call_later(self._patience(), self._look_for_survivors)
        self._find()
        if self._is_gone():
            self._leave()
        elif self._doubts:
            self._changed_at = time.monotonic()
            self._check.cancel()
            self._check = self._loop.call_later(_DOUBT, self._look_for_survivors)
        elif self._step is None:
            self._terminate()

    def _tell_survivors(self) -> None:
        self._find()
        if self._is_empty():  # gone, which the next step tells; or never twice the same, and not seen this time
            self._survived = self._loop.call_later(_LOOK_RARELY, self._tell_survivors)
        else:
            self._on_survived()

    def _patience(self) -> float:
        pause, self._pause = self._pause, min(2 * self._pause, _LOOK_RARELY)
        return pause

    def _leave(self) -> None:
        self._ended = time.time()
        self.cancel()
        self._on_gone()
