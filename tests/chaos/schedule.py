"""The schedule of faults: kind, target, time and duration. Pure: the same seed gives the same schedule.

The kinds come from a shuffled deck with each kind as often as its weight, then from the next deck. So each kind occurs
in every run that is longer than two decks, which last about nine minutes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from chaos.proxy import Mode

#: Faults per minute, without bursts.
_RATE = 30.0
#: One fault in this many is a burst of several together; the number of faults in a burst (from, below).
_BURST_EVERY, _BURST = 12, (3, 6)
#: Weights and durations of faults in seconds: too short to be noticed; noticed; longer than `disconnect_timeout`;
#: longer than `host_timeout`.
_LENGTHS: Sequence[tuple[int, tuple[float, float]]] = (
    (45, (0.05, 1.0)),
    (45, (1.0, 5.0)),
    (8, (9.0, 12.0)),
    (2, (24.0, 32.0)),
)
#: Maximum suspension of a supervisor in seconds: after a longer one, its host is lost while its calls run.
_MAX_SUPERVISOR_SUSPENSION = 6.0
#: Maximum duration of a fault of the dispatcher in seconds: with longer faults, there is too little to test.
_MAX_DISPATCHER_FAULT = 12.0
#: Seconds of a crowd, at least, because it needs time to arrive; and at most: the library tries again for 10 s.
_MIN_CROWD, _MAX_CROWD = 2.0, 6.0
#: Seconds without a new fault at the start, for the first jobs, and before the end; and seconds that a fault may last
#: after the end.
_LEAD, _TAIL, _OVER = 2.0, 1.0, 3.0
#: Steps of the wall clock, in seconds.
_STEPS = (-7200.0, -61.0, -1.5, 1.5, 61.0, 7200.0)


class Kind(StrEnum):
    """Kinds of faults. Those of the network are the modes of a proxy."""

    KILL_DISPATCHER = "kill dispatcher"
    RESTART_DISPATCHER = "restart dispatcher"
    SUSPEND_DISPATCHER = "suspend dispatcher"
    RELOAD_DISPATCHER = "reload dispatcher"
    KILL_FRONTEND = "kill frontend"
    RESTART_FRONTEND = "restart frontend"
    SUSPEND_FRONTEND = "suspend frontend"
    RELOAD_FRONTEND = "reload frontend"
    END_ALL_CALLS = "end all calls"
    KILL_LAUNCHER = "kill launcher"
    RESTART_LAUNCHER = "restart launcher"
    REPLACE_SUPERVISOR = "replace supervisor"
    KILL_SUPERVISOR = "kill supervisor"
    SUSPEND_SUPERVISOR = "suspend supervisor"
    KILL_ZYGOTE = "kill zygote"
    KILL_CALL = "kill call"
    FULL_DISK = "full disk"
    STEP_CLOCK = "step clock"
    HANG_LOOKUPS = "hang lookups"  # of a host's name
    LEAVE_DISPATCHER_LOG = "leave dispatcher log unread"  # its stderr is a full pipe
    LEAVE_HOST_LOGS = "leave host logs unread"
    REWRITE_HOSTS_FILE = "rewrite hosts file"  # in place, in pieces, with pauses
    CROWD = "crowd"  # of connections to the dispatcher, more than it accepts
    CLEAN_RUNTIME_DIRECTORY = "clean runtime directory"


#: Weights of the kinds: how often each occurs in a deck.
_WEIGHTS: Mapping[Kind | Mode, int] = {
    Kind.KILL_DISPATCHER: 8,
    Kind.RESTART_DISPATCHER: 5,
    Kind.SUSPEND_DISPATCHER: 4,
    Kind.RELOAD_DISPATCHER: 2,
    Kind.KILL_FRONTEND: 7,
    Kind.RESTART_FRONTEND: 5,
    Kind.SUSPEND_FRONTEND: 4,
    Kind.RELOAD_FRONTEND: 3,
    Kind.END_ALL_CALLS: 1,
    Kind.KILL_LAUNCHER: 2,
    Kind.RESTART_LAUNCHER: 3,
    Kind.REPLACE_SUPERVISOR: 3,
    Kind.KILL_SUPERVISOR: 4,
    Kind.SUSPEND_SUPERVISOR: 3,
    Kind.KILL_ZYGOTE: 3,
    Kind.KILL_CALL: 8,
    Kind.FULL_DISK: 3,
    Kind.STEP_CLOCK: 4,
    Kind.HANG_LOOKUPS: 5,
    Kind.LEAVE_DISPATCHER_LOG: 3,
    Kind.LEAVE_HOST_LOGS: 3,
    Kind.REWRITE_HOSTS_FILE: 4,
    Kind.CROWD: 4,
    Kind.CLEAN_RUNTIME_DIRECTORY: 3,
    Mode.CUT: 7,
    Mode.HALF_OPEN: 6,
    Mode.STALLED: 6,
    Mode.SLOW: 5,
    Mode.RESET: 6,
    Mode.REFUSE: 4,
}

#: Kinds with the dispatcher as target; all others have a host.
_DISPATCHER_KINDS = frozenset(
    {
        Kind.KILL_DISPATCHER,
        Kind.RESTART_DISPATCHER,
        Kind.SUSPEND_DISPATCHER,
        Kind.RELOAD_DISPATCHER,
        Kind.FULL_DISK,
        Kind.STEP_CLOCK,
        Kind.LEAVE_DISPATCHER_LOG,
        Kind.REWRITE_HOSTS_FILE,
        Kind.CROWD,
    }
)


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault.

    Attributes:
        at: seconds after the start of the run.
        kind: the kind.
        host: its target; None: the dispatcher.
        seconds: its duration, or the time until the ended daemon starts again.
        step: the change of the clock in seconds.
        choice: a number from 0 to 1 that selects one of several targets or ways.
    """

    at: float
    kind: Kind | Mode
    host: str | None
    seconds: float
    step: float
    choice: float


