"""The order of commits: long payloads are committed in parts, after the short writes that wait with them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from harp.protocol.json_text import Raw
from harpcaller.model.jobs import State
from harpcaller.store.sqlite import FILE_NAME, open_store
from harpcaller.store.sqlite import writer as writer_module
from harpcaller.store.sqlite.file import LOG_BYTES, connect
from harpcaller.store.sqlite.staging import STEP_JOBS, encode_jobs
from harpcaller.store.sqlite.writer import Writer
from harpcaller.store.sqlite.writes import Writes
from support.deadline import eventually
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


def begun(directory: Path, monkeypatch: pytest.MonkeyPatch, pauses: float) -> tuple[Writer, list[tuple[float, str]]]:
    """Return a writer whose floods pause so many times as long as they work, and its statements with their times.

    Whoever has submitted two jobs counts as present for ever, because the machine may be slow.
    """
    monkeypatch.setattr(writer_module, "_PAUSES", pauses)
    monkeypatch.setattr(writer_module, "_SHARED_FOR", 1e9)
    statements: list[tuple[float, str]] = []
    connection = connect(directory / FILE_NAME)
    connection.set_trace_callback(lambda statement: statements.append((time.monotonic(), statement)))
    return Writer(directory / FILE_NAME, connection, asyncio.get_running_loop()), statements


@asynccontextmanager
async def stopped(writer: Writer) -> AsyncIterator[None]:
    try:
        yield
    finally:
        writer.stop()
        await asyncio.to_thread(writer.join)


async def submit(writer: Writer, count: int) -> None:
    for _ in range(count):
        await writer.run(Writes.add_job, False, (new_job(host="web02"), 1.0), {})


@pytest.mark.parametrize("kind", ["records", "arguments", "jobs"])
async def test_flood_pauses_while_others_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """After each of its commits, others have three times as long."""
    job_id, *_ = await running_jobs(tmp_path)
    steps = [[new_job(host="web02") for _ in range(STEP_JOBS)] for _ in range(4)]
    floods: dict[str, list[tuple[Any, ...]]] = {
        "records": [(Writes.append_records, job_id, number, records([LONG])) for number in range(4)],
        "arguments": [(Writes.add_job, new_job(host="web02", arguments=Raw(b"[%b]" % LONG)), 1.0) for _ in range(4)],
        "jobs": [(Writes.insert_staged, step, jobs, 1.0) for step, jobs in enumerate(steps, 1)],
    }
    writer, statements = begun(tmp_path, monkeypatch, 3.0)
    async with stopped(writer):
        await writer.run(Writes.stage_jobs, False, ([*map(encode_jobs, steps)], [], 1.0), {})
        await submit(writer, 2)
        del statements[:]
        for verb, *arguments in floods[kind]:
            await writer.run(verb, False, arguments, {})
    begins = [at for at, statement in statements if statement == "BEGIN IMMEDIATE"]
    commits = [at for at, statement in statements if statement == "COMMIT"]
    assert len(begins) == len(commits) == 4
    for begin, commit, next_begin in zip(begins, commits, begins[1:], strict=False):
        assert next_begin - commit >= 3.0 * (commit - begin)


async def test_short_writes_do_not_wait_for_the_pause_of_a_flood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pause ends when the writer stops: all that was accepted is stored."""
    first, second, *_ = await running_jobs(tmp_path)
    writer, _ = begun(tmp_path, monkeypatch, 1e9)
    async with stopped(writer):
        await submit(writer, 2)
        await writer.run(Writes.append_records, False, (second, 0, records([LONG])), {})
        waiting = writer.run(Writes.append_records, False, (second, 1, records([LONG])), {})
        for number in range(20):
            await writer.run(Writes.append_records, False, (first, number, records([b"1"])), {})
        assert not waiting.done()
    assert await waiting


async def test_flood_alone_does_not_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it consists of, and what comes of it, is not the work of others."""
    first, second, *others = await running_jobs(tmp_path)
    writer, _ = begun(tmp_path, monkeypatch, 1e9)
    async with stopped(writer):
        await submit(writer, 1)
        for number, other in zip(range(4), others, strict=False):
            await writer.run(Writes.append_records, False, (first, number, records([LONG])), {})
            await writer.run(Writes.append_records, False, (second, number, records([b"1"])), {})
            await writer.run(Writes.cancel_queue, False, (Raw(b"1"), 1.0, b"{}"), {"limit": 100})
            await writer.run(Writes.finish_job, False, (other, ENDS[State.RETURNED], 3.0), {})
            await writer.run(Writes.claim_jobs, True, (5.0, 10, 1000), {})
        assert writer.find_pause(1.0) == 0
        await submit(writer, 1)
        assert writer.find_pause(1e-9) == 1.0
        assert writer.find_pause(1.0) == writer.find_pause(2.0), "the pause after a slow step is bounded"
        monkeypatch.setattr(writer_module, "_SHARED_FOR", 0.0)
        assert writer.find_pause(1.0) == 0
        await submit(writer, 3)
        assert writer.find_pause(1.0) == 0, "they do not submit often"


async def test_log_is_copied_without_a_commit(tmp_path: Path) -> None:
    """A commit that copies the log takes 10 ms and more, for which all other jobs wait."""
    ids = await running_jobs(tmp_path)
    file = tmp_path / FILE_NAME
    store = await open_store(tmp_path)
    before = file.stat().st_size
    written = 5 * 1024 * 1024  # less than a commit would copy
    for number in range(written // len(LONG)):
        await store.append_records(ids[0], number, records([LONG]))
    await eventually(lambda: file.stat().st_size > before + written // 2, what="the copy of the log")
    await store.close()


async def test_log_is_overwritten_while_jobs_are_stored(tmp_path: Path) -> None:
    """The writer copies what was added meanwhile: only a log that is copied as a whole begins again."""
    ids = await running_jobs(tmp_path)
    log = tmp_path / f"{FILE_NAME}-wal"
    store = await open_store(tmp_path)
    total = 0
    async with asyncio.timeout(60):
        while total < 4 * LOG_BYTES:
            await asyncio.gather(*(store.append_records(job_id, total, records([LONG] * 4)) for job_id in ids))
            total += 4 * len(ids) * len(LONG)
            assert log.stat().st_size < 2 * LOG_BYTES
    await store.close()


def log_number(log: Path) -> int:
    """Return how often the log has begun again: https://sqlite.org/fileformat2.html#walformat."""
    return int.from_bytes(log.read_bytes()[12:16], "big")


async def test_copied_log_begins_again(tmp_path: Path) -> None:
    ids = await running_jobs(tmp_path)
    log = tmp_path / f"{FILE_NAME}-wal"
    store = await open_store(tmp_path)
    await store.append_records(ids[0], 0, records([b"1"]))
    first = log_number(log)
    for number in range(40):  # about 5 MiB
        await store.append_records(ids[1], number, records([LONG]))
    async with asyncio.timeout(60):
        number = 1
        while log_number(log) == first:
            await store.append_records(ids[0], number, records([b"1"]))
            number += 1
    assert log.stat().st_size < LOG_BYTES  # a commit has not copied it
    await store.close()
