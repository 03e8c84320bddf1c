"""Program: lists, counts and statistics of a store with a million jobs. `./dev run python -m bench.searches`.

It fills a store with ended jobs, of which few raised or failed, and some that have not ended. Then it measures a
page of each filter of two parts, in one thread. On a busy computer, look at the CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from harp.protocol.json_text import Raw
from harpcaller.model.ids import new_job_ids
from harpcaller.model.job_filters import BAD, OPEN, JobFilter, Span
from harpcaller.model.jobs import State, StopState
from harpcaller.model.lanes import host_lane, queue_lane
from harpcaller.store.sqlite import open_store
from harpcaller.store.sqlite.counting import FACETS, count_jobs, job_statistics
from harpcaller.store.sqlite.file import FILE_NAME, connect
from harpcaller.store.sqlite.searches import find_jobs

_START = 1_790_000_000.0
_SPACING = 0.25  # seconds between two submissions
_HOSTS, _PROCEDURES, _QUEUES, _OWNERS = 200, 50, 300, 20
_OPEN = 3000  # the last jobs


def fill(path: Path, count: int, has_open: bool = True) -> None:
    """Store jobs, without the store's verbs; with `has_open`, the last ones have not ended."""
    rng = random.Random(1)  # noqa: S311 - the same jobs each time
    lanes = [queue_lane(Raw(b'{"queue":%d}' % number)) for number in range(_QUEUES)]
    weights = [1 / (number + 1) for number in range(_PROCEDURES)]
    procedures = rng.choices(range(_PROCEDURES), weights, k=count)
    ids = [job_id for number in range(count) for job_id in new_job_ids(_START + number * _SPACING, 1)]
    jobs, calls, outcomes = [], [], []
    for number in range(count):
        seq, submitted = number + 1, _START + number * _SPACING
        host = b"host%03d" % rng.randrange(_HOSTS)
        queue = rng.randrange(_QUEUES) if rng.random() < 0.5 else None
        lane = host_lane(host.decode()) if queue is None else lanes[queue]
        owner = b"token:team%02d" % rng.randrange(_OWNERS)
        state, end_type, stop, holds_slot = _draw_state(rng, has_open and number >= count - _OPEN)
        started = None if state == "queued" else submitted + rng.random()
        ended = None if state in OPEN else submitted + 1 + rng.expovariate(0.1)
        message = b"exception number %d" % number if end_type else None
        row = (seq, ids[number], lane, host, state, submitted, started, ended, 3, holds_slot, stop, owner)
        jobs.append((*row, end_type, message))
        name = None if queue is None else b'{"queue":%d}' % queue
        arguments, info = b'["service-%d",{"order":%d}]' % (number % 1000, number), b'{"ticket":"T-%d"}' % number
        calls.append((seq, b"procedure-%02d" % procedures[number], arguments, 60.0, 600.0, name, info, 10.0))
        kind = b"exception" if state == "raised" else b"error"
        error = b'{"%b":{"type":"%b","message":"%b"}}' % (kind, end_type or b"", message or b"")
        outcomes.append((seq, error if end_type else b'{"changed":true}'))
    with connect(path) as db:
        db.execute("BEGIN")
        columns = "seq, id, lane, host, state, submitted, started, ended, records, holds_slot, stop, owner, end_type"
        db.executemany(f"INSERT INTO jobs ({columns}, end_message) VALUES ({', '.join('?' * 14)})", jobs)  # noqa: S608
        columns = "job, procedure, arguments, timeout, max_exec_time, queue, info, start_within"
        db.executemany(f"INSERT INTO calls ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", calls)  # noqa: S608
        db.executemany("INSERT INTO outcomes (job, body) VALUES (?, ?)", outcomes)
        db.execute("COMMIT")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()


def _draw_state(rng: random.Random, is_open: bool) -> tuple[str, bytes | None, str | None, bool]:
    if is_open:
        return ("queued", None, None, False) if rng.random() < 0.9 else ("running", None, None, True)
    chance = rng.random()
    if chance < 0.02:
        return "raised", rng.choice([b"ValueError", b"OSError", b"KeyError"]), None, False
    if chance < 0.035:
        end_type = rng.choice([b"timeout", b"host_lost", b"missing_result"])
        return "failed", end_type, rng.choice([None, "confirmed", "failed"]), False
    if chance < 0.04:
        return "cancelled", None, "confirmed", False
    return "returned", None, None, False


