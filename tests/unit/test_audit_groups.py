"""Entries of calls: the thread that stores the jobs writes them before its commit, all of a group at once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from harp_daemon import audit, audit_file
from harp_daemon.audit import AuditError, AuditLog
from harp_daemon.audit_reading import verify
from support.deadline import eventually


def with_log(path: Path, scenario: Callable[[AuditLog], Awaitable[None]]) -> None:
    """Run a scenario with an audit log, then close it; its chain must hold."""

    async def run() -> None:
        log = AuditLog(path)
        try:
            await scenario(log)
        finally:
            await log.close()

    asyncio.run(run())
    assert verify(path).problems == []


def call(job: str) -> dict[str, Any]:
    return {"time": time.time(), "action": "call", "decision": "allowed", "job": job, "arguments": b"[]"}


def written(path: Path) -> list[str]:
    """Return the jobs of the entries in the file."""
    return [entry["job"] for line in path.read_text().splitlines() if "job" in (entry := json.loads(line))]


def test_audit_calls_are_written_before_their_commit(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"

    async def scenario(log: AuditLog) -> None:
        entries = [log.record_before_commit(call(job), must=True) for job in "ab"]
        log.report("end", job="c")
        assert (written(path), [entry.is_done for entry in entries]) == ([], [False, False])
        await asyncio.to_thread(log.write_before_commit)
        assert written(path) == ["a", "b", "c"]
        assert [entry.is_done for entry in entries] == [True, True]
        assert [entry.error for entry in entries] == [None, None]
        last = audit_file.Position(4, audit_file.hash_line(path.read_bytes().splitlines()[-1]))
        await eventually(lambda: audit_file.read_head(path) == last, what="the wait for the disk")

    with_log(path, scenario)


def test_audit_reports_alone_do_not_delay_a_commit(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"

    async def scenario(log: AuditLog) -> None:
        log.report("end", job="a")
        log.write_before_commit()
        assert written(path) == []

    with_log(path, scenario)
    assert written(path) == ["a"]


def test_audit_call_that_cannot_be_written_follows_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_file, "_FOLLOW_INTERVAL", 0.0)
    path = tmp_path / "audit.jsonl"

    async def scenario(log: AuditLog) -> None:
        path.rename(tmp_path / "audit.jsonl.1")
        path.mkdir()  # so that no file can be begun
        entry = log.record_before_commit(call("a"), must=True)
        await asyncio.to_thread(log.write_before_commit)
        assert isinstance(entry.error, AuditError)
        path.rmdir()
        await log.record("end", None, must=True, job="b")
        assert written(path) == ["a", "b"]

    with_log(path, scenario)


def test_audit_entries_of_a_large_group_are_all_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of entries in memory is for those that cannot be written."""
    monkeypatch.setattr(audit, "_MAX_WAITING", 10)
    path = tmp_path / "audit.jsonl"
    jobs = [f"job-{number}" for number in range(25)]

    async def scenario(log: AuditLog) -> None:
        for job in jobs:  # of a cancelled queue
            log.report("end", job=job)
        await log.record("cancel", "allowed", must=True, queue="backup")
        assert written(path) == jobs
        assert "audit-lost" not in path.read_text()

    with_log(path, scenario)


def test_audit_call_after_close_has_an_error(tmp_path: Path) -> None:
    async def run() -> None:
        log = AuditLog(tmp_path / "audit.jsonl")
        await log.close()
        entry = log.record_before_commit(call("a"), must=True)
        assert entry.is_done
        assert isinstance(entry.error, AuditError)
        log.write_before_commit()

    asyncio.run(run())
