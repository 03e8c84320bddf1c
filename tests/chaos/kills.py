"""The sequence of kills of a failpoint run: which process is killed, and where on its path. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from chaos.schedule import Kind


class Place(StrEnum):
    """What decides the moment of a kill, after a random delay.

    At a system call, the process may do a random number of entries and exits of system calls, then it is killed. This
    hits even the shortest step of a path: a process that waits spends most of its time in one system call, and
    a kill at a random time finds it there.
    """

    SYSTEM_CALL = "at a system call"
    TIME = "at a random time"


#: Of this many kills, one is at a random time.
_TIMED_EVERY = 5
#: Powers of 10 of the maximum number of entries and exits of system calls: one job has about 100 in a supervisor.
_STOPS = (0.0, 2.5)
#: Maximum seconds before a process is observed, and after a kill until the next one of the same lane.
_DELAY, _HOST_PAUSE, _DISPATCHER_PAUSE = 0.3, 1.2, 2.5
#: Weights of the targets of a host's lane.
_WEIGHTS = {Kind.KILL_CALL: 45, Kind.KILL_FRONTEND: 20, Kind.KILL_SUPERVISOR: 20, Kind.KILL_ZYGOTE: 15}


@dataclass(frozen=True, slots=True)
class Kill:
    """A kill.

    Attributes:
        kind: the target.
        place: what decides the moment.
        delay: seconds before the process is observed or, at a random time, killed.
        stops: entries and exits of system calls that the process may still do.
        choice: a number from 0 to 1 that selects a process, and a thread of it.
        pause: seconds until the next kill of this lane.
    """

    kind: Kind
    place: Place
    delay: float
    stops: int
    choice: float
    pause: float


def kills(seed: int, lane: str, hosts: Sequence[str]) -> Iterator[Kill]:
    """Yield the kills of one lane, without end. The same seed gives the same kills.

    Args:
        seed: the seed.
        lane: the name of a host; another name is the lane of the dispatcher.
        hosts: the names of the hosts.
    """
    rng = random.Random(f"{seed}/kills/{lane}")
    while True:
        on_host = lane in hosts
        yield Kill(
            kind=rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0] if on_host else Kind.KILL_DISPATCHER,
            place=Place.SYSTEM_CALL if rng.randrange(_TIMED_EVERY) else Place.TIME,
            delay=rng.uniform(0, _DELAY),
            stops=round(10 ** rng.uniform(*_STOPS)),
            choice=rng.random(),
            pause=rng.uniform(0, _HOST_PAUSE if on_host else _DISPATCHER_PAUSE),
        )
