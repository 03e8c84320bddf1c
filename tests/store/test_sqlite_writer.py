"""The order of commits: long payloads are committed in parts, after the short writes that wait with them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from harp.protocol.json_text import Raw
from harpcaller.model.jobs import State
from harpcaller.store.sqlite import FILE_NAME, open_store
from harpcaller.store.sqlite.file import connect
from harpcaller.store.sqlite.staging import STEP_JOBS, encode_jobs
from harpcaller.store.sqlite.writer import Writer
from harpcaller.store.sqlite.writes import Writes
from support.jobs import ENDS, added, claimed, new_job, records

#: About half of what one commit may have.
LONG = b'"%b"' % (b"x" * 130_000)
JOBS = 12


async def commits(directory: Path, *verbs: tuple[object, ...]) -> list[list[str]]:
    """Run verbs that are called at the same time; return the statements of each commit that they led to.

    Each verb is a function of `Writes` and its arguments. The store in the directory is closed.
    """
    statements: list[str] = []
    connection = connect(directory / FILE_NAME)
    connection.set_trace_callback(statements.append)
    writer = Writer(directory / FILE_NAME, connection, asyncio.get_running_loop())
    try:
        await asyncio.gather(*(writer.run(verb, False, arguments, {}) for verb, *arguments in verbs))  # type: ignore[arg-type]
    finally:
        writer.stop()
        await asyncio.to_thread(writer.join)
    found: list[list[str]] = [[]]
    for statement in statements:
        if statement == "COMMIT":
            found.append([])
        elif statement != "BEGIN IMMEDIATE":
            found[-1].append(statement)
    return found[:-1]


async def running_jobs(directory: Path) -> list[str]:
    store = await open_store(directory)
    ids = await added(store, count=JOBS)
    assert await claimed(store) == ids
    await store.close()
    return ids


def count(statements: list[str], text: str) -> int:
    return sum(text in statement for statement in statements)


async def test_records_of_many_jobs_are_committed_in_parts(tmp_path: Path) -> None:
    """The commit that exceeds 256 KiB has no further records; a short write that was called last is committed first."""
    first, *others = await running_jobs(tmp_path)
    appends = [(Writes.append_records, job_id, 0, records([LONG])) for job_id in others]
    ended, *parts = await commits(tmp_path, *appends, (Writes.finish_job, first, ENDS[State.RETURNED], 3.0))
    assert count(ended, "INSERT INTO outcomes") == 1
    assert not count(ended, "INSERT INTO records")
    assert [count(part, "INSERT INTO records") for part in parts] == [3, 3, 3, 2]


async def test_short_records_share_a_commit(tmp_path: Path) -> None:
    ids = await running_jobs(tmp_path)
    appends = [(Writes.append_records, job_id, 0, records([b"1"] * 10)) for job_id in ids]
    [commit] = await commits(tmp_path, *appends)
    assert count(commit, "INSERT INTO records") == JOBS


async def test_step_of_staged_jobs_is_committed_after_others(tmp_path: Path) -> None:
    """A short write that was called last does not wait for the step."""
    first, *_ = await running_jobs(tmp_path)
    jobs = [new_job(host="web02") for _ in range(STEP_JOBS)]
    ended, inserted = await commits(
        tmp_path,
        (Writes.insert_staged, 1, jobs, 1.0),
        (Writes.stage_jobs, [encode_jobs(jobs)], [], 1.0),
        (Writes.finish_job, first, ENDS[State.RETURNED], 3.0),
    )
    assert count(ended, "INSERT INTO outcomes") == 1
    assert count(ended, "INSERT INTO jobs") == 0
    assert count(inserted, "INSERT INTO jobs") >= 1


async def test_claim_is_committed_with_the_long_job_before_it(tmp_path: Path) -> None:
    """Nothing else would start the job."""
    await running_jobs(tmp_path)
    job = new_job(host="web02", arguments=Raw(b"[%b]" % LONG))
    claim = Writes.claim_jobs, 5.0, 10, 1000
    assert len(await commits(tmp_path, (Writes.add_job, job, 1.0), claim)) == 1
    store = await open_store(tmp_path)
    assert (await store.get_job(job.id)).state is State.RUNNING
    await store.close()
