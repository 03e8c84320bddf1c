"""Where a job's time goes: phase by phase, as the dispatcher tells it of each job, and by function in the daemons.

The phases are whatever moments `job.details()` has under ``time``, in the order in which they came, with the caller's
own before and after; and under ``phases``, seconds by name, where the daemons take these down.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import harp
from bench.clients import quantile
from bench.load import payload
from bench.ours import daemons
from bench.sampling import summary
from bench.works import Sizes

__all__ = ["phases", "profile"]

#: Seconds between two jobs of an idle system.
_IDLE = 0.01


def phases(moments: Mapping[str, float], taken: Mapping[str, float]) -> dict[str, float]:
    """A job's phases in seconds: from each moment to the next, and those that were measured as such.

    Args:
        moments: Unix seconds by name.
        taken: seconds by name.
    """
    ordered = sorted(moments.items(), key=lambda moment: moment[1])
    between = {f"{name} to {following}": after - before for (name, before), (following, after) in pairwise(ordered)}
    return {**between, **taken}


def profile(directory: Path, sizes: Sizes, *, sampled: bool) -> Iterator[str]:
    """Run jobs of ours, one by one and then all at once, and say where their time went.

    Args:
        directory: where the daemons work.
        sizes: how many jobs.
        sampled: whether the daemons are also asked, many times a second, where they are; that costs them time.
    """
    for title, count, run in (
        (f"{sizes.latencies} jobs, one by one, idle system", sizes.latencies, _one_by_one),
        (f"{sizes.jobs} jobs, submitted at once", sizes.jobs, _at_once),
    ):
        place = directory / run.__name__.strip("_")
        place.mkdir()
        with daemons(place, sampled=sampled) as (_, harpcallerd):
            assert harpcallerd is not None
            rpc = harp.HarpCaller("127.0.0.1", harpcallerd.port)
            for number in range(5):
                rpc.web01.echo(payload(number)).get()
            yield from _table(title, run(rpc, count))
        if sampled:
            for file in sorted(place.glob("*.samples")):
                yield from summary(file)


def _one_by_one(rpc: harp.HarpCaller, count: int) -> Iterator[dict[str, float]]:
    for number in range(count):
        time.sleep(_IDLE)
        began = time.time()
        job = rpc.web01.echo(payload(number))
        told = time.time()
        job.get()
        got = time.time()
        yield {
            **_of(job, {"caller: asks": began, "caller: has the result": got}),
            "caller: until accepted": told - began,
        }


def _at_once(rpc: harp.HarpCaller, count: int) -> Iterator[dict[str, float]]:
    jobs = [rpc.web01.echo(payload(number)) for number in range(count)]
    for job in jobs:
        job.get()
    for job in jobs:
        yield _of(job, {})


def _of(job: harp.RemoteCall, more: Mapping[str, float]) -> dict[str, float]:
    details = job.details()
    found = {name: moment for name, moment in details["time"].items() if isinstance(moment, float | int)}
    taken: dict[str, Any] = details.get("phases") or {}
    return phases({**found, **more}, {name: value for name, value in taken.items() if isinstance(value, float | int)})


def _table(title: str, jobs: Iterator[dict[str, float]]) -> Iterator[str]:
    taken: dict[str, list[float]] = {}
    for job in jobs:
        for name, seconds in job.items():
            taken.setdefault(name, []).append(1000 * seconds)
    widest = max(map(len, taken))
    yield title
    yield f"  {'':{widest}}{'p50':>10}{'p99':>10}   ms"
    for name, values in taken.items():
        yield f"  {name:{widest}}{median(values):10.3f}{quantile(values, 0.99):10.3f}"
    yield ""
