"""Stopping a call's processes: all of them, none else, and it is known when none is left.

SIGXCPU to the main process for a limit, which may clean up; then SIGTERM to the tree, then SIGKILL, `kill_grace`
seconds between the steps. Before they are killed all are halted by SIGSTOP, until a look finds no new one. The main
process is killed last: as their subreaper it keeps the others findable. The call is gone when a look at the
processes that is younger than the main process's death finds none of its own.

What was found, what it was sent and what became of it is the receipt. Whatever survives SIGKILL for `kill_grace`
seconds is told once, and watched on.

A look costs some milliseconds; steps begin in the loop's next turn, so that all calls that are stopped in this one
share it. Each step arranges for the next one first: whatever fails in it, the next one comes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from harpd.eventloop import EventLoop, Timer
from harpd.processes import Process, Tree, send

__all__ = ["Stopping"]

#: Seconds between two looks whether processes are gone: at first, and the most.
_LOOK, _LOOK_RARELY = 0.05, 1.0
#: Seconds that processes have at least to be gone after SIGKILL before they count as survivors.
_DEATH = 2.0
#: How many processes a receipt lists; it counts them all.
_SHOWN = 100
#: So often processes are halted before they are killed although there are ever new ones.
_MOST_HALTS = 20


@dataclass(slots=True)
class _Trace:
    """What became of a process: its name, what it was sent, how it ended."""

    command: str
    signals: list[str]
    ended: str | None = None


def _ending(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"exit {os.waitstatus_to_exitcode(status)}"


class Stopping:
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
        tree: Tree,
        kill_grace: float,
        look: Callable[[float], Mapping[int, Process]],
        strays: Callable[[Mapping[int, Process], Tree], bool],
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
        self._known: set[tuple[int, int]] = set()
        self._halted: set[tuple[int, int]] = set()
        self._halts = 0
        self._pause = _LOOK
        self._changed_at = 0.0  # a look must be younger than this to tell how things are
        self._main_ended = False
        self._status: int | None = None
        self._survived: Timer | None = None
        self._traces: dict[tuple[int, int], _Trace] = {}
        self._left: set[tuple[int, int]] = set()
        self._complete = True
        self._began = self._ended = 0.0

    def begin(self, interrupt: bool) -> None:
        """Begin to stop everything. `interrupt`: by SIGXCPU to the main process."""
        self._began = time.time()
        self._changed_at = time.monotonic()
        self._step = self._loop.after(0, self._interrupt if interrupt else self._terminate)

    def expect_exit(self) -> None:
        """The main process is about to end by itself; it is killed if it does not."""
        self._step = self._loop.after(self._kill_grace, self._kill_main)

    def main_ended(self, status: int) -> None:
        """The main process has been reaped, with this wait status; what is left has to end, too."""
        self._main_ended = True
        self._status = status
        self._began = self._began or time.time()
        self._changed_at = time.monotonic()
        self._check = self._loop.after(0, self._look_for_survivors)

    def cancel(self) -> None:
        """Do nothing more."""
        for timer in (self._step, self._check, self._survived):
            if timer is not None:
                timer.cancel()

    def receipt(self) -> dict[str, Any] | None:
        """What was found, what it was sent, what became of it; None: nothing had to be stopped.

        Spec: docs/protocol.md, Kept calls.
        """
        if not self._began:
            return None
        main = self._traces.setdefault(self._main, _Trace("", []))
        if self._main_ended and self._status is not None:
            main.ended = _ending(self._status)
        shown = list(self._traces.items())[:_SHOWN]
        return {
            "processes": [
                {"pid": pid, "command": trace.command, "signals": trace.signals, "ended": trace.ended}
                for (pid, _), trace in shown
            ],
            "found": len(self._traces),
            "survivors": [{"pid": pid, "command": self._traces[pid, start].command} for pid, start in self._left],
            "complete": self._complete,
            "began": self._began,
            "ended": self._ended or time.time(),
        }

    def _send(self, number: signal.Signals, identity: tuple[int, int]) -> None:
        if send(number, identity) and number is not signal.SIGSTOP and identity in self._traces:
            signals = self._traces[identity].signals
            if not signals or signals[-1] != number.name:
                signals.append(number.name)

    def _kill_main(self) -> None:
        send(signal.SIGKILL, self._main)

    def _interrupt(self) -> None:
        self._step = self._loop.after(self._kill_grace, self._terminate)
        self._members()  # what its end lets escape is known from now on
        self._send(signal.SIGXCPU, self._main)

    def _terminate(self) -> None:
        self._step = self._loop.after(self._kill_grace, self._kill)
        self._pause = _LOOK
        for identity in self._members():
            self._send(signal.SIGTERM, identity)

    def _kill(self) -> None:
        """Halt what is left, then kill it; again and again until nothing is."""
        self._step = self._loop.after(self._patience(), self._kill)
        members = self._members()
        new = members - self._halted
        if new and self._halts < _MOST_HALTS:
            for identity in new:
                self._send(signal.SIGSTOP, identity)
            self._halted |= new
            self._halts += 1
            self._pause = _LOOK
            self._step.cancel()
            self._step = self._loop.after(0, self._kill)
        else:
            self._halts = 0
            for identity in members - {self._main} or members:
                self._send(signal.SIGKILL, identity)
            if self._survived is None:
                self._survived = self._loop.after(max(self._kill_grace, _DEATH), self._tell_survivors)
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
        processes = self._look(self._changed_at)
        found = self._tree.members(processes, self._known)
        members = {member.identity for member in found}
        for member in found:
            self._traces.setdefault(member.identity, _Trace(member.command, []))
        for identity in self._left - members:
            trace = self._traces[identity]
            trace.ended = f"gone after {trace.signals[-1]}" if trace.signals else "gone"
        self._known |= members
        self._left = members
        if self._main_ended and not members:
            self._complete = not self._strays(processes, self._tree)
        return members

    def _tell_survivors(self) -> None:
        if self._members() or not self._main_ended:
            self._on_survived()

    def _patience(self) -> float:
        pause, self._pause = self._pause, min(2 * self._pause, _LOOK_RARELY)
        return pause

    def _gone(self) -> None:
        self._ended = time.time()
        self.cancel()
        self._on_gone()
