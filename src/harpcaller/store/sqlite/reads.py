"""The verbs that read, as functions on a reading connection. Each reads one snapshot."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from itertools import count
from typing import Any

from harp.protocol.json_text import Raw
from harpcaller.model.ids import is_job_id
from harpcaller.model.jobs import Identity, Job, JobDetails, JobMetadata, QueuePosition, Records, State, Subject
from harpcaller.model.lanes import queue_id, queue_lane
from harpcaller.store import QueueStatus, QueueSummary, RecordMatches, StoreGauges, UnknownJob
from harpcaller.store.sqlite.file import MAX_INTEGER, QUERIES, snapshot
from harpcaller.store.sqlite.rows import (
    PACKET_BYTES,
    decode_job,
    decode_name,
    decode_owner,
    encode_name,
    split_records,
    split_timestamps,
)

_PAGE_BYTES = 8 * 1024 * 1024  # A page of a list ends when its payloads have this size.
ALL_QUEUED = -1  #: In place of a maximum number of queued jobs that are counted.
_MAX_HOLDERS = 10  # Maximum number of slot holders in a queue position.


def get_job(db: sqlite3.Connection, job_id: str) -> Job:
    """Return a job. Raises `UnknownJob`."""
    return decode_job(_find_row(db, job_id))


def find_subjects(db: sqlite3.Connection, job_ids: Sequence[str], max_bytes: int) -> dict[str, Subject]:
    """Return what decides who may do something with each of these jobs; unknown ones are missing.

    Each payload has at most `max_bytes`.
    """
    found: dict[str, Subject] = {}
    for job_id in filter(is_job_id, job_ids):
        rows = db.execute(QUERIES["get_subject"], {"id": job_id, "bytes": max_bytes}).fetchall()
        for owner, host, procedure, arguments, queue, is_refused in rows:
            names = decode_owner(owner), decode_name(host), decode_name(procedure)
            found[job_id] = Subject(*names, Raw(arguments), None if queue is None else Raw(queue), bool(is_refused))
    return found


def get_permitted_job(db: sqlite3.Connection, job_id: str, permits: Callable[[Subject], bool], max_bytes: int) -> Job:
    """Return a job for which `permits` returns True; it is called in the reading thread. Raises `UnknownJob`.

    Of a job that is not permitted, long payloads are not decoded: see `find_subjects`.
    """
    subject = find_subjects(db, (job_id,), max_bytes).get(job_id)
    if subject is None or not permits(subject):
        raise UnknownJob(job_id)
    return get_job(db, job_id)


def _find_row(db: sqlite3.Connection, job_id: str) -> Sequence[Any]:
    """Return the row of a job in job_view. Raises `UnknownJob`, also for a text that is not a lower-case UUID."""
    row: Sequence[Any] | None = None
    if is_job_id(job_id):
        row = db.execute(QUERIES["get_job"], {"id": job_id}).fetchone()
    if row is None:
        raise UnknownJob(job_id)
    return row


def get_details(db: sqlite3.Connection, job_id: str, with_owner: bool = False, most: int = ALL_QUEUED) -> JobDetails:
    """Return a job with everything that is stored about it, from one snapshot. Raises `UnknownJob`.

    With `with_owner` also its position among the jobs of its owner. Queued jobs are counted up to `most`.
    """
    with snapshot(db):
        row = _find_row(db, job_id)
        job, seq = decode_job(row), row[0]
        columns = db.execute(QUERIES["get_metadata"], {"seq": seq}).fetchone() or ()
        [(record_bytes,)] = db.execute(QUERIES["record_bytes"], {"seq": seq}).fetchall()
        waiting = _queue_position(db, seq, with_owner, most) if job.state is State.QUEUED else None
    metadata = JobMetadata(*(None if column is None else Raw(column) for column in columns))
    return JobDetails(job, metadata, record_bytes, waiting, None if job.queue is None else queue_id(row[1]))


def get_permitted_details(
    db: sqlite3.Connection, job_id: str, permits: Callable[[Subject], bool], max_bytes: int
) -> JobDetails:
    """Return what `get_details` does for a job that is permitted as in `get_permitted_job`. Raises `UnknownJob`.

    Its position among the jobs of its owner is known.
    """
    subject = find_subjects(db, (job_id,), max_bytes).get(job_id)
    if subject is None or not permits(subject):
        raise UnknownJob(job_id)
    return get_details(db, job_id, with_owner=True)


def _queue_position(db: sqlite3.Connection, seq: int, with_owner: bool, most: int) -> QueuePosition:
    parameters = {"seq": seq, "with_owner": with_owner, "most": most}
    [(position, concurrency, slots_held, *others)] = db.execute(QUERIES["queue_position"], parameters).fetchall()
    holders = db.execute(QUERIES["slot_holders"], {"seq": seq, "limit": _MAX_HOLDERS}).fetchall()
    return QueuePosition(position, concurrency, slots_held, tuple(job_id for (job_id,) in holders), *others)


def read_records(db: sqlite3.Connection, job_id: str, first: int, max_bytes: int) -> Records:
    """Return the records from number `first`, up to `max_bytes` in total; a single record may be longer.

    The size of a record is that of its line in a reply, which limits the number of tiny records. The result is empty if
    the job is unknown.
    """
    values: list[bytes] = []
    times: list[float] = []
    room = max_bytes
    parameters = {"id": job_id, "first": min(first, MAX_INTEGER)}
    with closing(db.execute(QUERIES["read_chunks"], parameters)) as chunks:
        for chunk_first, chunk, timestamps, started in chunks:
            skipped = max(0, first - chunk_first)
            records = split_records(chunk)
            # A record from before schema 2 has no time; it gets the job's start.
            chunk_times = [started] * len(records) if timestamps is None else split_timestamps(timestamps)
            for record, time in list(zip(records, chunk_times, strict=True))[skipped:]:
                room -= len(record) + PACKET_BYTES
                if values and room < 0:
                    return Records(tuple(values), tuple(times))
                values.append(record)
                times.append(time)
    return Records(tuple(values), tuple(times))


def search_records(
    db: sqlite3.Connection,
    job_id: str,
    needles: Sequence[bytes],
    fold: bool,
    first: int,
    until: int,
    limit: int,
    max_bytes: int,
) -> RecordMatches:
    """Return the records from number `first` to before `until` whose JSON text has one of the needles.

    At most `limit` are returned. About `max_bytes` are looked through, at least one record. With `fold`, the case of
    ASCII letters does not matter. Nothing was looked at if the job is unknown.
    """

    def is_match(text: bytes) -> bool:
        searched = text.lower() if fold else text
        return any(needle in searched for needle in needles)

    if fold:
        needles = [needle.lower() for needle in needles]
    matches: list[tuple[int, bytes, float]] = []
    number, searched = first, 0
    parameters = {"id": job_id, "first": min(first, MAX_INTEGER)}
    with closing(db.execute(QUERIES["read_chunks"], parameters)) as chunks:
        for chunk_first, chunk, timestamps, started in chunks:
            if searched >= max_bytes or chunk_first >= until:
                break
            searched += len(chunk)
            records = split_records(chunk)
            if is_match(chunk):
                times = [started] * len(records) if timestamps is None else split_timestamps(timestamps)
                numbered = zip(count(chunk_first), records, times, strict=False)
                matches += [found for found in numbered if first <= found[0] < until and is_match(found[1])]
                if len(matches) >= limit:
                    return RecordMatches(matches[:limit], matches[limit - 1][0] + 1, searched)
            number = min(until, chunk_first + len(records))
    return RecordMatches(matches, number, searched)


def list_slot_holders(db: sqlite3.Connection) -> list[Job]:
    """Return all jobs that hold a slot, in the order of submission."""
    return [decode_job(row) for row in db.execute(QUERIES["list_slot_holders"]).fetchall()]


def list_ended_since(db: sqlite3.Connection, since: float, limit: int) -> list[Job]:
    """Return the jobs that have ended at a time or later, the first `limit` of them."""
    rows = db.execute(QUERIES["list_ended_since"], {"since": since, "limit": limit}).fetchall()
    return [decode_job(row) for row in rows]


def get_identity(db: sqlite3.Connection) -> Identity:
    """Return the identity of the dispatcher that owns this store. It never changes."""
    [row] = db.execute(QUERIES["get_identity"]).fetchall()
    return Identity(*row)


def list_jobs(
    db: sqlite3.Connection,
    *,
    ended: bool = False,
    host: str | None = None,
    queue: Raw | None = None,
    newest_first: bool = False,
    after: int | None = None,
    limit: int = 1000,
) -> list[tuple[int, Job]]:
    """Return one page of jobs with their sequence numbers, in the order of submission or newest first.

    It has the jobs of a host, of a queue, or all jobs; with `ended` also ended jobs. Their number does not change the
    cost. The page starts after the job with the sequence number `after`. With long payloads it has fewer than `limit`
    jobs; only an empty page is the last page.
    """
    if after is None:
        after = MAX_INTEGER if newest_first else 0
    parameters: dict[str, int | str | bytes] = {"after": min(after, MAX_INTEGER), "limit": limit}
    name = ("list_newest" if newest_first else "list_jobs") + ("" if ended else "_not_ended")
    if host is not None:
        if queue is not None:
            raise ValueError("host and queue: expected one of them")
        name += "_of_host"
        parameters["host"] = encode_name(host)
    elif queue is not None:
        name += "_of_lane"
        parameters["lane"] = queue_lane(queue)
    page: list[tuple[int, Job]] = []
    room = _PAGE_BYTES
    with closing(db.execute(QUERIES[name], parameters)) as rows:
        for row in rows:
            page.append((row[0], decode_job(row)))
            room -= sum(len(column) for column in row if isinstance(column, bytes))
            if room <= 0:
                break
    return page


def get_prune_time(db: sqlite3.Connection) -> float | None:
    """Return the time of `Writes.set_prune_time`, else the time of the newest end of a job, else None."""
    [(minutes,)] = db.execute("PRAGMA user_version").fetchall()
    newest_end: float | None
    [(newest_end,)] = db.execute(QUERIES["newest_end"]).fetchall()
    return 60.0 * minutes if minutes else newest_end


def list_queues(db: sqlite3.Connection) -> list[QueueStatus]:
    """Return the queues with jobs that have not ended or hold a slot, oldest first."""
    rows = db.execute(QUERIES["list_queues"]).fetchall()
    return [QueueStatus(Raw(name), concurrency, running, queued) for name, concurrency, running, queued in rows]


def _of_owners(query: str, owners: Iterable[str]) -> tuple[str, dict[str, Any]]:
    """Return a query on the jobs of some owners, and the parameters that it has for them."""
    values = {f"owner{number}": encode_name(owner) for number, owner in enumerate(dict.fromkeys(owners))}
    return query.replace(":owners", ", ".join(f":{name}" for name in values)), values


def find_queues(
    db: sqlite3.Connection, after: int, limit: int, lane: str | None = None, owners: Iterable[str] | None = None
) -> list[QueueSummary]:
    """Return at most `limit` queues behind a place, oldest first; with `lane`, only the queue of this lane.

    With `owners`, only their jobs count: queues without such a job are missing.
    """
    if owners is not None:
        statement, values = _of_owners(QUERIES["find_queues_of_owners"], owners)
        found = db.execute(statement, {"after": after, "limit": limit, "lane": lane, **values}).fetchall()
        return [
            QueueSummary(place, key.removeprefix("queue:"), Raw(name), concurrency, running, queued, oldest)
            for place, key, name, concurrency, queued, oldest, running in found
        ]
    with snapshot(db):
        holding = dict(db.execute(QUERIES["count_holding_of_lanes"]).fetchall())
        rows = db.execute(QUERIES["find_queues"], {"after": after, "limit": limit, "lane": lane}).fetchall()
    return [
        QueueSummary(place, queue_id(key), Raw(name), concurrency, holding.get(key, 0), queued, oldest)
        for place, key, name, concurrency, queued, oldest in rows
    ]


def count_open_of_hosts(db: sqlite3.Connection, owners: Iterable[str] | None = None) -> dict[str, tuple[int, int]]:
    """Return for each host that has some, the number of its jobs that hold a slot, and of those that are queued.

    With `owners`, of their jobs.
    """
    statements: list[tuple[str, dict[str, Any]]]
    if owners is None:
        statements = [(QUERIES["count_holding_of_hosts"], {}), (QUERIES["count_queued_of_hosts"], {})]
    else:
        owners = tuple(owners)
        queries = QUERIES["count_holding_of_hosts_and_owners"], QUERIES["count_queued_of_hosts_and_owners"]
        statements = [_of_owners(query, owners) for query in queries]
    with snapshot(db):
        holding, queued = (
            {decode_name(host): count for host, count in db.execute(statement, values)}
            for statement, values in statements
        )
    return {host: (holding.get(host, 0), queued.get(host, 0)) for host in holding | queued}


def count_stored(db: sqlite3.Connection) -> int:
    """Return the number of stored jobs. The time grows with it: about 5 ms for a million."""
    [(stored,)] = db.execute(QUERIES["count_stored"]).fetchall()
    return int(stored)


def read_gauges(
    db: sqlite3.Connection, stuck_before: float, queues: Sequence[Raw] = (), max_of_hosts: int = 0
) -> StoreGauges:
    """Return the present numbers of jobs, from one snapshot.

    `queues` are those whose jobs are counted. Jobs that ended before `stuck_before` and hold a slot are stuck. With at
    most `max_of_hosts` queued jobs, these are counted for each host.
    """
    with snapshot(db):
        [(queued, oldest)] = db.execute(QUERIES["queued_gauges"]).fetchall()
        [(held, running, stuck)] = db.execute(QUERIES["slot_gauges"], {"before": stuck_before}).fetchall()
        [(count, full)] = db.execute(QUERIES["queue_gauges"]).fetchall()
        of_queues = []
        for queue in queues:
            [of_queue] = db.execute(QUERIES["gauges_of_queue"], {"lane": queue_lane(queue)}).fetchall()
            of_queues.append(of_queue)
        of_hosts = db.execute(QUERIES["queued_of_hosts"]).fetchall() if 0 < queued <= max_of_hosts else []
    queued_of_hosts = {decode_name(host): number for host, number in of_hosts}
    known = queued_of_hosts if queued <= max_of_hosts else None
    return StoreGauges(queued, oldest, held, running or 0, stuck or 0, count, full, tuple(of_queues), known)
