"""The receipt of a stop: what was found of a call's processes, what it was sent, what became of it.

It is bounded, however many processes there are: the first are listed, all are counted.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harpd.processes.process_tree import Process

__all__ = ["StopReport"]

#: How many processes, and how many survivors, a receipt lists.
_SHOWN = 100


@dataclass(slots=True)
class _Trace:
    """What became of a process: its name, what it was sent, how it ended."""

    command: str = ""
    signals: list[str] = field(default_factory=list)
    ended: str | None = None


class StopReport:
    """What the looks at a call's processes have found.

    Args:
        main: pid and start time of the main process.
    """

    def __init__(self, main: tuple[int, int]) -> None:
        self._main = main
        self._left: dict[tuple[int, int], Process] = {}
        self._traces = {main: _Trace()}
        self._others = 0

    @property
    def remaining(self) -> Mapping[tuple[int, int], Process]:
        """What the last look has found."""
        return self._left

    def record(self, members: Iterable[Process]) -> None:
        """A look has found these processes, and nothing else of the call."""
        found = {member.identity: member for member in members}
        for identity, member in found.items():
            if identity not in self._left and identity != self._main:
                self._others += 1
                if len(self._traces) < _SHOWN:
                    self._traces[identity] = _Trace()
            if identity in self._traces:
                self._traces[identity].command = member.command
        for identity in self._left.keys() - found.keys():
            trace = self._traces.get(identity)
            if trace and trace.ended is None:
                trace.ended = f"gone after {trace.signals[-1]}" if trace.signals else "gone"
        self._left = found

    def record_signal(self, number: signal.Signals, identity: tuple[int, int]) -> None:
        """A process was sent a signal; the same one again is not worth mentioning."""
        trace = self._traces.get(identity)
        if trace and trace.signals[-1:] != [number.name]:
            trace.signals.append(number.name)

    def record_exit(self, status: int) -> None:
        """The main process has been reaped, with this wait status."""
        self._traces[self._main].ended = _ending(status)

    def to_json(self, main_ended: bool, complete: bool, began: float, ended: float | None = None) -> dict[str, Any]:
        """The receipt.

        Args:
            main_ended: whether the main process has been reaped. Until then it survives, whatever a look has found.
            complete: whether nothing can have escaped.
            began: Unix seconds.
            ended: Unix seconds; None: now.

        Spec: docs/protocol.md, Kept calls.
        """
        surviving = {identity: process.command for identity, process in self._left.items()}
        if not main_ended:
            surviving.setdefault(self._main, self._traces[self._main].command)
        return {
            "processes": [
                {"pid": pid, "command": trace.command, "signals": trace.signals, "ended": trace.ended}
                for (pid, _), trace in self._traces.items()
            ],
            "found": self._others + 1,
            "survivors": [{"pid": pid, "command": command} for (pid, _), command in list(surviving.items())[:_SHOWN]],
            "surviving": len(surviving),
            "complete": complete,
            "began": began,
            "ended": time.time() if ended is None else ended,
        }


def _ending(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"exit {os.waitstatus_to_exitcode(status)}"
