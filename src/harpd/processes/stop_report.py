"""The stop report: which processes of a call were found, which signals they were sent, and how they ended.

Its size is bounded: the first 100 processes and survivors are listed, all are counted.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Mapping
from typing import Any

from harpd.processes.process_tree import Process

_MAX_LISTED = 100


class StopReport:
    """The results of all scans for a call's processes. `main`: pid and start time of the main process."""

    def __init__(self, main: tuple[int, int]) -> None:
        self._main = main
        #: The processes that the last scan has found, by pid and start time.
        self.remaining: Mapping[tuple[int, int], Process] = {}
        self._outcomes: dict[tuple[int, int], dict[str, Any]] = {}  # as in the report
        self._found = 0
        self._add_process(main)

    def _add_process(self, identity: tuple[int, int]) -> None:
        self._found += 1
        if len(self._outcomes) < _MAX_LISTED:
            self._outcomes[identity] = {"pid": identity[0], "command": "", "signals": [], "ended": None}

    def record(self, members: Iterable[Process]) -> None:
        """Record a scan that has found these processes of the call and no others."""
        found = {member.identity: member for member in members}
        for identity, member in found.items():
            if identity not in self.remaining and identity != self._main:
                self._add_process(identity)
            if identity in self._outcomes:
                self._outcomes[identity]["command"] = member.command
        for identity in self.remaining.keys() - found.keys():
            outcome = self._outcomes.get(identity)
            if outcome and outcome["ended"] is None:
                outcome["ended"] = f"gone after {outcome['signals'][-1]}" if outcome["signals"] else "gone"
        self.remaining = found

    def record_signal(self, number: signal.Signals, identity: tuple[int, int]) -> None:
        """Record that a process was sent a signal. Repetitions of the last one are omitted."""
        outcome = self._outcomes.get(identity)
        if outcome and outcome["signals"][-1:] != [number.name]:
            outcome["signals"].append(number.name)

    def record_exit(self, status: int) -> None:
        """Record that the main process has been reaped, with this wait status."""
        code = os.waitstatus_to_exitcode(status)
        if code >= 0:
            ended = f"exit {code}"
        else:
            ended = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        self._outcomes[self._main]["ended"] = ended

    def to_json(
        self, main_ended: bool, complete: bool, started_at: float, ended: float | None = None
    ) -> dict[str, Any]:
        """Return the report as values that JSON can represent. Spec: docs/protocol.md, Resumable calls.

        Until the main process has been reaped, it counts as a survivor. `complete`: no process can have escaped.
        `started_at` and `ended` are Unix seconds; None: now.
        """
        survivors = {identity: process.command for identity, process in self.remaining.items()}
        if not main_ended:
            survivors.setdefault(self._main, self._outcomes[self._main]["command"])
        listed = list(survivors.items())[:_MAX_LISTED]
        return {
            "processes": [outcome.copy() for outcome in self._outcomes.values()],
            "found": self._found,
            "survivors": [{"pid": pid, "command": command} for (pid, _), command in listed],
            "surviving": len(survivors),
            "complete": complete,
            "began": started_at,
            "ended": max(started_at, time.time() if ended is None else ended),  # the clock may have been set back
        }
