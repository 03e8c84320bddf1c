"""Program: a dispatcher with a full disk for a time. Run by tests/acceptance/test_faults.py in a mount namespace.

Accepted jobs are not lost, new jobs are refused with ``storage_error``, a running job's records and end wait, and all
work continues when there is room again. Prints ``ok`` at the end; anything else is a traceback.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import harp
from support.deadline import wait_until
from support.procedures_file import PROCEDURES
from support.system import System, running

OWN = """
import pathlib, time
from harpd.proc import Result, streaming_procedure

@streaming_procedure
def stream_after(path, records):
    yield "started"
    while not pathlib.Path(path).exists():
        time.sleep(0.01)
    for number in range(records):
        yield {"number": number, "ballast": "x" * 1000}
    yield Result("done")
"""

LARGE = "x" * 50_000
RECORDS = 2000
#: Maximum run time in seconds, less than that of a test.
TIME_LIMIT = 100


def fill(system: System, queue: dict[str, str]) -> list[harp.RemoteCall]:
    """Submit until the store refuses; return the jobs that were accepted."""
    accepted = []
    while True:
        try:
            accepted.append(system.rpc.host("web01", queue=queue).same(LARGE))
        except harp.RequestRefused as error:
            assert error.type == "storage_error", error
            return accepted


def scenario(system: System, store: Path, go: Path) -> None:
    ballast = store / "ballast"
    running_job = system.rpc.host("web01", queue={"wait": "here"}).stream_after(str(go), RECORDS)
    follower = running_job.follow(since=0)
    assert next(follower) == "started"
    ballast.write_bytes(bytes(28_000_000))
    accepted = fill(system, {"wait": "here"})  # behind the running job, so that they stay queued
    go.touch()
    wait_until(
        lambda: [line for line in system.dispatcher.log_lines() if "cannot store call data" in line],
        what="records that wait",
    )
    for job in accepted:
        assert job.result() is harp.CALL_NOT_FINISHED
    ballast.unlink()
    records = list(follower)
    assert [record["number"] for record in records] == list(range(RECORDS))
    assert running_job.get() == "done"
    for job in accepted:
        assert job.get() == LARGE
    assert system.rpc.web01.same("again").get() == "again"


def on_timeout(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"not done within {TIME_LIMIT} s")


def main() -> None:
    # If the caller timed out first, it could not clean up the processes of this program.
    signal.signal(signal.SIGALRM, on_timeout)
    signal.alarm(TIME_LIMIT)
    directory = Path(sys.argv[1])
    store = directory / "small"
    store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(store)], check=True)
    with running(
        directory, PROCEDURES + OWN, dispatcher={"stream_directory": str(store / "jobs"), "disk_reserve": 0}
    ) as system:
        scenario(system, store, directory / "go")
    print("ok")


if __name__ == "__main__":
    main()
