"""Program: a harpd whose audit file is on a full disk for a time. Run by tests/acceptance/test_faults.py.

New calls are refused with ``system_error``, and the running call ends with its entry. All work continues when there is
room again, and no entry is missing. Prints ``ok`` at the end; anything else is a traceback.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from harp_daemon.audit_reading import search, verify
from support.deadline import wait_until
from support.full_audit import occupy
from support.full_dispatcher import TIME_LIMIT, on_timeout
from support.harpd import Harpd
from support.procedures_file import PROCEDURES

#: Each of its characters needs 12 bytes in an entry, which has several such texts.
LONG = "\U0001f600" * 255


def call(harpd: Harpd, number: int) -> Any:
    """Return the closing line of a call whose entry is long."""
    with harpd.connect() as client:
        client.send(harpd.request("same", [number], caller={"principal": LONG, "address": LONG}))
        return client.closing_line()


def scenario(harpd: Harpd, audit: Path, go: Path) -> None:
    ballast = audit.with_name("ballast")
    with harpd.start_resumable("wait_for", str(go), "done") as running:
        running.message()
        occupy(ballast)
        accepted = 0
        while "error" not in (end := call(harpd, accepted)):
            accepted += 1
            assert accepted < 10_000
        assert end["error"]["type"] == "system_error", end
        assert "audit file" in end["error"]["message"], end
        go.touch()
        assert running.closing_line() == {"result": "done"}
    wait_until(lambda: [*search(audit, {"job": running.call, "action": "end"}, None)], what="the entry of its end")
    allowed = [*search(audit, {"action": "call", "procedure": "same", "decision": "allowed"}, None)]
    assert len(allowed) == accepted, (len(allowed), accepted)
    assert verify(audit).problems == []
    ballast.unlink()
    wait_until(lambda: harpd.call("same", "again")[-1] == {"result": "again"}, what="a call is accepted")
    assert verify(audit).problems == []


def main() -> None:
    signal.signal(signal.SIGALRM, on_timeout)
    signal.alarm(TIME_LIMIT)
    directory = Path(sys.argv[1])
    disk = directory / "small"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], check=True)
    audit = disk / "audit.jsonl"
    with Harpd(directory, PROCEDURES, {"audit_file": str(audit)}) as harpd:
        scenario(harpd, audit, directory / "go")
    print("ok")


if __name__ == "__main__":
    main()
