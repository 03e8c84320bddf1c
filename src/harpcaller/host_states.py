"""What the dispatcher knows about its hosts, for lists: whether they accept starts, since when, and their daemons.

Nothing is asked of a host for this: the answer is from the starts and connections of its jobs, so that a host without
jobs is unknown until its first one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from harpcaller.hosts.capabilities import HostCapabilities
from harpcaller.hosts.connects import HostConnects
from harpcaller.hosts.registry import Host
from harpcaller.runs.host_starts import HostStarts
from harpcaller.runs.run import Run


class Reachability(StrEnum):
    """Whether a host can be reached, as far as the dispatcher knows."""

    UP = "up"  # the latest connection succeeded
    DOWN = "down"  # the latest start failed, or contact with a call is lost
    UNKNOWN = "unknown"  # no connection yet


@dataclass(frozen=True, slots=True)
class HostState:
    """A host of the registry and what is known about it. Times are Unix seconds."""

    host: Host
    reachability: Reachability
    since: float | None  #: Since when it is down; None: it is not, or this is unknown.
    checked: float | None  #: The latest contact or failure.
    contact: float | None  #: The latest contact.
    running: int  #: Number of its jobs that hold a slot.
    queued: int
    limit: int  #: Maximum number of its running calls.
    outages: int  #: Number of its calls without contact.
    error: str | None  #: Why it is down.
    last_error: tuple[float, str] | None  #: The latest failure since the start of the dispatcher, and its time.
    next_attempt: float | None  #: When a failing host is tried again.
    daemon: Mapping[str, Any] | None  #: What its harpd supports, and its version; None: unknown.
    round_trip: float | None  #: Seconds from the latest heartbeat to its reply; None: none was sent yet.
    clock_skew: float | None  #: Seconds by which its clock is ahead, at least; None: none of its calls has ended yet.
    certificate_end: float | None  #: When the latest accepted certificate ends, Unix time; None: no connection yet.
    source: str | None = None  #: The file or script that it is from.


def describe_hosts(
    hosts: Iterable[Host],
    counts: Mapping[str, tuple[int, int]],
    runs: Iterable[Run],
    starts: HostStarts,
    capabilities: HostCapabilities,
    connects: HostConnects,
    limit: int,
    now: float,
) -> list[HostState]:
    """Return the states of hosts; `counts` are the numbers of jobs with a slot and of queued jobs, by host."""
    of_host: dict[str, list[Run]] = {}
    for run in runs:
        of_host.setdefault(run.job.host, []).append(run)
    known = starts, capabilities, connects
    return [
        _describe(host, counts.get(host.hostname, (0, 0)), of_host.get(host.hostname, []), *known, limit, now)
        for host in hosts
    ]


def _describe(
    host: Host,
    counts: tuple[int, int],
    runs: Sequence[Run],
    starts: HostStarts,
    capabilities: HostCapabilities,
    connects: HostConnects,
    limit: int,
    now: float,
) -> HostState:
    name = host.hostname
    lost = [run.outage.since for run in runs if run.outage is not None]
    attached = [run.last_contact(now) for run in runs if run.outage is None]
    contact = max((at for at in (starts.get_contact(name), *attached) if at is not None), default=None)
    failing, failure = starts.get_failing(name), starts.get_failure(name)
    described = None if failing is None else failing.describe(now)
    if described is not None:
        lost.append(described["since"])
    if failure is not None and (contact is None or failure[0] > contact):
        lost.append(failure[0])
    if lost:
        state = Reachability.DOWN
    else:
        state = Reachability.UP if starts.is_open(name) else Reachability.UNKNOWN
    supported = capabilities.get_cached(host)
    return HostState(
        host=host,
        reachability=state,
        since=min(lost, default=None),
        checked=max((at for at in (contact, failure and failure[0]) if at is not None), default=None),
        contact=contact,
        running=counts[0],
        queued=counts[1],
        limit=limit,
        outages=sum(run.outage is not None for run in runs),
        error=failure[1] if state is Reachability.DOWN and failure is not None else None,
        last_error=failure,
        next_attempt=None if described is None else described["next"],
        daemon=None if supported is None else supported.describe(),
        round_trip=connects.round_trips.get(name),
        clock_skew=connects.clock_skews.get(name),
        certificate_end=connects.certificate_ends.get(name),
    )
