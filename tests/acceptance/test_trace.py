"""`./dev trace` on a real system: every process is counted, and the numbers add up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
PROCESSES = ["client", "dispatcher", "frontend", "supervisor", "zygote", "call", "pre-forked worker"]


def trace(*options: str) -> str:
    """Run `./dev trace`; return its output."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "tracing", *options],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        printed, errors = process.communicate()
    except BaseException:
        process.send_signal(signal.SIGINT)  # so that it ends the daemons
        process.communicate()
        raise
    assert (process.returncode, errors) == (0, "")
    return printed


@pytest.fixture(scope="module")
def jobs() -> list[dict[str, Any]]:
    """Return the counts of the plain and of the streaming job."""
    found = json.loads(trace("--json", "--runs", "3", "--records", "20"))
    assert found["idle_entries_per_second"] > 0
    return list(found["jobs"].values())


def entries_of(process: dict[str, Any], *, ours: bool) -> int:
    return sum(sum(module["functions"].values()) for module in process["modules"] if module["ours"] is ours)


def test_trace_any_job_counts_every_process(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        assert [process["process"] for process in job["processes"]] == PROCESSES
        assert all(process["ours"] > 0 for process in job["processes"])


def test_trace_any_job_adds_up(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        for process in job["processes"]:
            assert process["ours"] == entries_of(process, ours=True)
            assert process["library"] == entries_of(process, ours=False)
            assert process["entries"] == process["ours"] + process["library"]
        for kind in ("entries", "ours", "library"):
            assert job[kind] == sum(process[kind] for process in job["processes"])
        assert job["entries"] in job["runs"]
        assert 0 <= job["disturbed_runs"] <= 3


def test_trace_procedure_is_entered_in_call_process(jobs: list[dict[str, Any]]) -> None:
    found = [
        (process["process"], module["functions"])
        for job in jobs
        for process in job["processes"]
        for module in process["modules"]
        if module["module"] == "harpd_procedures"
    ]
    # The procedure yields 20 records: it is entered once, and resumed 20 times.
    assert found == [("call", {"add": 1}), ("call", {"count": 21})]


def test_trace_streaming_job_enters_more(jobs: list[dict[str, Any]]) -> None:
    plain, streaming = jobs
    assert streaming["entries"] > plain["entries"]
    for before, after in zip(plain["processes"], streaming["processes"], strict=True):
        if before["process"] in ("client", "dispatcher", "call"):
            assert after["entries"] > before["entries"]


def test_trace_page_lists_processes_and_functions() -> None:
    lines = trace("--functions", "--runs", "1").splitlines()
    assert lines[0].startswith("add(1, 2).get(): ")
    for process in PROCESSES:
        assert lines.count(f"  {process}") == 2  # once for each job
    assert "      add                                                                1" in lines
