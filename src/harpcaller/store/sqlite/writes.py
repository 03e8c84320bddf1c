"""The verbs that write, on the writing connection, within a transaction of the writer.

Theory of operation. A verb decides in memory (`active`), without reading rows. New jobs and ends are collected, and
`Writes.flush` inserts them together before the commit. If a claim starts a job in the transaction that adds it, the job
is inserted once, as running. A verb that needs rows from the file flushes first. Writes are guarded: if the file
differs from the memory, the transaction fails. After a rollback the writer calls `Writes.discard_changes`, and the
memory is read from the file again.

The changes of jobs are collected only while the store has observers: see `Writer`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import chain
from operator import attrgetter
from typing import Any

from msgspec.structs import replace

from harp.protocol.ends import Cancelled, End, Failed, Returned
from harp.protocol.json_text import Raw
from harpcaller.model.changes import Change, ChangeKind
from harpcaller.model.ids import is_job_id
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
from harpcaller.model.lanes import host_lane, owner_lane, queue_lane
from harpcaller.store import LimitReached, RequestIDReused
from harpcaller.store.sqlite.active import ActiveJob, ActiveJobs, Lane
from harpcaller.store.sqlite.file import MAX_INTEGER, QUERIES
from harpcaller.store.sqlite.rows import (
    ENTRY_BYTES,
    PACKET_BYTES,
    decode_job,
    decode_owner,
    encode_end_body,
    encode_end_preview,
    encode_name,
    encode_owner,
    join_records,
    join_timestamps,
)
from harpcaller.store.sqlite.staging import decode_jobs

# Records are appended to a chunk below this size. It fits in a page, so rewriting it costs one page, like a new chunk.
_GROWING_CHUNK_BYTES = 2048
_MAX_CHUNK_BYTES = 65536  # A chunk of this size gets no further record.
_ROWS = 64  # Maximum number of rows in one statement. More rows are hardly cheaper, and SQLite limits the parameters.
_JOB_BYTES = 200  # Approximate bytes of a job without its arguments.
_INCOMPLETE = -1.5  # The time of submission of staged jobs that are not stored yet; as long in the file as another.
_STEP_PAYLOAD = 256 * 1024  # A step of staged jobs takes at least as long as records of so many bytes.
# Approximate limits of one step of pruning.
_STEP_JOBS = 100
_STEP_BYTES = 8 * 1024 * 1024
_STEP_CHUNKS = 4096
_STEP_PAGES = 512
_STEP_REQUEST_IDS = 1000
_SHORT_NAME = 256  # The lanes of names up to this length are cached.
_host_lane = lru_cache(1024)(host_lane)
_owner_lane = lru_cache(1024)(owner_lane)
_queue_lane = lru_cache(1024)(queue_lane)


def _lane_of(job: NewJob) -> str:
    if job.queue is not None:
        return _queue_lane(job.queue) if len(job.queue) <= _SHORT_NAME else queue_lane(job.queue)
    is_short = len(job.host) <= _SHORT_NAME
    if job.max_running is None:
        return _host_lane(job.host) if is_short else host_lane(job.host)
    return (_owner_lane if is_short else owner_lane)(job.host, job.owner or "")


class Writes:
    """The verbs, and the rows that they have collected in the current transaction of `db`."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.is_observed = False  #: Whether changes are collected.
        self.changes: list[Change] = []  #: The changes of the current transaction, in order.
        self._active: ActiveJobs
        self._is_current = False
        self._latest = self._disorder = 0.0  # submission time of the latest job, see submission_times
        self._added: dict[int, tuple[Lane, Job]] = {}  # jobs to insert, by sequence number
        self._ended: list[tuple[Any, ...]] = []
        self._outcomes: list[tuple[Any, ...]] = []
        self._with_secrets: set[int] = set()  # the jobs whose secret arguments are stored
        self._erased: list[tuple[int]] = []  # of these, those whose secret arguments are erased next

    # The transaction.

    def begin_transaction(self) -> None:
        """Read the active jobs if they are not in memory; called within a transaction, before its verbs."""
        if not self._is_current:
            self._active = ActiveJobs(self.db)
            [(latest, disorder)] = self.db.execute(QUERIES["submission_times"]).fetchall()
            # The latest time of all jobs is not stored: it is at most this one.
            self._latest, self._disorder = latest + disorder, disorder
            self._with_secrets = {seq for (seq,) in self.db.execute(QUERIES["jobs_with_secrets"])}
            self._is_current = True

    def discard_changes(self) -> None:
        """Discard the memory and the collected rows, after a rollback."""
        self._is_current = False
        self._added.clear()
        self._ended.clear()
        self._outcomes.clear()
        self._erased.clear()
        self.changes.clear()

    def flush(self) -> None:
        """Write the collected rows. Raises `ValueError` if a job with one of the new ids exists."""
        if self._added:
            self._insert_jobs()
            self._added.clear()
        if self._ended:
            if len(self._ended) == 1:
                self._execute_guarded(QUERIES["end_job"], self._ended)
            elif self._write_rows(QUERIES["end_jobs"], self._ended) != len(self._ended):
                raise RuntimeError("the file differs from the jobs in memory: end_jobs")
            self._ended.clear()
        if self._outcomes:
            self._write_rows(QUERIES["add_outcome"], self._outcomes)
            self._outcomes.clear()
        if self._erased:
            self._execute_guarded(QUERIES["erase_secrets"], self._erased)
            self._erased.clear()

    def _insert_jobs(self) -> None:
        jobs = [_job_row(seq, lane, job) for seq, (lane, job) in self._added.items()]
        try:
            self._write_rows(QUERIES["add_job"], jobs)
        except sqlite3.IntegrityError as error:
            if error.sqlite_errorname != "SQLITE_CONSTRAINT_UNIQUE":
                raise
            which = jobs[0][1] if len(jobs) == 1 else "with one of these ids"
            raise ValueError(f"a job {which} exists already") from error
        self._write_rows(QUERIES["add_call"], [_call_row(seq, job) for seq, (_, job) in self._added.items()])

    def _write_rows(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> int:
        """Run a statement with the VALUES of one row for many rows; return the number of changed rows.

        As many rows as possible share a statement, because this thread gives up Python's lock at each one. A statement
        is compiled once for each power of two.
        """
        changed = start = 0
        while start < len(rows):
            count = min(_ROWS, 1 << (len(rows) - start).bit_length() - 1)
            group = list(chain.from_iterable(rows[start : start + count]))
            changed += self.db.execute(_for_rows(statement, count), group).rowcount
            start += count
        return changed

    def _execute_guarded(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Run a statement that changes one row for each tuple."""
        if self.db.executemany(statement, rows).rowcount != len(rows):
            raise RuntimeError(f"the file differs from the jobs in memory: {statement}")

    # Submission and claims.

    def add_job(self, job: NewJob, now: float) -> str:
        """Store a queued job on stable storage, and its queue if it is new; return the job's id.

        If a job with the same request id is stored, return the id of that job and change no row. Raises
        `RequestIDReused` if that job has another call, `LimitReached` for more jobs than its owner may have queued, and
        `ValueError` if a job with this id exists. A job with an `end` is stored as one that has ended.
        """
        return self.add_jobs((job,), now)[0]

    def add_jobs(self, jobs: Sequence[NewJob], now: float) -> list[str]:
        """Store queued jobs in this order as `add_job` does, all or none; return their ids in the same order."""
        with_request_id = [job for job in jobs if job.request_id is not None]
        stored_as = self._find_submitted_before(with_request_id) if with_request_id else {}
        if limited := [job for job in jobs if job.max_queued is not None and job.id not in stored_as]:
            self._check_queued(limited)
        if now < self._latest:
            self._record_disorder(now)
        self._latest = max(self._latest, now)
        request_ids: list[tuple[Any, ...]] = []
        for job in jobs:
            if job.id in stored_as:
                continue
            key = _lane_of(job)
            lane = self._active.lanes.get(key) or self._add_lane(key, job)
            limits = float(job.timeout), float(job.max_exec_time)
            call = job.host, job.procedure, job.arguments, *limits, job.queue, job.info
            submitter = job.start_within, None, job.owner, job.max_running, job.secrets, job.rerun_of
            new = job.id, State.QUEUED, *call, now, None, None, None, 0, False, None
            queued = Job(*new, *submitter, job.max_record_bytes)
            seq = self._active.add_queued(lane, job.owner)
            lane.waits_until = min(lane.waits_until, now + job.start_within)
            self._added[seq] = lane, queued
            if self.is_observed:
                self.changes.append(Change(ChangeKind.SUBMITTED, job.id, seq, now, queued))
            if job.secrets is not None:
                self._with_secrets.add(seq)
            if job.end is not None:
                ended = ActiveJob(job.id, seq, lane, job.owner)
                self._end(ended, job.end, now, None, False, NO_METADATA)
            if job.request_id is not None:
                key_of_id = encode_name(job.request_id), encode_name(job.request_ids_of)
                request_ids.append((*key_of_id, seq, job.call_digest, now))
        if request_ids:
            self.db.executemany(QUERIES["add_request_id"], request_ids)
        return [stored_as.get(job.id, job.id) for job in jobs]

    def _record_disorder(self, now: float) -> None:
        """Record that a job is submitted at a time before that of an earlier one."""
        if self._latest - now > self._disorder:
            self._disorder = self._latest - now
            self.db.execute(QUERIES["set_disorder"], (self._disorder,))

    def _find_submitted_before(self, jobs: Sequence[NewJob]) -> dict[str, str]:
        """Return the jobs whose request id was used before: their ids, and the id of the first job with it."""
        stored_as: dict[str, str] = {}
        first_jobs: dict[tuple[str, str], tuple[str, bytes, bool]] = {}
        for job in jobs:
            key = request_id, _ = job.request_id or "", job.request_ids_of
            first = first_jobs.get(key) or self._find_request_id(*key) or (job.id, job.call_digest, True)
            first_jobs[key] = first
            job_id, digest, is_own = first
            if digest != job.call_digest:
                raise RequestIDReused(request_id, job_id if is_own else None)
            if job_id != job.id:
                stored_as[job.id] = job_id
        return stored_as

    def _find_request_id(self, request_id: str, owner: str) -> tuple[str, bytes, bool] | None:
        """Return the id of the job that was submitted with a request id of an owner, and the digest of its call.

        The last value is False if the request id is one of those of all clients.
        """
        key = {"request_id": encode_name(request_id), "owner": encode_name(owner)}
        for seq, job_id, digest, is_own in self.db.execute(QUERIES["find_request_id"], key).fetchall():
            if seq in self._added:
                job_id = self._added[seq][1].id
            if job_id is not None:
                return job_id, digest, bool(is_own)
        return None

    def _check_queued(self, jobs: Sequence[NewJob]) -> None:
        """Raise `LimitReached` if these jobs and those that are queued are more than their owner may have."""
        new: dict[str | None, int] = {}
        for job in jobs:
            assert job.max_queued is not None
            new[job.owner] = count = new.get(job.owner, 0) + 1
            queued = self._active.owners[job.owner].queued if job.owner in self._active.owners else 0
            if queued + count > job.max_queued:
                message = f"{queued} jobs of {job.owner} are queued; the limit is {job.max_queued}"
                all_new = sum(other.owner == job.owner for other in jobs)
                raise LimitReached(message, may_pass=all_new <= job.max_queued)

    # Many jobs of one request: see `staging`.

    def check_request_ids(self, jobs: Sequence[NewJob]) -> set[str]:
        """Return which of these jobs, all with a request id, were submitted before.

        Raises `RequestIDReused` if one of them has the request id of another call.
        """
        return set(self._find_submitted_before(jobs))

    def stage_part(self, rows: Sequence[bytes]) -> list[int]:
        """Write jobs that `staging.encode_jobs` encoded; return the numbers of their steps. They are not stored yet."""
        return self._stage(rows, _INCOMPLETE)

    def stage_jobs(
        self, rows: Sequence[bytes], limited: Sequence[NewJob], now: float, parts: Sequence[int] = ()
    ) -> list[int]:
        """Store the last jobs of a request with those of its earlier parts; return the numbers of the new steps.

        `limited` are those of all jobs with a limit of queued jobs. Raises `LimitReached`.
        """
        self._check_queued(limited)
        self._execute_guarded(QUERIES["complete_staged_jobs"], [(now, step) for step in parts])
        return self._stage(rows, now)

    def discard_staged_parts(self) -> None:
        """Delete the parts of a request whose last part was not stored."""
        self.db.execute(QUERIES["discard_staged_parts"])

    def _stage(self, rows: Sequence[bytes], submitted: float) -> list[int]:
        return [self.db.execute(QUERIES["stage_jobs"], (submitted, row)).fetchone()[0] for row in rows]

    def insert_staged(self, step: int, jobs: Sequence[NewJob], now: float) -> list[str]:
        """Insert the jobs of a step instead of its row; return their ids as `add_jobs` does."""
        self._execute_guarded(QUERIES["unstage_jobs"], [(step,)])
        return self.add_jobs(jobs, now)

    def _add_lane(self, key: str, job: NewJob) -> Lane:
        if job.queue is None:
            return self._active.add_lane(key, None)
        concurrency = min(job.concurrency, MAX_INTEGER)
        self.db.execute(QUERIES["add_queue"], (key, job.queue, concurrency))
        return self._active.add_lane(key, concurrency)

    def _remove_lane_if_empty(self, lane: Lane) -> None:
        if lane.is_empty:
            self._active.remove_lane(lane)
            if lane.concurrency is not None:
                self.db.execute(QUERIES["delete_queue"], (lane.key,))

    def claim_jobs(
        self,
        now: float,
        limit: int,
        max_calls_per_host: int,
        max_new: Callable[[str], int | None] = lambda host: None,
    ) -> list[Job]:
        """Assign slots to at most `limit` queued jobs in the order of submission; return them as running jobs.

        The jobs of a queue that hold a slot stay within its concurrency, and its jobs start first in, first out. The
        jobs that hold a slot on a host, with or without a queue, stay within `max_calls_per_host`. `max_new` returns
        how many jobs may get a slot on a host, or None for no limit; it is called in the writing thread. Claims run
        last in their transaction, so `now` may be earlier than a submission; no job starts before its submission.
        """
        claimed: list[Job] = []
        limits = {"limit": limit, "max_calls_per_host": max_calls_per_host}
        startable = self._active.startable_jobs(self._head, **limits, max_new=max_new)
        for seq, lane in startable:
            queued = self._head(seq, lane)
            started = max(now, queued.submitted)
            job = replace(queued, state=State.RUNNING, started=started, holds_slot=True)
            if seq in self._added:
                self._added[seq] = lane, job
            else:
                self._execute_guarded(QUERIES["start_job"], [(started, seq)])
            self._active.give_slot(ActiveJob(job.id, seq, lane, job.owner, job.host, State.RUNNING))
            if self.is_observed:
                self.changes.append(Change(ChangeKind.STARTED, job.id, seq, started, job))
            claimed.append(job)
        return claimed

    def _waits_for_owner(self, lane: Lane) -> bool:
        """Return whether the jobs of a lane wait because their owner has as many slots as it may have."""
        return lane.head is not None and self._active.is_owner_full(self._head(lane.head, lane))

    def _head(self, seq: int, lane: Lane) -> Job:
        """Return the head of a lane. A job that was read from the file is cached until it starts."""
        if added := self._added.get(seq):
            return added[1]
        if lane.head_job is None:
            [row] = self.db.execute(QUERIES["get_job_by_seq"], {"seq": seq}).fetchall()
            lane.head_job = decode_job(row)
        return lane.head_job

    # Starts that certainly did not happen.

    def requeue_job(self, job_id: str, tried: float) -> bool:
        """Queue a running job again, in its order of submission, and release its slot; `tried`: when it was started.

        Returns False without a change if the job is not running or is unknown. Raises `ValueError` if it has records:
        then its call has started.
        """
        job = self._active.slot_holders.get(job_id)
        if job is None or job.state is not State.RUNNING:
            return False
        if job.records:
            raise ValueError(f"job {job_id} has records: it has started")
        self.flush()
        self._execute_guarded(QUERIES["requeue_job"], [(tried, job.seq)])
        job.lane.waits_until = 0.0
        self._active.put_back(job)
        if self.is_observed:
            self.changes.append(Change(ChangeKind.REQUEUED, job_id, job.seq))
        return True

    def fail_waiting(
        self, host: str, end: Failed, now: float, since: float, failed: float, restarted: float = 0.0, limit: int = 500
    ) -> tuple[list[str], float | None]:
        """Store this end for at most `limit` jobs that have waited for a host for their `start_within` seconds.

        A job waits from the time `since`, at which starts on the host began to fail; a job that was tried before the
        time `restarted` waits from that attempt. `failed` is the time of the latest attempt: later submissions do not
        end. In a queue, only the head waits for the host, after a claim that found the host without room.

        Returns the ids of these jobs, and the time at which the next job will have waited long enough; None: no job
        waits.
        """
        self.flush()
        key = _host_lane(host)
        ended: list[ActiveJob] = []
        deadlines: list[float] = []
        times = {"now": now, "since": since, "failed": failed, "restarted": restarted}
        for of_host in [self._active.lanes.get(each) for each in (key, *self._active.owner_lanes.get(key, ()))]:
            if of_host is None or self._waits_for_owner(of_host):
                continue
            if of_host.waits_until <= now:  # otherwise no job has expired
                room = limit - len(ended)
                parameters = {**times, "lane": of_host.key, "limit": room}
                expired = self.db.execute(QUERIES["expired"], parameters).fetchall()
                for seq, id_, owner in expired:
                    ended.append(ActiveJob(id_, seq, of_host, decode_owner(owner)))
                    self._end(ended[-1], end, now, None, False, NO_METADATA)
                self.flush()
                if len(expired) < room:
                    [(deadline,)] = self.db.execute(QUERIES["next_deadline"], parameters).fetchall()
                    of_host.waits_until = deadline or 0.0
            if of_host.head is not None:
                deadlines.append(of_host.waits_until)
        for lane in self._active.list_waiting_queues(host):
            while lane.head is not None and (head := self._head(lane.head, lane)).host == host:
                if self._active.is_owner_full(head):
                    break
                waits_since = head.tried if head.tried is not None and head.tried < restarted else since
                deadline = max(head.submitted, waits_since) + head.start_within
                if deadline > now or head.submitted > failed or len(ended) >= limit:
                    deadlines.append(deadline)
                    break
                job = ActiveJob(head.id, lane.head, lane, head.owner)
                self._end(job, end, now, None, False, NO_METADATA)
                ended.append(job)
        return [job.id for job in sorted(ended, key=attrgetter("seq"))], min(deadlines, default=None)

    # Records.

    def append_records(self, job_id: str, first: int, records: Records) -> bool:
        """Append records numbered from `first`; return False if the job is not running or has not `first` records.

        Raises `ValueError` if a record has no time or contains a line feed.
        """
        if len(records.values) != len(records.timestamps):
            raise ValueError(f"{len(records.values)} records and {len(records.timestamps)} times: expected one each")
        job = self._active.slot_holders.get(job_id)
        if job is None or job.state is not State.RUNNING or job.records != first:
            return False
        if job.seq in self._added:
            self.flush()
        for chunk in _split_chunks(records):
            self._append_chunk(job, chunk)
        self._execute_guarded(QUERIES["count_records"], [(job.records, job.seq)])
        if self.is_observed:
            size = sum(map(len, records.values))
            change = Change(ChangeKind.RECORDS, job_id, job.seq, records=len(records), record_bytes=size)
            self.changes.append(change)
        return True

    def _append_chunk(self, job: ActiveJob, records: Records) -> None:
        joined = join_records(records.values)
        if job.chunk is None:
            first, count, timestamps = job.records, len(records), join_timestamps(b"", records.timestamps)
            self.db.execute(QUERIES["add_chunk"], (job.seq, first, count, joined, timestamps))
        else:
            first, count, stored, times = job.chunk
            joined = stored + b"\n" + joined
            count, timestamps = count + len(records), join_timestamps(times, records.timestamps)
            self.db.execute(QUERIES["grow_chunk"], (count, joined, timestamps, job.seq, first))
        job.records += len(records)
        may_grow = len(joined) + len(timestamps) < _GROWING_CHUNK_BYTES
        job.chunk = (first, count, joined, timestamps) if may_grow else None

    # Ends.

    def finish_job(
        self,
        job_id: str,
        end: End,
        now: float,
        *,
        stop: StopState | None = None,
        keep_slot: bool = False,
        metadata: JobMetadata = NO_METADATA,
    ) -> bool:
        """Store the end of a job and its metadata, and release its slot unless `keep_slot` is set.

        Returns False without a change if the job has ended or is unknown. Raises `ValueError` for an end that may not
        follow the job's state: a queued job cannot return, keep a slot or be stopped.
        """
        job = self._find_unended(job_id)
        if job is None:
            return False
        if state_of(end) not in TRANSITIONS[job.state]:
            raise ValueError(f"job {job_id} is {job.state}: it cannot have been {state_of(end)}")
        if job.state is State.QUEUED and (keep_slot or stop is not None):
            raise ValueError(f"job {job_id} is {job.state}: it has no slot to keep, and no process to stop")
        self._end(job, end, now, stop, keep_slot, metadata)
        return True

    def cancel_job(self, job_id: str, now: float, stop_request: Raw | None = None) -> State | None:
        """Store the end `Cancelled`; return the state before, or None if the job has ended or is unknown.

        `stop_request` is stored as metadata. A job that was running keeps its slot, and its stop is pending.
        """
        job = self._find_unended(job_id)
        return None if job is None else self._cancel(job, now, stop_request)

    def cancel_queue(
        self, queue: Raw, now: float, stop_request: Raw | None = None, *, limit: int = 500
    ) -> list[tuple[str, State]]:
        """Cancel at most `limit` jobs of a queue as `cancel_job` does; return id and state before of each.

        Queued jobs are cancelled first, so that no queued job gets the slot of a cancelled job. If fewer than `limit`
        jobs are returned, all jobs of the queue are cancelled.
        """
        self.flush()
        lane = self._active.lanes.get(queue_lane(queue))
        if lane is None:
            return []
        rows = self.db.execute(QUERIES["queued_of_lane"], (lane.key, limit)).fetchall()
        jobs = [ActiveJob(job_id, seq, lane, decode_owner(owner)) for seq, job_id, owner in rows]
        if len(jobs) < limit:
            holders = self._active.slot_holders.values()
            jobs += [job for job in holders if job.lane is lane and job.state is State.RUNNING]
        return [(job.id, self._cancel(job, now, stop_request)) for job in jobs[:limit]]

    def _find_unended(self, job_id: str) -> ActiveJob | None:
        job = self._active.slot_holders.get(job_id)
        if job is not None:
            return None if job.state in ENDED else job
        if not is_job_id(job_id):
            return None
        self.flush()
        for seq, key, owner in self.db.execute(QUERIES["find_queued_job"], (job_id,)).fetchall():
            return ActiveJob(job_id, seq, self._active.lanes[key], decode_owner(owner))
        return None

    def _cancel(self, job: ActiveJob, now: float, stop_request: Raw | None) -> State:
        """Store the end `Cancelled`; return the state before."""
        before, running = job.state, job.state is State.RUNNING
        stop = StopState.PENDING if running else None
        self._end(job, Cancelled(), now, stop, running, JobMetadata(stop_request=stop_request))
        return before

    def _end(
        self, job: ActiveJob, end: End, now: float, stop: StopState | None, keep_slot: bool, metadata: JobMetadata
    ) -> None:
        if job.state is State.QUEUED:
            self._active.remove_queued(job)
        elif not keep_slot:
            self._active.release_slot(job)
        self._remove_lane_if_empty(job.lane)
        job.state = state_of(end)
        self._ended.append((job.state, now, stop, keep_slot, *encode_end_preview(end), job.seq))
        if not keep_slot:
            self._erase_secrets(job.seq)
        self._add_outcome(job.seq, encode_end_body(end), metadata)
        if self.is_observed:
            self.changes.append(Change(ChangeKind.ENDED, job.id, job.seq, now, end=end, stop=stop))

    def _erase_secrets(self, seq: int) -> None:
        """Erase the secret arguments of a job whose call sends nothing more that they would be masked in."""
        if seq in self._with_secrets:
            self._with_secrets.remove(seq)
            self._erased.append((seq,))

    def _add_outcome(self, seq: int, body: bytes | None, metadata: JobMetadata) -> None:
        if body is not None or metadata != NO_METADATA:
            call, exit_info = metadata.call, metadata.exit_info
            self._outcomes.append((seq, body, call, metadata.stop_request, metadata.stop_report, exit_info))

    def finalize_stop(
        self, job_id: str, stop: StopState, *, keep_slot: bool = False, metadata: JobMetadata = NO_METADATA
    ) -> bool:
        """Store the outcome of a job's stop and its metadata, and release its slot unless `keep_slot` is set.

        Returns False without a change if the job has not ended, holds no slot or is unknown.
        """
        job = self._active.slot_holders.get(job_id)
        if job is None or job.state not in ENDED:
            return False
        self.flush()
        self._execute_guarded(QUERIES["finalize_stop"], [(stop, keep_slot, job.seq)])
        if not keep_slot:
            self._active.release_slot(job)
            self._remove_lane_if_empty(job.lane)
            self._erase_secrets(job.seq)
        self._add_outcome(job.seq, None, metadata)
        if self.is_observed:
            self.changes.append(Change(ChangeKind.STOP, job_id, job.seq, stop=stop))
        return True

    def update_metadata(self, job_id: str, metadata: JobMetadata) -> bool:
        """Store the metadata that is not None, whatever the job's state; return False if the job is unknown."""
        self.flush()
        for (seq,) in self.db.execute(QUERIES["find_job"], (job_id,)).fetchall():
            self._add_outcome(seq, None, metadata)
            return True
        return False

    # The steps of pruning. Each is short, so that other verbs wait briefly.

    def delete_jobs(self, ended_before: float, limit: int) -> int:
        """Delete a few jobs that ended before a time and hold no slot; return how many. Their records are orphaned."""
        self.flush()
        old = self.db.execute(QUERIES["old_jobs"], {"before": ended_before, "limit": min(limit, _STEP_JOBS)}).fetchall()
        deleted, room = 0, _STEP_BYTES
        for seq, job_id, size in old:
            if room <= 0:
                break
            self.db.execute(QUERIES["orphan_records"], {"seq": seq})
            self.db.execute(QUERIES["delete_job"], {"seq": seq})
            if self.is_observed:
                self.changes.append(Change(ChangeKind.DELETED, job_id, seq))
            room -= size
            deleted += 1
        return deleted

    def delete_orphaned_records(self) -> bool:
        """Delete some records of deleted jobs; return whether there may be more."""
        self.flush()
        [(seq,)] = self.db.execute(QUERIES["first_orphaned_records"]).fetchall()
        if seq is None:
            return False
        room = _STEP_BYTES
        for rowid, size in self.db.execute(QUERIES["orphaned_chunks"], {"seq": seq, "limit": _STEP_CHUNKS}).fetchall():
            if room <= 0:
                break
            self.db.execute(QUERIES["delete_chunk"], {"rowid": rowid})
            room -= size
        self.db.execute(QUERIES["forget_orphaned_records"], {"seq": seq})
        return True

    def delete_request_ids(self, submitted_before: float) -> bool:
        """Delete some request ids that were submitted before a time; return whether there may be more."""
        parameters = {"before": submitted_before, "limit": _STEP_REQUEST_IDS}
        return self.db.execute(QUERIES["delete_request_ids"], parameters).rowcount == _STEP_REQUEST_IDS

    def release_free_pages(self) -> bool:
        """Free some unused pages; the next checkpoint truncates the file. Return whether there may be more."""
        self.flush()
        before = self._count_free_pages()
        for _ in range(min(before, _STEP_PAGES)):
            self.db.execute("PRAGMA incremental_vacuum(1)")  # the driver executes only one step of this statement
        return 0 < self._count_free_pages() < before

    def set_prune_time(self, time: float) -> None:
        """Store the prune time in Unix seconds, rounded down to minutes.

        It is stored in the header of the file, in a field of 31 bits for the application.
        """
        self.db.execute(f"PRAGMA user_version = {min(max(1, int(time // 60)), 2**31 - 1)}")

    def check_writable(self) -> None:
        """Write to the file without a change, so that the caller learns whether that is possible."""
        [(minutes,)] = self.db.execute("PRAGMA user_version").fetchall()
        self.db.execute(f"PRAGMA user_version = {int(minutes)}")

    def _count_free_pages(self) -> int:
        [(pages,)] = self.db.execute("PRAGMA freelist_count").fetchall()
        return int(pages)


def insert_staged_jobs(db: sqlite3.Connection) -> None:
    """Insert all staged jobs: those of a request that a crash has interrupted. In one transaction."""
    db.execute(QUERIES["discard_staged_parts"])
    rows = db.execute(QUERIES["staged_jobs"]).fetchall()
    if not rows:
        return
    writes = Writes(db)
    db.execute("BEGIN IMMEDIATE")
    writes.begin_transaction()
    for step, submitted, row in rows:
        writes.insert_staged(step, decode_jobs(row), submitted)
    writes.flush()
    db.execute("COMMIT")


def _end_bytes(job_id: str, end: End, now: float, **options: object) -> int:
    payload = getattr(end, "result" if isinstance(end, Returned) else "data", None)
    return len(payload) if isinstance(payload, bytes) else 0


def _count_bytes(jobs: Sequence[NewJob]) -> int:
    return sum(len(job.arguments) + _JOB_BYTES for job in jobs)


#: For verbs that may write long payloads: functions that return their approximate bytes, from the verb's arguments.
PAYLOAD_BYTES: dict[Callable[..., Any], Callable[..., int]] = {
    Writes.add_job: lambda job, now: len(job.arguments),
    Writes.add_jobs: lambda jobs, now: _count_bytes(jobs),
    Writes.stage_part: lambda rows: sum(map(len, rows)),
    Writes.stage_jobs: lambda rows, limited, now, parts=(): sum(map(len, rows)),
    Writes.insert_staged: lambda step, jobs, now: max(_STEP_PAYLOAD, _count_bytes(jobs)),
    Writes.append_records: lambda job_id, first, records: sum(map(len, records.values)) + PACKET_BYTES * len(records),
    Writes.finish_job: _end_bytes,
}

#: The verbs of pruning. On a full disk they may use the reserve.
PRUNING: frozenset[Callable[..., Any]] = frozenset(
    {
        Writes.delete_jobs,
        Writes.delete_orphaned_records,
        Writes.delete_request_ids,
        Writes.release_free_pages,
        Writes.set_prune_time,
    }
)


@cache
def _for_rows(statement: str, count: int) -> str:
    """Return a statement with the VALUES of one row for so many rows."""
    head, values, tail = statement.partition("VALUES ")
    row, end, tail = tail.partition(")")
    return head + values + ", ".join([row + end] * count) + tail


def _job_row(seq: int, lane: Lane, job: Job) -> tuple[Any, ...]:
    owner = encode_owner(job.owner)
    return seq, job.id, lane.key, encode_name(job.host), job.state, job.submitted, job.started, job.holds_slot, owner


def _call_row(seq: int, job: Job) -> tuple[Any, ...]:
    return (
        seq,
        encode_name(job.procedure),
        job.arguments,
        job.timeout,
        job.max_exec_time,
        job.queue,
        job.info,
        job.start_within,
        job.max_running,
        job.secrets,
        job.rerun_of,
        job.max_record_bytes,
    )


def _split_chunks(records: Records) -> Iterator[Records]:
    start = size = 0
    previous: float | None = None
    for end, (value, time) in enumerate(zip(records.values, records.timestamps, strict=True), 1):
        size += len(value) + (0 if time == previous else ENTRY_BYTES)
        previous = time
        if size >= _MAX_CHUNK_BYTES or end == len(records):
            yield Records(records.values[start:end], records.timestamps[start:end])
            start, size, previous = end, 0, None
