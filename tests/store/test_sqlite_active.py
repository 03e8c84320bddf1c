"""The lanes and slots in memory: how much a claim, and a failed attempt, look at."""

from __future__ import annotations

from contextlib import closing
from itertools import count
from pathlib import Path
from uuid import UUID

from harp.protocol.ends import Failed, Returned
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import Job, NewJob, State
from harpcaller.store.sqlite import FILE_NAME, open_store
from harpcaller.store.sqlite.active import ActiveJob, ActiveJobs, Lane
from harpcaller.store.sqlite.file import connect
from harpcaller.store.sqlite.writes import Writes


async def test_claim_does_not_look_at_lanes_of_a_full_host_again(tmp_path: Path) -> None:
    """A claim looks at as many waiting lanes as the host has room for, for any number of lanes."""
    await (await open_store(tmp_path)).close()
    with closing(connect(tmp_path / FILE_NAME)) as db:
        active, looked = ActiveJobs(db), list[int]()
        lanes = [active.add_lane(f"queue:{number}", 1) for number in range(1000)]
        for lane in lanes:
            active.add_queued(lane, None)
        running: list[ActiveJob] = []

        def head(seq: int, lane: Lane) -> Job:
            looked.append(seq)
            call = "web01", "p", Raw(b"[]"), 1.0, 1.0, None, Raw(b"null")
            return Job(str(seq), State.QUEUED, *call, submitted=1.0, started=None, ended=None, end=None, records=0)

        def claim(most: int, limit: int = 100, new: int | None = None) -> tuple[int, list[int]]:
            """Claim; return how many heads were looked at, and the positions of the lanes that got a slot."""
            looked.clear()
            found = []
            for seq, lane in active.startable_jobs(
                head, limit=limit, max_calls_per_host=most, max_new=lambda host: new
            ):
                found.append(lanes.index(lane))
                running.append(ActiveJob(str(seq), seq, lane, None, "web01", State.RUNNING))
                active.give_slot(running[-1])
            return len(looked), found

        assert claim(2) == (1000, [0, 1])
        assert claim(2) == (0, [])
        active.release_slot(running.pop(0))
        assert claim(2) == (1, [2])
        assert lanes[3].head is not None
        active.remove_queued(ActiveJob("cancelled", lanes[3].head, lanes[3], None))
        active.release_slot(running.pop(0))
        assert claim(2) == (1, [4])
        active.release_slot(running.pop(0))
        active.release_slot(running.pop(0))
        assert claim(2, limit=1) == (1, [5])
        assert claim(2) == (2, [6])  # the one that the last claim did not reach, and another one
        assert claim(5) == (3, [7, 8, 9])
        assert claim(9, new=1) == (1, [10])
        assert claim(9, new=0) == (0, [])


async def test_claim_does_not_look_at_waiting_jobs_of_a_full_owner(tmp_path: Path) -> None:
    """However many jobs wait for their owner, on one host and on many, a claim looks at those that may start only."""
    await (await open_store(tmp_path)).close()
    with closing(connect(tmp_path / FILE_NAME)) as db:
        writes = Writes(db)
        writes.begin_transaction()
        numbers = count(1)

        def add(many: int, owner: str, hosts: int = 1) -> None:
            for number in range(many):
                call = f"web{number % hosts}", "p", Raw(b"[]"), 600.0, 600.0
                writes.add_job(NewJob(str(UUID(int=next(numbers))), *call, owner=owner, max_running=2), 1.0)
            writes.flush()

        def claim() -> tuple[int, list[Job]]:
            """Return how much SQLite did for a claim, and the claimed jobs."""
            done = list[None]()
            db.set_progress_handler(lambda: done.append(None), 1)
            claimed = writes.claim_jobs(2.0, 100, 1000)
            db.set_progress_handler(None, 1)
            return len(done), claimed

        add(5000, "a")
        add(5000, "a", hosts=5000)
        _, [first, second] = claim()
        assert (first.host, second.host) == ("web0", "web0")
        assert claim() == (0, [])
        add(3, "b")
        much, found = claim()
        assert [job.owner for job in found] == ["b", "b"]
        writes.finish_job(first.id, Returned(Raw(b"1")), 3.0)
        writes.flush()
        one, [third] = claim()
        assert (third.owner, third.host) == ("a", "web0")
        assert one < 2 * much
        for _ in range(20):  # the cost of each does not grow
            writes.finish_job(third.id, Returned(Raw(b"1")), 3.0)
            writes.flush()
            more, [third] = claim()
            assert more < 2 * much


async def test_failed_attempt_does_not_read_all_waiting_jobs_again(tmp_path: Path) -> None:
    """SQLite's work at a failed attempt does not depend on how many jobs wait longer; a shorter one is still found."""
    await (await open_store(tmp_path)).close()
    with closing(connect(tmp_path / FILE_NAME)) as db:
        writes, error = Writes(db), Failed("network_error", "no route")
        writes.begin_transaction()

        def add(number: int, seconds: float, now: float) -> None:
            call = "web01", "p", Raw(b"[]"), 600.0, 600.0
            writes.add_job(NewJob(str(UUID(int=number)), *call, start_within=seconds), now)

        def fail(now: float) -> tuple[int, list[int], float | None]:
            """Let an attempt fail; return how much SQLite did for it, which jobs have ended, and the next deadline."""
            writes.flush()
            done = list[None]()
            db.set_progress_handler(lambda: done.append(None), 100)
            ended, deadline = writes.fail_waiting("web01", error, now, 1000.0, now)
            db.set_progress_handler(None, 100)
            return len(done), [UUID(job_id).int for job_id in ended], deadline

        for number in range(2000):
            add(number, 3600.0, 1000.0)
        much, ended, deadline = fail(1001.0)
        assert (ended, deadline) == ([], 4600.0)
        assert much > 100
        assert fail(1006.0) == (0, [], 4600.0)
        add(2000, 5.0, 1007.0)
        assert fail(1011.0) == (0, [], 1012.0)
        assert fail(1012.0)[1:] == ([2000], 4600.0)
        assert fail(1017.0) == (0, [], 4600.0)
        [job] = writes.claim_jobs(1018.0, limit=1, max_calls_per_host=9, max_new=lambda host: None)
        assert fail(4600.0)[1:] == (list(range(1, 501)), 4600.0)
        assert writes.requeue_job(job.id, 4601.0)
        assert fail(4602.0)[1][0] == 0
