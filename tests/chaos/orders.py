"""What clients ask for: jobs of every kind, made from a random generator."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Queues, and how many of its jobs each lets run at once.
QUEUES: Mapping[str, int] = {f"{letter}{width}": width for letter in "ab" for width in (1, 2, 3, 4)}

#: A host that no registry knows.
NOWHERE = "nowhere"

#: How many of a hundred jobs wait in a queue, have a limit of their own, go to no host.
_QUEUED, _LIMITED, _LOST = 45, 6, 1


@dataclass(frozen=True, slots=True)
class Order:
    """A job to be submitted.

    Attributes:
        token: names it in its marks; its first argument.
        arguments: all of them, as the procedure takes them.
        queue: a name of `QUEUES`; None: it waits in no queue.
        limits: options ``timeout`` and ``max_exec_time``, in seconds.
        records: how many records it says when nothing stops it; None: it is no stream.
        record_size: of each.
        endless: whether it does not end by itself.
    """

    token: str
    host: str
    procedure: str
    arguments: Sequence[Any]
    queue: str | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    records: int | None = None
    record_size: int = 0
    endless: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What the client library is told beside the arguments."""
        queue = {} if self.queue is None else {"queue": {"chaos": self.queue}, "concurrency": QUEUES[self.queue]}
        return {**queue, **self.limits}


_Made = tuple[str, Sequence[Any], Mapping[str, Any]]


def _quick(chance: random.Random) -> _Made:
    return "work", [chance.uniform(0, 0.2)], {}


def _work(chance: random.Random) -> _Made:
    return "work", [chance.uniform(0.5, 4)], {}


def _long(chance: random.Random) -> _Made:
    return "work", [chance.uniform(8, 16)], {"queue": None}


def _stream(chance: random.Random) -> _Made:
    return _streaming(chance.randrange(60), chance.randrange(400), chance.uniform(0, 0.1))


def _torrent(chance: random.Random) -> _Made:
    return _streaming(chance.randrange(50, 300), 2000, 0.0)


def _long_stream(chance: random.Random) -> _Made:
    procedure, arguments, more = _streaming(chance.randrange(100, 300), 20, 0.05)
    return procedure, arguments, {**more, "queue": None}


def _streaming(records: int, size: int, pause: float) -> _Made:
    return "stream", [records, size, pause], {"records": records, "record_size": size}


def _fail(chance: random.Random) -> _Made:
    return "fail", [chance.uniform(0, 1)], {}


def _die(chance: random.Random) -> _Made:
    return "die", [chance.choice((0, int(signal.SIGKILL), int(signal.SIGSEGV)))], {}


def _late(_: random.Random) -> _Made:
    return "late", [], {"endless": True}


def _family(chance: random.Random) -> _Made:
    return "family", [chance.uniform(0.2, 4)], {}


def _stubborn(chance: random.Random) -> _Made:
    limit = chance.choice(({}, {"max_exec_time": 3}))
    return "stubborn", [], {"endless": True, "limits": limit}


_KINDS: Mapping[Callable[[random.Random], _Made], int] = {
    _quick: 34,
    _work: 14,
    _long: 3,
    _stream: 24,
    _torrent: 3,
    _long_stream: 4,
    _fail: 6,
    _die: 4,
    _late: 2,
    _family: 5,
    _stubborn: 3,
}


def order(chance: random.Random, token: str, hosts: Sequence[str]) -> Order:
    """Make a job up.

    Args:
        chance: decides everything.
        token: its token.
        hosts: where it may go.
    """
    make = chance.choices(list(_KINDS), list(_KINDS.values()))[0]
    procedure, arguments, more = make(chance)
    if "limits" not in more and chance.randrange(100) < _LIMITED:
        more = {**more, "limits": {chance.choice(("timeout", "max_exec_time")): chance.uniform(1, 3)}}
    if "queue" not in more and chance.randrange(100) < _QUEUED:  # long jobs would only fill the queues
        more = {**more, "queue": chance.choice(list(QUEUES))}
    host = NOWHERE if chance.randrange(100) < _LOST else chance.choice(hosts)
    return Order(token, host, procedure, [token, *arguments], **more)
