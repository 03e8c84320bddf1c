"""The environment of runs: objects of the dispatcher, and writes to the store."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from harp.protocol.harpd import Attach, Caller, Request, RequestedTerms, StartEncoder, encode_request
from harp_daemon.outcome import when_done
from harp_daemon.timer_wheel import TimerWheel
from harpcaller.audit import Audit
from harpcaller.config import Config
from harpcaller.hosts.capabilities import HostCapabilities, HostSupport
from harpcaller.hosts.pool import ConnectionPool
from harpcaller.hosts.registry import Host
from harpcaller.hosts.resolving import Resolver
from harpcaller.hosts.tls import HostTLS
from harpcaller.metrics import Metrics
from harpcaller.model.jobs import Identity, Job, NewJob
from harpcaller.model.latest import Latest
from harpcaller.notifier import Notifier
from harpcaller.secret_arguments import CannotDecrypt, OpenedArguments, SecretKeys
from harpcaller.store import StorageError
from harpcaller.store.sqlite import Store

log = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_PRINCIPAL = 255  #: Maximum characters of a principal, and of an address, that a host is sent.
_ADDRESSES = 10_000  #: Number of jobs whose client's address is in memory; each needs about 200 bytes.
_MAX_ENCODERS = 2000  #: Maximum number of stored encoders of starts; each needs about 1 kB.
_RETRY_DELAY = 1.0  #: Seconds before a failed write is repeated.


class StoreWrites:
    """The writes of all runs. Each is repeated until the store succeeds, and no task waits for it."""

    def __init__(self, timers: TimerWheel) -> None:
        self._timers = timers
        self._failing: set[object] = set()
        self._failed_at = float("-inf")

    @property
    def failing(self) -> bool:
        """Whether a write has failed and is being repeated."""
        return bool(self._failing)

    @property
    def waiting(self) -> int:
        """The number of writes that have failed and are being repeated."""
        return len(self._failing)

    def failed_within(self, seconds: float) -> bool:
        """Return whether a write is failing, or was during the last `seconds`."""
        return self.failing or time.monotonic() - self._failed_at < seconds

    def retry_until_stored(
        self,
        job_id: str,
        write: Callable[[], Awaitable[T]],
        on_stored: Callable[[T], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        """Repeat a write while it raises `StorageError`; pass its result to `on_stored`, other errors to `on_error`."""

        def attempt() -> None:
            when_done(write(), on_done)

        def on_done(attempted: asyncio.Future[T]) -> None:
            if attempted.cancelled():
                return
            error = attempted.exception()
            if isinstance(error, StorageError):
                if write not in self._failing:
                    log.error("cannot store call data; retrying", extra={"job": job_id, "error": str(error)})
                    self._failing.add(write)
                self._timers.call_later(_RETRY_DELAY, attempt)
                return
            if write in self._failing:
                self._failing.remove(write)
                self._failed_at = time.monotonic()
            try:
                on_stored(attempted.result())
            except Exception as unexpected:  # noqa: BLE001 - `on_error` logs it
                on_error(unexpected)

        attempt()


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
    resolver: Resolver
    capabilities: HostCapabilities
    connections: ConnectionPool
    writes: StoreWrites
    request_claim: Callable[[], None]  # before a write that releases a slot: the same transaction assigns it again
    wall: Callable[[], float]  # the wall clock for stored times; Unix seconds
    secret_keys: SecretKeys | None = None  # None: no key file is configured
    audit: Audit = field(default_factory=Audit)
    metrics: Metrics | None = None  # None: nothing is counted
    #: The addresses of the clients that have submitted the latest jobs, by job, for the hosts of these jobs.
    addresses: Latest[str] = field(default_factory=partial(Latest, _ADDRESSES))
    on_outage: Callable[[str], object] = lambda job_id: None  # called when an outage of a job's host begins or ends
    openings: set[asyncio.Task[Any]] = field(default_factory=set)  #: The tasks that open connections.
    _start_encoders: dict[tuple[Host, HostSupport], StartEncoder] = field(default_factory=dict, init=False)

    def open_secrets(self, job: Job) -> OpenedArguments:
        """Return the arguments of a job with its secret values. Raises `CannotDecrypt`."""
        if job.secrets is None:
            return OpenedArguments(job.arguments)
        if self.secret_keys is None:
            raise CannotDecrypt("secrets_key_file is not set any more; set it again")
        return self.secret_keys.open(job.id, job.arguments, job.secrets)

    def encode_start(self, job: Job, opened: OpenedArguments, host: Host, support: HostSupport) -> bytes:
        """Return the line that starts a job's call; on a legacy harpd the call is connection-bound."""
        arguments = opened.arguments
        if support.instance is None:
            return encode_request(Request(job.procedure, arguments, host.user, host.password))
        secret = self.identity.secret(job.id, host.hostname, job.submitted)
        encoder = self._start_encoders.get((host, support))
        if encoder is None:
            owner = self.identity.owner_at(host.hostname)
            limits = self.config.disconnect_timeout, self.config.result_ttl, job.timeout, job.max_exec_time
            terms = RequestedTerms(job.id, owner, secret, support.instance, *limits)
            shared = Request(job.procedure, arguments, host.user, host.password, terms, support.keep_alive)
            if len(self._start_encoders) >= _MAX_ENCODERS:
                self._start_encoders.clear()  # a restarted supervisor needs a new encoder
            encoder = self._start_encoders[host, support] = StartEncoder(shared)
        caller = None
        if support.caller:
            principal, address = job.owner or "", self.addresses.get(job.id) or ""
            caller = Caller(principal[:_MAX_PRINCIPAL] or None, job.id, address[:_MAX_PRINCIPAL] or None)
        of_job = caller, opened.pointers if support.secrets else ()
        return encoder.encode(job.procedure, arguments, job.id, secret, job.timeout, job.max_exec_time, *of_job)

    def encode_attach(self, job_id: str, submitted: float, host: Host, since: int) -> bytes:
        """Return the line that attaches to a call and resumes its records at number `since`.

        `submitted`: the time of the submission of its job, whose host must be this one; otherwise infinite.
        """
        owner, secret = self.identity.owner_at(host.hostname), self.identity.secret(job_id, host.hostname, submitted)
        return encode_request(Attach(job_id, owner, secret, since, host.user, host.password))


def log_fields(job: Job | NewJob) -> dict[str, Any]:
    """Return the log fields that identify a job."""
    return {"job": job.id, "host": job.host, "procedure": job.procedure, "queue": job.queue and job.queue.decode()}
