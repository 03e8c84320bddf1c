"""Program: uses the SQLite store, or the state file of a supervisor, on a full disk.

    full_disk.py mount DIRECTORY   the store on a small file system, mounted there
    full_disk.py limit DIRECTORY   the store with a limit on the size of files
    full_disk.py prune-mount SIZE DIRECTORY   deletion of old jobs on a full disk; each has SIZE bytes of arguments
    full_disk.py states-mount DIRECTORY, full_disk.py states-limit DIRECTORY   the same for a state file

Mount in a private mount namespace. Run by tests/store/test_sqlite_faults.py and tests/unit/test_harpd_state_files.py.

Prints ``ok`` at the end; anything else is a traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from harp.protocol.ends import Returned
from harp.protocol.json_text import Raw, dumps
from harpcaller.model.jobs import NO_METADATA, JobMetadata, NewJob, State
from harpcaller.pruner import Pruner
from harpcaller.store import StorageError
from harpcaller.store.sqlite import Store, open_store
from harpcaller.store.sqlite.staging import STEP_JOBS
from harpd.processes.cookie import cookie_for
from harpd.processes.process_tree import CallTree
from harpd.supervisor.state_files import StateFiles

Scenario: TypeAlias = Callable[[Path, Callable[[], None], Callable[[], None]], None]

LARGE = Raw(b'["' + b"x" * 50_000 + b'"]')
SMALL = Raw(b"[]")
NO_ROOM = ("database or disk is full", "disk I/O error")


def job(number: int, arguments: Raw) -> NewJob:
    return NewJob(f"00000000-0000-0000-0000-{number:012}", "web01", "deploy", arguments, 10.0, 60.0)


async def fill(store: Store, arguments: Raw, start: int) -> list[str]:
    """Add jobs until the disk is full; return the ids of the stored jobs."""
    accepted: list[str] = []
    for number in range(start, start + 100_000):
        try:
            await store.add_job(job(number, arguments), 1.0)
        except StorageError as error:
            assert "harpcaller.sqlite: " in str(error), error
            assert any(cause in str(error) for cause in NO_ROOM), error
            assert error.__cause__ is not None
            return accepted
        accepted.append(job(number, arguments).id)
    raise AssertionError("there was always room")


async def scenario(directory: Path, take_room: Callable[[], None], make_room: Callable[[], None]) -> None:
    store = await open_store(directory)
    before = job(1, SMALL)
    await store.add_job(before, 1.0)
    [running] = await store.claim_jobs(1.0, 1, 1000)
    take_room()
    accepted = [before.id, *await fill(store, LARGE, 1000), *await fill(store, SMALL, 200_000)]

    # Each writer of a batch gets the error; readers are not affected.
    metadata = JobMetadata(exit_info=LARGE)
    together = [store.add_job(job(number, LARGE), 1.0) for number in range(500_000, 500_020)]
    ends = [
        store.update_metadata(running.id, metadata),
        store.finish_job(running.id, Returned(LARGE), 2.0, metadata=metadata),
    ]
    outcomes = await asyncio.gather(*together, *ends, return_exceptions=True)
    assert all(isinstance(outcome, StorageError) for outcome in outcomes), outcomes
    for job_id in accepted:
        assert (await store.get_job(job_id)).id == job_id
    refused = job(500_000, LARGE)

    make_room()
    details = await store.get_details(running.id)
    assert (details.job, details.metadata) == (running, NO_METADATA)
    await store.add_job(refused, 2.0)
    assert await store.finish_job(running.id, Returned(LARGE), 2.0, metadata=metadata)
    assert (await store.get_job(running.id)).end == Returned(LARGE)
    await store.close()

    store = await open_store(directory)
    found_ids: list[str] = []
    after = 0
    while page := await store.list_jobs(ended=True, after=after):
        found_ids += [found.id for _, found in page]
        after = page[-1][0]
    assert found_ids == [*accepted, refused.id], (len(found_ids), len(accepted))
    details = await store.get_details(running.id)
    assert (details.job.state, details.metadata, details.job.holds_slot) == (State.RETURNED, metadata, False)
    await store.close()


def store_scenario(directory: Path, take_room: Callable[[], None], make_room: Callable[[], None]) -> None:
    asyncio.run(scenario(directory, take_room, make_room))


async def prune_scenario(directory: Path, size: int) -> None:
    """Delete old jobs on a full disk, alone, and while others try to store jobs. Only this frees space."""
    store = await open_store(directory)
    pruner = Pruner(store, lambda: 5000.0, lambda: None)

    async def add(start: int, arguments: Raw, now: float) -> int:
        """Add jobs that end immediately, until the disk is full; return how many have ended."""
        together = max(1, min(STEP_JOBS, 100_000 // len(arguments)))  # more are staged, and wait for room
        for first in range(start, start + 1_000_000, together):
            jobs = [job(number, arguments) for number in range(first, first + together)]
            try:
                await store.add_jobs(jobs, now)
                await asyncio.gather(*(store.cancel_job(new.id, now) for new in jobs))
            except StorageError:
                return first - start
        raise AssertionError("there was always room")

    async def compete() -> None:
        for number in itertools.count(100_000_000):
            await add(number * 10, LARGE, 4900.0)
            await asyncio.sleep(0)

    for start, are_competing in ((10_000_000, False), (20_000_000, False), (30_000_000, True)):
        added = await add(start, Raw(b'["' + b"x" * size + b'"]'), 1.0)
        added += await add(start + 1_000_000, SMALL, 1.0)
        assert added > 5, added
        competing = asyncio.create_task(compete() if are_competing else asyncio.sleep(0))
        deleted = await pruner.prune(min_age=1000.0, trust_clock=True)
        competing.cancel()
        await asyncio.gather(competing, return_exceptions=True)
        assert deleted >= added, (deleted, added)
        assert not [found for _, found in await store.list_jobs(ended=True) if found.ended == 1.0]
    await store.close()


def fill_states(directory: Path, take_room: Callable[[], None], make_room: Callable[[], None]) -> list[str]:
    """Write states until the disk is full; return the ids of the calls that have an entry at the end."""

    def write(call_id: str) -> None:
        states.write(call_id, CallTree(2**22 + 1, 5, cookie_for(call_id)), dumps("x" * 2000))

    states = StateFiles(directory, "old")
    take_room()
    written: list[str] = []
    with contextlib.suppress(OSError):
        for number in range(10_000):
            call_id = f"call-{number}"
            states.reserve(call_id)
            written.append(call_id)
    assert 10 < len(written) < 10_000, len(written)
    for call_id in written:  # no entry needs more room than was reserved
        write(call_id)
    for call_id in written[::2]:
        states.mark_ended(call_id)
    states.remove(written[0])
    write("in-its-place")
    try:
        states.reserve("refused")
    except OSError as error:
        assert "old.1: " in str(error), error
    else:
        raise AssertionError("there was room")
    make_room()
    write("later")
    return [*written[1:], "in-its-place", "later"]


def state_scenario(directory: Path, take_room: Callable[[], None], make_room: Callable[[], None]) -> None:
    directory.mkdir()
    if (child := os.fork()) == 0:  # its end releases the lock
        (directory / "expected").write_text("\n".join(fill_states(directory, take_room, make_room)))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    found = StateFiles(directory, "new").clean_up()
    assert sorted(found.calls) == sorted((directory / "expected").read_text().split()), len(found.calls)


def mount(directory: Path, scenario: Scenario) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(directory)], check=True)
    ballast = directory / "ballast"

    def take_room() -> None:
        with ballast.open("wb", buffering=0) as file:
            file.write(bytes(2_000_000))

    scenario(directory / "store", take_room, ballast.unlink)


def limit(directory: Path, scenario: Scenario) -> None:
    def set_limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    scenario(directory / "store", lambda: set_limit(1_500_000), lambda: set_limit(50_000_000))


def mount_and_prune(directory: Path, size: int) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(directory)], check=True)
    asyncio.run(prune_scenario(directory / "store", size))


if __name__ == "__main__":
    subject, _, how = sys.argv[1].rpartition("-")
    if subject == "prune":
        mount_and_prune(Path(sys.argv[3]), int(sys.argv[2]))
    else:
        {"mount": mount, "limit": limit}[how](Path(sys.argv[2]), state_scenario if subject else store_scenario)
    print("ok")
