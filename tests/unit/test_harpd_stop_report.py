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
    findings = StopReport(MAIN.identity)
    one, other = others(2)
    findings.record([MAIN, one, other])
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        findings.record_signal(number, one.identity)
    findings.record([MAIN])
    findings.record_exit(signal.SIGKILL)
    findings.record([])
    receipt = findings.to_json(main_ended=True, complete=True, began=1.0, ended=2.0)
    assert [(each["pid"], each["signals"], each["ended"]) for each in receipt["processes"]] == [
        (100, [], "SIGKILL"),
        (101, ["SIGTERM", "SIGKILL"], "gone after SIGKILL"),
        (102, [], "gone"),
    ]
    assert [receipt[key] for key in ("found", "survivors", "surviving", "complete")] == [3, [], 0, True]


def test_stop_report_unreaped_main_survives() -> None:
    findings = StopReport(MAIN.identity)
    findings.record([MAIN])
    findings.record([])
    receipt = findings.to_json(main_ended=False, complete=False, began=1.0)
    assert (receipt["survivors"], receipt["surviving"]) == ([{"pid": 100, "command": "main"}], 1)


def test_stop_report_size_is_bounded() -> None:
    findings = StopReport(MAIN.identity)
    findings.record([MAIN, *others(50_000)])
    findings.record(others(50_000))
    receipt = findings.to_json(main_ended=False, complete=False, began=1.0)
    assert (len(receipt["processes"]), receipt["found"]) == (100, 50_001)
    assert (len(receipt["survivors"]), receipt["surviving"]) == (100, 50_001)
    text = dumps(receipt)
    assert len(text) < 64 * 1024
    assert len(messages.StopReport(text).survivors) == 100


def test_stop_report_counts_short_lived_processes() -> None:
    findings = StopReport(MAIN.identity)
    for pid in range(200, 5200):
        findings.record([Process(pid, 60)])
    receipt = findings.to_json(main_ended=True, complete=False, began=1.0)
    assert receipt["found"] == 5001
    assert len(receipt["processes"]) == 100
