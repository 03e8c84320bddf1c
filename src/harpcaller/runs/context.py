"""The objects and settings of the dispatcher that every run needs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from harp.protocol.harpd import Attach, Request, RequestedTerms
from harpcaller.config import Config
from harpcaller.hosts.capabilities import HostCapabilities
from harpcaller.hosts.inventory import Host
from harpcaller.hosts.pool import ConnectionPool
from harpcaller.hosts.tls import HostTLS
from harpcaller.model.jobs import Identity, Job, NewJob
from harpcaller.notifier import Notifier
from harpcaller.runs.timings import Timings
from harpcaller.store import StorageError, Store

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds before a failed write is retried.
_RETRY_DELAY = 1.0


@dataclass(slots=True)
class PendingWrites:
    """The number of writes that failed and are being retried."""

    count: int = 0


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
        capabilities: what is known of hosts.
        connections: idle connections to hosts.
        wall: the wall clock for stored times; Unix seconds.
        pending_writes: the failing writes of all runs.
        timings: durations of the dispatcher's own steps.
    """

    config: Config
    tls: HostTLS
    store: Store
    notifier: Notifier
    find_host: Callable[[str], Host | None]
    identity: Identity
    capabilities: HostCapabilities
    connections: ConnectionPool
    wall: Callable[[], float]
    pending_writes: PendingWrites = field(default_factory=PendingWrites)
    timings: Timings = field(default_factory=Timings)

    def start_request(self, job: Job, host: Host, instance: str | None) -> Request:
        """Return the request that starts a job's call; without the supervisor's instance id it is connection-bound."""
        if instance is None:
            return Request(job.procedure, job.arguments, host.user, host.password)
        terms = RequestedTerms(
            id=job.id,
            owner=self.identity.owner_at(host.hostname),
            secret=self.identity.secret(job.id),
            instance=instance,
            disconnect_timeout=self.config.disconnect_timeout,
            result_ttl=self.config.result_ttl,
            timeout=job.timeout,
            max_exec_time=job.max_exec_time,
        )
        return Request(
            job.procedure, job.arguments, host.user, host.password, terms, self.capabilities.supports_keep_alive(host)
        )

    def attach_request(self, job_id: str, host: Host, since: int) -> Attach:
        """Return the request that attaches to a job's call and resumes its records at number `since`."""
        owner, secret = self.identity.owner_at(host.hostname), self.identity.secret(job_id)
        return Attach(job_id, owner, secret, since, host.user, host.password)

    async def retry_until_stored(self, job_id: str, write: Callable[[], Awaitable[T]]) -> T:
        """Return the result of a job's write, and retry the write until the store succeeds."""
        failing = False
        try:
            while True:
                try:
                    return await write()
                except StorageError as error:
                    if not failing:
                        log.error("cannot store call data; retrying", extra={"job": job_id, "error": str(error)})
                        self.pending_writes.count += 1
                        failing = True
                await asyncio.sleep(_RETRY_DELAY)
        finally:
            self.pending_writes.count -= failing


def log_fields(job: Job | NewJob) -> dict[str, Any]:
    """Return the log fields that identify a job."""
    queue = job.queue.decode() if job.queue is not None else None
    return {"job": job.id, "host": job.host, "procedure": job.procedure, "queue": queue}
