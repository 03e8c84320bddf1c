"""Stop reports: bounded in size, and never more positive than the scans."""

from __future__ import annotations

import signal

from harp.protocol import harpd as messages
from harp.protocol.json_text import dumps
from harpd.processes.process_tree import Process
from harpd.processes.stop_report import StopReport

MAIN = Process(100, 50, command="main")


def others(number: int) -> list[Process]:
    return [Process(pid, 60, command="\\xff" * 15) for pid in range(101, 101 + number)]


def test_stop_report_lists_outcomes() -> None:
    scans = StopReport(MAIN.identity)
    one, other = others(2)
    scans.record([MAIN, one, other])
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        scans.record_signal(number, one.identity)
    scans.record([MAIN])
    scans.record_exit(signal.SIGKILL)
    scans.record([])
    stop_report = scans.to_json(main_ended=True, complete=True, started_at=1.0, ended=2.0)
    assert [(each["pid"], each["signals"], each["ended"]) for each in stop_report["processes"]] == [
        (100, [], "SIGKILL"),
        (101, ["SIGTERM", "SIGKILL"], "gone after SIGKILL"),
        (102, [], "gone"),
    ]
    assert [stop_report[key] for key in ("found", "survivors", "surviving", "complete")] == [3, [], 0, True]


def test_stop_report_unreaped_main_survives() -> None:
    scans = StopReport(MAIN.identity)
    scans.record([MAIN])
    scans.record([])
    stop_report = scans.to_json(main_ended=False, complete=False, started_at=1.0)
    assert (stop_report["survivors"], stop_report["surviving"]) == ([{"pid": 100, "command": "main"}], 1)


def test_stop_report_with_clock_set_back_ends_after_its_start() -> None:
    stop_report = StopReport(MAIN.identity).to_json(main_ended=True, complete=True, started_at=2.0, ended=1.0)
    assert stop_report["ended"] == stop_report["began"] == 2.0


def test_stop_report_size_is_bounded() -> None:
    scans = StopReport(MAIN.identity)
    scans.record([MAIN, *others(50_000)])
    scans.record(others(50_000))
    stop_report = scans.to_json(main_ended=False, complete=False, started_at=1.0)
    assert (len(stop_report["processes"]), stop_report["found"]) == (100, 50_001)
    assert (len(stop_report["survivors"]), stop_report["surviving"]) == (100, 50_001)
    text = dumps(stop_report)
    assert len(text) < 64 * 1024
    assert len(messages.StopReport(text).survivors) == 100


def test_stop_report_counts_short_lived_processes() -> None:
    scans = StopReport(MAIN.identity)
    for pid in range(200, 5200):
        scans.record([Process(pid, 60)])
    stop_report = scans.to_json(main_ended=True, complete=False, started_at=1.0)
    assert stop_report["found"] == 5001
    assert len(stop_report["processes"]) == 100
