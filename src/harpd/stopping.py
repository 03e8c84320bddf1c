"""Stopping a call's processes: all of them, none else, and it is known when none is left.

SIGXCPU to the main process for a limit, which may clean up; then SIGTERM to the tree, then SIGKILL, `kill_grace`
seconds between the steps. Before they are killed all are halted by SIGSTOP, until a look finds no new one. The main
process is killed last: as their subreaper it keeps the others findable. The call is gone when a look at the
processes that is younger than the main process's death finds none of its own.

A look costs some milliseconds; steps begin in the loop's next turn, so that all calls that are stopped in this one
share it. Each step arranges for the next one first: whatever fails in it, the next one comes.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping

from harpd.eventloop import EventLoop, Timer
from harpd.processes import Process, Tree, send

__all__ = ["Stopping"]

#: Seconds between two looks whether processes are gone: at first, and the most.
_LOOK, _LOOK_RARELY = 0.05, 1.0
#: So often processes are halted before they are killed although there are ever new ones.
_MOST_HALTS = 20


class Stopping:
    """What ends the processes of one call.

    Args:
        loop: the event loop.
        tree: the call's processes.
        kill_grace: seconds between the steps.
        look: gives all processes as they were at this moment of the monotonic clock, or later.
        on_gone: called once, when the main process has ended and none of the others is left.
    """

    def __init__(
        self,
        loop: EventLoop,
        tree: Tree,
        kill_grace: float,
        look: Callable[[float], Mapping[int, Process]],
        on_gone: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._tree = tree
        self._main = (tree.pid, tree.start)
        self._kill_grace = kill_grace
        self._look = look
        self._on_gone = on_gone
        self._step: Timer | None = None
        self._check: Timer | None = None
        self._known: set[tuple[int, int]] = set()
        self._halted: set[tuple[int, int]] = set()
        self._halts = 0
        self._pause = _LOOK
        self._changed_at = 0.0  # a look must be younger than this to tell how things are
        self._main_ended = False

    def begin(self, interrupt: bool) -> None:
        """Begin to stop everything. `interrupt`: by SIGXCPU to the main process."""
        self._changed_at = time.monotonic()
        self._step = self._loop.after(0, self._interrupt if interrupt else self._terminate)

    def expect_exit(self) -> None:
        """The main process is about to end by itself; it is killed if it does not."""
        self._step = self._loop.after(self._kill_grace, self._kill_main)

    def main_ended(self) -> None:
        """The main process has been reaped; what is left has to end, too."""
        self._main_ended = True
        self._changed_at = time.monotonic()
        self._check = self._loop.after(0, self._look_for_survivors)

    def cancel(self) -> None:
        """Do nothing more."""
        for timer in (self._step, self._check):
            if timer is not None:
                timer.cancel()

    def _kill_main(self) -> None:
        send(signal.SIGKILL, self._main)

    def _interrupt(self) -> None:
        self._step = self._loop.after(self._kill_grace, self._terminate)
        self._members()  # what its end lets escape is known from now on
        send(signal.SIGXCPU, self._main)

    def _terminate(self) -> None:
        self._step = self._loop.after(self._kill_grace, self._kill)
        self._pause = _LOOK
        for identity in self._members():
            send(signal.SIGTERM, identity)

    def _kill(self) -> None:
        """Halt what is left, then kill it; again and again until nothing is."""
        self._step = self._loop.after(self._patience(), self._kill)
        members = self._members()
        new = members - self._halted
        if new and self._halts < _MOST_HALTS:
            for identity in new:
                send(signal.SIGSTOP, identity)
            self._halted |= new
            self._halts += 1
            self._pause = _LOOK
            self._step.cancel()
            self._step = self._loop.after(0, self._kill)
        else:
            self._halts = 0
            for identity in members - {self._main} or members:
                send(signal.SIGKILL, identity)
        self._changed_at = time.monotonic()
        if self._main_ended and not members:
            self._gone()

    def _look_for_survivors(self) -> None:
        self._check = self._loop.after(self._patience(), self._look_for_survivors)
        if not self._members():
            self._gone()
        elif self._step is None:
            self._terminate()

    def _members(self) -> set[tuple[int, int]]:
        members = {member.identity for member in self._tree.members(self._look(self._changed_at), self._known)}
        self._known |= members
        return members

    def _patience(self) -> float:
        pause, self._pause = self._pause, min(2 * self._pause, _LOOK_RARELY)
        return pause

    def _gone(self) -> None:
        self.cancel()
        self._on_gone()
