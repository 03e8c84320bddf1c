"""The termination sequence: it stops all processes of a call and no others, and proves that they have ended.

At a limit, the main process gets SIGXCPU, so that it can clean up. Then all processes get SIGTERM, then SIGKILL, with
`kill_grace` seconds between the steps. Before SIGKILL, all are halted by SIGSTOP, until a scan finds no new process.
The main process is killed last: it is a subreaper, so orphaned descendants stay its children. Processes that fork
faster than they are halted are killed by process group. If the call has a cgroup, the kernel kills all processes in it
in one step, since Linux 5.14; then they are not halted.

The call has ended if three conditions are met: a snapshot from after the main process's death has no process of it; its
cgroup is empty; no process can have escaped. A possible escape leads to further scans, then to an incomplete stop
report. If a process survives SIGKILL for `kill_grace` seconds, that is reported once, and the scans continue.

A scan may take many milliseconds. So it has steps, and the event loop does other work between them. All calls that are
stopped at about the same time share it. Each step of the sequence requests a scan. When it receives the snapshot, it
first schedules the next step, so that the sequence continues if the step fails.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from harpd.processes.process_tree import CallTree, Process, Snapshot, kill_group, send_signal
from harpd.processes.stop_report import StopReport
from harpd.supervisor.event_loop import EventLoop, Timer

#: Seconds between two scans: the first interval, and the longest.
_FIRST_INTERVAL, _MAX_INTERVAL = 0.05, 1.0
#: Seconds after SIGKILL, at least, before a process counts as a survivor.
_DEATH_TIMEOUT = 2.0
#: How often processes are halted, while scans find new processes, before they are killed.
_MAX_HALTS = 20
#: How many further scans follow from a possible escape, and the seconds between them.
_MAX_ESCAPE_SCANS, _ESCAPE_SCAN_INTERVAL = 5, 0.02
#: Seconds without a scan after which the main process's session id may belong to another session. It may so as soon as
#: a scan has found no process of the session: the kernel can assign all pids while the others are being stopped.
_SESSION_TRUST = 10.0


class TerminationSequence:
    """The end of the processes of one call. `harpd.supervisor.call.CallContext` has the functions for snapshots.

    `on_survived` is called once, if a process has survived SIGKILL for `kill_grace` seconds; `on_ended` once, when the
    main process and all others have ended.
    """

    def __init__(
        self,
        loop: EventLoop,
        tree: CallTree,
        kill_grace: float,
        take_snapshot: Callable[[float, Callable[[Snapshot], None]], None],
        has_possible_escapes: Callable[[Snapshot, CallTree], bool],
        on_survived: Callable[[], None],
        on_ended: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._tree = tree
        self._main = (tree.pid, tree.start)
        self._kill_grace = kill_grace
        self._take_snapshot = take_snapshot
        self._has_possible_escapes = has_possible_escapes
        self._on_survived = on_survived
        self._on_ended = on_ended
        self._step: Timer | None = None
        self._step_number = 0
        self._check: Timer | None = None
        self._survivor_check: Timer | None = None
        self._report = StopReport(self._main)
        self._snapshot = Snapshot()
        self._scanned_at: float | None = None
        self._changed_at = 0.0  # older snapshots do not show the present state
        self._stopped_processes: set[tuple[int, int]] = set()
        self._halts = self._escape_scans = 0
        self._interval = _FIRST_INTERVAL
        self._main_ended = self._session_ended = self._complete = False
        self._started_at = 0.0
        self._ended: float | None = None

    def start(self, interrupt: bool) -> None:
        """Start to stop all processes. `interrupt`: with SIGXCPU to the main process."""
        self._started_at = time.time()
        self._changed_at = time.monotonic()
        self._step = self._loop.call_later(0, self._interrupt if interrupt else self._terminate)

    def on_main_exit(self, status: int) -> None:
        """Stop all other processes: the main process has been reaped, with this wait status."""
        self._main_ended = True
        self._scanned_at = None  # the session id was in use until now
        self._report.record_exit(status)
        self._started_at = self._started_at or time.time()
        self._changed_at = time.monotonic()
        self._check = self._loop.call_later(0, self._scan_until_ended)

    def kill(self) -> None:
        """Continue immediately with the last step, without another halt."""
        self._halts = _MAX_HALTS
        self._kill()

    def stop_report(self) -> dict[str, Any]:
        """Return the stop report. Spec: docs/protocol.md, Resumable calls."""
        return self._report.to_json(self._main_ended, self._complete, self._started_at, self._ended)

    def _interrupt(self) -> None:
        def interrupt() -> None:  # processes that are found now stay recorded when the main process ends
            self._step = self._loop.call_later(self._kill_grace, self._terminate)
            self._send(signal.SIGXCPU, self._main)

        self._begin_step(interrupt)

    def _terminate(self) -> None:
        def terminate() -> None:
            self._step = self._loop.call_later(self._kill_grace, self._kill)
            self._interval = _FIRST_INTERVAL
            for identity in self._report.remaining:
                self._send(signal.SIGTERM, identity)

        self._begin_step(terminate)

    def _kill(self) -> None:
        """Halt the remaining processes, then kill them; repeat until all have ended."""
        self._begin_step(self._halt_and_kill)

    def _halt_and_kill(self) -> None:
        self._step = self._loop.call_later(self._next_interval(), self._kill)
        members = self._report.remaining
        new = members.keys() - self._stopped_processes
        if new and self._halts < _MAX_HALTS and not self._are_killed_at_once(new):
            for identity in new:
                send_signal(signal.SIGSTOP, identity)
            self._stopped_processes = set(members)
            self._halts += 1
            self._interval = _FIRST_INTERVAL
            self._step.cancel()
            self._step = self._loop.call_later(0, self._kill)
        else:
            self._kill_members(members, new_remain=bool(new))
            self._halts = 0
            if self._survivor_check is None:
                delay = max(self._kill_grace, _DEATH_TIMEOUT)
                self._survivor_check = self._loop.call_later(delay, self._report_survivors)
        self._changed_at = time.monotonic()
        if self._has_ended():
            self._finish()

    def _are_killed_at_once(self, identities: Collection[tuple[int, int]]) -> bool:
        """Return whether the kernel kills these processes in one step, so that they need not be halted before."""
        cgroup = self._tree.cgroup
        return cgroup is not None and cgroup.can_kill and cgroup.pids() >= {pid for pid, _ in identities}

    def _kill_members(self, members: Mapping[tuple[int, int], Process], new_remain: bool) -> None:
        """Kill the halted processes. `new_remain`: scans still find new processes, so kill all of them."""
        cgroup = self._tree.cgroup
        kill_all = new_remain or (cgroup is not None and cgroup.can_kill)
        main = members.keys() & {self._main}
        targets = members.keys() if kill_all else (members.keys() - main or main)
        for identity in targets:
            self._send(signal.SIGKILL, identity)
        excluded = {self._tree.pid} if main - targets else set()
        of_targets = (members[identity] for identity in targets)
        for group in self._tree.process_groups(of_targets, members, self._snapshot) - excluded:
            kill_group(group, self._snapshot.get(group))
        if cgroup is not None:
            cgroup.kill()

    def _send(self, number: signal.Signals, identity: tuple[int, int]) -> None:
        if send_signal(number, identity):
            self._report.record_signal(number, identity)

    def _begin_step(self, step: Callable[[], None]) -> None:
        """Scan, then run a step; a later step replaces a waiting step."""
        if self._step is not None:
            self._step.cancel()
        self._step_number = number = self._step_number + 1
        self._scan(lambda: step() if number == self._step_number else None)

    def _scan(self, next_step: Callable[[], None]) -> None:
        """Take a snapshot of the present state, record the remaining processes, then run a step."""
        requested_for = self._changed_at

        def on_snapshot(snapshot: Snapshot) -> None:
            if self._ended is not None:
                return
            if self._changed_at > requested_for:  # signals were sent since, or the main process has ended
                self._scan(next_step)
                return
            now = time.monotonic()
            has_paused = self._scanned_at is not None and now - self._scanned_at > _SESSION_TRUST
            ignore_session = self._session_ended or has_paused
            self._session_ended = self._main_ended and (ignore_session or not self._tree.has_session(snapshot))
            self._scanned_at = now
            self._snapshot = snapshot
            self._report.record(self._tree.members(snapshot, self._report.remaining, ignore_session))
            next_step()

        self._take_snapshot(requested_for, on_snapshot)

    def _is_empty(self) -> bool:
        cgroup = self._tree.cgroup
        return self._main_ended and not self._report.remaining and not (cgroup is not None and cgroup.populated)

    def _has_ended(self) -> bool:
        """Return whether the last scan has found no process; after possible escapes, also several further scans."""
        if not self._is_empty():
            self._escape_scans = 0
            return False
        self._complete = not self._has_possible_escapes(self._snapshot, self._tree)
        self._escape_scans += 1
        return self._complete or self._escape_scans > _MAX_ESCAPE_SCANS

    def _scan_until_ended(self) -> None:
        self._scan(self._check_ended)

    def _check_ended(self) -> None:
        self._check = self._loop.call_later(self._next_interval(), self._scan_until_ended)
        if self._has_ended():
            self._finish()
        elif self._escape_scans:
            self._changed_at = time.monotonic()
            self._check.cancel()
            self._check = self._loop.call_later(_ESCAPE_SCAN_INTERVAL, self._scan_until_ended)
        elif self._step is None and not self._step_number:
            self._terminate()

    def _report_survivors(self) -> None:
        self._scan(self._check_survivors)

    def _check_survivors(self) -> None:
        if self._is_empty():  # ended, which the next step reports; or they fork so fast that this scan missed them
            self._survivor_check = self._loop.call_later(_MAX_INTERVAL, self._report_survivors)
        else:
            self._on_survived()

    def _next_interval(self) -> float:
        interval, self._interval = self._interval, min(2 * self._interval, _MAX_INTERVAL)
        return interval

    def _finish(self) -> None:
        self._ended = time.time()
        for timer in (self._step, self._check, self._survivor_check):
            if timer is not None:
                timer.cancel()
        self._on_ended()
