"""Entries that are only counted, or that were discarded: the file has their numbers."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from harp_daemon import audit, audit_file
from harp_daemon.audit import AuditLog, DirectAuditLog

PEERS, MORE = 1000, 25  # as many peers as have entries of their own; and denials of others


def record_and_close(path: Path, denials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries of denials, the shared ones too."""

    async def run() -> None:
        log = AuditLog(path)
        for fields in denials:
            log.record(fields["action"], "denied", repeats=fields["peer"], peer=fields["peer"], job=fields["job"])
        await log.close()

    asyncio.run(run())
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [entry for entry in entries if entry.get("decision") == "denied"]


def test_audit_counts_denials_of_too_many_peers_together(tmp_path: Path) -> None:
    first = [{"action": "read", "peer": f"first-{number}", "job": "a"} for number in range(PEERS)]
    others = [
        {"action": action, "peer": f"other-{number}", "job": "a"}
        for action in ("read", "call")
        for number in range(MORE)
    ]
    entries = record_and_close(tmp_path / "audit.jsonl", [*first, *others])
    for action, number in (("read", PEERS + MORE), ("call", MORE)):
        counts = [entry.get("count", 1) for entry in entries if entry["action"] == action]
        assert sum(counts) == number
    assert {entry["peer"] for entry in entries if "count" in entry} == {"others"}


def test_audit_shared_entry_has_what_is_common_to_denials(tmp_path: Path) -> None:
    jobs = ["harmless"] * 11 + ["secret"] * 3
    denials = [{"action": "read", "peer": "attacker", "job": job} for job in jobs]
    [shared] = [entry for entry in record_and_close(tmp_path / "audit.jsonl", denials) if "count" in entry]
    assert (shared["count"], shared["peer"], "job" in shared) == (4, "attacker", False)


def test_audit_timer_ends_the_window_that_began_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, path, timers = count(1000.0, 0.001), tmp_path / "audit.jsonl", list[tuple[float, Callable[[], None]]]()

    def call_later(seconds: float, function: Callable[[], None]) -> None:
        timers.append((time.monotonic() + seconds, function))

    with closing(DirectAuditLog(path, 10**8, lambda write: None, call_later)) as log:
        with monkeypatch.context() as patched:
            patched.setattr(time, "monotonic", lambda: next(clock))  # it is later with each look at it
            for _ in range(15):
                log.record({"time": 1.0, "action": "read", "decision": "denied", "peer": "peer"}, repeats="peer")
            due_at, on_timer = timers[0]
            patched.setattr(time, "monotonic", lambda: due_at)
            on_timer()
        assert '"count":5' in path.read_text()


@pytest.mark.parametrize("direct", [True, False])
def test_audit_has_an_entry_about_those_that_were_discarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    monkeypatch.setattr(audit, "_MAX_WAITING", 5)
    monkeypatch.setattr(audit_file, "_FOLLOW_INTERVAL", 0.0)
    path = tmp_path / "audit.jsonl"

    async def run() -> None:
        log: Any = DirectAuditLog(path, 1 << 20, lambda write: None, lambda *_: None) if direct else AuditLog(path)

        def record_end(job: str) -> asyncio.Future[None] | None:
            if direct:
                log.record({"time": 1.0, "action": "end", "job": job})
                log.write()
                return None
            recorded: asyncio.Future[None] = log.record("end", None, must=True, job=job)
            return recorded

        path.rename(tmp_path / "moved")
        path.mkdir()  # so that no file can be begun
        for number in range(12):
            done = record_end(str(number))
            if done is not None:
                with pytest.raises(audit.AuditError):
                    await done
        path.rmdir()
        done = record_end("last")
        if done is not None:
            await done
            await log.close()
        else:
            log.close()

    asyncio.run(run())
    written = [json.loads(line) for line in path.read_text().splitlines()]
    found = [(entry["action"], entry.get("job"), entry.get("count")) for entry in written]
    ends = [("end", job, None) for job in ("7", "8", "9", "10", "11", "last")]
    assert [one for one in found if one[0] != "audit-file"] == [("audit-lost", None, 7), *ends]


@contextmanager
def no_file_may_grow() -> Iterator[None]:
    """Let each write behind the end of a file of more than one byte fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_direct_log_keeps_entries_that_the_lock_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux has no memory for the lock, for example. What is sent after the write is not held up by an exception."""
    flock = fcntl.flock

    def refuse(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        flock(descriptor, operation)

    with closing(DirectAuditLog(tmp_path / "audit.jsonl", 1 << 20, lambda write: None, lambda *_: None)) as log:
        with monkeypatch.context() as patched:
            patched.setattr(fcntl, "flock", refuse)
            log.record({"time": 1.0, "action": "end", "job": "a"})
            log.write()
        assert '"a"' not in log.path.read_text()
        log.record({"time": 2.0, "action": "end", "job": "b"})
        log.write()
        jobs = [json.loads(line).get("job") for line in log.path.read_text().splitlines()]
        assert jobs[-2:] == ["a", "b"]


def test_direct_log_tries_again_soon_while_a_window_is_open(tmp_path: Path) -> None:
    timers: list[tuple[float, Callable[[], None]]] = []
    log = DirectAuditLog(tmp_path / "audit.jsonl", 1 << 20, lambda write: None, lambda *timer: timers.append(timer))
    try:
        log.record({"time": 1.0, "action": "login", "decision": "denied"}, repeats="peer")
        log.write()
        assert [seconds for seconds, _ in timers] == [60]
        with no_file_may_grow():
            log.record({"time": 1.0, "action": "end", "job": "a"})
            log.write()
        assert [seconds for seconds, _ in timers] == [60, 1]
        assert '"a"' not in log.path.read_text()
        timers[1][1]()
        assert '"a"' in log.path.read_text()
    finally:
        log.close()
