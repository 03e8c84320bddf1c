"""A store in memory, as simple as possible, with which the real stores are compared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from msgspec.structs import asdict, replace

from harp.protocol.ends import Cancelled, End, Failed
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import (
    ENDED,
    NO_METADATA,
    TRANSITIONS,
    Job,
    JobDetails,
    JobMetadata,
    NewJob,
    QueuePosition,
    Records,
    State,
    StopState,
    Subject,
    state_of,
)
from harpcaller.model.lanes import canonical, queue_id, queue_lane
from harpcaller.store import LimitReached, QueueStatus, RequestIDReused, UnknownJob


class ModelStore:
    """The verbs of `harpcaller.store.sqlite.Store`, without `await`."""

    def __init__(self) -> None:
        self.jobs: dict[str, tuple[int, Job]] = {}
        self.records: dict[str, list[tuple[bytes, float]]] = {}
        self.metadata: dict[str, JobMetadata] = {}
        self.limits: dict[str, tuple[Raw, int]] = {}
        # by request id and owner: job id, digest, time
        self.requests: dict[tuple[str, str], tuple[str, bytes, float]] = {}
        self._places = itertools.count(1)

    def list_slot_holders(self) -> list[Job]:
        return [job for _, job in self.jobs.values() if job.holds_slot]

    def in_lane(self, job_of_lane: Job) -> list[Job]:
        return [job for _, job in self.jobs.values() if self._lane(job) == self._lane(job_of_lane)]

    def _lane(self, job: Job) -> tuple[str, str]:
        if job.queue is not None:
            return "queue", canonical(job.queue)
        return ("host", job.host) if job.max_running is None else ("host of " + str(job.owner), job.host)

    def add_job(self, job: NewJob, now: float) -> str:
        if job.request_id is not None:
            for owner in (job.request_ids_of, ""):
                first, digest, _ = self.requests.get((job.request_id, owner), ("", b"", 0.0))
                if first in self.jobs:
                    if digest != job.call_digest:
                        raise RequestIDReused(job.request_id, first if owner == job.request_ids_of else None)
                    return first
        if job.id in self.jobs:
            raise ValueError
        queued = [other for _, other in self.jobs.values() if other.state is State.QUEUED and other.owner == job.owner]
        if job.max_queued is not None and len(queued) >= job.max_queued:
            raise LimitReached("queued", may_pass=True)
        if job.request_id is not None:
            self.requests[job.request_id, job.request_ids_of] = (job.id, job.call_digest, now)
        if job.queue is not None:
            self.limits.setdefault(canonical(job.queue), (job.queue, job.concurrency))
        stored = Job(
            job.id, State.QUEUED, job.host, job.procedure, job.arguments, job.timeout, job.max_exec_time,
            job.queue, job.info, now, None, None, None, 0, start_within=job.start_within, owner=job.owner,
            max_running=job.max_running, max_record_bytes=job.max_record_bytes,
        )  # fmt: skip
        self.jobs[job.id] = (next(self._places), stored)
        self.records[job.id] = []
        self.metadata[job.id] = NO_METADATA
        if job.end is not None:
            self.finish_job(job.id, job.end, now)
        return job.id

    def add_jobs(self, jobs: Sequence[NewJob], now: float) -> list[str]:
        if len({job.id for job in jobs} | self.jobs.keys()) < len(jobs) + len(self.jobs):
            raise ValueError
        before = dict(self.jobs), dict(self.records), dict(self.metadata), dict(self.limits), dict(self.requests)
        try:
            return [self.add_job(job, now) for job in jobs]
        except (RequestIDReused, LimitReached):
            self.jobs, self.records, self.metadata, self.limits, self.requests = before
            raise

    def forget_request_ids(self, submitted_before: float) -> None:
        self.requests = {key: entry for key, entry in self.requests.items() if entry[2] >= submitted_before}

    def claim_jobs(self, now: float, limit: int, max_calls_per_host: int) -> list[Job]:
        claimed: list[Job] = []
        waiting_lanes = set()
        for _, job in list(self.jobs.values()):
            if job.state is not State.QUEUED or len(claimed) == limit:
                continue
            if self._lane(job) not in waiting_lanes and self._may_start(job, max_calls_per_host):
                claimed.append(self._put(job, state=State.RUNNING, started=max(now, job.submitted), holds_slot=True))
            else:
                waiting_lanes.add(self._lane(job))
        return claimed

    def _may_start(self, job: Job, max_calls_per_host: int) -> bool:
        if sum(other.host == job.host for other in self.list_slot_holders()) >= max_calls_per_host:
            return False
        return self._has_room(job) and not self._is_owner_full(job)

    def _is_owner_full(self, job: Job) -> bool:
        return job.max_running is not None and self._count_running(job.owner) >= job.max_running

    def _count_running(self, owner: str | None) -> int:
        return sum(other.owner == owner for other in self.list_slot_holders())

    def _has_room(self, job: Job) -> bool:
        if job.queue is None:
            return True
        return sum(other.holds_slot for other in self.in_lane(job)) < self.limits[canonical(job.queue)][1]

    def requeue_job(self, job_id: str, tried: float) -> bool:
        if job_id not in self.jobs or self.get_job(job_id).state is not State.RUNNING:
            return False
        job = self.get_job(job_id)
        if job.records:
            raise ValueError
        first = tried if job.tried is None else job.tried
        self._put(job, state=State.QUEUED, started=None, holds_slot=False, tried=first)
        return True

    def fail_waiting(
        self, host: str, end: Failed, now: float, since: float, failed: float, restarted: float = 0.0, limit: int = 500
    ) -> tuple[list[str], float | None]:
        ended, deadlines, waiting_lanes = [], [], set()
        for _, job in list(self.jobs.values()):
            lane = self._lane(job)
            if job.state is not State.QUEUED or lane in waiting_lanes:
                continue
            waits_since = since if job.tried is None or job.tried >= restarted else job.tried
            deadline = max(job.submitted, waits_since) + job.start_within
            if job.host != host or not self._has_room(job) or self._is_owner_full(job):
                waiting_lanes.add(lane)
            elif deadline <= now and job.submitted <= failed:
                ended.append(job.id)
                self.finish_job(job.id, end, now)
            else:
                deadlines.append(deadline)
                if job.queue is not None:
                    waiting_lanes.add(lane)
        return ended, min(deadlines, default=None)

    def append_records(self, job_id: str, first: int, records: Records) -> bool:
        if job_id not in self.jobs:
            return False
        job = self.get_job(job_id)
        if job.state is not State.RUNNING or job.records != first:
            return False
        self.records[job_id].extend(zip(records.values, records.timestamps, strict=True))
        self._put(job, records=first + len(records))
        return True

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
        if job_id not in self.jobs or self.get_job(job_id).state in ENDED:
            return False
        job = self.get_job(job_id)
        if state_of(end) not in TRANSITIONS[job.state]:
            raise ValueError
        if job.state is State.QUEUED and (keep_slot or stop):
            raise ValueError
        ended = max(now, job.started or job.submitted)
        self._put(job, state=state_of(end), ended=ended, end=end, stop=stop, holds_slot=keep_slot)
        self.update_metadata(job_id, metadata)
        self._drop_queue(job)
        return True

    def cancel_job(self, job_id: str, now: float, stop_request: Raw | None = None) -> State | None:
        if job_id not in self.jobs or self.get_job(job_id).state in ENDED:
            return None
        state = self.get_job(job_id).state
        metadata = JobMetadata(stop_request=stop_request)
        if state is State.RUNNING:
            self.finish_job(job_id, Cancelled(), now, stop=StopState.PENDING, keep_slot=True, metadata=metadata)
        else:
            self.finish_job(job_id, Cancelled(), now, metadata=metadata)
        return state

    def cancel_queue(
        self, queue: Raw, now: float, stop_request: Raw | None = None, *, limit: int = 500
    ) -> list[tuple[str, State]]:
        active = [job for _, job in self.list_jobs(queue=queue)]
        found = sorted(active, key=lambda job: job.state is State.RUNNING)[:limit]
        for job in found:
            self.cancel_job(job.id, now, stop_request)
        return [(job.id, job.state) for job in found]

    def finalize_stop(
        self, job_id: str, stop: StopState, *, keep_slot: bool = False, metadata: JobMetadata = NO_METADATA
    ) -> bool:
        if job_id not in self.jobs or self.get_job(job_id).state not in ENDED or not self.get_job(job_id).holds_slot:
            return False
        self._drop_queue(self._put(self.get_job(job_id), stop=stop, holds_slot=keep_slot))
        return self.update_metadata(job_id, metadata)

    def update_metadata(self, job_id: str, metadata: JobMetadata) -> bool:
        if job_id not in self.jobs:
            return False
        given = {name: fact for name, fact in asdict(metadata).items() if fact is not None}
        self.metadata[job_id] = replace(self.metadata[job_id], **given)
        return True

    def get_job(self, job_id: str) -> Job:
        if job_id not in self.jobs:
            raise UnknownJob(job_id)
        return self.jobs[job_id][1]

    def find_subjects(self, job_ids: Sequence[str], max_bytes: int) -> dict[str, Subject]:
        found = {job_id: self.jobs[job_id][1] for job_id in job_ids if job_id in self.jobs}
        return {
            id_: Subject(
                job.owner,
                job.host,
                job.procedure,
                Raw(job.arguments[:max_bytes]),
                job.queue,
                job.state is State.FAILED and job.started is None and job.ended == job.submitted,
            )
            for id_, job in found.items()
        }

    def get_details(self, job_id: str) -> JobDetails:
        job = self.get_job(job_id)
        size = sum(len(value) for value, _ in self.records[job_id])
        waiting = self._queue_position(job) if job.state is State.QUEUED else None
        queue = None if job.queue is None else queue_id(queue_lane(job.queue))
        return JobDetails(job, self.metadata[job_id], size, waiting, queue)

    def _queue_position(self, job: Job) -> QueuePosition:
        queued = [other.id for other in self.in_lane(job) if other.state is State.QUEUED]
        holders = [other.id for other in self.in_lane(job) if other.holds_slot]
        limit = None if job.queue is None else self.limits[canonical(job.queue)][1]
        on_host = sum(other.host == job.host for other in self.list_slot_holders())
        of_owner = 0 if job.max_running is None else self._count_running(job.owner)
        position = queued.index(job.id) + 1
        return QueuePosition(position, limit, len(holders), tuple(holders[:10]), on_host, of_owner)

    def read_records(self, job_id: str, first: int) -> Records:
        found = self.records.get(job_id, [])[first:]
        return Records(tuple(value for value, _ in found), tuple(made for _, made in found))

    def list_jobs(
        self, *, ended: bool = False, host: str | None = None, queue: Raw | None = None, newest_first: bool = False
    ) -> list[tuple[int, Job]]:
        found = [
            (seq, job)
            for seq, job in self.jobs.values()
            if (ended or job.state not in ENDED)
            and host in (None, job.host)
            and (queue is None or (job.queue is not None and canonical(job.queue) == canonical(queue)))
        ]
        return found[::-1] if newest_first else found

    def list_queues(self) -> list[QueueStatus]:
        return list(self._queues())

    def _queues(self) -> Iterator[QueueStatus]:
        for name, concurrency in self.limits.values():
            jobs = [job for _, job in self.list_jobs(ended=True, queue=name)]
            queued = sum(job.state is State.QUEUED for job in jobs)
            yield QueueStatus(name, concurrency, sum(job.holds_slot for job in jobs), queued)

    def prune_jobs(self, ended_before: float, limit: int) -> int:
        ended = [job for _, job in self.jobs.values() if job.ended is not None and job.ended < ended_before]
        old = [job for job in ended if not job.holds_slot]
        old.sort(key=lambda job: job.ended or 0)
        for job in old[:limit]:
            del self.jobs[job.id], self.records[job.id], self.metadata[job.id]
        return len(old[:limit])

    def _drop_queue(self, job: Job) -> None:
        """Remove the queue of a job if all its jobs have ended and released their slots."""
        if job.queue is not None and all(other.state in ENDED and not other.holds_slot for other in self.in_lane(job)):
            del self.limits[canonical(job.queue)]

    def _put(self, job: Job, **changes: object) -> Job:
        changed = replace(job, **changes)
        self.jobs[job.id] = (self.jobs[job.id][0], changed)
        return changed
