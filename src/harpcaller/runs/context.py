"""The objects and settings of the dispatcher that every run needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from harp.protocol.harpd import Attach, Request, RequestedTerms, encode_request
from harp_daemon.timer_wheel import TimerWheel
from harpcaller.config import Config
from harpcaller.hosts.capabilities import HostCapabilities, HostSupport
from harpcaller.hosts.inventory import Host
from harpcaller.hosts.pool import ConnectionPool
from harpcaller.hosts.tls import HostTLS
from harpcaller.model.jobs import Identity, Job, NewJob
from harpcaller.notifier import Notifier
from harpcaller.runs.store_writes import StoreWrites
from harpcaller.runs.timings import Timings
from harpcaller.store import Store


@dataclass(frozen=True, slots=True)
class RunContext:
    """The environment of a run.

    Attributes:
        config: timeouts and limits.
        tls: checks the certificates of hosts.
        store: stores records and ends.
        notifier: publishes records and ends to waiting clients.
        find_host: returns a host of the registry by name, or None.
        identity: the dispatcher's identity towards hosts.
        timers: the timers of the event loop.
        capabilities: what is known of hosts.
        connections: idle connections to hosts.
        writes: the writes of all runs.
        request_claim: called with a write that releases a slot, so that another job gets it in the same transaction.
        wall: the wall clock for stored times; Unix seconds.
        timings: durations of the dispatcher's own steps.
    """

    config: Config
    tls: HostTLS
    store: Store
    notifier: Notifier
    find_host: Callable[[str], Host | None]
    identity: Identity
    timers: TimerWheel
    capabilities: HostCapabilities
    connections: ConnectionPool
    writes: StoreWrites
    request_claim: Callable[[], None]
    wall: Callable[[], float]
    timings: Timings = field(default_factory=Timings)

    def encode_start(self, job: Job, host: Host, support: HostSupport) -> bytes:
        """Return the line that starts a job's call; on a legacy harpd the call is connection-bound."""
        if support.instance is None:
            return encode_request(Request(job.procedure, job.arguments, host.user, host.password))
        terms = RequestedTerms(
            id=job.id,
            owner=self.identity.owner_at(host.hostname),
            secret=self.identity.secret(job.id),
            instance=support.instance,
            disconnect_timeout=self.config.disconnect_timeout,
            result_ttl=self.config.result_ttl,
            timeout=job.timeout,
            max_exec_time=job.max_exec_time,
        )
        request = Request(job.procedure, job.arguments, host.user, host.password, terms, support.keep_alive)
        return encode_request(request)

    def encode_attach(self, job_id: str, host: Host, since: int) -> bytes:
        """Return the line that attaches to a job's call and resumes its records at number `since`."""
        owner, secret = self.identity.owner_at(host.hostname), self.identity.secret(job_id)
        return encode_request(Attach(job_id, owner, secret, since, host.user, host.password))


def log_fields(job: Job | NewJob) -> dict[str, Any]:
    """Return the log fields that identify a job."""
    queue = job.queue.decode() if job.queue is not None else None
    return {"job": job.id, "host": job.host, "procedure": job.procedure, "queue": queue}
