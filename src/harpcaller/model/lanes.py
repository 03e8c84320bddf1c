"""Who may start: lanes, and the order in which waiting jobs get their slot. Pure: no clock, no input or output.

Each waiting job stands in one lane: that of its queue, or, when it has none, that of its host. A lane is first
in, first out; only its head may start. Between lanes the order of submission decides. So whoever looks for jobs
to start looks at the heads alone, however many jobs wait behind them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from harp.protocol.json_text import Raw, canonical

__all__ = ["Head", "host_lane", "queue_lane", "startable_jobs"]

# 128 bits: two different queues never meet, and a name of any length makes a short key.
_DIGEST_BYTES = 16


def queue_lane(name: Raw) -> str:
    """The key of a queue's lane: the same for two names exactly when they are equal as JSON values.

    Args:
        name: the queue's name, an object.

    Spec: docs/protocol.md, Client and dispatcher, Call.
    """
    return "queue:" + _digest(canonical(name))


def host_lane(host: str) -> str:
    """The key of the lane of the jobs for this host that have no queue."""
    return "host:" + _digest(host)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES).hexdigest()


@dataclass(frozen=True, slots=True)
class Head:
    """The first waiting job of a lane: its seq in the order of submission, and its host."""

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

    The caller gives each job its slot before it asks for the next one: that brings the lane's next job to its head.
    As that one was submitted later, one sweep in the order of submission sees every job that may start.

    Args:
        next_head: gives the first head behind a seq among the lanes whose own limit has room.
        count_held_slots: how many jobs hold a slot on a host; asked at most once for each.
        limit: how many to yield at most.
        max_calls_per_host: how many jobs may hold a slot on one host. A head whose host is full stays, and its lane
            waits.
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
