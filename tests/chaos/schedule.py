"""The schedule of faults: which, where, when and for how long. Pure: the same seed gives the same schedule."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from chaos.proxy import Mode

#: Faults a minute, bursts apart.
_RATE = 30.0
#: One moment in so many brings several faults at once, and how many.
_BURST_EVERY, _BURST = 12, (3, 6)
#: How long a fault lasts, in seconds, with weights: too short to be noticed; noticed; longer than a host keeps a call
#: without contact; longer than a host may be away.
_LENGTHS: Sequence[tuple[int, tuple[float, float]]] = (
    (45, (0.05, 1.0)),
    (45, (1.0, 5.0)),
    (8, (9.0, 12.0)),
    (2, (24.0, 32.0)),
)
#: The most seconds for which a supervisor is halted: it can't end its calls, and its host would be given up with them.
_LONGEST_WATCHLESS = 6.0
#: The most seconds for which the dispatcher is struck: without it nothing goes on that could be tried.
_LONGEST_CENTRAL = 12.0
#: Seconds without a new fault at the start, for the first jobs, and before the end; no fault lasts longer than `_OVER`
#: seconds after that.
_LEAD, _TAIL, _OVER = 2.0, 1.0, 3.0
#: Steps of the wall clock, in seconds.
_STEPS = (-7200.0, -61.0, -1.5, 1.5, 61.0, 7200.0)


class Kind(StrEnum):
    """Kinds of faults, those of the network apart, which are the modes of a proxy."""

    KILL_DISPATCHER = "kill dispatcher"
    RESTART_DISPATCHER = "restart dispatcher"
    HALT_DISPATCHER = "halt dispatcher"
    RELOAD_DISPATCHER = "reload dispatcher"
    KILL_GATE = "kill gate"
    RESTART_GATE = "restart gate"
    HALT_GATE = "halt gate"
    RELOAD_GATE = "reload gate"
    RESTART_CALLS = "restart calls"
    KILL_KEEPER = "kill keeper"
    RESTART_KEEPER = "restart keeper"
    NEW_SUPERVISOR = "new supervisor"
    KILL_SUPERVISOR = "kill supervisor"
    HALT_SUPERVISOR = "halt supervisor"
    KILL_CALL = "kill call"
    FULL_DISK = "full disk"
    STEP_CLOCK = "step clock"


#: How often a kind comes, in relation to the others.
_WEIGHTS: Mapping[Kind | Mode, int] = {
    Kind.KILL_DISPATCHER: 8,
    Kind.RESTART_DISPATCHER: 5,
    Kind.HALT_DISPATCHER: 4,
    Kind.RELOAD_DISPATCHER: 2,
    Kind.KILL_GATE: 7,
    Kind.RESTART_GATE: 5,
    Kind.HALT_GATE: 4,
    Kind.RELOAD_GATE: 3,
    Kind.RESTART_CALLS: 1,
    Kind.KILL_KEEPER: 2,
    Kind.RESTART_KEEPER: 3,
    Kind.NEW_SUPERVISOR: 3,
    Kind.KILL_SUPERVISOR: 4,
    Kind.HALT_SUPERVISOR: 3,
    Kind.KILL_CALL: 8,
    Kind.FULL_DISK: 3,
    Kind.STEP_CLOCK: 4,
    Mode.CUT: 7,
    Mode.HALF_OPEN: 6,
    Mode.STALLED: 6,
    Mode.SLOW: 5,
    Mode.RESET: 6,
    Mode.REFUSE: 4,
}

#: Kinds that strike the dispatcher; all others strike a host.
_CENTRAL = frozenset(
    {
        Kind.KILL_DISPATCHER,
        Kind.RESTART_DISPATCHER,
        Kind.HALT_DISPATCHER,
        Kind.RELOAD_DISPATCHER,
        Kind.FULL_DISK,
        Kind.STEP_CLOCK,
    }
)


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault.

    Attributes:
        at: seconds after the start of the run.
        kind: what happens.
        host: whom it strikes; None: the dispatcher.
        seconds: how long it lasts, or how long what was ended stays away.
        step: by how much the clock goes wrong.
        choice: from 0 up to 1, for who of several is struck.
    """

    at: float
    kind: Kind | Mode
    host: str | None
    seconds: float
    step: float
    choice: float


def schedule(seed: int, seconds: float, hosts: Sequence[str]) -> list[Fault]:
    """The faults of a run, in the order of their moments.

    Args:
        seed: decides everything.
        seconds: how long the run is; the faults begin within it.
        hosts: the hosts' names.
    """
    chance = random.Random(seed)
    faults: list[Fault] = []
    at = _LEAD
    while at < seconds - _TAIL:
        several = not chance.randrange(_BURST_EVERY)
        faults += [
            _fault(chance, at, seconds + _OVER - at, hosts) for _ in range(chance.randrange(*_BURST) if several else 1)
        ]
        at += chance.uniform(0.2, 1.8) * 60.0 / _RATE
    return faults


def _fault(chance: random.Random, at: float, longest: float, hosts: Sequence[str]) -> Fault:
    kind: Kind | Mode = chance.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
    ((_, bounds),) = chance.choices(_LENGTHS, [weight for weight, _ in _LENGTHS])
    length = min(chance.uniform(*bounds), longest)
    if kind is Kind.HALT_SUPERVISOR:
        length = min(length, _LONGEST_WATCHLESS)
    elif kind in _CENTRAL:
        length = min(length, _LONGEST_CENTRAL)
    host = chance.choice(hosts)
    return Fault(
        at=at,
        kind=kind,
        host=None if kind in _CENTRAL else host,
        seconds=length,
        step=chance.choice(_STEPS),
        choice=chance.random(),
    )
