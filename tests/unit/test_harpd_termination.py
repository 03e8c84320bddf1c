"""The termination sequence: scans that prove nothing, reused session ids, survivors."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harpd.processes.process_tree import STEP_PROCESSES, CallTree, Process, Snapshot
from harpd.supervisor import termination
from harpd.supervisor.call import CallContext
from harpd.supervisor.event_loop import EventLoop
from harpd.supervisor.termination import TerminationSequence

#: No process of this system has such a pid.
MAIN = 5_000_000
CHILD = Process(MAIN + 1, 60, 1, MAIN, MAIN)


def run_sequence(
    take_snapshot: Callable[[float], Snapshot], has_possible_escapes: Callable[[], bool]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a sequence after the main process's end; return the stop report, and the reports of survivors."""
    loop = EventLoop()
    survivor_reports: list[dict[str, Any]] = []

    def on_survived() -> None:
        survivor_reports.append(sequence.stop_report())

    def scan(time: float, receive: Callable[[Snapshot], None]) -> None:
        loop.call_later(0, lambda: receive(take_snapshot(time)))

    sequence = TerminationSequence(
        loop,
        CallTree(MAIN, 50, b"HARPD_CALL=a"),
        0.01,
        scan,
        lambda processes, tree: has_possible_escapes(),
        on_survived,
        loop.stop,
    )
    sequence.on_main_exit(0)
    loop.call_later(20.0, loop.stop)
    loop.run()
    return sequence.stop_report(), survivor_reports


@pytest.mark.parametrize(("escapes", "complete"), [(0, True), (3, True), (1000, False)])
def test_termination_with_possible_escape_scans_again(escapes: int, complete: bool) -> None:
    times: list[float] = []

    def take_snapshot(time: float) -> Snapshot:
        times.append(time)
        return Snapshot()

    answers = itertools.chain([True] * escapes, itertools.repeat(False))
    report, survivor_reports = run_sequence(take_snapshot, lambda: next(answers))
    assert (report["complete"], report["survivors"], survivor_reports) == (complete, [], [])
    assert len(times) == min(escapes, 5) + 1
    assert times == sorted(set(times))  # each snapshot is newer than the one before


def test_termination_after_long_pause_ignores_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(termination, "_SESSION_TRUST", 0.0)
    stranger = Process(MAIN + 2, 70, 1, MAIN, MAIN)
    snapshots = iter([Snapshot({CHILD.pid: CHILD})])
    report, survivor_reports = run_sequence(
        lambda time: next(snapshots, Snapshot({stranger.pid: stranger})), lambda: False
    )
    assert {process["pid"] for process in report["processes"]} == {MAIN, CHILD.pid}
    assert (report["found"], report["complete"], survivor_reports) == (2, True, [])


def test_termination_ignores_the_id_of_a_session_that_has_ended() -> None:
    stranger = Process(MAIN + 2, 70, 1, MAIN, MAIN)
    snapshots = iter([Snapshot({CHILD.pid: CHILD}), Snapshot()])
    escapes = itertools.chain([True], itertools.repeat(False))
    report, survivor_reports = run_sequence(
        lambda time: next(snapshots, Snapshot({stranger.pid: stranger})), lambda: next(escapes)
    )
    assert {process["pid"] for process in report["processes"]} == {MAIN, CHILD.pid}
    assert (report["found"], report["complete"], survivor_reports) == (2, True, [])


def test_termination_of_fast_forker_reports_survivor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that forks and exits in a loop is missing in some snapshots."""
    monkeypatch.setattr(termination, "_DEATH_TIMEOUT", 0.1)
    monkeypatch.setattr(termination, "_MAX_INTERVAL", 0.05)
    pids = itertools.count(MAIN + 1)
    snapshots = 0

    def take_snapshot(time: float) -> Snapshot:
        nonlocal snapshots
        snapshots += 1
        if snapshots > 100:
            return Snapshot()
        pid = next(pids)
        snapshot = Snapshot() if snapshots % 3 == 0 else Snapshot({pid: Process(pid, 60, 1, MAIN, MAIN)})
        snapshot.complete = False
        return snapshot

    report, survivor_reports = run_sequence(take_snapshot, lambda: snapshots <= 100)
    assert [len(one["survivors"]) for one in survivor_reports] == [1]
    assert not survivor_reports[0]["complete"]
    assert (report["survivors"], report["complete"]) == ([], True)


def test_snapshot_for_many_calls_does_not_block_the_loop(tmp_path: Path) -> None:
    """A scan takes several turns of the loop; then each turn passes the snapshot to one call."""
    loop = EventLoop()
    settings = {"spool_memory": 1, "runtime_directory": str(tmp_path), "cgroup": "", "rights": {}, "audit_file": None}
    context = CallContext(loop, "instance", settings)
    turns = 0
    received: list[tuple[int, Snapshot]] = []

    def count_turns() -> None:
        nonlocal turns
        turns += 1
        loop.call_later(0, count_turns)

    def receive(snapshot: Snapshot) -> None:
        received.append((turns, snapshot))
        if len(received) == 4:
            loop.stop()

    requested_at = time.monotonic()
    for _ in range(3):
        context.take_snapshot(requested_at, receive)
    loop.call_later(0, lambda: context.take_snapshot(time.monotonic(), receive))  # the first scan is too old for it
    count_turns()
    loop.run()
    context.state_files.close()
    first, second = received[0][1], received[3][1]
    assert [snapshot is first for _, snapshot in received] == [True, True, True, False]
    assert requested_at <= first.started_at < second.started_at
    at = [turn for turn, _ in received]
    assert at[0] >= math.floor(len(first) / STEP_PROCESSES) - 1
    assert len(set(at)) == 4
