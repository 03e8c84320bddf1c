"""The lanes and slots of the jobs that have not ended or hold a slot, in memory.

It is a cache of rows that only this dispatcher changes, so that a write need not read rows. The file is authoritative:
the cache is read from it when the store is opened, and again after a rollback. A queued job is only a sequence number
here, because there may be many. No statement of this module writes.
"""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from harpcaller.model.jobs import Job, State
from harpcaller.model.lanes import lane_of_host
from harpcaller.store.sqlite.file import QUERIES
from harpcaller.store.sqlite.rows import decode_name, decode_owner


class Lane:
    """A lane with at least one job."""

    __slots__ = ("_later", "_removed", "concurrency", "head", "head_job", "key", "parked", "slots_held", "waits_until")

    def __init__(self, key: str, concurrency: int | None) -> None:
        self.key = key
        self.concurrency = concurrency  # None for the jobs of a host without a queue
        self.slots_held = 0
        self.head: int | None = None  # sequence number of the first queued job
        self.head_job: Job | None = None  # the first queued job, if a claim has read it
        self.parked: int | None = None  # the head if it waits for its host or its owner, see `ActiveJobs`
        self.waits_until = 0.0  # Unix time before which no queued job has waited long enough for a start
        self._later: deque[int] = deque()  # the queued jobs after the head
        self._removed: set[int] = set()  # removed jobs in `_later`: deleting within a deque would be slow

    @property
    def has_room(self) -> bool:
        """Whether a further job of the lane may get a slot."""
        return self.concurrency is None or self.slots_held < self.concurrency

    @property
    def is_empty(self) -> bool:
        """Whether no job of the lane is queued or holds a slot."""
        return not self.slots_held and self.head is None

    def append(self, seq: int) -> None:
        """Add a queued job that was submitted after all others."""
        if self.head is None:
            self.head = seq
        else:
            self._later.append(seq)

    def put_back(self, seq: int) -> None:
        """Insert a job that was queued before, in the order of submission."""
        earlier = []
        while self.head is not None and self.head < seq:
            earlier.append(self.head)
            self.remove(self.head)
        if self.head is not None:
            self._later.appendleft(self.head)
        self._later.extendleft(reversed([*earlier[1:], seq]))
        self.head, self.head_job = (earlier[0] if earlier else self._later.popleft()), None

    def remove(self, seq: int) -> None:
        """Remove a queued job."""
        if seq != self.head:
            self._removed.add(seq)
            return
        self.head = self.head_job = None
        while self._later and self.head is None:
            self.head = self._later.popleft()
            if self.head in self._removed:
                self._removed.remove(self.head)
                self.head = None


@dataclass(slots=True)
class OwnerJobs:
    """The jobs of an owner: how many are queued and hold a slot."""

    queued: int = 0
    slots_held: int = 0
    #: The lanes whose heads wait until the owner may have another slot: a heap of heads, lanes and heads' limits.
    parked: list[tuple[int, str, int]] = field(default_factory=list)


@dataclass(slots=True)
class ActiveJob:
    """A job that has not ended or holds a slot."""

    id: str
    seq: int
    lane: Lane
    owner: str | None
    host: str = ""  # empty for a queued job
    state: State = State.QUEUED
    records: int = 0  # number of stored records
    chunk: tuple[int, int, bytes, bytes] | None = None  # the last, if it may grow: first, count, bytes, timestamps


