"""The jobs that clients submit, of every kind, made by a random generator."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Queues, with the concurrency of each.
QUEUES: Mapping[str, int] = {f"{letter}{width}": width for letter in "ab" for width in (1, 2, 3, 4)}

#: A host that is not in the registry.
UNKNOWN_HOST = "nowhere"

#: Percentage of jobs that wait in a queue, have their own limit, are for an unknown host, have a request id.
_QUEUED, _LIMITED, _UNKNOWN, _REQUESTED = 45, 6, 1, 50


@dataclass(frozen=True, slots=True)
class JobSpec:
    """A job to be submitted.

    Attributes:
        token: identifies the job in its marks; its first argument.
        arguments: all arguments of the procedure.
        queue: a name of `QUEUES`; None: no queue.
        limits: options ``timeout`` and ``max_exec_time``, in seconds.
        records: number of records unless it is stopped; None: not a stream.
        record_size: size of each record.
        endless: whether it runs until it is stopped.
        request_id: its request id; None: no request id.
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
    request_id: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options of the client library, without the arguments."""
        queue = {} if self.queue is None else {"queue": {"chaos": self.queue}, "concurrency": QUEUES[self.queue]}
        request = {} if self.request_id is None else {"request_id": self.request_id}
        return {**queue, **self.limits, **request}


_Spec = tuple[str, Sequence[Any], Mapping[str, Any]]


def _quick(rng: random.Random) -> _Spec:
    return "work", [rng.uniform(0, 0.2)], {}


def _share(rng: random.Random) -> _Spec:
    return "share", [rng.uniform(0, 0.2)], {}


def _work(rng: random.Random) -> _Spec:
    return "work", [rng.uniform(0.5, 4)], {}


def _long(rng: random.Random) -> _Spec:
    return "work", [rng.uniform(8, 16)], {"queue": None}


def _stream(rng: random.Random) -> _Spec:
    return _streaming(rng.randrange(60), rng.randrange(400), rng.uniform(0, 0.1))


def _torrent(rng: random.Random) -> _Spec:
    return _streaming(rng.randrange(50, 300), 2000, 0.0)


def _long_stream(rng: random.Random) -> _Spec:
    procedure, arguments, more = _streaming(rng.randrange(100, 300), 20, 0.05)
    return procedure, arguments, {**more, "queue": None}


def _streaming(records: int, size: int, pause: float) -> _Spec:
    return "stream", [records, size, pause], {"records": records, "record_size": size}


def _fail(rng: random.Random) -> _Spec:
    return "fail", [rng.uniform(0, 1)], {}


def _die(rng: random.Random) -> _Spec:
    return "die", [rng.choice((0, int(signal.SIGKILL), int(signal.SIGSEGV)))], {}


def _late(_: random.Random) -> _Spec:
    return "late", [], {"endless": True}


def _family(rng: random.Random) -> _Spec:
    return "family", [rng.uniform(0.2, 4)], {}


def _stubborn(rng: random.Random) -> _Spec:
    limit = rng.choice(({"timeout": 10}, {"max_exec_time": 3}))
    return "stubborn", [], {"endless": True, "limits": limit}


_KINDS: Mapping[Callable[[random.Random], _Spec], int] = {
    _quick: 24,
    _share: 10,
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


def random_spec(rng: random.Random, token: str, hosts: Sequence[str]) -> JobSpec:
    """Return a random job.

    Args:
        rng: the random generator.
        token: the job's token.
        hosts: the hosts to choose from.
    """
    make = rng.choices(list(_KINDS), list(_KINDS.values()))[0]
    procedure, arguments, more = make(rng)
    if "limits" not in more and rng.randrange(100) < _LIMITED:
        more = {**more, "limits": {rng.choice(("timeout", "max_exec_time")): rng.uniform(1, 3)}}
    if "queue" not in more and rng.randrange(100) < _QUEUED:  # long jobs would fill the queues
        more = {**more, "queue": rng.choice(list(QUEUES))}
    host = UNKNOWN_HOST if rng.randrange(100) < _UNKNOWN else rng.choice(hosts)
    request_id = f"request {token}" if rng.randrange(100) < _REQUESTED else None
    return JobSpec(token, host, procedure, [token, *arguments], request_id=request_id, **more)
