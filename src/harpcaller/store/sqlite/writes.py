"""The verbs that write, as functions on the writing connection. Each runs within a transaction of the writer's.

Nothing else writes meanwhile: what a verb has read stays true until it is done.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from harp.protocol.ends import Cancelled, End
from harp.protocol.jsontext import Raw
from harpcaller.jobs import ENDED, TRANSITIONS, Job, NewJob, State, state_of
from harpcaller.queues import Head, host_lane, queue_lane, startable
from harpcaller.store.sqlite.rows import decode_job, decode_name, encode_end_body, encode_name, join_records
from harpcaller.store.sqlite.sql import QUERIES

__all__ = [
    "add_job",
    "append_records",
    "cancel_job",
    "cancel_queue",
    "claim_jobs",
    "delete_jobs",
    "delete_leftover_records",
    "finish_job",
    "give_back_space",
    "settle_interrupted",
]

# SQLite's integers end here.
_MAX_INTEGER = 2**63 - 1

# A chunk of records that is smaller than a page costs no more to write anew than to leave.
_GROWING_CHUNK_BYTES = 2048
# A chunk takes no further record once it has this size.
_CHUNK_BYTES = 65536

# One step of pruning deletes about this much, so that what waits behind it does not wait long.
_STEP_JOBS = 100
_STEP_BYTES = 8 * 1024 * 1024
_STEP_PAGES = 512


def add_job(db: sqlite3.Connection, job: NewJob, now: float) -> None:
    """See `Store.add_job`."""
    if db.execute(QUERIES["find_job"], {"id": job.id}).fetchall():
        raise ValueError(f"there is a job {job.id} already")
    if job.queue is None:
        lane, concurrency = host_lane(job.host), None
    else:
        lane, concurrency = queue_lane(job.queue), min(job.concurrency, _MAX_INTEGER)
    db.execute(QUERIES["add_lane"], {"lane": lane, "queue": job.queue, "concurrency": concurrency})
    added = {"id": job.id, "lane": lane, "host": encode_name(job.host), "now": now}
    place = db.execute(QUERIES["add_job"], added).lastrowid
    call = {
        "place": place,
        "procedure": encode_name(job.procedure),
        "arguments": job.arguments,
        "timeout": float(job.timeout),
        "max_exec_time": float(job.max_exec_time),
        "queue": job.queue,
        "info": job.info,
    }
    db.execute(QUERIES["add_call"], call)


def claim_jobs(db: sqlite3.Connection, now: float, limit: int, host_concurrency: int) -> list[Job]:
    """See `Store.claim_jobs`."""

    def next_head(place: int) -> Head | None:
        rows = db.execute(QUERIES["next_head"], {"place": place}).fetchall()
        return Head(rows[0][0], decode_name(rows[0][1])) if rows else None

    def running_on(host: str) -> int:
        [(running,)] = db.execute(QUERIES["running_on_host"], {"host": encode_name(host)}).fetchall()
        return int(running)

    claimed: list[Job] = []
    for head in startable(next_head, running_on, limit=limit, host_concurrency=host_concurrency):
        db.execute(QUERIES["start_job"], {"place": head.place, "now": now})
        [row] = db.execute(QUERIES["get_job_at"], {"place": head.place}).fetchall()
        claimed.append(decode_job(row))
    return claimed


def append_records(db: sqlite3.Connection, job_id: str, first: int, records: Sequence[Raw]) -> bool:
    """See `Store.append_records`."""
    rows = db.execute(QUERIES["find_job"], {"id": job_id}).fetchall()
    if not rows:
        return False
    place, state, stored = rows[0]
    if state != State.RUNNING or stored != first:
        return False
    for chunk in _chunks(records):
        _append_chunk(db, place, first, chunk)
        first += len(chunk)
    db.execute(QUERIES["count_records"], {"place": place, "records": first})
    return True


def _chunks(records: Sequence[Raw]) -> list[list[Raw]]:
    chunks: list[list[Raw]] = []
    room = 0
    for record in records:
        if room <= 0:
            chunks.append([])
            room = _CHUNK_BYTES
        chunks[-1].append(record)
        room -= len(record)
    return chunks


def _append_chunk(db: sqlite3.Connection, place: int, first: int, records: Sequence[Raw]) -> None:
    joined = join_records(records)
    small = db.execute(QUERIES["last_chunk"], {"place": place, "most": _GROWING_CHUNK_BYTES}).fetchall()
    if small:
        [(chunk_first, count, begun)] = small
        grown = {"count": count + len(records), "bytes": begun + b"\n" + joined}
        db.execute(QUERIES["grow_chunk"], {"place": place, "first": chunk_first, **grown})
    else:
        chunk = {"first": first, "count": len(records), "bytes": joined}
        db.execute(QUERIES["add_chunk"], {"place": place, **chunk})


def finish_job(db: sqlite3.Connection, job_id: str, end: End, now: float) -> bool:
    """See `Store.finish_job`."""
    rows = db.execute(QUERIES["find_job"], {"id": job_id}).fetchall()
    if not rows or State(rows[0][1]) in ENDED:
        return False
    place, state, _ = rows[0]
    if state_of(end) not in TRANSITIONS[State(state)]:
        raise ValueError(f"job {job_id} is {state}: it can't have been {state_of(end)}")
    _end_job(db, place, end, now)
    return True


def _end_job(db: sqlite3.Connection, place: int, end: End, now: float) -> None:
    db.execute(QUERIES["end_job"], {"place": place, "state": state_of(end), "now": now})
    body = encode_end_body(end)
    if body is not None:
        db.execute(QUERIES["add_end"], {"place": place, "body": body})


def cancel_job(db: sqlite3.Connection, job_id: str, now: float) -> State | None:
    """See `Store.cancel_job`."""
    rows = db.execute(QUERIES["find_job"], {"id": job_id}).fetchall()
    if not rows or State(rows[0][1]) in ENDED:
        return None
    place, state, _ = rows[0]
    _end_job(db, place, Cancelled(), now)
    return State(state)


def cancel_queue(db: sqlite3.Connection, queue: Raw, now: float) -> list[tuple[str, State]]:
    """See `Store.cancel_queue`."""
    rows = db.execute(QUERIES["not_ended_of_lane"], {"lane": queue_lane(queue)}).fetchall()
    for place, _, _ in rows:
        _end_job(db, place, Cancelled(), now)
    return [(job_id, State(state)) for _, job_id, state in rows]


def settle_interrupted(db: sqlite3.Connection, end: End, now: float) -> int:
    """See `Store.settle_interrupted`."""
    rows = db.execute(QUERIES["running_jobs"]).fetchall()
    for (place,) in rows:
        _end_job(db, place, end, now)
    return len(rows)


def delete_jobs(db: sqlite3.Connection, ended_before: float, limit: int) -> int:
    """Delete a few of the jobs that ended before; their records become leftovers. Returns how many jobs."""
    found = {"before": ended_before, "limit": min(limit, _STEP_JOBS)}
    deleted = 0
    room = _STEP_BYTES
    for place, size in db.execute(QUERIES["old_jobs"], found).fetchall():
        if room <= 0:
            break
        db.execute(QUERIES["add_leftover"], {"place": place})
        db.execute(QUERIES["delete_job"], {"place": place})
        room -= size
        deleted += 1
    return deleted


def delete_leftover_records(db: sqlite3.Connection) -> bool:
    """Delete some of the records that deleted jobs left. Returns whether there may be more."""
    [(place,)] = db.execute(QUERIES["first_leftover"]).fetchall()
    if place is None:
        return False
    step = {"place": place, "limit": _STEP_BYTES // _GROWING_CHUNK_BYTES}
    room = _STEP_BYTES
    for rowid, size in db.execute(QUERIES["chunks"], step).fetchall():
        if room <= 0:
            break
        db.execute(QUERIES["delete_chunk"], {"rowid": rowid})
        room -= size
    db.execute(QUERIES["delete_leftover"], {"place": place})
    return True


def give_back_space(db: sqlite3.Connection) -> bool:
    """Take some free pages out of the file, which gets shorter with the next checkpoint.

    Returns whether there are more.
    """
    before = _free_pages(db)
    for _ in range(min(before, _STEP_PAGES)):
        db.execute("PRAGMA incremental_vacuum(1)")  # one each: the driver runs this statement for one step only
    return 0 < _free_pages(db) < before


def _free_pages(db: sqlite3.Connection) -> int:
    [(pages,)] = db.execute("PRAGMA freelist_count").fetchall()
    return int(pages)
