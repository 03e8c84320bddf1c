"""Program: a dispatcher whose audit file is on a full disk for a time. Run by tests/acceptance/test_faults.py.

New jobs are refused with ``storage_error``. The running job ends, its end has an entry, and no entry of an accepted job
is missing. All work continues when there is room again. Prints ``ok`` at the end; anything else is a traceback.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import harp
from harp_daemon.audit_reading import search, verify
from support.deadline import wait_until
from support.full_dispatcher import TIME_LIMIT, on_timeout
from support.procedures_file import PROCEDURES
from support.system import System, running

#: The calls of one request: their entries need some MiB.
MANY = 6_000


def occupy(ballast: Path) -> None:
    """Occupy all free space."""
    descriptor = os.open(ballast, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for size in (1 << 20, 1 << 12, 1):
        try:
            while True:
                os.write(descriptor, bytes(size))
        except OSError:
            pass
    os.close(descriptor)


def scenario(system: System, disk: Path, go: Path) -> None:
    audit, ballast = disk / "audit.jsonl", disk / "ballast"
    queue = {"wait": "here"}
    running_job = system.rpc.host("web01", queue=queue).wait_for(str(go), "done")
    accepted = [running_job.id()]
    occupy(ballast)

    call = harp.Call("web01", "same", [1], queue=queue)  # behind the running job
    try:
        while True:
            accepted += [job.id() for job in system.rpc.submit_many([call] * MANY)]
            assert len(accepted) < 20 * MANY
    except harp.RequestRefused as error:
        assert error.type == "storage_error", error
        assert "audit" in str(error), error
    for _ in range(3):
        try:
            system.rpc.host("web01", queue=queue).same(1)
        except harp.RequestRefused as error:
            assert error.type == "storage_error", error
        else:
            raise AssertionError("a job was accepted")

    assert system.rpc.job(accepted[-1]).cancel()
    go.touch()
    assert running_job.get() == "done"
    wait_until(lambda: [*search(audit, {"job": running_job.id(), "action": "end"}, None)], what="the entry of its end")
    assert [*search(audit, {"job": accepted[-1], "action": "cancel"}, None)]
    recorded = {entry["job"] for entry, _ in search(audit, {"action": "call", "decision": "allowed"}, None)}
    assert recorded >= {*accepted}, len({*accepted} - recorded)
    assert verify(audit).problems == []

    ballast.unlink()

    def is_accepted() -> bool:
        try:
            return bool(system.rpc.host("web01").same("again"))
        except harp.RequestRefused:
            return False

    wait_until(is_accepted, what="a job is accepted")
    assert verify(audit).problems == []
    for event in ("audit file has no room; jobs refused", "audit file can be written again"):
        assert len(system.dispatcher.wait_events(1, event)) == 1


def main() -> None:
    # If the caller timed out first, it could not clean up the processes of this program.
    signal.signal(signal.SIGALRM, on_timeout)
    signal.alarm(TIME_LIMIT)
    directory = Path(sys.argv[1])
    disk = directory / "small"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    settings = {"audit_file": str(disk / "audit.jsonl"), "log_level": "info"}
    with running(directory, PROCEDURES, dispatcher=settings) as system:
        scenario(system, disk, directory / "go")
    print("ok")


if __name__ == "__main__":
    main()