def schedule(seed: int, seconds: float, hosts: Sequence[str]) -> list[Fault]:
    """Return the faults of a run, in the order of their times.

    Args:
        seed: the seed.
        seconds: duration of the run; all faults begin within it.
        hosts: the names of the hosts.
    """
    rng = random.Random(seed)
    kinds = _kinds(rng)
    faults: list[Fault] = []
    at = _LEAD
    while at < seconds - _TAIL:
        several = not rng.randrange(_BURST_EVERY)
        faults += [
            _fault(rng, next(kinds), at, seconds + _OVER - at, hosts)
            for _ in range(rng.randrange(*_BURST) if several else 1)
        ]
        at += rng.uniform(0.2, 1.8) * 60.0 / _RATE
    return faults


def _kinds(rng: random.Random) -> Iterator[Kind | Mode]:
    """Yield the kinds of one deck after the other."""
    while True:
        deck = [kind for kind, weight in _WEIGHTS.items() for _ in range(weight)]
        rng.shuffle(deck)
        yield from deck


def _fault(rng: random.Random, kind: Kind | Mode, at: float, longest: float, hosts: Sequence[str]) -> Fault:
    ((_, bounds),) = rng.choices(_LENGTHS, [weight for weight, _ in _LENGTHS])
    length = min(rng.uniform(*bounds), longest)
    if kind is Kind.SUSPEND_SUPERVISOR:
        length = min(length, _MAX_SUPERVISOR_SUSPENSION)
    elif kind is Kind.CROWD:
        length = min(max(length, _MIN_CROWD), _MAX_CROWD)
    elif kind in _DISPATCHER_KINDS:
        length = min(length, _MAX_DISPATCHER_FAULT)
    host = rng.choice(hosts)
    return Fault(
        at=at,
        kind=kind,
        host=None if kind in _DISPATCHER_KINDS else host,
        seconds=length,
        step=rng.choice(_STEPS),
        choice=rng.random(),
    )
