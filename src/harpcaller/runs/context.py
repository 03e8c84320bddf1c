"""The objects and settings of the dispatcher that every run needs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from harp.protocol.harpd import Attach, Request, RequestedTerms, StartEncoder, encode_request
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

#: Maximum number of stored encoders of starts; each needs about 1 kB.
_MAX_ENCODERS = 2000


@dataclass(frozen=True, slots=True)
class RunContext:
    """The environment of a run."""

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
    #: Called with a write that releases a slot, so that another job gets it in the same transaction.
    request_claim: Callable[[], None]
    wall: Callable[[], float]  # the wall clock for stored times; Unix seconds
    timings: Timings = field(default_factory=Timings)
    #: The tasks that open connections, also those that were cancelled and have not ended yet.
    openings: set[asyncio.Task[Any]] = field(default_factory=set)
    _start_encoders: dict[tuple[Host, HostSupport], StartEncoder] = field(default_factory=dict, init=False)

    def encode_start(self, job: Job, host: Host, support: HostSupport) -> bytes:
        """Return the line that starts a job's call; on a legacy harpd the call is connection-bound."""
        if support.instance is None:
            return encode_request(Request(job.procedure, job.arguments, host.user, host.password))
        secret = self.identity.secret(job.id)
        encoder = self._start_encoders.get((host, support))
        if encoder is None:
            terms = RequestedTerms(
                id=job.id,
                owner=self.identity.owner_at(host.hostname),
                secret=secret,
                instance=support.instance,
                disconnect_timeout=self.config.disconnect_timeout,
                result_ttl=self.config.result_ttl,
                timeout=job.timeout,
                max_exec_time=job.max_exec_time,
            )
            shared = Request(job.procedure, job.arguments, host.user, host.password, terms, support.keep_alive)
            if len(self._start_encoders) >= _MAX_ENCODERS:
                self._start_encoders.clear()  # each start of a supervisor needs another one
            encoder = self._start_encoders[host, support] = StartEncoder(shared)
        return encoder.encode(job.procedure, job.arguments, job.id, secret, job.timeout, job.max_exec_time)

    def encode_attach(self, job_id: str, host: Host, since: int) -> bytes:
        """Return the line that attaches to a job's call and resumes its records at number `since`."""
        owner, secret = self.identity.owner_at(host.hostname), self.identity.secret(job_id)
        return encode_request(Attach(job_id, owner, secret, since, host.user, host.password))


def log_fields(job: Job | NewJob) -> dict[str, Any]:
    """Return the log fields that identify a job."""
    queue = job.queue.decode() if job.queue is not None else None
    return {"job": job.id, "host": job.host, "procedure": job.procedure, "queue": queue}
