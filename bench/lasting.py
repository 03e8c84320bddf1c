"""Works that go deep or long: very many jobs at once, and jobs for a long time.

`SETTINGS` has under ``pids`` the processes whose memory is looked at, by name.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import psutil

import harp
from bench.clients import Figures, together
from bench.harp_client import SETTINGS, Client
from bench.load import payload

__all__ = ["WORKS"]

_CLIENTS = 4
#: Parts of the time of a long load whose figures are told one by one.
_SLICES = 10
#: Jobs that each client of a long load has under way.
_UNDER_WAY = 25


def depth(jobs: int) -> Figures:
    """Submit jobs as fast as they are accepted, then collect what comes of each.

    Returns:
        ``lost``: how many had no result, or another's; ``rate``: jobs a second from the first submission to the last
        result.
    """

    def body(client: int, start: Callable[[], object]) -> tuple[int, float, float]:
        queue = Client()
        mine = [payload(number) for number in range(client, jobs, _CLIENTS)]
        start()
        began = time.monotonic()
        handles = [queue.submit(value) for value in mine]
        lost = sum(_result(handle) != value for handle, value in zip(handles, mine, strict=True))
        return lost, began, time.monotonic()

    outcomes = together(_CLIENTS, body)
    took = max(one[2] for one in outcomes) - min(one[1] for one in outcomes)
    return {"lost": sum(one[0] for one in outcomes), "rate": jobs / took}


def _result(call: harp.RemoteCall) -> Any:
    try:
        return call.get()
    except harp.HarpException as error:
        return error


def sustained(seconds: float) -> Figures:
    """Keep jobs under way for some time.

    Returns:
        ``slice-0`` and so on: jobs a second in each tenth of the time; ``NAME-begin``, ``NAME-end``: memory of the
        processes, MB, after the first tenth and at the end; ``growth``: the dispatcher's.
    """
    begin = time.monotonic()

    def body(client: int, start: Callable[[], object]) -> dict[Any, float]:
        if client == _CLIENTS:
            start()
            return _watch(begin, seconds)
        queue = Client()
        start()
        done: Counter[Any] = Counter()
        number = client
        while (now := time.monotonic()) < begin + seconds:
            values = [payload(number + _CLIENTS * ahead) for ahead in range(_UNDER_WAY)]
            if queue.collect([queue.submit(value) for value in values]) != values:
                raise RuntimeError("a job has another's result")
            done[min(_SLICES - 1, int((now - begin) * _SLICES / seconds))] += len(values)
            number += _CLIENTS * _UNDER_WAY
        return dict(done)

    *done, memory = together(_CLIENTS + 1, body)
    rates = {f"slice-{at}": sum(one.get(at, 0) for one in done) * _SLICES / seconds for at in range(_SLICES)}
    return {**rates, **memory, "growth": memory["dispatcher-end"] - memory["dispatcher-begin"]}


def _watch(begin: float, seconds: float) -> dict[Any, float]:
    """The memory of the processes after the first tenth of the time, and at its end."""
    found = {}
    for when, moment in (("begin", begin + seconds / _SLICES), ("end", begin + seconds)):
        time.sleep(max(0.0, moment - time.monotonic()))
        for name, pid in SETTINGS["pids"].items():
            found[f"{name}-{when}"] = psutil.Process(pid).memory_info().rss / 1e6
    return found


#: What the harness can ask for.
WORKS: dict[str, Callable[..., Figures]] = {"depth": depth, "sustained": sustained}
