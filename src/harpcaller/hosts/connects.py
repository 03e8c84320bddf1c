"""What is known of hosts by their connections and calls: outcomes, certificates, round trips and clocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from harp.protocol.json_text import Raw
from harp_daemon.expiry import read_end
from harpcaller.model.jobs import Job
from harpcaller.model.phases import narrow_clock_skew

OUTCOMES = ("ok", "certificate_error", "network_error", "os_error", "protocol_error")  #: The outcomes.


class HostConnects:
    """The connections that were opened, or could not be, since the start of the dispatcher."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, ...]] = Counter({(outcome,): 0 for outcome in OUTCOMES})
        self.certificate_ends: dict[str, float] = {}  #: By host, the end of its last accepted certificate, Unix time.
        self.round_trips: dict[str, float] = {}  #: By host, seconds from its last heartbeat to the reply.
        self.clock_skews: dict[str, float] = {}  #: By host, seconds by which its clock is ahead, at least.

    def record_open(self, host: str, certificate: bytes) -> None:
        """Record a connection, with the certificate of its host."""
        self.outcomes[("ok",)] += 1
        end = read_end(certificate)
        if end is not None:
            self.certificate_ends[host] = end

    def record_round_trip(self, host: str, seconds: float) -> None:
        """Record how long the reply to a heartbeat took."""
        self.round_trips[host] = seconds

    def record_call(self, job: Job, ended: float, exit_info: Raw | None) -> None:
        """Record what an ended call shows of its host's clock; `ended`: when its end was received, Unix time."""
        skew = narrow_clock_skew(self.clock_skews.get(job.host), job.started, ended, exit_info)
        if skew is not None:
            self.clock_skews[job.host] = skew

    def record_failure(self, outcome: str) -> None:
        """Record a connection that could not be opened."""
        self.outcomes[(outcome if outcome in OUTCOMES else "network_error",)] += 1

    def forget_others(self, hosts: Iterable[str]) -> None:
        """Forget what is known of hosts that are not among these."""
        known = set(hosts)
        for values in (self.certificate_ends, self.round_trips, self.clock_skews):
            for host in values.keys() - known:
                del values[host]
