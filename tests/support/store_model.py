"""A store in memory that is as simple as can be: what the real ones are compared with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from harp.protocol.ends import Cancelled, End
from harp.protocol.jsontext import Raw, canonical
from harpcaller.jobs import ENDED, TRANSITIONS, Job, NewJob, State, state_of
from harpcaller.store import QueueStatus, UnknownJob


class ModelStore:
    """The verbs of `harpcaller.store.Store`, without `await`."""

    def __init__(self) -> None:
        self.jobs: dict[str, tuple[int, Job]] = {}
        self.records: dict[str, list[Raw]] = {}
        self.limits: dict[str, tuple[Raw, int]] = {}
        self._places = itertools.count(1)

    def running(self) -> list[Job]:
        return [job for _, job in self.jobs.values() if job.state is State.RUNNING]

    def add_job(self, job: NewJob, now: float) -> None:
        if job.id in self.jobs:
            raise ValueError
        if job.queue is not None:
            self.limits.setdefault(canonical(job.queue), (job.queue, job.concurrency))
        stored = Job(
            job.id, State.QUEUED, job.host, job.procedure, job.arguments, job.timeout, job.max_exec_time,
            job.queue, job.info, now, None, None, None, 0,
        )  # fmt: skip
        self.jobs[job.id] = (next(self._places), stored)
        self.records[job.id] = []

    def claim_jobs(self, now: float, limit: int, host_concurrency: int) -> list[Job]:
        claimed: list[Job] = []
        waiting_lanes = set()
        for _, job in list(self.jobs.values()):
            if job.state is not State.QUEUED or len(claimed) == limit:
                continue
            lane = (job.host,) if job.queue is None else canonical(job.queue)
            if lane not in waiting_lanes and self._may_start(job, host_concurrency):
                claimed.append(self._put(job, state=State.RUNNING, started=now))
            else:
                waiting_lanes.add(lane)
        return claimed

    def _may_start(self, job: Job, host_concurrency: int) -> bool:
        running = self.running()
        if sum(other.host == job.host for other in running) >= host_concurrency:
            return False
        if job.queue is None:
            return True
        queue = canonical(job.queue)
        used = sum(other.queue is not None and canonical(other.queue) == queue for other in running)
        return used < self.limits[queue][1]

    def append_records(self, job_id: str, first: int, records: Sequence[Raw]) -> bool:
        if job_id not in self.jobs:
            return False
        job = self.get_job(job_id)
        if job.state is not State.RUNNING or job.records != first:
            return False
        self.records[job_id].extend(records)
        self._put(job, records=first + len(records))
        return True

    def finish_job(self, job_id: str, end: End, now: float) -> bool:
        if job_id not in self.jobs or self.get_job(job_id).state in ENDED:
            return False
        job = self.get_job(job_id)
        if state_of(end) not in TRANSITIONS[job.state]:
            raise ValueError
        self._end(job, end, now)
        return True

    def cancel_job(self, job_id: str, now: float) -> State | None:
        if job_id not in self.jobs or self.get_job(job_id).state in ENDED:
            return None
        job = self.get_job(job_id)
        self._end(job, Cancelled(), now)
        return job.state

    def cancel_queue(self, queue: Raw, now: float) -> list[tuple[str, State]]:
        found = [job for _, job in self.list_jobs(queue=queue)]
        for job in found:
            self._end(job, Cancelled(), now)
        return [(job.id, job.state) for job in found]

    def get_job(self, job_id: str) -> Job:
        if job_id not in self.jobs:
            raise UnknownJob(job_id)
        return self.jobs[job_id][1]

    def list_jobs(self, *, ended: bool = False, queue: Raw | None = None) -> list[tuple[int, Job]]:
        return [
            (place, job)
            for place, job in self.jobs.values()
            if (ended or job.state not in ENDED)
            and (queue is None or (job.queue is not None and canonical(job.queue) == canonical(queue)))
        ]

    def list_queues(self) -> list[QueueStatus]:
        return list(self._queues())

    def _queues(self) -> Iterator[QueueStatus]:
        for name, concurrency in self.limits.values():
            states = [job.state for _, job in self.list_jobs(queue=name)]
            yield QueueStatus(name, concurrency, states.count(State.RUNNING), states.count(State.QUEUED))

    def settle_interrupted(self, end: End, now: float) -> int:
        running = self.running()
        for job in running:
            self._end(job, end, now)
        return len(running)

    def prune_jobs(self, ended_before: float, limit: int) -> int:
        old = [job for _, job in self.jobs.values() if job.ended is not None and job.ended < ended_before]
        old.sort(key=lambda job: job.ended or 0)
        for job in old[:limit]:
            del self.jobs[job.id], self.records[job.id]
        return len(old[:limit])

    def _end(self, job: Job, end: End, now: float) -> None:
        self._put(job, state=state_of(end), ended=now, end=end)
        if job.queue is not None and not self.list_jobs(queue=job.queue):
            del self.limits[canonical(job.queue)]

    def _put(self, job: Job, **changes: object) -> Job:
        changed = replace(job, **changes)  # type: ignore[arg-type]
        self.jobs[job.id] = (self.jobs[job.id][0], changed)
        return changed
