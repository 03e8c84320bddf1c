"""The verbs of `Store` that write, as functions on the writing connection, within a transaction of the writer.

No other connection writes at the same time, so everything that a verb has read is valid until it returns.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

from harp.protocol.ends import Cancelled, End
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import (
    ENDED,
    NO_METADATA,
    TRANSITIONS,
    Job,
    JobMetadata,
    NewJob,
    Records,
    State,
    StopState,
    state_of,
)
from harpcaller.model.lanes import Head, host_lane, queue_lane, startable_jobs
from harpcaller.store.sqlite.rows import (
    ENTRY_BYTES,
    decode_job,
    decode_name,
    encode_end_body,
    encode_name,
    join_records,
    join_timestamps,
)
from harpcaller.store.sqlite.sql import MAX_INTEGER, QUERIES, ROWS_PER_INSERT, insert_many

# Records are appended to a chunk below this size; as it fits in a page, rewriting it costs one page, like a new chunk.
_GROWING_CHUNK_BYTES = 2048
# A chunk of this size gets no further record.
_MAX_CHUNK_BYTES = 65536


class _JobState(NamedTuple):
    seq: int
    state: State
    records: int
    holds_slot: bool


def _find_job(db: sqlite3.Connection, job_id: str) -> _JobState | None:
    for seq, state, records, holds_slot in db.execute(QUERIES["find_job"], {"id": job_id}).fetchall():
        return _JobState(seq, State(state), records, bool(holds_slot))
    return None


def add_job(db: sqlite3.Connection, job: NewJob, now: float) -> None:
    add_jobs(db, (job,), now)


def add_jobs(db: sqlite3.Connection, jobs: Sequence[NewJob], now: float) -> None:
    # Tuples in the order of the columns, because there may be many.
    lanes: dict[str, tuple[Any, ...]] = {}
    added: list[tuple[Any, ...]] = []
    for job in jobs:
        if job.queue is None:
            lane, concurrency = host_lane(job.host), None
        else:
            lane, concurrency = queue_lane(job.queue), min(job.concurrency, MAX_INTEGER)
        lanes.setdefault(lane, (lane, job.queue, concurrency))
        added.append((job.id, lane, encode_name(job.host), now))
    db.executemany(QUERIES["add_lane"], lanes.values())
    try:
        _insert(db, QUERIES["add_job"], added)
    except sqlite3.IntegrityError as error:
        if error.sqlite_errorname != "SQLITE_CONSTRAINT_UNIQUE":
            raise
        which = jobs[0].id if len(jobs) == 1 else "with one of these ids"
        raise ValueError(f"a job {which} exists already") from error
    # No other job was added meanwhile, so theirs are the last sequence numbers, without a gap.
    [(last,)] = db.execute(QUERIES["last_seq"]).fetchall()
    calls = [_call(seq, job) for seq, job in enumerate(jobs, last - len(jobs) + 1)]
    _insert(db, QUERIES["add_call"], calls)


def _insert(db: sqlite3.Connection, statement: str, rows: list[tuple[Any, ...]]) -> None:
    """Insert rows by a statement that inserts one row, in groups as long as possible."""
    rest = len(rows) % ROWS_PER_INSERT
    for start in range(0, len(rows) - rest, ROWS_PER_INSERT):
        db.execute(insert_many(statement), list(chain.from_iterable(rows[start : start + ROWS_PER_INSERT])))
    if rest:
        db.executemany(statement, rows[-rest:])


def _call(seq: int, job: NewJob) -> tuple[Any, ...]:
    procedure = encode_name(job.procedure)
    return seq, procedure, job.arguments, float(job.timeout), float(job.max_exec_time), job.queue, job.info


def claim_jobs(db: sqlite3.Connection, now: float, limit: int, max_calls_per_host: int) -> list[Job]:

    def next_head(seq: int) -> Head | None:
        rows = db.execute(QUERIES["next_head"], {"seq": seq}).fetchall()
        return Head(rows[0][0], decode_name(rows[0][1])) if rows else None

    def count_held_slots(host: str) -> int:
        [(held,)] = db.execute(QUERIES["holding_on_host"], {"host": encode_name(host)}).fetchall()
        return int(held)

    claimed: list[Job] = []
    for head in startable_jobs(next_head, count_held_slots, limit=limit, max_calls_per_host=max_calls_per_host):
        db.execute(QUERIES["start_job"], {"seq": head.seq, "now": now})
        [row] = db.execute(QUERIES["get_job_by_seq"], {"seq": head.seq}).fetchall()
        claimed.append(decode_job(row))
    return claimed


def append_records(db: sqlite3.Connection, job_id: str, first: int, records: Records) -> bool:
    if len(records.values) != len(records.timestamps):
        raise ValueError(f"{len(records.values)} records and {len(records.timestamps)} times: expected one each")
    job = _find_job(db, job_id)
    if job is None or job.state is not State.RUNNING or job.records != first:
        return False
    for chunk in _chunks(records):
        _append_chunk(db, job.seq, first, chunk)
        first += len(chunk)
    db.execute(QUERIES["count_records"], {"seq": job.seq, "records": first})
    return True


def _chunks(records: Records) -> Iterator[Records]:
    start, size = 0, 0
    previous: float | None = None
    for end, (value, time) in enumerate(zip(records.values, records.timestamps, strict=True), 1):
        size += len(value) + (0 if time == previous else ENTRY_BYTES)
        previous = time
        if size >= _MAX_CHUNK_BYTES:
            yield Records(records.values[start:end], records.timestamps[start:end])
            start, size, previous = end, 0, None
    if size:
        yield Records(records.values[start:], records.timestamps[start:])


def _append_chunk(db: sqlite3.Connection, seq: int, first: int, records: Records) -> None:
    joined = join_records(records.values)
    count, times = 0, b""
    growing = db.execute(QUERIES["growing_chunk"], {"seq": seq, "max_bytes": _GROWING_CHUNK_BYTES}).fetchall()
    if growing:
        [(first, count, stored, times)] = growing
        joined = stored + b"\n" + joined
    timestamps = join_timestamps(times, records.timestamps)
    chunk = {"seq": seq, "first": first, "count": count + len(records), "bytes": joined, "timestamps": timestamps}
    db.execute(QUERIES["grow_chunk"] if growing else QUERIES["add_chunk"], chunk)


def finish_job(
    db: sqlite3.Connection,
    job_id: str,
    end: End,
    now: float,
    *,
    stop: StopState | None = None,
    keep_slot: bool = False,
    metadata: JobMetadata = NO_METADATA,
) -> bool:
    job = _find_job(db, job_id)
    if job is None or job.state in ENDED:
        return False
    if state_of(end) not in TRANSITIONS[job.state]:
        raise ValueError(f"job {job_id} is {job.state}: it cannot have been {state_of(end)}")
    if not job.holds_slot and (keep_slot or stop is not None):
        raise ValueError(f"job {job_id} is {job.state}: it has no slot to keep, and no process to stop")
    _end_job(db, job.seq, end, now, stop=stop, keep_slot=keep_slot)
    _update_metadata(db, job.seq, metadata)
    return True


def _end_job(
    db: sqlite3.Connection, seq: int, end: End, now: float, *, stop: StopState | None, keep_slot: bool
) -> None:
    ended = {"seq": seq, "state": state_of(end), "now": now, "stop": stop, "holds_slot": keep_slot}
    db.execute(QUERIES["end_job"], ended)
    body = encode_end_body(end)
    if body is not None:
        db.execute(QUERIES["add_end"], {"seq": seq, "body": body})


def _update_metadata(db: sqlite3.Connection, seq: int, metadata: JobMetadata) -> None:
    if metadata != NO_METADATA:
        columns = {name: getattr(metadata, name) for name in ("call", "stop_request", "stop_report", "exit_info")}
        db.execute(QUERIES["update_metadata"], {"seq": seq, **columns})


def cancel_job(db: sqlite3.Connection, job_id: str, now: float, stop_request: Raw | None = None) -> State | None:
    job = _find_job(db, job_id)
    if job is None or job.state in ENDED:
        return None
    _cancel(db, job.seq, job.state, now, stop_request)
    return job.state


def cancel_queue(
    db: sqlite3.Connection, queue: Raw, now: float, stop_request: Raw | None = None
) -> list[tuple[str, State]]:
    rows = db.execute(QUERIES["not_ended_of_lane"], {"lane": queue_lane(queue)}).fetchall()
    for seq, _, state in rows:
        _cancel(db, seq, State(state), now, stop_request)
    return [(job_id, State(state)) for _, job_id, state in rows]


def _cancel(db: sqlite3.Connection, seq: int, state: State, now: float, stopped: Raw | None) -> None:
    running = state is State.RUNNING
    _end_job(db, seq, Cancelled(), now, stop=StopState.PENDING if running else None, keep_slot=running)
    _update_metadata(db, seq, JobMetadata(stop_request=stopped))


def finalize_stop(
    db: sqlite3.Connection,
    job_id: str,
    stop: StopState,
    *,
    keep_slot: bool = False,
    metadata: JobMetadata = NO_METADATA,
) -> bool:
    job = _find_job(db, job_id)
    if job is None or job.state not in ENDED or not job.holds_slot:
        return False
    db.execute(QUERIES["finalize_stop"], {"seq": job.seq, "stop": stop, "holds_slot": keep_slot})
    _update_metadata(db, job.seq, metadata)
    return True


def update_metadata(db: sqlite3.Connection, job_id: str, metadata: JobMetadata) -> bool:
    job = _find_job(db, job_id)
    if job is None:
        return False
    _update_metadata(db, job.seq, metadata)
    return True
