"""The verbs that read, as functions on a reading connection. Each is one statement, so it sees one moment."""

from __future__ import annotations

import sqlite3
from contextlib import closing

from harp.protocol.jsontext import Raw
from harpcaller.jobs import Job
from harpcaller.queues import queue_lane
from harpcaller.store import QueueStatus, UnknownJob
from harpcaller.store.sqlite.rows import decode_job, payload_size, split_records
from harpcaller.store.sqlite.sql import QUERIES

__all__ = ["get_job", "list_jobs", "list_queues", "read_records"]

# SQLite's integers end here.
_MAX_INTEGER = 2**63 - 1

# A page of a list ends once its payloads have this many bytes.
_PAGE_BYTES = 8 * 1024 * 1024


def get_job(db: sqlite3.Connection, job_id: str) -> Job:
    """See `Store.get_job`."""
    rows = db.execute(QUERIES["get_job"], {"id": job_id}).fetchall()
    if not rows:
        raise UnknownJob(job_id)
    return decode_job(rows[0])


def read_records(db: sqlite3.Connection, job_id: str, first: int, most_bytes: int) -> list[Raw]:
    """See `Store.read_records`."""
    found: list[Raw] = []
    room = most_bytes
    wanted = {"id": job_id, "first": min(first, _MAX_INTEGER)}
    with closing(db.execute(QUERIES["read_chunks"], wanted)) as chunks:
        for chunk_first, chunk in chunks:
            for record in split_records(chunk)[max(0, first - chunk_first) :]:
                room -= len(record)
                if found and room < 0:
                    return found
                found.append(record)
    return found


def list_jobs(
    db: sqlite3.Connection, *, ended: bool, queue: Raw | None, after: int, limit: int
) -> list[tuple[int, Job]]:
    """See `Store.list_jobs`."""
    name = "list_jobs" + ("" if ended else "_not_ended") + ("" if queue is None else "_of_lane")
    wanted: dict[str, int | str] = {"after": min(after, _MAX_INTEGER), "limit": limit}
    if queue is not None:
        wanted["lane"] = queue_lane(queue)
    found: list[tuple[int, Job]] = []
    room = _PAGE_BYTES
    with closing(db.execute(QUERIES[name], wanted)) as rows:
        for row in rows:
            found.append((row[0], decode_job(row)))
            room -= payload_size(row)
            if room <= 0:
                break
    return found


def list_queues(db: sqlite3.Connection) -> list[QueueStatus]:
    """See `Store.list_queues`."""
    rows = db.execute(QUERIES["list_queues"]).fetchall()
    return [QueueStatus(Raw(name), concurrency, running, queued) for name, concurrency, running, queued in rows]
