"""The metrics at the end: what the dispatcher shows must be what its store has.

Counters begin at 0 with each dispatcher, and the last one may have started at any time. So the gauges are compared, the
counters with the jobs that were submitted since then, which are the last ones in the store, and then the counters again
after some jobs whose number is known.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
import urllib.request
from collections import Counter
from contextlib import closing
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from chaos.job_specs import UNKNOWN_HOST
from chaos.observations import Observations
from chaos.system import System

#: How many jobs are submitted for the last comparison.
_JOBS = 20
#: Seconds until gauges and store must agree: the store may still release slots. Gauges count for 5 s.
_DEADLINE, _PAUSE = 30.0, 1.0
_TIMEOUT = 20.0

Sample = tuple[str, str, str]  # name, state or stop, type


async def check_metrics(system: System, observations: Observations) -> None:
    """Add a violation for each difference; the system is without faults, and all jobs have ended."""

    def report(problem: str) -> None:
        observations.add_violation(0, None, f"metrics: {problem}")

    deadline = time.monotonic() + _DEADLINE
    while True:
        metrics = await asyncio.to_thread(_scrape, system.http_port)
        truth = await asyncio.to_thread(_read_gauges, system.store_file)
        found = {key: metrics[key] for key in truth}
        if found == truth or time.monotonic() > deadline:
            break
        await asyncio.sleep(_PAUSE)
    if found != truth:
        report(f"{dict(found)} is shown, and the store has {dict(truth)}")
    if metrics["harp_pruned_jobs_total", "", ""]:
        return  # then the last jobs of the store are not those that were submitted last
    submitted = int(metrics["harp_jobs_submitted_total", "", ""])
    for key, least in (await asyncio.to_thread(_read_last, system.store_file, submitted)).items():
        if metrics[key] < least:
            report(f"{key} is {metrics[key]:g}, but the last {submitted} jobs alone have {least}")
    calls = [getattr(system.async_rpc.host(UNKNOWN_HOST), "work") for _ in range(_JOBS)]  # noqa: B009
    jobs = await asyncio.gather(*(call() for call in calls))
    await asyncio.gather(*(job.get() for job in jobs), return_exceptions=True)
    later = await asyncio.to_thread(_scrape, system.http_port)
    expected = {
        ("harp_jobs_submitted_total", "", ""): _JOBS,
        ("harp_jobs_started_total", "", ""): _JOBS,
        ("harp_jobs_stored", "", ""): _JOBS,
        ("harp_jobs_ended_total", "failed", "unknown_host"): _JOBS,
        ("harp_records_total", "", ""): 0,
    }
    for key, more in expected.items():
        if later[key] - metrics[key] != more:
            report(f"{key} went from {metrics[key]:g} to {later[key]:g} with {_JOBS} jobs of an unknown host")


def _scrape(port: int) -> Counter[Sample]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=_TIMEOUT) as reply:
        text = reply.read().decode()
    found: Counter[Sample] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            state = sample.labels.get("state", sample.labels.get("stop", ""))
            if sample.labels.keys() <= {"state", "stop", "type"}:
                found[sample.name, state, sample.labels.get("type", "")] = sample.value  # type: ignore[assignment]
    return found


def _connect(file: Path) -> closing[sqlite3.Connection]:
    return closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True))


def _read_gauges(file: Path) -> dict[Sample, float]:
    with _connect(file) as db:
        [row] = db.execute(
            "SELECT count(*), coalesce(sum(state = 'queued'), 0), coalesce(sum(state = 'running'), 0), "
            "coalesce(sum(holds_slot), 0) FROM jobs"
        ).fetchall()
    stored, queued, running, held = row
    return {
        ("harp_jobs_stored", "", ""): stored,
        ("harp_jobs", "queued", ""): queued,
        ("harp_jobs", "running", ""): running,
        ("harp_slots_held", "", ""): held,
        ("harp_store_waiting", "", ""): 0,
    }


def _read_last(file: Path, jobs: int) -> dict[Sample, float]:
    """Return what the last jobs alone have added to counters: they were submitted and have ended since the start."""
    with _connect(file) as db:
        last = "(SELECT state, started, records FROM jobs ORDER BY seq DESC LIMIT ?)"
        states = db.execute(f"SELECT state, count(*) FROM {last} GROUP BY state", (jobs,)).fetchall()
        [(started, records)] = db.execute(
            f"SELECT coalesce(sum(started IS NOT NULL), 0), coalesce(sum(records), 0) FROM {last}",
            (jobs,),
        ).fetchall()
    least: dict[Sample, float] = {
        ("harp_jobs_started_total", "", ""): started,
        ("harp_records_total", "", ""): records,
    }
    return least | {("harp_jobs_ended_total", state, ""): number for state, number in states if state != "failed"}
