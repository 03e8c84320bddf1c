"""Lanes: the order in which queued jobs get their slot. Pure: no clock, no input or output.

Each queued job is in one lane: the lane of its queue or, if it has no queue, the lane of its host. A lane is first
in, first out; only its head may start. Between lanes the order of submission decides. So a search for jobs to start
reads the heads only, however many jobs wait behind them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from harp.protocol.json_text import Raw
from harpcaller.model.canonical import canonical


def queue_lane(name: Raw) -> str:
    """Return the key of the lane of a queue with this name, a JSON object. Names with equal values have equal keys.

    Spec: docs/protocol.md, Client and dispatcher, Call.
    """
    return "queue:" + _digest(canonical(name))


def host_lane(host: str) -> str:
    """Return the key of the lane for the jobs of this host that have no queue."""
    return "host:" + _digest(host)


def _digest(text: str) -> str:
    # 128 bits: two queues never share a key, and a name of any length has a short key
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Head:
    """The first queued job of a lane: its sequence number in the order of submission, and its host."""

    seq: int
    host: str


def startable_jobs(
    next_head: Callable[[int], Head | None],
    count_held_slots: Callable[[str], int],
    *,
    limit: int,
    max_calls_per_host: int,
) -> Iterator[Head]:
    """Yield the jobs that may start now, in the order of submission.

    The caller gives each job its slot before it requests the next one, so that the next job of the lane becomes its
    head. That job was submitted later, so one pass in the order of submission finds every job that may start.

    Args:
        next_head: returns the first head after a sequence number, of the lanes below their own limit.
        count_held_slots: returns how many jobs hold a slot on a host; called at most once for each host.
        limit: maximum number of jobs to yield.
        max_calls_per_host: a lane waits while so many jobs hold a slot on the host of its head.
    """
    room: dict[str, int] = {}
    seq = 0
    while limit > 0 and (head := next_head(seq)) is not None:
        seq = head.seq
        if head.host not in room:
            room[head.host] = max_calls_per_host - count_held_slots(head.host)
        if room[head.host] > 0:
            room[head.host] -= 1
            limit -= 1
            yield head