class ActiveJobs:
    """The jobs that have not ended or hold a slot, in the file and in the current transaction of `db`."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.lanes: dict[str, Lane] = {}
        self.slot_holders: dict[str, ActiveJob] = {}  #: The jobs that hold a slot, by their ids.
        self.owner_lanes: dict[str, set[str]] = {}  #: The lanes of a host's owners, by the lane of the host.
        self.owners: defaultdict[str | None, OwnerJobs] = defaultdict(OwnerJobs)  #: None: the owner is unknown.
        self._slots_on_host: Counter[str] = Counter()
        [(last,)] = db.execute(QUERIES["last_seq"]).fetchall()
        self._next_seq: int = last + 1
        for key, concurrency in db.execute(QUERIES["queue_limits"]).fetchall():
            self.add_lane(key, concurrency)
        for seq, id_, key, owner, host, state, records in db.execute(QUERIES["slot_holders_to_cache"]).fetchall():
            lane = self.lanes.get(key) or self.add_lane(key, None)
            job = ActiveJob(id_, seq, lane, decode_owner(owner), decode_name(host), State(state), records)
            self._add_slot_holder(job)
        queued_of: Counter[bytes | None] = Counter()
        for seq, key, owner in db.execute(QUERIES["queued_to_cache"]):
            (self.lanes.get(key) or self.add_lane(key, None)).append(seq)
            queued_of[owner] += 1
        for owner, queued in queued_of.items():
            self.owners[decode_owner(owner)].queued = queued
        # A heap of the heads that may be able to start. A lane may have several entries; outdated entries are skipped.
        self._heads = [(lane.head, lane.key) for lane in self.lanes.values() if lane.head is not None]
        heapify(self._heads)
        # By host, a heap of the heads that wait for it; outdated entries are skipped. A claim reads as many entries as
        # the host has room for, so its cost does not depend on the number of waiting lanes.
        self._parked: dict[str, list[tuple[int, str]]] = {}
        self._waiting_owners: set[str | None] = set()  # those with parked lanes

    def add_lane(self, key: str, concurrency: int | None) -> Lane:
        """Add a new lane."""
        lane = self.lanes[key] = Lane(key, concurrency)
        if (host_key := lane_of_host(key)) is not None:
            self.owner_lanes.setdefault(host_key, set()).add(key)
        return lane

    def remove_lane(self, lane: Lane) -> None:
        """Remove a lane that has no job."""
        del self.lanes[lane.key]
        if (host_key := lane_of_host(lane.key)) is not None:
            self.owner_lanes[host_key].discard(lane.key)
            if not self.owner_lanes[host_key]:
                del self.owner_lanes[host_key]

    def add_queued(self, lane: Lane, owner: str | None) -> int:
        """Add a new queued job to its lane; return its sequence number."""
        seq = self._next_seq
        self._next_seq += 1
        lane.append(seq)
        self.owners[owner].queued += 1
        if lane.head == seq:
            self._offer_head(lane)
        return seq

    def remove_queued(self, job: ActiveJob) -> None:
        """Remove a queued job that has ended."""
        lane = job.lane
        was_head = lane.head == job.seq
        lane.remove(job.seq)
        self.owners[job.owner].queued -= 1
        self._forget_owner(job.owner)
        if was_head:
            self._offer_head(lane)

    def give_slot(self, job: ActiveJob) -> None:
        """Give a slot to the head of a lane."""
        lane = job.lane
        lane.remove(job.seq)
        self.owners[job.owner].queued -= 1
        self._add_slot_holder(job)
        self._offer_head(lane)

    def release_slot(self, job: ActiveJob) -> None:
        """Remove a job that holds a slot, because it has ended."""
        del self.slot_holders[job.id]
        was_full = not job.lane.has_room
        job.lane.slots_held -= 1
        self._slots_on_host[job.host] -= 1
        if not self._slots_on_host[job.host]:
            del self._slots_on_host[job.host]
        self.owners[job.owner].slots_held -= 1
        self._forget_owner(job.owner)
        if was_full:
            self._offer_head(job.lane)

    def put_back(self, job: ActiveJob) -> None:
        """Release the slot of a job and queue the job again, to wait for its host."""
        lane = job.lane
        lane.put_back(job.seq)
        self.owners[job.owner].queued += 1
        if lane.head == job.seq:
            self._park(lane, job.seq, job.host)
        self.release_slot(job)
        self._offer_head(lane)

    def list_waiting_queues(self, host: str) -> list[Lane]:
        """Return the queues in which the head waits for this host."""
        lanes = [(seq, self.lanes.get(key)) for seq, key in self._parked.get(host, ())]
        waiting = [lane for seq, lane in lanes if lane is not None and lane.head == lane.parked == seq]
        return [lane for lane in waiting if lane.concurrency is not None and lane.has_room]

    def _add_slot_holder(self, job: ActiveJob) -> None:
        self.slot_holders[job.id] = job
        job.lane.slots_held += 1
        self._slots_on_host[job.host] += 1
        self.owners[job.owner].slots_held += 1

    def _forget_owner(self, owner: str | None) -> None:
        jobs = self.owners[owner]
        if not jobs.queued and not jobs.slots_held:
            del self.owners[owner]
            self._waiting_owners.discard(owner)

    def is_owner_full(self, job: Job) -> bool:
        """Return whether a job waits because as many jobs of its owner hold a slot as may."""
        return job.max_running is not None and self.owners[job.owner].slots_held >= job.max_running

    def _offer_head(self, lane: Lane) -> None:
        """Add the head of a lane to the heap if it may start: after a change of the head, or of the room."""
        if lane.head is not None and lane.has_room and lane.head != lane.parked:
            heappush(self._heads, (lane.head, lane.key))

    def startable_jobs(
        self,
        get_head: Callable[[int, Lane], Job],
        *,
        limit: int,
        max_calls_per_host: int,
        max_new: Callable[[str], int | None],
    ) -> Iterator[tuple[int, Lane]]:
        """Yield the jobs that may start now, with their lanes, in the order of submission.

        The caller gives each job its slot before it requests the next, so that the next job of the lane becomes its
        head. That job was submitted later, so one pass in this order finds every job that may start. A lane waits while
        the host or the owner of its head is full. `get_head` returns the head of a lane, `max_new` the maximum number
        of jobs that may start on a host now, or None.
        """
        if limit <= 0:
            return

        def room_on(host: str) -> int:
            room, new_limit = max_calls_per_host - self._slots_on_host[host], max_new(host)
            return room if new_limit is None else min(room, new_limit - new_on_host[host])

        new_on_host: Counter[str] = Counter()
        for host in list(self._parked):
            self._unpark(host, room_on(host))
        for owner in list(self._waiting_owners):
            self._unpark_of(owner)
        while limit > 0 and self._heads:
            seq, key = heappop(self._heads)
            lane = self.lanes.get(key)
            if lane is None or lane.head != seq or not lane.has_room or lane.parked == seq:
                continue  # the lane has changed, or it was on the heap twice
            job = get_head(seq, lane)
            host = job.host
            # A lane that waits for one thing leaves the place that was offered to it to the next one that waits for the
            # other thing.
            if self.is_owner_full(job):
                self._park_for_owner(lane, seq, job)
                if host in self._parked:
                    self._unpark(host, min(1, room_on(host)))
            elif room_on(host) > 0:
                limit -= 1
                new_on_host[host] += 1
                yield seq, lane
            else:
                self._park(lane, seq, host)
                if job.owner in self._waiting_owners:
                    self._unpark_of(job.owner, 1)

    def _park(self, lane: Lane, seq: int, host: str) -> None:
        """Mark the head of a lane as waiting for its host."""
        lane.parked = seq
        heappush(self._parked.setdefault(host, []), (seq, lane.key))

    def _unpark(self, host: str, room: int) -> None:
        """Move the first heads that wait for a host back to the heap, as many as the host has room for."""
        parked = self._parked[host]
        while room > 0 and parked:
            seq, key = heappop(parked)
            lane = self.lanes.get(key)
            if lane is None or lane.parked != seq:
                continue
            lane.parked = None
            if lane.head == seq and lane.has_room:
                room -= 1
                heappush(self._heads, (seq, key))
        if not parked:
            del self._parked[host]

    def _park_for_owner(self, lane: Lane, seq: int, job: Job) -> None:
        """Let the head of a lane wait until its owner may have another slot."""
        assert job.max_running is not None
        lane.parked = seq
        heappush(self.owners[job.owner].parked, (seq, lane.key, job.max_running))
        self._waiting_owners.add(job.owner)

    def _unpark_of(self, owner: str | None, limit: int | None = None) -> None:
        """Offer the first heads again that wait for their owner: as many as it may have slots, and at most `limit`."""
        jobs, offered = self.owners[owner], 0
        while jobs.parked and offered != limit and jobs.slots_held + offered < jobs.parked[0][2]:
            seq, key, _ = heappop(jobs.parked)
            lane = self.lanes.get(key)
            if lane is None or lane.parked != seq:
                continue
            lane.parked = None
            if lane.head == seq and lane.has_room:
                offered += 1
                heappush(self._heads, (seq, key))
        if not jobs.parked:
            self._waiting_owners.discard(owner)