def parts(count: int) -> dict[str, dict[str, Any]]:
    """Return the parts of filters by name."""
    end = _START + count * _SPACING
    lane = queue_lane(Raw(b'{"queue":7}')).removeprefix("queue:")
    return {
        "failed": {"states": frozenset({State.FAILED})},
        "bad": {"states": BAD},
        "open": {"states": OPEN},
        "returned": {"states": frozenset({State.RETURNED})},
        "host": {"hosts": ("host042",)},
        "two hosts": {"hosts": ("host042", "host043")},
        "host*": {"host_pattern": "host04*"},
        "procedure": {"procedures": ("procedure-00",)},
        "rare procedure": {"procedures": ("procedure-49",)},
        "owner": {"owners": ("token:team03",)},
        "queue": {"queue": lane},
        "last 2 h": {"submitted": Span(end - 7200, None)},
        "old day": {"submitted": Span(_START + 86400, _START + 2 * 86400)},
        "ended last h": {"ended": Span(end - 3600, end)},
        "started old day": {"started": Span(_START + 86400, _START + 2 * 86400)},
        "end type": {"end_types": ("host_lost",)},
        "stop": {"stops": frozenset({StopState.FAILED})},
        "slot": {"holds_slot": True},
        "info": {"info": "T-123456"},
        "arguments": {"arguments": "service-77"},
        "text": {"text": ("procedure-4",)},
        "nothing": {"owners": ("token:nobody",)},
    }


def measure(run: Callable[[], object], seconds: float) -> dict[str, float]:
    """Return the medians and the 99th percentiles of the time and of the CPU time, in milliseconds."""
    times: list[float] = []
    cpu: list[float] = []
    run()
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at or len(times) < 5:
        began, cpu_began = time.perf_counter(), time.thread_time()
        run()
        times.append(1e3 * (time.perf_counter() - began))
        cpu.append(1e3 * (time.thread_time() - cpu_began))
    found: dict[str, float] = {}
    for name, values in (("", times), ("cpu_", cpu)):
        values.sort()
        found |= {f"{name}ms": values[len(values) // 2], f"{name}p99": values[int(0.99 * len(values))]}
    return {name: round(value, 2) for name, value in found.items()}


def measurements(db: sqlite3.Connection, count: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield what is measured, by name."""
    of_name = parts(count)
    for name, part in of_name.items():
        yield name, lambda part=part: find_jobs(db, JobFilter(**part))  # type: ignore[misc]
    for one, other in combinations(of_name, 2):
        if not of_name[one].keys() & of_name[other].keys():
            wanted = JobFilter(**of_name[one], **of_name[other])
            yield f"{one} + {other}", lambda wanted=wanted: find_jobs(db, wanted)  # type: ignore[misc]
    yield "newest", lambda: find_jobs(db, JobFilter())
    yield "page from the middle", lambda: find_jobs(db, JobFilter(), after=count // 2)
    yield "own jobs", lambda: find_jobs(db, JobFilter(states=BAD), owners=("token:team03",))
    yield "counts of states", lambda: count_jobs(db, JobFilter(), ["state"])
    yield "counts of all facets", lambda: count_jobs(db, JobFilter(), list(FACETS))
    yield "counts of failed, all facets", lambda: count_jobs(db, JobFilter(states=BAD), list(FACETS))
    end = _START + count * _SPACING
    yield "ends of the last hour by minute", lambda: job_statistics(db, end - 3600, end, 60)
    yield "ends of the last day by hour", lambda: job_statistics(db, end - 86400, end, 3600)


async def create(directory: Path) -> None:
    """Create an empty store in a directory."""
    await (await open_store(directory)).close()


def main() -> int:
    """Run the program; return its exit status: 1 if the p99 of a page is above 10 ms of CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    parser.add_argument("--directory", type=Path, help="of a store that is kept, and used again")
    parser.add_argument("--only", default="", help="measurements whose name contains this text")
    options = parser.parse_args()
    directory = options.directory or Path(tempfile.mkdtemp(prefix="harp-searches-", dir="/var/tmp"))
    try:
        if not (directory / FILE_NAME).exists():
            asyncio.run(create(directory))
            began = time.monotonic()
            fill(directory / FILE_NAME, options.jobs)
            print(f"{options.jobs} jobs in {time.monotonic() - began:.0f} s", flush=True)
        db = connect(directory / FILE_NAME, query_only=True)
        slow = []
        for name, run in measurements(db, options.jobs):
            if options.only in name:
                measured = measure(run, options.seconds)
                examined = getattr(run(), "examined", None)
                print(f"{name:40}", json.dumps({**measured, "examined": examined}), flush=True)
                if examined is not None and measured["cpu_p99"] > 10:
                    slow.append(name)
        db.close()
        print(f"more than 10 ms: {', '.join(slow) or 'none'}")
        return int(bool(slow))
    finally:
        if options.directory is None:
            shutil.rmtree(directory)


if __name__ == "__main__":
    sys.exit(main())
